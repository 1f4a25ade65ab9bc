"""Python's garbage collector in processes that run for long.

In those that relay, a request makes a hundred small objects and hardly a cycle among them. With the collector's own
thresholds the young generation would be searched for every few requests, and everything that is loaded now and then,
for tens of milliseconds in which no stream moves.
"""

import gc
from typing import Final

YOUNG: Final = 20_000
"""Objects more than there were after the last search, before the young ones are searched again."""


def settle() -> None:
    """What is loaded is there to stay, and is not searched again: pages that are shared stay so."""
    gc.collect()
    gc.freeze()


def settle_to_relay() -> None:
    """As `settle`, and what comes after it is searched rarely."""
    settle()
    gc.set_threshold(YOUNG, 20, 50)
