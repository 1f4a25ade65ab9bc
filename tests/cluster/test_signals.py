"""Handlers act within their block only, and the earlier ones are restored."""

import os
import signal

import pytest

from hpc_router.cluster.signals import Interrupted, explaining_interrupt, interrupt_event, sigterm_as_interrupt

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("again", STOP_SIGNALS)
def test_the_first_signal_sets_the_event_and_the_second_interrupts(
    number: signal.Signals, again: signal.Signals
) -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    with interrupt_event() as event:
        assert not event.is_set()
        signal.raise_signal(number)
        assert event.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(again)
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


def test_an_interrupt_is_explained_and_a_further_one_waits_for_the_text() -> None:
    def text() -> str:
        signal.raise_signal(signal.SIGINT)
        return "a-0.g1 may still run"

    with pytest.raises(Interrupted, match=r"^a-0\.g1 may still run$"), explaining_interrupt(text):
        signal.raise_signal(signal.SIGINT)


def test_without_once_further_signals_do_not_interrupt() -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    with interrupt_event(once=False) as event:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert event.is_set()
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


def test_sigterm_raises_keyboard_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
