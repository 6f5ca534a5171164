"""Each file of a checkpoint, damaged or replaced by a pickle: it is named, and the checkpoint before it serves."""

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from conftest import fresh_policy
from peft import PeftModel
from test_checkpoint import damage, summary_of, tree
from transformers import TrainingArguments

from searche1_lite.config import Config
from searche1_lite.policy.adapter import load_adapter_weights
from searche1_lite.runtime.errors import UserError
from searche1_lite.runtime.sealed_folder import read_sealed, write_sealed
from searche1_lite.train.run_folder import RunFolder
from searche1_lite.train.stage_checkpoint import ResumableTrainer, StageKeeper, saving_arguments, train
from searche1_lite.train.stage_trainer import StageTraining, StepReporter

STAGE_FILES = {"adapter_model.safetensors", "adapter_config.json", "state.json"}
STEP_FILES = STAGE_FILES | {
    "start/adapter_model.safetensors",
    "start/adapter_config.json",
    "optimizer.safetensors",
    "optimizer.json",
    "random.safetensors",
    "random.json",
    "scheduler.json",
    "trainer_state.json",
}
"""All files of a checkpoint of a stage, and of one within a stage."""


def trained_by(model: PeftModel, keeper: StageKeeper, place: Path) -> ResumableTrainer:
    """A trainer of three small steps."""
    reporter = StepReporter(lambda logs: {}, StageTraining(Config(), 1, place, lambda record: None, keeper=keeper))
    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=3,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        **saving_arguments(keeper),
    )
    ids = list(range(5, 13))
    return ResumableTrainer(
        model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 3, callbacks=[reporter]
    )


@pytest.fixture(scope="module")
def policy(tiny_policy_folder: Path) -> PeftModel:
    """A policy of this file's own, whose adapter the tests may change."""
    return fresh_policy(tiny_policy_folder)[0]


@pytest.fixture(scope="module")
def stopped(policy: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the midst of a stage, with checkpoints as training leaves them; to be copied."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    folder = RunFolder(path, Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    keeper = StageKeeper(folder, "round1.grpo", policy, every=1, state=summary_of("base"))
    train(trained_by(policy, keeper, path / "checkpoints"), keeper)
    folder.release()
    return path


def test_what_a_checkpoint_consists_of_is_known(stopped: Path) -> None:
    """Each of these files is damaged below."""
    kept = {"base": STAGE_FILES, "round1.grpo.step-1": STEP_FILES, "round1.grpo.step-2": STEP_FILES}
    found = {place: place.rglob("*") for place in (stopped / "checkpoints").iterdir()}
    assert {
        place.name: {str(file.relative_to(place)) for file in files if file.is_file()} for place, files in found.items()
    } == kept


@pytest.mark.parametrize("how", ["0", "50", "99", "a byte", "gone"])
@pytest.mark.parametrize("name", sorted(STEP_FILES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str
) -> None:
    checkpoints = Path(shutil.copytree(stopped, tmp_path / "run")) / "checkpoints"
    folder = RunFolder(tmp_path / "run", Config(), resume=True)
    latest = folder.latest()
    assert latest is not None and latest[1]["within"]["step"] == 2 and capsys.readouterr().err == ""
    damaged = checkpoints / "round1.grpo.step-2" / name
    damage(damaged, how)
    latest = folder.latest()
    assert latest is not None and latest[1]["within"]["step"] == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(damaged) in told and "going on from round1.grpo.step-1" in told

    damage(checkpoints / "round1.grpo.step-1" / name, how)
    assert folder.latest() == (checkpoints / "base", summary_of("base"))
    if name in STAGE_FILES:
        before = tree(folder.path)
        damage(checkpoints / "base" / name, how)
        with pytest.raises(UserError, match="no checkpoint in .* is whole"):
            folder.latest()
        assert before.keys() >= tree(folder.path).keys(), "nothing is thrown away or begun again"


class Payload:
    """What a pickle can do to whoever loads it."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("name", sorted(STEP_FILES - {"state.json"}))
def test_a_pickle_in_the_place_of_a_file_is_refused_though_its_checksum_is_sound(
    stopped: Path, policy: PeftModel, tmp_path: Path, name: str
) -> None:
    checkpoint = Path(shutil.copytree(stopped, tmp_path / "run")) / "checkpoints" / "round1.grpo.step-2"

    def put(place: Path) -> None:
        shutil.copytree(checkpoint, place, dirs_exist_ok=True, ignore=lambda *_: ["state.json"])
        (place / name).write_bytes(pickle.dumps(Payload(tmp_path / "trace")))

    write_sealed(checkpoint, put, read_sealed(checkpoint))
    folder = RunFolder(tmp_path / "run", Config(), resume=True).start()
    latest = folder.latest()
    assert latest is not None and latest[0] == checkpoint, "its checksums are sound"
    within = latest[1].pop("within")
    with pytest.raises(UserError) as caught:
        load_adapter_weights(policy, checkpoint / "start")
        keeper = StageKeeper(folder, "round1.grpo", policy, every=1, state=latest[1], resumed=(checkpoint, within))
        train(trained_by(policy, keeper, checkpoint.parent), keeper)
    assert str(checkpoint) in str(caught.value) and Path(name).name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert (tmp_path / "trace").exists(), "else this would show nothing"


def test_a_pickle_in_the_place_of_the_state_is_named_and_the_checkpoint_before_it_serves(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(stopped, tmp_path / "run")) / "checkpoints" / "round1.grpo.step-2"
    (checkpoint / "state.json").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    latest = RunFolder(tmp_path / "run", Config(), resume=True).latest()
    assert latest is not None and latest[0].name == "round1.grpo.step-1"
    assert str(checkpoint / "state.json") in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


def draw() -> list[float]:
    """From each generator, twice in a way that puts a value by for the next time."""
    return [
        float(torch.rand(())),
        float(torch.randn((), dtype=torch.float64)),
        numpy.random.random(),  # noqa: NPY002 - the state others draw from
        numpy.random.standard_normal(),  # noqa: NPY002
        random.random(),
        random.gauss(),
    ]


def test_what_is_drawn_after_a_checkpoint_is_drawn_again_once_it_is_loaded(policy: PeftModel, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", Config(), resume=False).start()
    keeper = StageKeeper(folder, "round1.grpo", policy, every=0, state=summary_of("base"))
    trainer = trained_by(policy, keeper, tmp_path)
    trainer.create_optimizer_and_scheduler(num_training_steps=3)
    draw()
    keeper.note(0)
    drawn = [draw(), draw()]
    keeper.save(trainer)
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(12345)
    others = [draw(), draw()]
    trainer._load_rng_state(str(folder.path / "checkpoints" / "round1.grpo.step-0"))
    again = [draw(), draw()]
    assert again == drawn
    assert all(a != b for a, b in zip(others[0], drawn[0], strict=True)), "else this would show nothing"
