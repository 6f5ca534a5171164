"""The LoRA adapter that is trained, and frozen copies of it: saved, loaded, switched.

Its weights are fp32 masters on every device. Parameters keep their identity throughout, so optimizers stay valid.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from searche1_lite.config import ModelConfig
from searche1_lite.policy.model_files import read_adapter_config, read_adapter_weights
from searche1_lite.runtime.errors import UserError

ADAPTER = "default"
"""The adapter that is trained, saved and loaded."""


def lora_config(config: ModelConfig) -> LoraConfig:
    """LoRA on every linear layer but the output embeddings, without dropout."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",  # PEFT leaves the output embeddings out of it
        task_type="CAUSAL_LM",
    )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the trained adapter alone: `adapter_model.safetensors` and `adapter_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, selected_adapters=[ADAPTER], safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, which names folders of this machine


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Copies a saved adapter into the trained one, in place (parameters keep their identity, so optimizers stay valid).

    Raises:
        UserError: if the folder holds no adapter, or one for another base model or of another shape.
    """
    saved, own = read_adapter_config(folder), model.peft_config[ADAPTER]
    check_base(folder, saved, own.base_model_name_or_path)
    if (saved.r, saved.lora_alpha) != (own.r, own.lora_alpha):
        raise UserError(
            f"the adapter in {folder} has rank {saved.r} and alpha {saved.lora_alpha}, but this run uses rank {own.r} "
            f"and alpha {own.lora_alpha}; set model.lora_rank and model.lora_alpha to the former"
        )
    weights = read_adapter_weights(folder)
    targets = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    for name in sorted(weights.keys() | targets.keys()):
        theirs = tuple(weights[name].shape) if name in weights else "nothing"
        ours = tuple(targets[name].shape) if name in targets else "nothing"
        if theirs != ours:
            raise UserError(
                f"the adapter in {folder} does not fit {own.base_model_name_or_path!r}: at {name} it has {theirs}, "
                f"the model {ours}; give an adapter trained on this very base"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(weights[name])


def check_base(folder: Path, saved: LoraConfig, name: str | None) -> None:
    """Refuses an adapter that was trained on another base than the model `name`; UserError says so."""
    if not _same_model(saved.base_model_name_or_path, name):
        raise UserError(
            f"the adapter in {folder} is for the base model {saved.base_model_name_or_path!r}, but this run uses "
            f"{name!r}; set model.name (or --preset) to the former or give another adapter"
        )


def _same_model(one: str | None, other: str | None) -> bool:
    if one == other:
        return True
    if one is None or other is None:
        return False
    one_path, other_path = Path(one).expanduser(), Path(other).expanduser()
    return one_path.is_dir() and other_path.is_dir() and one_path.resolve() == other_path.resolve()


def _adapter_parameters(model: PeftModel, name: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of one adapter, keyed by their names with the adapter's own name cut out."""
    marker = f".{name}."
    return {
        key.replace(marker, "."): parameter
        for key, parameter in model.named_parameters()
        if marker in key and "lora_" in key
    }


def adapter_digest(model: PeftModel) -> str | None:
    """SHA-256 of the trained adapter's weights; None if it is as LoRA begins, which computes what the base does."""
    parameters = _adapter_parameters(model, ADAPTER)
    if not any(parameter.any() for name, parameter in parameters.items() if "lora_B" in name):
        return None
    settings = model.peft_config[ADAPTER]
    digest = hashlib.sha256(f"{settings.lora_alpha} / {settings.r}".encode())
    for name, parameter in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def snapshot_adapter(model: PeftModel, name: str = "teacher") -> None:
    """Adds the frozen adapter `name`, a copy of the trained one, or brings it up to date if it is there.

    The active adapter and every other parameter's `requires_grad` stay as they were.
    """
    if name == ADAPTER:
        raise ValueError(f"a snapshot cannot be called {ADAPTER!r}: that is the adapter being trained")
    if name not in model.peft_config:
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        devices = [parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"][:1]
        # Injecting draws initial weights that are overwritten at once; the caller's random state must not notice.
        with torch.random.fork_rng(devices=devices):
            model.add_adapter(name, deepcopy(model.peft_config[ADAPTER]))
        for parameter in model.parameters():
            parameter.requires_grad_(flags.get(parameter, False))
    source, copy = _adapter_parameters(model, ADAPTER), _adapter_parameters(model, name)
    with torch.no_grad():
        for key, parameter in copy.items():
            parameter.data = source[key].detach().clone()
            parameter.requires_grad_(False)


def drop_adapter(model: PeftModel, name: str) -> None:
    """Removes a snapshot; nothing happens if there is none of that name."""
    if name == ADAPTER:
        raise ValueError("the trained adapter cannot be dropped")
    if name in model.peft_config:
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.delete_adapter(name)
        for parameter in model.parameters():
            parameter.requires_grad_(flags[parameter])


@contextmanager
def use_adapter(model: PeftModel, name: str | None) -> Iterator[None]:
    """Runs the body with adapter `name` active, or with the bare base for None.

    The active adapter, whether adapters were disabled, and every `requires_grad` flag are as before afterwards; inside,
    the flags are as before too, so a frozen snapshot stays frozen. Contexts nest.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = model.active_adapter
    disabled = any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))

    def switch(adapter: str | None, off: bool) -> None:
        if adapter is not None:
            model.set_adapter(adapter)
        if off:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
        # PEFT turns gradients on and off with the adapters; put back what the owner of each parameter chose.
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    switch(name, off=name is None)
    try:
        yield
    finally:
        switch(active, off=disabled)


@contextmanager
def keep_adapter_fp32(model: PeftModel) -> Iterator[None]:
    """For the constructor of a TRL trainer, which rounds a 4-bit model's trainable LoRA weights to bf16.

    Afterwards the weights are fp32 again, bit for bit as before: the policy does not move, and no small update is lost.
    """
    masters = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in masters:
                parameter.data = masters[name]
