"""The verbs that use the endpoint: `route`, `chat`, `feedback`, `url`, `env`, `connect`."""

import argparse
import asyncio
import contextlib
import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING

from hpc_router.cli.output import print_lines, print_value
from hpc_router.cli.parser import Parser, Verbs, add_verb, number, port
from hpc_router.errors import ConfigError, HpcRouterError, LaunchError
from hpc_router.state.run_directory import RunDir, find_run
from hpc_router.state.share_dir import ShareDir

if TYPE_CHECKING:
    from hpc_router.cluster.commands.router_access import RouterAccess
    from hpc_router.connect.listener import RunningForwarder


def add_route(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, route, json=True)
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; it is not sent to any expert")


def route(arguments: argparse.Namespace) -> int:
    """explain which expert a prompt would go to

    hpc-router route "What is the derivative of x^2?"
    """
    from hpc_router.cli.tables import route_text
    from hpc_router.client.router_source import find_folder
    from hpc_router.cluster.commands.router_access import router_access
    from hpc_router.net.http_client import Unreachable, call_blocking

    access = router_access(find_folder(arguments.run))
    try:
        response = call_blocking(
            "POST", f"{access.url}/route", token=access.token, body={"prompt": arguments.prompt},
            certificate=access.certificate,
        )  # fmt: skip
    except Unreachable as error:
        raise LaunchError(f"the router does not answer at {access.url}: {error}") from error
    if response.status != 200:
        raise LaunchError(f"the router refused the request: {response.message}")
    return print_value(response.body if arguments.json else route_text(response.body))


def add_chat(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, chat)
    parser.add_argument("--model", default="auto", help="name of an expert; auto: the policy decides (default)")
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the prompt (default: standard input, or a conversation on a terminal)",
    )


def chat(arguments: argparse.Namespace) -> int:
    """send a prompt and print the answer; without PROMPT, hold a conversation

    hpc-router chat "Is 91 a prime?"
    hpc-router chat --model law
    """
    from hpc_router.client.router_source import find_folder
    from hpc_router.cluster.commands.router_access import router_access

    run = find_folder(arguments.run)
    prompt = arguments.prompt if arguments.prompt is not None or sys.stdin.isatty() else sys.stdin.read()
    messages: list[dict[str, str]] = []

    def turn(text: str) -> None:
        messages.append({"role": "user", "content": text})
        # The address is looked up for each turn: the router may have moved, and another process may have its old port.
        access = router_access(run)
        messages.append({"role": "assistant", "content": asyncio.run(_answer(access, messages, arguments.model))})

    if prompt is not None:
        turn(prompt)
        return 0
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            print()
            return 0
        if text:
            try:
                turn(text)
            except HpcRouterError as error:
                del messages[-1]
                sys.stderr.write(f"hpc-router: {error}\n")


async def _answer(access: "RouterAccess", messages: list[dict[str, str]], model: str) -> str:
    """Prints the answer while it arrives, and returns its whole text."""
    from hpc_router.cluster.commands.chat import Head
    from hpc_router.cluster.commands.chat import chat as converse

    answer = ""
    async with contextlib.aclosing(converse(access, messages, model=model)) as parts:
        async for part in parts:
            if isinstance(part, Head):
                sys.stderr.write(f"[{part.expert}, {part.reason}, {part.replica}]\n")
            else:
                answer += part
                print(part, end="", flush=True)
    print()
    return answer


def add_feedback(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, feedback)
    parser.add_argument("request_id", metavar="REQUEST_ID", help="the header x-request-id of the response")
    parser.add_argument("--score", type=float, required=True, metavar="S", help="a number from -1000 to 1000")


def feedback(arguments: argparse.Namespace) -> int:
    """give a score to the response of an earlier request, in its record

    hpc-router feedback 4c1f0f6d0b6a4b0e9d3a5f7c8e9b0a1d --score 1
    """
    from hpc_router.cluster.commands.trace import send_feedback

    send_feedback(find_run(arguments.run), arguments.request_id, arguments.score)
    return 0


def add_url(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, url, json=True)
    parser.add_argument(
        "--ssh",
        action="store_true",
        help="print the `ssh` command that forwards a local port to it, or to a running `connect`",
    )
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="the local port (default 8000)")


def url(arguments: argparse.Namespace) -> int:
    """print the endpoint's address, or how to reach it from a laptop

    curl $(hpc-router url)/health
    hpc-router url --ssh               the `ssh` command to run on the laptop
    """
    from hpc_router.client.router_source import find_folder
    from hpc_router.cluster.commands.router_access import router_access
    from hpc_router.cluster.commands.tunnel import forwarder_tunnel, tunnel_to

    run = find_folder(arguments.run)
    if not arguments.ssh and not arguments.json:
        return print_lines([router_access(run).url])
    if not isinstance(run, RunDir):
        raise ConfigError(f"--run {run.path}: --ssh and --json need the run directory, which only its owner can open")
    tunnel = forwarder_tunnel(run, port=arguments.port) if arguments.ssh else None
    if tunnel is None:
        tunnel = tunnel_to(run, port=arguments.port, unproven=arguments.ssh)
    if arguments.json:
        return print_value({"url": tunnel.url, "ssh": list(tunnel.argv), "proven": tunnel.unproven is None})
    sys.stderr.writelines(f"{note}\n" for note in tunnel.notes())
    return print_lines([tunnel.line])


def add_env(verbs: "Verbs[Parser]") -> None:
    add_verb(verbs, env)


def env(arguments: argparse.Namespace) -> int:
    """print shell commands that set OPENAI_BASE_URL and OPENAI_API_KEY

    eval "$(hpc-router env)"           in sh, bash or zsh; then any OpenAI client works
    """
    from hpc_router.client.router_source import find_folder
    from hpc_router.cluster.commands.env import exports

    lines, note = exports(find_folder(arguments.run), os.environ)
    if note is not None:
        sys.stderr.write(f"hpc-router: {note}\n")
    return print_lines(lines)


def add_connect(verbs: "Verbs[Parser]") -> None:
    parser = add_verb(verbs, connect, json=True)
    parser.add_argument(
        "--port",
        type=port,
        metavar="N",
        help="serve http://127.0.0.1:N, where clients send the token (default: a unix socket that only you can open)",
    )
    parser.add_argument("--detach", action="store_true", help="serve in the background, and print the process id")
    parser.add_argument(
        "--hold", type=number, default=60.0, metavar="S", help="seconds that a request waits for a router (default 60)"
    )


def connect(arguments: argparse.Namespace) -> int:
    """serve one address for plain clients, and forward their requests to the router that leads

    hpc-router connect --port 8000         then, in another shell: eval "$(hpc-router env)"
    hpc-router connect --detach            then: hpc-router url --ssh
    """
    from hpc_router.client.router_source import find_folder, shared_limit_mb
    from hpc_router.cluster.control_loop.desired_state import readable_deployment
    from hpc_router.connect.main import ConnectOptions, connect_detached
    from hpc_router.connect.main import connect as serve

    run = find_folder(arguments.run)
    max_body_mb = shared_limit_mb(run) if isinstance(run, ShareDir) else readable_deployment(run).router.max_body_mb
    options = ConnectOptions(run, port=arguments.port, hold_s=arguments.hold, max_body_mb=max_body_mb)
    if arguments.detach:
        return _print_forwarder(connect_detached(options), json=arguments.json)
    logging.getLogger("hpc_router.connect").setLevel(logging.INFO)
    serve(options, on_serving=lambda running: _print_forwarder(running, json=arguments.json))
    return 0


def _print_forwarder(running: "RunningForwarder", *, json: bool) -> int:
    """Prints the address of a running `connect` process to stdout (`json`: with port, process id and log, as JSON), and
    how to use and end the process to stderr."""
    run = shlex.quote(running.run)
    if running.port is None:
        use = f"curl --unix-socket {shlex.quote(running.address)} http://localhost/v1/models"
    else:
        use = f'eval "$(hpc-router env --run {run})" for the OpenAI clients of this host'
    end = "Ctrl-C ends it" if running.log is None else f"`kill {running.pid}` ends it; its log is {running.log}"
    for note in (use, f"hpc-router url --ssh --run {run} for a laptop", end):
        sys.stderr.write(f"# {note}\n")
    if json:
        return print_value({"address": running.address, "port": running.port, "pid": running.pid, "log": running.log})
    return print_lines([running.address])
