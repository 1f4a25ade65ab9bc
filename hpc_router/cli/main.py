"""`hpc-router`: parses the command line, runs the verb, and turns an expected failure into one line and an exit status.

Exit status: 0 done, 1 failed, 2 a value to edit, 130 interrupted. Each verb's arguments and body stand together in the
module of its group. A body imports what it needs when it runs, so that `--help` loads little.
"""

import io
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Final

from hpc_router.cli import (
    INTERRUPTED,
    access,
    batch,
    benchmark,
    classifier,
    deployment,
    doctor,
    endpoint,
    observation,
    operation,
)
from hpc_router.cli.parser import Parser, Verbs, parse_arguments
from hpc_router.errors import ConfigError, HpcRouterError

VERBS: Final[Mapping[str, Callable[["Verbs[Parser]"], None]]] = {
    "plan": deployment.add_plan,
    "doctor": doctor.add_doctor,
    "up": deployment.add_up,
    "down": deployment.add_down,
    "status": observation.add_status,
    "top": observation.add_top,
    "logs": observation.add_logs,
    "why": observation.add_why,
    "trace": observation.add_trace,
    "usage": observation.add_usage,
    "route": endpoint.add_route,
    "chat": endpoint.add_chat,
    "feedback": endpoint.add_feedback,
    "batch": batch.add_batch,
    "url": endpoint.add_url,
    "token": access.add_token,
    "env": endpoint.add_env,
    "connect": endpoint.add_connect,
    "scale": operation.add_scale,
    "apply": operation.add_apply,
    "set": operation.add_set,
    "drain": operation.add_drain,
    "nodes": operation.add_nodes,
    "register": operation.add_register,
    "unregister": operation.add_unregister,
    "reconcile": operation.add_reconcile,
    "bench": benchmark.add_bench,
    "classify": classifier.add_classify,
}
"""The verbs, in the order of `hpc-router --help`."""


def main(words: list[str] | None = None) -> int:
    body, arguments = parse_arguments(words, VERBS.values())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # `logs -f | grep` must see each line when it is written
    logging.basicConfig(level=logging.WARNING, format="hpc-router: %(message)s")
    return run_reporting_errors(lambda: body(arguments))


def run_reporting_errors(body: Callable[[], int]) -> int:
    """Returns the body's exit status. Writes an expected failure to stderr, one line per fault, without a traceback."""
    try:
        status = body()
        sys.stdout.flush()
    except HpcRouterError as error:
        sys.stderr.writelines(f"hpc-router: {line}\n" for line in str(error).splitlines())
        return 2 if isinstance(error, ConfigError) else 1
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        sys.stderr.write(f"hpc-router: {error}\n")
        return 1
    except KeyboardInterrupt as error:  # a verb's own text says what is left to do
        sys.stderr.write(f"hpc-router: {'; '.join(['interrupted', *map(str, error.args)])}\n")
        return INTERRUPTED
    return status
