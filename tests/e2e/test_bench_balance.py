"""`hpc-router bench balance` with real engines and routers: every request is answered, and no process is left.

No assertion on speed: the machine may run other work at the same time.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.bench.load.native.build import compiler
from tests.support.needs import ROOT, need
from tests.support.processes import with_word
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.e2e

TINY = ["--replicas", "2", "--seconds", "3", "--warmup", "0.5", "--slowdown", "1", "--loads", "mooncake,shared"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in which nothing but the results is left afterwards."""
    need(compiler() is not None, "a C compiler (gcc)")
    with tempfile.TemporaryDirectory(prefix="bb-") as folder:
        yield Path(folder)
        eventually_sync(lambda: not with_word(folder), within_s=10)  # a killed process goes a moment later
        assert sorted(path.name for path in Path(folder).iterdir()) == ["out", "trace.jsonl"]


def test_policies_side_by_side(place: Path) -> None:
    rows = [
        {"timestamp": 600 * n, "input_length": 1024, "output_length": 64, "hash_ids": [n % 4, 10 + n % 4]}
        for n in range(60)
    ]
    (place / "trace.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    argv = [
        *(sys.executable, "-m", "hpc_router.cli", "bench", "balance", *TINY, "--out", str(place / "out"), "--json"),
        *("--trace", str(place / "trace.jsonl"), "--only", "prefix,power_of_two,smg", "--peers", str(place / "none")),
    ]
    environment = os.environ | {"TMPDIR": str(place), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [one["name"] for one in found["policies"]] == ["prefix", "power_of_two"]
    assert found["absent"].keys() == {"smg"}
    for one in found["policies"]:
        figures = one["figures"]
        assert figures["failed"] == 0, figures["errors"]
        assert figures["classes"].keys() == {"mooncake", "shared"}
        assert 0 < one["hit_tokens"] <= found["upper_bound_tokens"]
        assert 0.5 <= one["jain"] <= 1
    assert {path.suffix for path in (place / "out").iterdir()} == {".json", ".md", ".html"}
