"""The batch as counts does in every step what the batch of the simulated engine does, and costs the same time."""

from hypothesis import given
from hypothesis import strategies as st

from hpc_router.config.schema import Roofline
from hpc_router.sim.continuous_batching import Batch, Sequence
from hpc_router.sim.counted_batch import CountedBatch, CountedSequence
from hpc_router.sim.kv_cache import BlockPool
from hpc_router.sim.roofline import RooflineEngine, SequenceStep, StepWork

ENGINE = RooflineEngine(Roofline(gpu="l40s"))
ARRIVALS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=12)


class Reference:
    """The simulated engine's batch, with every sequence removed right after its last token."""

    def __init__(self, blocks: int, block_size: int, max_seqs: int, max_tokens: int) -> None:
        self.batch = Batch(BlockPool(blocks, block_size, caching=False), max_seqs, max_tokens)
        self.outputs: dict[Sequence, int] = {}

    def add(self, prompt: int, output: int) -> None:
        self.outputs[self.batch.add(prompt)] = output

    def plan(self) -> list[SequenceStep]:
        return self.batch.plan()

    def finish(self) -> tuple[list[int], list[int]]:
        """Returns the numbers of the sequences with their first token, and of those with their last one."""
        produced = self.batch.finish()
        last = [one for one in produced if one.produced == self.outputs[one]]
        for one in last:
            self.batch.remove(one)
        return sorted(one.number for one in produced if one.produced == 1), sorted(one.number for one in last)


def total(steps: list[SequenceStep]) -> StepWork:
    return StepWork(
        len(steps),
        sum(s.new for s in steps),
        sum(s.context for s in steps),
        sum(s.new * (s.context + s.new / 2) for s in steps),
    )


def numbers(sequences: list[CountedSequence]) -> list[int]:
    return sorted(one.number for one in sequences)


@given(
    st.integers(8, 40), st.integers(1, 8), st.integers(1, 6), st.integers(6, 64), ARRIVALS, st.booleans()
)  # also caches so small that sequences are preempted
def test_every_step_is_that_of_the_simulated_engine(
    blocks: int, block_size: int, max_seqs: int, max_tokens: int, arrivals: list[tuple[int, int, int]], runs: bool
) -> None:
    room = (blocks - 1) * block_size
    reference = Reference(blocks, block_size, max_seqs, max_tokens)
    counted = CountedBatch(blocks, block_size, max_seqs, max_tokens)
    due = sorted((at, prompt % room + 1, min(output, room - prompt % room)) for at, prompt, output in arrivals)
    step = done = 0
    while done < len(arrivals):
        while due and due[0][0] <= step:
            _, prompt, output = due.pop(0)
            reference.add(prompt, output)
            counted.add(prompt, output)
        steps, work = reference.plan(), counted.plan()
        assert (work or StepWork(0, 0, 0, 0.0)) == total(steps)
        if work is None:
            step += 1
            assert due, "sequences wait, and none computes"
            continue
        count = counted.equal_steps() if runs else 1
        if due:
            count = min(count, due[0][0] - step)
        for more in range(1, count):
            assert reference.finish() == ([], [])
            steps = reference.plan()
            assert counted.later_work(more) == total(steps)
        first, last = counted.finish(count)
        assert (numbers(first), numbers(last)) == reference.finish()
        assert counted.free == reference.batch.pool.free
        assert counted.preempted == reference.batch.preempted
        assert [one.number for one in counted.waiting] == [one.number for one in reference.batch.waiting]
        done += len(last)
        step += count
    assert counted.free == blocks
    assert counted.running == 0


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 4000)), min_size=1, max_size=20))
def test_the_sum_of_the_work_takes_as_long_as_its_parts(parts: list[tuple[int, int]]) -> None:
    steps = [SequenceStep(new, context) for new, context in parts]
    assert ENGINE.work_s(total(steps)) == ENGINE.step_s(steps)
