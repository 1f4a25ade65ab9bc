"""What an engine is given: the copy on its node, and if that is not possible the model's own folder."""

import asyncio
import errno
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hpc_router.config.schema import ClusterConfig, EngineConfig, ExpertConfig
from hpc_router.expert.engines import Place, build_engine
from hpc_router.expert.staging import staging
from hpc_router.expert.staging.copying import CopyProgress
from hpc_router.expert.staging.model_files import list_files
from hpc_router.expert.staging.node_disk import NodeDisk
from hpc_router.expert.staging.staging import NodeStaging
from tests.support.waiting import GUARD_S, eventually

PLACE = Place(Path("/scratch/x"))
PROGRAM = """
import asyncio, json, os, sys
from pathlib import Path
from hpc_router.config.schema import ClusterConfig, EngineConfig, ExpertConfig
from hpc_router.expert.engines import Place, build_engine
from hpc_router.expert.staging.staging import NodeStaging

async def main(stage_to, model):
    engine = build_engine("math", ExpertConfig(model=model, engine=EngineConfig(kind="sim")))
    async with NodeStaging(engine, ClusterConfig(stage_to=stage_to), os.environ, limit_s=60) as staging:
        place = await staging.prepare(Place(Path("/scratch/x")), version=None)
        print(json.dumps([place.path_of(model), staging.report.copied, staging.report.text]), flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def stager(
    stage_to: Path | str, *models: Path, limit_s: float = GUARD_S, **cluster: Any
) -> AsyncIterator[NodeStaging]:
    adapters = {f"a{number}": str(model) for number, model in enumerate(models[1:])}
    engine = build_engine(
        "math", ExpertConfig(model=str(models[0]), engine=EngineConfig(kind="sim")), adapters=adapters
    )
    config = ClusterConfig(stage_to=str(stage_to), **cluster)
    async with NodeStaging(engine, config, {"LOCAL": "/nowhere"}, limit_s=limit_s) as one:
        yield one


def copy_of(node_disk: Path, model: Path) -> Path:
    files = list_files(model)
    return node_disk / f"hpc-router-models-{os.getuid()}" / f"model-{files.key}" / files.source.name


def alike(model: Path, copy: Path) -> bool:
    names = [file.path for file in list_files(model).files]
    return names == [file.path for file in list_files(copy).files] and all(
        (model / name).read_bytes() == (copy / name).read_bytes() for name in names
    )


async def test_a_copy_is_made_once_and_used_again(model: Path, node_disk: Path) -> None:
    for copied in (list_files(model).size, 0):
        async with stager(node_disk, model) as one:
            place = await one.prepare(PLACE, version="1")
            copy = Path(place.path_of(str(model)))
            assert copy == copy_of(node_disk, model)
            assert alike(model, copy)
            assert one.report.copied == copied
            assert one.report.stage_s is not None
            how = "was copied in " if copied else "is on the node's disk"
            assert (one.report.text or "").startswith(f"{model} {how}")


async def test_without_a_folder_to_stage_to_nothing_happens(model: Path) -> None:
    engine = build_engine("math", ExpertConfig(model=str(model), engine=EngineConfig(kind="sim")))
    async with NodeStaging(engine, ClusterConfig(), os.environ, limit_s=GUARD_S) as one:
        assert await one.prepare(PLACE, version="1") is PLACE
        assert (one.report.stage_s, one.report.text) == (None, None)


async def test_adapters_are_copied_too_and_hub_ids_are_not(model: Path, node_disk: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "law"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("lora")
    async with stager(node_disk, Path("org/model"), adapter) as one:
        place = await one.prepare(PLACE, version=None)
        assert place.copies == {str(adapter): str(copy_of(node_disk, adapter))}
        assert one.report.copied == 4


async def test_a_model_of_one_file_is_copied(node_disk: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"gguf")
    async with stager(node_disk, model) as one:
        copy = Path((await one.prepare(PLACE, version=None)).path_of(str(model)))
        assert (copy, copy.read_bytes()) == (copy_of(node_disk, model), b"gguf")


async def test_replicas_that_start_together_copy_once(model: Path, node_disk: Path) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(node_disk), str(model)]
    processes = [
        await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
        for _ in range(3)
    ]
    answers = []
    for process in processes:
        assert process.stdout is not None
        answers.append(json.loads(await asyncio.wait_for(process.stdout.readline(), GUARD_S)))
    for process in processes:
        await process.communicate(b"")  # the end of its input
    assert {path for path, _, _ in answers} == {str(copy_of(node_disk, model))}
    assert sorted(copied for _, copied, _ in answers) == [0, 0, list_files(model).size]
    assert alike(model, copy_of(node_disk, model))


async def test_a_waiting_replica_goes_on_when_the_one_that_copied_was_killed(model: Path, node_disk: Path) -> None:
    begun = (
        "import sys; from pathlib import Path; from hpc_router.expert.staging.model_files import list_files\n"
        "from hpc_router.expert.staging.node_disk import NodeDisk\n"
        "part = NodeDisk.open(Path(sys.argv[1])).begin(list_files(Path(sys.argv[2])))\n"
        "(part.path / 'model-1.safetensors').write_text('half'); print(flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", begun, str(node_disk), str(model)]
    writer = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    assert writer.stdout is not None
    await writer.stdout.readline()
    async with stager(node_disk, model) as one:
        preparing = asyncio.create_task(one.prepare(PLACE, version=None))
        await eventually(lambda: (one.report.text or "").startswith("waits for another engine on this node"))
        writer.kill()
        place = await asyncio.wait_for(preparing, GUARD_S)
        assert alike(model, Path(place.path_of(str(model))))
        assert one.report.copied == list_files(model).size
    await writer.wait()


async def falls_back(one: NodeStaging, model: Path, why: str) -> None:
    """The engine starts from the model's own folder."""
    place = await one.prepare(PLACE, version=None)
    assert place.path_of(str(model)) == str(model)
    assert one.report.text is not None
    assert "loaded from" in one.report.text
    assert why in one.report.text
    assert one.report.stage_s is not None


async def test_another_replica_is_waited_for_within_a_limit(model: Path, node_disk: Path) -> None:
    part = NodeDisk.open(node_disk).begin(list_files(model))
    assert part is not None
    async with stager(node_disk, model, limit_s=0.3) as one:
        await falls_back(one, model, "not copied within 0.3 s")
    part.lock.release()


@pytest.mark.parametrize(
    ("stage_to", "why"),
    [
        ("$NOT_SET/models", "cluster.stage_to=$NOT_SET/models: $NOT_SET is not set in this job"),
        ("$LOCAL/models", "No such file or directory"),
        ("local", "not an absolute path"),
    ],
)
async def test_a_folder_that_the_node_does_not_have(model: Path, stage_to: str, why: str) -> None:
    async with stager(stage_to, model) as one:
        await falls_back(one, model, why)


async def test_a_model_on_the_nodes_disk_is_not_copied(node_disk: Path, model: Path) -> None:
    here = node_disk / "math"
    shutil.copytree(model, here)
    async with stager(node_disk, here) as one:
        place = await one.prepare(PLACE, version=None)
        assert (place.copies, one.report.text) == ({}, f"{here} is on the node's disk already")


async def test_one_model_that_cannot_be_copied_does_not_prevent_the_other(
    model: Path, node_disk: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "law"
    damaged.mkdir()
    (damaged / "adapter_model.safetensors").write_text("lora")
    (damaged / "adapter_model.safetensors.sha256").write_text("0" * 64)
    async with stager(node_disk, model, damaged) as one:
        place = await one.prepare(PLACE, version=None)
        assert place.copies == {str(model): str(copy_of(node_disk, model))}
        assert f"{damaged} is loaded from its folder: " in (one.report.text or "")
    folders = [path.name.partition("-")[0] for path in (node_disk / f"hpc-router-models-{os.getuid()}").iterdir()]
    assert folders == ["model"]


async def test_a_copy_that_does_not_fit(model: Path, node_disk: Path) -> None:
    async with stager(node_disk, model, stage_gb=1e-3) as one:
        await falls_back(one, model, "more than cluster.stage_gb=0.001")


async def test_a_disk_that_fills_up_while_the_model_is_copied(
    model: Path, node_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with stager(node_disk, model) as one:
        with monkeypatch.context() as patch:
            patch.setattr("hpc_router.expert.staging.copying.os.fsync", fsync)
            patch.setattr("hpc_router.expert.staging.node_disk.replace_json", lambda *_: None)
            await falls_back(one, model, "No space left on device")
    assert list((node_disk / f"hpc-router-models-{os.getuid()}").iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
async def test_a_disk_that_is_really_full(model: Path, node_disk: Path) -> None:
    """A tmpfs of 16 MiB in a mount namespace of its own, and a kernel that tells of more."""
    lies = "import os; real = os.statvfs; os.statvfs = lambda p: os.statvfs_result((4096, 4096, *[2**30] * 9))\n"
    mounted = f'mount -t tmpfs -o size=16m tmpfs {node_disk} && exec "$@" && ls {node_disk}/*'
    argv = [sys.executable, "-c", lies + PROGRAM, str(node_disk), str(model)]
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "bash", "-c", mounted, "bash", *argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(process.communicate(), GUARD_S)
    path, copied, text = json.loads(output)
    assert (path, copied) == (str(model), 0)
    assert "No space left on device" in text


async def test_a_start_that_is_cancelled_leaves_no_copy(
    model: Path, node_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a drain. The progress is told before the copy is complete."""
    monkeypatch.setattr(staging, "REPORT_S", 0.0)
    async with stager(node_disk, model) as one:
        preparing = asyncio.create_task(one.prepare(PLACE, version=None))
        await eventually(lambda: (one.report.text or "").startswith(f"copies {model}: "))
        preparing.cancel()
        await asyncio.gather(preparing, return_exceptions=True)
        assert preparing.cancelled()
    assert list((node_disk / f"hpc-router-models-{os.getuid()}").iterdir()) == []


async def test_copies_in_use_are_locked_until_the_end(model: Path, node_disk: Path) -> None:
    disk = NodeDisk.open(node_disk)
    async with stager(node_disk, model) as one:
        await one.prepare(PLACE, version="1")
        assert not disk._remove(copy_of(node_disk, model).parent)
        assert [folder for folder in disk._folders("cache-") if disk._remove(folder)] == []
    assert disk._remove(copy_of(node_disk, model).parent)


async def test_a_cache_is_kept_for_each_version_and_each_model(model: Path, node_disk: Path) -> None:
    async def cache_of(version: str | None, *models: Path) -> Path:
        async with stager(node_disk, *models) as one:
            return (await one.prepare(PLACE, version=version)).cache

    first = await cache_of("0.32.0", model)
    assert first.parent.parent == node_disk
    assert first.name.startswith("cache-sim-0.32.0-")
    assert await cache_of("0.32.0", model) == first
    others = [await cache_of("0.33.0", model), await cache_of("0.32.0", Path("org/model"))]
    assert len({first, *others}) == 3
    assert await cache_of(None, model) == PLACE.folder / "cache"


async def test_the_cache_of_an_engine_that_failed_is_dropped(model: Path, node_disk: Path) -> None:
    async with stager(node_disk, model) as one:
        place = await one.prepare(PLACE, version="1")
        (place.cache / "vllm_compile_cache.py").write_text("{")
        assert one.without_cache(place).cache == PLACE.folder / "cache"
        assert one.without_cache(place).path_of(str(model)) == place.path_of(str(model))
    assert not place.cache.exists()


def test_copied_bytes_are_counted_by_all_threads() -> None:
    progress = CopyProgress()
    progress.add(3)
    progress.add(4)
    assert progress.size == 7
