"""A run's folder: never overwritten, complete or not there, and restored bit for bit."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fresh_policy
from peft import PeftModel, get_peft_model_state_dict

from searche1_lite.config import Config, load_config
from searche1_lite.policy.adapter import load_adapter_weights, save_adapter
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.sealed_folder import SEAL, update_sealed, write_atomically, write_sealed
from searche1_lite.train import run_folder as checkpoint
from searche1_lite.train.run_folder import RunFolder, check_adapter_folder
from searche1_lite.train.schedule import best_stage


@pytest.fixture(scope="module")
def policy(tiny_policy_folder: Path) -> PeftModel:
    """A policy of this file's own, whose adapter the tests may change."""
    return fresh_policy(tiny_policy_folder)[0]


def move(model: PeftModel) -> dict[str, torch.Tensor]:
    """Changes every weight of the adapter, as training does, and returns a copy of what they are now."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return weights(model)


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def summary_of(*stages: str) -> dict[str, Any]:
    return {"seed": 0, "stages": [{"name": stage, "em": 0.25} for stage in stages], "metrics_size": 0}


def tree(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    """Everything below `folder`: content and time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


def refusal(path: Path, config: Config, resume: bool) -> str:
    """The message that the folder is refused with; nothing in it may change."""
    before = tree(path.parent)
    with pytest.raises(UserError) as caught:
        RunFolder(path, config, resume).start()
    assert tree(path.parent) == before
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("resume", [False, True], ids=["train", "resume"])
@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
def test_a_fresh_folder_is_made_and_holds_the_whole_config(tmp_path: Path, exists: bool, resume: bool) -> None:
    path, config = tmp_path / "runs" / "one", load_config("demo", overrides=["seed=5"])
    if exists:
        path.mkdir(parents=True)
    folder = RunFolder(path, config, resume).start()
    assert load_config(file=path / "config.yaml") == config
    assert folder.latest() is None
    assert {item.name for item in path.iterdir()} == {".lock", "config.yaml", "checkpoints", "trajectories"}


def test_a_run_is_not_begun_again_without_resume(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", Config(), resume=False).start().save_summary(summary_of("base"))
    message = refusal(tmp_path / "run", Config(), resume=False)
    assert str(tmp_path / "run") in message and "--resume" in message and "--out" in message


def test_a_run_with_the_same_settings_is_resumed_and_keeps_what_it_has(tmp_path: Path) -> None:
    config = load_config("demo")
    folder = RunFolder(tmp_path / "run", config, resume=False).start()
    folder.log({"step": 1})
    folder.save_summary(summary_of("base"))
    folder.release()
    before = tree(tmp_path)
    RunFolder(tmp_path / "run", load_config("demo"), resume=True).start().log({"step": 2})
    after = tree(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {"run/metrics.jsonl"}
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_other_settings_are_refused_on_resume_with_the_keys_and_both_values(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", Config(), resume=False).start()
    asked = load_config(overrides=["grpo.clip=0.3", "seed=7", "model.revision=main"])
    message = refusal(tmp_path / "run", asked, resume=True)
    assert "grpo.clip (0.2 there, 0.3 now)" in message
    assert "seed (0 there, 7 now)" in message
    assert "model.revision (None there, 'main' now)" in message
    assert "grpo.steps" not in message


@pytest.mark.parametrize("text", ["seed: [1\n", "optimizer: adam\n", "- 1\n", "grpo: {steps: -1}\n"])
def test_a_config_in_the_folder_that_cannot_be_read_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    message = refusal(tmp_path / "run", Config(), resume=True)
    assert message.startswith(str(tmp_path / "run" / "config.yaml")) and "choose another --out" in message


@pytest.mark.parametrize("resume", [False, True], ids=["train", "resume"])
@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "sub/notes.txt"])
def test_a_folder_that_holds_anything_else_is_refused(tmp_path: Path, name: str, resume: bool) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    assert "is not empty and holds no run" in refusal(tmp_path / "run", Config(), resume)


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="choose another --out"):
        RunFolder(tmp_path / out, Config(), resume=False).start()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_comes_back_with_its_summary_and_bit_equal_weights(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    saved, summary = move(policy), summary_of("base")
    folder.save_checkpoint("base", policy, summary)
    assert not equal(move(policy), saved)
    latest = RunFolder(tmp_path / "run", Config(), resume=True).latest()
    assert latest == (tmp_path / "run" / "checkpoints" / "base", summary)
    load_adapter_weights(policy, latest[0])
    assert equal(weights(policy), saved)


def test_the_latest_checkpoint_is_the_one_with_the_most_stages(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    stages = ["base", "round1.grpo", "round1.ofsd", "round2.grpo"]
    for count in (4, 2, 1, 3):  # neither by name nor by time
        folder.save_checkpoint(stages[count - 1], policy, summary_of(*stages[:count]))
    latest = folder.latest()
    assert latest is not None
    assert (latest[0].name, latest[1]) == ("round2.grpo", summary_of(*stages))


def test_a_stage_saved_twice_keeps_the_later_weights(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    (tmp_path / "run" / "checkpoints" / "base" / "extra").write_text("of the earlier one")
    later = move(policy)
    folder.save_checkpoint("base", policy, summary_of("base") | {"seed": 1})
    latest = folder.latest()
    assert latest is not None and latest[1]["seed"] == 1
    assert not (latest[0] / "extra").exists()
    move(policy)
    load_adapter_weights(policy, latest[0])
    assert equal(weights(policy), later)


def test_what_an_interrupted_save_left_is_ignored_and_then_replaced(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    checkpoints = tmp_path / "run" / "checkpoints"
    folder.save_checkpoint("base", policy, summary_of("base"))
    # As if the machine went down just before the renaming: all written, and more stages than any other.
    folder.save_checkpoint("round1.grpo", policy, summary_of("base", "round1.grpo"))
    staging = checkpoints / ".round1.grpo.staging"
    (checkpoints / "round1.grpo").rename(staging)
    (staging / "leftover").write_text("of the interrupted save")
    resumed = RunFolder(tmp_path / "run", Config(), resume=True)
    assert resumed.latest() == (checkpoints / "base", summary_of("base"))

    # As if it went down while the summary was being written.
    (staging / "state.json").write_text('{"stages": [')
    assert resumed.latest() == (checkpoints / "base", summary_of("base"))

    saved = move(policy)
    resumed.save_checkpoint("round1.grpo", policy, summary_of("base", "round1.grpo"))
    assert {item.name for item in checkpoints.iterdir()} == {"base", "round1.grpo"}
    latest = resumed.latest()
    assert latest == (checkpoints / "round1.grpo", summary_of("base", "round1.grpo"))
    assert not (latest[0] / "leftover").exists()
    move(policy)
    load_adapter_weights(policy, latest[0])
    assert equal(weights(policy), saved)


def test_what_an_interrupted_save_left_goes_when_the_run_goes_on(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    folder.release()
    left = tmp_path / "run" / "checkpoints" / ".round1.grpo.staging"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "base", left)
    RunFolder(tmp_path / "run", Config(), resume=True).start()
    assert [item.name for item in left.parent.iterdir()] == ["base"]


@pytest.mark.parametrize("whole", ["both", "earlier", "neither"])
def test_a_checkpoint_that_was_being_replaced_is_there_after_a_kill_between_the_two_renames(
    tmp_path: Path, policy: PeftModel, whole: str
) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    final = tmp_path / "run" / "checkpoints" / "base"
    staging, earlier = final.with_name(".base.staging"), final.with_name(".base.earlier")
    shutil.copytree(final, staging)
    update_sealed(staging, summary_of("base") | {"seed": 1})
    final.rename(earlier)
    folder.release()
    if whole != "both":
        damage(staging / "adapter_model.safetensors", "50")
    if whole == "neither":
        damage(earlier / "adapter_model.safetensors", "50")
    folder = RunFolder(tmp_path / "run", Config(), resume=True).start()
    if whole == "neither":
        with pytest.raises(UserError, match="base/adapter_model.safetensors has .* of its .* bytes"):
            folder.latest()
    else:
        assert folder.latest() == (final, summary_of("base") | ({"seed": 1} if whole == "both" else {}))
    assert names(folder) == {"base"}


def within(step: int) -> dict[str, Any]:
    return {"stage": "round1.grpo", "step": step}


def save_within(folder: RunFolder, policy: PeftModel, step: int) -> None:
    state = summary_of("base") | {"within": within(step)}
    folder.save_within("round1.grpo", step, lambda place: save_adapter(policy, place), state)


def names(folder: RunFolder) -> set[str]:
    return {item.name for item in (folder.path / "checkpoints").iterdir()}


def test_within_a_stage_the_last_two_are_kept_and_none_once_the_stage_is_done(
    tmp_path: Path, policy: PeftModel
) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    for step in (8, 9, 10, 11):  # by number, not by name
        save_within(folder, policy, step)
        latest = folder.latest()
        assert latest is not None and latest[1]["within"] == within(step)
    assert names(folder) == {"base", "round1.grpo.step-10", "round1.grpo.step-11"}
    folder.save_checkpoint("round1.grpo", policy, summary_of("base", "round1.grpo"))
    assert names(folder) == {"base", "round1.grpo"}


@pytest.mark.parametrize("save", ["within a stage", "a stage", "its evaluation"])
def test_a_save_that_reads_back_wrong_ends_in_a_line_and_takes_nothing_from_the_earlier_ones(
    tmp_path: Path, policy: PeftModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], save: str
) -> None:
    """As on a disk that says it has kept what it has not."""
    folder = RunFolder(tmp_path / "run", load_config(overrides=["checkpoint.keep_stages=1"]), resume=False).start()
    checkpoints, done = tmp_path / "run" / "checkpoints", summary_of("base", "round1.grpo")
    done["stages"][1]["em"] = 0.5  # the best, so that the base is to go
    folder.save_checkpoint("base", policy, summary_of("base"))
    for step in (4, 8):
        save_within(folder, policy, step)
    if save == "its evaluation":
        folder.save_checkpoint("round1.grpo", policy, summary_of("base") | {"unevaluated": {"name": "round1.grpo"}})

    def turning_a_bit(write: Callable[..., None], file: str) -> Callable[..., None]:
        def written(place: Path, *rest: Any) -> None:
            write(place, *rest)
            damage(place / file, "a byte")

        return written

    monkeypatch.setattr(checkpoint, "write_sealed", turning_a_bit(write_sealed, "adapter_model.safetensors"))
    monkeypatch.setattr(checkpoint, "update_sealed", turning_a_bit(update_sealed, SEAL))
    before, good = names(folder), folder.latest()
    assert good is not None
    with pytest.raises(UserError) as caught:
        if save == "within a stage":
            save_within(folder, policy, 12)
        elif save == "a stage":
            folder.save_checkpoint("round1.grpo", policy, done)
        else:
            folder.update_checkpoint("round1.grpo", done)
    message = str(caught.value)
    assert caught.value.exit_code == 1 and "\n" not in message and "the disk does not keep what it is given" in message
    assert names(folder) >= before
    expected = (checkpoints / "base", summary_of("base")) if save == "its evaluation" else good
    assert RunFolder(tmp_path / "run", folder._config, resume=True).latest() == expected
    assert f"going on from {expected[0].name}" in capsys.readouterr().err


@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
def test_nothing_comes_into_place_before_all_of_it_is_synced_and_its_seal_is_written_last(
    tmp_path: Path, policy: PeftModel, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """What a power cut leaves depends on it. Files are told apart by their inodes, which renaming does not change."""
    events: list[tuple[str, int]] = []
    synced, renamed, replace, removed, write_text = os.fsync, Path.rename, Path.replace, shutil.rmtree, Path.write_text

    def noting(what: str, act: Callable[..., Any], after: bool = False) -> Callable[..., Any]:
        def noted(place: Any, *rest: Any, **how: Any) -> Any:
            known = os.stat(place).st_ino if not after and os.path.exists(place) else None
            result = act(place, *rest, **how)
            known = os.stat(place).st_ino if after else known
            events.extend([(what, known)] if known is not None else [])
            return result

        return noted

    def write(place: Path) -> None:
        save_adapter(policy, place)
        (place / "start").mkdir()
        (place / "start" / "adapter_model.safetensors").write_bytes(b"as the stage began")

    final = tmp_path / "checkpoints" / "base"
    if replaced:
        write_sealed(final, write, summary_of("base"))
    earlier = final.stat().st_ino if replaced else None
    monkeypatch.setattr(os, "fsync", noting("synced", synced))
    monkeypatch.setattr(Path, "rename", noting("renamed", renamed))
    monkeypatch.setattr(Path, "replace", noting("renamed", replace))
    monkeypatch.setattr(shutil, "rmtree", noting("removed", removed))
    monkeypatch.setattr(Path, "write_text", noting("written", write_text, after=True))
    write_sealed(final, write, summary_of("base"))

    def place(what: str, path: Path) -> int:
        return events.index((what, path.stat().st_ino))

    seal, files = final / SEAL, [path for path in final.rglob("*") if path.is_file() and path.name != SEAL]
    folders = [final, final / "start"]
    assert len(files) >= 3
    assert max(place("synced", file) for file in files) < place("written", seal) < place("synced", seal)
    assert all(place("synced", seal) < place("synced", path) < place("renamed", final) for path in folders)
    kept = next(at for at, event in enumerate(events) if event == ("synced", final.parent.stat().st_ino))
    assert kept > place("renamed", final)
    if earlier is not None:
        assert events.index(("renamed", earlier)) < place("renamed", final)
        assert events.index(("removed", earlier)) > kept, "it is there until the other one is"

    events.clear()
    write_atomically(final.parent / "summary.json", "{}")
    summary = final.parent / "summary.json"
    assert [event for event in events if event[0] != "written"] == [
        ("synced", summary.stat().st_ino), ("renamed", summary.stat().st_ino), ("synced", summary.parent.stat().st_ino)
    ]  # fmt: skip


def test_a_new_runs_folder_is_synced_into_those_that_it_is_made_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda place: (synced.append(os.fstat(place).st_ino), original(place)))
    path = tmp_path / "runs" / "one"
    RunFolder(path, Config(), resume=False).start()
    assert {place.stat().st_ino for place in (tmp_path, tmp_path / "runs", path)} <= set(synced)


def test_of_the_stages_the_last_ones_and_the_best_are_kept(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", load_config(overrides=["checkpoint.keep_stages=2"]), resume=False).start()
    stages: list[dict[str, Any]] = []
    figures = {"base": 0.1, "round1.grpo": 0.9, "round1.ofsd": 0.3, "round2.grpo": 0.4, "round2.ofsd": 0.2}
    for name, em in figures.items():
        stages.append({"name": name, "em": em})
        folder.save_checkpoint(name, policy, {"stages": stages})
        folder.update_checkpoint(name, {"stages": stages})
    assert names(folder) == {"round1.grpo", "round2.grpo", "round2.ofsd"}


def test_of_two_equally_good_stages_the_one_that_a_run_goes_back_to_is_kept(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", load_config(overrides=["checkpoint.keep_stages=1"]), resume=False).start()
    stages: list[dict[str, Any]] = []
    for name, em in {"base": 0.5, "round1.grpo": 0.5, "round1.ofsd": 0.3}.items():
        stages.append({"name": name, "em": em})
        folder.save_checkpoint(name, policy, {"stages": stages})
        folder.update_checkpoint(name, {"stages": stages})
    assert names(folder) == {best_stage(stages), "round1.ofsd"} == {"round1.grpo", "round1.ofsd"}


def test_what_a_kill_left_from_within_a_stage_goes_when_the_stage_is_evaluated(
    tmp_path: Path, policy: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    save_within(folder, policy, 4)
    with monkeypatch.context() as killed:
        killed.setattr(RunFolder, "drop_within", lambda self, name: None)
        folder.save_checkpoint("round1.grpo", policy, summary_of("base"))
    folder.update_checkpoint("round1.grpo", summary_of("base", "round1.grpo"))
    assert names(folder) == {"round1.grpo"}


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "a byte":
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) * int(how) // 100])


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"stages": None}, "stages"),
        ({"stages": ["base"]}, "stages[0]"),
        ({"stages": [{"name": "base"}]}, "stages[0]"),
        ({"stages": [{"name": "../../elsewhere", "em": 0.5}]}, "stages[0]"),
        ({"stages": [{"name": "base", "em": 0.5, "seconds": "long"}]}, "stages[0]"),
        ({"metrics_size": None}, "metrics_size"),
        ({"metrics_size": -1}, "metrics_size"),
        ({"unevaluated": {}}, "unevaluated"),
        ({"within": 4}, "within.stage"),
        ({"within": {"stage": "round1.grpo"}}, "within.step"),
        ({"within": {"stage": "round1.grpo", "step": 4, "figures": []}}, "within.figures"),
        ({"within": {"stage": "round1.grpo", "step": 4, "parts": {"guard": 3}}}, "within.parts"),
        ({"within": {"stage": "round1.grpo", "step": 4, "sizes": {"../base": 0}}}, "within.sizes"),
    ],
)
def test_a_sealed_checkpoint_of_another_form_is_named_and_the_one_before_it_serves(
    tmp_path: Path, policy: PeftModel, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], wrong: str
) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    save_within(folder, policy, 4)
    update_sealed(folder.path / "checkpoints" / "round1.grpo.step-4", summary_of("base") | changed)
    assert folder.latest() == (folder.path / "checkpoints" / "base", summary_of("base"))
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"step-4/state.json does not fit this version ({wrong} is" in told
    assert "going on from base" in told


@pytest.mark.parametrize(
    "seal",
    [
        [],
        7,
        {"state": [], "files": {}},
        {"state": {}, "files": 3},
        {"state": {}, "files": {"adapter_model.safetensors": 3}},
        {"state": {}, "files": {"/dev/zero": {"bytes": 1, "sha256": ""}}},
        {"state": {}, "files": {"../base/state.json": {"bytes": 1, "sha256": ""}}},
    ],
    ids=str,
)
def test_a_seal_of_another_form_counts_as_damaged(
    tmp_path: Path, policy: PeftModel, capsys: pytest.CaptureFixture[str], seal: Any
) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    file = folder.path / "checkpoints" / "round1.grpo" / "state.json"
    file.parent.mkdir()
    checksum = hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(seal | {"sha256": checksum} if isinstance(seal, dict) else seal))
    assert folder.latest() == (folder.path / "checkpoints" / "base", summary_of("base"))
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(file) in told and "going on from base" in told


def test_lines_that_were_lost_are_told_and_none_is_added_to_half_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    file, name = tmp_path / "run" / "trajectories" / "round1.grpo.rollouts.jsonl", "round1.grpo.rollouts"
    for step in (1, 2, 3):
        folder.log({"step": step})
        folder.add_trajectories(name, [{"step": step}])
    sizes = folder.metrics_size(), folder.trajectories_size(name)
    folder.rewind(sizes[0])
    folder.rewind_trajectories(name, sizes[1])
    assert capsys.readouterr().err == "", "nothing is missing"
    for path in (tmp_path / "run" / "metrics.jsonl", file):
        path.write_bytes(path.read_bytes()[:-3])
    folder.rewind(sizes[0])
    folder.rewind_trajectories(name, sizes[1])
    folder.log({"step": 4})
    folder.add_trajectories(name, [{"step": 4}])
    told = capsys.readouterr().err.splitlines()
    assert [f"{path} has lost 3 of {size} bytes" in line for path, size, line in zip(
        (tmp_path / "run" / "metrics.jsonl", file), sizes, told, strict=True
    )] == [True, True]  # fmt: skip
    for path in (tmp_path / "run" / "metrics.jsonl", file):
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4]
    file.unlink()
    folder.rewind_trajectories(name, 10)
    assert "has lost 10 of 10 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(("resume", "message"), [(False, "already holds a run"), (True, "holds a run with other")])
def test_a_run_that_came_and_went_since_the_folder_was_looked_at_is_not_overwritten(
    tmp_path: Path, resume: bool, message: str
) -> None:
    late = RunFolder(tmp_path / "run", Config(), resume=resume)
    first = RunFolder(tmp_path / "run", load_config(overrides=["seed=5"]), resume=False).start()
    first.log({"step": 1})
    first.release()
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        late.start()
    assert {name: kept for name, kept in tree(tmp_path / "run").items() if name != ".lock"} == {
        name: kept for name, kept in before.items() if name != ".lock"
    }
    late.release()
    RunFolder(tmp_path / "run", load_config(overrides=["seed=5"]), resume=True).start()


def test_what_two_runs_share_stays_as_it_is_when_one_of_them_goes_back(tmp_path: Path) -> None:
    for lines, size in ((2, 0), (2, 14), (1, 14)):  # all of it, some of it, nothing to cut before more is added
        place = tmp_path / f"{lines}-{size}"
        (place / "shared").mkdir(parents=True)
        folder = RunFolder(place / "run", Config(), False, place / "shared").start()
        folder.keep_answers("base.evaluation", "key", [{"answer": 1}] * lines, 1.0)
        assert (place / "shared" / "key.jsonl").stat().st_nlink == 2
        before = (place / "shared" / "key.jsonl").read_bytes()
        folder.rewind_trajectories("base.evaluation", size)
        folder.add_trajectories("base.evaluation", [{"answer": 2}])
        assert (place / "shared" / "key.jsonl").read_bytes() == before
        kept = (place / "run" / "trajectories" / "base.evaluation.jsonl").read_bytes()
        assert kept == before[:size] + b'{"answer": 2}\n'


def test_a_second_process_is_kept_from_a_run_that_is_at_work(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run", Config(), resume=False).start()
    for refused in (RunFolder.claim, RunFolder.start):
        with pytest.raises(UserError, match="another process is at the run"):
            refused(RunFolder(tmp_path / "run", Config(), resume=True))
    first.release()
    RunFolder(tmp_path / "run", Config(), resume=True).start()


def test_a_save_that_fails_half_way_leaves_the_earlier_checkpoint_as_it_was(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    before = tree(tmp_path / "run" / "checkpoints" / "base")
    with pytest.raises(TypeError):
        folder.save_checkpoint("base", policy, {"stages": [object()]})  # the adapter is written, the summary cannot be
    assert tree(tmp_path / "run" / "checkpoints" / "base") == before
    assert names(folder) == {"base"}, "its room is given back"
    assert folder.latest() == (tmp_path / "run" / "checkpoints" / "base", summary_of("base"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atomically(tmp_path / "summary.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "summary.json", "new \ud800")
    assert (tmp_path / "summary.json").read_text() == "old"
    write_atomically(tmp_path / "summary.json", "new")
    assert {item.name: item.read_text() for item in tmp_path.iterdir()} == {"summary.json": "new"}


def test_summary_and_trajectories_are_written_as_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_summary(summary_of("base"))
    folder.save_trajectories("base.evaluation", [{"answer": "Où?"}, {"answer": None}])
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary_of("base")
    lines = (tmp_path / "run" / "trajectories" / "base.evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"answer": "Où?"}, {"answer": None}]


def test_answers_kept_in_parts_are_found_as_far_as_they_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    assert folder.begun_answers("base.evaluation", "one") == ([], 0.0)
    folder.add_answers("base.evaluation", "one", ANSWERS, 1.0)
    part = tmp_path / "run" / "trajectories" / "base.evaluation.part"
    with part.open("a") as file:
        file.write('{"answer": "cut')  # by a process that died over it
    folder.add_answers("base.evaluation", "one", ANSWERS[:1], 2.5)
    assert folder.begun_answers("base.evaluation", "one") == ([*ANSWERS, ANSWERS[0]], 2.5)
    assert folder.begun_answers("base.evaluation", "two") == ([], 0.0)
    part.write_bytes(part.read_bytes()[:-1])
    assert folder.begun_answers("base.evaluation", "one") == ([], 0.0), "some of it is lost"
    folder.keep_answers("base.evaluation", "one", ANSWERS, 3.0)
    assert not part.exists()


def test_answers_cut_off_after_they_were_kept_are_not_taken_for_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.keep_answers("base.evaluation", "one", ANSWERS, 1.0)
    file = tmp_path / "run" / "trajectories" / "base.evaluation.jsonl"
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    assert folder.kept_answers("base.evaluation", "one") is None


@pytest.mark.parametrize("whole", [True, False])
def test_answers_with_one_bit_turned_are_told_and_not_taken(
    whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    (folder.keep_answers if whole else folder.add_answers)("base.evaluation", "one", [{"ids": [12, 14]}], 1.0)
    file = tmp_path / "run" / "trajectories" / ("base.evaluation.jsonl" if whole else "base.evaluation.part")
    file.write_bytes(file.read_bytes().replace(b"14", b"15"))  # good JSON still
    if whole:
        assert folder.kept_answers("base.evaluation", "one") is None
    else:
        assert folder.begun_answers("base.evaluation", "one") == ([], 0.0)
    assert f"{file} has changed since it was written" in capsys.readouterr().err


ANSWERS = [{"answer": "Où?"}, {"answer": None}]


def test_answers_are_found_again_under_their_key_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    assert folder.kept_answers("base.evaluation", "one") is None
    folder.keep_answers("base.evaluation", "one", ANSWERS, 1.5)
    again = RunFolder(tmp_path / "run", Config(), resume=True)
    assert again.kept_answers("base.evaluation", "one") == (ANSWERS, 1.5)
    assert again.kept_answers("base.evaluation", "two") is None and again.kept_answers("base", "one") is None
    again.keep_answers("base.evaluation", "two", ANSWERS[:1], 0.5)
    assert again.kept_answers("base.evaluation", "two") == (ANSWERS[:1], 0.5)
    assert again.kept_answers("base.evaluation", "one") is None, "each file holds one set"


def test_answers_written_half_are_not_found(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.keep_answers("base.evaluation", "one", ANSWERS, 1.5)
    with pytest.raises(TypeError):
        folder.keep_answers("base.evaluation", "two", [{"answer": object()}], 1.5)
    assert (
        folder.kept_answers("base.evaluation", "two") is None and folder.kept_answers("base.evaluation", "one") is None
    )
    assert (tmp_path / "run" / "trajectories" / "base.evaluation.jsonl").is_file(), "the report still has the old ones"


def test_runs_share_answers_and_stay_whole_on_their_own(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    one, two = (RunFolder(tmp_path / name, Config(), False, shared).start() for name in ("one", "two"))
    one.keep_answers("base.evaluation", "key", ANSWERS, 1.5)
    two.keep_answers("base.evaluation", "other", ANSWERS[:1], 9.0)
    assert two.kept_answers("base.evaluation", "key") == (ANSWERS, 1.5)
    shutil.rmtree(tmp_path / "one")
    shutil.rmtree(shared)
    assert RunFolder(tmp_path / "two", Config(), True).kept_answers("base.evaluation", "key") == (ANSWERS, 1.5)


def test_a_run_adopts_anothers_stages_with_all_that_is_told_of_them(tmp_path: Path, policy: PeftModel) -> None:
    donor, taker = (RunFolder(tmp_path / name, Config(), resume=False).start() for name in ("donor", "taker"))
    saved = {}
    for stage in ("base", "round1.grpo", "round1.ofsd"):
        saved[stage] = move(policy)
        donor.log({"stage": stage})
        donor.save_trajectories(f"{stage}.evaluation", [{"stage": stage}])
        names = list(saved)
        donor.save_checkpoint(stage, policy, summary_of(*names) | {"metrics_size": donor.metrics_size()})
    taker.adopt(tmp_path / "donor", ["base", "round1.grpo"])
    latest = taker.latest()
    assert latest is not None and latest[0] == tmp_path / "taker" / "checkpoints" / "round1.grpo"
    assert [stage["name"] for stage in latest[1]["stages"]] == ["base", "round1.grpo"]
    load_adapter_weights(policy, latest[0])
    assert equal(weights(policy), saved["round1.grpo"])
    lines = (tmp_path / "taker" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["base", "round1.grpo"]
    found = {path.name for path in (tmp_path / "taker" / "trajectories").iterdir()}
    assert found == {"base.evaluation.jsonl", "round1.grpo.evaluation.jsonl"}
    taker.save_checkpoint("round1.ofsd", policy, summary_of(*saved) | {"metrics_size": taker.metrics_size()})
    before = tree(tmp_path / "taker")
    taker.adopt(tmp_path / "donor", ["base", "round1.grpo", "round1.ofsd", "round2.grpo"])
    assert tree(tmp_path / "taker") == before, "it has begun by now"


def test_a_run_adopts_what_a_donor_that_keeps_few_stages_still_has(
    tmp_path: Path, policy: PeftModel, capsys: pytest.CaptureFixture[str]
) -> None:
    donor, taker = (RunFolder(tmp_path / name, Config(), resume=False).start() for name in ("donor", "taker"))
    saved = []
    for stage in ("base", "round1.grpo", "round1.ofsd"):
        saved.append(stage)
        donor.log({"stage": stage})
        donor.save_checkpoint(stage, policy, summary_of(*saved) | {"metrics_size": donor.metrics_size()})
    shutil.rmtree(tmp_path / "donor" / "checkpoints" / "round1.ofsd")
    taker.adopt(tmp_path / "donor", saved)
    assert names(taker) == {"base", "round1.grpo"} and taker.is_whole("round1.grpo")
    assert capsys.readouterr().err == "", "nothing is damaged"


def test_a_run_killed_while_it_adopts_lacks_no_stage_before_the_one_that_it_goes_on_from(
    tmp_path: Path, policy: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor, taker = (RunFolder(tmp_path / name, Config(), resume=False).start() for name in ("donor", "taker"))
    saved = []
    for stage in ("base", "round1.grpo", "round1.ofsd"):
        saved.append(stage)
        donor.log({"stage": stage})
        donor.save_checkpoint(stage, policy, summary_of(*saved) | {"metrics_size": donor.metrics_size()})
    copied = []

    def dies(source: Path, to: Path) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(original(source, to))

    original = shutil.copytree
    monkeypatch.setattr(shutil, "copytree", dies)
    with pytest.raises(KeyboardInterrupt):
        taker.adopt(tmp_path / "donor", saved)
    latest = taker.latest()
    assert latest is not None
    assert names(taker) >= {stage["name"] for stage in latest[1]["stages"]}
    monkeypatch.undo()
    taker.start().adopt(tmp_path / "donor", saved)
    assert names(taker) == set(saved), "the rest is not trained again"
    assert (tmp_path / "taker" / "metrics.jsonl").read_bytes() == (tmp_path / "donor" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("begun", ["a stage of its own", "steps of a stage"])
def test_a_run_that_has_begun_itself_adopts_nothing(tmp_path: Path, policy: PeftModel, begun: str) -> None:
    donor, taker = (RunFolder(tmp_path / name, Config(), resume=False).start() for name in ("donor", "taker"))
    for stages in (["base"], ["base", "round1.grpo"]):
        donor.log({"stage": stages[-1], "seconds": 2})
        donor.save_checkpoint(stages[-1], policy, summary_of(*stages) | {"metrics_size": donor.metrics_size()})
    if begun == "steps of a stage":
        taker.adopt(tmp_path / "donor", ["base"])
        within = {"stage": "round1.grpo", "step": 1}
        state = summary_of("base") | {"metrics_size": taker.metrics_size(), "within": within}
        taker.save_within("round1.grpo", 1, lambda folder: save_adapter(policy, folder), state)
    else:
        taker.log({"stage": "base", "seconds": 22})
        taker.save_checkpoint("base", policy, summary_of("base") | {"metrics_size": taker.metrics_size()})
    before = tree(tmp_path / "taker")
    taker.adopt(tmp_path / "donor", ["base", "round1.grpo"])
    assert tree(tmp_path / "taker") == before


def test_a_folder_without_an_adapter_is_told_from_one_with(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    check_adapter_folder(tmp_path / "run" / "checkpoints" / "base")
    with pytest.raises(UserError, match="run holds no adapter, but a run; add /checkpoints/ and one of base$"):
        check_adapter_folder(tmp_path / "run")
    with pytest.raises(UserError, match="nowhere holds no adapter: there is no such folder"):
        check_adapter_folder(tmp_path / "nowhere")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "base")
    for missing in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "base"):
        with pytest.raises(UserError, match=f"{missing} holds no adapter"):
            check_adapter_folder(missing)


def test_a_damaged_checkpoint_is_not_taken_for_an_adapter(tmp_path: Path, policy: PeftModel) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    damage(tmp_path / "run" / "checkpoints" / "base" / "adapter_model.safetensors", "a byte")
    with pytest.raises(UserError, match="adapter_model.safetensors has changed since it was written"):
        check_adapter_folder(tmp_path / "run" / "checkpoints" / "base")
