"""Answers that no HTTP server may give."""

from tests.relay.scripted import CHUNKED, chunked, head, sized

LENGTH = b"content-length: 3"
WHOLE = chunked(b"abc")

MALFORMED = {
    "not HTTP": b"garbage\r\n\r\n",
    "a later version": head(LENGTH, version=b"2.0") + b"abc",
    "no status": b"HTTP/1.1 \r\n\r\n",
    "status of two digits": head(LENGTH, status=b"99 x"),
    "status of four digits": head(LENGTH, status=b"1000 x"),
    "an unasked switch of protocols": head(b"connection: upgrade", b"upgrade: ws", status=b"101 x"),
    "bare LF": b"HTTP/1.1 200 OK\ncontent-length: 3\n\nabc",
    "no colon": head(b"novalue", LENGTH) + b"abc",
    "no name": head(b": x", LENGTH) + b"abc",
    "space before the colon": head(b"content-length : 3") + b"abc",
    "a folded header": head(b"a: b\r\n c", LENGTH) + b"abc",
    "NUL in a value": head(b"a: b\0c", LENGTH) + b"abc",
    "CR in a value": head(b"a: b\rc", LENGTH) + b"abc",
    "two lengths": head(LENGTH, b"content-length: 4") + b"abc",
    "the same length twice": head(LENGTH, LENGTH) + b"abc",
    "a list of lengths": head(b"content-length: 3, 3") + b"abc",
    "a signed length": head(b"content-length: +3") + b"abc",
    "a negative length": head(b"content-length: -3") + b"abc",
    "an empty length": head(b"content-length:") + b"abc",
    "an endless length": head(b"content-length: " + b"9" * 30) + b"abc",
    "length and chunks": head(LENGTH, CHUNKED) + WHOLE,
    "chunks and length": head(CHUNKED, LENGTH) + WHOLE,
    "an unknown coding": head(b"transfer-encoding: gzip, chunked") + WHOLE,
    "chunked not last": head(b"transfer-encoding: chunked, gzip") + WHOLE,
    "chunked twice": head(CHUNKED, CHUNKED) + WHOLE,
    "no coding at all": head(b"transfer-encoding: xchunked") + b"abc",
    "chunks in HTTP/1.0": head(CHUNKED, version=b"1.0") + WHOLE,
    "no chunk size": head(CHUNKED) + b"\r\nabc\r\n",
    "a chunk size that is no number": head(CHUNKED) + b"zz\r\nabc\r\n",
    "a negative chunk size": head(CHUNKED) + b"-3\r\nabc\r\n",
    "an endless chunk size": head(CHUNKED) + b"f" * 30 + b"\r\nabc\r\n",
    "a chunk longer than its size": head(CHUNKED) + b"2\r\nabc\r\n0\r\n\r\n",
    "bare LF after a chunk size": head(CHUNKED) + b"3\nabc\r\n0\r\n\r\n",
    "garbage after a chunk": head(CHUNKED) + b"3\r\nabc\r\n!garbage!\r\n",
    "a malformed trailer": head(CHUNKED) + chunked(b"abc", trailers=b"no colon\r\n"),
    "a header line of more than 64 KiB": head(b"a: " + b"x" * 2**16, LENGTH) + b"abc",
    "headers of more than 64 KiB": head(*[b"a: " + b"x" * 1000] * 70, LENGTH) + b"abc",
}
ENDLESS = {  # a beginning, and what follows for ever
    "headers": (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
    "a header": (b"HTTP/1.1 200 OK\r\na: ", b"x"),
    "a reason": (b"HTTP/1.1 200 ", b"x"),
    "interim answers": (b"", head(b"a: b", status=b"103 Early Hints")),
    "trailers": (head(CHUNKED) + b"3\r\nabc\r\n0\r\n", b"a: b\r\n"),
    "a chunk extension": (head(CHUNKED) + b"3;", b"x"),
}
TRUNCATED = {
    "nothing": b"",
    "half a status line": b"HTTP/1.1 20",
    "half a head": head(LENGTH)[:-2],
    "only an interim answer": head(status=b"100 Continue"),
    "no body": head(LENGTH),
    "half a body": sized(b"abc")[:-1],
    "half a chunk": head(CHUNKED) + b"3\r\nab",
    "no last chunk": head(CHUNKED) + b"3\r\nabc\r\n",
    "half a last chunk": head(CHUNKED) + WHOLE[:-2],
}
