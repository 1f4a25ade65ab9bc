"""The file `elastic.json`: the number of replicas of each elastic expert, why it is that number, and the measurements
from which the next number follows. Only the leading control loop writes it; the next leading loop continues from it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from hpc_router.cluster.control_loop.elasticity import ElasticPolicy, ElasticState
from hpc_router.config.adapters import hosts
from hpc_router.config.elastic import is_elastic, replica_limits
from hpc_router.config.schema import Deployment
from hpc_router.state.atomic_files import read_json, replace_json
from hpc_router.state.run_directory import RunDir


def elastic_policies(deployment: Deployment, replicas: Mapping[str, int]) -> dict[str, ElasticPolicy]:
    """Returns the policies of the elastic experts. `replicas`: by expert, its number of replicas before a decision."""
    policies = {}
    for name, expert in hosts(deployment.experts).items():
        if is_elastic(expert):
            low, high = replica_limits(expert)
            policies[name] = ElasticPolicy(
                min_replicas=low,
                max_replicas=high,
                idle_s=expert.idle_s,
                places=expert.capacity,
                gpus=expert.resources.total_gpus,
                max_in_flight=expert.max_in_flight,
                first=min(max(replicas.get(name, expert.replicas), low), high),
            )
    return policies


def read_states(
    run: RunDir, policies: Mapping[str, ElasticPolicy], scaled_at: Mapping[str, float]
) -> dict[str, ElasticState]:
    """Returns the state of each elastic expert, from `elastic.json`. `scaled_at`: when `scale` or `up` last set the
    number of replicas (Unix seconds); an older state does not count. An expert without a state begins with
    `policy.first` replicas."""
    experts = (read_json(run.elastic_json) or {}).get("experts")
    stored = experts if isinstance(experts, dict) else {}
    states = {}
    for name, policy in policies.items():
        state, set_at = _state(stored.get(name)), scaled_at.get(name, 0.0)
        if state is None or state.changed_at < set_at:
            reason = "it was set by `scale` or `up`" if set_at else f"experts.{name}.replicas"
            state = ElasticState(policy.first, set_at, reason)
        states[name] = replace(state, replicas=min(max(state.replicas, policy.min_replicas), policy.max_replicas))
    return states


def write_states(run: RunDir, states: Mapping[str, ElasticState], *, at: float) -> None:
    """Replaces `elastic.json`. `at`: Unix time of the decision."""
    experts = {name: asdict(state) for name, state in states.items()}
    replace_json(run.elastic_json, {"at": round(at, 3), "experts": experts})


def _state(value: Any) -> ElasticState | None:
    """Returns a state from its JSON value; None if it is not valid."""
    if not isinstance(value, dict):
        return None
    try:
        history = tuple((float(at), float(most)) for at, most in value["history"])
        changes = tuple(float(at) for at in value["changes"])
        return replace(
            ElasticState(int(value["replicas"]), float(value["changed_at"]), str(value["reason"])),
            history=history,
            changes=changes,
            last_request_at=value.get("last_request_at"),
            blocked=value.get("blocked"),
            ready_at=value.get("ready_at"),
        )
    except (KeyError, TypeError, ValueError):
        return None
