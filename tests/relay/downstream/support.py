"""Raw requests that a server must refuse, and unusual ones that it must serve."""

from hpc_router.relay.downstream.request_parser import MAX_FIELDS
from tests.relay.serving import MAX_BODY

POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
CHUNKS = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HASTY = b"POST /hasty HTTP/1.1\r\nHost: x\r\n"
"""Its body is not waited for."""
LENIENT = 200
"""The reference serves it."""
SILENT = 0
"""The reference breaks off without a word, or waits for ever."""
REFUSED: dict[str, tuple[bytes, int, set[int]]] = {  # what is sent, our answer, the reference's where they differ
    "garbage": (b"\0\1\2garbage\r\n\r\n", 400, set()),
    "another method": (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 400, set()),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, set()),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: x\r\n\r\n", 400, set()),
    "HTTP/0.9": (b"GET /\r\n\r\n", 505, {400, LENIENT}),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400, {LENIENT}),
    "two hosts": (GET + b"Host: y\r\n\r\n", 400, set()),
    "the same host twice": (GET + b"Host: x\r\n\r\n", 400, set()),
    "a target that is no address": (b"GET http://[::1/x HTTP/1.1\r\nHost: x\r\n\r\n", 400, set()),
    "a space in the target": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400, set()),
    "bytes beyond ASCII in the target": (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400, set()),
    "length and chunks": (
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x", 400, set()
    ),
    "chunks and length": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\nGET /x", 400, set()
    ),
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400, set()),
    "the same length twice": (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400, set()),
    "a list of lengths": (POST + b"Content-Length: 3, 3\r\n\r\nabc", 400, set()),
    "a signed length": (POST + b"Content-Length: +3\r\n\r\nabc", 400, set()),
    "a negative length": (POST + b"Content-Length: -3\r\n\r\nabc", 400, set()),
    "an empty length": (POST + b"Content-Length: \r\n\r\n", 400, set()),
    "a length in hexadecimal": (POST + b"Content-Length: 0x3\r\n\r\nabc", 400, set()),
    "a length beyond all numbers": (POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n", 400, set()),
    "chunked not last": (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400, set()),
    "chunked twice": (POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400, set()),
    "gzip and chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501, {LENIENT}),
    "an unknown coding": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501, {400}),
    "chunks in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501, {LENIENT}),
    "a bad chunk size": (CHUNKS + b"zz\r\nabc\r\n", 400, set()),
    "a negative chunk size": (CHUNKS + b"-3\r\nabc\r\n", 400, set()),
    "an endless chunk size": (CHUNKS + b"f" * 30 + b"\r\nabc\r\n", 400, set()),
    "a chunk longer than its size": (CHUNKS + b"2\r\nabc\r\n0\r\n\r\n", 400, set()),
    "a malformed trailer": (CHUNKS + b"3\r\nabc\r\n0\r\nno colon\r\n\r\n", 400, set()),
    "bare LF": (b"POST / HTTP/1.1\nHost: x\nContent-Length: 3\n\nabc", 400, set()),
    "bare LF before the body": (POST + b"Content-Length: 3\r\n\nabc", 400, set()),
    "bare LF after a chunk size": (CHUNKS + b"3\nabc\r\n0\r\n\r\n", 400, set()),
    "bare CR": (b"GET / HTTP/1.1\rHost: x\r\r", 400, set()),
    "CR in a value": (GET + b"A: b\rContent-Length: 3\r\n\r\nabc", 400, set()),
    "a folded header": (POST + b"A: b\r\n c\r\nContent-Length: 0\r\n\r\n", 400, set()),
    "a header without a name": (GET + b": b\r\n\r\n", 400, set()),
    "a header without a colon": (GET + b"Content-Length\r\n\r\n", 400, set()),
    "space before the colon": (POST + b"Content-Length : 3\r\n\r\nabc", 400, set()),
    "space before the first header": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400, set()),
    "NUL in a value": (GET + b"A: b\0c\r\n\r\n", 400, set()),
    "NUL in a name": (GET + b"A\0: b\r\n\r\n", 400, set()),
    "a header line of 64 KiB": (GET + b"A: " + b"x" * 2**16 + b"\r\n\r\n", 431, {400}),
    "a header name of 64 KiB": (GET + b"x" * 2**16 + b": a\r\n\r\n", 431, {400}),
    "a request line of 64 KiB": (b"GET /" + b"x" * 2**16 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, {400}),
    "a request line of 1 MiB": (b"GET /" + b"x" * 2**20, 431, {SILENT}),
    "ten thousand headers": (GET + b"A: b\r\n" * 10_000 + b"\r\n", 431, {400}),
    "a few headers too many": (GET + b"A: b\r\n" * MAX_FIELDS + b"\r\n", 431, {400, LENIENT}),
    "a chunk extension without end": (CHUNKS + b"3;" + b"x" * 2**20, 400, {SILENT}),
    "trailers without end": (CHUNKS + b"0\r\n" + b"a: b\r\n" * 2**18, 400, {SILENT}),
    "empty lines without end": (b"\r\n" * 2**19, 431, {SILENT}),
    "a body that says it is too long": (POST + b"Content-Length: 104857600\r\n\r\n" + b"x" * 2**20, 413, set()),
    "a body that turns out too long": (CHUNKS + (b"10000\r\n" + b"x" * 2**16 + b"\r\n") * 2, 413, set()),
    "a body that is one byte too long": (POST + b"Content-Length: 65537\r\n\r\n" + b"x" * (MAX_BODY + 1), 413, set()),
    "a body that does not come": (HASTY + b"Content-Length: 3\r\n\r\na", 408, set()),
    "chunks that do not come": (HASTY + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n", 408, set()),
    "a compressed body": (POST + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", 415, set()),
}  # fmt: skip


ODD = {
    "the longest body": (POST + b"Content-Length: 65536\r\n\r\n" + b"x" * MAX_BODY, b"<" + b"x" * MAX_BODY + b">"),
    "a chunk extension": (CHUNKS + b'3;a="b"\r\nabc\r\n0\r\n\r\n', b"<abc>"),
    "trailers": (CHUNKS + b"3\r\nabc\r\n0\r\nExpires: 5\r\nHost: y\r\n\r\n", b"<abc>"),
    "an empty line before it": (b"\r\n" + POST + b"Content-Length: 3\r\n\r\nabc", b"<abc>"),
    "no space before a value": (POST + b"Content-Length:3\r\n\r\nabc", b"<abc>"),
    "spaces around a value": (POST + b"Content-Length: \t3 \t\r\n\r\nabc", b"<abc>"),
    "a body for GET": (GET + b"Content-Length: 3\r\n\r\nabc", b"<abc>"),
    "a whole address": (b"POST http://x/ HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", b"<abc>"),
    "a star": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", b"<>"),
    "another protocol offered": (
        POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"
        b"Content-Length: 3\r\n\r\nabc",
        b"<abc>",
    ),
    "another protocol offered with chunks": (
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"<abc>",
    ),
    "another protocol offered without a body": (GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", b"<>"),
}  # fmt: skip
