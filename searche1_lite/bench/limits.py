"""How fast a decoding step could be: weights and KV cache read once at the memory's speed, or the arithmetic."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from searche1_lite.policy.memory import head_width, nf4_bytes
from searche1_lite.policy.model import adapted_layers


@dataclass(frozen=True, slots=True)
class Demand:
    """What one decoding step asks of a device.

    `weight_bytes`: read once a step. `kv_bytes`: of one token of one row's cache. `flops`: for one row.
    """

    weight_bytes: int
    kv_bytes: int
    flops: int


def step_limit(demand: Demand, rows: float, length: float, bandwidth: float, flops: float) -> float:
    """The least seconds that a step can take.

    Args:
        rows: that the step writes a token of.
        length: tokens in the cache of a row, on average.
        bandwidth: bytes a second.
        flops: floating-point operations a second.
    """
    return max((demand.weight_bytes + rows * length * demand.kv_bytes) / bandwidth, rows * demand.flops / flops)


def demand(model: PeftModel, plain: bool) -> Demand:
    """What a step of this model asks for; `plain`: with 4-bit weights unpacked and the adapter added to them."""
    base = model.get_base_model()
    config, dtype = base.config.get_text_config(), model.get_input_embeddings().weight.dtype
    weights, size = 0, 0
    for _, _, layer in adapted_layers(model):
        count = layer.in_features * layer.out_features
        weights += count
        four_bits = isinstance(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, Linear4bit)
        size += nf4_bytes(count) if four_bits and not plain else count * dtype.itemsize
    head = base.get_output_embeddings().weight.numel()
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config) * dtype.itemsize
    return Demand(size + head * dtype.itemsize, kv, 2 * (weights + head))


@cache
def measure_gpu(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and operations a second of a large product of matrices."""
    size, side = 2**29, 8192
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * size / _seconds(torch.empty_like(source).copy_, source)
    matrix = torch.randn(side, side, dtype=dtype, device="cuda")
    flops = 2 * side**3 / _seconds(torch.matmul, matrix, matrix)
    return bandwidth, flops


def _seconds(work: Callable[..., Any], *given: torch.Tensor, times: int = 10) -> float:
    for _ in range(3):
        work(*given)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work(*given)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times
