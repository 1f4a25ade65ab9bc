"""The names of the result files of `hpc-router bench`, and how they are written."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_router.bench.provenance import ROOT, in_clone
from hpc_router.state.atomic_files import replace_text


def default_out() -> Path:
    return ROOT / "analysis" / "results" if in_clone() else Path.cwd()


def utc_now() -> str:
    """Returns the current time in ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def stem_of(benchmark: str, at: str) -> str:
    """Returns the name of result files without suffix, such as `soak-20260102T030405Z`. `at`: time from `utc_now`."""
    return f"{benchmark}-{at.replace('-', '').replace(':', '')}"


def write_results(folder: Path, stem: str, value: Mapping[str, Any], texts: Mapping[str, str]) -> Path:
    """Writes `value` as JSON to the file `stem.json` in `folder`, and each text in `texts` to `stem.KEY`. All users can
    read the files. Returns their common path without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"json": json.dumps(value, indent=1, allow_nan=False) + "\n", **texts}
    for suffix, text in contents.items():
        replace_text(folder / f"{stem}.{suffix}", text, mode=0o644)
    return folder / stem
