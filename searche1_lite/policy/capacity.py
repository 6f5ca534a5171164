"""What a GPU or a machine can hold, and what a run will need at its worst moment. No tensor is made here."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from searche1_lite.config import Config
from searche1_lite.runtime.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
CUDA_RESERVE = int(0.7 * GIB)
"""What is kept free of a card for the CUDA context and for fragmentation, an assumption."""
PROCESS_RESERVE = int(1.2 * GIB)
"""What a process on a CPU takes beside its tensors, Java and libraries: 0.7 to 1.3 GiB were seen."""

# So that a plan can be made where the hub cannot be reached; from the models' public config.json.
_KNOWN_SHAPES = {
    "Qwen/Qwen2.5-3B": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    }
}
_KNOWN_SHAPES["Qwen/Qwen2.5-3B-Instruct"] = _KNOWN_SHAPES["Qwen/Qwen2.5-3B"]


def model_shape(config: Config) -> "PretrainedConfig":
    """The base model's configuration: from its folder, the hub or, where that fails, from what is known of it.

    Raises:
        UserError: if it is not to be had.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    from searche1_lite.policy.model import resolve_model
    from searche1_lite.runtime.hub import download_file

    source = Path(resolve_model(config.model.name))
    try:
        if not source.is_dir():
            file = download_file(config.model.name, "config.json", repo_type="model", revision=config.model.revision)
            source = file.parent
        return AutoConfig.from_pretrained(source, trust_remote_code=config.model.trust_remote_code)
    except UserError:
        if (known := _KNOWN_SHAPES.get(config.model.name)) is None:
            raise
        return CONFIG_MAPPING[known["model_type"]](**known)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the shape of {config.model.name!r}: {first_line(error)}; give a model saved by transformers",
            exit_code=1,
        ) from error


def gpu_capacity() -> int:
    """Bytes of the GPU that this process has or can have; what the desktop holds is not free."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return min(free + torch.cuda.memory_reserved(), total - CUDA_RESERVE)


def predicted_peak(config: Config) -> tuple[int, int]:
    """Bytes that a process with this run may need at its worst moment, and those that are free: of the GPU if there is
    one, else of this machine."""
    import psutil
    import torch

    from searche1_lite.policy.memory import plan_memory
    from searche1_lite.policy.model import compute_dtype

    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    capacity = gpu_capacity() if device == "cuda" else psutil.virtual_memory().available
    plan = plan_memory(config, model_shape(config), device, compute_dtype(torch.device(device)), capacity)
    return max(plan.peaks.values()) + (CUDA_RESERVE if device == "cuda" else PROCESS_RESERVE), capacity
