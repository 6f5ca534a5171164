"""The memory plan: what it counts, what it adds up from, and which setting moves which part of it.

How near it comes to what a real process takes is in `test_bench.py`.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, PretrainedConfig, Qwen2Config
from trl.kernels import chunked_divergence, chunked_logprob

from searche1_lite.config import DEFAULT_PRESETS, Config, ModelConfig, load_config
from searche1_lite.policy import memory
from searche1_lite.policy.capacity import _KNOWN_SHAPES, CUDA_RESERVE, GIB, model_shape
from searche1_lite.policy.memory import (
    MemoryPlan,
    StorageCounter,
    _decode_pass,
    _grpo_pass,
    _peak,
    _prefill_pass,
    _skeleton,
    _student_pass,
    _teacher_pass,
    nf4_bytes,
    plan_memory,
)
from searche1_lite.policy.model import load_policy

STAGES = ["rollout", "GRPO step", "OFSD step"]
PASSES = {
    "prefill": _prefill_pass,
    "decode": _decode_pass,
    "GRPO": _grpo_pass,
    "student": _student_pass,
    "teacher": _teacher_pass,
}


def shape(layers: int = 5) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def settings(*overrides: str) -> Config:
    """Micro-batches of 2,944 tokens to learn from, so many that the loss, done in tiles, is not all of the peak."""
    return load_config(
        "demo",
        None,
        [
            "protocol.max_prompt_tokens=64", "protocol.max_completion_tokens=1472", "protocol.max_turn_tokens=16",
            "model.gradient_checkpointing=true", "engine.batch_size=4", "grpo.micro_batch_tokens=3072",
            "ofsd.micro_batch_tokens=6016", "ofsd.batch_size=2", *overrides,
        ],
    )  # fmt: skip


@cache
def plan(*overrides: str, device: str = "cuda") -> MemoryPlan:
    return plan_memory(settings(*overrides), shape(), device)


def tensors_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kernels() -> list[object]:
    names = {chunked_logprob: ("_forward_tile", "_backward_tile"), chunked_divergence: ("_stats_tile", "_jsd_tile")}
    functions = [getattr(module, name) for module, found in names.items() for name in found]
    return [*functions, chunked_divergence._backward_tile]


@pytest.mark.parametrize("fake", [True, False], ids=["fake tensors", "real tensors"])
def test_a_storage_is_counted_once_and_until_it_is_freed(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.no_grad():
        known, counter = torch.ones(1000), StorageCounter()
        counter.know([known])
        with counter:
            first = known + 1
            assert counter.live == 4000
            view = first.view(10, 100)[3:].t()
            first.add_(1)
            torch.mul(first, 2, out=first)
            known.mul_(2)
            assert (counter.live, counter.peak) == (4000, 4000), "no storage of their own"
            second = (first * 2).double()  # while it is made, the product is alive too
            assert (counter.live, counter.peak) == (12000, 16000)
            del first
            assert counter.live == 12000, "the view still holds it"
            del view
            assert counter.live == 8000
            del second
        assert (counter.live, counter.peak) == (0, 16000)


def test_a_tensor_that_was_there_before_counts_only_if_it_is_named() -> None:
    with FakeTensorMode():
        named, counter = torch.ones(1000), StorageCounter()
        counter.count(named)
        counter.count(named[500:])
        assert (counter.live, counter.peak) == (4000, 4000)
        del named
        assert (counter.live, counter.peak) == (0, 4000)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (100, 72), (320, 128), (1024, 384)], ids=str)
def test_four_bit_weights_are_as_large_as_those_of_bitsandbytes(size: tuple[int, int]) -> None:
    layer = Linear4bit(size[1], size[0], bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    assert layer.weight.dtype == torch.uint8 and state.nested, "else it was not quantised twice"
    assert nf4_bytes(size[0] * size[1]) == tensors_bytes(layer.weight.data, state.absmax, state.state2.absmax)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_base_and_adapter_are_as_large_as_the_loaded_ones(tiny_policy_folder: Path, quantization: str) -> None:
    config = settings(f"model.name={tiny_policy_folder}", f"model.quantization={quantization}")
    model, _ = load_policy(config.model, seed=0)
    base = adapter = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            adapter += tensors_bytes(parameter)
        else:
            base += tensors_bytes(parameter.data)
            if (state := getattr(parameter, "quant_state", None)) is not None:
                base += tensors_bytes(state.absmax, state.state2.absmax)
    for parts in plan_memory(config, model_shape(config), "cpu").stages.values():
        assert parts["base weights"] == base
        assert parts["adapter"] == parts["frozen adapter"] == adapter
        assert parts["optimizer (Adam)"] == 2 * adapter
        assert parts.get("gradients", adapter) == adapter


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", PASSES)
def test_two_and_three_layers_tell_what_five_take(name: str, device: str, checkpointing: str) -> None:
    config = settings(f"model.gradient_checkpointing={checkpointing}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    two, three, five = (_peak(PASSES[name], shape(), config, dtype, device, layers) for layers in (2, 3, 5))
    assert two < three or name == "teacher", "all but the teacher's pass keep something of each layer"
    assert two + 3 * (three - two) == five


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_with_fewer_layers_than_the_plan_tries_has_a_plan(layers: int) -> None:
    config = settings("ofsd.enabled=false")
    for stage, names in (("rollout", ["prefill", "decode"]), ("GRPO step", ["GRPO"])):
        parts = plan_memory(config, shape(layers), "cpu").stages[stage]
        planned = sum(parts.get(part, 0) for part in ("KV cache", "activations, logits", "activations, loss"))
        direct = max(_peak(PASSES[name], shape(layers), config, torch.float32, "cpu", layers) for name in names)
        assert direct == planned if layers == 2 else 0.5 * planned < direct <= planned


def test_the_larger_of_the_teachers_and_the_students_pass_counts() -> None:
    """On few layers it may be the teacher's; on many it is the student's, which keeps something of each."""
    config = settings("protocol.max_prompt_tokens=16", "ofsd.batch_size=8", "ofsd.micro_batch_tokens=23680")
    wide = shape()
    wide.intermediate_size = 1024

    def planned(layers: int) -> int:
        wide.num_hidden_layers, wide.layer_types = layers, ["full_attention"] * layers
        return plan_memory(config, wide, "cpu").stages["OFSD step"]["activations, loss"]

    (teacher, same), (student, more) = (
        [_peak(PASSES[name], wide, config, torch.float32, "cpu", layers) for layers in (2, 3)]
        for name in ("teacher", "student")
    )
    assert teacher == same > more > student, "else this test shows nothing"
    assert planned(2) == teacher
    assert planned(40) == student + 38 * (more - student) > teacher


def test_planning_leaves_the_shape_as_it_was() -> None:
    given = shape(2)
    before = given.to_dict()
    plan_memory(settings(), given, "cpu")
    assert given.to_dict() == before


def test_a_peak_is_the_sum_of_its_parts() -> None:
    assert plan().peaks == {stage: sum(parts.values()) for stage, parts in plan().stages.items()}
    assert list(plan().peaks) == STAGES
    assert all(size > 0 for parts in plan().stages.values() for size in parts.values())
    assert (plan().device, plan().dtype, plan(device="cpu").dtype) == ("cuda", "bfloat16", "float32")


def test_twice_the_episodes_take_twice_the_cache_and_nothing_in_training() -> None:
    one, two = plan().stages, plan("engine.batch_size=8").stages
    # A full-length row, and a column that nobody reads.
    rows, tokens, layers, heads, width = 4, 1536 + 1, 5, 2, 16
    assert one["rollout"]["KV cache"] == rows * tokens * layers * heads * width * 2 * 2, "keys and values, in bf16"
    assert two["rollout"]["KV cache"] == 2 * one["rollout"]["KV cache"]
    assert {stage: parts for stage, parts in two.items() if stage != "rollout"} == {
        stage: parts for stage, parts in one.items() if stage != "rollout"
    }


def test_plain_weights_for_rollouts_are_planned_where_they_fit_and_wanted() -> None:
    skeleton = _skeleton(shape(), ModelConfig(), torch.bfloat16, None)
    linear = sum(p.numel() for name, p in skeleton.named_parameters() if "_proj.base_layer.weight" in name)
    cheap = ("ofsd.enabled=false", "grpo.micro_batch_tokens=1", "protocol.max_completion_tokens=64")  # for speed
    many = ("engine.batch_size=16", *cheap)
    always = plan(*many, "engine.shadow=always")
    assert always.stages["rollout"]["shadow weights"] == 2 * linear

    def planned(*overrides: str, device: str = "cuda", capacity: int | None = always.peaks["rollout"]) -> bool:
        found = plan_memory(settings(*overrides), shape(), device, torch.bfloat16, capacity)
        return "shadow weights" in found.stages["rollout"]

    assert planned(*many) and not planned(*many, capacity=always.peaks["rollout"] - 1)
    assert not planned(*many, "engine.shadow=never")
    assert not planned("engine.batch_size=15", *cheap), "4-bit kernels are as fast for few rows"
    assert planned("engine.batch_size=4", *cheap, device="cpu", capacity=None), "on a CPU they never are"


def peak(name: str, *overrides: str) -> int:
    return _peak(PASSES[name], shape(), settings(*overrides), torch.bfloat16, "cuda", 3)


@pytest.mark.parametrize("name", ["GRPO", "student"])
def test_without_gradient_checkpointing_training_keeps_far_more(name: str) -> None:
    assert peak(name, "model.gradient_checkpointing=false") > 1.25 * peak(name)


def test_each_stages_micro_batch_moves_its_own_activations() -> None:
    for name, section, other in (("GRPO", "grpo", "ofsd"), ("student", "ofsd", "grpo"), ("teacher", "ofsd", "grpo")):
        assert peak(name, f"{section}.micro_batch_tokens=1") < peak(name) == peak(name, f"{other}.micro_batch_tokens=1")


def test_a_sequence_longer_than_the_budget_is_planned_for_whole() -> None:
    for name, section in (("GRPO", "grpo"), ("student", "ofsd"), ("teacher", "ofsd")):
        budgets = [f"{section}.micro_batch_tokens={tokens}" for tokens in (1, 1536)]
        assert peak(name, budgets[0]) == peak(name, budgets[1])


def test_a_budget_is_planned_for_to_the_last_token_but_not_beyond_what_a_step_has() -> None:
    """Of sequences of up to 1,536 tokens."""
    even, uneven, whole = (peak("GRPO", f"grpo.micro_batch_tokens={tokens}") for tokens in (3072, 3600, 4608))
    assert even < uneven < whole
    few = ["grpo.questions_per_step=1", "grpo.group_size=2"]
    assert peak("GRPO", "grpo.micro_batch_tokens=9999", *few) == even


def test_an_unquantised_base_takes_its_dtype_for_every_weight() -> None:
    skeleton = _skeleton(shape(), ModelConfig(), torch.bfloat16, None)
    weights = sum(parameter.numel() for name, parameter in skeleton.named_parameters() if "lora_" not in name)
    plain = plan("model.quantization=none").stages
    for stage, parts in plan().stages.items():
        assert plain[stage]["base weights"] == 2 * weights > 2 * parts["base weights"]
        assert plain[stage]["adapter"] == parts["adapter"]


def test_a_reference_without_its_documents_makes_the_teachers_pass_shorter() -> None:
    assert peak("teacher", "ofsd.reference_documents=false") < peak("teacher")
    assert peak("teacher", "ofsd.reference_documents=false", "protocol.max_turn_tokens=300") == peak("teacher"), (
        "where the turns may fill the whole completion"
    )
    assert peak("teacher", "ofsd.teacher_prompt=plain") < peak("teacher", "ofsd.reference_documents=false")
    assert peak("student", "ofsd.reference_documents=false") == peak("student")


def test_a_frozen_adapter_is_there_only_where_it_is_used() -> None:
    one, other = plan("grpo.kl_coefficient=0").stages, plan("ofsd.teacher=base").stages
    adapter = plan().stages["rollout"]["adapter"]
    frozen = [[stages[stage]["frozen adapter"] for stage in STAGES] for stages in (plan().stages, one, other)]
    assert frozen == [[adapter, adapter, adapter], [0, 0, adapter], [adapter, adapter, 0]]


def test_a_round_without_self_distillation_has_no_such_stage() -> None:
    assert list(plan("ofsd.enabled=false").stages) == STAGES[:2]


@pytest.mark.parametrize("knob", ["ofsd.objective=sft", "ofsd.clip=0.05", "ofsd.top_k=20", "ofsd.divergence=jsd"])
def test_every_form_of_the_loss_can_be_planned(knob: str) -> None:
    assert peak("student", knob) > 0


@pytest.mark.parametrize("knob", ["ofsd.divergence=forward_kl", "ofsd.divergence=jsd", "ofsd.objective=sft"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_two_tiles_of_the_vocabulary_tell_what_all_of_it_takes(
    device: str, knob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, dtype = shape(), torch.bfloat16 if device == "cuda" else torch.float32
    large.vocab_size = 120_000
    config = settings("grpo.micro_batch_tokens=1024", "ofsd.micro_batch_tokens=1024", knob)
    config.protocol.max_prompt_tokens, config.protocol.max_completion_tokens = 64, 960

    def peaks() -> list[int]:
        return [_peak(PASSES[name], large, config, dtype, device, 2) for name in ("GRPO", "student")]

    cut = peaks()
    monkeypatch.setattr(memory, "_two_tiles", lambda head: head)
    assert peaks() == cut


def test_the_kernels_are_back_in_place_after_a_plan_for_a_gpu() -> None:
    before = kernels()
    during: list[list[object]] = []

    def look(model: object, config: Config) -> Iterator[list[torch.Tensor]]:
        during.append(kernels())
        yield []

    def fail(model: object, config: Config) -> Iterator[list[torch.Tensor]]:
        yield []
        raise RuntimeError("in the pass")

    _peak(look, shape(), settings(), torch.bfloat16, "cuda", 2)
    assert not any(one is other for one, other in zip(during[0], before, strict=True)), "else this test shows nothing"
    assert all(one is other for one, other in zip(kernels(), before, strict=True))
    with pytest.raises(RuntimeError, match="in the pass"):
        _peak(fail, shape(), settings(), torch.bfloat16, "cuda", 2)
    assert all(one is other for one, other in zip(kernels(), before, strict=True))


@pytest.fixture(scope="module")
def qwen() -> PretrainedConfig:
    """Qwen2.5-3B's shape, as it is known where the hub cannot be reached."""
    known = _KNOWN_SHAPES["Qwen/Qwen2.5-3B"]
    return CONFIG_MAPPING[known["model_type"]](**known)


def test_the_known_shape_has_as_many_weights_as_qwens(qwen: PretrainedConfig) -> None:
    model = _skeleton(qwen, ModelConfig(), torch.bfloat16, None)
    weights = [p.numel() for name, p in model.named_parameters() if "lora_" not in name]
    assert sum(weights) == 6_171_877_376 // 2, "the size of the published safetensors, in bf16"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("size", "preset"), DEFAULT_PRESETS.items())
def test_a_preset_fits_the_card_that_it_is_for(size: int, preset: str, qwen: PretrainedConfig) -> None:
    plan = plan_memory(load_config(preset), qwen, "cuda", capacity=size * GIB - CUDA_RESERVE)
    peaks = plan.peaks
    assert list(peaks) == STAGES
    assert max(peaks.values()) <= size * GIB - CUDA_RESERVE, peaks
    assert ("shadow weights" in plan.stages["rollout"]) is (size >= 16)
    smaller = max((other for other in DEFAULT_PRESETS if other < size), default=0)
    assert max(peaks.values()) > smaller * GIB - CUDA_RESERVE, "else the preset for the smaller card would do"
