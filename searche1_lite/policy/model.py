"""The policy: a 4-bit base with one LoRA adapter on it (`adapter.py`).

Everything that changes shape or precision of the policy is here. The base is never merged into: re-quantising it would
move the policy. Activations and the KV cache are in the compute dtype.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
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
from searche1_lite.policy.adapter import check_base, load_adapter_weights, lora_config
from searche1_lite.policy.attention import expand_keys
from searche1_lite.policy.model_files import check_model_files, check_weights, read_adapter_config
from searche1_lite.policy.onednn import WORTHWHILE, OneDnnLinear
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.hub import download_folder
from searche1_lite.runtime.progress import say_on_stderr
from searche1_lite.runtime.seeds import derive_seed

_DEMO_POLICY = Path(__file__).parent / "demo"

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
                "the demo policy is missing; build it with `python -m examples.demo_policy.build`", exit_code=1
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


def lacks_bf16(device: torch.device) -> bool:
    """Is it a GPU that computes in fp32, for want of bf16?"""
    return device.type == "cuda" and compute_dtype(device) == torch.float32


NO_BF16 = "no bf16, so it computes in fp32: slower, more memory"


def tell_of_missing_bf16(device: torch.device) -> None:
    """What a run should know of its GPU before it begins, in a line; of one with bf16, nothing."""
    import torch

    if lacks_bf16(device):
        say_on_stderr(f"{torch.cuda.get_device_name(device)} has {NO_BF16}")


def compute_context(model: PeftModel) -> AbstractContextManager[None]:
    """What every pass through the model runs under: autocast where the base was loaded in bf16, nothing in fp32.

    Rollouts, both training steps and the diagnostics share it, so all round alike; the fp32 adapter is cast in it, once
    a context (PyTorch keeps the cast weights), and its activations are kept in bf16.
    """
    weight = model.get_input_embeddings().weight
    return nullcontext() if weight.dtype == torch.float32 else torch.autocast(weight.device.type, dtype=weight.dtype)


@contextmanager
def shadow_weights(model: PeftModel, wanted: bool = True, *, onednn: bool = False) -> Iterator[None]:
    """Has the model compute with plain linear layers in its compute dtype, for a while.

    Each holds what the 4-bit weight stands for plus the active adapter's update, added in fp32. The 4-bit weights and
    the adapter are not touched, and are back in their places afterwards: what is learnt later is in the next shadow. In
    bf16 the sum is rounded, so that the first small updates show in part only, as in training's own passes; how far
    rollouts and training are apart is `sampling_logprob_difference` in `metrics.jsonl`.

    Args:
        model: the policy.
        wanted: False: nothing is done.
        onednn: have oneDNN compute the large ones, the base's other linear layers too; for fp32 on a CPU, without
            gradients.
    """
    dtype = model.get_input_embeddings().weight.dtype
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []

    def replace(parent: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
        replaced.append((parent, name, parent._modules[name]))  # type: ignore[arg-type]
        parent._modules[name] = layer

    try:
        for parent, name, layer in adapted_layers(model) if wanted else ():
            plain = plain_linear(layer, dtype)
            quick = onednn and plain.weight.numel() >= WORTHWHILE
            replace(parent, name, OneDnnLinear(plain, pack=True) if quick else plain)
        for parent, name, layer in plain_layers(model) if wanted and onednn else ():
            if layer.weight.numel() >= WORTHWHILE:
                replace(parent, name, OneDnnLinear(layer, pack=False))
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


def plain_layers(model: PeftModel) -> list[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    """The linear layers that have neither, such as the head, each with its parent and its name there."""
    taken = {id(part) for _, _, layer in adapted_layers(model) for part in layer.modules()}
    return [
        (parent, name, child)
        for parent in model.get_base_model().modules()
        if id(parent) not in taken
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
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
        check_base(adapter, peft_config, config.name)
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
    if device.type == "cpu" and not Path(source).is_dir() and (size := re.search(r"(\d+(\.\d+)?)B\b", config.name)):
        say_on_stderr(
            f"there is no GPU: {config.name} with its {size[1]} billion parameters takes days on a CPU (the demo and "
            "examples/countries are made for one; `searche1-lite doctor` says why no GPU is seen)"
        )
    folder = model_folder(config)
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
    if lacks_bf16(device):
        expand_keys(base.config)
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


def model_folder(config: ModelConfig) -> Path:
    """The base's folder, fetched from the hub first if it is not one here, with weights that are whole.

    Raises:
        UserError: as `resolve_model` and `download_folder` do; also if there are no safetensors, a shard is missing,
            or one is damaged.
    """
    source = resolve_model(config.name)
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
