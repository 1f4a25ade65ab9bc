"""Parses a `multipart/form-data` body (RFC 7578) while it arrives, so that an uploaded file is never in memory as a
whole. No I/O."""

from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from enum import Enum, auto
from typing import Final

from hpc_router.errors import BadRequestError

MAX_HEAD_BYTES: Final = 2**13
"""Maximum length in bytes of the header lines of one part."""
MAX_PARTS: Final = 32


@dataclass(frozen=True, slots=True)
class FormField:
    """The head of one part: the name of its field; `filename` is None if the part is not a file."""

    name: str
    filename: str | None


class _State(Enum):
    PREAMBLE = auto()  # before the first boundary
    HEAD = auto()  # after a boundary, before the end of the part's header lines
    CONTENT = auto()
    END = auto()  # after the last boundary


class FormDataParser:
    """Parses one body. `content_type`: value of the request's header. Raises BadRequestError if it is not a form."""

    def __init__(self, content_type: str) -> None:
        head = Message()
        head["content-type"] = content_type
        boundary = head.get_boundary()
        if head.get_content_type() != "multipart/form-data" or not boundary or not boundary.isascii():
            raise BadRequestError("the body must be multipart/form-data with a boundary")
        self._delimiter = b"\r\n--" + boundary.encode()
        self._buffer = bytearray(b"\r\n")  # so that the first boundary is found like the others
        self._state = _State.PREAMBLE
        self._field = FormField("", None)
        self._parts = 0

    def feed(self, data: bytes) -> Iterator[tuple[FormField, bytes]]:
        """Takes the next part of the body. Yields pieces of the fields' contents, each with its field; the first piece
        of a field is empty. Raises BadRequestError."""
        buffer = self._buffer
        buffer += data
        while self._state is not _State.END:
            if self._state is _State.HEAD:
                if buffer.startswith(b"--"):
                    self._state = _State.END
                    break
                end = buffer.find(b"\r\n\r\n")
                if end > MAX_HEAD_BYTES or (end < 0 and len(buffer) > MAX_HEAD_BYTES):
                    raise BadRequestError(f"a part of the form has more than {MAX_HEAD_BYTES} bytes of headers")
                if end < 0:
                    return
                self._field = self._parsed(bytes(buffer[: end + 4]))
                del buffer[: end + 4]
                self._state = _State.CONTENT
                yield self._field, b""
            at = buffer.find(self._delimiter)
            end = at if at >= 0 else max(0, len(buffer) - len(self._delimiter) + 1)
            piece = bytes(buffer[:end])
            if piece and self._state is _State.CONTENT:
                yield self._field, piece
            if at < 0:
                del buffer[:end]
                return
            del buffer[: at + len(self._delimiter)]
            self._state = _State.HEAD
        buffer.clear()

    def finish(self) -> None:
        """Raises BadRequestError if the body has no end."""
        if self._state is not _State.END:
            raise BadRequestError("the form is incomplete: its last boundary is missing")

    def _parsed(self, head: bytes) -> FormField:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequestError(f"the form has more than {MAX_PARTS} parts")
        message = HeaderParser().parsestr(head.decode("latin-1").lstrip(" \t").removeprefix("\r\n"))
        name = message.get_param("name", header="content-disposition")
        if not isinstance(name, str):
            raise BadRequestError("a part of the form has no name")
        filename = message.get_filename()
        if filename is not None:
            filename = filename.encode("latin-1", "replace").decode("utf-8", "replace")
        return FormField(name, filename)
