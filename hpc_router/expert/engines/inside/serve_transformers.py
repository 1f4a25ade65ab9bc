"""Runs `transformers serve` on a unix socket, for which it has no option. `--check` only runs its parser.

The uvicorn server that it creates gets a socket instead of a port, no access log, and a long keep-alive time, so that
it is not the first to close an idle connection. The check for a newer release is left out.
"""

import sys
from typing import Any

KEEP_ALIVE_S = 3600


def main(arguments: list[str]) -> None:
    import typer
    from transformers.cli.serve import Serve

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name="serve")(Serve)
    match arguments:
        case ["--check", *flags]:
            _check(typer.main.get_command(app), list(flags))
        case ["--uds", path, *flags]:
            _listen_on(path)
            app(list(flags), prog_name="transformers serve")


def _check(command: Any, flags: list[str]) -> None:
    """Runs only the parser of a command, by replacing the command's function."""
    command.callback = lambda **_: None
    command.main(flags, prog_name="transformers serve")


def _listen_on(path: str) -> None:
    import uvicorn

    class UnixConfig(uvicorn.Config):  # type: ignore[misc, unused-ignore]
        def __init__(self, app: Any, **options: Any) -> None:
            for name in ("host", "port"):
                options.pop(name, None)
            options |= {"uds": path, "access_log": False, "timeout_keep_alive": KEEP_ALIVE_S}
            super().__init__(app, **options)

    uvicorn.Config = UnixConfig


if __name__ == "__main__":
    main(sys.argv[1:])
