"""A model folder."""

from pathlib import Path

import pytest

from hpc_router.expert.staging.copying import CHUNK_BYTES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Shards of several chunks, a folder inside, and entries that no engine reads."""
    folder = tmp_path / "math-8b"
    for name, content in {
        "config.json": b"{}",
        "model-1.safetensors": bytes(range(256)) * (CHUNK_BYTES // 128),
        "model-2.safetensors": b"\x01\x02" * (CHUNK_BYTES // 3),
        "1_Pooling/config.json": b"{}",
        "original/consolidated.00.pth": b"twice",
        ".git/objects/pack": b"history",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
