"""Base and adapter as one model of plain 16-bit weights, for whoever has neither 4 bits nor adapters.

The adapter was trained over the 4-bit base, so it is added to what those 4 bits stand for: not to the weights that the
base was quantised from, which the adapter has never seen. The sum is made in fp32 and rounded to bf16 once.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from searche1_lite.config import ModelConfig
from searche1_lite.policy.model import adapted_layers, load_policy, plain_linear
from searche1_lite.policy.stopping import end_ids
from searche1_lite.runtime.errors import UserError


def save_merged(config: ModelConfig, adapter: Path, folder: Path, *, seed: int = 0, shard_size: str = "5GB") -> int:
    """Writes `config.json`, `generation_config.json` and the weights (bf16, safetensors) into `folder`.

    Layers are merged one by one and kept on the CPU, where the most memory that is needed at a time is about that of
    the 16-bit model, one layer in fp32, and, without a GPU, what is not quantised (embeddings, mostly) in fp32. With
    `model.quantization=none` and no GPU the whole base is loaded in fp32.

    Args:
        config: of the base; the adapter's own shape counts.
        adapter: a folder written by `save_adapter`.
        shard_size: of a file, at most.

    Returns:
        The number of parameters.

    Raises:
        UserError: as `load_policy`; or if there is not enough room where `folder` is.
    """
    policy, tokenizer = load_policy(config, adapter=adapter, seed=seed)
    generation = _generation_config(policy, tokenizer)
    merged = merge(policy)
    size = sum(parameter.numel() for parameter in merged.parameters())
    if (free := shutil.disk_usage(folder).free) < 2 * size:
        raise UserError(
            f"the merged model takes {2 * size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are left where it goes; make "
            "room or choose another --to",
            exit_code=1,
        )
    merged.generation_config = generation
    merged.save_pretrained(folder, max_shard_size=shard_size)
    return size


def merge(policy: PeftModel) -> PreTrainedModel:
    """The policy's base with the active adapter in its weights: plain layers, bf16, on the CPU.

    The policy is used up: its layers are taken apart as they are merged.
    """
    base = policy.get_base_model()
    layers = adapted_layers(policy)
    while layers:  # each one's 4 bits and adapter go as its 16 bits come
        parent, name, layer = layers.pop()
        parent._modules[name] = plain_linear(layer, torch.bfloat16).to("cpu")
        del layer
    for parameter in base.parameters():  # tied ones are one parameter, and stay so
        parameter.data = parameter.data.to("cpu", torch.bfloat16)
    # A model of its own knows nothing of quantisation, and neither will its config. Whether its embeddings are tied is
    # asked of the weights: transformers leaves them apart where a checkpoint has both, whatever its config says.
    settings = _without_quantization(base.config.to_dict())
    output = base.get_output_embeddings()
    if output is not None and output.weight is not base.get_input_embeddings().weight:
        settings["tie_word_embeddings"] = False
    config = type(base.config).from_dict(settings)
    with init_empty_weights(include_buffers=False):
        merged = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    merged.load_state_dict(base.state_dict(), assign=True)
    merged.tie_weights()
    return merged.eval()


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _generation_config(policy: PeftModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, as the figures are, and ended by what ends a message in rollouts.

    The base's own sampling settings (Qwen's have a repetition penalty) are left out: it was trained without them, and
    vLLM would take them up unasked.
    """
    return GenerationConfig(
        do_sample=False,
        bos_token_id=policy.get_base_model().config.bos_token_id,
        eos_token_id=sorted(end_ids(policy, tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )
