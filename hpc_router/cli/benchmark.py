"""The verb `bench`, with a task for each benchmark. None needs a running deployment."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpc_router.cli.output import print_lines, print_value, stderr_console
from hpc_router.cli.parser import Parser, Verbs, add_verb, count, name_list, named_folder, number
from hpc_router.config.assignments import unique


def add_bench(verbs: "Verbs[Parser]") -> None:
    bench = verbs.add_parser(
        "bench",
        help="measure this installation; `hpc-router bench --help` lists the benchmarks",
        description="Measure this installation on this machine.",
        epilog="examples:\n  hpc-router bench router --quick\n  hpc-router bench soak\n  hpc-router bench fairness",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = bench.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True, parser_class=Parser)
    _add_router(benchmarks)
    _add_soak(benchmarks)
    _add_fairness(benchmarks)
    _add_passes(benchmarks)
    _add_scrape(benchmarks)
    _add_pages(benchmarks)
    _add_balance(benchmarks)


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Returns the values of those options in `names` that the user gave. The benchmark has defaults for the others."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _add_router(benchmarks: "Verbs[Parser]") -> None:
    details = (
        " Relays that are not installed are skipped, with a note. Ctrl-C ends the benchmark; the rounds that it has "
        "measured are reported and written."
    )
    parser = add_verb(benchmarks, _bench_router, details=details, run=False, json=True)
    parser.add_argument("--only", type=name_list, default=(), metavar="NAME,...", help="measure only these relays")
    parser.add_argument("--streams", type=count, metavar="N", help="concurrent streams (default 1000)")
    parser.add_argument("--rate", type=number, metavar="R", help="events per second and stream (default 40)")
    parser.add_argument("--seconds", type=number, metavar="S", help="duration of each measurement (default 5)")
    parser.add_argument("--rounds", type=count, metavar="N", help="rounds, each with every relay (default 3)")
    parser.add_argument("--connections", type=count, metavar="N", help="connections for short requests (default 16)")
    parser.add_argument(
        "--soak", type=count, default=0, metavar="N", help="then send N requests and check that memory does not grow"
    )
    parser.add_argument(
        "--quiet",
        type=number,
        default=0.0,
        metavar="S",
        help="on a shared machine: before each measurement, wait up to S seconds until nothing else runs",
    )
    _add_peers_and_out(parser)
    parser.add_argument(
        "--quick", action="store_true", help="one short round, to see that it works; its figures are not reliable"
    )


def _add_peers_and_out(parser: Parser) -> None:
    """Adds the arguments of a benchmark beside other routers: where these are, and where the results go."""
    parser.add_argument("--peers", type=Path, metavar="DIR", help="virtual environment that has the routers from PyPI")
    parser.add_argument(
        "--tree",
        action="append",
        type=named_folder,
        default=[],
        metavar="NAME=DIR",
        help="another checkout of this router, measured beside it",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: analysis/results)")


def _bench_router(arguments: argparse.Namespace) -> int:
    """measure the cost of relaying: this router beside nginx, haproxy, vllm-router, sglang-router and no router

    hpc-router bench router --quick                   half a minute, to see that it works
    hpc-router bench router                           a quarter of an hour
    hpc-router bench router --only nginx,router --seconds 10 --soak 1000000
    """
    from hpc_router.bench.output import default_out
    from hpc_router.bench.relay_cost.options import QUICK, RelayCostOptions
    from hpc_router.bench.relay_cost.report import on_screen, to_json
    from hpc_router.bench.relay_cost.run import default_environment, measure_relay_cost

    given = _given(arguments, "streams", "rate", "seconds", "rounds", "connections")
    options = RelayCostOptions(
        only=arguments.only,
        soak=arguments.soak,
        quiet_s=arguments.quiet,
        environment=arguments.peers or default_environment(),
        trees=unique(arguments.tree, where="--tree"),
        out=arguments.out or default_out(),
        quick=arguments.quick,
        **{**(QUICK if arguments.quick else {}), **given},
    ).checked()
    results = measure_relay_cost(options, stderr_console())
    print_value(to_json(results) if arguments.json else on_screen(results))
    if results.interrupted:
        raise KeyboardInterrupt
    return 1 if results.failed else 0


def _add_soak(benchmarks: "Verbs[Parser]") -> None:
    details = (
        " Exit status 1 if a request failed that no kill explains, if a gauge is not zero at the end, or if memory or "
        "descriptors grow."
    )
    parser = add_verb(benchmarks, _bench_soak, details=details, run=False, json=True)
    parser.add_argument("--seconds", type=number, metavar="S", help="duration of the load (default 60)")
    parser.add_argument("--rate", type=number, metavar="R", help="short requests per second (default 100)")
    parser.add_argument("--streams", type=count, metavar="N", help="streams open at any time (default 200)")
    parser.add_argument("--workers", type=count, metavar="N", help="workers of the router (default 2)")
    parser.add_argument(
        "--strike",
        action="append",
        metavar="KIND=SECONDS",
        help="kill a replica, a worker or the control process every SECONDS, or `once`; repeat for more kinds; `none` "
        "kills nothing (default: replica=5, worker=60, control=once)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the arrivals (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: analysis/results)")


def _bench_soak(arguments: argparse.Namespace) -> int:
    """start a deployment, load it while its processes are killed, and report what fails

    hpc-router bench soak                             a minute
    hpc-router bench soak --seconds 600               the long form
    hpc-router bench soak --strike replica=10 --strike worker=30
    """
    from hpc_router.bench.output import default_out
    from hpc_router.bench.soak.options import SoakOptions, parse_fault
    from hpc_router.bench.soak.report import markdown, to_json
    from hpc_router.bench.soak.run import soak

    given = _given(arguments, "seconds", "rate", "streams", "workers", "seed")
    if arguments.strike is not None:
        given["faults"] = [one for text in arguments.strike if (one := parse_fault(text)) is not None]
    results = soak(SoakOptions(out=arguments.out or default_out(), **given).checked(), stderr_console())
    if arguments.json:
        print_value(to_json(results))
    else:
        print_lines([markdown(results, plot="soak.svg").rpartition("\n![")[0].strip()])
    return 1 if results.failed else 0


def _add_fairness(benchmarks: "Verbs[Parser]") -> None:
    parser = add_verb(benchmarks, _bench_fairness, run=False, json=True)
    parser.add_argument("--seconds", type=number, metavar="S", help="duration of each measured load (default 30)")
    parser.add_argument("--flood", type=count, metavar="N", help="requests that fill the queue (default 2000)")
    parser.add_argument("--rate", type=number, metavar="R", help="interactive streams per second (default 8)")
    parser.add_argument("--workers", type=count, metavar="N", help="workers of the router (default 2)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the arrivals (default 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: analysis/results)")


def _bench_fairness(arguments: argparse.Namespace) -> int:
    """measure what a user and interactive requests wait while others flood the router

    hpc-router bench fairness
    hpc-router bench fairness --flood 500 --workers 4
    """
    from hpc_router.bench.fairness import FairnessOptions, fairness
    from hpc_router.bench.output import default_out

    given = _given(arguments, "seconds", "flood", "rate", "workers", "seed")
    results = fairness(FairnessOptions(out=arguments.out or default_out(), **given).checked(), stderr_console())
    if arguments.json:
        print_value(results.to_json())
    else:
        print_lines([results.markdown()])
    return 0


def _add_passes(benchmarks: "Verbs[Parser]") -> None:
    parser = add_verb(benchmarks, _bench_passes, run=False, json=True)
    parser.add_argument("--replicas", type=count, default=200, metavar="N", help="live replicas (default 200)")
    parser.add_argument(
        "--generations", type=count, default=20, metavar="N", help="ended ones per replica (default 20)"
    )
    parser.add_argument("--passes", type=count, default=50, metavar="N", help="passes to measure (default 50)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="create the run directory here (default: /tmp)")


def _bench_passes(arguments: argparse.Namespace) -> int:
    """measure the CPU time of one pass of the control loop over many replicas; submits nothing

    hpc-router bench passes
    hpc-router bench passes --replicas 64 --folder /shared/tmp
    """
    from hpc_router.bench.control_loop import measure_passes

    cost = measure_passes(
        replicas=arguments.replicas,
        generations=arguments.generations,
        passes=arguments.passes,
        folder=arguments.folder,
    )
    return print_value(asdict(cost)) if arguments.json else print_lines([cost.line()])


def _add_scrape(benchmarks: "Verbs[Parser]") -> None:
    parser = add_verb(benchmarks, _bench_scrape, run=False, json=True)
    for name, default, what in (
        ("replicas", 200, "live replicas"), ("experts", 20, "experts"), ("workers", 4, "workers of the router"),
        ("scrapes", 50, "scrapes to measure"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=count, default=default, metavar="N", help=f"{what} (default {default})")


def _bench_scrape(arguments: argparse.Namespace) -> int:
    """measure the CPU time of the control process for a scrape of /metrics; starts nothing

    hpc-router bench scrape
    hpc-router bench scrape --replicas 1000 --workers 16
    """
    from hpc_router.bench.scrape import measure_scrapes

    cost = measure_scrapes(
        replicas=arguments.replicas, experts=arguments.experts, workers=arguments.workers, scrapes=arguments.scrapes
    )
    return print_value(asdict(cost)) if arguments.json else print_lines([cost.line()])


def _add_pages(benchmarks: "Verbs[Parser]") -> None:
    details = " Exit status 1 if a stream failed."
    parser = add_verb(benchmarks, _bench_pages, details=details, run=False, json=True)
    parser.add_argument("--streams", type=count, metavar="N", help="concurrent streams (default 1000)")
    parser.add_argument("--rate", type=number, metavar="R", help="events per second and stream (default 10)")
    parser.add_argument("--seconds", type=number, metavar="S", help="length of a window (default 5)")
    parser.add_argument("--rounds", type=count, metavar="N", help="windows with each number of pages (default 5)")
    parser.add_argument("--pages", type=count, metavar="N", help="pages, compared with one and with none (default 10)")


def _bench_pages(arguments: argparse.Namespace) -> int:
    """measure what open pages of the dashboard cost a router that relays streams: CPU time and the delay of events

    hpc-router bench pages
    hpc-router bench pages --streams 200 --rounds 20 --json
    """
    from hpc_router.bench.open_pages import OpenPagesOptions, measure_open_pages

    options = OpenPagesOptions(**_given(arguments, "streams", "rate", "seconds", "rounds", "pages")).checked()
    results = measure_open_pages(options, stderr_console())
    if arguments.json:
        print_value(results.to_json())
    else:
        print_lines(list(results.lines()))
    return 1 if results.failed else 0


def _add_balance(benchmarks: "Verbs[Parser]") -> None:
    details = " Exit status 1 if a request failed, or if the simulated engines fell behind their model."
    parser = add_verb(benchmarks, _bench_balance, details=details, run=False, json=True)
    parser.add_argument("--only", type=name_list, default=(), metavar="NAME,...", help="measure only these policies")
    parser.add_argument(
        "--loads", type=name_list, metavar="NAME,...",
        help="what is mixed: mooncake, shared, chat (default: these three), different (no prompt shares a beginning)",
    )  # fmt: skip
    parser.add_argument("--trace", type=Path, metavar="FILE", help="Mooncake's conversation trace (docs/bench.md)")
    parser.add_argument("--seconds", type=number, metavar="S", help="measured seconds of the engines (default 20)")
    parser.add_argument("--warmup", type=number, metavar="S", help="seconds before that (default 8)")
    parser.add_argument(
        "--slowdown", type=number, metavar="F", help="wall seconds per second of the engines (default 2)"
    )
    parser.add_argument("--replicas", type=count, metavar="N", help="number of engines (default 8)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the load (default 0)")
    _add_peers_and_out(parser)


def _bench_balance(arguments: argparse.Namespace) -> int:
    """compare policies that choose a replica: this router's, smg's and vllm-router's, over the same simulated engines

    hpc-router bench balance --trace conversation_trace.jsonl
    hpc-router bench balance --only prefix,before --tree before=../older-checkout
    """
    from hpc_router.bench.balance.options import BalanceOptions
    from hpc_router.bench.balance.report import markdown, to_json
    from hpc_router.bench.balance.run import measure_balance
    from hpc_router.bench.output import default_out
    from hpc_router.bench.relay_cost.run import default_environment

    given = _given(arguments, "loads", "seconds", "slowdown", "replicas", "seed")
    if arguments.warmup is not None:
        given["warmup_s"] = arguments.warmup
    options = BalanceOptions(
        out=arguments.out or default_out(),
        only=arguments.only,
        trace=None if arguments.trace is None else arguments.trace.absolute(),
        trees=dict(arguments.tree),
        environment=arguments.peers or default_environment(),
        **given,
    ).checked()
    results = measure_balance(options, stderr_console())
    if arguments.json:
        print_value(to_json(results))
    else:
        print_lines([markdown(results)])
    return 1 if results.failed else 0
