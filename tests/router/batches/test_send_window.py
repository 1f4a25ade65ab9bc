"""The number of requests in flight follows what the router takes."""

from hpc_router.router.batches.send_window import FIRST, HOLD_S, SendWindow


def test_it_doubles_until_the_first_refusal() -> None:
    window = SendWindow(64)
    for _ in range(FIRST):
        window.answered()
    assert window.size == 2 * FIRST
    for _ in range(1000):
        window.answered()
    assert window.size == 64


def test_a_refusal_halves_it_and_later_it_grows_by_one_per_round() -> None:
    window = SendWindow(64)
    for _ in range(1000):
        window.answered()
    window.refused(0.0)
    window.refused(HOLD_S / 2)
    assert window.size == 32
    for _ in range(33):
        window.answered()
    assert window.size == 33
    for n in range(20):
        window.refused(HOLD_S * (n + 1))
    assert window.size == 1


def test_it_does_not_exceed_its_maximum() -> None:
    assert SendWindow(2).size == 2
