"""Probes one endpoint: whether it answers, whether it is the expected process, and which state it reports.

An agent proves its key by the response to a challenge (`auth`), and reports its state and models. An external endpoint
gets a GET of its record's `probe` path, to which any HTTP response means that it is alive; without such a path, the
probe only opens a connection. What a probe learns is stored on the `Replica` (models, key, text of the failure), but
the probe does not change the replica's state.
"""

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import aiohttp

from hpc_router.errors import ConfigError
from hpc_router.net import protocol
from hpc_router.net.auth import challenge_answer, equal_secrets, new_token
from hpc_router.net.http_client import bounded_body
from hpc_router.router.replicas.health import Incident
from hpc_router.router.replicas.replica import Event, Replica
from hpc_router.state.io_thread import FileThread
from hpc_router.state.registry import RecordKind, State
from hpc_router.state.run_directory import RunDir

EXTERNAL_PROBE_S: Final = 15.0
"""Usual timeout in seconds of an external endpoint's response to a probe. Connecting has `router.probe_timeout_s`."""
_EVENTS: Final = {state.value: Event(f"says_{state}") for state in State}


def _new_session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(), connector=connector, auto_decompress=False,
        headers={"Accept-Encoding": "identity"},
    )  # fmt: skip


@dataclass(slots=True)
class Prober:
    """Sends the probes. `timeout_s`: `router.probe_timeout_s`. `on_task_failures` is called with a replica and, for
    each background task of its agent, the number of failures and the last error."""

    run: RunDir
    files: FileThread
    timeout_s: float
    on_task_failures: Callable[[Replica, Mapping[str, tuple[int, str]]], None]
    session: aiohttp.ClientSession = field(default_factory=_new_session)

    async def probe(self, replica: Replica, *, external_s: float) -> Event | Incident:
        """Returns the state that the endpoint reports, or how the probe failed. `external_s`: if the endpoint is an
        external one, the timeout for its response in seconds."""
        external, url = replica.record.kind is RecordKind.EXTERNAL, replica.record.url
        path = replica.record.probe if external else protocol.HEALTH
        probed = f"connection to {url}" if path is None else f"GET {protocol.url_at(url, path)}"
        try:
            return await (self._probe_external(replica, external_s) if external else self._probe_agent(replica))
        except TimeoutError as error:
            connecting = path is None or isinstance(error, aiohttp.ConnectionTimeoutError)
            limit_s = external_s if external and not connecting else self.timeout_s
            what = "no connection" if external and connecting else "no answer"
            replica.trouble = f"{probed}: {what} within {limit_s:g} s"
            return Incident.PROBE_UNANSWERED if external and not connecting else Incident.PROBE_LATE
        except aiohttp.ClientResponseError as error:
            replica.trouble = f"{probed} answers with status {error.status}"
            return Incident.PROBE_FAILED
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            replica.trouble = f"{probed}: {str(error) or type(error).__name__}"
            connected = isinstance(error, aiohttp.ClientError) and not isinstance(error, aiohttp.ClientConnectorError)
            if isinstance(error, OSError) and not connected:
                return Incident.PROBE_FAILED
            return Incident.PROBE_LATE if external else Incident.PROBE_FAILED

    async def _probe_agent(self, replica: Replica) -> Event | Incident:
        challenge = new_token()
        answer = await self._get_json(replica.record.url + protocol.HEALTH, params={"challenge": challenge})
        health = protocol.ProbeResponse.from_json(answer)
        expected = challenge_answer(replica.key or "", challenge)
        if health is None or health.replica != replica.name or not equal_secrets(health.answer or "", expected):
            replica.trouble = f"GET {replica.record.url}{protocol.HEALTH}: another process answers there"
            return Incident.PROBE_FAILED
        replica.models = health.models or ()
        self.on_task_failures(replica, health.task_failures)
        return _EVENTS.get(health.state, Incident.PROBE_FAILED)

    async def _probe_external(self, replica: Replica, limit_s: float) -> Event:
        """Probes an external endpoint with its current token. Any HTTP response means that it is ready, unless its
        headers say otherwise."""
        with contextlib.suppress(ConfigError, TimeoutError):  # the token may be replaced at any time
            async with asyncio.timeout(self.timeout_s):
                replica.key = await self.files.run(partial(self.run.external_token, replica.name))
        record = replica.record
        if record.probe is None:
            return await self._probe_port(replica)
        headers = {"Authorization": f"Bearer {replica.key}"} if replica.key else {}
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=self.timeout_s)
        url = protocol.url_at(record.url, record.probe)
        async with self.session.get(url, headers=headers, allow_redirects=False, timeout=timeout) as response:
            if protocol.DRAINING_HEADER in response.headers or protocol.STARTING_HEADER in response.headers:
                return Event.SAYS_STARTING  # another hpc_router, or an agent, that is not ready
            if response.status == 200:
                with contextlib.suppress(ValueError, RecursionError):
                    _take_models(replica, json.loads(await bounded_body(response)))
        return Event.SAYS_READY

    async def _probe_port(self, replica: Replica) -> Event:
        """Probes an endpoint by a connection, without sending data. Raises OSError or TimeoutError if it fails."""
        address = replica.address
        async with asyncio.timeout(self.timeout_s):
            _, writer = await asyncio.open_connection(address.host, address.port)
        writer.close()
        return Event.SAYS_READY

    async def _get_json(self, url: str, **options: Any) -> dict[str, Any]:
        """Returns the JSON object at `url`. Raises ValueError for any other content."""
        timeout = aiohttp.ClientTimeout(total=self.timeout_s)
        request = self.session.get(url, raise_for_status=True, allow_redirects=False, timeout=timeout, **options)
        async with request as response:
            value = json.loads(await bounded_body(response))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


def _take_models(replica: Replica, value: Any) -> None:
    """Stores the model names in `value` on the replica. `value` is a list of names or of OpenAI's model objects. Any
    other value changes nothing."""
    listed = value.get("data") if isinstance(value, dict) else value
    cards = [m if isinstance(m, dict) else {"id": m} for m in listed] if isinstance(listed, list) else []
    lengths = {card["id"]: card.get("max_model_len") for card in cards if isinstance(card.get("id"), str)}
    if not lengths:
        return
    replica.models = tuple(lengths)
    served = [lengths.get(replica.model_for(expert) or "") for expert in replica.record.serves]
    replica.listed_max_model_len = min((n for n in served if type(n) is int and n > 0), default=None)
