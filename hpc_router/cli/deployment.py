"""The verbs that start and end a deployment: `plan`, `up`, `down`."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Final

from hpc_router.cli.output import print_value, stderr_console
from hpc_router.cli.parser import Parser, Verbs, add_verb, duration
from hpc_router.state.run_directory import RunDir, find_run

EVENTS: Final = " A terminal shows the progress as a table, anything else gets a line for each change."


def add_overrides(parser: Parser) -> None:
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="folder with topology/, expert/ ... of your own")
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="key=value, or the choice of a group: topology=sim"
    )


def add_plan(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, plan, json=True)
    parser.add_argument(
        "--no-ask", action="store_true", help="skip the checks that start programs: engines and Slurm (faster)"
    )
    add_overrides(parser)


def plan(arguments: argparse.Namespace) -> int:
    """print what would run: replicas, resources, exact commands

    hpc-router plan topology=sim experts.math.replicas=3
    hpc-router plan --config-dir my topology=mine --json
    """
    from hpc_router.cli.tables import plan_text
    from hpc_router.cluster.control_loop.desired_state import desired_of, with_desired_counts
    from hpc_router.cluster.planning.plan import make_plan
    from hpc_router.cluster.planning.run_target import find_target

    target = find_target(arguments.run, arguments.overrides, config_dir=arguments.config_dir)
    deployment = target.deployment
    if arguments.run is not None and target.run is not None:
        deployment = with_desired_counts(deployment, desired_of(target.run, deployment))
    made = make_plan(deployment, run=target.planned, ask_engines=not arguments.no_ask)
    return print_value(made.to_json() if arguments.json else plan_text(made), fold=False)


def add_up(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, up, details=EVENTS)
    parser.add_argument("--json", action="store_true", help="print the progress as JSON, one event per line")
    parser.add_argument(
        "--wait", choices=("any", "all"), default="any", help="return when any expert is ready (default), or all"
    )
    add_overrides(parser)


def up(arguments: argparse.Namespace) -> int:
    """start a deployment, or complete one; returns when the endpoint serves

    hpc-router up topology=sim
    hpc-router up --wait all policy=round_robin router.port=8000
    hpc-router up --run runs/mine          complete that run: start again what has ended
    """
    wait_all, folder = arguments.wait == "all", arguments.config_dir
    return run_up(arguments.run, arguments.overrides, config_dir=folder, wait_all=wait_all, events=arguments.json)


def run_up(
    given: Path | None, overrides: list[str], *, config_dir: Path | None, wait_all: bool, events: bool = False
) -> int:
    """Starts or completes a deployment, for the verb `up` and for `launch.deploy`; returns the exit status. `given`:
    the run directory that the user named, if any. `wait_all`: whether to wait until no expert is starting any more.
    `events`: whether to print the progress as JSON."""
    from hpc_router.cli.json_events import JsonEvents
    from hpc_router.cli.tables import UpProgress
    from hpc_router.cluster.commands.up import Served
    from hpc_router.cluster.commands.up import up as bring_up
    from hpc_router.cluster.planning.run_target import find_target

    with JsonEvents() if events else UpProgress(stderr_console()) as progress:
        target = find_target(given, overrides, config_dir=config_dir)
        served: Served = bring_up(target, wait_all=wait_all, reporter=progress)
    if isinstance(progress, JsonEvents):
        failed = [view.replica for view in served.failed]
        progress.event("serving", run=str(served.run.path), url=f"{served.url}/v1", failed=failed)
        return 1 if failed and wait_all else 0
    print_usage(served.run, served.url)
    if served.failed:
        names = ", ".join(view.replica for view in served.failed)
        sys.stderr.write(f"hpc-router: {names} failed; the others serve. `hpc-router why` shows the reason\n")
    return 1 if served.failed and wait_all else 0


def print_usage(run: RunDir, url: str) -> None:
    """Prints commands that use the endpoint at `url`."""
    name = shlex.quote(os.path.relpath(run.path) if run.path.is_relative_to(Path.cwd()) else str(run.path))
    print(f"serving at {url}/v1  (model: auto, or an expert's name)\n")
    print(f'  hpc-router chat --run {name} "Is 91 a prime?"')
    print(f"  curl --noproxy '*' {url}/v1/chat/completions -H 'Content-Type: application/json' \\")
    # bash: every user of the node could read a token on curl's own command line
    print(f"""    -H @<(printf 'Authorization: Bearer %s\\n' "$(hpc-router token --run {name})") \\""")
    print("""    -d '{"model": "auto", "messages": [{"role": "user", "content": "Is 91 a prime?"}]}'""")
    print(f"  OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=$(hpc-router token --run {name}) python your_program.py")
    print(f"  hpc-router down --run {name}")


def add_down(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, down, details=EVENTS)
    parser.add_argument("--json", action="store_true", help="print the progress as JSON, one event per line")
    parser.add_argument(
        "--when-idle",
        type=duration,
        metavar="TIME",
        help="end it once no request came for that time, such as 2h or 45m",
    )


def down(arguments: argparse.Namespace) -> int:
    """end a deployment: its replicas finish their requests, then all its jobs end

    hpc-router down --run runs/mine
    hpc-router down --when-idle 2h      returns at once; the control loop ends it, and `up` withdraws this
    """
    from hpc_router.cli.json_events import JsonEvents
    from hpc_router.cli.tables import UpProgress
    from hpc_router.cluster.commands.down import down as take_down
    from hpc_router.cluster.commands.down import down_when_idle

    run = find_run(arguments.run)
    if arguments.when_idle is not None:
        down_when_idle(run, arguments.when_idle)
        told = f"{run.path} ends after {arguments.when_idle:g} s without a request"
        return print_value({"run": str(run.path), "when_idle_s": arguments.when_idle} if arguments.json else told)
    with JsonEvents() if arguments.json else UpProgress(stderr_console()) as progress:
        ended = take_down(run, watcher=progress)
    if isinstance(progress, JsonEvents):
        progress.event("down", run=str(run.path), jobs=ended)
        return 0
    jobs = f"{ended} job{'' if ended == 1 else 's'} ended"
    print(f"{run.path} is down; {jobs}" if ended else f"nothing ran in {run.path}")
    return 0
