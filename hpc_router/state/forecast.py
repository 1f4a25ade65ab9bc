"""Reads `forecast.json`, which says when an expert without a ready replica is expected to have one."""

from collections.abc import Mapping
from typing import Any

from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import StampedFile


class ForecastReader:
    """A reader of `forecast.json`. `expected_ready_at`: by expert, the time in Unix seconds at which a replica is
    expected to be ready; as of the last `read`."""

    def __init__(self, run: RunDir) -> None:
        self._file = StampedFile(run.forecast_json, _expected_ready_at)
        self.expected_ready_at: Mapping[str, float] = {}

    def read(self) -> None:
        """Reads the file if it has changed. Raises OSError if the file system fails."""
        self.expected_ready_at = self._file.read() or {}


def _expected_ready_at(content: Mapping[str, Any]) -> dict[str, float]:
    """Returns the valid times in the file's content, by expert."""
    experts = content.get("experts")
    found = (
        {name: e.get("ready_at") for name, e in experts.items() if isinstance(e, dict)}
        if isinstance(experts, dict)
        else {}
    )
    return {name: at for name, at in found.items() if isinstance(at, int | float)}
