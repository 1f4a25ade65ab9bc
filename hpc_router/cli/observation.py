"""The verbs that show a deployment's state and its use: `status`, `top`, `logs`, `why`, `trace`, `usage`."""

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from hpc_router.cli.output import print_value
from hpc_router.cli.parser import Parser, Verbs, add_verb, count, interval, name_list
from hpc_router.errors import LaunchError
from hpc_router.state.run_directory import find_run

ALL_LINES: Final = 10_000
"""Height of the screen of `top` that is printed once, so that no row is cut."""

RATES_S: Final = 1.1
"""Time in seconds after which the router knows rates, if no one has looked before."""


def add_status(verbs: "Verbs[Parser]") -> None:
    add_verb(verbs, status, json=True)


def status(arguments: argparse.Namespace) -> int:
    """show the router and every replica: state, node, load

    hpc-router status
    hpc-router status --json | jq .router.url
    """
    from hpc_router.cli.tables import status_text
    from hpc_router.cluster.commands.status import status as status_of

    value = status_of(find_run(arguments.run))
    return print_value(value if arguments.json else status_text(value))


def add_top(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, top, json=True)
    parser.add_argument(
        "--sort", choices=("name", "requests", "waiting", "latency", "end"), default="name", help="order of the tables"
    )
    parser.add_argument(
        "--interval", type=interval, default=2.0, metavar="S", help="seconds between two looks (default 2)"
    )
    parser.add_argument("--once", action="store_true", help="print one look; also without a terminal, and with --json")


def top(arguments: argparse.Namespace) -> int:
    """watch traffic, latency, queues and job ends

    hpc-router top
    hpc-router top --sort end --once
    """
    from hpc_router.cli.top import TopView, watch
    from hpc_router.cluster.commands.status import ask_router

    run, view = find_run(arguments.run), TopView(arguments.sort)

    def read() -> Mapping[str, Any] | str:
        _, value, trouble = ask_router(run, "/overview")
        return trouble or value

    if sys.stdout.isatty() and not (arguments.once or arguments.json):
        watch(read, view, interval_s=arguments.interval)
        return 0
    value = read()
    if not isinstance(value, str) and value["window_s"] is None:
        time.sleep(RATES_S)
        value = read()
    if isinstance(value, str):
        raise LaunchError(value)
    return print_value(value if arguments.json else view.screen(value, height=ALL_LINES, interactive=False))


def add_logs(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, logs)
    parser.add_argument(
        "name", nargs="?", metavar="REPLICA|EXPERT|router", help="the process whose logs are printed (default: all)"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="print new lines as they are written")
    parser.add_argument(
        "-n", "--lines", type=count, default=20, metavar="N", help="last lines of each file (default 20)"
    )


def logs(arguments: argparse.Namespace) -> int:
    """print the logs of agents, engines and router

    hpc-router logs math -n 50
    hpc-router logs router -f
    """
    from hpc_router.cluster.commands.logs import ends, follow, log_files, tail
    from hpc_router.cluster.control_loop.desired_state import host_expert

    run = find_run(arguments.run)
    name = None if arguments.name is None else host_expert(run, arguments.name)
    files = log_files(run, name)
    read_to = ends(files)
    for replica, paths in files.items():
        for path in paths:
            for line in tail(path, arguments.lines):
                print(f"{replica} | {line}")
    if arguments.follow:
        for replica, line in follow(run, name, since=read_to):
            print(f"{replica} | {line}", flush=True)
    return 0


def add_why(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, why, json=True)
    parser.add_argument(
        "name",
        nargs="?",
        metavar="REPLICA|EXPERT|router",
        help="the replica to explain (default: all that are not ready)",
    )


def why(arguments: argparse.Namespace) -> int:
    """explain why replicas are not ready, and what to do

    hpc-router why
    hpc-router why math
    """
    from hpc_router.cli.tables import why_text
    from hpc_router.cluster.commands.why import why as why_of

    causes = why_of(find_run(arguments.run), arguments.name)
    return print_value([cause.to_json() for cause in causes] if arguments.json else why_text(causes))


def add_trace(verbs: "Verbs[Parser]") -> None:
    add_verb(verbs, trace, json=True).add_argument(
        "request_id", metavar="REQUEST_ID", help="the header x-request-id of its response"
    )


def trace(arguments: argparse.Namespace) -> int:
    """show what happened to one request: expert, replica, attempts, times

    hpc-router trace 4c1f0f6d0b6a4b0e9d3a5f7c8e9b0a1d
    """
    from hpc_router.cli.tables import trace_text
    from hpc_router.cluster.commands.trace import trace as trace_of

    records = trace_of(find_run(arguments.run), arguments.request_id)
    return print_value(records if arguments.json else trace_text(records))


def add_usage(verbs: "Verbs[Parser]") -> None:
    from hpc_router.cluster.commands.usage import GROUPS

    parser = add_verb(verbs, usage, json=True)
    parser.add_argument(
        "--by", type=name_list, default=("user", "expert"), metavar="KEY,...",
        help=f"group by these: {', '.join(GROUPS)} (default: user,expert)",
    )  # fmt: skip
    parser.add_argument("--since", default="7d", metavar="TIME", help="for example 12h, 7d or 4w (default: 7d)")


def usage(arguments: argparse.Namespace) -> int:
    """sum up requests, tokens, waiting time and GPU hours

    hpc-router usage
    hpc-router usage --by user --since 30d --json
    """
    from hpc_router.cli.tables import usage_text
    from hpc_router.cluster.commands.usage import check_groups, parse_since
    from hpc_router.cluster.commands.usage import usage as usage_of

    now, by = time.time(), check_groups(arguments.by)
    value = usage_of(find_run(arguments.run), by, since=parse_since(arguments.since, now=now), now=now)
    return print_value(value if arguments.json else usage_text(value))
