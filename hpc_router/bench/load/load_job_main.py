"""A load job: waits for orders in a folder, carries them out, leaves what it saw. Several share one order each.

    python -m hpc_router.bench.load.load_job_main FOLDER NUMBER

Orders are `order-<n>.json`, answered by `load-<n>.<job>.json`; both are replaced whole, so a shared file system is
enough. It ends when `stop` lies there, or when the caller's `beat` has been still for a minute.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from hpc_router.bench.config import read_config
from hpc_router.bench.load.generator import LoadTarget, carry_out, to_json
from hpc_router.bench.prompts import BenchPrompt
from hpc_router.bench.workload import Point, workload
from hpc_router.errors import HpcRouterError
from hpc_router.state.atomic_files import exists_now, replace_json

POLL_S: Final = 0.1
STILL_S: Final = 60.0


def order(target: LoadTarget, config: dict[str, Any], prompts: list[BenchPrompt], point: Point, begin_at: float) -> Any:
    """Plain data for all jobs of one point."""
    return {
        "url": target.url,
        "token": target.token,
        "config": config,
        "prompts": [asdict(prompt) for prompt in prompts],
        "point": asdict(point),
        "begin_at": begin_at,
    }


def serve(folder: Path, job: int) -> int:
    replace_json(folder / f"ready.{job}", {"at": time.time()})
    number = 0
    while not _over(folder):
        path = folder / f"order-{number}.json"
        if not exists_now(path):
            time.sleep(POLL_S)
            continue
        answer = folder / f"load-{number}.{job}.json"
        try:
            replace_json(answer, _carried_out(json.loads(path.read_bytes()), folder / f"job-{job}", job))
        except HpcRouterError as error:
            replace_json(answer, {"failed": str(error)})
        except Exception as error:  # a defect: whoever waits for the answer must hear of it
            replace_json(answer, {"failed": f"{type(error).__name__}: {error}"})
            raise
        number += 1
    return 0


def _carried_out(given: dict[str, Any], folder: Path, job: int) -> dict[str, Any]:
    config = read_config(given["config"])
    if job >= config.load_jobs:
        return {"idle": True}
    work = workload(config, [BenchPrompt(**one) for one in given["prompts"]], Point(**given["point"]), job=job)
    time.sleep(max(0.0, given["begin_at"] - time.time()))
    return to_json(carry_out(LoadTarget(given["url"], given["token"]), config, work, folder))


def _over(folder: Path) -> bool:
    if exists_now(folder / "stop"):
        return True
    try:
        return time.time() - (folder / "beat").stat().st_mtime > STILL_S
    except OSError:
        return True  # the caller has removed it all


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), int(sys.argv[2])))
