from hpc_router.sim.request_log import RequestLog


def add(log: RequestLog, body: bytes) -> None:
    log.add(method="POST", path="/v1/x", http_version="1.1", headers=[(b"A", b"1"), (b"a", b"2")], body=body)


def test_memory_is_bounded_in_requests_and_in_bytes() -> None:
    log = RequestLog(max_requests=3, max_bytes=10)
    for body in (b"1", b"22", b"333", b"4444"):
        add(log, body)
    assert [entry.body for entry in log.last(9)] == [b"22", b"333", b"4444"]
    add(log, b"55555")
    assert [entry.body for entry in log.last(9)] == [b"4444", b"55555"]


def test_a_body_beyond_the_budget_keeps_its_length_and_hash_only() -> None:
    log = RequestLog(max_bytes=10)
    add(log, b"x" * 10)
    add(log, b"x" * 11)
    kept, dropped = log.last(2)
    assert kept.body == b"x" * 10
    assert (dropped.body, dropped.body_bytes) == (None, 11)
    assert dropped.to_json()["body_base64"] is None
    assert len(dropped.body_sha256) == 64


def test_headers_keep_order_case_and_repeats_and_clear_forgets() -> None:
    log = RequestLog()
    add(log, b"")
    assert log.last()[0].to_json()["headers"] == [["A", "1"], ["a", "2"]]
    assert log.last(0) == []
    log.clear()
    assert log.last() == []
