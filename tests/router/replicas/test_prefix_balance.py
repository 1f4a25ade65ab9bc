"""The choice of a replica weighs what its prefix cache saves against what waits there."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from hpc_router.router.replicas.engine_load import EngineLoad
from hpc_router.router.replicas.prefix_balance import DEFAULT_S_PER_BYTE, FREE_REQUESTS, RECENT_S, SAVED_WEIGHT
from hpc_router.router.replicas.prefixes import ENDS, PromptPrefix
from hpc_router.router.replicas.replica import PREFILL_COLUMNS, REQUEST_BYTES, Reservation
from hpc_router.router.replicas.table import ReplicaTable
from tests.router.support import replica


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def tables(*, replicas: int = 4, workers: int = 1, clock: Clock | None = None) -> list[ReplicaTable]:
    """The tables of the workers of one router, with the same replicas over the same counters."""
    rows = [defaultdict[int, int](int) for _ in range(workers)]
    made = []
    for at, row in enumerate(rows):
        table = ReplicaTable(1.5, cells=row, peers=[r for n, r in enumerate(rows) if n != at], clock=clock or Clock())
        for n in range(replicas):
            one = replica(f"math-{n}.g1", capacity=1000)
            table.reassign_column(one, n + 1)
            table.put(one)
        made.append(table)
    return made


def prompt(*hashes: int, session: int | None = None) -> Callable[[], PromptPrefix]:
    """A prompt that ends where its last beginning ends."""
    made = PromptPrefix(hashes, ENDS, ENDS[len(hashes) - 1] if hashes else 0, session)
    return lambda: made


def conversation(number: int, length: int, *, system: Sequence[int] = ()) -> Callable[[], PromptPrefix]:
    return prompt(*system, *[number * 1000 + at for at in range(length)])


def sent(table: ReplicaTable, prefix: Callable[[], PromptPrefix]) -> Reservation:
    made = table.acquire(["math"], prefix=prefix)
    assert made is not None
    return made


def jain(counts: Sequence[float]) -> float:
    return sum(counts) ** 2 / (len(counts) * sum(n * n for n in counts))


def answered(reservation: Reservation) -> str:
    reservation.prefill_ended()
    reservation.release()
    return reservation.replica.name


def test_a_conversation_stays_and_conversations_spread() -> None:
    (table,) = tables()
    homes = [{answered(sent(table, conversation(n, turn))) for turn in range(4, 9)} for n in range(40)]
    assert {len(home) for home in homes} == {1}
    assert set(Counter(name for home in homes for name in home).values()) == {10}


def test_a_replica_with_the_prefix_is_left_when_more_waits_there_than_it_saves() -> None:
    (table,) = tables(replicas=2)
    at_home = answered(sent(table, conversation(1, 8)))
    saved = SAVED_WEIGHT * ENDS[7]
    home = table.get(at_home)
    assert home is not None
    home.peer_prefill_bytes = saved // 2
    assert answered(sent(table, conversation(1, 8))) == at_home
    home.peer_prefill_bytes = 2 * saved
    assert answered(sent(table, conversation(1, 8))) != at_home
    home.peer_prefill_bytes = 0
    assert {answered(sent(table, conversation(1, 9))) for _ in range(2)} <= {"math-0.g1", "math-1.g1"}


def test_a_hot_prefix_spreads_and_each_of_its_replicas_keeps_it() -> None:
    """Long system prompt, one question each, all running at once."""
    (table,) = tables()
    system = list(range(9))
    running = [sent(table, conversation(n, 1, system=system)) for n in range(1, 201)]
    shares = Counter(one.replica.name for one in running)
    assert len(shares) == 4
    assert jain(list(shares.values())) >= 0.95
    computed_whole = sum(one.prefill_bytes > ENDS[8] for one in running)
    assert computed_whole == 4, "once per replica"


def test_different_prompts_spread_evenly() -> None:
    (table,) = tables(replicas=8)
    running = [sent(table, conversation(n, 6)) for n in range(400)]
    assert jain(list(Counter(one.replica.name for one in running).values())) >= 0.99
    idle = [answered(sent(table, conversation(1000 + n, 6))) for n in range(400)]
    assert jain(list(Counter(idle).values())) >= 0.99


def test_recent_work_fades() -> None:
    clock = Clock()
    (table,) = tables(replicas=2, clock=clock)
    busy = table.get(answered(sent(table, conversation(1, 14))))
    assert busy is not None
    before = table.explain("math", prompt(7)())
    clock.now += 3 * RECENT_S
    later = table.explain("math", prompt(7)())
    waits = [next(e.wait_s for e in at if e.replica == busy.name) for at in (before, later)]
    assert waits[1] == pytest.approx(waits[0] / 20.1, rel=0.01)
    clock.now += 1e6
    assert sum(e.wait_s for e in table.explain("math", prompt(7)())) == pytest.approx(0)
    assert answered(sent(table, conversation(2, 14)))


def test_all_workers_agree_on_the_home_without_telling_each_other() -> None:
    first, second = tables(workers=2)
    homes = {n: answered(sent(first, conversation(n, 8))) for n in range(30)}
    again = {n: answered(sent(second, conversation(n, 10))) for n in range(30)}
    assert homes == again
    assert len(set(homes.values())) == 4


def test_the_key_is_behind_what_conversations_share() -> None:
    """A system prompt that both workers have seen in several conversations does not keep these together."""
    first, second = tables(workers=2)
    system = list(range(6))
    for table in (first, second):
        for n in (901, 902):
            answered(sent(table, conversation(n, 4, system=system)))
    homes = {n: answered(sent(first, conversation(n, 6, system=system))) for n in range(1, 41)}
    again = {n: answered(sent(second, conversation(n, 8, system=system))) for n in range(1, 41)}
    assert sum(homes[n] == again[n] for n in homes) >= 36
    assert len(set(homes.values())) == 4


def test_the_prefill_of_other_workers_counts_until_it_has_ended() -> None:
    first, second = tables(workers=2, replicas=2)
    running = sent(first, conversation(1, 12))
    busy = running.replica.name
    assert first.cells[running.replica.column + PREFILL_COLUMNS] == ENDS[11]
    estimates = {e.replica: e.wait_s for e in second.explain("math", prompt(5)())}
    assert max(estimates, key=estimates.__getitem__) == busy
    running.prefill_ended()
    assert first.cells[running.replica.column + PREFILL_COLUMNS] == 0
    running.release()


def test_a_session_goes_home_whatever_it_says() -> None:
    first, second = tables(workers=2)
    for session in range(10):
        short = {answered(sent(table, prompt(session=session))) for table in (first, second, first)}
        assert len(short) == 1
    homes = [
        answered(sent(first, conversation(n, 8)) if n < 0 else sent(first, prompt(n, session=n))) for n in range(40)
    ]
    assert len(set(homes)) == 4


def test_a_replica_far_above_the_average_is_not_chosen_for_its_prefix() -> None:
    (table,) = tables(replicas=2)
    table.pin_bound = 1.0
    answered(sent(table, conversation(1, len(ENDS))))
    running = []
    for _ in range(100):
        one = sent(table, conversation(1, len(ENDS)))
        one.prefill_ended()
        running.append(one)
    loads = sorted(r.load for r in table.all())
    assert loads[1] - loads[0] <= 2 * FREE_REQUESTS + 2


def test_a_new_process_has_an_empty_cache() -> None:
    (table,) = tables(replicas=2)
    name = answered(sent(table, conversation(1, 8)))
    old = table.get(name)
    assert old is not None
    table.put(replica(name, capacity=1000))
    renewed = table.get(name)
    assert renewed is not None
    assert renewed.prefix_bit == old.prefix_bit, "the bit is free again"
    assert all(e.cached_bytes == 0 for e in table.explain("math", conversation(1, 8)()))


def test_the_time_per_byte_is_measured() -> None:
    clock = Clock()
    (table,) = tables(replicas=2, clock=clock)
    running = sent(table, conversation(1, 10))
    clock.now += 2.0
    running.prefill_ended()
    (estimate, *_) = table.explain("math", conversation(2, 10)())
    assert estimate.prefill_s == pytest.approx(2.0)
    for _ in range(200):
        table.measure_prefill(one := sent(table, conversation(3 + _, 10)))
        one.release()
    assert next(iter(table.explain("math", conversation(999, 10)()))).prefill_s < 0.1
    running.release()


def test_without_a_choice_nothing_is_read_or_remembered() -> None:
    (table,) = tables(replicas=1)

    def unexpected() -> PromptPrefix:
        raise AssertionError("there is one replica")

    assert answered(sent(table, unexpected)) == "math-0.g1"
    assert table.explain("math", prompt(1)()) == []
    (pair,) = tables(replicas=2)
    pair.pin_bound = None
    picked = [answered(sent(pair, unexpected)) for _ in range(4)]
    assert picked in (["math-0.g1", "math-1.g1"] * 2, ["math-1.g1", "math-0.g1"] * 2)
    assert pair.explain("math", prompt(1)()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_of_other_clients_count_where_the_engine_tells(workers: int) -> None:
    table = tables(workers=workers, replicas=2)[0]
    held = sent(table, prompt(1))
    busy = held.replica
    held.prefill_ended()
    busy.set_engine_load(EngineLoad(running=7.0, waiting=2.0))
    waits = {e.replica: e.wait_s for e in table.explain("math", prompt(2)())}
    busy.set_engine_load(EngineLoad(running=1.0, waiting=0.0))
    own = {e.replica: e.wait_s for e in table.explain("math", prompt(2)())}
    assert waits[busy.name] - own[busy.name] == pytest.approx(8 * REQUEST_BYTES * DEFAULT_S_PER_BYTE)
    busy.set_engine_load(None)
    assert {e.replica: e.wait_s for e in table.explain("math", prompt(2)())} == own
    held.release()
