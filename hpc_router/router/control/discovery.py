"""Keeps the replica table true: reads the registry, probes every endpoint.

Two sources, neither trusted alone. The registry says what exists; a probe says whether it answers, as itself: an agent
proves its key (`auth`). An external endpoint is probed no more strictly than it is used: whatever it answers by HTTP
proves that it lives, and so do the requests that it answers. Beats that stop while probes pass mean a stalled file
system, so nobody is ejected for it. A replica leaves the table when its owner withdraws its record.
"""

import asyncio
import contextlib
import json
import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import aiohttp

from hpc_router import backoff
from hpc_router.background_tasks import OnFailure, restarting
from hpc_router.config.schema import RouterConfig
from hpc_router.errors import ConfigError
from hpc_router.net import protocol
from hpc_router.net.auth import challenge_answer, equal_secrets, new_token, replica_key
from hpc_router.net.http_client import bounded_body
from hpc_router.router.replicas.health import Incident, Rules, Verdict, can_eject
from hpc_router.router.replicas.replica import Event, Replica, RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import Record, RecordKind, RegistryReader
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

SILENT_BEATS: Final = 4
"""A beat is missed when it is this many intervals late."""
EXTERNAL_PROBE_S: Final = 15.0
"""An endpoint that is not ours may need this long to answer a probe; its connection has `router.probe_timeout_s`."""
_EJECTED_PROBE_MAX_S: Final = 15.0
_SAYS: Final[Mapping[str, Event]] = {
    "starting": Event.SAYS_STARTING,
    "ready": Event.SAYS_READY,
    "draining": Event.SAYS_DRAINING,
}


@dataclass(slots=True)
class Beats:
    """The reader's own clock against one record's counter."""

    beat: int | None
    changed_at: float

    def silent_s(self, now: float) -> float:
        return now - self.changed_at


@dataclass(slots=True)
class _ReplicaWatch:
    """`served_at`: when a request was last known to have been answered, on the reader's clock."""

    task: asyncio.Task[None]
    look: asyncio.Event
    beats: Beats
    served_at: float = -math.inf
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Discovery:
    """Owns one background task for the registry and one per endpoint. Run it as `async with`."""

    run: RunDir
    config: RouterConfig
    table: ReplicaTable
    on_snapshot: Callable[[Mapping[str, Record]], None]
    clock: Callable[[], float]
    files: FileThread
    last_read_at: float = field(init=False)
    _watches: dict[str, _ReplicaWatch] = field(default_factory=dict)
    _scan: asyncio.Task[None] | None = None
    _session: aiohttp.ClientSession | None = None
    _secret: str = ""
    _rules: Rules = field(init=False)

    seeds: dict[str, Replica] = field(default_factory=dict)
    """What is known already, from before this process began."""
    on_well: Callable[[Replica], None] | None = None
    """Told of each probe that finds one ready."""
    on_failure: OnFailure = lambda task, error: None
    on_agent_failure: Callable[[Replica, str, int, str], None] = lambda replica, task, count, error: None
    """Called with a replica, a background task of its agent, how often it failed since the last probe, the error."""

    def __post_init__(self) -> None:
        self.last_read_at = self.clock()
        self.configure(self.config)

    def configure(self, config: RouterConfig) -> None:
        """From now on."""
        self.config = config
        self._rules = Rules(
            connections=config.eject_connect_errors,
            errors=config.eject_errors,
            out_s=config.eject_s,
            most_out_s=config.eject_most_s,
            share=config.eject_share,
        )

    async def __aenter__(self) -> "Discovery":
        self._session = aiohttp.ClientSession(
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )
        self._secret = self.run.secret()
        for known in tuple(self.seeds.values()):
            self._begin(known.record)
        scan = restarting("registry scan", self._scan_forever, self.on_failure)
        self._scan = asyncio.create_task(scan, name="registry scan")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._scan is not None
        assert self._session is not None
        tasks = [self._scan, *(watch.task for watch in self._watches.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def doubt(self, replica: Replica, trouble: str) -> None:
        """A request could not reach it: out of the pool, and look again soon."""
        replica.trouble = trouble
        self._note(replica, Incident.NO_CONNECTION)
        self.look_again(replica)

    def erred(self, replica: Replica, trouble: str) -> None:
        """A request got an error from it, or nothing."""
        replica.suspect, replica.trouble = True, trouble
        self._note(replica, Incident.ERROR)
        self.look_again(replica)

    def answered(self, replica: Replica) -> None:
        """A request got what it wanted from one that had erred."""
        replica.suspect = False
        self._note(replica, Incident.ANSWERED)

    def heard(self, replica: Replica, event: Event) -> None:
        """What it said of itself in the answer to a request."""
        self._apply(replica, event)
        self.look_again(replica)

    def served(self, name: str) -> None:
        """It has answered requests since this was last said."""
        if watch := self._watches.get(name):
            watch.served_at = self.clock()

    def look_again(self, replica: Replica) -> None:
        if watch := self._watches.get(replica.name):
            watch.look.set()

    def is_silent(self, replica: Replica) -> bool:
        """Whether its beats have stopped; endpoints without beats are never silent."""
        watch = self._watches.get(replica.name)
        if watch is None or replica.record.beat_s is None:
            return False
        return watch.beats.silent_s(self.clock()) > SILENT_BEATS * replica.record.beat_s

    def registry_age_s(self) -> float:
        """Since the registry was last read (or, before the first time, since the start)."""
        return self.clock() - self.last_read_at

    async def _scan_forever(self) -> None:
        reader = RegistryReader(self.run.registry)
        while True:
            try:
                snapshot = await self.files.run(reader.snapshot)
                self.last_read_at = self.clock()
                await self._take(snapshot)
                self.on_snapshot(snapshot)
            except OSError as error:
                logger.warning("the registry cannot be read, the last view stands: %s", error)
            await asyncio.sleep(self.config.discovery_s)

    async def _take(self, snapshot: Mapping[str, Record]) -> None:
        for name, record in snapshot.items():
            if record.kind is not RecordKind.ROUTER:
                self._take_one(name, record)
        for name in [name for name in self._watches if name not in snapshot]:
            logger.info("%s has left", name)
            await self._forget(name)

    def _take_one(self, name: str, record: Record) -> None:
        replica, watch = self.table.get(name), self._watches.get(name)
        if replica is None or watch is None or not replica.is_at(record):
            if watch is not None:
                watch.task.cancel()
            self._begin(record)
            return
        state_changed = replica.record.state is not record.state
        if watch.beats.beat != record.beat:
            watch.beats = Beats(record.beat, self.clock())
        self.table.renew(replica, record)
        if state_changed:
            watch.look.set()

    def _begin(self, record: Record) -> None:
        key = None if record.kind is RecordKind.EXTERNAL else replica_key(self._secret, record.nonce or "")
        replica = Replica(record, key)
        known = self.seeds.pop(record.replica, None)
        if known is not None and known.is_at(record):
            replica = known
        self.table.put(replica)
        look = asyncio.Event()
        watching = restarting("probe", partial(self._watch_forever, replica, look), self.on_failure)
        task = asyncio.create_task(watching, name=f"probe {record.replica}")
        self._watches[record.replica] = _ReplicaWatch(task, look, Beats(record.beat, self.clock()))
        logger.info("%s discovered at %s", record.replica, record.url)

    async def _forget(self, name: str) -> None:
        self.table.remove(name)
        watch = self._watches.pop(name)
        watch.task.cancel()
        await asyncio.gather(watch.task, return_exceptions=True)  # our own cancellation comes through

    async def _watch_forever(self, replica: Replica, look: asyncio.Event) -> None:
        while True:
            await self._judge(replica)
            look.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s(replica)):
                    await look.wait()

    def _pause_s(self, replica: Replica) -> float:
        base = self.config.probe_s
        if replica.standing is RoutingState.STARTING:
            base /= 2
        elif replica.standing is RoutingState.EJECTED:
            failed = min(replica.health.failed_probes, 8)
            base = backoff.pause_s(failed, first_s=base, max_s=_EJECTED_PROBE_MAX_S, factor=1.5)
        return base * random.uniform(0.8, 1.2)  # probes of many replicas must not fall together

    async def _judge(self, replica: Replica) -> None:
        """Probe it, and act on what it says. A probe that is late says nothing where requests were answered."""
        begun = self.clock()
        says = await self._probe(replica)
        if says is Incident.PROBE_LATE and self._has_served(replica, since=begun):
            replica.trouble = None
            return
        if isinstance(says, Incident):
            self._note(replica, says)
            return
        self._note(replica, Incident.PROBE_OK)
        if says is Event.SAYS_READY and not replica.health.counts(self.clock()):
            return
        if not replica.suspect:
            replica.trouble = None
        self._apply(replica, says)
        if replica.standing is RoutingState.READY:
            self.table.offer(replica, forgiven=True)  # to whoever avoided it for a connection that broke
            if self.on_well is not None:
                self.on_well(replica)

    async def _probe(self, replica: Replica) -> Event | Incident:
        """What the endpoint says of itself, or what came instead."""
        external, url = replica.record.kind is RecordKind.EXTERNAL, replica.record.url
        path = replica.record.probe if external else protocol.HEALTH
        probed = f"connection to {url}" if path is None else f"GET {url}{path}"
        try:
            return await (self._probe_external(replica) if external else self._probe_agent(replica))
        except TimeoutError:
            replica.trouble = f"{probed}: no answer within {self.config.probe_timeout_s:g} s"
            return Incident.PROBE_LATE
        except aiohttp.ClientResponseError as error:
            replica.trouble = f"{probed} answers with status {error.status}"
            return Incident.PROBE_FAILED
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            replica.trouble = f"{probed}: {str(error) or type(error).__name__}"
            connected = isinstance(error, aiohttp.ClientError) and not isinstance(error, aiohttp.ClientConnectorError)
            if isinstance(error, OSError) and not connected:
                return Incident.PROBE_FAILED
            return Incident.PROBE_LATE if external else Incident.PROBE_FAILED

    def _has_served(self, replica: Replica, *, since: float) -> bool:
        watch = self._watches.get(replica.name)
        return replica.record.kind is RecordKind.EXTERNAL and watch is not None and watch.served_at >= since

    async def _probe_agent(self, replica: Replica) -> Event | Incident:
        challenge = new_token()
        answer = await self._get_json(replica.record.url + protocol.HEALTH, params={"challenge": challenge})
        health = protocol.ProbeResponse.from_json(answer)
        expected = challenge_answer(replica.key or "", challenge)
        if health is None or health.replica != replica.name or not equal_secrets(health.answer or "", expected):
            replica.trouble = "another process answers at its address"
            return Incident.PROBE_FAILED
        replica.models = health.models or ()
        self._take_failures(replica, health.task_failures)
        return _SAYS.get(health.state, Incident.PROBE_FAILED)

    def _take_failures(self, replica: Replica, told: Mapping[str, tuple[int, str]]) -> None:
        watch = self._watches.get(replica.name)
        if watch is None:
            return
        for task, (count, error) in told.items():
            more = count - watch.failures.get(task, 0)
            watch.failures[task] = count
            if more > 0:
                self.on_agent_failure(replica, task, more, error)

    async def _probe_external(self, replica: Replica) -> Event:
        """Whatever it answers, it lives."""
        with contextlib.suppress(ConfigError, TimeoutError):  # a token may be given anew at any time
            async with asyncio.timeout(self.config.probe_timeout_s):
                replica.key = await self.files.run(partial(self.run.external_token, replica.name))
        record = replica.record
        if record.probe is None:
            return await self._connects(replica)
        assert self._session is not None
        headers = {"Authorization": f"Bearer {replica.key}"} if replica.key else {}
        limit = aiohttp.ClientTimeout(total=EXTERNAL_PROBE_S, sock_connect=self.config.probe_timeout_s)
        asked = self._session.get(record.url + record.probe, headers=headers, allow_redirects=False, timeout=limit)
        async with asked as response:
            if protocol.DRAINING_HEADER in response.headers or protocol.STARTING_HEADER in response.headers:
                return Event.SAYS_STARTING  # another router of ours, or an agent: it says when it serves again
            if response.status == 200:
                with contextlib.suppress(ValueError, RecursionError):
                    replica.models = _models(json.loads(await bounded_body(response))) or replica.models
        return Event.SAYS_READY

    async def _connects(self, replica: Replica) -> Event:
        """Ask nothing. Raises OSError or TimeoutError."""
        address = replica.address
        async with asyncio.timeout(self.config.probe_timeout_s):
            _, writer = await asyncio.open_connection(address.host, address.port)
        writer.close()
        return Event.SAYS_READY

    async def _get_json(self, url: str, **options: Any) -> dict[str, Any]:
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=self.config.probe_timeout_s)
        asked = self._session.get(url, raise_for_status=True, allow_redirects=False, timeout=limit, **options)
        async with asked as response:
            value = json.loads(await bounded_body(response))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value

    def _note(self, replica: Replica, incident: Incident) -> None:
        """Whatever has been met there, by a request or a probe."""
        now = self.clock()
        may = incident is Incident.ERROR and all(self._spares(replica, e, now) for e in replica.record.serves)
        match replica.health.note(incident, now=now, rules=self._rules, spare=may):
            case Verdict.EJECT:
                self._apply(replica, Event.FAILED)
            case Verdict.EXCLUDE:
                self._apply(replica, Event.EXCLUDED)

    def _spares(self, replica: Replica, expert: str, now: float) -> bool:
        others = [r for r in self.table.of(expert) if r is not replica]
        seen = [(r.standing is RoutingState.READY, r.health.is_out(now)) for r in others]
        return can_eject(others=seen, share=self._rules.share)

    def _apply(self, replica: Replica, event: Event) -> None:
        if self.table.get(replica.name) is replica and self.table.apply(replica, event):
            because = f" ({replica.trouble})" if replica.trouble and replica.standing is RoutingState.EJECTED else ""
            logger.info("%s is %s%s", replica.name, replica.standing, because)


def _models(value: Any) -> tuple[str, ...]:
    """The names in a list of models, bare or as OpenAI wraps it."""
    listed = value.get("data") if isinstance(value, dict) else value
    named = [m.get("id") if isinstance(m, dict) else m for m in listed] if isinstance(listed, list) else []
    return tuple(m for m in named if isinstance(m, str))
