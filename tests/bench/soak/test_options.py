"""The schedule of faults, and invalid options."""

from pathlib import Path

import pytest

from hpc_router.bench.soak.options import FaultTarget, KillSchedule, SoakOptions, parse_fault
from hpc_router.errors import ConfigError


def test_the_default_faults_of_one_and_ten_minutes() -> None:
    minute = SoakOptions(seconds=60, out=Path()).schedule()
    assert [at for at, target in minute if target is FaultTarget.REPLICA] == [5.0 * n for n in range(1, 12)]
    assert [at for at, target in minute if target is FaultTarget.WORKER] == [20.0]
    assert [at for at, target in minute if target is FaultTarget.CONTROL] == [32.0]
    assert minute == sorted(minute)
    ten = SoakOptions(seconds=600, out=Path()).schedule()
    count = {target: sum(one is target for _, one in ten) for target in FaultTarget}
    assert count == {FaultTarget.REPLICA: 119, FaultTarget.WORKER: 10, FaultTarget.CONTROL: 1}
    assert ten[-1][0] <= 595


def test_faults_are_parsed() -> None:
    assert parse_fault("replica=10") == KillSchedule(FaultTarget.REPLICA, 10.0, 10.0)
    assert parse_fault("control=once") == KillSchedule(FaultTarget.CONTROL, 5.0, None)
    assert parse_fault("none") is None


@pytest.mark.parametrize("text", ["", "replica", "replica=0", "replica=-1", "replica=x", "node=5", "replica=nan"])
def test_invalid_faults_name_the_valid_ones(text: str) -> None:
    with pytest.raises(ConfigError, match="valid: replica=SECONDS"):
        parse_fault(text)


@pytest.mark.parametrize("values", [{"seconds": 0}, {"rate": 0}, {"streams": 0}, {"workers": 65}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="between"):
        SoakOptions(out=Path(), **values).checked()  # type: ignore[arg-type]
