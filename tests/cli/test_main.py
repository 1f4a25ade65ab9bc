"""The command line: help, wrong arguments, missing runs and exit statuses. Nothing is deployed."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import IO, Any

import pytest

from hpc_router.cli import INTERRUPTED
from hpc_router.cli.deployment import print_usage
from hpc_router.cli.main import VERBS, main
from hpc_router.cluster.commands.scale import parse_counts
from hpc_router.cluster.commands.set import change, parse_settings
from hpc_router.errors import ConfigError
from hpc_router.net import protocol
from hpc_router.state.job_records import Exit, FailureReason, JobDir, JobInfo
from hpc_router.state.log_file import rotated_path
from hpc_router.state.registry import RegistryReader
from hpc_router.state.run_directory import make_run, open_run
from tests.support.needs import ROOT


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPC_ROUTER_RUN", raising=False)
    return tmp_path


class Output:
    """Exit status and output of one call."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        try:
            self.status = main(list(words))
        except SystemExit as end:  # argparse
            self.status = int(end.code or 0)
        self.out, self.err = capsys.readouterr()


def test_help_lists_all_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(capsys, "--help")
    assert output.status == 0
    assert all(f"    {verb}" in output.out for verb in VERBS)


PRESSED = """\
import importlib.abc, os, runpy, signal, sys

class Press(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
sys.argv = ["hpc-router", "status"]
{start}
"""
STARTS = {
    "the command": 'from importlib.metadata import EntryPoint\nsys.exit(EntryPoint("", {entry!r}, "").load()())',
    "the module": 'runpy.run_module("hpc_router.cli", run_name="__main__")',
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("module", ["hpc_router.cli.main", "hpc_router.cli.parser", "hpc_router.state.registry"])
def test_ctrl_c_while_modules_are_imported_prints_one_line(start: str, module: str) -> None:
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["hpc-router"]
    program = PRESSED.format(module=module, start=start.format(entry=entry))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "", "hpc-router: interrupted\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = Output(capsys, verb, "--help")
    assert said.status == 0
    assert f"hpc-router {verb}" in said.out.partition("examples:")[2] or verb in ("url", "token")
    assert "--run DIR" in said.out or verb in ("bench", "classify", "nodes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: VERB"),
        (["nope"], "invalid choice: 'nope'"),
        (["up", "--nope"], "unknown argument: --nope"),
        (["status", "extra"], "unknown argument: extra"),
        (["logs", "-n", "x"], "'x' is not a whole number"),
        (["logs", "-n", "9" * 5000], "is not a whole number"),
        (["logs", "-n", "\N{ARABIC-INDIC DIGIT THREE}"], "is not a whole number"),
        (["url", "--port", "65536"], "'65536' is not a port (valid: 1 to 65535)"),
        (["classify", "pack", "a", "b", "--limit", "nan"], "'nan' is not a number"),
        (["classify", "pack", "a", "b", "--capacity", "x=inf"], "'inf' is not a number"),
        (["bench", "router", "--rate", "inf"], "'inf' is not a number"),
        (["bench", "soak", "--seconds", "nan"], "'nan' is not a number"),
        (["plan", "experts.math.replicas=1000000000"], "valid: 0 to 1024"),
        (["plan", "router.hold_mb=inf"], "valid: 1e-06 to 4096"),
        (["status"], "there is no run directory runs/latest"),
        (["down", "--run", "nope"], "there is no run directory nope"),
        (["plan", "topology=nope"], "topology=nope: no such config"),
        (["plan", "--config-dir", "nope"], "--config-dir nope: no such folder"),
        (["plan", "router.prot=1", "--json"], "did you mean 'port'?"),
        (["up", "--wait", "all", "router.port=x"], "'x' is not a whole number"),
        (["unregister"], "needs a REPLICA or --expert"),
        (["bench"], "required: BENCHMARK"),
        (["classify"], "required: TASK"),
        (["classify", "assign", "a", "x"], "is not CLUSTER=EXPERT"),
        (["bench", "router", "--streams", "5000"], "--streams 5000: between 1 and 4000"),
        (["bench", "router", "--only", "ngnix"], "did you mean 'nginx'?"),
        (["bench", "router", "--tree", "old"], "'old' is not NAME=DIR"),
        (["bench", "router", "--tree", f"nginx={ROOT}"], "there is a relay of that name"),
        (["bench", "router", "--tree", "old=nope"], "no checkout of hpc-router"),
        (["bench", "router", "--rate", "fast"], "'fast' is not a number"),
        (["register", "--run", "new", "--expert", "auto", "--url", "http://h:1"], "cannot name an expert"),
        (
            ["register", "--run", "new", "--expert", "m", "--url", "http://h:1", "--probe-path", "x y"],
            "--probe-path 'x y'",
        ),
        (["register", "--run", "new", "--expert", "m", "--url", "h:1"], "not an endpoint's address"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h:1\r"], "contains '\\r' at position 10"),
        (["register", "--run", "new", "--expert", "m", "--url", " http://h:1"], "contains ' ' at position 0"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h :1"], "contains ' ' at position 8"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h\\v1"], r"contains '\\' at position 8"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://a..b/v1"], "not an endpoint's address"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h\u200b"], "not an endpoint's address"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://999.1.1.1"], "not an endpoint's address"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h{x}/v1"], "not an endpoint's address"),
        (["unregister", "--run", "new", "--expert", "m", "--url", "http://h:1\n"], "no run directory"),
        (["register", "--run", "new", "--expert", "m\r", "--url", "http://h:1"], "--expert 'm\\r': cannot name"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h:1", "--model", "m\r"], "--model 'm\\r'"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h:1", "--model", " m"], "--model ' m'"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h:1", "--model", ""], "--model ''"),
        (
            ["plan", "experts.math.engine.options.faults=[{kind: x}]"],
            "options.faults[0]: unknown kind",
        ),
        (
            ["plan", "experts.math.engine.options.roofline={gpu: h1}"],
            "experts.math.engine.options.roofline.gpu=h1",
        ),
        (["register", "--run", "new", "--expert", "m", "--url", "http://u:p@h:1"], "not an endpoint's address"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h:99999"], "not an endpoint's address"),
        (["register", "--run", "new", "--expert", "m", "--url", "http://h", "--token-file", "no"], "cannot be read"),
    ],
)
def test_invalid_input_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    """Nothing is created."""
    output = Output(capsys, *words)
    assert output.status == 2
    assert message in output.err
    assert output.err.startswith("hpc-router: ")
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("words", [["url"], ["route", "hi"], ["chat", "hi"]])
def test_without_a_router_a_verb_fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("run"))
    output = Output(capsys, words[0], "--run", "run", *words[1:])
    assert output.status == 1
    assert "no router serves" in output.err


def test_an_empty_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Every verb that only reads answers, and `down` succeeds."""
    make_run(Path("run"))
    for verb in ("status", "logs", "why", "reconcile", "down"):
        assert Output(capsys, verb, "--run", "run").status == 0, verb
    assert Output(capsys, "logs", "--run", "run", "math").status == 2
    assert Output(capsys, "why", "--run", "run", "math").status == 2


def test_the_token_is_printed_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(Path("run"))
    assert Output(capsys, "token", "--run", "run").out == run.token() + "\n"
    monkeypatch.setenv("HPC_ROUTER_RUN", "run")
    assert Output(capsys, "token").out == run.token() + "\n"


CURL = """#!/bin/sh
echo "$@" >argv
while [ $# -gt 1 ]; do
  [ "$1" = -H ] && [ "${2#@}" != "$2" ] && cat "${2#@}" >headers
  shift
done
"""


def _in_bash(line: str, folder: Path, *, verbs: str) -> tuple[str, str]:
    """Runs the line in bash. Returns the arguments that curl got, and the contents of the files with headers. `verbs`:
    shell code in place of hpc-router."""
    programs = folder / "programs"
    programs.mkdir()
    for name, body in {"curl": CURL, "hpc-router": f"#!/bin/sh\n{verbs}\n"}.items():
        (programs / name).write_text(body)
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", line], cwd=folder, env=environment, check=True)
    return (folder / "argv").read_text(), (folder / "headers").read_text()


def test_the_example_of_token_hides_the_token(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every user of a node can read the arguments of all processes."""
    example = Output(capsys, "token", "--help").out.partition("examples:\n")[2]
    argv, headers = _in_bash(example, tmp_path, verbs='case "$1" in url) echo http://h:1;; *) echo hunter2; esac')
    assert headers == "Authorization: Bearer hunter2\n"
    assert "hunter2" not in argv
    assert argv.endswith("http://h:1/v1/models\n")


def test_the_output_of_up_hides_the_token(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run")
    print_usage(run, "http://h:1")
    output = capsys.readouterr().out
    curl = output[output.index("  curl") : output.index("  OPENAI_BASE_URL")]
    argv, headers = _in_bash(curl, tmp_path, verbs='[ "$1 $2 $3" = "token --run my run" ] && echo hunter2')
    assert headers == "Authorization: Bearer hunter2\n"
    assert "hunter2" not in argv
    assert "http://h:1/v1/chat/completions" in argv


def test_plan_creates_nothing(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    output = Output(capsys, "plan", "topology=sim", "experts.math.replicas=2", "--json")
    value = json.loads(output.out)
    assert [r["replica"] for r in value["replicas"] if r["expert"] == "math"] == ["math-0.g1", "math-1.g1"]
    assert value["replicas"][0]["replica"] == "router-0.g1"
    text = Output(capsys, "plan", "topology=sim").out
    assert "--served-model-name law auto" in text
    assert list(elsewhere.iterdir()) == []


def test_overrides_may_stand_between_options(capsys: pytest.CaptureFixture[str]) -> None:
    value = json.loads(Output(capsys, "plan", "topology=sim", "--json", "experts.law.replicas=0", "~experts.code").out)
    assert {r["expert"] for r in value["replicas"]} == {None, "math", "medicine", "generalist"}


def test_logs_of_a_job_that_never_began(capsys: pytest.CaptureFixture[str]) -> None:
    """Only submitit's own output exists. `-n` limits its lines."""
    job = JobDir(make_run(Path("run")), "math-0.g1")
    job.claim()
    (job.path / "12_0_log.err").write_text("one\ntwo\nthree\n")
    assert Output(capsys, "logs", "--run", "run", "math", "-n", "2").out == "math-0.g1 | two\nmath-0.g1 | three\n"


LOGS = [sys.executable, "-m", "hpc_router.cli", "logs", "--run", "run"]


@contextmanager
def followed_job(folder: Path) -> Iterator[tuple[JobDir, IO[str]]]:
    """A job whose agent has logged one line, and the further output of `logs -f`."""
    job = JobDir(make_run(folder / "run"), "math-0.g1")
    job.claim()
    job.agent_log.write_text("before\n")
    with subprocess.Popen([*LOGS, "-f"], stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "math-0.g1 | before\n"
        yield job, follower.stdout
        follower.terminate()


def test_logs_follow(elsewhere: Path) -> None:
    """New lines are printed, also of files that are created later. Half a line is printed once it is complete."""
    with followed_job(elsewhere) as (job, lines):
        with job.agent_log.open("a") as log:
            log.write("after\nhal")
            log.flush()
            assert lines.readline() == "math-0.g1 | after\n"
            log.write("f\n")
        assert lines.readline() == "math-0.g1 | half\n"
        job.engine_log.write_text("engine\n")
        assert lines.readline() == "math-0.g1 | engine\n"


def test_logs_continue_after_a_rotation(elsewhere: Path) -> None:
    """The end of the older file comes before the newer one; `logs` reads both."""
    with followed_job(elsewhere) as (job, lines):
        with job.agent_log.open("a") as log:
            log.write("last\nlines\n")
        job.agent_log.replace(rotated_path(job.agent_log))
        job.agent_log.write_text("first\n")
        assert [lines.readline() for _ in range(3)] == [f"math-0.g1 | {line}\n" for line in ("last", "lines", "first")]
    shown = subprocess.run(LOGS, stdout=subprocess.PIPE, text=True, check=True)
    assert shown.stdout == "".join(f"math-0.g1 | {line}\n" for line in ("before", "last", "lines", "first"))


def test_logs_of_a_router_are_those_of_all_its_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """Each process writes a file of its own."""
    job = JobDir(make_run(Path("run")), "router-0.g1")
    job.claim()
    job.agent_log.write_text("control\n")
    job.worker_log(0).write_text("worker\n")
    job.reconcile_log.write_text("loop\n")
    output = "router-0.g1 | control\nrouter-0.g1 | worker\nreconcile | loop\n"
    assert Output(capsys, "logs", "--run", "run", "router").out == output
    assert Output(capsys, "logs", "--run", "run").out == output


def test_why_of_a_failed_job(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(Path("run"))
    run.config.write_text(
        "experts: {math: {model: m, engine: {kind: sim}}}\npolicy: {kind: model_field}\ncluster: {max_failures: 1}\n"
    )
    job = JobDir(run, "math-0.g1")
    job.claim()
    job.write(JobInfo(job_id="1", host=os.uname().nodename, start_ticks=-1))
    job.write(Exit(ok=False, reason=FailureReason.OUT_OF_MEMORY, message="CUDA out of memory"))
    job.engine_log.write_text("loading\nCUDA out of memory\n")
    output = Output(capsys, "why", "--run", "run", "math")
    assert "math-0.g1  failed" in output.out
    assert "out_of_memory: CUDA out of memory" in output.out
    assert "| loading" in output.out
    assert "do: give it more memory" in output.out
    status = json.loads(Output(capsys, "status", "--run", "run", "--json").out)
    assert (
        status["experts"]["math"]["replicas"][0] | {"state": "failed", "reason": "out_of_memory"}
        == (status["experts"]["math"]["replicas"][0])
    )


@contextmanager
def endpoint(body: Any, *, status: int = 200, token: str | None = None, path: str = "/v1/models") -> Iterator[str]:
    """A server that sends this body at `path`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = token is None or self.headers.get("authorization") == f"Bearer {token}"
            content = json.dumps(body).encode()
            self.send_response(status if allowed and self.path == path else 401)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def models(*names: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name} for name in names]}


def record(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    output = Output(capsys, "register", "--run", "run", "--json", *words)
    assert output.status == 0, output.err
    value: dict[str, Any] = json.loads(output.out)
    assert value == json.loads((Path("run") / "registry" / f"{value['replica']}.json").read_text())
    return value


@pytest.mark.parametrize("base", ["/v1beta/openai", "/api/paas/v4", "/proxy/v1", "/models", "/v1/v1", "/responses/api"])
def test_register_uses_an_address_with_a_path_as_written(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(models("big-70b"), path=f"{base}/models") as url:
        value = record(capsys, "--expert", "big", "--url", f"{url}{base}/")
        assert (value["url"], value["serves"]) == (url + base, {"big": "big-70b"})
        assert record(capsys, "--expert", "big", "--url", url + base)["replica"] == value["replica"]
    assert Output(capsys, "unregister", "--run", "run", "--expert", "big", "--url", url).status == 2
    assert Output(capsys, "unregister", "--run", "run", "--expert", "big", "--url", url + base).out == "big-x0.g1\n"


@pytest.mark.parametrize(
    ("url", "base"),
    [
        *((f"http://h:1{path}", "http://h:1/v1") for path in (*protocol.POST_PATHS, protocol.MODELS)),
        ("http://h:1/v1/responses/resp_1", "http://h:1/v1"),
        ("http://h:1/v1//responses/resp_1/cancel/", "http://h:1/v1"),
        ("https://h/openai/v1/rerank", "https://h/openai/v1"),
        ("https://h/openai/v1/score", "https://h/openai/v1"),
        ("https://h/openai/tokenize", "https://h/openai"),
        ("https://h/v1beta/openai/chat/completions/", "https://h/v1beta/openai"),
        ("https://h/api/paas/v4//chat/completions", "https://h/api/paas/v4"),
        ("https://h/v1beta/openai/models", "https://h/v1beta/openai"),
        ("https://h/openai/chat/completions?api-version=1", "https://h/openai"),
        ("https://h/chat/completions", "https://h/v1"),
    ],
)
@pytest.mark.parametrize("verb", ["register", "unregister"])
def test_an_operations_address_is_refused_with_its_base(
    verb: str, url: str, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record(capsys, "--expert", "big", "--url", "http://h:1", "--model", "m")
    output = Output(capsys, verb, "--run", "run", "--expert", "big", "--url", url)
    assert (output.status, output.out) == (2, "")
    assert output.err.rstrip().endswith(f"(use: --url {base})")


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_register_creates_a_run_and_asks_for_the_model(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(models("big-70b")) as url:
        value = record(capsys, "--expert", "big", "--url", url + suffix)
    assert (value["replica"], value["url"], value["kind"]) == ("big-x0.g1", url, "external")
    assert value["serves"] == {"big": "big-70b"}
    assert [value[key] for key in ("beat", "nonce", "expires_at")] == [None, None, None]
    open_run(Path("run"))


def test_register_again_updates_and_another_address_adds(capsys: pytest.CaptureFixture[str]) -> None:
    first = ["--expert", "big", "--url", "http://127.0.0.1:1"]
    assert record(capsys, *first, "--model", "a")["replica"] == "big-x0.g1"
    again = record(capsys, *first, "--model", "b")
    assert (again["replica"], again["serves"]) == ("big-x0.g1", {"big": "b"})
    assert record(capsys, "--expert", "big", "--url", "http://127.0.0.1:2", "--model", "a")["replica"] == "big-x1.g1"
    assert record(capsys, "--expert", "law", "--url", "http://127.0.0.1:1", "--model", "a")["replica"] == "law-x0.g1"
    assert Output(capsys, "unregister", "--run", "run", "--expert", "big").out == "big-x0.g1\nbig-x1.g1\n"
    assert Output(capsys, "unregister", "--run", "run", "big-x0").status == 2
    assert Output(capsys, "unregister", "--run", "run", "law-x0").out == "law-x0.g1\n"


def test_register_with_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    """The token is kept in a file of its own, is replaced by a newer one, and is removed with the endpoint. The record
    never contains it."""
    Path("f").write_text("hunter2\n")
    with endpoint(models("m"), token="hunter2") as url:
        value = record(capsys, "--expert", "big", "--url", url, "--token-file", "f")
        assert value["serves"] == {"big": "m"}
        assert "hunter2" not in json.dumps(value)
        run = open_run(Path("run"))
        assert run.external_token("big-x0.g1") == "hunter2"
        Path("f").write_text("hunter3")
        output = Output(capsys, "register", "--run", "run", "--expert", "big", "--url", url, "--token-file", "f")
        assert "401" in output.err
        assert run.external_token("big-x0.g1") == "hunter3"
    Output(capsys, "unregister", "--run", "run", "big-x0")
    assert run.external_token("big-x0.g1") is None


@pytest.mark.parametrize(
    ("words", "probe"), [([], "/v1/models"), (["--probe-path", "/health"], "/health"), (["--no-probe"], None)]
)
def test_register_sets_the_probe(words: list[str], probe: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    url = ["--expert", "big", "--url", "http://127.0.0.1:1", "--model", "m"]
    assert record(capsys, *url, *words)["probe"] == probe
    assert RegistryReader(Path("run/registry")).snapshot()["big-x0.g1"].probe == probe


def test_register_an_endpoint_with_several_models(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    with endpoint(models("a", "b")) as url:
        output = Output(capsys, "register", "--run", "run", "--expert", "big", "--url", url)
    assert output.status == 2
    assert "--model (valid: a, b)" in output.err
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(("body", "status"), [({"data": 3}, 200), ([], 200), ("x", 200), (models("a"), 500)])
def test_register_an_endpoint_without_a_model_list(body: Any, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning; the router will ask again."""
    with endpoint(body, status=status) as url:
        output = Output(capsys, "register", "--run", "run", "--expert", "big", "--url", url)
    assert output.status == 0
    assert "warning" in output.err
    assert "model not known yet" in output.out


def test_register_an_endpoint_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(capsys, "register", "--run", "run", "--expert", "big", "--url", "http://127.0.0.1:1")
    assert output.status == 0
    assert "does not answer now" in output.err
    status = json.loads(Output(capsys, "status", "--run", "run", "--json").out)
    assert [r["state"] for r in status["experts"]["big"]["replicas"]] == ["registered"]


def test_a_closed_pipe_is_not_an_error() -> None:
    """`| head -1` closes the pipe early."""
    command = f"{sys.executable} -m hpc_router.cli plan topology=sim --json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


@pytest.mark.parametrize(
    ("module", "words", "status", "output"),
    [
        ("deploy", ["topology=nope"], 2, "topology=nope: no such config"),
        ("deploy", ["wait=some"], 2, "wait=some: not known"),
        ("deploy", ["--config-name", "x"], 2, "--config-name is not taken here"),
        ("deploy", ["--cfg", "job", "topology=sim", "router.port=8000"], 0, "port: 8000"),
        ("deploy", ["topology=sim", "--config-dir", "nope"], 2, "--config-dir nope: no such folder"),
        ("deploy", ["--help"], 0, "topology:"),
        ("router", ["router.port=0"], 2, "run=... is missing"),
        ("router", ["run=run", "router.workers=0"], 2, "router.workers=0"),
        ("router", ["run=run", "policy=classifier"], 2, "policy.artefact=DIR"),
        ("expert", ["run=run", "name=mth"], 2, "did you mean 'math'?"),
        ("expert", ["run=run", "name=math", "experts.math.modl=x"], 2, "did you mean 'model'?"),
    ],
)
def test_entry_points_have_hydras_flags_and_our_errors(
    module: str, words: list[str], status: int, output: str, elsewhere: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, output in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr
    assert not (elsewhere / "outputs").exists()
    assert not (elsewhere / ".hydra").exists()


def test_a_sweep_runs_each_job_with_its_own_overrides() -> None:
    """Hydra's `-m`: each job is composed by our own code, has our errors, and the worst exit status counts."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.deploy", "-m", "wait=some,none"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "wait=some: not known" in done.stderr
    assert "wait=none: not known" in done.stderr


@pytest.mark.parametrize(
    "word", ["math=99999999999999999999", "math=-1", "math=\N{ARABIC-INDIC DIGIT THREE}", "math=", "=3"]
)
def test_a_count_is_a_plain_number(word: str) -> None:
    with pytest.raises(ConfigError, match=r"is not EXPERT=N"):
        parse_counts([word])


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (parse_counts, ["math=2", "law=1", "math=3"]),
        (parse_settings, ["router.hold_mb=4", "router.hold_mb="]),
    ],
)
def test_a_name_given_twice_is_refused(parse: Callable[[list[str]], object], words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"'{words[0].partition('=')[0]}' is given twice"):
        parse(words)


def test_an_option_that_names_something_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", "assign", "artefact", "0=math", "0=law"]) == 2
    assert "assign: '0' is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "output"),
    [
        ("router.hold_mb=inf", "router.hold_mb=inf: out of range"),
        ("router.hold_mb=nan", "router.hold_mb=nan: out of range"),
        ("router.max_in_flight=1e400", "'1e400' is not a whole number"),
        ("router.max_in_flight=" + "9" * 5000, "is not a whole number"),
        ("router.max_in_flight=2000000000000000000", "out of range (valid: 1 to 1000000)"),
        ("router.ping_s=0", "router.ping_s=0: out of range (valid: 0.001 to 86400)"),
        ("policy.margin=inf", "policy.margin=inf: out of range"),
        (
            "router.port=1",
            "router.port: `hpc-router apply router.port=VALUE` changes it, and replaces the jobs that use it",
        ),
        ("cluster.warn_s=9", "`hpc-router apply cluster.warn_s=VALUE`"),
        ("experts.math.engine.python=x", "`hpc-router apply experts.math.engine.python=VALUE`"),
        ("experts.math.replicas=3", "`hpc-router scale math=N` changes the number of replicas"),
        ("router.pings=9", "did you mean 'router.ping_s'?"),
        ("policy.name=x", "'policy.name' is not a key of the config; did you mean 'policy.kind'?"),
        ("router.pings=9", "'router.pings' is not a key of the config; did you mean 'router.ping_s'?"),
        ("cluster.warm_s=9", "'cluster.warm_s' is not a key of the config (keys that can be set: "),
    ],
)
def test_a_setting_has_a_range(tmp_path: Path, word: str, output: str) -> None:
    """A refused value is not written."""
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError) as refused:
        change(run, *parse_settings([word]))
    assert output in str(refused.value)
    assert not run.desired.exists()


def test_settings_are_kept_as_their_fields_hold_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    words = ["router.hold_mb=4", "policy.kind=model_field", "router.max_in_flight='5'", "policy.margin=0.050"]
    kept = {"router.hold_mb": 4.0, "policy.kind": "model_field", "router.max_in_flight": 5, "policy.margin": 0.05}
    assert change(run, *parse_settings(words)) == kept
    assert run.read_desired()["settings"] == kept
    assert change(run, *parse_settings(["policy.margin=null", "router.hold_mb="])) == {
        "policy.kind": "model_field", "router.max_in_flight": 5, "policy.margin": None,
    }  # fmt: skip
