"""`check_vllm.py python|rust [flags]`: checks flags with vLLM's parser, and with the Rust front end if it is chosen.

Exits with status 0, or with 2 and a message. Loads no model. With `rust`, VLLM_USE_RUST_FRONTEND must be 1, as for the
engine.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any, NoReturn

TIMEOUT_S = 60.0
EXPLICIT = ("api_server_count", "data_parallel_rank", "data_parallel_external_lb", "data_parallel_hybrid_lb")
"""Flags that vLLM does not pass to the Rust front end as they are."""


def main() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    frontend = sys.argv.pop(1)
    parser: Any = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    arguments = parser.parse_args()
    arguments.subparser = "serve"
    validate_parsed_serve_args(arguments)
    if frontend == "rust":
        check_rust_frontend(arguments)


def check_rust_frontend(arguments: Any) -> None:
    """Runs the front end with these flags and an empty folder as the model, and exits if it refuses a flag. The front
    end checks its flags first, and without a refusal ends because the folder contains no model."""
    program = rust_frontend()
    from vllm.entrypoints.serve.utils.api_utils import jsonify_non_default_args

    with tempfile.TemporaryDirectory() as empty:
        arguments.model = arguments.model_tag = empty
        given = jsonify_non_default_args(arguments, exclude={*EXPLICIT, "subparser"}) | {"model_tag": empty}
        descriptors = [
            word for name in ("listen", "input-listener", "output-listener") for word in (f"--{name}-fd", "0")
        ]
        done = subprocess.run(
            [program, "frontend", *descriptors, "--args-json", json.dumps(given)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S,
            check=False,
        )  # fmt: skip
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    unknown = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    if done.returncode == 2 and unknown:
        refuse(f"the Rust front end does not have the options {', '.join(unknown)}")
    elif done.returncode == 2:
        refuse(lines[0])
    elif any("invalid OpenAI frontend configuration" in line for line in lines):
        refuse(lines[-1])
    elif not any("failed to create chat/text backends" in line for line in lines):
        sys.exit(f"the Rust front end ended with status {done.returncode}: {lines[-1] if lines else 'no output'}")


def rust_frontend() -> str:
    """Returns the path of the front end's program, as the installed vLLM finds it. Exits if there is none."""
    import vllm
    from vllm import envs

    if "VLLM_USE_RUST_FRONTEND" not in envs.environment_variables:
        refuse(f"vLLM {vllm.__version__} has no Rust front end (valid: frontend=python, or a newer vLLM)")
    try:
        program = envs.VLLM_RUST_FRONTEND_PATH
    except FileNotFoundError:
        program = None
    if not program or not os.access(program, os.X_OK):
        where = program or "vllm-rs in the folder of the package vllm"
        refuse(
            f"no Rust front end at {where}: it is in the wheel of vLLM for GPUs, or VLLM_RUST_FRONTEND_PATH names it"
        )
    return str(program)


def refuse(message: str) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
