"""`/v1/files` and `/v1/batches`, with the official client and with requests that are wrong."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from hpc_router.config.schema import BatchConfig
from hpc_router.router.batches.executor import execute
from hpc_router.state import registry
from hpc_router.state.registry import Record, RecordKind, State
from hpc_router.state.request_records import read_records
from hpc_router.state.run_directory import RunDir
from hpc_router.state.user_tokens import create_token, revoke_tokens
from tests.router.batches.support import CHAT, line
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, answer, fake_replica, refuse
from tests.router.support import GUARD_S, ready, session
from tests.support.waiting import eventually

REPLICA = "router-0.g1"
LINES = b"".join(line(n) for n in range(6))


@asynccontextmanager
async def served(run: RunDir, **limits: Any) -> AsyncIterator[RunningRouter]:
    """A router with the expert `math`, and these values of `router.batch`."""
    deployment = a_deployment("math", policy="model_field", fallback="math", max_body_mb=0.01)
    deployment.router.batch = replace(BatchConfig(), **limits)
    async with a_router(run, deployment, replica=REPLICA) as router:
        record = Record(RecordKind.ROUTER, REPLICA, router.url, State.STARTING, {}, generation=1)
        registry.publish(run.registry, record)
        yield router


@asynccontextmanager
async def executing(run: RunDir, router: RunningRouter) -> AsyncIterator[None]:
    """The process that runs batches, in this one."""
    stopping = asyncio.Event()
    task = asyncio.create_task(execute(run, router.gateway.deployment, replica=REPLICA, stopping=stopping))
    try:
        yield
    finally:
        stopping.set()
        await task


@asynccontextmanager
async def client_of(router: RunningRouter, token: str | None = None) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{router.url}/v1", api_key=token or router.token, max_retries=0, timeout=GUARD_S
    ) as made:
        yield made


async def submitted(client: openai.AsyncOpenAI, content: bytes, **options: Any) -> Any:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    given = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **options}
    return await client.batches.create(**given)


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    async def shown() -> Any:
        batch = await client.batches.retrieve(batch_id)
        return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None

    return await eventually(shown)


async def lines_of(client: openai.AsyncOpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (await client.files.content(file_id)).text.splitlines()]


async def test_a_batch_with_the_official_client(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "math-0.g1", answer, answer, refuse(400), answer),
        served(run) as router,
        client_of(router) as client,
    ):
        await ready(router)
        batch = await submitted(client, LINES, metadata={"name": "first"})
        assert (batch.status, batch.metadata, batch.errors) == ("validating", {"name": "first"}, None)
        async with executing(run, router):
            batch = await ended(client, batch.id)
        assert batch.status == "completed"
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (6, 5, 1)
        output, errors = await lines_of(client, batch.output_file_id), await lines_of(client, batch.error_file_id)
        assert [one["response"]["status_code"] for one in errors] == [400]
        assert errors[0]["response"]["body"]["error"]["message"] == "scripted 400"
        ids = [one["custom_id"] for one in output]
        assert ids == sorted(ids)
        assert {*ids, errors[0]["custom_id"]} == {f"line-{n}" for n in range(6)}
        assert output[0]["response"]["body"]["choices"][0]["message"]["content"] == "math-0.g1"
        assert output[0]["response"]["request_id"]
        file = await client.files.retrieve(batch.output_file_id)
        assert (file.purpose, file.status) == ("batch_output", "processed")
        assert [one.id async for one in client.batches.list()] == [batch.id]
        assert len([one async for one in client.files.list()]) == 3
        assert [one.id async for one in client.files.list(purpose="batch")] == [batch.input_file_id]


async def test_lines_are_requests_of_the_class_batch_of_their_user(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    made, token = create_token(run, "alice")
    async with fake_replica(run, "math-0.g1") as fake, served(run) as router, client_of(router, token) as client:
        await ready(router)
        await eventually(lambda: len(router.gateway.users) == 1)
        async with executing(run, router):
            batch = await ended(client, (await submitted(client, LINES)).id)
        assert batch.request_counts.completed == 6
        for headers in fake.headers:
            assert "x-priority" not in headers
            assert "x-hpc-router-on-behalf" not in headers
            assert token not in str(headers)
        records = await eventually(lambda: found if len(found := list(read_records(run, since=0))) == 6 else None)
        assert {record["user"] for record in records} == {"alice"}
        assert {record["class"] for record in records} == {"batch"}
        revoke_tokens(run, by="me", ids=[made.id])


async def test_lines_of_a_revoked_token_are_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    made, token = create_token(run, "alice")
    async with fake_replica(run, "math-0.g1") as fake, served(run) as router:
        await ready(router)
        await eventually(lambda: len(router.gateway.users) == 1)
        async with client_of(router, token) as client:
            batch = await submitted(client, LINES)
        revoke_tokens(run, by="me", ids=[made.id])
        await eventually(lambda: len(router.gateway.users) == 0)
        async with executing(run, router):
            await eventually(lambda: (run.batches / batch.id / "ended.json").exists())
        state = json.loads((run.batches / batch.id / "ended.json").read_text())
        assert (state["completed"], state["failed"]) == (0, 6)
        assert not fake.bodies


async def test_a_user_sees_only_its_own_files_and_batches(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    _, alice = create_token(run, "alice")
    _, bob = create_token(run, "bob")
    async with served(run) as router:
        await eventually(lambda: len(router.gateway.users) == 2)
        async with client_of(router, alice) as client:
            batch = await submitted(client, LINES)
        for token in (bob, router.token):
            async with client_of(router, token) as other:
                calls = (
                    other.files.retrieve(batch.input_file_id),
                    other.files.content(batch.input_file_id),
                    other.files.delete(batch.input_file_id),
                    other.batches.retrieve(batch.id),
                    other.batches.cancel(batch.id),
                    other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
                )
                for call in calls:
                    with pytest.raises(openai.NotFoundError):
                        await call
                assert [one async for one in other.files.list()] == []
                assert [one async for one in other.batches.list()] == []
        async with client_of(router, "no token") as nobody:
            with pytest.raises(openai.AuthenticationError):
                await nobody.files.create(file=("x", b"x" * 10**6), purpose="batch")
        assert len(list(run.files.iterdir())) == 1


async def test_a_file_longer_than_any_body(tmp_path: Path) -> None:
    run, content = a_run(tmp_path), b"0123456789abcdef" * 2**17
    async with served(run) as router, client_of(router) as client:
        file = await client.files.create(file=("long.jsonl", content), purpose="batch")
        assert file.bytes == len(content)
        assert (await client.files.content(file.id)).content == content
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.content(file.id)
        assert list(run.files.iterdir()) == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_limits_of_files(tmp_path: Path, chunked: bool) -> None:
    """With a length that is known, or not known, before the upload."""
    run = a_run(tmp_path)

    async def upload(router: RunningRouter, size: int) -> tuple[int, Any]:
        async def pieces(body: bytes) -> AsyncIterator[bytes]:
            for at in range(0, len(body), 1000):
                yield body[at : at + 1000]

        head = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
        head += b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        body = head + b"y" * size + b"\r\n--x--\r\n"
        headers = router.headers | {"content-type": "multipart/form-data; boundary=x"}
        data: Any = pieces(body) if chunked else body
        async with session() as s, s.post(f"{router.url}/v1/files", data=data, headers=headers) as response:
            return response.status, await response.json()

    async with served(run, max_file_mb=0.1, user_gb=0.00015) as router:
        status, value = await upload(router, 200_000)
        assert (status, value["error"]["code"]) == (413, "body_too_large")
        assert (await upload(router, 100_000))[0] == 200
        status, value = await upload(router, 100_000)
        assert (status, value["error"]["code"]) == (403, "quota_exceeded")
        assert "router.batch.user_gb" in value["error"]["message"]
        await eventually(lambda: len(list(run.files.iterdir())) == 1)


async def test_a_client_that_leaves_during_an_upload_leaves_nothing(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with served(run) as router:

        async def endless() -> AsyncIterator[bytes]:
            yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
            while True:
                yield b"y" * 10_000
                if run.files.exists() and list(run.files.iterdir()):
                    raise RuntimeError("enough")

        headers = router.headers | {"content-type": "multipart/form-data; boundary=x"}
        with pytest.raises((RuntimeError, aiohttp.ClientError)):
            async with session() as s, s.post(f"{router.url}/v1/files", data=endless(), headers=headers):
                pass
        await eventually(lambda: list(run.files.iterdir()) == [])
        await eventually(lambda: router.gateway.in_flight.count == 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"metadata": {"a": 7}}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
    ],
    ids=str,
)
async def test_a_wrong_batch_is_refused(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async with served(a_run(tmp_path)) as router, client_of(router) as client:
        file = await client.files.create(file=("in.jsonl", LINES), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **fields}
        with pytest.raises(openai.BadRequestError) as refused:
            await client.post("/batches", body=body, cast_to=object)
        assert refused.value.param == param


async def test_an_input_with_faults_fails_with_their_lines(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with served(run) as router, client_of(router) as client, executing(run, router):
        batch = await ended(client, (await submitted(client, line(0) + b"{\n" + line(2, method="GET"))).id)
        assert batch.status == "failed"
        assert [(one.line, one.code) for one in batch.errors.data] == [(2, "invalid_json_line"), (3, "invalid_method")]
        assert (batch.output_file_id, batch.error_file_id) == (None, None)


async def test_lists_have_pages(tmp_path: Path) -> None:
    async with served(a_run(tmp_path)) as router, client_of(router) as client:
        batches = [(await submitted(client, LINES)).id for _ in range(5)]
        page = await client.batches.list(limit=2)
        assert ([one.id for one in page.data], page.has_more) == (sorted(batches, reverse=True)[:2], True)
        assert [one.id async for one in client.batches.list(limit=2)] == sorted(batches, reverse=True)
        files = [one.id async for one in client.files.list(limit=2, order="asc")]
        assert files == sorted(files)
        assert len(files) == 5
        with pytest.raises(openai.BadRequestError):
            await client.batches.list(limit=1000)


async def test_paths_and_methods(tmp_path: Path) -> None:
    async with served(a_run(tmp_path)) as router, session() as s:
        for method, path, status in (
            ("PUT", "/v1/files", 405), ("POST", "/v1/batches/batch_1", 405), ("GET", "/v1/files/file-1/x", 404),
            ("GET", "/v1/files/..", 404), ("GET", "/v1/batches/batch_1", 404), ("GET", "/v1/batches/x/cancel", 405),
        ):  # fmt: skip
            async with s.request(method, router.url + path, headers=router.headers) as response:
                assert (response.status, path) == (status, path)
        async with s.get(f"{router.url}/v1/files") as response:
            assert response.status == 401


async def test_unfinished_batches_are_limited(tmp_path: Path) -> None:
    async with served(a_run(tmp_path), max_batches=1) as router, client_of(router) as client:
        first = await submitted(client, LINES)
        with pytest.raises(openai.PermissionDeniedError, match=r"max_batches"):
            await submitted(client, LINES)
        assert (await client.batches.cancel(first.id)).status == "cancelling"
