"""An HTTP server that sends given bytes as its responses, in given pieces."""

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

HANG_UP = b"<hang up>"
"""A piece that closes the connection."""
SILENCE = b"<silence>"
"""A piece that sends nothing more until the client disconnects."""


@dataclass
class Scripted:
    """Answers each request with the next response; the last response repeats."""

    answers: list[Sequence[bytes]]
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_answer(self, request: bytes) -> Sequence[bytes]:
        with self._lock:
            self.requests.append(request)
            return self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)

    def serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := _read(sock):
                for piece in self.next_answer(request):
                    if piece == HANG_UP:
                        return
                    if piece == SILENCE:
                        sock.recv(1)
                        return
                    sock.sendall(piece)


def _read(sock: socket.socket) -> bytes:
    raw = b""
    while b"\r\n\r\n" not in raw:
        if not (piece := sock.recv(65536)):
            return b""
        raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += sock.recv(65536)
    return head + b"\r\n\r\n" + body


@contextmanager
def scripted(*answers: Sequence[bytes]) -> Iterator[tuple[int, Scripted]]:
    """Starts the server and yields its port and its state."""
    server, threads = Scripted(list(answers)), []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    server.connections += 1
                    threads.append(threading.Thread(target=server.serve, args=(sock,)))
                    threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield listener.getsockname()[1], server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            for thread in threads:
                thread.join()


def by_bytes(answer: bytes) -> list[bytes]:
    return [answer[i : i + 1] for i in range(len(answer))]


def plain(body: bytes = b'{"choices":[]}', *, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    return b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n" % len(body) + more + b"\r\n" + body


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


def event(text: str, *, stamp: int | None = None) -> bytes:
    more = "" if stamp is None else f',"t":{stamp}'
    return f'data: {{"choices":[{{"delta":{{"content":"{text}"}}}}]{more}}}\n\n'.encode()


DONE = b"data: [DONE]\n\n"
