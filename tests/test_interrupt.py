"""Signals while a run is at work: what one says, and what several say."""

import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from searche1_lite.runtime import interrupt
from searche1_lite.runtime.interrupt import Interrupted, Stop


def test_a_signal_is_noted_and_obeyed_when_it_is_asked_for() -> None:
    stop = Stop()
    with stop.listening():
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM") as caught:
            stop.check()
    assert caught.value.exit_code == 143


@contextmanager
def hangup(handler: signal.Handlers) -> Iterator[None]:
    """SIGHUP handled so; `nohup` ignores it for the tests too."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("second", [signal.SIGHUP, signal.SIGTERM])
def test_two_signals_at_once_as_of_a_closed_terminal_are_one(second: signal.Signals) -> None:
    stop = Stop()
    with hangup(signal.SIG_DFL), stop.listening():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(second)
    assert stop.signum == signal.SIGHUP


def test_a_signal_that_the_process_ignores_stays_ignored() -> None:
    stop = Stop()
    with hangup(signal.SIG_IGN), stop.listening():
        signal.raise_signal(signal.SIGHUP)
    assert stop.signum is None


def test_a_later_signal_ends_the_work_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_TOGETHER", 0.0)
    stop = Stop()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)


def test_an_interruption_comes_whole_from_another_process() -> None:
    sent = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM)))
    assert (sent.signum, sent.exit_code, str(sent)) == (signal.SIGTERM, 143, "SIGTERM")
