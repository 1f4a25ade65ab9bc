"""Comparison with `vllm bench serve`: its arguments, its result, and the error when it fails."""

import asyncio
import json
import stat
from pathlib import Path

import pytest

from hpc_router.bench.agreement import FIGURES, AgreementOptions, compare, markdown
from hpc_router.bench.config import read_config
from hpc_router.bench.load.generator import LoadTarget
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.errors import LaunchError
from tests.bench.fakes import WHOLE, fake_router, responds

TOOL = """\
#!/bin/bash
echo "$@" >{folder}/arguments
cp prompts.jsonl {folder}
for word in "$@"; do [[ $before == --result-dir ]] && out=$word; before=$word; done
[[ $OPENAI_API_KEY == secret ]] && cp {folder}/given.json "$out/result.json"
"""


def options(folder: Path, script: str) -> AgreementOptions:
    tool = folder / "python"
    tool.write_text(script.format(folder=folder))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return AgreementOptions(vllm=str(tool), tokenizer=folder, out=folder, rounds=2)


CONFIG = read_config({"users": [2], "requests": 6, "warmup_s": 0, "model": "math", "max_tokens": 4})
PROMPTS = [BenchPrompt("one"), BenchPrompt("two")]


async def test_both_tools_send_the_same_and_are_compared(tmp_path: Path) -> None:
    (tmp_path / "given.json").write_text(json.dumps(dict.fromkeys(FIGURES.values(), 2.0) | {"failed": 0}))
    async with fake_router(*[responds(*WHOLE)] * 50) as fake:
        target = LoadTarget(fake.url, "secret")
        found = await asyncio.to_thread(compare, target, CONFIG, PROMPTS, options(tmp_path, TOOL))
    arguments = (tmp_path / "arguments").read_text()
    assert f"--base-url {fake.url} --endpoint /v1/chat/completions --model math" in arguments
    assert "--num-prompts 6 --max-concurrency 2" in arguments
    assert "secret" not in arguments
    assert [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()] == [
        "one", "two", "one", "two", "one", "two",
    ]  # fmt: skip
    assert found.theirs["TTFT p50 ms"] == [2.0, 2.0]
    assert len(found.ours["E2E p50 ms"]) == 2
    assert found.ours["requests that failed"] == [0.0, 0.0]
    origin = {"at": "now", "command": "this", "hardware": {"cpu": "one", "cpus": 2}, "vllm": "1"}
    text = markdown(found, config=CONFIG, origin=origin)
    assert "| TTFT p50 ms |" in text
    assert text.count("| - |") == 1, "no ratio to no failures"


async def test_the_error_quotes_the_tool(tmp_path: Path) -> None:
    broken = "#!/bin/bash\necho no such flag >&2\nexit 2\n"
    async with fake_router(*[responds(*WHOLE)] * 50) as fake:
        target = LoadTarget(fake.url, "secret")
        with pytest.raises(LaunchError, match="no such flag"):
            await asyncio.to_thread(compare, target, CONFIG, PROMPTS, options(tmp_path, broken))
