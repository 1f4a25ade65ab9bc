"""The verb `batch`: many requests from a file, run in the background."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_router.cli.output import print_lines, print_value, stderr_console
from hpc_router.cli.parser import Parser, Verbs, add_verb
from hpc_router.errors import LaunchError
from hpc_router.state.run_directory import RunDir, find_run


def add_batch(verbs: "Verbs[Parser]") -> None:
    details = " The tasks submit, watch, fetch and cancel batches; `hpc-router batch TASK --help` explains each."
    verb = add_verb(verbs, batch, details=details)
    tasks = verb.add_subparsers(metavar="TASK", parser_class=Parser, required=True)
    parser = add_verb(tasks, _batch_submit, json=True, task=True)
    parser.add_argument("file", type=Path, metavar="FILE", help="one request per line, as in OpenAI's Batch API")
    parser.add_argument(
        "--endpoint",
        default="/v1/chat/completions",
        metavar="PATH",
        help="API path of all its requests (default: chat)",
    )
    parser.add_argument(
        "--window", default="24h", metavar="T", help="when it expires: 24h (default), 7d, ... up to 30d"
    )
    parser.add_argument("--wait", action="store_true", help="show the progress until it has ended")
    parser = add_verb(tasks, _batch_status, json=True, task=True)
    parser.add_argument("id", nargs="?", metavar="ID", help="the batch (default: all of them)")
    parser.add_argument("--wait", action="store_true", help="show the progress until it has ended")
    parser = add_verb(tasks, _batch_results, task=True)
    parser.add_argument("id", metavar="ID", help="the batch")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where its results go (default: standard output)")
    parser.add_argument("--errors", type=Path, metavar="FILE", help="where its failed lines go (default: nowhere)")
    add_verb(tasks, _batch_cancel, json=True, task=True).add_argument("id", metavar="ID", help="the batch")


def batch(arguments: argparse.Namespace) -> int:
    """run many requests from a file in the background, as OpenAI's Batch API does

    hpc-router batch submit questions.jsonl --wait
    hpc-router batch results batch_1a22... --output answers.jsonl
    """
    raise AssertionError("unreachable: a task is required")


def _batch_submit(arguments: argparse.Namespace) -> int:
    """upload a file of requests and run them; prints the ID of the batch

    hpc-router batch submit questions.jsonl
    hpc-router batch submit texts.jsonl --endpoint /v1/embeddings --window 7d --wait
    """
    from hpc_router.cluster.commands.batch import submit

    run = find_run(arguments.run)
    made = submit(run, arguments.file, endpoint=arguments.endpoint, window=arguments.window)
    if arguments.wait:
        if not arguments.json:
            print_lines([made["id"]])
        return _follow(run, made["id"], json=arguments.json)
    return print_value(made) if arguments.json else print_lines([made["id"]])


def _batch_status(arguments: argparse.Namespace) -> int:
    """show one batch or all batches: status, requests and files

    hpc-router batch status
    hpc-router batch status batch_1a22... --wait
    """
    from hpc_router.cli.tables import batch_table
    from hpc_router.cluster.commands.batch import batch as one
    from hpc_router.cluster.commands.batch import batches

    run = find_run(arguments.run)
    if arguments.id is not None and arguments.wait:
        return _follow(run, arguments.id, json=arguments.json)
    shown = batches(run) if arguments.id is None else [one(run, arguments.id)]
    if arguments.json:
        return print_value(shown if arguments.id is None else shown[0])
    print_value(batch_table(shown))
    return print_lines(_faults(shown[0])) if arguments.id is not None else 0


def _batch_results(arguments: argparse.Namespace) -> int:
    """fetch the results of a batch that has ended, in the order of its input

    hpc-router batch results batch_1a22... > answers.jsonl
    hpc-router batch results batch_1a22... --output answers.jsonl --errors failed.jsonl
    """
    from hpc_router.cluster.commands.batch import batch as one
    from hpc_router.cluster.commands.batch import fetch, fetch_to
    from hpc_router.router.batches.stored_batches import ENDED

    run = find_run(arguments.run)
    found = one(run, arguments.id)
    if found["status"] not in ENDED:
        raise LaunchError(f"{found['id']} has not ended: {_summary(found)}")
    output, errors = found["output_file_id"], found["error_file_id"]
    if output is not None and arguments.output is not None:
        fetch_to(run, output, arguments.output)
    elif output is not None:
        sys.stdout.flush()
        fetch(run, output, sys.stdout.buffer.write)
        sys.stdout.buffer.flush()
    if errors is not None and arguments.errors is not None:
        fetch_to(run, errors, arguments.errors)
    sys.stderr.writelines(f"hpc-router: {line}\n" for line in (_summary(found), *_faults(found)))
    return 0 if found["status"] == "completed" else 1


def _batch_cancel(arguments: argparse.Namespace) -> int:
    """cancel a batch; it keeps the results that it has

    hpc-router batch cancel batch_1a22...
    """
    from hpc_router.cluster.commands.batch import cancel

    found = cancel(find_run(arguments.run), arguments.id)
    return print_value(found) if arguments.json else print_lines([f"{found['id']}: {_summary(found)}"])


def _follow(run: RunDir, batch_id: str, *, json: bool) -> int:
    """Shows the progress of a batch until it has ended. Returns 0 if it is completed, else 1."""
    from hpc_router.cluster.commands.batch import followed

    found: dict[str, Any] = {}
    with _json_lines() if json else _progress() as show:
        for found in followed(run, batch_id):
            show(found)
    if not json:
        sys.stderr.writelines(f"hpc-router: {line}\n" for line in (_summary(found), *_faults(found)))
    return 0 if found["status"] == "completed" else 1


@contextmanager
def _json_lines() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that prints a JSON event for each change of a batch."""
    from hpc_router.cli.json_events import JsonEvents

    last: dict[str, Any] | None = None

    def show(found: dict[str, Any]) -> None:
        nonlocal last
        if found != last:
            last = found
            events.event("batch", batch=found)

    with JsonEvents() as events:
        yield show


@contextmanager
def _progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that shows the state of a batch: as a bar on a terminal, else as a line for each change of the
    status or of the share of requests that are done, in percent."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console, begun, last = stderr_console(), time.monotonic(), ("", -1)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed", markup=False),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None, failed=0)

        def show(found: dict[str, Any]) -> None:
            nonlocal last
            counts = found["request_counts"]
            done, total = counts["completed"] + counts["failed"], counts["total"]
            bars.update(task, description=found["status"], completed=done, total=total or None, failed=counts["failed"])
            now = found["status"], 100 * done // max(1, total)
            if not console.is_terminal and now != last:
                last = now
                sys.stderr.write(f"{time.monotonic() - begun:7.1f} s  {_summary(found)}\n")

        yield show


def _summary(found: dict[str, Any]) -> str:
    counts = found["request_counts"]
    done = counts["completed"] + counts["failed"]
    return f"{found['status']}, {done} of {counts['total']} requests done, {counts['failed']} failed"


def _faults(found: dict[str, Any]) -> list[str]:
    """Returns a line for each fault of a batch's input file."""
    errors = (found["errors"] or {}).get("data", [])
    return [f"line {one['line'] or '-'}: {one['code']}: {one['message']}" for one in errors]
