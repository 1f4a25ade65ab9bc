"""One connection to an upstream server: one exchange after another, each with one task that waits for it.

Bytes are framed as they come and either go to the exchange's sink in the same step, or are kept until the task takes
them; what is kept is bounded by no longer reading. Whatever goes wrong is stored and raised in the task, after what
came before it has been taken.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

from hpc_router.errors import UpstreamError, UpstreamTimeoutError
from hpc_router.relay.upstream.interface import Address, PendingRequest, ResponseCallback, Sink, UpstreamTimeouts
from hpc_router.relay.upstream.response_parser import ResponseParser, chunk_prefix, whole_answer
from hpc_router.relay.upstream.timeouts import IdleTimer

KEPT_BYTES: Final = 2**16
"""Beyond this no more is read; one more read may have been under way."""
IN_ONE_PIECE: Final = 2**18
"""A longer request body is written in pieces, so that it is not copied whole and does not hold up the event loop."""


class Connections(Protocol):
    """Whose connection it is."""

    def put(self, address: Address | str, connection: "Connection") -> None:
        """It may be used again."""

    def discard(self, connection: "Connection") -> None:
        """It has closed, whoever closed it; called once."""


class Connection(asyncio.Protocol, PendingRequest):
    """`begin`, `send`, `head`, then `chunk` until it is empty or `flow`, and always `end`.

    Or `ask`, which needs no task: the end comes by itself, with a whole answer, or the exchange goes on from `head`.
    """

    __slots__ = (
        "_asker", "_ends", "_failure", "_framer", "_full", "_kept", "_loop", "_mark", "_owner", "_pass", "_reading",
        "_sent", "_sink", "_transport", "_waiter", "_writable", "address", "idle_s", "patience", "unanswered",
    )  # fmt: skip

    def __init__(self, owner: Connections, address: Address | str) -> None:
        self._loop = asyncio.get_running_loop()
        self._owner = owner
        self.address = address
        self._transport: asyncio.Transport | None = None
        self._framer: ResponseParser | None = None
        self.patience = IdleTimer(self.give_up)
        self.idle_s = 0.0
        self._sink: Sink | None = None  # that the body flows into
        self._pass: Callable[[bytes], bool] | None = None  # its passage, while a chunk is to come
        self._ends: tuple[bytes, ...] = ()
        self._mark: bytes | None = None
        self._full = False  # the sink wants to be asked for room
        self._kept = 0
        self._reading = True
        self._writable = True
        self._sent = False
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._asker: ResponseCallback | None = None  # instead of a task
        self.unanswered = False  # the last exchange ended without a byte from upstream

    @property
    def usable(self) -> bool:
        transport = self._transport
        return transport is not None and not transport.is_closing()

    def asked_s(self) -> float:
        """Since the present exchange began, or the last one did."""
        return self._loop.time() - self.patience.begun_at

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # The exchange's side.

    def begin(self, limits: UpstreamTimeouts, *, head_only: bool) -> None:
        """The clock for the answer's first byte runs from now on."""
        assert self._framer is None
        self._framer = ResponseParser(head_only=head_only)
        self.idle_s = limits.idle_s
        self.patience.begin(limits.first_byte_s)
        self._failure, self._sent = None, False

    async def send(self, head: bytes, body: bytes | None) -> None:
        """An answer that comes before all is sent ends the sending, and later the connection."""
        if self._transport is None:
            self._failure = UpstreamError("the replica had closed the connection")
        elif not body or len(body) <= IN_ONE_PIECE:
            self._transport.write(head + body if body else head)
            self._sent = True
        else:
            self._transport.write(head)
            await self._send_rest(memoryview(body))

    def ask(self, request: bytes, asker: ResponseCallback, limits: UpstreamTimeouts) -> None:
        """An exchange without a task, over a connection that was kept. `request` is short."""
        assert self._transport is not None
        self._asker = asker
        self.idle_s = limits.idle_s
        self.patience.begin(limits.first_byte_s)
        self._transport.write(request)
        self._sent = True

    def abandon(self) -> None:
        self._asker = None
        self.patience.rest()
        self.abort()

    async def _send_rest(self, rest: memoryview) -> None:
        while rest:
            while not self._writable and not self._answered:
                await self._news()
            if self._answered or self._transport is None:
                return
            self._transport.write(rest[:IN_ONE_PIECE])
            rest = rest[IN_ONE_PIECE:]
        self._sent = True

    @property
    def framer(self) -> ResponseParser:
        """What is known of this exchange's answer."""
        assert self._framer is not None
        return self._framer

    async def head(self) -> None:
        """Until status and headers are known."""
        while not self.framer.status:
            self._raise_failure()
            await self._news()

    def whole(self) -> bytes | None:
        """The body, if all of it is there and in one piece."""
        framer = self._framer
        if framer is None or not framer.complete or len(framer.pieces) != 1 or self._failure is not None:
            return None
        return framer.pieces[0]

    async def chunk(self) -> bytes:
        """The next of the body; empty at its end."""
        assert self._framer is not None
        while not self._framer.pieces:
            self._raise_failure()
            if self._framer.complete:
                return b""
            await self._news()
        return self._kept_bytes()

    async def flow(self, sink: Sink) -> None:
        """The rest of the body into `sink`."""
        assert self._framer is not None
        while chunk := await self.chunk():
            self._full = not sink.take(chunk)
            while not self._full and not self._framer.complete and self._failure is None:
                self._sink = sink
                try:
                    await self._news()
                finally:
                    self._sink = self._pass = None
            if self._full:
                self.patience.rest()
                await sink.make_room()
                self.patience.wait(self.idle_s)

    def end(self) -> bool:
        """Whether another exchange may follow; if not, the connection is closed at once."""
        assert self._framer is not None
        framer, self._framer = self._framer, None
        self.patience.rest()
        self.unanswered = framer.untouched
        self._full, self._kept = False, 0
        framer.release()
        reusable = framer.complete and framer.keep_alive and self._sent and self._failure is None and self.usable
        if not reusable:
            self.abort()
        elif not self._reading:
            self._resume_reading()
        return reusable

    def finish(self) -> None:
        """`end`, and keep it where another exchange may follow."""
        if self.end():
            self._owner.put(self.address, self)

    @property
    def _answered(self) -> bool:
        return self._failure is not None or (self._framer is not None and self._framer.status != 0)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _news(self) -> asyncio.Future[None]:
        """Awaited by the exchange's task: something has happened."""
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def _kept_bytes(self) -> bytes:
        """What has come of the body and has not been taken; whoever calls this has heard from upstream."""
        assert self._framer is not None
        self.patience.wait(self.idle_s)
        pieces = self._framer.pieces
        if len(pieces) == 1:
            data = pieces.pop()
        else:
            data = b"".join(pieces)
            pieces.clear()
        self._kept = 0
        if not self._reading:
            self._resume_reading()
        return data

    def _resume_reading(self) -> None:
        self._reading = True
        if self.usable:
            assert self._transport is not None
            self._transport.resume_reading()

    # The event loop's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        write, mark = self._pass, self._mark
        if (
            write is not None
            and data.startswith(chunk_prefix(len(data)))
            and data.endswith(self._ends)
            and (mark is None or data.rfind(mark) < 0)  # `in` takes twice the time of this
        ):
            self.patience.heard = True  # a stream's events mostly come so, one by one
            try:
                if write(data):
                    return
                self._full = True
            except Exception as error:  # noqa: BLE001  # it is raised where the exchange is waited for
                self._fail(error)
            self._sink = self._pass = None
            self._wake()
            return
        framer = self._framer
        if framer is None:
            if not self._take_answer(data):
                self.abort()  # nobody has asked
            return
        sink, self._pass = self._sink, None
        try:
            framer.feed(data)
            if sink is not None and framer.pieces:
                self._full = not sink.take(self._kept_bytes())
                if not self._full and not framer.complete:
                    if framer.between and (passage := sink.passage()) is not None:
                        self._pass, self._ends, self._mark = passage
                    return
                self._sink = None
        except Exception as error:  # noqa: BLE001  # it is raised where the exchange is waited for
            self._fail(error)
        if framer.pieces and self._sink is None:
            self._kept += len(data)
            if self._kept > KEPT_BYTES and self._reading and self.usable:
                assert self._transport is not None
                self._reading = False
                self._transport.pause_reading()
        self._wake()

    def _take_answer(self, data: bytes) -> bool:
        """The first of the answer to what was asked; False: nothing was."""
        asker = self._asker
        if asker is None:
            return False
        found = whole_answer(data)
        if found is not None:
            (status, headers, keep_alive), body, _ = found
            if asker.on_answer(status, headers, body):
                self._asker = None
                self.patience.rest()
                if keep_alive:
                    self._owner.put(self.address, self)
                else:
                    self.abort()
                return True
        self._frame_for_a_task()
        self.data_received(data)
        return True

    def _tell(self, asker: ResponseCallback) -> None:
        framer, body = self.framer, self.whole()
        if body is None or not asker.on_answer(framer.status, framer.headers, body):
            asker.on_news()
        else:
            self.finish()

    def _frame_for_a_task(self) -> None:
        """Something else than a whole answer has become of what was asked."""
        if self._asker is not None and self._framer is None:
            self._framer = ResponseParser()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.patience.end()
        self._owner.discard(self)
        self._frame_for_a_task()
        if self._framer is not None and not self._framer.complete and self._failure is None:
            try:
                if error is not None:
                    raise UpstreamError(f"the connection to the replica broke: {type(error).__name__}") from error
                self._framer.feed_eof()
            except UpstreamError as failure:
                self._failure = failure
        self._wake()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self.abort()

    def give_up(self) -> None:
        self._frame_for_a_task()
        self._fail(UpstreamTimeoutError("the replica sent nothing within the timeout"))
        self._wake()

    def _wake(self) -> None:
        asker, self._asker = self._asker, None
        if asker is not None:
            self._tell(asker)
            return
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
