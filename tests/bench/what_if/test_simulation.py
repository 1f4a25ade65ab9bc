"""The whole prediction: conservation, queueing laws, limits of the router, elasticity, GPU hours."""

import itertools
from dataclasses import replace

import pytest

from hpc_router.bench.what_if.demand import UserDemand, spread_around
from hpc_router.bench.what_if.service import Service, service_of
from hpc_router.bench.what_if.simulation import Prediction, Simulation
from hpc_router.cluster.control_loop.handover import Durations
from hpc_router.config.compose import load_deployment
from hpc_router.errors import ConfigError

FIXED = "{ttft_ms: 400, itl_ms: 50, extra: {jitter: 0}}"


def service(*overrides: str, **options: float) -> Service:
    return service_of(load_deployment(["topology=sim", "cluster.gpus=16", *overrides]), {}, **options)


def one_expert(*overrides: str, **options: float) -> Service:
    """Only the expert `math`; 0.9 s per answer of 11 tokens."""
    others = [f"~experts.{name}" for name in ("code", "medicine", "law", "generalist")]
    own = (f"experts.math.engine.options={FIXED}", "policy=model_field", "policy.fallback=math")
    return service(*others, *own, *overrides, **options)


def demand(*users: tuple[float, int], think_s: float = 0.0, for_s: float = 600.0, **shares: float) -> UserDemand:
    prompt, answer = spread_around(20, 0), spread_around(11, 0)
    return UserDemand(
        users=users, think_s=think_s, for_s=for_s, shares=shares, prompt_tokens=prompt, answer_tokens=answer
    )


def predict(of: Service, wanted: UserDemand) -> Prediction:
    return Simulation(of, wanted).run()


def test_without_waiting_throughput_and_latencies_are_those_of_the_engine() -> None:
    found = predict(one_expert(), demand((0, 8), think_s=0.6)).total
    assert found.ttft_s is not None
    assert found.e2e_s is not None
    assert (found.ttft_s.p50, found.e2e_s.p99) == pytest.approx((0.4, 0.9))
    assert found.requests_per_s == pytest.approx(8 / 1.5, rel=0.05)
    assert found.tokens_per_s == pytest.approx(11 * found.requests_per_s)


def test_a_saturated_expert_serves_what_its_places_allow_and_the_others_wait() -> None:
    """Little's law: 12 users, of which 4 are served, wait for 8 answers of 4 places each."""
    found = predict(one_expert("experts.math.capacity=2", "experts.math.replicas=2"), demand((0, 12))).total
    assert found.requests_per_s == pytest.approx(4 / 0.9, rel=0.01)
    assert found.wait_s is not None
    assert found.wait_s.p50 == pytest.approx(8 / 4 * 0.9, rel=0.01)
    assert found.idle_share == pytest.approx(0, abs=0.01)


def test_no_request_is_lost() -> None:
    found = predict(
        service(
            "experts.code.capacity=1", "experts.math.capacity=1", "router.max_waiting=3", "router.queue_timeout_s=1"
        ),
        demand((0, 60), (100, 5), (200, 90), think_s=2.0),
    )
    last = found.series[-1]
    served = sum(0 if one.e2e_s is None else one.e2e_s.count for one in found.experts.values())
    assert found.total.requests == served + found.total.refused + last.in_flight + last.waiting
    assert found.total.refused > 0
    assert [one.users for one in found.series if one.at_s in (0, 150, 600)] == [60, 5, 90]


def test_the_limits_of_the_router_refuse() -> None:
    waits = ("experts.math.capacity=1", "router.max_waiting=2")
    full = predict(one_expert(*waits), demand((0, 10))).total
    assert full.refused > 100
    late = predict(one_expert("experts.math.capacity=1", "router.queue_timeout_s=2"), demand((0, 10))).total
    assert late.wait_s is not None
    assert late.wait_s.max <= 2
    assert late.refused > 100


def test_max_in_flight_limits_all_replicas_together() -> None:
    found = predict(one_expert("experts.math.replicas=3", "experts.math.max_in_flight=2"), demand((0, 12))).total
    assert found.requests_per_s == pytest.approx(2 / 0.9, rel=0.01)


def test_requests_go_where_shares_or_the_policy_send_them() -> None:
    given = predict(service(), demand((0, 20), think_s=1.0, math=3, law=1)).experts
    assert given["math"].requests / given["law"].requests == pytest.approx(3, rel=0.1)
    assert given["code"].requests == 0
    turns = predict(service("policy=round_robin"), demand((0, 20), think_s=1.0)).experts
    counts = [one.requests for one in turns.values()]
    assert max(counts) - min(counts) <= 1
    equal = predict(service(), demand((0, 20), think_s=1.0)).experts
    assert all(one.requests == pytest.approx(sum(counts) / 5, rel=0.15) for one in equal.values())


def test_an_unknown_expert_among_the_shares_is_named() -> None:
    with pytest.raises(ConfigError, match="--share mth: no such expert; did you mean 'math'"):
        predict(service(), demand((0, 1), mth=1))
    with pytest.raises(ConfigError, match="all are 0"):
        predict(service(), demand((0, 1), math=0))


ELASTIC = ("experts.math.min_replicas=0", "experts.math.max_replicas=4", "experts.math.capacity=4",
           "experts.math.idle_s=60", "experts.math.resources.gpus=2")  # fmt: skip


def test_an_expert_follows_its_demand_from_zero_and_back() -> None:
    of = one_expert(*ELASTIC, "experts.math.replicas=0", "router.cold_start=wait", queue_s=30, load_s=50)
    found = predict(of, demand((0, 0), (300, 10), (1500, 0), think_s=0.5, for_s=3000))
    changes = [(one.replicas, one.reason) for one in found.scaled]
    assert changes[0] == (1, "a request came while it had no replica") or changes[0][0] > 1
    assert changes[-1] == (0, "no request for 60 s")
    assert max(count for count, _ in changes) in (3, 4)
    assert found.total.cold_starts == 10
    assert found.total.wait_s is not None
    assert 80 <= found.total.wait_s.max <= 90, "the queue and the load of the first replica"
    gpus = [point.gpus for point in found.series]
    assert (gpus[0], max(gpus), gpus[-1]) == (0, 2 * max(count for count, _ in changes), 0)
    bounds = (2 * 1200 / 3600, 8 * 1500 / 3600)
    assert bounds[0] < found.total.gpu_hours < bounds[1]


@pytest.mark.parametrize("mode", ["fail", "fallback"])
def test_requests_for_an_expert_without_a_replica(mode: str) -> None:
    of = service("experts.math.min_replicas=0", "experts.math.replicas=0", f"router.cold_start={mode}")
    found = predict(of, demand((0, 5), think_s=1.0, for_s=120, math=1)).total
    assert found.cold_starts == found.requests > 100
    assert found.refused == (found.requests if mode == "fail" else 0)


def test_replicas_of_an_expert_without_any_are_not_waited_for() -> None:
    of = one_expert("experts.math.replicas=0", "router.cold_start=wait")
    found = predict(of, demand((0, 3), think_s=1.0, for_s=60)).total
    assert found.refused == found.requests > 50


@pytest.mark.parametrize("seed", range(5))
def test_all_jobs_together_never_have_more_gpus_than_allowed(seed: int) -> None:
    limits = [f"experts.{name}.{key}" for name in ("code", "math", "law") for key in
              ("min_replicas=0", "max_replicas=4", "capacity=2", "idle_s=20", "resources.gpus=1")]  # fmt: skip
    of = service(*limits, "cluster.max_gpus=4", "router.cold_start=wait", queue_s=5, load_s=10)
    users = [(100.0 * n, count) for n, count in enumerate((5, 40, 0, 60, 3, 0))]
    found = predict(of, replace(demand(*users, think_s=0.3), seed=seed))
    assert max(point.gpus for point in found.series) == 4
    assert len(found.scaled) > 6


def test_a_constant_demand_is_simulated_in_part_and_counted_for_the_whole_period() -> None:
    of = one_expert("experts.math.resources.gpus=4")
    short, long = (predict(of, demand((0, 4), think_s=1.0, for_s=hours * 3600)) for hours in (0.5, 8))
    assert short.simulated_s == long.simulated_s == 1200
    assert (short.total.gpu_hours, long.total.gpu_hours) == pytest.approx((2, 32))
    assert long.total.requests == pytest.approx(16 * short.total.requests, abs=16)
    assert long.total.requests_per_s == short.total.requests_per_s


def test_handovers_cost_gpu_hours() -> None:
    slurm = ("cluster=slurm", "experts.math.resources.gpus=1")
    of = [one_expert(*slurm, *more, load_s=200) for more in ([], ["cluster.walltime=04:00:00"])]
    plain, limited = (predict(one, demand((0, 1), think_s=5.0, for_s=24 * 3600)).total.gpu_hours for one in of)
    overlap_s = 200 + 60 + 150  # loading, margin, drain
    assert plain == pytest.approx(24)
    assert limited == pytest.approx(24 * (1 + overlap_s / (4 * 3600 - overlap_s)))


def test_the_same_seed_gives_the_same_prediction() -> None:
    wanted = replace(demand((0, 30), think_s=1.0, for_s=200), answer_tokens=spread_around(40, 0.5))
    first, again, other = (predict(service(), replace(wanted, seed=seed)).total for seed in (1, 1, 2))
    assert first == again != other


def test_measured_times_of_the_run_count_before_assumed_ones() -> None:
    deployment = load_deployment(["topology=sim", "experts.math.max_replicas=2", "experts.law.max_replicas=2"])
    made = service_of(deployment, {"math": Durations((10.0, 40.0), (70.0, 60.0))})
    times = {name: (one.queue_s, one.load_s) for name, one in made.experts.items()}
    assert (times["math"], times["law"]) == ((40, 70), (60, 120))
    assert any("math needs 40 s in Slurm's queue, 70 s to load (the longest measured" in s for s in made.assumptions)
    assert any("law needs 60 s in Slurm's queue, 120 s to load (assumed;" in s for s in made.assumptions)


def test_gpus_are_those_that_a_simulated_engine_stands_for() -> None:
    made = service_of(load_deployment(["topology=llama3_4x70b_tp4_bf16", "simulate.gpu=h100-sxm"]), {})
    assert {one.gpus for one in made.experts.values()} == {4}


def test_an_adapter_uses_the_engine_of_its_host() -> None:
    found = predict(service_of(load_deployment(["topology=sim_lora"]), {}), demand((0, 10), think_s=1.0))
    hosts = set(found.service.experts)
    adapters = [name for name in found.experts if name not in hosts]
    assert adapters
    assert all(found.experts[name].requests for name in adapters)
    assert all(found.experts[name].replica_hours == 0 for name in adapters)
    assert found.total.replica_hours == pytest.approx(sum(found.experts[name].replica_hours for name in hosts))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["topology=llama3_4x8b_bf16"],
            r"engine.kind=vllm: a prediction needs the GPU: simulate.gpu=GPU \(valid: h100",
        ),
        (["topology=sim", "experts.math.engine.kind=transformers"], "no engine but vllm and sim can be predicted"),
        (["topology=sim", "experts.math.engine.options.extra={jiter: 1}"], "experts.math.engine.options.*jiter"),
        (["topology=empty"], "experts: there is none"),
    ],
)
def test_what_cannot_be_predicted_is_refused_with_its_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        service_of(load_deployment(overrides), {})


def test_series_cover_the_simulated_time_evenly() -> None:
    series = predict(service(), demand((0, 3), think_s=1.0, for_s=320)).series
    assert (series[0].at_s, series[-1].at_s) == (0, 320)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(series)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))
