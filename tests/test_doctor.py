"""What doctor says of this machine, the hub and a configuration, and which setting it names where memory is short."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from rich.console import Console

from searche1_lite.bench.doctor import CUDA_RESERVE, GIB, _memory, advise, examine, model_shape
from searche1_lite.cli.tables import doctor_tables
from searche1_lite.config import Config, load_config
from searche1_lite.policy.memory import MemoryPlan, plan_memory

CHECKS = ["packages", "Java", "GPU", "bitsandbytes", "kernels", "disk", "hub", "search"]
SMALL = ["engine.batch_size=4", "grpo.micro_batch_tokens=896", "ofsd.micro_batch_tokens=896"]

EXAMINE = """
import json, sys
from searche1_lite.runtime.quiet import quieten
quieten()
from searche1_lite.config import load_config
from searche1_lite.bench.doctor import examine
for overrides in json.loads(sys.argv[1]):
    print(json.dumps(examine(load_config("demo", None, overrides))))
"""


COLUMNS = 128 + 768 + 1
"""The demo's cache: a full-length episode, and a column that nobody reads."""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 does, which the library reads when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def demo(*overrides: str) -> Config:
    return load_config("demo", None, [*SMALL, *overrides])


def checks(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["status"], check["detail"]) for check in found["checks"]}


def examine_elsewhere(environment: dict[str, str], *calls: list[str]) -> list[dict[str, Any]]:
    """What `examine` finds for each list of overrides, in a process with this environment."""
    ran = subprocess.run(
        [sys.executable, "-c", EXAMINE, json.dumps([[*SMALL, *overrides] for overrides in calls])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_the_demo_needs_nothing_that_is_not_here(offline: None) -> None:
    found = examine(demo())
    assert list(checks(found)) == CHECKS
    assert {status for status, _ in checks(found).values()} == {"ok"} and found["ok"]
    memory = found["memory"]
    assert memory["fits"] and memory["advice"] == []
    assert list(memory["stages"]) == list(memory["peaks"]) == ["rollout", "GRPO step", "OFSD step"]
    assert 0 < max(memory["peaks"].values()) < memory["capacity_bytes"]
    assert all(memory["peaks"][stage] == sum(parts.values()) for stage, parts in memory["stages"].items())
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("overrides", "name", "detail"),
    [
        (["search.corpus=missing.jsonl"], "search", "no corpus at missing.jsonl"),
        (["search.corpus=null"], "search", "nothing to search is set"),
        (["search.index=./missing"], "search", "no Lucene index at ./missing"),
        (["model.name=./missing"], "memory plan", "model.name='./missing': no such folder"),
    ],
)
def test_what_is_missing_is_one_failing_check_with_one_line(
    offline: None, overrides: list[str], name: str, detail: str
) -> None:
    found = examine(demo(*overrides))
    assert not found["ok"]
    status, line = checks(found)[name]
    assert status == "fail" and line.startswith(detail) and "\n" not in line
    failed = {check for check, (status, _) in checks(found).items() if status == "fail"}
    assert failed == ({"hub", "memory plan"} if name == "memory plan" else {name})
    assert (found["memory"] is None) == (name == "memory plan")


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-model"}'])
def test_a_model_folder_with_a_broken_config_fails_the_plan_in_one_line(
    offline: None, tmp_path: Path, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    found = examine(demo(f"model.name={tmp_path}"))
    status, line = checks(found)["memory plan"]
    assert status == "fail" and line.startswith(f"cannot read the shape of '{tmp_path}': ") and "\n" not in line
    assert not found["ok"] and found["memory"] is None


def test_offline_mode_is_a_note_only_where_the_hub_is_needed(offline: None) -> None:
    assert checks(examine(demo()))["hub"][0] == "ok"
    found = examine(demo("model.name=nobody/no-such-model"))
    status, line = checks(found)["hub"]
    assert status == "warn" and line.startswith("HF_HUB_OFFLINE is set")
    status, line = checks(found)["memory plan"]
    assert status == "fail" and "HF_HUB_OFFLINE is set" in line and "\n" not in line and not found["ok"]
    assert checks(examine(demo("data.train=nq")))["hub"][0] == "warn"


def test_a_hub_that_cannot_be_reached_fails_only_where_it_is_needed(tmp_path: Path) -> None:
    address = closed_port()
    environment = HubServer(address=address).environment(tmp_path)
    local, known, unknown = examine_elsewhere(
        environment, [], ["model.name=Qwen/Qwen2.5-3B"], ["model.name=nobody/model"]
    )
    status, line = checks(local)["hub"]
    assert status == "ok" and line.startswith(f"{address} cannot be reached (") and line.endswith("; not needed here")
    assert local["ok"]
    for found in (known, unknown):
        status, line = checks(found)["hub"]
        assert status == "fail" and line.startswith(f"{address} cannot be reached (") and "\n" not in line
        assert not found["ok"]
    layers, heads, width = 36, 2, 128
    cache = known["memory"]["stages"]["rollout"]["KV cache"]
    assert cache == 4 * COLUMNS * layers * heads * width * 2 * 4, "Qwen's shape is known, here in fp32"
    status, line = checks(unknown)["memory plan"]
    assert status == "fail" and f"cannot reach {address}" in line and "\n" not in line and unknown["memory"] is None


def test_a_hub_that_answers_gives_the_models_shape_and_nothing_else(tiny_policy_folder: Path, tmp_path: Path) -> None:
    with HubServer().run() as hub:
        hub.add("models", "tiny/policy", tiny_policy_folder)
        (found,) = examine_elsewhere(hub.environment(tmp_path), ["model.name=tiny/policy"])
        assert checks(found)["hub"] == ("ok", f"{hub.address} answers") and found["ok"]
        assert hub.downloads("config.json") and not hub.downloads("model.safetensors")
    local = model_shape(demo(f"model.name={tiny_policy_folder}"))
    layers, heads, width = local.num_hidden_layers, local.num_key_value_heads, local.hidden_size // 4
    assert found["memory"]["stages"]["rollout"]["KV cache"] == 4 * COLUMNS * layers * heads * width * 2 * 4


def test_the_command_prints_one_json_object_and_exits_with_1_where_a_check_fails(
    tiny_policy_folder: Path, tmp_path: Path
) -> None:
    environment = HubServer(address=closed_port()).environment(tmp_path / "home")
    overrides = [f"model.name={tiny_policy_folder}", "search.index=null", "search.corpus=missing.jsonl"]
    ran = subprocess.run(
        [sys.executable, "-m", "searche1_lite", "doctor", "--json", "--gpu-gb", "8.5", *overrides],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr == "preset qwen2.5-3b-8gb, by the size of the GPU; --preset names another\n"
    assert ran.stdout.count("\n") == 1
    found = json.loads(ran.stdout)
    assert found.keys() == {"checks", "memory", "ok"} and found["ok"] is False
    assert checks(found)["search"][0] == checks(found)["hub"][0] == "fail", "its questions are on the hub"
    assert found["memory"]["device"] == "cuda" and found["memory"]["dtype"] == "bfloat16" and found["memory"]["fits"]
    assert found["memory"]["capacity_bytes"] == int(8.5 * GIB) - CUDA_RESERVE
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "home"]), "nothing is written beside the hub's cache"


def test_a_card_that_is_described_has_bf16_whatever_the_one_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (8 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    assert [_memory(demo(), size)["dtype"] for size in (8.0, None)] == ["bfloat16", "float32"]


def test_the_tables_tell_each_check_each_part_and_the_advice(offline: None) -> None:
    found = examine(demo("search.corpus=none[red].jsonl"))
    found["memory"] |= {"fits": False, "advice": ["rollout: 9.0 GiB are more than 8.0; try engine.batch_size=[7]"]}
    console = Console(width=200)
    with console.capture() as captured:
        for part in doctor_tables(found):
            console.print(part)
    shown = captured.get()
    assert all(name in shown for name in [*CHECKS, *found["memory"]["stages"]["rollout"], "gradients", "peak"])
    assert "FAIL" in shown and "does not fit" in shown
    assert "none[red].jsonl" in shown and "engine.batch_size=[7]" in shown, "brackets are not markup"
    with console.capture() as captured:
        for part in doctor_tables({"checks": found["checks"], "memory": None}):
            console.print(part)
    assert "memory plan" not in captured.get()


def made_up(rollout: int = 10, grpo: int = 10, ofsd: int = 10, cache: int = 0) -> MemoryPlan:
    """A plan with these peaks in MiB, of the rollout's `cache` for keys and values."""
    mib = 2**20
    stages = {
        "rollout": {"base weights": (rollout - cache) * mib, "KV cache": cache * mib},
        "GRPO step": {"activations, loss": grpo * mib},
        "OFSD step": {"activations, loss": ofsd * mib},
    }
    return MemoryPlan("cuda", "bfloat16", stages)


def knobs(plan: MemoryPlan, capacity: int, *overrides: str) -> dict[str, str]:
    """What is advised for each stage where there are `capacity` MiB."""
    said = [line.partition(": ") for line in advise(load_config(None, None, overrides), plan, capacity * 2**20)]
    return {stage: text.rpartition("; try ")[2] for stage, _, text in said}


def test_what_fits_needs_no_advice() -> None:
    assert advise(Config(), made_up(rollout=100, grpo=100, ofsd=100), 100 * 2**20) == []


def test_a_line_tells_the_stage_what_it_takes_and_what_there_is() -> None:
    config = load_config("qwen2.5-3b-24gb")
    (line,) = advise(config, made_up(grpo=3072), 2048 * 2**20)
    assert line == "GRPO step: 3.0 GiB are more than 2.0; try grpo.micro_batch_tokens=8192"


@pytest.mark.parametrize(("capacity", "fitting"), [(99, 9), (91, 9), (90, 9), (89, 8), (50, 5), (10, 1)])
def test_rollouts_are_advised_the_largest_batch_that_then_fits(capacity: int, fitting: int) -> None:
    plan = made_up(rollout=100, cache=100)
    assert knobs(plan, capacity, "engine.batch_size=10") == {"rollout": f"engine.batch_size={fitting}"}


def test_rollouts_of_which_not_one_fits_need_shorter_episodes() -> None:
    plan = made_up(rollout=100, cache=50)
    assert knobs(plan, 50, "engine.batch_size=10") == {"rollout": "a smaller protocol.max_completion_tokens"}


@pytest.mark.parametrize(("stage", "section"), [("GRPO step", "grpo"), ("OFSD step", "ofsd")])
def test_training_gives_up_speed_first_then_rows_and_length_last(stage: str, section: str) -> None:
    plan = made_up(**{section: 100})
    shape = [
        "grpo.questions_per_step=6", "grpo.group_size=5", "ofsd.batch_size=30", "protocol.max_turn_tokens=20",
        "protocol.max_prompt_tokens=40", "protocol.max_completion_tokens=60",
    ]  # fmt: skip
    plain = "model.gradient_checkpointing=false"

    def knob(size: int, *more: str) -> str:
        sizes = [f"{name}.micro_batch_tokens={size if name == section else 1}" for name in ("grpo", "ofsd")]
        (found,) = knobs(plan, 99, *shape, *sizes, *more).items()
        assert found[0] == stage
        if "=" in found[1]:  # it is an override, and one that is taken
            load_config(None, None, [*shape, *sizes, *more, found[1]])
        return found[1]

    assert knob(600, plain) == knob(1, plain) == "model.gradient_checkpointing=true"
    for size, smaller in ((9000, 1500), (3000, 1500), (1500, 700), (700, 300), (250, 100), (200, 100), (101, 100)):
        assert knob(size) == f"{section}.micro_batch_tokens={smaller}"
    assert knob(100) == knob(1) == "a smaller protocol.max_completion_tokens"


def test_followed_advice_leads_to_a_plan_that_fits(tiny_policy_folder: Path) -> None:
    overrides = [
        f"model.name={tiny_policy_folder}", "engine.batch_size=256", "grpo.micro_batch_tokens=35840",
        "ofsd.enabled=false",
    ]  # fmt: skip
    capacity, followed = 100 * 2**20, []
    while len(followed) < 6:
        config = load_config("demo", None, [*overrides, *followed])
        plan = plan_memory(config, model_shape(config), "cuda")
        if not (advice := advise(config, plan, capacity)):
            break
        followed += [line.rpartition("; try ")[2] for line in advice]
    assert max(plan.peaks.values()) <= capacity
    assert {"model.gradient_checkpointing=true", "grpo.micro_batch_tokens=17920"} <= set(followed)
    assert any(knob.startswith("engine.batch_size=") for knob in followed)
