"""What a worker takes over from the control process's snapshot."""

from dataclasses import replace

from hpc_router.router.replicas.snapshot import apply_snapshot, snapshot_of
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
