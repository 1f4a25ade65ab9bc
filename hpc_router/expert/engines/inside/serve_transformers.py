"""Runs `transformers serve` on a unix socket, for which it has no option. With `--check`, only parses its options.

The uvicorn server gets a socket instead of a port, no access log, and a long keep-alive time, so that it is not the
first to close an idle connection. With `--weights FOLDER` the model is loaded from that folder and keeps its name. The
check for a newer release of transformers is left out.
"""

import functools
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
        case ["--uds", path, "--weights", folder, *flags]:
            _load_from(folder)
            _listen_on(path)
            app(list(flags), prog_name="transformers serve")
        case ["--uds", path, *flags]:
            _listen_on(path)
            app(list(flags), prog_name="transformers serve")


def _check(command: Any, flags: list[str]) -> None:
    """Parses `flags` as `command` does, and does nothing else: the command's function is replaced before the call."""
    command.callback = lambda **_: None
    command.main(flags, prog_name="transformers serve")


def _load_from(folder: str) -> None:
    """Makes the server load its one model from `folder`. Has no effect if the server of this release of transformers
    lacks the methods to replace; it then loads the model from its configured place."""
    from transformers.cli.serving.model_manager import ModelManager

    def loading_copy(method: Any) -> Any:
        @functools.wraps(method)
        def load(self: Any, model_and_revision: str, *arguments: Any, **options: Any) -> Any:
            revision = model_and_revision.rpartition("@")[2]
            return method(self, f"{folder}@{revision}", *arguments, **options)

        return load

    methods = {name: getattr(ModelManager, name, None) for name in ("_load_processor", "_load_model")}
    if None in methods.values() or "@" in folder:
        sys.stderr.write(f"transformers serve cannot load from {folder}: the model's own folder is used\n")
        return
    for name, method in methods.items():
        setattr(ModelManager, name, loading_copy(method))


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
