"""The policy: a 4-bit base, one LoRA adapter on it, and frozen copies of that adapter.

Everything that changes shape or precision of the policy is here. The base is never merged into: re-quantising it would
move the policy. LoRA weights are fp32 masters on every device; activations and the KV cache are in the compute dtype.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from searche1_lite.config import ModelConfig
from searche1_lite.errors import UserError
from searche1_lite.hub import download_folder
from searche1_lite.model_files import check_model_files, check_weights, read_adapter_config, read_adapter_weights
from searche1_lite.seeding import derive_seed

ADAPTER = "default"
"""The adapter that is trained, saved and loaded."""

_DEMO_POLICY = Path(__file__).parent / "demo" / "policy"

TOKENIZER_FILES = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
]

_MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    *TOKENIZER_FILES,
]
"""What is fetched of a model on the hub: no pickled weights, no other formats, no code."""


def resolve_model(name: str) -> str:
    """Where the base model is loaded from: the shipped folder for `demo`, an existing folder, or a hub name.

    Raises:
        UserError: if the shipped policy is missing, or `name` is a path and no such folder exists.
    """
    if name == "demo":
        if not (_DEMO_POLICY / "config.json").is_file():
            raise UserError(
                "the demo policy is missing; build it with `python -m searche1_lite.demo.build`", exit_code=1
            )
        return str(_DEMO_POLICY)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name={name!r} has no config.json; give a folder saved by transformers")
        return str(folder)
    if not name.strip() or name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1:
        raise UserError(f"model.name={name!r}: no such folder; give `demo`, an existing folder or a hub name")
    return name


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the GPU has it, else fp32."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def compute_context(model: PeftModel) -> AbstractContextManager[None]:
    """What every pass through the model runs under: autocast where the base was loaded in bf16, nothing in fp32.

    Rollouts, both training steps and the diagnostics share it, so all round alike; the fp32 adapter is cast in it, once
    a context (PyTorch keeps the cast weights), and its activations are kept in bf16.
    """
    weight = model.get_input_embeddings().weight
    return nullcontext() if weight.dtype == torch.float32 else torch.autocast(weight.device.type, dtype=weight.dtype)


@contextmanager
def shadow_weights(model: PeftModel, wanted: bool = True) -> Iterator[None]:
    """Has the model compute with plain linear layers in its compute dtype, for a while.

    Each holds what the 4-bit weight stands for plus the active adapter's update, added in fp32. The 4-bit weights and
    the adapter are not touched, and are back in their places afterwards: what is learnt later is in the next shadow. In
    bf16 the sum is rounded, so that the first small updates show in part only, as in training's own passes; how far
    rollouts and training are apart is `sampling_logprob_difference` in `metrics.jsonl`.
    """
    dtype = model.get_input_embeddings().weight.dtype
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    try:
        for parent, name, layer in adapted_layers(model) if wanted else ():
            parent._modules[name] = plain_linear(layer, dtype)
            replaced.append((parent, name, layer))
        yield
    finally:
        for parent, name, layer in replaced:
            parent._modules[name] = layer


def adapted_layers(model: PeftModel) -> list[tuple[torch.nn.Module, str, Any]]:
    """The layers that have an adapter or 4-bit weights, each with its parent and its name there."""
    return [
        (parent, name, child)
        for parent in model.get_base_model().modules()
        if not isinstance(parent, BaseTunerLayer)
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit | BaseTunerLayer)
    ]


def shadow_bytes(model: PeftModel) -> int:
    """What `shadow_weights` takes."""
    size = model.get_input_embeddings().weight.element_size()
    return size * sum(layer.in_features * layer.out_features for _, _, layer in adapted_layers(model))


def plain_linear(layer: Any, dtype: torch.dtype) -> torch.nn.Linear:
    """One of `adapted_layers` without its 4 bits and its adapter: what the weight stands for plus the active adapter's
    update, added in fp32 and rounded to `dtype` once."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight = base.weight.detach()
    if isinstance(base, Linear4bit):
        weight = dequantize_4bit(weight, base.weight.quant_state)
    if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters:
        for adapter in layer.active_adapters:
            with torch.autocast(weight.device.type, enabled=False):
                weight = weight.float() + layer.get_delta_weight(adapter).float()
    plain = torch.nn.utils.skip_init(
        torch.nn.Linear, base.in_features, base.out_features, bias=base.bias is not None, device="meta"
    )
    plain.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    plain.bias = base.bias
    return plain


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


def load_policy(
    config: ModelConfig, *, adapter: Path | None = None, seed: int
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The policy in eval mode, on the GPU if there is one, and its tokenizer (padding left).

    Args:
        config: base model, quantisation and LoRA shape.
        adapter: a folder written by `save_adapter`; its LoRA shape then counts, not the config's.
        seed: the run's seed; a new adapter's weights depend on it alone.

    Raises:
        UserError: for a missing folder, a hub that does not give it, a base without sound safetensors, or an unfit
            adapter.
    """
    source = resolve_model(config.name)
    peft_config = lora_config(config) if adapter is None else read_adapter_config(adapter)
    if adapter is not None:
        _check_base(adapter, peft_config, config.name)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = compute_dtype(device)
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if config.quantization == "nf4"
        else None
    )
    folder = _fetch_model(source, config)
    try:
        tokenizer = _load_tokenizer(folder, config.trust_remote_code)
        base, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers and tokenizers have no error of their own for files that do not fit
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot load the model {config.name!r}: {reason} "
            "(give `demo`, a folder saved by transformers, or a hub name)",
            exit_code=1,
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"cannot load the model {config.name!r}: its weights lack {missing[0]} ({len(missing)} are missing); "
            "fetch or save it anew",
            exit_code=1,
        )
    check_weights(base, config.name)
    _keep_4bit_weights_fixed(base)
    _set_padding(tokenizer)
    # With a fork the caller's random state is left as it was, and the draw does not depend on it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "adapter"))
        try:
            model = get_peft_model(base, peft_config, autocast_adapter_dtype=True)
        except ValueError as error:  # it names layers that there are not
            raise UserError(f"the adapter in {adapter} does not fit {config.name!r}: {error}; give another") from error
    # The name as the user gave it, not the folder it resolved to, so that a saved adapter works on another machine.
    peft_config.base_model_name_or_path = config.name
    peft_config.revision = config.revision
    model.eval()
    if adapter is not None:
        load_adapter_weights(model, adapter)
    return model, tokenizer


def _fetch_model(source: str, config: ModelConfig) -> Path:
    """The base's folder, fetched from the hub first if it is not one here, with weights that are whole.

    Raises:
        UserError: as `download_folder` does; also if there are no safetensors, a shard is missing, or one is damaged.
    """
    folder = Path(source)
    if not folder.is_dir():
        patterns = [*_MODEL_FILES, *(["*.py"] if config.trust_remote_code else [])]
        folder = download_folder(source, repo_type="model", patterns=patterns, revision=config.revision)
    check_model_files(folder, config.name)
    return folder


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer as its files declare it.

    For some architectures `AutoTokenizer` (seen in transformers 5.23) rebuilds the tokenizer in its own class even
    where the files declare the generic one, and so drops settings of `tokenizer.json` such as `ignore_merges`.
    """
    declared = get_tokenizer_config(folder).get("tokenizer_class")
    generic = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    loader = PreTrainedTokenizerFast if generic else AutoTokenizer
    return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _keep_4bit_weights_fixed(base: torch.nn.Module) -> None:
    """Stops bitsandbytes (seen in 0.50.2) from re-packing 4-bit weights in place on CPUs with AVX512-BF16.

    In eval mode it would then compute in bf16: rollouts would differ from training, and the base would not stay as it
    was, bit for bit.
    """
    for module in base.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False


def _set_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """A pad token that needs no new embedding row. Padding is always masked, so which one it is never matters to the
    model; unk is preferred to eos because some code takes padding equal to eos for the end of a message."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"


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
    _check_base(folder, saved, own.base_model_name_or_path)
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


def _check_base(folder: Path, saved: LoraConfig, name: str | None) -> None:
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
