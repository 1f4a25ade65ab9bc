"""The verb `token`, with which the owner prints the owner's token and manages those of other users."""

import argparse
import getpass
import sys
import time

from hpc_router.cli.output import print_lines, print_value
from hpc_router.cli.parser import Parser, Verbs, add_verb, name_list
from hpc_router.errors import ConfigError
from hpc_router.state.run_directory import find_run


def add_token(verbs: "Verbs[Parser]") -> None:
    details = " The tasks create, list and revoke tokens of other users; `hpc-router token TASK --help` explains each."
    tasks = add_verb(verbs, token, details=details).add_subparsers(metavar="TASK", parser_class=Parser)
    parser = add_verb(tasks, _token_create, json=True, task=True)
    parser.add_argument("--user", required=True, metavar="U", help="whose token it is, for lists and messages")
    parser.add_argument("--expires", metavar="WHEN", help="for example 12h, 30d or 2031-12-31 (default: never)")
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=N",
        help="requests=N per minute, tokens=N (generated ones) per minute, or concurrency=N requests at the same time; "
        "several with commas (default: none)",
    )
    parser.add_argument("--experts", type=name_list, metavar="E,...", help="the experts it may use (default: all)")
    add_verb(tasks, _token_list, json=True, task=True).add_argument("--user", metavar="U", help="only this user's")
    parser = add_verb(tasks, _token_revoke, json=True, task=True)
    parser.add_argument("ids", nargs="*", metavar="ID", help="id of a token, as `list` shows it")
    parser.add_argument("--user", metavar="U", help="all tokens of this user")


def token(arguments: argparse.Namespace) -> int:
    r"""print the owner's token, or make tokens for other users

    hpc-router token create --user alice --expires 30d --limit requests=60,tokens=100000
    curl --noproxy '*' -H @<(printf 'Authorization: Bearer %s\n' "$(hpc-router token)") \
         "$(hpc-router url)/v1/models"     # bash; every user of a node can read its command lines
    """
    return print_lines([find_run(arguments.run).token()])


def _token_create(arguments: argparse.Namespace) -> int:
    """make a token for a user, and print it; it cannot be printed again

    hpc-router token create --user alice
    hpc-router token create --user course --expires 2031-02-01 --limit requests=60,concurrency=4 --experts math,code
    """
    from hpc_router.cluster.commands.user_tokens import check_experts, parse_expiry, parse_limits, share_token
    from hpc_router.state.user_tokens import create_token

    run, now = find_run(arguments.run), time.time()
    expires_at = None if arguments.expires is None else parse_expiry(arguments.expires, now=now)
    experts = None if arguments.experts is None else check_experts(run, arguments.experts)
    limits = parse_limits(arguments.limit)
    made, text = create_token(run, arguments.user, expires_at=expires_at, limits=limits, experts=experts)
    shared = share_token(run, made, text)
    if shared is not None:
        sys.stderr.write(f"# {shared}\n")
    if arguments.json:
        return print_value({**made.to_json(), "token": text})
    sys.stderr.write(f"# token {made.id} of {made.user}; it cannot be shown again\n")
    return print_lines([text])


def _token_list(arguments: argparse.Namespace) -> int:
    """the tokens of users: id, user, end, limits and experts

    hpc-router token list
    """
    from hpc_router.cli.tables import token_table
    from hpc_router.cluster.commands.user_tokens import described
    from hpc_router.state.user_tokens import read_tokens

    now = time.time()
    tokens = [token for token in read_tokens(find_run(arguments.run)) if arguments.user in (None, token.user)]
    if arguments.json:
        return print_value([described(token, now=now) for token in tokens])
    return print_value(token_table(tokens, now=now))


def _token_revoke(arguments: argparse.Namespace) -> int:
    """make tokens invalid: requests that begin more than a second later are refused

    hpc-router token revoke 3f2a9c01
    hpc-router token revoke --user alice
    """
    from hpc_router.cluster.commands.user_tokens import unshare_tokens
    from hpc_router.state.user_tokens import revoke_tokens

    if bool(arguments.ids) == (arguments.user is not None):
        raise ConfigError("token revoke: name either IDs of tokens or --user U")
    by, run = getpass.getuser(), find_run(arguments.run)
    revoked = revoke_tokens(run, by=by, ids=arguments.ids, user=arguments.user)
    if arguments.json:
        print_value([token.to_json() for token in revoked])
    else:
        print_lines(f"revoked {token.id} of {token.user}" for token in revoked)
    unshare_tokens(run, revoked)  # last, because the tokens are revoked even if the folder cannot be used
    return 0
