"""The words for a replica's states mean the same in every enum."""

from hpc_router.cluster.commands.replica_view import DisplayedState
from hpc_router.expert.agent.lifecycle import TRANSITIONS, JobLifecycle
from hpc_router.net.protocol import RankState
from hpc_router.router.replicas.replica import Event, RoutingState
from hpc_router.state.job_records import JobPhase
from hpc_router.state.registry import State


def words(states: type[State | JobPhase | RoutingState | DisplayedState | RankState]) -> set[str]:
    return {state.value for state in states}


def test_a_word_that_is_published_is_known_to_every_reader() -> None:
    """The agent's states to the router, the job's phases to `status`."""
    assert words(State) == words(JobPhase) & words(RoutingState) == words(RoutingState) - {"ejected"}
    assert words(JobPhase) < words(DisplayedState)
    assert words(State) == {event.removeprefix("says_") for event in Event if event.startswith("says_")}


def test_a_phase_publishes_the_state_of_the_same_word_or_starting() -> None:
    assert set(TRANSITIONS) == set(JobPhase)
    for phase in JobPhase:
        state = JobLifecycle(phase).state
        assert state.value == (phase.value if phase.value in words(State) else State.STARTING.value)


def test_ranks_have_words_of_their_own() -> None:
    assert words(RankState).isdisjoint(words(DisplayedState) | words(RoutingState))
