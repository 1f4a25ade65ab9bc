"""The verbs that start and end a deployment: `plan`, `up`, `down`."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Final

from hpc_router.cli.output import print_value, stderr_console
from hpc_router.cli.parser import (
    Parser,
    Verbs,
    add_verb,
    count,
    duration,
    expert_numbers,
    number,
    pause,
    tokens,
    users_over_time,
)
from hpc_router.errors import ConfigError
from hpc_router.state.run_directory import RunDir, find_run

DEMAND_OPTIONS: Final = {
    "--think": "think",
    "--for": "period",
    "--prompt-tokens": "prompt_tokens",
    "--answer-tokens": "answer_tokens",
    "--spread": "spread",
    "--share": "share",
    "--queue": "queue",
    "--load": "load",
    "--seed": "seed",
    "--plot": "plot",
}
"""The options of a prediction other than --users, with the names of their values."""
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
    _add_demand(parser)
    add_overrides(parser)


def _add_demand(parser: Parser) -> None:
    """Adds the options of a prediction."""
    group = parser.add_argument_group(
        "prediction", "With --users, predict how the deployment would serve a demand (docs/what-if.md). Starts nothing."
    )
    group.add_argument(
        "--users", type=users_over_time, metavar="N", help="number of users, or several with their times: 20,200@1h"
    )
    group.add_argument(
        "--think", type=pause, metavar="TIME", help="mean pause of a user before the next request (default 5s)"
    )
    group.add_argument("--for", type=duration, dest="period", metavar="TIME", help="period to predict (default 8h)")
    group.add_argument("--prompt-tokens", type=tokens, metavar="N", help="mean length of a prompt (default 200)")
    group.add_argument("--answer-tokens", type=tokens, metavar="N", help="mean length of an answer (default 200)")
    group.add_argument(
        "--spread", type=number, metavar="SIGMA", help="log-normal spread of both lengths; 0: none (default 0.5)"
    )
    group.add_argument(
        "--share",
        type=expert_numbers,
        metavar="EXPERT=N,...",
        help="shares of the experts in the requests (default: the policy's, or equal shares)",
    )
    group.add_argument(
        "--queue", type=pause, metavar="TIME", help="time of a job in Slurm's queue (default: as measured, or 60s)"
    )
    group.add_argument(
        "--load", type=pause, metavar="TIME", help="time of an engine to load (default: as measured, or 120s)"
    )
    group.add_argument("--seed", type=count, metavar="N", help="seed of all random numbers (default 0)")
    group.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the prediction over time")


def plan(arguments: argparse.Namespace) -> int:
    """print what would run: replicas, resources, exact commands; or predict how it would serve a demand

    hpc-router plan topology=sim experts.math.replicas=3
    hpc-router plan --config-dir my topology=mine --json
    hpc-router plan --users 200 --think 5s --for 8h topology=llama3_4x8b_bf16,llama3_4x8b_fp8 simulate.gpu=h100-sxm
    """
    given = [option for option, name in DEMAND_OPTIONS.items() if getattr(arguments, name) is not None]
    if arguments.users is not None:
        return _predict(arguments)
    if given:
        raise ConfigError(f"{given[0]} is an option of a prediction, which needs --users (valid: --users 200)")
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


def _predict(arguments: argparse.Namespace) -> int:
    """Prints the prediction for each deployment that the overrides describe; returns the exit status."""
    from hpc_router.bench.what_if.cases import find_cases
    from hpc_router.bench.what_if.demand import UserDemand, spread_around
    from hpc_router.bench.what_if.report import plot, table, to_json
    from hpc_router.bench.what_if.service import service_of
    from hpc_router.bench.what_if.simulation import Simulation

    def value(name: str, default: float) -> float:
        given = getattr(arguments, name)
        return default if given is None else given

    sigma = value("spread", 0.5)
    demand = UserDemand(
        users=arguments.users,
        think_s=value("think", 5.0),
        for_s=value("period", 8 * 3600.0),
        prompt_tokens=spread_around(value("prompt_tokens", 200), sigma),
        answer_tokens=spread_around(value("answer_tokens", 200), sigma),
        shares=dict(arguments.share or ()),
        seed=arguments.seed or 0,
    )
    services = {
        case.name: service_of(case.deployment, case.durations, queue_s=arguments.queue, load_s=arguments.load)
        for case in find_cases(arguments.run, arguments.overrides, config_dir=arguments.config_dir)
    }
    predictions = {name: Simulation(service, demand).run() for name, service in services.items()}
    if arguments.plot is not None:
        arguments.plot.write_text(plot(predictions, demand), encoding="utf-8")
    return print_value(to_json(predictions, demand) if arguments.json else table(predictions, demand))


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
