"""The command line's grammar: every verb with its options, its help and an example. No verb is carried out here."""

import argparse
import math
import re
from pathlib import Path
from typing import Final, NoReturn

from hpc_router import __version__

_RUN_HELP: Final = "run directory (default: $HPC_ROUTER_RUN, then runs/latest)"
_EPILOG: Final = """\
begin with
  hpc-router plan topology=sim          show what would run
  hpc-router up topology=sim            run it, and print the address of the endpoint
  hpc-router chat "Is 91 a prime?"      send a prompt
  hpc-router down                       end it, and leave nothing behind

exit status: 0 done, 1 failed, 2 a value to edit, 130 interrupted
`hpc-router VERB --help` explains a verb.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hpc-router: {message} (see `{self.prog} --help`)\n")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Overrides may stand between options, where argparse alone would lose them."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(words)
    strangers = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if strangers:
        parser.error(f"unknown argument{'s' if len(strangers) > 1 else ''}: {' '.join(strangers)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hpc-router",
        description="Several specialised LLMs behind one OpenAI-compatible endpoint; each prompt goes to its expert.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hpc-router {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    _launching(verbs)
    _watching(verbs)
    _using(verbs)
    _changing(verbs)
    _measuring(verbs)
    _classifying(verbs)
    return parser


_Verbs = argparse._SubParsersAction


def _verb(verbs: "_Verbs[_Parser]", name: str, summary: str, example: str, *, json: bool = False) -> _Parser:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help=_RUN_HELP)
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _launching(verbs: "_Verbs[_Parser]") -> None:
    plan = _verb(
        verbs,
        "plan",
        "print what would run: replicas, resources, exact commands",
        "hpc-router plan topology=sim experts.math.replicas=3\nhpc-router plan --config-dir my topology=mine --json",
        json=True,
    )
    plan.add_argument("--no-ask", action="store_true", help="do not let the engines check their flags (faster)")
    up = _verb(
        verbs,
        "up",
        "start a deployment, or complete one; returns when the endpoint serves",
        "hpc-router up topology=sim\nhpc-router up --wait all policy=round_robin router.port=8000\n"
        "hpc-router up --run runs/mine          complete that run: start again what has ended",
    )
    up.add_argument("--wait", choices=("any", "all"), default="any", help="return when any expert is ready, or all")
    for parser in (plan, up):
        parser.add_argument(
            "--config-dir", type=Path, metavar="DIR", help="folder with topology/, expert/ ... of your own"
        )
        parser.add_argument(
            "overrides", nargs="*", metavar="OVERRIDE", help="key=value, or the choice of a group: topology=sim"
        )
    _verb(verbs, "down", "end a deployment: drain, end all jobs, leave nothing", "hpc-router down --run runs/mine")


def _watching(verbs: "_Verbs[_Parser]") -> None:
    _verb(
        verbs,
        "status",
        "show the router and every replica: state, node, load",
        "hpc-router status\nhpc-router status --json | jq .router.url",
        json=True,
    )
    logs = _verb(
        verbs,
        "logs",
        "print the logs of agents, engines and router",
        "hpc-router logs math -n 50\nhpc-router logs router -f",
    )
    logs.add_argument("name", nargs="?", metavar="REPLICA|EXPERT|router", help="of which process (default: all)")
    logs.add_argument("-f", "--follow", action="store_true", help="print new lines as they are written")
    logs.add_argument(
        "-n", "--lines", type=_count, default=20, metavar="N", help="last lines of each file (default 20)"
    )
    reason = _verb(
        verbs,
        "why",
        "explain why replicas are not ready, and what to do",
        "hpc-router why\nhpc-router why math",
        json=True,
    )
    reason.add_argument(
        "name", nargs="?", metavar="REPLICA|EXPERT|router", help="of which replica (default: all that are not ready)"
    )


def _using(verbs: "_Verbs[_Parser]") -> None:
    route = _verb(
        verbs,
        "route",
        "explain where a prompt would go",
        'hpc-router route "What is the derivative of x^2?"',
        json=True,
    )
    route.add_argument("prompt", metavar="PROMPT", help="the prompt; it is not sent to any expert")
    chat = _verb(
        verbs,
        "chat",
        "ask the deployment; without PROMPT: a conversation",
        'hpc-router chat "Is 91 a prime?"\nhpc-router chat --model law',
    )
    chat.add_argument("--model", default="auto", help="name of an expert; auto: the policy decides (default)")
    chat.add_argument("prompt", nargs="?", metavar="PROMPT", help="default: standard input, or a conversation")
    address = _verb(
        verbs,
        "url",
        "print the endpoint's address, or how to reach it from a laptop",
        "curl $(hpc-router url)/health\nhpc-router url --ssh               the `ssh` command to run on the laptop",
        json=True,
    )
    address.add_argument("--ssh", action="store_true", help="print the `ssh` command that forwards a local port to it")
    address.add_argument("--port", type=_port, default=8000, metavar="N", help="the local port (default 8000)")
    _verb(
        verbs,
        "token",
        "print the owner's token",
        "curl --noproxy '*' -H @<(printf 'Authorization: Bearer %s\\n' \"$(hpc-router token)\") \\\n"
        '     "$(hpc-router url)/v1/models"     # bash; every user of a node can read its command lines',
    )


def _changing(verbs: "_Verbs[_Parser]") -> None:
    scale = _verb(verbs, "scale", "change how many replicas experts have", "hpc-router scale math=3 code=0", json=True)
    scale.add_argument("counts", nargs="+", metavar="EXPERT=N")
    change = _verb(
        verbs,
        "set",
        "change limits and policy while the router serves, without ending a request",
        "hpc-router set router.max_in_flight=500 policy.margin=0.05\n"
        "hpc-router set router.max_in_flight=        back to the configured value",
        json=True,
    )
    change.add_argument("settings", nargs="+", metavar="KEY=VALUE")
    drain = _verb(
        verbs,
        "drain",
        "let replicas finish their requests and end; new jobs replace them",
        "hpc-router drain math-0\nhpc-router drain gpu17 --wait        all replicas on that node, but no router\n"
        "hpc-router drain gpu17 --undo        let jobs start on that node again\nhpc-router drain router",
        json=True,
    )
    drain.add_argument("names", nargs="+", metavar="REPLICA|SLOT|EXPERT|NODE|router")
    drain.add_argument("--wait", action="store_true", help="return when the replicas have ended")
    drain.add_argument("--undo", action="store_true", help="drain nothing: let jobs start on these nodes again")
    register = _verb(
        verbs,
        "register",
        "add an endpoint that runs elsewhere to a run, which is created if it is new",
        "hpc-router register --run runs/mine --expert math --url http://node7:8000/v1\n"
        "hpc-router register --expert big --url https://api.example.org --model big-70b --token-file ~/.api-token",
        json=True,
    )
    register.add_argument("--expert", required=True, metavar="NAME", help="the expert's name")
    register.add_argument("--url", required=True, help="its address, with or without /v1")
    register.add_argument("--model", help="name of the model there (default: the one in its /v1/models)")
    register.add_argument("--token-file", type=Path, metavar="F", help="file with the token that the endpoint requires")
    probing = register.add_mutually_exclusive_group()
    probing.add_argument(
        "--probe-path",
        metavar="PATH",
        default="/v1/models",
        help="path of the router's probe (default /v1/models); any HTTP answer proves that the endpoint is alive",
    )
    probing.add_argument(
        "--no-probe",
        dest="probe_path",
        action="store_const",
        const=None,
        help="send no probe: only check that its port accepts connections",
    )
    unregister = _verb(
        verbs,
        "unregister",
        "remove an external endpoint from a run",
        "hpc-router unregister math-x0\nhpc-router unregister --expert math --url http://node7:8000",
    )
    unregister.add_argument("replica", nargs="?", metavar="REPLICA")
    unregister.add_argument("--expert", metavar="NAME", help="all external endpoints of this expert")
    unregister.add_argument("--url", help="only those at this address")
    reconcile = _verb(
        verbs,
        "reconcile",
        "submit what is missing and end what is surplus, once or in a loop",
        "hpc-router reconcile\nhpc-router reconcile --loop          what the router's job runs",
    )
    reconcile.add_argument("--loop", action="store_true", help="repeat until SIGTERM")
    reconcile.add_argument("--while-leading", metavar="REPLICA", help="with --loop: only while this router leads")
    reconcile.add_argument("--tied", action="store_true", help="with --loop: end when stdin is closed")


def _classifying(verbs: "_Verbs[_Parser]") -> None:
    classify = verbs.add_parser(
        "classify",
        help="examine and edit a classifier; `hpc-router classify --help` lists the tasks",
        description="Examine and edit a classifier. To train one: `python -m launch.train_classifier --help`.",
        epilog="examples:\n  hpc-router classify predict my-classifier prompts.jsonl\n"
        "  hpc-router classify eval my-classifier test.jsonl --fit train.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = classify.add_subparsers(dest="task", metavar="TASK", required=True, parser_class=_Parser)
    known = {}
    for name, summary in (
        ("eval", "print accuracy, confusion, balance, coverage and latency; cost and quality if measured"),
        ("predict", "print one decision per prompt, as a JSON line"),
        ("pack", "move clusters between experts until no expert exceeds its share of the load"),
        ("assign", "give a cluster to another expert, without training"),
    ):
        known[name] = tasks.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        known[name].add_argument("artefact", type=Path, metavar="ARTEFACT", help="folder of the artefact")
        if name != "assign":
            known[name].add_argument(
                "prompts", type=Path, metavar="PROMPTS.jsonl", help="prompts, one JSON object per line"
            )
    known["eval"].add_argument("--fit", type=Path, metavar="FILE", help="name the clusters by these labelled prompts")
    known["eval"].add_argument(
        "--cost", action="append", type=_amount, default=[], metavar="EXPERT=X", help="cost of an answer of this expert"
    )
    known["eval"].add_argument("--json", action="store_true", help="print JSON")
    known["predict"].add_argument("--fallback", metavar="EXPERT", help="the fallback expert, as policy.fallback")
    known["pack"].add_argument(
        "--capacity",
        action="append",
        type=_amount,
        default=[],
        metavar="EXPERT=N",
        help="its capacity (default: all equal)",
    )
    known["pack"].add_argument(
        "--limit", type=_number, default=1.0, metavar="F", help="highest load / capacity share (default 1)"
    )
    known["pack"].add_argument(
        "--max-loss", type=_number, default=0.1, metavar="X", help="highest loss of accuracy (default 0.1)"
    )
    known["pack"].add_argument("--output", type=Path, metavar="DIR", help="write the artefact with the new table here")
    known["assign"].add_argument(
        "table", nargs="+", type=_assigned, metavar="CLUSTER=EXPERT", help="CLUSTER= removes its expert"
    )
    known["assign"].add_argument("--output", type=Path, metavar="DIR", help="where to write it (default: in place)")


def _assigned(text: str) -> tuple[str, str | None]:
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise argparse.ArgumentTypeError(f"'{text}' is not CLUSTER=EXPERT")
    return name, value or None


def _amount(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"'{text}' is not EXPERT=NUMBER")
    return name, _number(value)


def _measuring(verbs: "_Verbs[_Parser]") -> None:
    """A group: what is measured is a verb of its own. None of them needs a run."""
    bench = verbs.add_parser(
        "bench",
        help="measure this installation; `hpc-router bench --help` lists the benchmarks",
        description="Measure this installation on this machine.",
        epilog="examples:\n  hpc-router bench router --quick\n  hpc-router bench soak",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmarks = bench.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True, parser_class=_Parser)
    summary = "the cost of relaying: this router beside nginx, haproxy, vllm-router, sglang-router and no router"
    router = benchmarks.add_parser(
        "router",
        help=summary,
        description=summary[0].upper() + summary[1:] + ". Relays that are not installed are named and skipped.",
        epilog="examples:\n  hpc-router bench router --quick                   half a minute: does it work here?\n"
        "  hpc-router bench router                           a quarter of an hour\n"
        "  hpc-router bench router --only nginx,router --seconds 10 --soak 1000000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    router.add_argument("--only", type=_names, default=(), metavar="NAME,...", help="measure only these relays")
    router.add_argument("--streams", type=_count, metavar="N", help="concurrent streams (default 1000)")
    router.add_argument("--rate", type=_number, metavar="R", help="events per second and stream (default 40)")
    router.add_argument("--seconds", type=_number, metavar="S", help="duration of each measurement (default 5)")
    router.add_argument("--rounds", type=_count, metavar="N", help="rounds, each with every relay (default 3)")
    router.add_argument("--connections", type=_count, metavar="N", help="connections for short requests (default 16)")
    router.add_argument(
        "--soak", type=_count, default=0, metavar="N", help="then send N requests: does its memory grow?"
    )
    router.add_argument(
        "--quiet",
        type=_number,
        default=0.0,
        metavar="S",
        help="on a shared machine: before each measurement, wait up to S seconds until nothing else runs",
    )
    router.add_argument("--peers", type=Path, metavar="DIR", help="virtual environment that has the routers from PyPI")
    router.add_argument(
        "--tree",
        action="append",
        type=_named,
        default=[],
        metavar="NAME=DIR",
        help="another checkout of this router, measured beside it",
    )
    router.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: analysis/results)")
    router.add_argument("--quick", action="store_true", help="one short round; the figures mean little")
    router.add_argument("--json", action="store_true", help="print JSON")
    _add_soak(benchmarks)
    _add_agreement(benchmarks)


def _add_soak(benchmarks: "argparse._SubParsersAction[_Parser]") -> None:
    summary = "load on a deployment of its own while its processes are killed: what fails?"
    soak = benchmarks.add_parser(
        "soak",
        help=summary,
        description=summary[0].upper() + summary[1:] + " Exit status 1 if a request failed that no kill "
        "explains, if a gauge is not zero at the end, or if memory or descriptors grow.",
        epilog="examples:\n  hpc-router bench soak                             a minute\n"
        "  hpc-router bench soak --seconds 600               the long form\n"
        "  hpc-router bench soak --strike replica=10 --strike worker=30",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    soak.add_argument("--seconds", type=_number, metavar="S", help="duration of the load (default 60)")
    soak.add_argument("--rate", type=_number, metavar="R", help="short requests per second (default 100)")
    soak.add_argument("--streams", type=_count, metavar="N", help="streams open at any time (default 200)")
    soak.add_argument("--workers", type=_count, metavar="N", help="workers of the router (default 2)")
    soak.add_argument(
        "--strike",
        action="append",
        metavar="KIND=SECONDS",
        help="kill a replica, a worker or the control process every SECONDS, or `once`; repeat for more kinds; `none`: "
        "nothing (default: replica=5, worker=60, control=once)",
    )
    soak.add_argument("--seed", type=int, metavar="N", help="seed of the arrivals (default 0)")
    soak.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: analysis/results)")
    soak.add_argument("--json", action="store_true", help="print JSON")


def _add_agreement(benchmarks: "argparse._SubParsersAction[_Parser]") -> None:
    agreement = _verb(
        benchmarks,
        "agreement",
        "the load generator's figures beside those of `vllm bench serve`, on a running deployment",
        "hpc-router bench agreement --vllm .venv-vllm/bin/python --tokenizer /models/llama",
    )
    agreement.add_argument("--vllm", required=True, metavar="PYTHON", help="interpreter that has vLLM")
    agreement.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="a tokenizer's folder")
    agreement.add_argument("--model", metavar="EXPERT", help="the model to ask (default auto)")
    agreement.add_argument("--users", type=_count, metavar="N", help="number of users (default 8)")
    agreement.add_argument("--requests", type=_count, metavar="N", help="requests per tool and round (default 200)")
    agreement.add_argument("--tokens", type=_count, metavar="N", help="maximum tokens of an answer (default 32)")
    agreement.add_argument("--rounds", type=_count, metavar="N", help="rounds, each with both tools (default 3)")
    agreement.add_argument("--out", type=Path, metavar="DIR", help="folder for the result (default: analysis/results)")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,30}", name) or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(folder).absolute()


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number below 10^9")
    return int(text)


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (valid: 1 to 65535)")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number (valid: 0 to 10^9)")
    return number
