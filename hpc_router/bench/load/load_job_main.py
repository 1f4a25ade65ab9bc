"""The program of a load job: reads task files from a folder, runs each load, writes its result.

    python -m hpc_router.bench.load.load_job_main FOLDER NUMBER

All load jobs of a benchmark read the same `task-<n>.json`; each writes `result-<n>.<job>.json`. Files are replaced
atomically, so a shared file system is enough. A job ends when the benchmark has written the file `stop`, or has not
renewed the file `beat` for a minute.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import read_config
from hpc_router.bench.load.generator import LoadTarget, run_load
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.search import most_in_flight
from hpc_router.bench.workload import Point, workload
from hpc_router.errors import HpcRouterError
from hpc_router.state.atomic_files import exists_now, replace_json

POLL_S: Final = 0.1
BEAT_TIMEOUT_S: Final = 60.0


def task(target: LoadTarget, config: dict[str, Any], prompts: list[BenchPrompt], point: Point, begin_at: float) -> Any:
    """Returns the content of a task file, which tells all load jobs to run the same measurement point. `begin_at`: Unix
    time at which the load starts."""
    return {
        "url": target.url,
        "token": target.token,
        "config": config,
        "prompts": [asdict(prompt) for prompt in prompts],
        "point": asdict(point),
        "begin_at": begin_at,
    }


def serve(folder: Path, job: int) -> int:
    """Runs load job number `job`: runs the load of each task file in `folder`, until the benchmark tells it to end or
    no longer renews its `beat` file. Returns the exit status."""
    replace_json(folder / f"ready.{job}", {"at": time.time()})
    number = 0
    while not _ended(folder):
        path = folder / f"task-{number}.json"
        if not exists_now(path):
            time.sleep(POLL_S)
            continue
        result = folder / f"result-{number}.{job}.json"
        try:
            replace_json(result, _run(json.loads(path.read_bytes()), folder / f"job-{job}", job))
        except HpcRouterError as error:
            replace_json(result, {"failed": str(error)})
        except Exception as error:  # a defect: report it to the caller, then end with the traceback
            replace_json(result, {"failed": f"{type(error).__name__}: {error}"})
            raise
        number += 1
    return 0


def _run(task: dict[str, Any], folder: Path, job: int) -> dict[str, Any]:
    config = read_config(task["config"])
    if job >= config.load_jobs:
        return {"idle": True}
    point = Point(**task["point"])
    work = workload(config, [BenchPrompt(**one) for one in task["prompts"]], point, job=job)
    most = None if point.rate_per_s is None else most_in_flight(config, point.rate_per_s / config.load_jobs)
    time.sleep(max(0.0, task["begin_at"] - time.time()))
    target = LoadTarget(task["url"], task["token"])
    return asdict(run_load(target, config, work, folder, most_in_flight=most))


def _ended(folder: Path) -> bool:
    if exists_now(folder / "stop"):
        return True
    try:
        return time.time() - (folder / "beat").stat().st_mtime > BEAT_TIMEOUT_S
    except OSError:
        return True  # the caller has removed the folder


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), int(sys.argv[2])))
