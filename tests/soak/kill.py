"""Kills a run at random moments with SIGKILL, half of them while a checkpoint is being saved, and resumes it each time.

    python tests/soak/kill.py [--kills 50] [--seed 0]

The run is the demo's, made small, with a checkpoint after every step. In the end its adapters, figures and trajectories
must be those of a run that nobody touched, bit for bit, times left out. Each life of the run is forked from a process
that has the libraries loaded, so that 50 of them take minutes. A kill is told with what the run was at.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_resume import SETTINGS, results

from searche1_lite.config import Config, load_config
from searche1_lite.runtime.console import RichTasks
from searche1_lite.runtime.quiet import quieten
from searche1_lite.train.rounds import run_training
from searche1_lite.train.run_folder import RunFolder


def live(path: Path, config: Config, errors: Path) -> int:
    """A process that goes on with the run; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 2)
        run_training(config, RunFolder(path, config, resume=True), RichTasks(quiet=True))
        code = 0
    finally:
        os._exit(code)


def is_saving(path: Path) -> bool:
    return any((path / "checkpoints").glob(".*.staging"))


def ended(child: int) -> int | None:
    """The exit status, if it has ended."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    quieten()
    rng = random.Random(words.seed)
    config = load_config("demo", None, [*SETTINGS, "checkpoint.every_steps=1"])
    kills = in_saves = rounds = 0
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors.txt"
        began = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(live(Path(folder) / "whole", config, errors), 0)[1]) == 0
        seconds = time.monotonic() - began
        whole = results(Path(folder) / "whole")
        while kills < words.kills:
            rounds += 1
            path = Path(folder) / f"run{rounds}"
            while True:
                child = live(path, config, errors)
                in_save = kills % 2 == 0 and kills < words.kills
                # Some lives end early, some after their run's end; those that wait for a save end within one.
                until = float("inf") if in_save else time.monotonic() + rng.uniform(0.2, 1.0) * seconds * 0.6
                skip = rng.randrange(6)  # saves to let pass
                was_saving = False
                status = None
                while (status := ended(child)) is None and kills < words.kills:
                    saving = is_saving(path)
                    if in_save and saving and not was_saving:
                        if skip == 0:
                            break
                        skip -= 1
                    was_saving = saving
                    if time.monotonic() >= until:
                        break
                    time.sleep(0.0005)
                if status is None and kills < words.kills:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    kills += 1
                    in_saves += is_saving(path)
                    there = sorted(item.name for item in path.glob("checkpoints/*")) if path.is_dir() else []
                    print(f"kill {kills}: {'in' if is_saving(path) else 'between'} saves; there: {there}", flush=True)
                    continue
                if status is None:
                    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                assert status == 0, f"a resumed run failed: {errors.read_text()[-2000:]}"
                break
            assert results(path) == whole, f"{path} came to another end"
            print(f"run {rounds} came to the same end, bit for bit", flush=True)
        told = errors.read_text()
        assert "checksum" not in told and "damaged" not in told, told
        assert in_saves >= 0.4 * kills, f"only {in_saves} of {kills} kills fell within a save"
    print(f"{kills} kills, {in_saves} within a save, over {rounds} runs: nothing lost")


if __name__ == "__main__":
    main()
