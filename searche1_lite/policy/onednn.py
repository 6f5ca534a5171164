"""Linear layers by oneDNN, for rollouts on a CPU: PyTorch's own go to MKL, which takes twice as long on AMD's cores.

PyTorch has oneDNN compute in fp32 for compiled models alone. These are the operators that it compiles them to.
"""

import torch

WORTHWHILE = 2**18
"""Elements of a weight from which oneDNN is the faster: it has more to prepare for a call."""


def has_onednn() -> bool:
    """Was this PyTorch built with what `OneDnnLinear` needs?"""
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


class OneDnnLinear(torch.nn.Module):
    """What a `torch.nn.Linear` in fp32 on the CPU computes, without gradients, to within rounding.

    Args:
        linear: the layer. Its bias is shared, and so is its weight unless that is packed.
        pack: lay the weight out as oneDNN likes it best, in a copy, which is then all that this layer holds. It takes
            as long as a few products with it, and is not for a weight that others go on using.
    """

    def __init__(self, linear: torch.nn.Linear, *, pack: bool) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if pack else weight
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return outputs
