"""The verbs that show a deployment's state: `status`, `logs`, `why`."""

import argparse

from hpc_router.cli.output import print_value
from hpc_router.cli.parser import Parser, Verbs, add_verb, count
from hpc_router.state.run_directory import find_run


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
