"""Hop-by-hop headers stay on their hop, credentials with the router; nothing breaks out of its line."""

import pytest

from hpc_router.relay.headers import NOT_DOWNSTREAM, NOT_UPSTREAM, Headers, crossing, lines

IDENTITY = b"accept-encoding: identity\r\n"


def headers(*fields: tuple[bytes, bytes]) -> Headers:
    return Headers(list(fields))


def test_upstream_never_sees_credentials_nor_hop_headers() -> None:
    given = headers(
        (b"authorization", b"Bearer owner"), (b"cookie", b"c=1"), (b"x-api-key", b"k"), (b"x-mine", b"1"),
        (b"connection", b"keep-alive, X-Mine"), (b"transfer-encoding", b"chunked"), (b"host", b"router"),
        (b"x-session-id", b"s"), (b"content-type", b"application/json"), (b"content-length", b"3"),
        (b"expect", b"100-continue"), (b"accept-encoding", b"gzip"), (b"upgrade", b"h2c"), (b"te", b"trailers"),
    )  # fmt: skip
    assert crossing(given, drop=NOT_UPSTREAM) == IDENTITY + b"x-session-id: s\r\ncontent-type: application/json\r\n"


def test_responses_get_no_accept_encoding() -> None:
    """Also if `Connection` lists that field."""
    given = headers((b"connection", b"accept-encoding"), (b"accept-encoding", b"gzip"), (b"x-other", b"1"))
    assert crossing(given, drop=NOT_DOWNSTREAM) == b"x-other: 1\r\n"


def test_downstream_keeps_what_the_engine_says_of_its_answer() -> None:
    given = headers(
        (b"content-type", b"text/event-stream"), (b"retry-after", b"3"), (b"server", b"uvicorn"),
        (b"connection", b"close"), (b"x-other", b"1"), (b"set-cookie", b"a=1"), (b"date", b"today"),
    )  # fmt: skip
    expected = b"content-type: text/event-stream\r\nretry-after: 3\r\nx-other: 1\r\n"
    assert crossing(given, drop=NOT_DOWNSTREAM) == expected


@pytest.mark.parametrize(
    "options",
    [[b"x-mine"], [b"X-Mine"], [b"close,x-mine"], [b"close ,\tX-MINE\t"], [b"x-mine", b"close"], [b"close", b"x-mine"]],
)
def test_what_any_connection_header_names_stays_on_its_hop(options: list[bytes]) -> None:
    given = headers(*[(b"connection", option) for option in options], (b"x-mine", b"1"), (b"x-other", b"2"))
    assert crossing(given, drop=NOT_UPSTREAM) == IDENTITY + b"x-other: 2\r\n"


def test_repeated_fields_and_strange_bytes_cross_as_they_came() -> None:
    given = headers((b"x-a", b"1"), (b"x-b", b""), (b"x-a", b"\xff\xe4"))
    assert crossing(given, drop=NOT_UPSTREAM) == IDENTITY + b"x-a: 1\r\nx-b: \r\nx-a: \xff\xe4\r\n"
    assert given.text("x-a") == "\udcff\udce4"


def test_what_crosses_one_way_is_not_what_crosses_the_other() -> None:
    given = headers((b"server", b"x"), (b"cookie", b"y"))
    for _ in range(2):
        assert crossing(given, drop=NOT_UPSTREAM) == IDENTITY + b"server: x\r\n"
        assert crossing(given, drop=NOT_DOWNSTREAM) == b"cookie: y\r\n"


def test_a_field_is_found_by_its_name() -> None:
    given = headers((b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"content-type", b"Text/HTML ; charset=x"))
    assert given.get(b"a") == b"3"
    assert given.all(b"a") == [b"1", b"3"]
    assert given.get(b"c") is None
    assert given.get(b"c", b"d") == b"d"
    assert given.text("c") == ""
    assert b"b" in given
    assert b"c" not in given
    assert given.content_type == b"text/html"


@pytest.mark.parametrize(
    "fields", [{"x": "y\r\nz: 1"}, {"x": "y\n"}, {"x\r": "y"}, {"x": "y\0"}, {"x": "\ny\r"}, {"x\r\ny": "z"}]
)
def test_a_field_cannot_become_two(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        lines(fields)


@pytest.mark.parametrize(
    ("name", "value", "passed"),
    [
        ("retry-after", "7", "7"),
        ("retry-after", "59", "59"),
        ("retry-after", "60", "59"),
        ("retry-after", "0.5", "0.5"),
        ("retry-after", "3600", "59"),
        ("retry-after", "inf", "59"),
        ("retry-after", "nan", "59"),
        ("retry-after", "Wed, 21 Oct 2099 07:28:00 GMT", "59"),
        ("retry-after-ms", "59000", "59000"),
        ("retry-after-ms", "3600000", "59000"),
        ("x-retry-after", "3600", "3600"),
    ],
)
def test_nobody_is_told_to_sleep_for_a_minute(name: str, value: str, passed: str) -> None:
    """The AI SDK ignores a minute and more, and comes back after two seconds."""
    given = Headers([(b"a", b"b"), (name.encode(), value.encode())])
    assert crossing(given, drop=NOT_DOWNSTREAM) == f"a: b\r\n{name}: {passed}\r\n".encode()


def test_lines() -> None:
    assert lines({}) == b""
    assert lines({"a": "b", "c": "\udcffä"}) == b"a: b\r\nc: \xff\xc3\xa4\r\n"
