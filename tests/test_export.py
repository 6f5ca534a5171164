"""What `export` writes, loaded by plain PEFT and plain transformers, and held against the policy that was trained."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes.nn import Linear4bit
from command import run_command
from conftest import fresh_policy
from hub_server import HubServer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from searche1_lite.config import Config, dump_config, load_config
from searche1_lite.data.questions import load_questions
from searche1_lite.data.trajectory import Question, Trajectory
from searche1_lite.policy.adapter import save_adapter
from searche1_lite.policy.merge import merge, save_merged
from searche1_lite.policy.model import load_policy, resolve_model
from searche1_lite.rollout.scheduler import Sampling
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.progress import SILENT
from searche1_lite.serve.export import (
    RUN_CONFIG,
    RUN_SUMMARY,
    export_policy,
    find_source,
    summary_without_folders,
    without_folders,
)
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.session import Session

SETTINGS = [
    "rounds=1",
    "grpo.steps=4",
    "grpo.questions_per_step=8",
    "ofsd.questions=48",
    "data.evaluation_limit=16",
    "logging.samples=0",
    "seed=3",
]
STAGES = ["base", "round1.grpo", "round1.ofsd"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo that is through, one short round."""
    folder = tmp_path_factory.mktemp("export") / "run"
    settings = load_config("demo", None, SETTINGS)
    run_training(settings, RunFolder(folder, settings, False), RichTasks(quiet=True))
    return folder


@pytest.fixture(scope="module")
def work(run_folder: Path) -> Session:
    """The trained policy, as the toolkit loads it."""
    return Session(load_config(file=run_folder / "config.yaml"), SILENT, run_folder / "checkpoints" / STAGES[-1])


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return load_questions("demo", "test", 0, 0, print)


@pytest.fixture(scope="module")
def answered(work: Session, questions: list[Question]) -> list[Trajectory]:
    """Greedy, by the trained policy."""
    return work.rollout(questions, 1, Sampling((0, "export"), greedy=True))


@pytest.fixture(scope="module")
def adapter(run_folder: Path) -> Path:
    to = run_folder.parent / "adapter"
    export_policy(run_folder, to, say=lambda line: None)
    return to


@pytest.fixture(scope="module")
def merged(run_folder: Path) -> Path:
    to = run_folder.parent / "merged"
    export_policy(run_folder, to, merge=True, say=lambda line: None)
    return to


def plain_base() -> torch.nn.Module:
    """The demo's base in NF4, loaded by transformers alone."""
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        resolve_model("demo"), dtype=torch.float32, device_map={"": "cpu"}, quantization_config=bits
    )
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # some CPUs would compute in bf16
    return base


@torch.no_grad()
def logits(model: torch.nn.Module, trajectory: Trajectory) -> torch.Tensor:
    return model(torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])).logits[0].float()


def furthest(one: torch.nn.Module, other: torch.nn.Module, trajectories: list[Trajectory]) -> float:
    """The largest KL(one || other) of a next token that a policy would write, in nats."""
    found = []
    for t in trajectories:
        written = torch.tensor(t.loss_mask).bool()
        p, q = (logits(model, t)[len(t.prompt_ids) - 1 : -1][written].log_softmax(-1) for model in (one, other))
        found.append(float((p.exp() * (p - q)).sum(-1).max()))
    return max(found)


def test_plain_peft_over_the_4_bit_base_computes_what_the_toolkit_does_bit_for_bit(
    adapter: Path, work: Session, answered: list[Trajectory]
) -> None:
    plain = PeftModel.from_pretrained(plain_base(), adapter).eval()
    for trajectory in answered[:20]:
        assert torch.equal(logits(plain, trajectory), logits(work.model, trajectory))


def test_an_adapter_folder_names_its_base_and_brings_the_bases_tokenizer(adapter: Path, run_folder: Path) -> None:
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"], saved["peft_type"]) == ("demo", None, "LORA")
    base = Path(resolve_model("demo"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (adapter / name).read_bytes() == (base / name).read_bytes()
    assert not (adapter / "state.json").exists()
    ours = load_file(run_folder / "checkpoints" / STAGES[-1] / "adapter_model.safetensors")
    theirs = load_file(adapter / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_merged_model_is_plain_bf16_without_a_trace_of_quantisation_or_adapter(merged: Path) -> None:
    weights = load_file(merged / "model.safetensors")
    base = load_file(Path(resolve_model("demo")) / "model.safetensors")
    assert weights.keys() == base.keys(), "tied embeddings stand once"
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    settings = json.loads((merged / "config.json").read_text())
    assert settings["dtype"] == "bfloat16" and settings["architectures"] == ["Qwen2ForCausalLM"]
    assert "quantization_config" not in settings and not (merged / "adapter_config.json").exists()
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["do_sample"] is False and 819 in generation["eos_token_id"]
    assert (merged / "model.safetensors").stat().st_mode == (merged / "config.json").stat().st_mode


def test_plain_transformers_and_the_merged_model_answer_as_the_trained_policy(
    merged: Path, work: Session, questions: list[Question], answered: list[Trajectory]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    apart = furthest(plain, work.model, answered[:50])
    print(f"furthest apart: {apart:.5f} nats")
    assert apart < 0.02, "bf16 rounds, and nothing else differs"

    # The same weights through the toolkit's own loop, all questions at once.
    settings = replace(work.config, model=replace(work.config.model, name=str(merged), quantization="none"))
    ours = Session(settings, SILENT, retriever=work.retriever).rollout(
        questions, 1, Sampling((0, "export"), greedy=True)
    )
    same = sum(a.answer == b.answer for a, b in zip(ours, answered, strict=True))
    print(f"same answers: {same} of {len(questions)}")
    assert same >= 0.99 * len(questions) == 495


def test_merging_into_the_weights_before_quantisation_is_further_from_what_was_trained(
    merged: Path, work: Session, run_folder: Path, answered: list[Trajectory]
) -> None:
    original = replace(work.config.model, quantization="none")
    policy, _ = load_policy(original, adapter=run_folder / "checkpoints" / STAGES[-1], seed=0)
    other = merge(policy).float()
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    theirs, ours = (furthest(model, work.model, answered[:20]) for model in (other, ours))
    print(f"furthest apart: {theirs:.4f} nats, merged into what was trained over {ours:.4f}")
    assert theirs > 4 * ours


def test_a_model_in_several_files_is_the_same_model(merged: Path, run_folder: Path, tmp_path: Path) -> None:
    settings = load_config(file=run_folder / "config.yaml").model
    save_merged(settings, run_folder / "checkpoints" / STAGES[-1], tmp_path, shard_size="400KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    one, several = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict() for path in (merged, tmp_path)
    )
    assert one.keys() == several.keys() and all(torch.equal(one[key], several[key]) for key in one)


def test_embeddings_that_a_checkpoint_has_apart_stay_apart_whatever_its_config_says(
    tiny_policy_folder: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_policy_folder, base)  # it has a head of its own
    settings = json.loads((base / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False
    (base / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    policy, _ = fresh_policy(base)
    ids = torch.tensor([[5, 9, 40, 7]])
    with torch.no_grad():
        expected = policy(ids).logits
        merged = merge(policy)
        assert (merged.float()(ids).logits - expected).abs().max() < 0.05 * expected.abs().max()
    merged.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_in_the_card_answers_as_the_toolkit_does(
    kind: str,
    request: pytest.FixtureRequest,
    work: Session,
    answered: list[Trajectory],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder: Path = request.getfixturevalue(kind)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(folder.parent)  # it names the folder by its last part
    names: dict[str, Any] = {}
    exec(code[1], names)

    def search(query: str) -> list[tuple[str, str]]:
        (found,) = work.retriever.search([query], work.config.search.k)
        return [(passage.title, passage.text) for passage in found]

    names["search"] = search
    asked = [t for t in answered if t.stopped == "answer" and t.n_invalid == 0][:12]
    assert len({t.n_searches for t in asked}) > 1
    assert [names["answer"](t.question.question) for t in asked] == [t.answer for t in asked]


def test_the_card_tells_the_runs_figures_settings_and_what_is_not_known(merged: Path, run_folder: Path) -> None:
    card = (merged / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    stages = json.loads((run_folder / "summary.json").read_text())["stages"]
    for stage in stages:
        low, high = stage["em_ci95"]
        assert f"| {stage['name']} | {stage['em']:.3f} | {low:.3f}-{high:.3f} | {stage['f1']:.3f} |" in text
    assert "on 16 questions of `demo`" in text and "bm25(k1=0.9, b=0.4)" in text and "seed 3" in text
    assert "merged weights were not measured again" in text and "More Information Needed" not in text
    shown = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert shown is not None and yaml.safe_load(shown[1])["grpo"]["steps"] == 4
    assert load_config(file=merged / "run_config.yaml") == load_config(file=run_folder / "config.yaml")


def test_a_stage_by_its_name_or_its_folder_is_exported_with_the_figures_up_to_it(
    run_folder: Path, tmp_path: Path
) -> None:
    by_name = export_policy(run_folder, tmp_path / "a", stage="round1.grpo", say=lambda line: None)
    by_folder = export_policy(run_folder / "checkpoints" / "round1.grpo", tmp_path / "b", say=lambda line: None)
    assert by_name["stage"] == by_folder["stage"] == "round1.grpo" and by_name["kind"] == "adapter"
    assert "round1.ofsd" not in (tmp_path / "a" / "README.md").read_text()
    for file in ("adapter_model.safetensors", "run_summary.json", "run_config.yaml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_exported_adapter_is_good_for_the_toolkit_and_for_another_export(
    adapter: Path, merged: Path, tmp_path: Path
) -> None:
    load_policy(load_config("demo").model, adapter=adapter, seed=0)
    result = export_policy(adapter, tmp_path / "again", merge=True, say=lambda line: None)
    assert result["stage"] == STAGES[-1]
    for file in ("model.safetensors", "config.json", "run_config.yaml"):
        assert (tmp_path / "again" / file).read_bytes() == (merged / file).read_bytes()


def test_of_an_adapter_without_its_run_the_card_says_that_nothing_is_known(run_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run_folder / "checkpoints" / STAGES[-1] / name, bare)
    said: list[str] = []
    result = export_policy(bare, tmp_path / "out", merge=True, say=said.append)
    assert result["stage"] is result["em"] is None and "belongs to no run" in said[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Figures" not in card and "how good it is, is not known" in card


def test_what_is_exported_tells_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    config: Config = load_config(
        "demo",
        None,
        [f"model.name={tmp_path}/my-model", f"search.corpus={tmp_path}/docs", f"data.train={tmp_path}/a.jsonl+nq"],
    )
    shown = without_folders(config)
    assert (shown.model.name, shown.search.corpus, shown.data.train) == ("my-model", "docs", "a.jsonl+nq")
    summary = {"model": f"{tmp_path}/my-model", "training": {"data": f"{tmp_path}/a.jsonl+nq", "n": 9}, "stages": []}
    cut = summary_without_folders(summary)
    assert cut == {"model": "my-model", "training": {"data": "a.jsonl+nq", "n": 9}, "stages": []}
    hub = load_config("demo", None, ["model.name=Qwen/Qwen2.5-3B", "search.index=wiki-18", "data.evaluation=nq:dev"])
    assert without_folders(hub) == hub


def test_what_is_exported_tells_no_search_servers_address(run_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    shutil.copytree(run_folder, own)
    address = "retriever.corp.internal:8000"
    served = [f"search.url=http://{address}/retrieve", "search.corpus=null"]
    (own / "config.yaml").write_text(dump_config(load_config(file=own / "config.yaml", overrides=served)))
    summary = json.loads((own / "summary.json").read_text()) | {"retriever": f"http(bm25 at {address}/retrieve)"}
    (own / "summary.json").write_text(json.dumps(summary))
    export_policy(own, tmp_path / "out", say=lambda line: None)
    for name in ("README.md", RUN_CONFIG, RUN_SUMMARY):
        assert "retriever.corp" not in (tmp_path / "out" / name).read_text()
    assert load_config(file=tmp_path / "out" / RUN_CONFIG).search.url == "http://search-server/retrieve"


def make_unfinished(run_folder: Path, to: Path) -> Path:
    """The run as it was before its last stage was through."""
    shutil.copytree(run_folder, to)
    shutil.rmtree(to / "checkpoints" / STAGES[-1])
    summary = json.loads((to / "summary.json").read_text())
    summary["stages"].pop()
    (to / "summary.json").write_text(json.dumps(summary))
    return to


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nothing", "--to", "out"], "there is no folder nothing; give a run's"),
        (["empty", "--to", "out"], "empty holds no adapter"),
        (["run", "--to", "out", "--stage", "round7.grpo"], f"'round7.grpo'; there are: {', '.join(STAGES)}"),
        (["run/checkpoints/round7.grpo", "--to", "out"], "there is no folder run/checkpoints/round7.grpo"),
        (["adapter", "--to", "out", "--stage", "base"], "adapter is no run's folder, so it has no stage 'base'"),
        (["unfinished", "--to", "out"], "is not finished; go on with `train --resume --out unfinished`, or name one"),
        (["begun", "--to", "out"], "no stage of the run in begun is finished"),
        (["run", "--to", "taken"], "taken exists and is not empty"),
        (["run", "--to", "taken/file"], "taken/file is a file"),
        (["run", "--to", "run/exported"], "run/exported is inside run"),
        (["adapter", "--to", "adapter/again"], "adapter/again is inside adapter"),
        (["run", "--to", "out", "--public"], "--public is for --push"),
    ],
)
def test_a_mistake_is_one_line_before_anything_heavy_is_loaded(
    words: list[str], line: str, run_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    for name in ("empty", "taken"):
        (tmp_path / name).mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "run").symlink_to(run_folder)
    shutil.copytree(adapter, tmp_path / "adapter")
    make_unfinished(run_folder, tmp_path / "unfinished")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    shutil.copy(run_folder / "config.yaml", tmp_path / "begun")
    before = sorted(tmp_path.rglob("*"))
    ran = export(tmp_path, *words, python=["-X", "importtime"])
    assert ran.returncode == 2 and ran.stdout == ""
    lines = [text for text in ran.stderr.splitlines() if not text.startswith("import time:")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and line in lines[0], lines
    assert not re.search(r"\| +(torch|transformers|peft)$", ran.stderr, re.MULTILINE)
    assert sorted(tmp_path.rglob("*")) == before


def export(folder: Path, *words: str, python: list[str] | None = None, **how: Any) -> subprocess.CompletedProcess[str]:
    """`searche1-lite export WORDS` in `folder`."""
    if python is None and not how:
        return run_command("export", *words, cwd=folder)
    command = [sys.executable, *(python or []), "-m", "searche1_lite", "export", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **how)


def test_an_unfinished_runs_stage_is_exported_when_it_is_named(run_folder: Path, tmp_path: Path) -> None:
    folder = make_unfinished(run_folder, tmp_path / "run")
    assert find_source(folder, "round1.grpo").adapter == folder / "checkpoints" / "round1.grpo"
    with pytest.raises(UserError, match="no finished stage 'round1.ofsd'; there are: base, round1.grpo"):
        find_source(folder, "round1.ofsd")


def test_damaged_weights_are_refused_and_leave_nothing(run_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    shutil.copytree(run_folder / "checkpoints" / STAGES[-1], source)
    content = (source / "adapter_model.safetensors").read_bytes()
    (source / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="adapter_model.safetensors has .* of its .* bytes"):
        export_policy(source, tmp_path / "out", say=lambda line: None)
    assert os.listdir(tmp_path) == ["adapter"]


def limit_files(size: int) -> Callable[[], None]:
    """For a child process: no file may become larger, and who tries is told so instead of killed."""

    def limit() -> None:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize("merged_too", [False, True])
def test_where_files_cannot_be_written_one_line_says_so_and_nothing_is_left(
    merged_too: bool, run_folder: Path, tmp_path: Path
) -> None:
    words = [str(run_folder), "--to", "out", *(["--merge"] if merged_too else [])]
    ran = export(tmp_path, *words, preexec_fn=limit_files(100_000))
    assert ran.returncode == 1 and ran.stdout == ""
    assert (
        ran.stderr.count("\n") == 1
        and ran.stderr.startswith("error: cannot write to out: ")
        and "make room" in ran.stderr
    )
    assert os.listdir(tmp_path) == []


def test_an_interrupted_export_leaves_nothing(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("searche1_lite.policy.merge.save_merged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_policy(run_folder, tmp_path / "out", merge=True, say=lambda line: None)
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def hub_adapter(tiny_policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over a base of the hub's, `someone/tiny`."""
    model, _ = fresh_policy(tiny_policy_folder)
    model.peft_config["default"].base_model_name_or_path = "someone/tiny"
    folder = tmp_path_factory.mktemp("hub") / "adapter"
    save_adapter(model, folder)
    return folder


def test_over_a_hub_base_the_commit_is_told_and_the_tokenizer_comes_from_there(
    hub_adapter: Path, tiny_policy_folder: Path, tmp_path: Path
) -> None:
    with HubServer().run() as hub:
        hub.add("models", "someone/tiny", tiny_policy_folder)
        ran = export(tmp_path, str(hub_adapter), "--to", "out", "--json", env=hub.environment(tmp_path / "home"))
        assert ran.returncode == 0, ran.stderr
        assert not hub.downloads("model.safetensors"), "an adapter needs no weights of the base"
        result = json.loads(ran.stdout)
        assert result["base"] == "someone/tiny" and re.fullmatch("[0-9a-f]{40}", result["revision"])
        again = export(tmp_path, str(hub_adapter), "--to", "whole", "--merge", env=hub.environment(tmp_path / "home"))
        assert again.returncode == 0 and again.stdout == "whole\n", again.stderr
    out = tmp_path / "out"
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"], front["license"]) == ("someone/tiny", "adapter", "other")
    assert front["license_link"] == "https://huggingface.co/someone/tiny" and "check them" in card
    assert f"'someone/tiny', revision='{result['revision']}'" in card
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template is not None
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto").state_dict()
    assert weights["lm_head.weight"].dtype == torch.bfloat16


def test_a_push_makes_a_private_repository_with_what_the_folder_holds(run_folder: Path, tmp_path: Path) -> None:
    with HubServer().run() as hub:
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_test")
        words = [str(run_folder), "--to", "out", "--merge", "--push", "me/agent", "--json"]
        ran = export(tmp_path, *words, env=environment)
        assert ran.returncode == 0, ran.stderr
        result = json.loads(ran.stdout)
        assert result["address"] == f"{hub.address}/me/agent" and hub.visibility == {"models/me/agent": "private"}
        uploaded = {path.name: path.read_bytes() for path in hub.folders["models/me/agent"].iterdir()}
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert uploaded == files
    assert b"from_pretrained('me/agent'" in files["README.md"]


@pytest.mark.parametrize(
    ("repository", "environment", "line"),
    [
        ("me/agent", {}, "there is no token; log in with `hf auth login`, or set HF_TOKEN"),
        ("agent", {"HF_TOKEN": "hf_test"}, "write owner/name"),
        ("me/agent", {"HF_TOKEN": "hf_refused"}, "the hub refused your token (HTTP 401)"),
        ("me/agent", {"HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("me/agent", {"HF_TOKEN": "hf_test", "HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot reach http://127.0.0.1:9"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_the_work(
    repository: str, environment: dict[str, str], line: str, run_folder: Path, tmp_path: Path
) -> None:
    with HubServer().run() as hub:
        words = [str(run_folder), "--to", "out", "--push", repository]
        ran = export(tmp_path, *words, env=hub.environment(tmp_path / "home", **environment))
    assert ran.returncode in (1, 2) and ran.stdout == "" and ran.stderr.count("\n") == 1, ran.stderr
    assert ran.stderr.startswith(f"error: cannot upload to {repository!r}: ") and line in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_push_that_breaks_off_leaves_the_export_and_says_how_to_go_on(run_folder: Path, tmp_path: Path) -> None:
    with HubServer().run() as hub:
        hub.refuse_uploads = 403
        environment = hub.environment(tmp_path / "home", HF_TOKEN="hf_test")
        ran = export(tmp_path, str(run_folder), "--to", "out", "--push", "me/agent", env=environment)
    assert ran.returncode == 1 and ran.stdout == ""
    last = ran.stderr.splitlines()[-1]
    assert "HTTP 403" in last and last.endswith("it is exported, in out: `hf upload me/agent out` tries again")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
