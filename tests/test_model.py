"""The 4-bit policy, its adapter, and frozen copies of it."""

import os
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import adapter_weights, fresh_policy
from peft import PeftModel
from safetensors.torch import load_file
from transformers import DynamicCache, PreTrainedTokenizerBase

from searche1_lite.config import ModelConfig
from searche1_lite.policy import model as model_module
from searche1_lite.policy.adapter import (
    adapter_digest,
    drop_adapter,
    load_adapter_weights,
    save_adapter,
    snapshot_adapter,
    use_adapter,
)
from searche1_lite.policy.model import load_policy, resolve_model, shadow_bytes, shadow_weights
from searche1_lite.policy.onednn import OneDnnLinear
from searche1_lite.runtime.errors import UserError
from searche1_lite.train.session import is_crowded

Policy = tuple[PeftModel, PreTrainedTokenizerBase]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def base_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.named_parameters() if "lora_" not in key}


def flags(model: PeftModel) -> dict[str, bool]:
    return {key: parameter.requires_grad for key, parameter in model.named_parameters()}


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_eval_and_train_mode_agree_and_the_4bit_base_stays_bit_equal(tiny_policy_folder: Path) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    before = base_weights(model)
    evaluated = logits(model.eval())
    trained = model.train()(input_ids=IDS).logits  # with gradients: the path of training
    assert torch.equal(evaluated, trained)
    after = base_weights(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_base_is_nf4_with_lora_on_every_linear_layer_but_the_head(tiny_policy: Policy) -> None:
    model, _ = tiny_policy
    base = model.get_base_model()
    quantised = [name for name, module in base.named_modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 7 * base.config.num_hidden_layers
    assert all(name.endswith(".base_layer") for name in quantised)
    assert type(base.lm_head) is torch.nn.Linear
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert all(module.weight.quant_state.nested for module in base.modules() if isinstance(module, Linear4bit))


def test_the_kv_cache_is_in_the_compute_dtype(tiny_policy: Policy) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        tiny_policy[0](input_ids=IDS, past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.dtype == tiny_policy[0].get_base_model().dtype


def test_a_new_adapter_depends_on_the_seed_alone(tiny_policy_folder: Path) -> None:
    config = ModelConfig(name=str(tiny_policy_folder), lora_rank=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = adapter_weights(load_policy(config, seed=3)[0])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (adapter_weights(load_policy(config, seed=seed)[0]) for seed in (3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_saved_adapter_comes_back_bit_equal(tiny_policy_folder: Path, tmp_path: Path) -> None:
    model, _ = fresh_policy(tiny_policy_folder, seed=5)
    snapshot_adapter(model)
    save_adapter(model, tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert all("teacher" not in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    # The rank in the configuration is another one: the adapter's own counts.
    loaded, _ = load_policy(
        ModelConfig(name=str(tiny_policy_folder), lora_rank=8), adapter=tmp_path / "adapter", seed=6
    )
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_an_adapters_digest_tells_weights_apart_and_those_that_compute_nothing_alike(tiny_policy_folder: Path) -> None:
    settings = ModelConfig(name=str(tiny_policy_folder))
    (model, _), (other, _) = (load_policy(settings, seed=seed) for seed in (0, 9))
    assert adapter_digest(model) is None is adapter_digest(other), "a new adapter is the base, whatever its seed"
    weight = next(p for name, p in model.named_parameters() if "lora_B" in name)
    digests = []
    for value in (1e-3, 2e-3, 1e-3):
        with torch.no_grad():
            weight[0, 0] = value
        digests.append(adapter_digest(model))
    assert digests[0] == digests[2] != digests[1] and None not in digests
    snapshot_adapter(model, "teacher")
    assert adapter_digest(model) == digests[2], "other adapters do not count"
    model.peft_config["default"].lora_alpha *= 2
    assert adapter_digest(model) != digests[2]


def test_loading_weights_keeps_the_parameters_identity(tiny_policy_folder: Path, tmp_path: Path) -> None:
    model, _ = fresh_policy(tiny_policy_folder, seed=1)
    save_adapter(model, tmp_path)
    saved = adapter_weights(model)
    other, _ = fresh_policy(tiny_policy_folder, seed=2)
    parameters = [id(parameter) for parameter in other.parameters()]
    load_adapter_weights(other, tmp_path)
    assert [id(parameter) for parameter in other.parameters()] == parameters
    now = adapter_weights(other)
    assert saved.keys() == now.keys() and all(torch.equal(saved[key], now[key]) for key in saved)


def test_an_adapter_of_another_base_or_shape_is_refused_with_both_named(
    tiny_policy_folder: Path, tmp_path: Path
) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    save_adapter(model, tmp_path / "rank4")
    wide, _ = load_policy(ModelConfig(name=str(tiny_policy_folder), lora_rank=8, lora_alpha=16), seed=0)
    with pytest.raises(UserError, match=r"rank 4 and alpha 8.*rank 8 and alpha 16"):
        load_adapter_weights(wide, tmp_path / "rank4")
    model.peft_config["default"].base_model_name_or_path = "someone/else"
    save_adapter(model, tmp_path / "foreign")
    model.peft_config["default"].base_model_name_or_path = str(tiny_policy_folder)
    with pytest.raises(UserError, match=f"someone/else.*{tiny_policy_folder}"):
        load_adapter_weights(model, tmp_path / "foreign")
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter_weights(model, tmp_path / "nothing")


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~/missing", "a/b/c", " "])
def test_a_missing_model_folder_is_a_usage_error(name: str) -> None:
    with pytest.raises(UserError, match="no such folder") as caught:
        resolve_model(name)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_base_without_safetensors_is_refused(tiny_policy_folder: Path, tmp_path: Path) -> None:
    for path in tiny_policy_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="cannot load the model") as caught:
        load_policy(ModelConfig(name=str(tmp_path)), seed=0)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_pad_token_gets_one_it_already_has(tiny_policy_folder: Path, tmp_path: Path) -> None:
    for path in tiny_policy_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": null'))
    _, tokenizer = load_policy(ModelConfig(name=str(tmp_path)), seed=0)
    assert tokenizer.pad_token == "<|im_end|>" and tokenizer.padding_side == "left"


def test_a_snapshot_is_a_frozen_copy_and_disturbs_nothing(tiny_policy_folder: Path) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    before, own_flags, state = logits(model), flags(model), torch.get_rng_state()
    snapshot_adapter(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.active_adapter == "default" and torch.equal(logits(model), before)
    assert {key: flag for key, flag in flags(model).items() if ".teacher." not in key} == own_flags
    assert not any(flag for key, flag in flags(model).items() if ".teacher." in key)
    student, teacher = adapter_weights(model), adapter_weights(model, "teacher")
    assert student.keys() == teacher.keys() and all(torch.equal(student[key], teacher[key]) for key in student)

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".default." in key and "lora_B" in key:
                parameter.add_(0.1)
    still = adapter_weights(model, "teacher")
    assert all(torch.equal(teacher[key], still[key]) for key in teacher)
    with use_adapter(model, "teacher"):
        assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)

    snapshot_adapter(model)  # brings it up to date
    student, teacher = adapter_weights(model), adapter_weights(model, "teacher")
    assert all(torch.equal(student[key], teacher[key]) for key in student)
    drop_adapter(model, "teacher")
    assert flags(model) == own_flags and list(model.peft_config) == ["default"]
    drop_adapter(model, "teacher")


def test_use_adapter_restores_adapter_and_flags_even_after_an_error(tiny_policy_folder: Path) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    snapshot_adapter(model)
    frozen = next(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model.get_parameter(frozen).requires_grad_(False)
    before, own_flags = logits(model), flags(model)
    with use_adapter(model, None):
        bare = logits(model)
        assert flags(model) == own_flags
        with use_adapter(model, "teacher"):
            assert torch.equal(logits(model), before) and flags(model) == own_flags
        assert torch.equal(logits(model), bare)
    assert not torch.equal(bare, before)
    assert torch.equal(logits(model), before) and flags(model) == own_flags
    with pytest.raises(RuntimeError, match="boom"), use_adapter(model, "teacher"):
        raise RuntimeError("boom")
    assert model.active_adapter == "default" and flags(model) == own_flags


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_shadow_computes_what_base_and_adapter_compute_with_plain_layers(
    tiny_policy_folder: Path, quantization: str
) -> None:
    model, _ = load_policy(ModelConfig(name=str(tiny_policy_folder), quantization=quantization, lora_rank=4), seed=0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    snapshot_adapter(model)
    expected = {name: logits_under(model, name) for name in ("default", "teacher", None)}
    before, kept = base_weights(model) | adapter_weights(model), [id(module) for module in model.modules()]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".teacher." in key:
                parameter.mul_(3)
    expected["teacher"] = logits_under(model, "teacher")
    for name, values in expected.items():
        with use_adapter(model, name), shadow_weights(model):
            layers = [module for module in model.get_base_model().modules() if isinstance(module, torch.nn.Linear)]
            assert all(type(layer) is torch.nn.Linear for layer in layers)
            assert not any("lora_" in key for key, _ in model.named_parameters())
            torch.testing.assert_close(logits(model), values, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected["default"], expected["teacher"], atol=1e-2), "else this test shows nothing"
    assert [id(module) for module in model.modules()] == kept
    after = base_weights(model) | adapter_weights(model)
    assert all(torch.equal(before[key], after[key]) for key in before if ".teacher." not in key)


def logits_under(model: PeftModel, name: str | None) -> torch.Tensor:
    with use_adapter(model, name):
        return logits(model)


def test_the_shadow_is_as_large_as_it_says_and_shares_what_was_plain_already(tiny_policy_folder: Path) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    embeddings = model.get_input_embeddings().weight
    there = {parameter.data_ptr() for parameter in model.parameters()}
    size = shadow_bytes(model)
    with shadow_weights(model):
        new = [parameter for parameter in model.parameters() if parameter.data_ptr() not in there]
        assert sum(parameter.numel() * parameter.element_size() for parameter in new) == size > 0
        assert model.get_input_embeddings().weight is embeddings


@torch.inference_mode()
def test_onednn_computes_what_base_and_adapter_compute_and_holds_the_weights_once(
    tiny_policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.normal_(std=0.1)
    expected, kept = logits(model), [id(module) for module in model.modules()]
    monkeypatch.setattr(model_module, "WORTHWHILE", 0)
    head = model.get_output_embeddings().weight
    with shadow_weights(model, onednn=True):
        layers = [module for module in model.modules() if isinstance(module, OneDnnLinear)]
        own = {id(layer.weight) for layer in layers if layer.weight.is_mkldnn}
        assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
        assert len(own) == len(layers) - 1, "all but the head, whose weight others have too"
        assert model.get_output_embeddings().weight.data_ptr() == head.data_ptr()
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert [id(module) for module in model.modules()] == kept
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pack", [True, False])
def test_a_layer_by_onednn_equals_pytorchs_for_inputs_of_any_shape(pack: bool, bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(37, 53, bias=bias)
    ours = OneDnnLinear(linear, pack=pack)
    wide = torch.randn(4, 74, 6)
    with torch.inference_mode():
        for inputs in (wide[:, :37, 0], wide.mT[..., ::2], torch.randn(37), torch.randn(0, 37), torch.randn(2, 0, 37)):
            torch.testing.assert_close(ours(inputs), linear(inputs), atol=1e-5, rtol=1e-5)


def test_the_masters_are_fp32_and_the_base_as_it_was_after_100_update_cycles(tiny_policy_folder: Path) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    before = base_weights(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-7)
    first, start = adapter_weights(model), logits(model)
    for _ in range(100):
        with shadow_weights(model):
            logits(model)
        model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    last = adapter_weights(model)
    assert all(weight.dtype == torch.float32 for weight in last.values())
    assert any(not torch.equal(first[key], last[key]) for key in first), "small updates add up"
    after = base_weights(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(logits(model), start)


def test_an_error_in_the_shadow_puts_the_layers_back(tiny_policy_folder: Path) -> None:
    model, _ = fresh_policy(tiny_policy_folder)
    kept = [id(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match="in the body"), shadow_weights(model):
        raise RuntimeError("in the body")
    assert [id(module) for module in model.modules()] == kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("name", "told"), [("Qwen/Qwen2.5-3B", "3"), ("HuggingFaceTB/SmolLM2-135M-Instruct", None)])
def test_without_a_gpu_a_large_model_is_told_of_before_it_is_fetched(
    name: str, told: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(config: ModelConfig) -> Path:
        raise UserError("not fetched")

    monkeypatch.setattr(model_module, "model_folder", fetch)
    with pytest.raises(UserError, match="not fetched"):
        load_policy(ModelConfig(name=name), seed=0)
    said = capsys.readouterr().err
    assert said.startswith(f"there is no GPU: {name} with its {told} billion parameters") if told else said == ""


def test_a_machine_is_crowded_by_more_threads_than_it_has_cores_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for load, threads, crowded in ((0.0, 4, False), (4.0, 4, False), (4.5, 4, True), (40.0, 1, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert is_crowded(threads) is crowded, (load, threads)
