"""Checks flags with vLLM's own parser. Exits with status 0, or with 2 and a message. Loads no model."""

from typing import Any


def main() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    validate_parsed_serve_args(parser.parse_args())


if __name__ == "__main__":
    main()
