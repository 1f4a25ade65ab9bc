"""Forms, however their bytes arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.errors import BadRequestError
from hpc_router.router.worker.form_data import MAX_HEAD_BYTES, MAX_PARTS, FormDataParser

TYPE = "multipart/form-data; boundary=XyZ"


def part(name: str, value: bytes, extra: str = "") -> bytes:
    return f'--XyZ\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + value + b"\r\n"


def parsed(body: bytes, step: int, *, content_type: str = TYPE) -> dict[str, tuple[str | None, bytes]]:
    parser, found = FormDataParser(content_type), dict[str, tuple[str | None, bytes]]()
    for at in range(0, len(body), step):
        for field, piece in parser.feed(body[at : at + step]):
            found[field.name] = field.filename, found.get(field.name, (None, b""))[1] + piece
    parser.finish()
    return found


FORM = (
    b"preamble\r\n" + part("purpose", b"batch") + part("empty", b"")
    + part("file", b"line 1\r\n--Xy\r\n\r\n--\r\nline 2", '; filename="in.jsonl"\r\nContent-Type: text/plain')
    + b"--XyZ--\r\nepilogue --XyZ\r\n"
)  # fmt: skip
FIELDS = {
    "purpose": (None, b"batch"),
    "empty": (None, b""),
    "file": ("in.jsonl", b"line 1\r\n--Xy\r\n\r\n--\r\nline 2"),
}


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 10_000])
def test_its_fields_are_found_in_pieces_of_any_length(step: int) -> None:
    assert parsed(FORM, step) == FIELDS


@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_content_arrives_unchanged(content: bytes, step: int) -> None:
    if b"\r\n--XyZ" not in b"\r\n" + content:
        assert parsed(part("file", content) + b"--XyZ--", step)["file"] == (None, content)


def test_the_last_piece_of_a_file_is_not_kept() -> None:
    parser = FormDataParser(TYPE)
    list(parser.feed(part("file", b"")[:-2]))
    pieces = [piece for _ in range(100) for _, piece in parser.feed(b"x" * 1000)]
    assert len(b"".join(pieces)) > 99_900


@pytest.mark.parametrize(
    "name", ["caf\u00e9.jsonl", 'with "quotes".jsonl'.replace('"', '\\"'), "semi;colon.jsonl"], ids=str
)
def test_names_of_files(name: str) -> None:
    body = part("file", b"x", f'; filename="{name}"') + b"--XyZ--"
    assert parsed(body, 5)["file"][0] == name.replace('\\"', '"')


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "multipart/form-data", "multipart/mixed; boundary=x", "", "multipart/form-data; boundary="],
)
def test_what_is_no_form(content_type: str) -> None:
    with pytest.raises(BadRequestError, match="multipart/form-data"):
        FormDataParser(content_type)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (FORM[:200], "incomplete"),
        (b"", "incomplete"),
        (b"--XyZ\r\n\r\nx\r\n--XyZ--", "no name"),
        (b"--XyZ\r\nContent-Disposition: form-data\r\n\r\nx\r\n--XyZ--", "no name"),
        (b"--XyZ\r\nX: " + b"x" * MAX_HEAD_BYTES, "bytes of headers"),
        (b"".join(part(f"f{n}", b"") for n in range(MAX_PARTS + 1)), "parts"),
    ],
    ids=["cut", "empty", "no headers", "no name", "long head", "many parts"],
)
@pytest.mark.parametrize("step", [1, 100_000])
def test_a_wrong_form_is_refused(body: bytes, message: str, step: int) -> None:
    with pytest.raises(BadRequestError, match=message):
        parsed(body, step)
