"""Building blocks of the command line's grammar: the parser, a verb with its help, and the types of arguments.

Each verb declares its arguments beside its body, in the module of its group; the docstring of the body is its help.
"""

import argparse
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NoReturn

from hpc_router import __version__

_RUN_HELP: Final = "run directory (default: $HPC_ROUTER_RUN, then runs/latest)"
_EPILOG: Final = """\
begin with
  hpc-router plan topology=sim          show what would run
  hpc-router up topology=sim            run it, and print the address of the endpoint
  hpc-router chat "Is 91 a prime?"      send a prompt
  hpc-router down                       end it and all its jobs

exit status: 0 done, 1 failed, 2 a value to edit, 130 interrupted
`hpc-router VERB --help` explains a verb.
"""

MAX_USERS: Final = 100_000
"""Maximum number of users of a prediction."""

Body = Callable[[argparse.Namespace], int]
"""The function of a verb. Returns the exit status."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hpc-router: {message} (see `{self.prog} --help`)\n")


Verbs = argparse._SubParsersAction


def parse_arguments(
    words: list[str] | None, add_verbs: Iterable[Callable[["Verbs[Parser]"], None]]
) -> tuple[Body, argparse.Namespace]:
    """Returns the verb's body and the parsed arguments. Also finds overrides that stand between two options, which
    argparse alone would refuse."""
    parser = Parser(
        prog="hpc-router",
        description="Several specialised LLMs behind one OpenAI-compatible endpoint; each prompt goes to its expert.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hpc-router {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for add_verb_to in add_verbs:
        add_verb_to(verbs)
    arguments, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unknown argument{'s' if len(unknown) > 1 else ''}: {' '.join(unknown)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    body: Body = arguments.body
    return body, arguments


def add_verb(
    verbs: "Verbs[Parser]", body: Body, *, details: str = "", run: bool = True, json: bool = False, task: bool = False
) -> Parser:
    """Adds a verb, or a task of a verb, and returns its parser. The name is the last word of the name of `body`; the
    help is the docstring of `body`: a summary, an empty line, examples. `details` follows the summary. `run` and
    `json`: whether to add the options `--run` and `--json`. `task`: whether this is a task whose verb has `--run`
    itself, so that `--run` may stand before or after the task."""
    summary, _, examples = (inspect.getdoc(body) or "").partition("\n\n")
    parser = verbs.add_parser(
        body.__name__.strip("_").rpartition("_")[2],
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.{details}",
        epilog=f"examples:\n{textwrap.indent(examples, '  ')}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter if examples else argparse.HelpFormatter,
    )
    parser.set_defaults(body=body)
    if run:
        default = argparse.SUPPRESS if task else None
        parser.add_argument("--run", type=Path, metavar="DIR", default=default, help=_RUN_HELP)
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def name_list(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,30}", name) or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(folder).absolute()


def cluster_assignment(text: str) -> tuple[str, str | None]:
    name, mark, value = text.partition("=")
    if not mark or not name:
        raise argparse.ArgumentTypeError(f"'{text}' is not CLUSTER=EXPERT")
    return name, value or None


def expert_number(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"'{text}' is not EXPERT=NUMBER")
    return name, number(value)


def count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number below 10^9")
    return int(text)


def port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (valid: 1 to 65535)")
    return int(text)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number (valid: 0 to 10^9)")
    return value


def duration(text: str) -> float:
    """Returns the seconds in an argument with a unit, such as 90s, 45m, 2h or 1d; argparse refuses other arguments."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time (valid: a number and s, m, h or d, such as 2h)")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def pause(text: str) -> float:
    """Returns the seconds in an argument as `duration` takes it, or 0; argparse refuses other arguments."""
    return 0.0 if text in ("0", "0s") else duration(text)


def tokens(text: str) -> int:
    """Returns a mean number of tokens; argparse refuses 0 and more than a million."""
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens (valid: 1 to 1000000)")
    return int(text)


def expert_numbers(text: str) -> tuple[tuple[str, float], ...]:
    """Returns the pairs in an argument such as `math=2,code=1`; argparse refuses other arguments."""
    return tuple(expert_number(part) for part in text.split(","))


def users_over_time(text: str) -> tuple[tuple[float, int], ...]:
    """Returns the pairs (seconds, number of users from then on) in `200` or `20,200@1h,0@8h`; argparse refuses other
    arguments."""
    found: list[tuple[float, int]] = []
    for part in text.split(","):
        users, at, time = part.partition("@")
        at_s = duration(time) if at else 0.0
        if not re.fullmatch(r"[0-9]{1,6}", users) or int(users) > MAX_USERS or (found and at_s <= found[-1][0]):
            found.clear()
            break
        found.append((at_s, int(users)))
    if not found or found[0][0] or not any(users for _, users in found):
        valid = f"1 to {MAX_USERS}, or several with the times from which they hold: 20,200@1h,0@8h"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of users (valid: {valid})")
    return tuple(found)


def interval(text: str) -> float:
    """Returns the seconds in an argument without a unit, such as 0.5; argparse refuses less than 0.1 or more than
    3600."""
    value = number(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds (valid: 0.1 to 3600)")
    return value
