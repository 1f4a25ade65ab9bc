"""The verbs that change a running deployment: `scale`, `set`, `drain`, `nodes`, `register`, `reconcile` and others."""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path

from hpc_router.cli.output import print_lines, print_value, print_warnings
from hpc_router.cli.parser import Parser, Verbs, add_verb
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.run_directory import find_run, make_run


def add_scale(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, scale, json=True)
    parser.add_argument("counts", nargs="+", metavar="EXPERT=N")


def scale(arguments: argparse.Namespace) -> int:
    """change how many replicas experts have

    hpc-router scale math=3 code=0
    """
    from hpc_router.cluster.commands.scale import parse_counts
    from hpc_router.cluster.commands.scale import scale as change

    wanted, warnings = change(find_run(arguments.run), parse_counts(arguments.counts))
    print_warnings(warnings)
    return print_value(dict(wanted)) if arguments.json else print_lines(f"{name}={n}" for name, n in wanted.items())


def add_apply(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, apply, json=True)
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="folder with topology/, expert/ ... of your own")
    parser.add_argument("--previous", action="store_true", help="start from the config before the last `apply`")
    parser.add_argument("--dry-run", action="store_true", help="show the change and do nothing")
    parser.add_argument("--no-wait", action="store_true", help="return at once; the control loop rolls the change out")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="key=value, ~key, or the choice of a group")


def apply(arguments: argparse.Namespace) -> int:
    """change the config of a running deployment and replace its jobs one after the other

    hpc-router apply experts.math.engine.options.max_model_len=8192
    hpc-router apply '~experts.law' --dry-run
    hpc-router apply --config-dir my topology=mine cluster=slurm     the whole config, as for `up`
    hpc-router apply --previous                                      undo the last `apply`
    hpc-router apply                                                 move the run to this version of hpc-router
    """
    from hpc_router.cli.json_events import JsonEvents
    from hpc_router.cli.tables import TextProgress
    from hpc_router.cluster.commands.apply import find_change, roll_out, write_change

    run, folder = find_run(arguments.run), arguments.config_dir
    with JsonEvents() if arguments.json else TextProgress() as progress:
        change = find_change(run, arguments.overrides, config_dir=folder, previous=arguments.previous)
        if isinstance(progress, JsonEvents):
            progress.event("change", **change.to_json())
        else:
            print_lines(change.lines())
        if arguments.dry_run:
            return 0
        control = write_change(change)
        if control.preview().desired.down:
            progress.text(
                f"no job runs: `hpc-router up --run {shlex.quote(str(run.path))}` starts them with this config"
            )
        elif not arguments.no_wait:
            roll_out(control, progress.text)
            if isinstance(progress, JsonEvents):
                progress.event("applied", run=str(run.path))
            else:
                progress.text("every job has this config")
    return 0


def add_set(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, set_, json=True)
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE")


def set_(arguments: argparse.Namespace) -> int:
    """change limits and policy while the router serves, without ending a request

    hpc-router set router.max_in_flight=500 policy.margin=0.05
    hpc-router set router.max_in_flight=        back to the configured value
    """
    from hpc_router.cluster.commands.set import change, parse_settings

    settings = change(find_run(arguments.run), *parse_settings(arguments.settings))
    return print_value(settings) if arguments.json else print_lines(f"{key}={value}" for key, value in settings.items())


def add_drain(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, drain, json=True)
    parser.add_argument("names", nargs="+", metavar="REPLICA|SLOT|EXPERT|NODE|router")
    parser.add_argument("--wait", action="store_true", help="return when the replicas have ended")
    parser.add_argument("--undo", action="store_true", help="undo the drain of nodes: let jobs start on them again")


def drain(arguments: argparse.Namespace) -> int:
    """let replicas finish their requests and end; new jobs replace them

    hpc-router drain math-0
    hpc-router drain gpu17 --wait        all replicas on that node, except a router
    hpc-router drain gpu17 --undo        let jobs start on that node again
    hpc-router drain router
    """
    from hpc_router.cluster.commands.drain import drain as start_drain
    from hpc_router.cluster.commands.drain import interrupted_text, undo, wait
    from hpc_router.cluster.control_loop.loop import ControlLoop
    from hpc_router.cluster.signals import explaining_interrupt

    control = ControlLoop(find_run(arguments.run))
    if arguments.undo:
        undo(control, arguments.names)
        return 0
    drained = start_drain(control, arguments.names)
    if not drained.replicas and not drained.excluded:
        raise LaunchError(f"no job of {', '.join(arguments.names)} runs; `hpc-router status` shows all jobs")
    with explaining_interrupt(lambda: interrupted_text(control.run, drained)):
        if not arguments.json:
            print_lines(drained.lines())
        print_warnings(drained.warnings)
        ended = wait(control, drained) if arguments.wait else drained
    if drained.replicas and not arguments.wait and drained.needs_reconcile(control.run):
        sys.stderr.write("hpc-router: no router will replace these jobs; `hpc-router reconcile` does\n")
    if arguments.json:
        print_value(ended.to_json())
    if ended.left:
        raise LaunchError(f"{', '.join(ended.left)} did not end; `hpc-router why` may show the reason")
    return 0


def add_nodes(verbs: "Verbs[Parser]") -> None:
    nodes = verbs.add_parser(
        "nodes",
        help="nodes that get no further jobs; `hpc-router nodes --help` lists the tasks",
        description="Nodes that get no further jobs: those that failed twice, and those that `drain NODE` named.",
        epilog="examples:\n  hpc-router nodes list\n  hpc-router nodes forget gpu17",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = nodes.add_subparsers(dest="task", metavar="TASK", required=True, parser_class=Parser)
    add_verb(tasks, _nodes_list, json=True)
    add_verb(tasks, _nodes_forget).add_argument("nodes", nargs="+", metavar="NODE")


def _nodes_list(arguments: argparse.Namespace) -> int:
    """print the excluded nodes, who excluded each, and why"""
    from hpc_router.cluster.control_loop.desired_state import node_exclusions

    excluded = node_exclusions(find_run(arguments.run))
    if arguments.json:
        return print_value(excluded)
    return print_lines(f"{n}  by {f.get('by')}: {f.get('reason')}" for n, f in sorted(excluded.items()))


def _nodes_forget(arguments: argparse.Namespace) -> int:
    """let jobs start on these nodes again; their failures so far no longer count

    hpc-router nodes forget gpu17
    """
    from hpc_router.cluster.commands.drain import undo
    from hpc_router.cluster.control_loop.loop import ControlLoop

    undo(ControlLoop(find_run(arguments.run)), arguments.nodes)
    return 0


def add_register(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, register, json=True)
    parser.add_argument("--expert", required=True, metavar="NAME", help="the expert's name")
    parser.add_argument("--url", required=True, help="base URL of its API, used as written; a host alone gets /v1")
    parser.add_argument("--model", help="name of the model at the endpoint (default: the one in its /v1/models)")
    parser.add_argument("--token-file", type=Path, metavar="F", help="file with the token that the endpoint requires")
    probing = parser.add_mutually_exclusive_group()
    probing.add_argument(
        "--probe-path",
        metavar="PATH",
        default="/v1/models",
        help="path of the router's probe, where /v1 stands for the path of --url (default /v1/models); "
        "any HTTP answer proves that the endpoint is alive",
    )
    probing.add_argument(
        "--no-probe",
        dest="probe_path",
        action="store_const",
        const=None,
        help="send no probe: only check that its port accepts connections",
    )


def register(arguments: argparse.Namespace) -> int:
    """add an external endpoint to a run; creates the run if it does not exist

    hpc-router register --run runs/mine --expert math --url http://node7:8000/v1
    hpc-router register --expert big --url https://api.example.org --model big-70b --token-file ~/.api-token
    """
    from hpc_router.cluster.commands.register import examine, read_token
    from hpc_router.cluster.commands.register import register as join

    token = read_token(arguments.token_file) if arguments.token_file is not None else None
    endpoint = examine(
        expert=arguments.expert, url=arguments.url, model=arguments.model, token=token, probe=arguments.probe_path
    )
    named = arguments.run or (Path(os.environ["HPC_ROUTER_RUN"]) if "HPC_ROUTER_RUN" in os.environ else None)
    run = make_run(named) if named is not None and not named.exists() else find_run(arguments.run)
    record = join(run, endpoint)
    print_warnings([endpoint.warning] if endpoint.warning else [])
    if arguments.json:
        return print_value(record.to_json())
    return print_lines([f"{record.replica} {record.url} model {endpoint.model or 'not known yet'}"])


def add_unregister(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, unregister)
    parser.add_argument("replica", nargs="?", metavar="REPLICA")
    parser.add_argument("--expert", metavar="NAME", help="all external endpoints of this expert")
    parser.add_argument("--url", help="only the endpoints at this address")


def unregister(arguments: argparse.Namespace) -> int:
    """remove an external endpoint from a run

    hpc-router unregister math-x0
    hpc-router unregister --expert math --url http://node7:8000
    """
    from hpc_router.cluster.commands.register import unregister as leave

    if arguments.replica is None and arguments.expert is None:
        raise ConfigError("unregister needs a REPLICA or --expert NAME")
    run = find_run(arguments.run)
    return print_lines(leave(run, replica=arguments.replica, expert=arguments.expert, url=arguments.url))


def add_reconcile(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, reconcile)
    parser.add_argument("--loop", action="store_true", help="repeat until SIGTERM")
    parser.add_argument("--while-leading", metavar="REPLICA", help="with --loop: only while this router leads")
    parser.add_argument("--tied", action="store_true", help="with --loop: end when stdin is closed")


def reconcile(arguments: argparse.Namespace) -> int:
    """submit missing jobs and end surplus jobs, once or in a loop

    hpc-router reconcile
    hpc-router reconcile --loop          what the router's job runs
    """
    from hpc_router.cluster.control_loop.loop import ControlLoop, run_loop

    run = find_run(arguments.run)
    if arguments.loop:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        run_loop(run, while_leading=arguments.while_leading, tied=arguments.tied)
        return 0
    done = ControlLoop(run).run_pass()
    if done.refused is not None:
        raise LaunchError(done.refused)
    return print_lines(str(action) for action in done.actions)
