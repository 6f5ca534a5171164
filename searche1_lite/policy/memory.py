"""How much memory a configuration will need, before anything is loaded.

The real passes (reading and writing, the GRPO step, the OFSD step) are run on fake tensors, which have shapes
and no storage, through the real model code with its LoRA adapter, while every storage that would be alive is counted.
Models of two and three layers are enough: what a layer adds is the same for each further one. Every sequence is taken
to be as long as the protocol allows. What is left out: the CUDA context, fragmentation, kernels' own scratch space.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.kernels import chunked_divergence, chunked_logprob

from searche1_lite.config import Config, ModelConfig
from searche1_lite.policy.adapter import lora_config
from searche1_lite.policy.engine import PREFILL_TOKENS, pick_tokens, uses_shadow
from searche1_lite.policy.kv_cache import SlotCache, grouped
from searche1_lite.policy.losses import VOCABULARY_PER_TILE, divergence, hidden_states, token_logprobs
from searche1_lite.policy.microbatch import fullest
from searche1_lite.policy.model import compute_context

Device = Literal["cuda", "cpu"]
Pass = Callable[[PeftModel, Config], Iterator[list[torch.Tensor]]]
"""A generator that prepares a pass, yields what it will use up (the KV cache), and then runs it."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part, for each stage of a round; the peak of a stage is the sum of its parts."""

    device: Device
    dtype: str
    stages: dict[str, dict[str, int]]
    """`rollout`, `GRPO step` and, if it is enabled, `OFSD step`."""

    @property
    def peaks(self) -> dict[str, int]:
        return {stage: sum(parts.values()) for stage, parts in self.stages.items()}


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of every storage that operations bring to life while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def know(self, tensors: Iterable[torch.Tensor]) -> None:
        """Takes these as there already: they are not counted."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = True

    def count(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage, once, until it is freed."""
        if (storage := tensor.untyped_storage()) not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = True
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


class _FourBitProduct(torch.autograd.Function):
    """What bitsandbytes does for more than one row: dequantise the weight, multiply, forget it; the same backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, shape: tuple[int, int], bias: Any) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None, None


class _FourBitLinear(torch.nn.Linear):
    """A linear layer with the storage of a 4-bit one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # bitsandbytes' layer gives a fresh tensor that PEFT copies once more.
        return _FourBitProduct.apply(x, self.weight, (self.out_features, self.in_features), self.bias).clone()


def nf4_bytes(weights: int) -> int:
    """NF4 with double quantisation: half a byte a weight, a byte per 64 and four bytes per 16,384 for the scales."""
    return -(-weights // 2) + -(-weights // 64) + -(-weights // (64 * 256)) * 4


def _skeleton(shape: PretrainedConfig, config: ModelConfig, dtype: torch.dtype, layers: int | None) -> PeftModel:
    """The policy without storage, of as many layers (None: all)."""
    shape = deepcopy(shape)
    text = shape.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if kinds := getattr(text, "layer_types", None):
            text.layer_types = [kinds[layer % len(kinds)] for layer in range(layers)]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        return get_peft_model(base, lora_config(config), low_cpu_mem_usage=True)


def _quantized(model: PeftModel) -> list[torch.nn.Linear]:
    """The linear layers that are in 4 bits: all but the output embeddings and the adapter's own."""
    head = model.get_output_embeddings()
    return [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head and not module.weight.requires_grad
    ]


def _give_storage(model: PeftModel, config: ModelConfig) -> None:
    """Replaces what lies on the meta device by fake tensors that count. Call under a `FakeTensorMode`."""
    if config.quantization == "nf4":
        for module in _quantized(model):
            size = nf4_bytes(module.weight.numel())
            module.__class__ = _FourBitLinear
            module.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
    fakes: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in fakes:  # tied weights stay tied
                    dtype = torch.float32 if parameter.requires_grad else parameter.dtype
                    fake = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                    fake.grad = torch.empty_like(fake) if fake.requires_grad else None
                    fakes[id(parameter)] = fake
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.device.type == "meta":
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _fullest_batch(config: Config, prompt: int, budget: int, sequences: int) -> tuple[torch.Tensor, int]:
    """Ids (rows, columns) of the fullest micro-batch, and how many columns are the completion: as many as may be."""
    completion = config.protocol.max_completion_tokens
    rows, columns = fullest(prompt + completion, budget, sequences)
    return torch.zeros((rows, columns), dtype=torch.long), min(completion, max(1, columns - 1))


def _completion_hidden(model: PeftModel, ids: torch.Tensor, completion: int) -> torch.Tensor:
    """What `completion_hidden` gives where every token of the completion is asked for: (rows * completion, H)."""
    return hidden_states(model, ids)[:, -completion - 1 : -1].flatten(0, 1).clone()


def _filled_slots(model: PeftModel, config: Config) -> tuple[SlotCache, torch.Tensor, list[torch.Tensor]]:
    """The cache of a full batch, its rows (slots,), and its tensors."""
    model.eval()  # in training mode, gradient checkpointing would leave the cache out
    base, rows = model.get_base_model(), config.engine.batch_size
    text, dtype = base.config.get_text_config(), base.get_input_embeddings().weight.dtype
    cache = SlotCache(base.config, rows, _cache_columns(config))
    entry = torch.empty((rows, text.num_key_value_heads, 1, head_width(text)), dtype=dtype)
    for layer in cache.layers:
        layer.lazy_initialization(entry, entry)
    return cache, torch.arange(rows), [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _prefill_pass(model: PeftModel, config: Config) -> Iterator[list[torch.Tensor]]:
    """A full batch of full-length episodes reads its last text; the rows do not lie side by side."""
    cache, rows, tensors = _filled_slots(model, config)
    rows = rows[: min(len(rows), PREFILL_TOKENS)]
    tokens = torch.zeros((len(rows), min(cache.columns, PREFILL_TOKENS // len(rows))), dtype=torch.long)
    yield tensors
    del tensors
    base = model.get_base_model()
    with torch.no_grad(), compute_context(model), grouped(base.config):
        base.base_model(input_ids=tokens, **cache.at(rows, tokens, tokens == 0, rows, cache.columns))


def _decode_pass(model: PeftModel, config: Config) -> Iterator[list[torch.Tensor]]:
    """A full batch of full-length episodes writes a token each."""
    cache, rows, tensors = _filled_slots(model, config)
    tokens, uniforms = rows.unsqueeze(1), torch.zeros(len(rows), dtype=torch.float64)
    yield tensors
    del tensors
    base = model.get_base_model()
    with torch.no_grad(), compute_context(model), grouped(base.config):
        where = cache.at(rows, tokens, tokens == tokens, slice(0, len(rows)), cache.columns)
        hidden = base.base_model(input_ids=tokens, **where).last_hidden_state
        pick_tokens(base.get_output_embeddings()(hidden[:, -1]), config.engine.temperature, uniforms)


def _grpo_pass(model: PeftModel, config: Config) -> Iterator[list[torch.Tensor]]:
    """One micro-batch, forward and backward; every token of the completion counts as the model's."""
    stage = config.grpo
    sequences = stage.questions_per_step * stage.group_size
    ids, completion = _fullest_batch(config, config.protocol.max_prompt_tokens, stage.micro_batch_tokens, sequences)
    yield []
    hidden = _completion_hidden(model, ids, completion)
    with compute_context(model):
        head = _two_tiles(model.get_output_embeddings())
        values, _ = token_logprobs(head, hidden, ids[:, -completion:].flatten(), config.engine.temperature)
    del hidden
    values.sum().backward()


def _teacher_pass(model: PeftModel, config: Config) -> Iterator[list[torch.Tensor]]:
    """The teacher's pass over a micro-batch of pairs, each with a full-length reference in its prompt."""
    stage, protocol = config.ofsd, config.protocol
    shown = protocol.max_completion_tokens if stage.teacher_prompt != "plain" else 0
    if not stage.reference_documents:
        shown = min(shown, protocol.max_turn_tokens * (protocol.max_searches + 1 + protocol.max_invalid_turns))
    prompt = protocol.max_prompt_tokens + shown
    ids, completion = _fullest_batch(config, prompt, stage.micro_batch_tokens, stage.batch_size)
    yield []
    with torch.no_grad():
        _completion_hidden(model, ids, completion)


def _student_pass(model: PeftModel, config: Config) -> Iterator[list[torch.Tensor]]:
    """The student's pass over a micro-batch of pairs, beside the teacher's hidden states, and back.

    References are taken to be short here, so that the student's own sequences fill the micro-batch.
    """
    stage, prompt = config.ofsd, config.protocol.max_prompt_tokens
    ids, completion = _fullest_batch(config, prompt, stage.micro_batch_tokens, stage.batch_size)
    targets = ids[:, -completion:].flatten()
    head, teacher = model.get_output_embeddings(), None
    if stage.objective != "distill" or not (stage.clip or stage.top_k):  # these need all logits of a token at once
        head = _two_tiles(head)
    if stage.objective == "distill":
        teacher = torch.empty((targets.numel(), head.weight.shape[1]), dtype=head.weight.dtype)
    yield [] if teacher is None else [teacher]
    student = _completion_hidden(model, ids, completion)
    with compute_context(model):
        if teacher is None:
            values = token_logprobs(head, student, targets, config.engine.temperature)[0]
        else:
            values = divergence(
                head, student, teacher, stage.divergence, config.engine.temperature, stage.clip, stage.top_k
            )
    del student
    values.sum().backward()


def _two_tiles(head: Any) -> torch.nn.Module:
    """The output embeddings, their words cut to two full tiles of the losses: each further one takes the same again."""
    words = 2 * max(VOCABULARY_PER_TILE, chunked_divergence.VOCAB_CHUNK_SIZE)
    cut = torch.nn.Linear(1, 1, bias=head.bias is not None, device="meta")
    cut.weight = torch.nn.Parameter(head.weight[:words], requires_grad=False)
    if head.bias is not None:
        cut.bias = torch.nn.Parameter(head.bias[:words], requires_grad=False)
    return cut


def _peak(run: Pass, shape: PretrainedConfig, config: Config, dtype: torch.dtype, device: Device, layers: int) -> int:
    """Bytes that the pass holds at its worst moment beside weights and gradients."""
    model = _skeleton(shape, config.model, dtype, layers)
    with FakeTensorMode(allow_non_fake_inputs=True), _kernels_of(device):
        _give_storage(model, config.model)
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        steps = run(model, config)
        counter = StorageCounter()
        counter.know(tensor for tensor in [*model.parameters(), *model.buffers()])
        counter.know(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        for tensor in next(steps):
            counter.count(tensor)
        with counter:
            next(steps, None)
    return counter.peak


@contextmanager
def _kernels_of(device: Device) -> Iterator[None]:
    """On a GPU a Triton kernel folds each tile of logits in place; the same in PyTorch, for a CPU, makes copies.

    A copy of a tile of the head in fp32 is still counted there, though a GPU's matrix product needs none.
    """
    places = {
        chunked_logprob: ("_forward_tile", "_backward_tile"),
        chunked_divergence: ("_stats_tile", "_jsd_tile", "_backward_tile"),
    }
    kept = {(module, name): getattr(module, name) for module, names in places.items() for name in names}
    try:
        if device == "cuda":
            for module, name in kept:
                setattr(module, name, lambda *args, **kwargs: None)
        yield
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)


def parameter_count(shape: PretrainedConfig) -> int:
    """Parameters of the base model, tied ones once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(shape).parameters())


def plan_memory(
    config: Config,
    shape: PretrainedConfig,
    device: Device,
    dtype: torch.dtype | None = None,
    capacity: int | None = None,
) -> MemoryPlan:
    """The memory that each stage of a round needs at its worst moment.

    Args:
        config: the run's settings.
        shape: the base model's configuration.
        device: `cuda` or `cpu`.
        dtype: the compute dtype; default: bf16 on `cuda`, fp32 on `cpu`.
        capacity: bytes there are. With `engine.shadow=auto` the plan has `shadow weights` where they fit into it; where
            it is not said, on a CPU.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    whole = _skeleton(shape, config.model, dtype, None)
    weights = quantized = adapter = shadow = 0
    adapted = {id(module.weight) for module in _quantized(whole)}
    for parameter in whole.parameters():
        shadow += dtype.itemsize * parameter.numel() if id(parameter) in adapted else 0
        if parameter.requires_grad:
            adapter += 4 * parameter.numel()
        elif id(parameter) in adapted and config.model.quantization == "nf4":
            quantized += nf4_bytes(parameter.numel())
        else:
            weights += parameter.numel() * parameter.element_size()
    weights += quantized
    layers = shape.get_text_config().num_hidden_layers

    def measure(run: Pass) -> int:
        two, three = (_peak(run, shape, config, dtype, device, count) for count in (2, 3))
        return two + (three - two) * (layers - 2)

    optimizer = {"optimizer (Adam)": 2 * adapter}
    stages: dict[str, dict[str, int]] = {}
    frozen = adapter if config.grpo.kl_coefficient else 0
    fixed = {"base weights": weights, "adapter": adapter, "frozen adapter": frozen}
    cache = _cache_bytes(config, shape, dtype)
    parts = [measure(run) - cache for run in (_prefill_pass, _decode_pass)]
    # On a GPU captured steps keep memory of their own.
    rest = sum(parts) if device == "cuda" else max(parts)
    stages["rollout"] = fixed | optimizer | {"KV cache": cache, "activations, logits": rest}
    if config.engine.backend == "vllm":  # on a GPU asleep in the other stages
        plain = device == "cpu" or config.engine.shadow == "always"
        stages["rollout"]["vLLM's weights"] = weights - quantized + shadow if plain and quantized else weights
    if uses_shadow(config.engine, device, config.engine.batch_size):
        needed = sum(stages["rollout"].values()) + shadow
        fits = device == "cpu" if capacity is None else needed <= capacity
        if fits or config.engine.shadow == "always":
            stages["rollout"]["shadow weights"] = shadow
    gradients = {"gradients": adapter}
    stages["GRPO step"] = fixed | gradients | optimizer | {"activations, loss": measure(_grpo_pass)}
    if config.ofsd.enabled:
        frozen = adapter if (config.ofsd.teacher, config.ofsd.objective) == ("snapshot", "distill") else 0
        fixed = fixed | {"frozen adapter": frozen}
        # Each by itself: the student's grows with the layers, so that the larger one of few need not be that of many.
        passes = [_student_pass] + ([_teacher_pass] if config.ofsd.objective == "distill" else [])
        worst = max(measure(run) for run in passes)
        stages["OFSD step"] = fixed | gradients | optimizer | {"activations, loss": worst}
    return MemoryPlan(device, str(dtype).removeprefix("torch."), stages)


def _cache_columns(config: Config) -> int:
    return config.protocol.max_prompt_tokens + config.protocol.max_completion_tokens


def head_width(text: PretrainedConfig) -> int:
    """Numbers in a key of one head."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _cache_bytes(config: Config, shape: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of a full batch of full-length episodes, and a column for what nobody reads."""
    text = shape.get_text_config()
    entries = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width(text)
    return config.engine.batch_size * (_cache_columns(config) + 1) * entries * dtype.itemsize
