"""The body is decoded without being changed, and only the model's bytes are ever replaced."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.errors import BadRequestError
from hpc_router.router.worker.request_body import (
    MAX_COLONS,
    MAX_COMMAS,
    MAX_CONTAINERS,
    MAX_DIGITS,
    check_values,
    decode,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(st.text(), values, max_size=6)


@pytest.mark.parametrize(
    ("item", "most"),
    [(b"[],", MAX_CONTAINERS), (b"{},", MAX_CONTAINERS), (b"1,", MAX_COMMAS), (b'"a":1,', MAX_COLONS)],
)
def test_a_body_of_very_many_values_is_refused_before_it_is_decoded(item: bytes, most: int) -> None:
    """10 million lists in 30 MB take seconds, in which no other thread runs, and 1 GB of memory."""
    check_values(item * most)
    with pytest.raises(BadRequestError, match="too many"):
        check_values(item * (most + 1))


def test_a_whole_number_of_very_many_digits_is_refused() -> None:
    """7,000 of 4,000 digits each take a second, in which no other thread runs."""
    longest = b'{"model": "a", "n": 1%b}' % (b"0" * (MAX_DIGITS - 1))
    assert decode(longest).fields["n"] == 10 ** (MAX_DIGITS - 1)
    with pytest.raises(BadRequestError, match="a number of more than 400 digits"):
        decode(longest.replace(b"}", b"0}"))


@given(bodies, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_decodes_what_json_decodes(body: dict[str, Any], ascii_only: bool, indent: Any) -> None:
    raw = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    call = decode(raw)
    assert call.fields == json.loads(raw)
    assert call.raw is raw


@given(bodies, st.text(min_size=1), st.text(), st.sampled_from([None, 2]))
def test_only_the_model_value_is_replaced(body: dict[str, Any], old: str, new: str, indent: Any) -> None:
    """Cutting the model's bytes out of both bodies leaves the same bytes."""
    raw = json.dumps({**body, "model": old}, indent=indent).encode()
    replaced = decode(raw).body(new)
    assert json.loads(replaced) == {**body, "model": new}
    before, after = decode(raw), decode(replaced)
    assert before.raw[: before.model_span[0]] == after.raw[: after.model_span[0]]
    assert before.raw[before.model_span[1] :] == after.raw[after.model_span[1] :]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "does not start"),
        (b"[]", "does not start"),
        (b"{", "ends too early"),
        (b'{"a"', "ends too early"),
        (b'{"a":', "Expecting value"),
        (b'{"a": 1', "ends too early"),
        (b'{"a": 1,}', "expected"),
        (b'{"a" 1}', "expected"),
        (b'{"a": 1} x', "data after its end"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b"\xef\xbb\xbf", "does not start"),
        (b" \xef\xbb\xbf{}", "does not start"),
        (b'{"a": "\xed\xa0"}', "UTF-8"),
        ('{"a": 1'.encode("utf-16"), "ends too early"),
        ('{"a": 1}'.encode("utf-16") + b"\0", "UTF-16-LE"),
        ('{"a": 1}'.encode("utf-32-be")[:-1], "UTF-32-BE"),
    ],
)
def test_what_is_no_object_is_refused_in_words(raw: bytes, says: str) -> None:
    with pytest.raises(BadRequestError, match=says):
        decode(raw)


@given(bodies, st.text(min_size=1), st.text())
def test_what_only_the_walk_reads_is_no_different(body: dict[str, Any], old: str, new: str) -> None:
    """A number that is none of JSON's is left for the engine to judge."""
    raw = json.dumps({**body, "model": old, "temperature": math.nan}).encode()
    assert decode(raw).model == old
    replaced = json.loads(decode(raw).body(new))
    assert math.isnan(replaced.pop("temperature"))
    assert replaced == {key: value for key, value in {**body, "model": new}.items() if key != "temperature"}


@pytest.mark.parametrize("rest", [b'{"model":"math"}', b' {"a": 1, "model": "math"}', b'{"mode\\u006c":"math"}'])
def test_a_byte_order_mark_is_passed_on(rest: bytes) -> None:
    """As vLLM and `transformers serve` read it, whose `json.loads` skips it."""
    raw = b"\xef\xbb\xbf" + rest
    call = decode(raw)
    assert (call.model, call.raw) == ("math", raw)
    assert call.body("theirs") == raw.replace(b'"math"', b'"theirs"')


ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig")


@pytest.mark.parametrize("encoding", ["utf-8", *ENCODINGS])
@pytest.mark.parametrize("stated", ['"priority": 7, ', ""])
def test_the_priority_is_written_in_the_body_s_encoding(encoding: str, stated: str) -> None:
    call = decode(f'{{{stated}"model": "m", "é": "}}"}}'.encode(encoding))
    assert json.loads(call.with_priority(1).raw) == {"model": "m", "é": "}", "priority": 1}


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16 with a mark, big endian"])
@given(body=bodies, ascii_only=st.booleans())
def test_a_body_in_another_encoding_of_unicode_is_read_as_json_reads_it(
    encoding: str, body: dict[str, Any], ascii_only: bool
) -> None:
    """As vLLM reads it. The name of the model is replaced in the same encoding."""
    text = json.dumps({**body, "model": "math"}, ensure_ascii=ascii_only)
    odd = encoding not in ENCODINGS
    raw = ("\ufeff" + text).encode("utf-16-be", "replace") if odd else text.encode(encoding, "replace")
    call = decode(raw)
    assert (call.fields, call.raw) == (json.loads(raw), raw)
    assert json.loads(call.body("their é")) == json.loads(raw) | {"model": "their é"}


def test_half_of_a_surrogate_pair_is_read_as_json_reads_it() -> None:
    raw = b'{"prompt": "\xed\xa0\x80", "model": "math"}'
    assert decode(raw).fields == json.loads(raw)
    assert decode(raw).body("theirs") == raw.replace(b"math", b"theirs")


def test_a_model_that_is_named_elsewhere_as_well() -> None:
    """In a nested object, in the prompt, or with its key in disguise."""
    for raw in (
        b'{"metadata":{"model":"math"},"model":"math"}',
        b'{"metadata":{"model":"math"},"mode\\u006c":"math"}',
        b'{"prompt":"{\\"model\\":\\"math\\"}","model" : "math"}',
        b'{"mode\\u006c":"math","a\\"model":"math"}',
        b'{"mode\\u006c":"math","a":[{"model":"math"}]}',
        b'{"a":[{"model":"math","b":{}}],"mode\\u006c":"math"}',
        b' { "model":"math","a":{"mode\\u006c":"math"}}',
    ):
        call = decode(raw)
        assert call.model == "math"
        assert json.loads(call.body("theirs")) == json.loads(raw) | {"model": "theirs"}


@pytest.mark.parametrize("raw", [b"{}", b'{"model": null}', b'{"model": 3}', b'{"model": ""}'])
def test_a_missing_or_odd_model_is_a_bad_request(raw: bytes) -> None:
    call = decode(raw)
    with pytest.raises(BadRequestError, match="'model'"):
        _ = call.model
