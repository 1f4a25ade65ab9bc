"""What a worker takes over from the control process's snapshot."""

import math
from dataclasses import replace

from hpc_router.router.replicas.snapshot import apply_snapshot, snapshot_of
from hpc_router.state.registry import EngineInfo
from tests.router.support import replica, table_of


def test_a_new_key_of_a_replica_ends_what_was_kept_with_the_old_one() -> None:
    """The start of a request to it contains the key."""
    known = table_of(replica("math-0.g1"))
    (one,) = known.all()
    one.request_starts["/v1/chat/completions"] = b"POST ..."
    (same,) = snapshot_of(known)
    apply_snapshot(known, [same])
    assert one.request_starts
    apply_snapshot(known, [replace(same, key="another")])
    assert (one.key, one.request_starts) == ("another", {})


def test_the_shortest_context_is_that_of_the_present_replicas() -> None:
    known = table_of(replica("math-0.g1"), replica("law-0.g1"))
    assert known.shortest_context() == math.inf, "none is known"
    math_now, law_now = snapshot_of(known)
    apply_snapshot(known, [math_now, replace(law_now, listed_max_model_len=8192)])
    assert known.shortest_context() == 8192
    renewed = replace(math_now, record=replace(math_now.record, engine=EngineInfo(kind="vllm", max_model_len=4096)))
    apply_snapshot(known, [renewed, replace(law_now, listed_max_model_len=8192)])
    assert known.shortest_context() == 4096
    apply_snapshot(known, [replace(law_now, listed_max_model_len=8192)])
    assert known.shortest_context() == 8192
