"""Ctrl-C, SIGTERM and a closed terminal: noted at once, obeyed at the next point where nothing is lost."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_TOGETHER = 1.0
"""Seconds in which further signals are taken for the first one: a terminal that is closed often sends SIGHUP twice (the
shell's and the kernel's), and `timeout` sends SIGTERM to the process and to its group."""


class Interrupted(KeyboardInterrupt):
    """Someone wants the work to end. What was done is kept.

    Args:
        signum: the signal that said so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)  # as it is given here: a sweep's worker sends it to the sweep
        self.signum = signum

    def __str__(self) -> str:
        return signal.Signals(self.signum).name

    @property
    def exit_code(self) -> int:
        """As shells give it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class Stop:
    """Whether someone wants the work to end; long work asks with `check`, at least every few seconds."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._noted = 0.0

    def check(self) -> None:
        """Raises Interrupted if so."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, signals are noted here; a later one ends the work where it stands, as KeyboardInterrupt.

        Signals that the process ignores (`nohup`, a sweep's workers) stay ignored. Only the main thread can listen;
        in any other one this does nothing.
        """
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    before[signum] = signal.signal(signum, self._note)
        try:
            yield
        finally:
            for noted, handler in before.items():
                signal.signal(noted, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._noted = signum, now
        elif now - self._noted >= _TOGETHER:
            raise KeyboardInterrupt
