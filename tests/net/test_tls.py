"""HTTPS between the router and its clients."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hpc_router.errors import ConfigError
from hpc_router.net.http_client import Unreachable, call, session
from hpc_router.net.tls import client_context, load_pair, read_certificate, server_context
from hpc_router.relay.downstream.interface import Request, Response, json_response
from hpc_router.relay.downstream.server import listening
from tests.support.certificates import make_certificate


@asynccontextmanager
async def https(context: ssl.SSLContext) -> AsyncIterator[str]:
    async def answer(request: Request) -> Response:
        return json_response({"path": request.path})

    sock = socket.create_server(("127.0.0.1", 0))
    async with listening(answer, sock, max_body=2**16, tls=context):
        yield f"https://127.0.0.1:{sock.getsockname()[1]}"


async def path_at(url: str, certificate: str | None) -> object:
    async with session() as client:
        return (await call(client, "GET", f"{url}/x", certificate=certificate)).body


async def test_a_client_accepts_only_the_routers_certificate(tmp_path: Path) -> None:
    """Not one that names the same host, and not one that an authority of the system might have signed."""
    (tmp_path / "other").mkdir()
    pair, other = make_certificate(tmp_path), make_certificate(tmp_path / "other")
    async with https(server_context(*pair)) as url:
        assert await path_at(url, read_certificate(pair[0])) == {"path": "/x"}
        for wrong in (read_certificate(other[0]), None):
            with pytest.raises(Unreachable):
                await path_at(url, wrong)


async def test_a_renewed_certificate_is_used_for_new_connections(tmp_path: Path) -> None:
    pair = make_certificate(tmp_path)
    before, context = read_certificate(pair[0]), server_context(*pair)
    async with https(context) as url:
        make_certificate(tmp_path)
        assert await path_at(url, before) == {"path": "/x"}
        await asyncio.to_thread(load_pair, context, *pair)
        assert await path_at(url, read_certificate(pair[0])) == {"path": "/x"}
        with pytest.raises(Unreachable):
            await path_at(url, before)


def test_only_the_certificate_is_read_of_a_file_with_a_key(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    both = tmp_path / "both.pem"
    both.write_text(key.read_text() + cert.read_text() + cert.read_text())
    assert read_certificate(both) == cert.read_text()


def test_what_is_not_a_certificate(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    for path in (tmp_path / "missing", key):
        with pytest.raises(ConfigError, match=r"router\.tls_cert=.*valid: a PEM file"):
            read_certificate(path)
    (tmp_path / "other").mkdir()
    _, other_key = make_certificate(tmp_path / "other")
    with pytest.raises(ConfigError, match="does not belong to the certificate"):
        server_context(cert, other_key)
    with pytest.raises(ValueError, match="not a certificate"):
        client_context("x")
