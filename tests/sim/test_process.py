"""The engine as a process, as an agent starts it."""

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import aiohttp
import pytest

from tests.sim.calls import at, chat, events, faulty, post, stream, stream_until_broken
from tests.sim.support import INSTANT_FLAGS, address, ended, spawned


async def test_it_announces_its_port_serves_and_stops_on_sigterm() -> None:
    async with spawned("--announce", "--served-model-name", "sim", "auto", *INSTANT_FLAGS) as process:
        async with aiohttp.ClientSession(await address(process)) as session:
            assert (await stream(session, chat(stream=True)))[-1] == "[DONE]"
        process.send_signal(signal.SIGTERM)
        code, errors = await ended(process)
    assert code == 0
    assert "Traceback" not in errors


async def test_ctrl_c_stops_it_without_a_traceback_and_removes_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with spawned("--announce", "--uds", str(path)) as process:
        assert await address(process) == f"unix:{path}"
        process.send_signal(signal.SIGINT)
        code, errors = await ended(process)
    assert code == 0
    assert "Traceback" not in errors
    assert not path.exists()


async def test_a_second_ctrl_c_does_not_wait_for_the_drain() -> None:
    async with (
        spawned("--announce", "--drain-s", "600", *INSTANT_FLAGS) as process,
        aiohttp.ClientSession(await address(process)) as session,
        session.post("/v1/chat/completions", json=faulty(kind="hang", at=1)),
    ):
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while b"stopping: 1 running" not in await process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert (await ended(process))[0] == 0


@pytest.mark.parametrize(("fault", "code"), [({}, -signal.SIGKILL), ({"exit_code": 7}, 7)])
async def test_it_dies_at_its_token_having_sent_all_before(fault: dict[str, object], code: int) -> None:
    async with spawned("--announce", *INSTANT_FLAGS) as process:
        async with aiohttp.ClientSession(await address(process)) as session:
            raw = await stream_until_broken(session, faulty(kind="die", at=3, **fault))
        assert await ended(process) == (code, "INFO simulated engine sim listens on " + session_url(session) + "\n")
    assert len(events(raw)) == 1 + 3


def session_url(session: aiohttp.ClientSession) -> str:
    return str(session._base_url).rstrip("/")


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("out_of_memory", "torch.OutOfMemoryError: CUDA out of memory"),
        ("kv_cache", "No available memory for the cache blocks"),
        ("weights", "Cannot find any model weights"),
        ("cuda", "CUDA error"),
    ],
)
async def test_a_load_that_fails_says_what_vllm_would(reason: str, says: str) -> None:
    async with spawned("--faults", f'[{{"kind": "load_fail", "reason": "{reason}"}}]') as process:
        code, errors = await ended(process)
    assert code == 1
    assert says in errors
    assert "simulated load failure" in errors


async def test_a_load_fails_as_many_starts_as_the_script_says(tmp_path: Path) -> None:
    counter = tmp_path / "starts"
    faults = tmp_path / "faults.json"
    faults.write_text(f'[{{"kind": "load_fail", "times": 1, "counter": "{counter}"}}]')
    async with spawned("--faults", f"@{faults}") as process:
        assert (await ended(process))[0] == 1
    async with spawned("--faults", f"@{faults}", "--announce") as process:
        assert await address(process)


async def test_sigterm_ends_it_while_it_loads() -> None:
    async with spawned("--load-s", "600", "--listen-while-loading", "--announce") as process:
        async with aiohttp.ClientSession(await address(process)) as session, session.get("/health") as response:
            assert response.status == 503
        process.send_signal(signal.SIGTERM)
        assert (await ended(process))[0] == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--port", "99999"), "--port: 99999 is not a port"),
        (("--ttft-ms", "-1"), "ttft_s: -0.001"),
        (("--uds", "/nowhere/at/all"), "the folder /nowhere/at does not exist"),
        (("--faults", '[{"kind": "dye"}]'), "did you mean 'die'"),
        (("--faults", "@/nowhere"), "cannot read /nowhere"),
    ],
)
async def test_a_value_the_user_must_edit_is_exit_code_2(flags: tuple[str, ...], says: str) -> None:
    async with spawned(*flags) as process:
        code, errors = await ended(process)
    assert code == 2
    assert says in errors


async def test_an_address_in_use_is_exit_code_1() -> None:
    async with spawned("--announce") as first:
        port = (await address(first)).rpartition(":")[2]
        async with spawned("--port", port) as second:
            code, errors = await ended(second)
    assert code == 1
    assert f"cannot listen on http://127.0.0.1:{port}" in errors


async def test_it_loads_neither_an_engine_nor_numpy() -> None:
    program = (
        "import sys, hpc_router.sim.__main__;"
        "heavy = {'torch', 'vllm', 'numpy', 'submitit', 'transformers'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors


APIS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1000},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1000},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1000},
}


async def begun(response: aiohttp.ClientResponse, tokens: int) -> bytes:
    """Reads the first part of a stream, with at least this many tokens."""
    received = b""
    while received.count(b"\n\n") < tokens + 6:
        received += await response.content.readany()
    return received


@pytest.mark.parametrize("path", APIS)
async def test_sigterm_ends_running_answers_in_good_form_as_vllm_does(path: str) -> None:
    """For streams and bodies, in each API's words. The engine then exits with status 0."""
    async with (
        spawned("--announce", "--itl-ms", "20", "--ttft-ms", "0", "--max-tokens-default", "2000") as process,
        aiohttp.ClientSession(await address(process)) as session,
    ):
        whole = asyncio.create_task(post(session, path, {"model": "sim", **APIS[path]}))
        async with session.post(path, json={"model": "sim", "stream": True, **APIS[path]}) as response:
            received = await begun(response, tokens=3)
            process.send_signal(signal.SIGTERM)
            received += await response.read()
        status, answer = await whole
        assert (await ended(process))[0] == 0
    assert status == 200
    last = events(received)[-1]
    if path == "/v1/messages":
        assert last == 'event: message_stop\ndata: {"type":"message_stop","simulated":true}'
        assert b'"delta":{"stop_reason":null' in received
        assert answer["stop_reason"] is None
    elif path == "/v1/responses":
        assert last.startswith("event: response.completed\n")
        assert answer["status"] == "completed"
    else:
        assert last == "[DONE]"
        assert received.count(b'"finish_reason":"abort"') == 1
        assert at(answer, "choices", 0, "finish_reason") == "abort"
        assert 0 < int(str(at(answer, "usage", "completion_tokens"))) < 1000


async def test_sigterm_ends_waiting_requests_too() -> None:
    async with (
        spawned("--announce", "--capacity", "1", "--itl-ms", "20", "--ttft-ms", "0") as process,
        aiohttp.ClientSession(await address(process)) as session,
        session.post("/v1/chat/completions", json=chat(stream=True, max_tokens=1000, ignore_eos=True)) as running,
    ):
        received = await begun(running, tokens=1)
        waiting = asyncio.create_task(post(session, "/v1/chat/completions", chat(max_tokens=5)))
        while 'vllm:num_requests_waiting{engine="0",model_name="sim"} 1.0' not in await metrics(session):
            pass
        process.send_signal(signal.SIGTERM)
        received += await running.read()
        _, answer = await waiting
    assert b'"finish_reason":"abort"' in received
    assert at(answer, "choices", 0, "finish_reason") == "abort"
    assert at(answer, "choices", 0, "message", "content") == ""


async def test_with_time_to_drain_running_answers_finish() -> None:
    async with (
        spawned("--announce", "--drain-s", "600", "--itl-ms", "5", "--ttft-ms", "0") as process,
        aiohttp.ClientSession(await address(process)) as session,
        session.post("/v1/chat/completions", json=chat(stream=True, max_tokens=100, ignore_eos=True)) as response,
    ):
        received = await begun(response, tokens=3)
        process.send_signal(signal.SIGTERM)
        received += await response.read()
        assert (await ended(process))[0] == 0
    assert len(events(received)) == 1 + 100 + 2
    assert b'"finish_reason":"length"' in received


async def metrics(session: aiohttp.ClientSession) -> str:
    async with session.get("/metrics") as response:
        return await response.text()
