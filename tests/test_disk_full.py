"""A disk that fills up ends the work in a line, and what was kept before is whole: on a file system of 1 MiB."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from command import run_command
from conftest import fresh_policy
from peft import PeftModel
from test_checkpoint import summary_of

from searche1_lite.config import Config, load_config
from searche1_lite.train.run_folder import RunFolder

FULL = "no space left on the disk"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Leaves `leave` bytes on it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096) == 4096:
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - leave))
    return ballast


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return run_command(*words)


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one_and_gives_its_room_back(
    disk: Path, tiny_policy_folder: Path
) -> None:
    policy: PeftModel = fresh_policy(tiny_policy_folder)[0]
    folder = RunFolder(disk / "run", Config(), resume=False).start()
    folder.save_checkpoint("base", policy, summary_of("base"))
    size = sum(file.stat().st_size for file in (disk / "run" / "checkpoints" / "base").iterdir())
    ballast = fill(disk, size // 2)
    free = ballast.stat().st_size
    with pytest.raises(OSError) as caught:
        folder.save_checkpoint("round1.grpo", policy, summary_of("base", "round1.grpo"))
    assert caught.value.errno == 28
    ballast.unlink()
    assert fill(disk, size // 2).stat().st_size == free, "the half of it that was written is gone"
    assert folder.latest() == (disk / "run" / "checkpoints" / "base", summary_of("base"))


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_ends_in_a_line_and_goes_on_once_there_is_room(disk: Path) -> None:
    settings = [
        "rounds=1",
        "grpo.steps=2",
        "grpo.questions_per_step=4",
        "ofsd.enabled=false",
        "data.evaluation_limit=4",
    ]
    words = ["train", "--preset", "demo", "--out", str(disk / "run"), "--resume", *settings]
    ballast = fill(disk, 400_000)  # room for the base's checkpoint, not for the next one
    full = command(*words)
    assert full.returncode == 1 and full.stderr.splitlines()[-1].startswith(f"error: {FULL}"), full.stderr
    assert "--resume" in full.stderr and "Traceback" not in full.stderr
    before = RunFolder(disk / "run", load_config("demo", None, settings), resume=True).latest()
    assert before is not None and before[0].name == "base"
    ballast.unlink()
    assert command(*words).returncode == 0


def test_a_log_line_that_does_not_fit_is_not_half_there_when_the_run_goes_on(disk: Path) -> None:
    folder = RunFolder(disk / "run", Config(), resume=False).start()
    folder.log({"step": 1})
    size = folder.metrics_size()
    fill(disk, 0)
    with pytest.raises(OSError, match="No space left"):
        for step in range(2, 1000):
            folder.log({"step": step, "text": "x" * 100})
    folder.rewind(size)
    assert (disk / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_an_index_whose_disk_fills_up_says_so_and_is_not_taken_for_whole(disk: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = (f"Port {number}\\nIts base is {number * 7}." for number in range(20000))
    corpus.write_text("".join(f'{{"id": "{index}", "contents": "{text}"}}\n' for index, text in enumerate(texts)))
    fill(disk, 200_000)
    full = command("index", str(corpus), "--out", str(disk / "index"))
    assert full.returncode == 1 and len(full.stderr.strip().splitlines()[-1]) < 300, full.stderr
    assert "make room and run it again" in full.stderr and "Traceback" not in full.stderr
    asked = command("ask", "Where?", "--preset", "demo", f"search.index={disk / 'index'}")
    assert asked.returncode == 2 and "no Lucene index" in asked.stderr
