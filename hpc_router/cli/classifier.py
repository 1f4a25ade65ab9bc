"""The verb `classify`, with its tasks: arguments and printing. The tasks themselves are in `cli.classify`."""

import argparse
import json
from pathlib import Path

from hpc_router.cli.output import print_lines, print_value
from hpc_router.cli.parser import Body, Parser, Verbs, add_verb, cluster_assignment, expert_number, number
from hpc_router.config.assignments import unique


def add_classify(verbs: "Verbs[Parser]") -> None:
    classify = verbs.add_parser(
        "classify",
        help="examine and edit a classifier; `hpc-router classify --help` lists the tasks",
        description="Examine and edit a classifier. To train one: `python -m launch.train_classifier --help`.",
        epilog="examples:\n  hpc-router classify predict my-classifier prompts.jsonl\n"
        "  hpc-router classify eval my-classifier test.jsonl --fit train.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = classify.add_subparsers(dest="task", metavar="TASK", required=True, parser_class=Parser)
    _add_eval(tasks)
    _add_predict(tasks)
    _add_pack(tasks)
    _add_assign(tasks)


def _add_task(tasks: "Verbs[Parser]", body: Body, *, prompts: bool = True) -> Parser:
    parser = add_verb(tasks, body, run=False)
    parser.add_argument("artefact", type=Path, metavar="ARTEFACT", help="folder of the artefact")
    if prompts:
        parser.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl", help="prompts, one JSON object per line")
    return parser


def _add_eval(tasks: "Verbs[Parser]") -> None:
    parser = _add_task(tasks, _eval)
    parser.add_argument("--fit", type=Path, metavar="FILE", help="name the clusters by these labelled prompts")
    parser.add_argument(
        "--cost",
        action="append",
        type=expert_number,
        default=[],
        metavar="EXPERT=X",
        help="cost of an answer of this expert",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _eval(arguments: argparse.Namespace) -> int:
    """print accuracy, confusion, balance, coverage and latency; cost and quality if measured"""
    from hpc_router.cli.classifier_tables import evaluation_text
    from hpc_router.cli.classify import evaluate

    result = evaluate(
        arguments.artefact, arguments.prompts, fit=arguments.fit, costs=unique(arguments.cost, where="--cost")
    )
    return print_value(result if arguments.json else evaluation_text(result))


def _add_predict(tasks: "Verbs[Parser]") -> None:
    parser = _add_task(tasks, _predict)
    parser.add_argument("--fallback", metavar="EXPERT", help="the fallback expert, as policy.fallback")


def _predict(arguments: argparse.Namespace) -> int:
    """print one decision per prompt, as a JSON line"""
    from hpc_router.cli.classify import predict

    decisions = predict(arguments.artefact, arguments.prompts, fallback=arguments.fallback)
    return print_lines(json.dumps(decision, ensure_ascii=False) for decision in decisions)


def _add_pack(tasks: "Verbs[Parser]") -> None:
    parser = _add_task(tasks, _pack)
    parser.add_argument(
        "--capacity",
        action="append",
        type=expert_number,
        default=[],
        metavar="EXPERT=N",
        help="capacity of this expert, in any unit (default: all equal)",
    )
    parser.add_argument(
        "--limit",
        type=number,
        default=1.0,
        metavar="F",
        help="highest ratio of an expert's share of the load to its share of the capacity (default 1)",
    )
    parser.add_argument(
        "--max-loss",
        type=number,
        default=0.1,
        metavar="X",
        help="highest total loss of accuracy (default 0.1)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the artefact with the new table here")


def _pack(arguments: argparse.Namespace) -> int:
    """move clusters to other experts until no expert exceeds its share of the load"""
    from hpc_router.cli.classify import pack

    return print_value(
        pack(
            arguments.artefact,
            arguments.prompts,
            capacity=unique(arguments.capacity, where="--capacity"),
            limit=arguments.limit,
            max_loss=arguments.max_loss,
            output=arguments.output,
        )
    )


def _add_assign(tasks: "Verbs[Parser]") -> None:
    parser = _add_task(tasks, _assign, prompts=False)
    parser.add_argument(
        "table",
        nargs="+",
        type=cluster_assignment,
        metavar="CLUSTER=EXPERT",
        help="the new expert of a cluster; CLUSTER= removes its expert",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the changed artefact (default: ARTEFACT itself)"
    )


def _assign(arguments: argparse.Namespace) -> int:
    """give a cluster to another expert, without training"""
    from hpc_router.cli.classify import assign

    output = arguments.output or arguments.artefact
    return print_value(assign(arguments.artefact, unique(arguments.table, where="assign"), output=output))
