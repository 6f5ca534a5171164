"""Stops a run at random moments, by SIGTERM and Ctrl-C in turn, and resumes it each time.

    python tests/soak/stop.py [--stops 20] [--seed 0]

The run is `searche1-lite train --preset demo`, whole. Told are the seconds from each signal to the process's end. Each
end must say how to go on, and in the end the adapters, figures and trajectories must be those of a run that nobody
touched, bit for bit, times left out. Each life is forked from a process that has the libraries loaded. Signals come
once the model is loaded: before that, there is nothing to keep.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill import ended
from test_resume import results

from searche1_lite.cli import main as cli

GOES_ON = "interrupted; finished work is kept, continue with --resume"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def live(path: Path, said: Path) -> int:
    """A process that goes on with the run, and writes what it says to `said`; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["searche1-lite", "train", "--preset", "demo", "--out", str(path), "--resume"]
        cli.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def listens(child: int) -> bool:
    """Is the run at work: does it catch SIGTERM?"""
    caught = Path(f"/proc/{child}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def wait(child: int, seconds: float) -> int | None:
    """Until the child has been at work for so long; its exit status, if it ended before."""
    until = None
    while (status := ended(child)) is None and (until is None or time.monotonic() < until):
        if until is None and listens(child):
            until = time.monotonic() + seconds
        time.sleep(0.0005)
    return status


def stop(child: int, signum: signal.Signals) -> tuple[float, int]:
    """Seconds from the signal to the child's end, and its exit status."""
    began = time.monotonic()
    os.kill(child, signum)
    while (status := ended(child)) is None:
        time.sleep(0.0005)
    return time.monotonic() - began, status


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    rng = random.Random(words.seed)
    taken: list[float] = []
    runs = 0
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        child = live(Path(folder) / "whole", said)
        assert wait(child, 0.0) is None, said.read_text()
        began = time.monotonic()
        status = wait(child, float("inf"))
        assert status == 0, said.read_text()
        length = time.monotonic() - began
        print(f"the run that nobody touched took {length:.0f} s", flush=True)
        whole = results(Path(folder) / "whole")
        while len(taken) < words.stops:
            runs += 1
            path = Path(folder) / f"run{runs}"
            moments = sorted(rng.uniform(0.0, length) for _ in range(words.stops - len(taken)))
            waits = [moment - before for before, moment in zip([0.0, *moments], moments, strict=False)]
            for seconds in [*waits, float("inf")]:
                child = live(path, said)
                if (status := wait(child, seconds)) is not None or not listens(child):
                    status = wait(child, float("inf")) if status is None else status
                    break
                signum = SIGNALS[len(taken) % 2]
                spent, status = stop(child, signum)
                assert status == 128 + signum and GOES_ON in said.read_text(), (status, said.read_text()[-2000:])
                taken.append(spent)
                print(f"stop {len(taken)}, {signum.name}: ended after {spent:.2f} s", flush=True)
            assert status == 0, f"a resumed run failed: {said.read_text()[-2000:]}"
            assert results(path) == whole, f"{path} came to another end"
            print(f"run {runs} came to the same end, bit for bit", flush=True)
    print(
        f"{len(taken)} stops over {runs} runs: nothing lost, each said how to go on; from signal to end at most "
        f"{max(taken):.2f} s, median {statistics.median(taken):.2f} s"
    )


if __name__ == "__main__":
    main()
