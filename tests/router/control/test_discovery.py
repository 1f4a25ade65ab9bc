"""Discovery: records of the registry, and whether the process at an address proves that it is the replica."""

import json
from dataclasses import replace
from pathlib import Path

from hpc_router.net.auth import new_token
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.state import registry
from hpc_router.state.registry import RecordKind
from tests.router.fakes import RunningRouter, a_deployment, a_router, a_run, fake_replica, reset
from tests.router.support import chat, post, ready
from tests.support.waiting import eventually


def standing(router: RunningRouter, name: str) -> RoutingState | None:
    replica = router.gateway.table.get(name)
    return replica.state if replica else None


async def test_replicas_come_and_go_with_their_records(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with a_router(run, a_deployment("math")) as router:
        async with fake_replica(run, "math-0.g1"):
            await ready(router)
        await eventually(lambda: standing(router, "math-0.g1") is None)


async def test_a_stranger_at_the_address_is_refused(tmp_path: Path) -> None:
    """A record whose port another process has taken: it cannot answer the challenge, and gets no request."""
    run = a_run(tmp_path)
    async with (
        fake_replica(run, "code-0.g1") as other,
        a_router(run, a_deployment("math", queue_timeout_s=0.2)) as router,
    ):
        record = registry.RegistryReader(run.registry).snapshot()["code-0.g1"]
        stolen = replace(record, replica="math-0.g1", serves={"math": "m"}, nonce=new_token())
        registry.publish(run.registry, stolen)
        await eventually(lambda: standing(router, "math-0.g1") is RoutingState.EJECTED)
        (replica,) = router.control.table.of("math")
        assert replica.trouble == f"GET {other.url}/health: another process answers there"
        assert (await post(router, chat("math")))[0] == 503
        assert not other.bodies


async def test_a_right_name_with_a_wrong_key_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        fake.key = "another"
        await eventually(lambda: standing(router, "math-0.g1") is RoutingState.EJECTED)


async def test_a_dead_jobs_record_is_ejected_and_comes_back_with_its_owner(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as gone:
        record = registry.RegistryReader(run.registry).snapshot()["math-0.g1"]
    registry.publish(run.registry, replace(record, beat_s=0.01, beat=1))
    async with a_router(run, a_deployment("math")) as router:
        await eventually(lambda: standing(router, "math-0.g1") is RoutingState.EJECTED)
        replica = router.gateway.table.get("math-0.g1")
        assert replica is not None
        await eventually(lambda: router.control.discovery.is_silent(replica))
        async with fake_replica(run, "math-0.g1") as back:
            assert back.url != gone.url
            await ready(router)


async def test_an_unreadable_registry_ejects_no_replica(tmp_path: Path) -> None:
    """A stalled file system: the last view stands, probes go on, requests are served."""
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math")) as router:
        await ready(router)
        hidden = run.registry.rename(run.path / "hidden")
        before = router.control.discovery.registry_age_s()
        await eventually(lambda: router.control.discovery.registry_age_s() > before + 0.1)
        assert (await post(router, chat("math")))[0] == 200
        hidden.rename(run.registry)


async def test_invalid_registry_files_are_ignored(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    (run.registry / "code-0.g1.json").write_text('{"schema": 1, "kind": "exp')
    (run.registry / "code-1.g1.json").write_text(json.dumps({"schema": 99}))
    async with fake_replica(run, "math-0.g1"), a_router(run, a_deployment("math")) as router:
        await ready(router)
        assert (await post(router, chat("math")))[0] == 200
        assert router.gateway.table.experts() == {"math"}


async def test_a_replica_that_says_draining_is_drained_and_one_that_starts_waits(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-0.g1") as fake, a_router(run, a_deployment("math")) as router:
        await ready(router)
        fake.state = "starting"
        await eventually(lambda: standing(router, "math-0.g1") is RoutingState.STARTING)
        fake.state = "draining"
        await eventually(lambda: standing(router, "math-0.g1") is RoutingState.DRAINING)
        fake.state = "ready"
        assert standing(router, "math-0.g1") is RoutingState.DRAINING


async def test_a_connection_refused_ejects_at_once(tmp_path: Path) -> None:
    """Without waiting for a probe; the request itself goes to the other replica."""
    run = a_run(tmp_path)
    deployment = a_deployment("math", probe_s=60, discovery_s=60)
    async with fake_replica(run, "math-1.g1"):
        async with fake_replica(run, "math-0.g1", reset) as dying:
            record = registry.RegistryReader(run.registry).snapshot()["math-0.g1"]
            router_context = a_router(run, deployment)
            router = await router_context.__aenter__()
            await ready(router, 2)
        try:
            assert dying.url == record.url
            for _ in range(3):
                assert (await post(router, chat("math")))[0] == 200
            assert standing(router, "math-0.g1") is RoutingState.EJECTED
        finally:
            await router_context.__aexit__(None, None, None)


async def test_an_external_endpoint_is_probed_by_its_models(tmp_path: Path) -> None:
    """No challenge, no nonce; its only model's name is used where the record has none."""
    run = a_run(tmp_path)
    async with fake_replica(run, "math-x0.g1", models=("theirs",)) as fake:
        record = registry.RegistryReader(run.registry).snapshot()["math-x0.g1"]
        run.store_external_token("math-x0.g1", fake.key)
        fake.models = ("theirs",)
        external = replace(record, kind=RecordKind.EXTERNAL, nonce=None, serves={"math": None}, capacity=None)
        registry.publish(run.registry, external)
        async with a_router(run, a_deployment()) as router:
            await ready(router)
            assert (await post(router, chat("math")))[0] == 200
            assert b'"theirs"' in fake.bodies[0]


async def test_the_registered_model_name_wins_over_what_an_external_endpoint_lists(tmp_path: Path) -> None:
    """It lists a model of the requested name too, which is another model there."""
    run = a_run(tmp_path)
    async with fake_replica(run, "math-x0.g1", models=("theirs", "math")) as fake:
        record = registry.RegistryReader(run.registry).snapshot()["math-x0.g1"]
        run.store_external_token("math-x0.g1", fake.key)
        registry.publish(run.registry, replace(record, kind=RecordKind.EXTERNAL, nonce=None, serves={"math": "theirs"}))
        async with a_router(run, a_deployment()) as router:
            await ready(router)
            assert (await post(router, chat("math")))[0] == 200
            assert b'"theirs"' in fake.bodies[0]


async def test_a_new_token_for_an_external_endpoint_is_taken_up(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    async with fake_replica(run, "math-x0.g1", models=("theirs",)) as fake:
        record = registry.RegistryReader(run.registry).snapshot()["math-x0.g1"]
        run.store_external_token("math-x0.g1", "wrong")
        registry.publish(run.registry, replace(record, kind=RecordKind.EXTERNAL, nonce=None))
        async with a_router(run, a_deployment()) as router:
            await ready(router)
            (replica,) = router.control.table.all()
            assert replica.models == ()
            (run.path / "tokens" / "math-x0.g1").unlink()
            run.store_external_token("math-x0.g1", fake.key)
            await eventually(lambda: replica.models == ("theirs",))
