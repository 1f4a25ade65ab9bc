"""When what is struck, and what is refused."""

from pathlib import Path

import pytest

from hpc_router.bench.soak.options import FaultTarget, SoakOptions, Strikes, strikes_of
from hpc_router.errors import ConfigError


def test_the_usual_strikes_of_a_minute_and_of_ten() -> None:
    minute = SoakOptions(seconds=60, out=Path()).schedule()
    assert [at for at, target in minute if target is FaultTarget.REPLICA] == [5.0 * n for n in range(1, 12)]
    assert [at for at, target in minute if target is FaultTarget.WORKER] == [20.0]
    assert [at for at, target in minute if target is FaultTarget.CONTROL] == [32.0]
    assert minute == sorted(minute)
    ten = SoakOptions(seconds=600, out=Path()).schedule()
    count = {target: sum(one is target for _, one in ten) for target in FaultTarget}
    assert count == {FaultTarget.REPLICA: 119, FaultTarget.WORKER: 10, FaultTarget.CONTROL: 1}
    assert ten[-1][0] <= 595


def test_strikes_are_told_in_words() -> None:
    assert strikes_of("replica=10") == Strikes(FaultTarget.REPLICA, 10.0, 10.0)
    assert strikes_of("control=once") == Strikes(FaultTarget.CONTROL, 5.0, None)
    assert strikes_of("none") is None


@pytest.mark.parametrize("text", ["", "replica", "replica=0", "replica=-1", "replica=x", "node=5", "replica=nan"])
def test_others_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="valid: replica=SECONDS"):
        strikes_of(text)


@pytest.mark.parametrize("given", [{"seconds": 0}, {"rate": 0}, {"streams": 0}, {"workers": 65}])
def test_what_makes_no_sense_is_refused(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="between"):
        SoakOptions(out=Path(), **given).checked()  # type: ignore[arg-type]
