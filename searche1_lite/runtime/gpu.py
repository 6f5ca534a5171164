"""One GPU per process: with several visible, TRL would spread batches over them."""

import os
import sys

from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.ranks import is_launched


def set_cuda_defaults() -> None:
    """Sets the environment variables that PyTorch reads when it first looks for GPUs; call it before that."""
    if not is_launched():  # a launcher gives each process a GPU of its own
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if sys.platform == "linux":
        # Steps and buckets of the KV cache differ in size: without this, freed memory is in pieces too small to reuse.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def use_one_gpu() -> None:
    """`set_cuda_defaults`, and refuses several GPUs for a process without a launcher.

    Raises:
        UserError: if several are chosen, or PyTorch is loaded already and sees several.
    """
    if not is_launched():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or "," in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
            raise UserError(
                "a run uses one GPU; set CUDA_VISIBLE_DEVICES to one of them, or start a process for each with "
                "`accelerate launch -m searche1_lite train ...`"
            )
        if "torch" in sys.modules:
            import torch

            if torch.cuda.device_count() > 1:
                raise UserError("a run uses one GPU, and several are visible; set CUDA_VISIBLE_DEVICES to one of them")
    set_cuda_defaults()
