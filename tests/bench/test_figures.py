"""Each figure against its definition, and properties that hold for any observations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.bench.figures import CUT, MeasurementPart, Observation, Percentiles, Window, figures

WINDOW = Window(10.0, 20.0)


def seen(started_s: float, *content_s: float, **values: object) -> Observation:
    given: dict[str, object] = {"part": MeasurementPart.MEASURED, "user": 0, "expert": "math", **values}
    ended_s = given.pop("ended_s", content_s[-1] if content_s else started_s)
    return Observation(started_s=started_s, ended_s=ended_s, content_s=content_s, **given)  # type: ignore[arg-type]


def test_the_figures_of_one_response() -> None:
    """Sent at 10.5; four tokens at 11, 12, 12.5 and 14; ended at 15."""
    found = figures([seen(10.5, 11.0, 12.0, 12.5, 14.0, ended_s=15.0)], WINDOW)
    assert found.ttft_s is not None
    assert found.itl_s is not None
    assert found.tpot_s is not None
    assert found.e2e_s is not None
    assert found.session_tokens_per_s is not None
    assert found.ttft_s.p50 == 0.5
    assert (found.itl_s.count, found.itl_s.mean, found.itl_s.p50, found.itl_s.max) == (3, 1.0, 1.0, 1.5)
    assert found.tpot_s.mean == 1.0
    assert found.e2e_s.max == 4.5
    assert found.session_tokens_per_s.mean == pytest.approx(4 / 4.5)
    assert (found.tokens, found.tokens_per_s, found.requests_per_s) == (4.0, 0.4, 0.1)
    assert found.counted_by == "events"


def test_events_with_several_tokens() -> None:
    """Three events of two tokens each: a gap of one second between events is two gaps of half a second."""
    found = figures([seen(10.0, 11.0, 12.0, 13.0, tokens=6)], WINDOW)
    assert found.itl_s is not None
    assert found.tpot_s is not None
    assert found.itl_s.p50 == 0.5
    assert found.tpot_s.p50 == 0.4
    assert (found.tokens, found.counted_by) == (6.0, "engine")


def test_a_failed_request_has_no_latency() -> None:
    failed = seen(11.0, 11.1, 11.2, error="stream_error")
    found = figures([failed, seen(11.0, 12.0), failed], WINDOW)
    assert (found.requests, found.succeeded, found.failed, found.errors) == (3, 1, 2, {"stream_error": 2})
    assert found.ttft_s is not None
    assert found.ttft_s.count == 1
    assert found.tokens == 1
    assert found.experts == {"math": 1.0}


def test_no_request_succeeded() -> None:
    found = figures([seen(11.0, error="connect")], WINDOW)
    assert (found.ttft_s, found.itl_s, found.e2e_s, found.experts) == (None, None, None, {})
    assert found.tokens_per_s == found.requests_per_s == 0.0


def test_latencies_are_of_measured_requests_and_throughput_of_all() -> None:
    """The window excludes its start and includes its end; requests stopped at the end of the point count in it."""
    found = figures(
        [
            seen(8.0, 9.0, 10.0, 11.0, part=MeasurementPart.WARM_UP),
            seen(12.0, 13.0),
            seen(18.0, 19.0, 20.0, 20.1, part=MeasurementPart.FILLING, error=CUT),
            seen(18.0, 19.5, part=MeasurementPart.FILLING, error="timeout"),
        ],
        WINDOW,
    )
    assert found.ttft_s is not None
    assert (found.ttft_s.count, found.requests, found.failed) == (1, 1, 0)
    assert found.tokens == 1 + 1 + 2
    assert found.requests_per_s == 0.2


def test_a_window_of_length_zero() -> None:
    assert figures([], Window(2.0, 2.0)).tokens_per_s == 0.0


def test_percentiles_interpolate() -> None:
    found = Percentiles.of([1.0, 2.0, 3.0, 4.0])
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx((2.5, 3.7, 3.97))
    assert Percentiles.of([]) is None


times = st.floats(0.001, 5.0)


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    started_s = draw(st.floats(0.0, 25.0))
    content_s, at_s = [], started_s
    for gap_s in draw(st.lists(times, max_size=8)):
        at_s += gap_s
        content_s.append(at_s)
    error = draw(st.sampled_from([None, "timeout", "http_503", CUT])) if content_s else "no_content"
    tokens = draw(st.none() | st.integers(len(content_s), 4 * len(content_s))) if content_s else None
    return seen(
        started_s,
        *content_s,
        ended_s=at_s + draw(times),
        part=draw(st.sampled_from(MeasurementPart)),
        expert=draw(st.sampled_from(["math", "code", None])),
        error=error,
        tokens=tokens,
    )


@given(st.lists(observations(), max_size=20))
def test_counts_and_shares_add_up(observed: list[Observation]) -> None:
    found = figures(observed, WINDOW)
    good = [o for o in observed if o.part is MeasurementPart.MEASURED and o.error is None]
    assert found.requests == found.succeeded + found.failed
    assert sum(found.errors.values()) == found.failed
    assert sum(found.experts.values()) == pytest.approx(1.0 if good else 0.0)
    assert found.tokens_per_s * found.window_s == pytest.approx(found.tokens)
    counts = [spread.count if spread else 0 for spread in (found.ttft_s, found.e2e_s, found.session_tokens_per_s)]
    assert counts == [len(good)] * 3
    assert (found.itl_s.count if found.itl_s else 0) == sum(len(o.content_s) - 1 for o in good)
    for spread in (found.ttft_s, found.itl_s, found.tpot_s, found.e2e_s):
        if spread is not None:
            assert spread.p50 <= spread.p90 <= spread.p99 <= spread.max
            assert spread.mean <= spread.max * (1 + 1e-9)


@given(observations())
def test_the_times_of_a_response_agree(one: Observation) -> None:
    """TTFT and decoding time end at the last content; with one token per event, TPOT is the mean gap."""
    if not one.content_s:
        return
    decoding_s = one.content_s[-1] - one.content_s[0]
    per_event = one.token_count / len(one.content_s)
    assert one.ttft_s + decoding_s <= one.e2e_s + 1e-9
    assert sum(one.itl_s) * per_event == pytest.approx(decoding_s)
    if one.tpot_s is not None:
        assert one.tpot_s * (one.token_count - 1) == pytest.approx(decoding_s)
    if one.token_count == len(one.content_s) > 1:
        assert one.tpot_s == pytest.approx(sum(one.itl_s) / len(one.itl_s))


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=200))
def test_percentiles_lie_between_samples(samples: list[float]) -> None:
    spread = Percentiles.of(samples)
    assert spread is not None
    assert min(samples) <= spread.p50 <= spread.p99 <= spread.max == max(samples)
    assert sum(sample <= spread.p90 for sample in samples) >= 0.9 * (len(samples) - 1)
