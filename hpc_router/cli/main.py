"""`hpc-router`: each verb is one function of `cluster`, called and printed here.

Data goes to stdout, everything else to stderr. Failures described in words are one line without a traceback; the exit
status is 0 done, 1 failed, 2 a value to edit, 130 interrupted. Modules are loaded by the verb that needs them.
"""

import argparse
import asyncio
import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hpc_router.cli.parser import parse_arguments
from hpc_router.errors import ConfigError, HpcRouterError, LaunchError
from hpc_router.state.run_directory import RunDir, find_run, make_run

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

INTERRUPTED: Final = 130
WIDE: Final = 240
"""Columns where the output is no terminal: nothing is folded then."""


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # `logs -f | grep` waits for lines, not for blocks
    logging.basicConfig(level=logging.WARNING, format="hpc-router: %(message)s")
    return told(lambda: VERBS[arguments.verb](arguments))


def told(verb: Callable[[], int]) -> int:
    """Its exit status, with every expected failure told in a line."""
    try:
        status = verb()
        sys.stdout.flush()
    except HpcRouterError as error:
        sys.stderr.writelines(f"hpc-router: {line}\n" for line in str(error).splitlines())
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        sys.stderr.write(f"hpc-router: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("hpc-router: interrupted\n")
        return INTERRUPTED
    return status


def plan(arguments: argparse.Namespace) -> int:
    from hpc_router.cli.tables import plan_text
    from hpc_router.cluster.control_loop.desired_state import desired_of, scaled
    from hpc_router.cluster.planning.plan import make_plan
    from hpc_router.cluster.planning.run_target import find_target

    target = find_target(arguments.run, arguments.overrides, config_dir=arguments.config_dir)
    deployment = target.deployment
    if arguments.run is not None and target.run is not None:
        deployment = scaled(deployment, desired_of(target.run, deployment))
    made = make_plan(deployment, run=target.run, ask_engines=not arguments.no_ask)
    return _print(made.to_json() if arguments.json else plan_text(made), fold=False)


def up(arguments: argparse.Namespace) -> int:
    return run_up(arguments.run, arguments.overrides, config_dir=arguments.config_dir, wait_all=arguments.wait == "all")


def run_up(given: Path | None, overrides: list[str], *, config_dir: Path | None, wait_all: bool) -> int:
    """Also the body of `launch.deploy`."""
    from hpc_router.cli.tables import UpProgress
    from hpc_router.cluster.commands.up import Interrupted, Served
    from hpc_router.cluster.commands.up import up as bring_up
    from hpc_router.cluster.planning.run_target import find_target

    target = find_target(given, overrides, config_dir=config_dir)
    try:
        with UpProgress(_stderr()) as progress:
            served: Served = bring_up(target, wait_all=wait_all, reporter=progress)
    except Interrupted:
        sys.stderr.write("hpc-router: interrupted; what this `up` began has been ended\n")
        return INTERRUPTED
    _say_how(served.run, served.url)
    if served.failed:
        names = ", ".join(view.replica for view in served.failed)
        sys.stderr.write(f"hpc-router: {names} failed; the others serve. `hpc-router why` shows the reason\n")
    return 1 if served.failed and wait_all else 0


def _say_how(run: RunDir, url: str) -> None:
    import shlex

    name = shlex.quote(os.path.relpath(run.path) if run.path.is_relative_to(Path.cwd()) else str(run.path))
    print(f"serving at {url}/v1  (model: auto, or an expert's name)\n")
    print(f'  hpc-router chat --run {name} "Is 91 a prime?"')
    print(f"  curl --noproxy '*' {url}/v1/chat/completions -H 'Content-Type: application/json' \\")
    # bash; the token on curl's own command line could be read by everybody on the node
    print(f"""    -H @<(printf 'Authorization: Bearer %s\\n' "$(hpc-router token --run {name})") \\""")
    print("""    -d '{"model": "auto", "messages": [{"role": "user", "content": "Is 91 a prime?"}]}'""")
    print(f"  OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=$(hpc-router token --run {name}) python your_program.py")
    print(f"  hpc-router down --run {name}")


def down(arguments: argparse.Namespace) -> int:
    from hpc_router.cli.tables import UpProgress
    from hpc_router.cluster.commands.down import down as take_down

    run = find_run(arguments.run)
    with UpProgress(_stderr()) as progress:
        ended = take_down(run, watcher=progress)
    print(
        f"{run.path} is down; {ended} job{'' if ended == 1 else 's'} ended" if ended else f"nothing ran in {run.path}"
    )
    return 0


def status(arguments: argparse.Namespace) -> int:
    from hpc_router.cli.tables import status_text
    from hpc_router.cluster.commands.status import status as status_of

    value = status_of(find_run(arguments.run))
    return _print(value if arguments.json else status_text(value))


def logs(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.commands.logs import ends, follow, log_files, tail
    from hpc_router.cluster.control_loop.desired_state import with_jobs

    run = find_run(arguments.run)
    name = None if arguments.name is None else with_jobs(run, arguments.name)
    files = log_files(run, name)
    shown = ends(files)
    for replica, paths in files.items():
        for path in paths:
            for line in tail(path, arguments.lines):
                print(f"{replica} | {line}")
    if arguments.follow:
        for replica, line in follow(run, name, since=shown):
            print(f"{replica} | {line}", flush=True)
    return 0


def why(arguments: argparse.Namespace) -> int:
    from hpc_router.cli.tables import why_text
    from hpc_router.cluster.commands.why import why as why_of

    causes = why_of(find_run(arguments.run), arguments.name)
    return _print([cause.to_json() for cause in causes] if arguments.json else why_text(causes))


def route(arguments: argparse.Namespace) -> int:
    from hpc_router.cli.tables import route_text
    from hpc_router.cluster.commands.router_access import router_access
    from hpc_router.net.http_client import Unreachable, call_blocking

    access = router_access(find_run(arguments.run))
    try:
        answer = call_blocking("POST", f"{access.url}/route", token=access.token, body={"prompt": arguments.prompt})
    except Unreachable as error:
        raise LaunchError(f"the router does not answer at {access.url}: {error}") from error
    if answer.status != 200:
        raise LaunchError(f"the router refused the request: {answer.message}")
    return _print(answer.body if arguments.json else route_text(answer.body))


def chat(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.commands.router_access import router_access

    run = find_run(arguments.run)
    prompt = arguments.prompt if arguments.prompt is not None or sys.stdin.isatty() else sys.stdin.read()
    messages: list[dict[str, str]] = []

    def turn(text: str) -> None:
        messages.append({"role": "user", "content": text})
        access = router_access(run)  # each time: the router may have moved, and its old port be a stranger's
        messages.append({"role": "assistant", "content": asyncio.run(_answer(access, messages, arguments.model))})

    if prompt is not None:
        turn(prompt)
        return 0
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            print()
            return 0
        if text:
            try:
                turn(text)
            except HpcRouterError as error:
                del messages[-1]
                sys.stderr.write(f"hpc-router: {error}\n")


async def _answer(access: Any, messages: list[dict[str, str]], model: str) -> str:
    from hpc_router.cluster.commands.chat import Head
    from hpc_router.cluster.commands.chat import chat as converse

    said = ""
    async with contextlib.aclosing(converse(access, messages, model=model)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Head):
                sys.stderr.write(f"[{piece.expert}, {piece.reason}, {piece.replica}]\n")
            else:
                said += piece
                print(piece, end="", flush=True)
    print()
    return said


def url(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.commands.router_access import router_access
    from hpc_router.cluster.commands.tunnel import tunnel_to

    run = find_run(arguments.run)
    if not arguments.ssh and not arguments.json:
        return _print_lines([router_access(run).url])
    tunnel = tunnel_to(run, port=arguments.port, unproven=arguments.ssh)
    if arguments.json:
        return _print({"url": tunnel.url, "ssh": list(tunnel.argv), "proven": tunnel.unproven is None})
    sys.stderr.writelines(f"{note}\n" for note in tunnel.notes())
    return _print_lines([tunnel.line])


def token(arguments: argparse.Namespace) -> int:
    print(find_run(arguments.run).token())
    return 0


def scale(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.commands.scale import parse_counts
    from hpc_router.cluster.commands.scale import scale as change

    wanted, warnings = change(find_run(arguments.run), parse_counts(arguments.counts))
    _warn(warnings)
    return _print(dict(wanted)) if arguments.json else _print_lines(f"{name}={n}" for name, n in wanted.items())


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        sys.stderr.write(f"hpc-router: warning: {warning}\n")


def set_(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.commands.set import change, parse_settings

    settings = change(find_run(arguments.run), *parse_settings(arguments.settings))
    return _print(settings) if arguments.json else _print_lines(f"{key}={value}" for key, value in settings.items())


def drain(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.commands.drain import retire, wait
    from hpc_router.cluster.control_loop.desired_state import include_nodes
    from hpc_router.cluster.control_loop.loop import ControlLoop

    control = ControlLoop(find_run(arguments.run))
    if arguments.undo:
        include_nodes(control.run, arguments.names)
        return 0
    retired = retire(control, arguments.names)
    if not retired.replicas:
        raise LaunchError(f"nothing of {', '.join(arguments.names)} runs; `hpc-router status` shows the jobs that do")
    if not arguments.json:
        _print_lines(retired.lines())
    _warn(retired.warnings)
    if arguments.wait:
        retired = wait(control, retired)
    elif retired.needs_reconcile(control.run):
        sys.stderr.write("hpc-router: no router will replace what ends; `hpc-router reconcile` does\n")
    if arguments.json:
        _print(retired.to_json())
    if retired.left:
        raise LaunchError(f"{', '.join(retired.left)} did not end; `hpc-router why` may show the reason")
    return 0


def register(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.commands.register import examine, read_token
    from hpc_router.cluster.commands.register import register as join

    given = read_token(arguments.token_file) if arguments.token_file is not None else None
    endpoint = examine(
        expert=arguments.expert, url=arguments.url, model=arguments.model, token=given, probe=arguments.probe_path
    )
    named = arguments.run or (Path(os.environ["HPC_ROUTER_RUN"]) if "HPC_ROUTER_RUN" in os.environ else None)
    run = make_run(named) if named is not None and not named.exists() else find_run(arguments.run)
    record = join(run, endpoint)
    if endpoint.warning:
        sys.stderr.write(f"hpc-router: warning: {endpoint.warning}\n")
    if arguments.json:
        return _print(record.to_json())
    return _print_lines([f"{record.replica} {record.url} model {endpoint.model or 'not known yet'}"])


def unregister(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.commands.register import unregister as leave

    if arguments.replica is None and arguments.expert is None:
        raise ConfigError("unregister needs a REPLICA or --expert NAME")
    run = find_run(arguments.run)
    return _print_lines(leave(run, replica=arguments.replica, expert=arguments.expert, url=arguments.url))


def reconcile(arguments: argparse.Namespace) -> int:
    from hpc_router.cluster.control_loop.loop import ControlLoop, run_loop

    run = find_run(arguments.run)
    if arguments.loop:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        run_loop(run, while_leading=arguments.while_leading, tied=arguments.tied)
        return 0
    done = ControlLoop(run).once()
    if done.refused is not None:
        raise LaunchError(done.refused)
    return _print_lines(str(action) for action in done.actions)


def bench(arguments: argparse.Namespace) -> int:
    return BENCHMARKS[arguments.benchmark](arguments)


def _bench_router(arguments: argparse.Namespace) -> int:
    from hpc_router.bench.output import default_out
    from hpc_router.bench.relay_cost.options import QUICK, RelayCostOptions
    from hpc_router.bench.relay_cost.report import on_screen, to_json
    from hpc_router.bench.relay_cost.run import default_environment, measure_relay_cost

    given = {
        name: value
        for name in ("streams", "rate", "seconds", "rounds", "connections")
        if (value := getattr(arguments, name)) is not None
    }
    options = RelayCostOptions(
        only=arguments.only,
        soak=arguments.soak,
        quiet_s=arguments.quiet,
        environment=arguments.peers or default_environment(),
        trees=dict(arguments.tree),
        out=arguments.out or default_out(),
        quick=arguments.quick,
        **{**(QUICK if arguments.quick else {}), **given},
    ).checked()
    results = measure_relay_cost(options, _stderr())
    _print(to_json(results) if arguments.json else on_screen(results))
    return 1 if results.failed else 0


def classify(arguments: argparse.Namespace) -> int:
    from hpc_router.cli import classify as task

    if arguments.task == "predict":
        return _print_lines(
            json.dumps(decision, ensure_ascii=False)
            for decision in task.predict(arguments.artefact, arguments.prompts, fallback=arguments.fallback)
        )
    if arguments.task == "eval":
        from hpc_router.cli.classifier_tables import evaluation_text

        found = task.evaluate(arguments.artefact, arguments.prompts, fit=arguments.fit, costs=dict(arguments.cost))
        return _print(found if arguments.json else evaluation_text(found))
    if arguments.task == "pack":
        return _print(
            task.pack(
                arguments.artefact, arguments.prompts, capacity=dict(arguments.capacity), limit=arguments.limit,
                max_loss=arguments.max_loss, output=arguments.output,
            )
        )  # fmt: skip
    output = arguments.output or arguments.artefact
    return _print(task.assign(arguments.artefact, dict(arguments.table), output=output))


def _bench_soak(arguments: argparse.Namespace) -> int:
    from hpc_router.bench.output import default_out
    from hpc_router.bench.soak.options import SoakOptions, parse_fault
    from hpc_router.bench.soak.report import markdown, to_json
    from hpc_router.bench.soak.run import soak

    names = ("seconds", "rate", "streams", "workers", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.strike is not None:
        given["faults"] = [one for text in arguments.strike if (one := parse_fault(text)) is not None]
    results = soak(SoakOptions(out=arguments.out or default_out(), **given).checked(), _stderr())
    if arguments.json:
        _print(to_json(results))
    else:
        print(markdown(results, plot="soak.svg").rpartition("\n![")[0].strip())
    return 1 if results.failed else 0


def _bench_agreement(arguments: argparse.Namespace) -> int:
    from hpc_router.bench.agreement import AgreementOptions, agreement
    from hpc_router.bench.output import default_out

    names = ("model", "users", "requests", "tokens", "rounds")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    vllm, tokenizer = str(Path(arguments.vllm).absolute()), arguments.tokenizer.absolute()
    options = AgreementOptions(vllm=vllm, tokenizer=tokenizer, out=arguments.out or default_out(), **given)
    print(agreement(find_run(arguments.run), options))
    return 0


BENCHMARKS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "router": _bench_router,
    "soak": _bench_soak,
    "agreement": _bench_agreement,
}
VERBS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    verb.__name__.rstrip("_"): verb
    for verb in (
        *(plan, up, down, status, logs, why, route, chat, url, token),
        *(scale, set_, drain, register, unregister, reconcile, bench, classify),
    )
}


def _stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _print(value: "RenderableType | Mapping[str, Any] | list[Any]", *, fold: bool = True) -> int:
    """JSON as JSON, anything else as rich shows it; without `fold` long lines stay whole, to be copied."""
    if isinstance(value, Mapping | list):
        print(json.dumps(value, indent=1, ensure_ascii=False))
        return 0
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    console.print(value, soft_wrap=not fold)
    return 0


def _print_lines(lines: Any) -> int:
    for line in lines:
        print(line)
    return 0
