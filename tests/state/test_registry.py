"""Reads registry files that are incomplete, outdated, of another user, or invalid."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.errors import RegistryError
from hpc_router.state.registry import (
    EngineInfo,
    Record,
    RecordKind,
    RegistryReader,
    State,
    leading_router,
    publish,
    replica_name,
    split_replica,
    withdraw,
)

RECORD = Record(
    kind=RecordKind.EXPERT,
    replica="math-0.g3",
    url="http://127.0.0.1:8001",
    state=State.READY,
    serves={"math": "m"},
    generation=3,
    nonce="n",
    beat=4,
    beat_s=2.0,
    engine=EngineInfo(kind="sim", max_model_len=8192, priority=False, prefix_caching=True),
    load_s=41.5,
    accepts=("text", "tools"),
)
CONTRACT_KEYS = {
    *("schema", "kind", "serves", "replica", "generation", "nonce", "url", "state", "job_id", "node", "owner_uid"),
    *("expires_at", "beat", "beat_s", "capacity", "engine", "load_s", "accepts"),
}
ENGINE_KEYS = {
    *("kind", "version", "model", "revision", "quantization", "tensor_parallel_size", "pipeline_parallel_size"),
    *("max_model_len", "priority", "prefix_caching", "frontend"),
}


def test_the_keys_are_the_contract() -> None:
    written = RECORD.to_json()
    assert set(written) == CONTRACT_KEYS
    assert set(written["engine"]) == ENGINE_KEYS


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    publish(tmp_path, RECORD)
    assert RegistryReader(tmp_path).snapshot() == {"math-0.g3": RECORD}
    assert (tmp_path / "math-0.g3.json").stat().st_mode & 0o777 == 0o600
    withdraw(tmp_path, "math-0.g3")
    withdraw(tmp_path, "math-0.g3")
    assert RegistryReader(tmp_path).snapshot() == {}


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    value = RECORD.to_json() | {"colour": "blue"}
    value["engine"]["draft_model"] = "x"
    (tmp_path / "math-0.g3.json").write_text(json.dumps(value))
    assert RegistryReader(tmp_path).snapshot() == {"math-0.g3": RECORD}


def test_null_and_a_missing_key_are_both_unknown(tmp_path: Path) -> None:
    """An agent of an earlier version writes no `load_s`."""
    unknown = replace(RECORD, engine=EngineInfo(), load_s=None, accepts=None)
    as_null = unknown.to_json()
    assert (as_null["load_s"], as_null["accepts"], as_null["engine"]["priority"]) == (None, None, None)
    without = {key: value for key, value in as_null.items() if key not in ("load_s", "accepts", "engine")}
    for content in (as_null, without):
        (tmp_path / "math-0.g3.json").write_text(json.dumps(content))
        assert RegistryReader(tmp_path).snapshot() == {"math-0.g3": unknown}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": None},
        {"kind": "oracle"},
        {"state": "asleep"},
        {"serves": ["math"]},
        {"serves": {"math": 3}},
        {"url": "ftp://x"},
        {"url": None},
        {"beat": "4"},
        {"capacity": True},
        {"generation": "3"},
        {"generation": 3.5},
        {"generation": None},
        {"generation": True},
        {"nonce": 5},
        {"load_s": "41"},
        {"accepts": [1]},
        {"accepts": 3},
        {"engine": {"priority": "yes"}},
        {"engine": {"prefix_caching": 1}},
        {"engine": {"max_model_len": "8192"}},
        {"engine": "vllm"},
        {"replica": "../../etc/passwd"},
        {"replica": "code-0.g1"},
    ],
)
def test_a_wrong_value_refuses_the_file_and_nothing_else(tmp_path: Path, change: dict[str, object]) -> None:
    other = replace(RECORD, replica="math-1.g1")
    publish(tmp_path, other)
    (tmp_path / "math-0.g3.json").write_text(json.dumps(RECORD.to_json() | change))
    assert RegistryReader(tmp_path).snapshot() == {"math-1.g1": other}


def test_a_half_written_file_keeps_the_last_valid_record(tmp_path: Path) -> None:
    publish(tmp_path, RECORD)
    reader = RegistryReader(tmp_path)
    reader.snapshot()
    path = tmp_path / "math-0.g3.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert reader.snapshot() == {"math-0.g3": RECORD}
    assert RegistryReader(tmp_path).snapshot() == {}, "a reader without a last view sees nothing"
    path.write_text(json.dumps(replace(RECORD, beat=9).to_json()))
    assert reader.snapshot()["math-0.g3"].beat == 9


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, RECORD)
    os.chown(tmp_path / "math-0.g3.json", 12345, 12345)
    assert RegistryReader(tmp_path).snapshot() == {}


def test_a_link_is_checked_by_its_own_owner_and_a_folder_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "math-0.g3.json").mkdir()
    (tmp_path / ".math-1.g1.json.tmp").write_text("{}")
    (tmp_path / "notes.txt").write_text("{}")
    assert RegistryReader(tmp_path).snapshot() == {}


def test_a_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        RegistryReader(tmp_path / "absent").snapshot()


@given(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True), st.integers(0, 999), st.integers(1, 999))
def test_replica_names_are_split_into_their_parts(expert: str, slot: int, generation: int) -> None:
    assert split_replica(replica_name(expert, slot, generation)) == (expert, str(slot), generation)


@pytest.mark.parametrize(
    "url", ["", "http://", "http:///v1", "ftp://h", "http://h\\v1", "http://h/\\v1", "http://h /v1"]
)
def test_a_record_without_a_usable_address_is_skipped(tmp_path: Path, url: str) -> None:
    """Otherwise the router could not read any record while it is there."""
    publish(tmp_path, RECORD)
    publish(tmp_path, replace(RECORD, replica="math-1.g1", url=url))
    assert RegistryReader(tmp_path).snapshot() == {"math-0.g3": RECORD}


@pytest.mark.parametrize("name", ["", "math", "math-0", "math-0.g", "Math-0.g1", "a/b-0.g1", "math-0.g1\n"])
def test_an_invalid_replica_name_is_refused(name: str) -> None:
    with pytest.raises(RegistryError):
        split_replica(name)


def test_the_leader_is_the_ready_router_of_the_highest_generation() -> None:
    def router(generation: int, state: State) -> Record:
        return replace(
            RECORD,
            kind=RecordKind.ROUTER,
            replica=f"router-0.g{generation}",
            generation=generation,
            state=state,
            serves={},
        )

    routers = [router(9, State.READY), router(10, State.READY), router(11, State.STARTING), RECORD]
    leader = leading_router({r.replica: r for r in routers})
    assert leader is not None
    assert leader.generation == 10
    assert leading_router({"math-0.g3": RECORD}) is None


def test_a_file_that_is_large_or_not_regular_is_refused(tmp_path: Path) -> None:
    """A pipe would block the reader, and a link may lead anywhere."""
    (tmp_path / "registry").mkdir()
    publish(tmp_path, RECORD)
    folder, target = tmp_path / "registry", tmp_path / "math-0.g3.json"
    os.mkfifo(folder / "math-1.g3.json")
    (folder / "math-0.g3.json").symlink_to(target)
    (folder / "math-2.g3.json").write_text(json.dumps(replace(RECORD, replica="math-2.g3").to_json()) + " " * 2**20)
    (folder / "math-3.g3.json").write_text("[" * 100_000)
    reader = RegistryReader(folder)
    assert reader.snapshot() == {}
    assert reader.snapshot() == {}
