"""The paths `/v1/files` and `/v1/batches`, in the format of OpenAI's API.

An upload is written to the run directory while it arrives, in a file thread, so neither its length nor a slow file
system affects other requests. Users see only their own files and batches. The lines of batches are sent by another
process (`hpc_router.router.batches`).
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import parse_qs

from hpc_router.config.schema import BatchConfig
from hpc_router.errors import BadRequestError, suggest
from hpc_router.net import protocol
from hpc_router.relay.downstream.interface import Request, Response, json_response
from hpc_router.relay.downstream.request_parser import RequestHead
from hpc_router.router.access.user_access import UserAccess
from hpc_router.router.batches.input_lines import ENDPOINTS
from hpc_router.router.batches.stored_batches import StoredBatch, StoredBatches
from hpc_router.router.batches.stored_files import StoredFile, StoredFiles, new_id, write_part
from hpc_router.router.worker.form_data import FormDataParser
from hpc_router.router.worker.request_body import decode
from hpc_router.state.io_thread import FileThread
from hpc_router.state.run_directory import RunDir

_T = TypeVar("_T")
PURPOSE: Final = "batch"
PART_BYTES: Final = 2**20
"""Number of bytes of a file that are written or read at once."""
MAX_FIELD_BYTES: Final = 1024
MAX_LISTED: Final = 100
MAX_UPLOADS: Final = 8
"""Maximum number of uploads of a worker at the same time. Further ones wait."""
DAY_S: Final = 86400.0
EXPIRY_S: Final = (3600, 2592000)
"""Valid range of `expires_after`, in seconds, as in OpenAI's API."""
MAX_WINDOW_S: Final = 30 * DAY_S
MAX_METADATA: Final = 16
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,3})([hd])")
_PATH: Final = re.compile(
    r"/v1/(?P<kind>files|batches)(?:/(?P<id>[\w-]{1,80})(?:/(?P<part>content|cancel))?)?", re.ASCII
)
_OCTETS: Final = b"content-type: application/octet-stream\r\ncontent-disposition: attachment\r\n"
BatchHandler = Callable[[Request, UserAccess | None, str], Awaitable[Response | None]]
"""Serves a request. Takes the request, what the user's token allows (None: the owner's), and the ID in the path."""


def streams_body(head: RequestHead) -> bool:
    """Returns whether the body of a request is read while it arrives, and may have any length."""
    return head.method == "POST" and head.path.rstrip("/") == protocol.FILES


class BatchApi:
    """The handlers of one worker. `config` and `read_s` return the settings `router.batch` and `router.idle_timeout_s`
    of the moment."""

    def __init__(self, run: RunDir, config: Callable[[], BatchConfig], read_s: Callable[[], float]) -> None:
        self._config, self._read_s = config, read_s
        self._stored = StoredFiles(run)
        self._batches = StoredBatches(run, self._stored)
        self._thread: FileThread | None = None
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)

    def methods(self, path: str) -> dict[str, BatchHandler]:
        """Returns the handlers of a path, by HTTP method; empty if it is not served."""
        match = _PATH.fullmatch(path)
        if match is None:
            return {}
        match match["kind"], match["id"] is not None, match["part"]:
            case "files", False, None:
                return {"GET": self._list_files, "POST": self._upload}
            case "files", True, None:
                return {"GET": self._file, "DELETE": self._delete}
            case "files", True, "content":
                return {"GET": self._content}
            case "batches", False, None:
                return {"GET": self._list_batches, "POST": self._create}
            case "batches", True, None:
                return {"GET": self._batch}
            case "batches", True, "cancel":
                return {"POST": self._cancel}
        return {}

    async def respond(self, handler: BatchHandler, request: Request, access: UserAccess | None) -> Response | None:
        """Calls a handler of `methods`, and returns what it returns: the response, or None if that was streamed."""
        match = _PATH.fullmatch(request.path.rstrip("/"))
        assert match is not None
        return await handler(request, access, match["id"] or "")

    def close(self) -> None:
        """Ends the file thread once all that it has to do is done. Does not wait for it."""
        if self._thread is not None:
            self._thread.close(timeout_s=0)

    async def _in_thread(self, action: Callable[[], _T]) -> _T:
        if self._thread is None:
            self._thread = FileThread("files of batches")
        return await self._thread.run(action)

    async def _upload(self, request: Request, access: UserAccess | None, _: str) -> Response:
        parser = FormDataParser(request.headers.text("content-type"))
        config, now = self._config(), time.time()
        max_bytes, quota_bytes = int(config.max_file_mb * 2**20), int(config.user_gb * 1e9)
        reserved = min(int(request.headers.get(b"content-length", b"0")), max_bytes)
        user, expires_at = _user(access), now + config.keep_days * DAY_S
        file = StoredFile(new_id("file-"), user, "", PURPOSE, reserved, now, expires_at)
        async with self._uploads:
            await self._in_thread(partial(self._stored.check_quota, user, reserved, quota_bytes=quota_bytes))
            upload = _Upload(await self._in_thread(partial(self._stored.begin, file)), max_bytes)
            try:
                async for part in request.body_chunks(limit_s=self._read_s()):
                    for field, piece in parser.feed(part):
                        upload.take(field.name, field.filename, piece)
                    if len(upload.unwritten) >= PART_BYTES:
                        await self._in_thread(upload.write)
                parser.finish()
                await self._in_thread(upload.write)
                file = upload.described(file)
                await self._in_thread(upload.content.close)
                complete = partial(self._stored.complete, file, quota_bytes=quota_bytes)
                return json_response((await self._in_thread(complete)).to_json())
            except BaseException:
                self._in_thread_later(partial(_discard, upload.content, partial(self._stored.remove, file.id)))
                raise

    def _in_thread_later(self, action: Callable[[], object]) -> None:
        assert self._thread is not None
        self._thread.post(action)

    async def _list_files(self, request: Request, access: UserAccess | None, _: str) -> Response:
        query = parse_qs(request.query)
        purpose = query.get("purpose", [None])[-1]

        def listed() -> list[dict[str, Any]]:
            files = list(self._stored.of_user(_user(access)))
            if query.get("order", ["desc"])[-1] == "asc":
                files.reverse()
            return [file.to_json() for file in files if purpose in (None, file.purpose)]

        return _page(await self._in_thread(listed), query, max_limit=10_000)

    async def _file(self, request: Request, access: UserAccess | None, file_id: str) -> Response:
        file = await self._in_thread(partial(self._stored.get, file_id, _user(access)))
        return json_response(file.to_json())

    async def _delete(self, request: Request, access: UserAccess | None, file_id: str) -> Response:
        def remove() -> None:
            self._stored.get(file_id, _user(access))
            self._stored.remove(file_id)

        await self._in_thread(remove)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def _content(self, request: Request, access: UserAccess | None, file_id: str) -> None:
        file = await self._in_thread(partial(self._stored.get, file_id, _user(access)))
        path = self._stored.content(file_id)
        content: BinaryIO = await self._in_thread(lambda: path.open("rb", buffering=0))
        try:
            request.start_response(200, _OCTETS, length=file.bytes)
            left = 0 if request.method == "HEAD" else file.bytes
            while left:
                part = await self._in_thread(partial(content.read, min(left, PART_BYTES)))
                if not part:
                    request.abort()  # the file is shorter than it was: the client must see that the body is incomplete
                    return
                left -= len(part)
                if not request.write(part):
                    await request.drain(limit_s=self._read_s())
        finally:
            self._in_thread_later(content.close)

    async def _create(self, request: Request, access: UserAccess | None, _: str) -> Response:
        fields = decode(await request.read(limit_s=self._read_s())).fields
        config, now, user = self._config(), time.time(), _user(access)
        keep_s = config.keep_days * DAY_S
        endpoint, file_id = fields.get("endpoint"), fields.get("input_file_id")
        if endpoint not in ENDPOINTS:
            raise BadRequestError(f"endpoint {str(endpoint)[:80]!r}{suggest('', ENDPOINTS)}", param="endpoint")
        if not isinstance(file_id, str):
            raise BadRequestError("input_file_id is the id of an uploaded file", param="input_file_id")
        window = fields.get("completion_window")
        batch = StoredBatch(
            id=new_id("batch_"),
            user=user,
            token_id=None if access is None else access.token.id,
            endpoint=endpoint,
            input_file_id=file_id,
            completion_window=str(window),
            created_at=now,
            expires_at=now + _window_s(window),
            output_file_id=new_id("file-"),
            error_file_id=new_id("file-"),
            results_expire_s=min(
                keep_s, _expiry_s(fields.get("output_expires_after"), "output_expires_after") or keep_s
            ),
            metadata=_metadata(fields.get("metadata")),
        )

        def create() -> dict[str, Any]:
            self._stored.get(file_id, user)
            self._stored.check_quota(user, 0, quota_bytes=int(config.user_gb * 1e9))
            self._batches.create(batch, max_batches=config.max_batches)
            return self._batches.shown(batch)

        return json_response(await self._in_thread(create))

    async def _list_batches(self, request: Request, access: UserAccess | None, _: str) -> Response:
        query = parse_qs(request.query)
        last, after = _limit(query, MAX_LISTED) + 1, query.pop("after", [""])[-1]

        def listed() -> list[dict[str, Any]]:
            found = (batch for batch in self._batches.of_user(_user(access)) if not after or batch.id < after)
            return [self._batches.shown(batch) for batch in islice(found, last)]

        return _page(await self._in_thread(listed), query, max_limit=MAX_LISTED)

    async def _batch(self, request: Request, access: UserAccess | None, batch_id: str) -> Response:
        def shown() -> dict[str, Any]:
            return self._batches.shown(self._batches.get(batch_id, _user(access)))

        return json_response(await self._in_thread(shown))

    async def _cancel(self, request: Request, access: UserAccess | None, batch_id: str) -> Response:
        def cancel() -> dict[str, Any]:
            batch = self._batches.get(batch_id, _user(access))
            self._batches.cancel(batch_id)
            return self._batches.shown(batch)

        return json_response(await self._in_thread(cancel))


class _Upload:
    """A form that is being received: its file goes to `content`, its other fields are kept."""

    def __init__(self, content: BinaryIO, max_bytes: int) -> None:
        self.content, self.unwritten = content, bytearray()
        self._max_bytes, self._written = max_bytes, 0
        self._fields: dict[str, bytes] = {}
        self._filename: str | None = None

    def take(self, name: str, filename: str | None, piece: bytes) -> None:
        if name == "file":
            self._filename = filename or self._filename or "file"
            self.unwritten += piece
            return
        value = self._fields[name] = self._fields.get(name, b"") + piece
        if len(value) > MAX_FIELD_BYTES:
            raise BadRequestError(f"the field {name[:80]!r} of the form is too long", param=name[:80])

    def write(self) -> None:
        """Writes what was received. Blocks. Raises BodyTooLargeError and OSError."""
        part = bytes(self.unwritten)
        self.unwritten.clear()
        self._written = write_part(self.content, part, written=self._written, max_bytes=self._max_bytes)

    def described(self, file: StoredFile) -> StoredFile:
        """Returns `file` with what the form says of it. Raises BadRequestError if the form is not complete."""
        fields = {name: value.decode("utf-8", "replace") for name, value in self._fields.items()}
        if self._filename is None:
            raise BadRequestError("the form has no field 'file'", param="file")
        if fields.get("purpose") != PURPOSE:
            raise BadRequestError(f"purpose {fields.get('purpose')!r} (valid: {PURPOSE})", param="purpose")
        expires_after: Any = None
        if "expires_after[seconds]" in fields or "expires_after[anchor]" in fields:
            seconds = fields.get("expires_after[seconds]", "")
            expires_after = {
                "anchor": fields.get("expires_after[anchor]"),
                "seconds": int(seconds) if seconds.isascii() and seconds.isdigit() else seconds,
            }
        expiry_s = _expiry_s(expires_after, "expires_after")
        expires_at = file.expires_at if expiry_s is None else min(file.expires_at, file.created_at + expiry_s)
        return StoredFile(file.id, file.user, self._filename[:255], PURPOSE, self._written, file.created_at, expires_at)


def _discard(content: BinaryIO, remove: Callable[[], None]) -> None:
    content.close()
    remove()


def _user(access: UserAccess | None) -> str | None:
    return None if access is None else access.token.user


def _window_s(window: object) -> float:
    """Returns the length in seconds of a completion window such as `24h` or `7d`. Raises BadRequestError."""
    match = _WINDOW.fullmatch(window) if isinstance(window, str) else None
    window_s = int(match[1]) * (3600.0 if match[2] == "h" else DAY_S) if match is not None else 0.0
    if not 0 < window_s <= MAX_WINDOW_S:
        raise BadRequestError(
            f"completion_window {str(window)[:80]!r} (valid: 24h, or another time from 1h to 30d)",
            param="completion_window",
        )
    return window_s


def _expiry_s(value: object, param: str) -> float | None:
    """Returns the seconds of an `expires_after` object; None without one. Raises BadRequestError."""
    if value is None:
        return None
    seconds = value.get("seconds") if isinstance(value, Mapping) else None
    if (
        not isinstance(value, Mapping)
        or value.get("anchor") != "created_at"
        or type(seconds) is not int
        or not EXPIRY_S[0] <= seconds <= EXPIRY_S[1]
    ):
        raise BadRequestError(
            f"{param} needs the anchor 'created_at' and {EXPIRY_S[0]} to {EXPIRY_S[1]} seconds", param=param
        )
    return float(seconds)


def _metadata(value: object) -> Mapping[str, str] | None:
    if value is None:
        return None
    if (
        not isinstance(value, Mapping)
        or len(value) > MAX_METADATA
        or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())
        or not all(len(k) <= 64 and len(v) <= 512 for k, v in value.items())
    ):
        raise BadRequestError(
            f"metadata is at most {MAX_METADATA} texts with names of up to 64 and values of up to 512 characters",
            param="metadata",
        )
    return dict(value)


def _limit(query: Mapping[str, list[str]], maximum: int) -> int:
    text = query.get("limit", ["20" if maximum == MAX_LISTED else str(maximum)])[-1]
    if not re.fullmatch("[0-9]{1,6}", text) or not 1 <= int(text) <= maximum:
        raise BadRequestError(f"limit {text[:20]!r} (valid: 1 to {maximum})", param="limit")
    return int(text)


def _page(entries: Iterable[dict[str, Any]], query: Mapping[str, list[str]], *, max_limit: int) -> Response:
    """Returns one page of a list: at most `limit` of the entries that follow the one with the ID `after`."""
    found, limit, after = list(entries), _limit(query, max_limit), query.get("after", [None])[-1]
    if after is not None:
        at = next((n for n, entry in enumerate(found) if entry["id"] == after), len(found))
        found = found[at + 1 :]
    page = found[:limit]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(found) > limit,
        }
    )
