"""What a process that relays does with memory."""

import subprocess
import sys

import pytest

BODIES = """
import resource
from hpc_router.relay import memory_tuning
{settle}
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def requests():
    bodies = [bytes(200_000) for _ in range(40)]
for _ in range(5):
    requests()
before = pages()
for _ in range(20):
    requests()
print(pages() - before)
"""


def taken(settle: str) -> int:
    """Pages that forty bodies of 200 KB at once, twenty times, took from the kernel."""
    words = [sys.executable, "-c", BODIES.format(settle=settle)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_long_bodies_take_the_memory_of_those_before() -> None:
    assert taken("") > 10_000, "or this shows nothing"
    assert taken("memory_tuning.tune_for_relay()") < 1000
