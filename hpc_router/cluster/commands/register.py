"""Registers external endpoints. A server outside the run gets a record in the registry without lease beats, nonce or
expiry.

Nothing is started or stopped. The server need not answer now, because the router probes it until it answers.
Registering the same expert and address again updates the record.
"""

import itertools
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from hpc_router.config.schema import EXPERT_NAME, RESERVED_NAMES
from hpc_router.config.validation import check_host
from hpc_router.errors import ConfigError, suggest
from hpc_router.net.http_client import DEFAULT_TIMEOUT_S, Unreachable, call_blocking
from hpc_router.net.protocol import API_ROOT, MODELS, url_at
from hpc_router.state import registry
from hpc_router.state.atomic_files import create_text
from hpc_router.state.registry import EngineInfo, Record, RecordKind, RegistryReader, State, replica_name, split_replica
from hpc_router.state.run_directory import RunDir

_PROBE: Final = re.compile(r"/[!-~]*")
_OPERATION: Final = re.compile(
    r"(.*?)/+(?:chat/+completions|(?:v2/+)?rerank|score|(?:de)?tokenize)"
    r"|(.+?)/+(?:completions|embeddings|messages(?:/+count_tokens)?|models)"
    r"|(.+?)/+responses(?:/+resp_[^/]+(?:/+(?:cancel|input_items))?)?"
)
"""Matches the URL path of one operation; a group has the base path before it. A base path may itself be `/models`."""
_VALID_URLS: Final = "valid: http://host:port, http://host:port/v1, https://host/v1beta/openai"


@dataclass(frozen=True, slots=True)
class ExternalEndpoint:
    """A checked external endpoint. `model`: None if it is not known; `warning` then says why. `probe`: path that the
    router requests to see whether the endpoint answers; None: the router only opens a connection."""

    expert: str
    url: str
    model: str | None
    token: str | None = None
    warning: str | None = None
    probe: str | None = MODELS


def examine(
    *, expert: str, url: str, model: str | None = None, token: str | None = None, probe: str | None = MODELS
) -> ExternalEndpoint:
    """Checks the values of an endpoint and returns it, without registering it. `model`: None: the endpoint is asked.
    `probe`: see `ExternalEndpoint`. Raises ConfigError for an invalid value, or if several models are found."""
    if probe is not None and not _PROBE.fullmatch(probe):
        raise ConfigError(f"--probe-path {probe!r}: not a path (valid: /health, /v1/models, ...)")
    if model is not None and not (model.isprintable() and model.strip() == model != ""):
        raise ConfigError(f"--model {model!r}: not a model's name (valid: text without control characters)")
    if not EXPERT_NAME.fullmatch(expert) or expert in RESERVED_NAMES:
        raise ConfigError(
            f"--expert {expert!r}: cannot name an expert (valid: lower-case letters, digits, '-' and '_', "
            f"not {' or '.join(sorted(RESERVED_NAMES))})"
        )
    base, warning = base_url(url), None
    if model is None:
        model, warning = _ask_model(base, token=token)
    return ExternalEndpoint(expert, base, model, token, warning, probe)


def register(run: RunDir, endpoint: ExternalEndpoint) -> Record:
    """Writes the record of an endpoint to the registry and returns it. It replaces one of the same expert and
    address."""
    known = _existing(run, expert=endpoint.expert, url=endpoint.url)
    record = Record(
        kind=RecordKind.EXTERNAL,
        replica=known or replica_name(endpoint.expert, "x0", 1),
        url=endpoint.url,
        state=State.READY,
        serves={endpoint.expert: endpoint.model},
        engine=EngineInfo(model=endpoint.model),
        probe=endpoint.probe,
    )
    record = _publish(run, record, new=known is None, token=endpoint.token)
    run.event("registered", replica=record.replica, url=record.url)
    return record


def unregister(
    run: RunDir, *, replica: str | None = None, expert: str | None = None, url: str | None = None
) -> list[str]:
    """Removes the external endpoints that match all given values; returns their names. Raises ConfigError if none
    does."""
    records = {name: r for name, r in RegistryReader(run.registry).snapshot().items() if r.kind is RecordKind.EXTERNAL}
    base = base_url(url) if url is not None else None
    matching = [
        name
        for name, record in records.items()
        if (replica is None or name == replica or name.rpartition(".")[0] == replica)
        and (expert is None or expert in record.serves)
        and (base is None or record.url == base)
    ]
    if not matching:
        asked = replica or " ".join(filter(None, (expert, url)))
        raise ConfigError(f"no external endpoint '{asked}' in this run{suggest(asked, records)}")
    for name in matching:
        registry.withdraw(run.registry, name)
        with suppress(FileNotFoundError):
            (run.path / "tokens" / name).unlink()
        run.event("unregistered", replica=name)
    return matching


def base_url(url: str) -> str:
    """Returns an endpoint's address as written, but without a final slash, and without the path if the path is `/v1`.
    Raises ConfigError if it is not a valid address."""
    if odd := re.search(r"[\s\x00-\x1f\x7f\\]", url):  # `urlsplit` removes some of these silently
        raise ConfigError(f"--url {url!r}: contains {odd[0]!r} at position {odd.start()} ({_VALID_URLS})")
    try:
        parts = urlsplit(url)
        check_host("--url", (parts.hostname or "").removesuffix(".").replace("_", "x"))
        usable = parts.scheme in ("http", "https") and (parts.port is None or parts.port > 0)
    except (ValueError, ConfigError):
        usable = False
    if not usable or parts.username is not None:
        raise ConfigError(f"--url {url}: not an endpoint's address ({_VALID_URLS})")
    origin, path = f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")
    if operation := _OPERATION.fullmatch(path):
        base = next(filter(None, operation.groups()), API_ROOT)
        raise ConfigError(f"--url {url}: the address of one operation, not of the API (use: --url {origin}{base})")
    if parts.query or parts.fragment:
        raise ConfigError(f"--url {url}: not an endpoint's address, which has no query or fragment ({_VALID_URLS})")
    return origin if path == API_ROOT else origin + path


def read_token(path: Path) -> str:
    """Returns the token in the file. Raises ConfigError if the file cannot be read or has no valid token."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {path}: cannot be read: {error}") from error
    if not token or any(character.isspace() or not character.isprintable() for character in token):
        raise ConfigError(f"--token-file {path}: holds no token (valid: one line with the token alone)")
    return token


def _ask_model(base: str, *, token: str | None) -> tuple[str | None, str | None]:
    """Asks the endpoint for its models. Returns (the only model, None), or (None, a warning) if this fails. Raises
    ConfigError if the endpoint serves several models."""
    url, later = url_at(base, MODELS), "the router will ask again; --model names the model now"
    try:
        answer = call_blocking("GET", url, token=token, timeout_s=DEFAULT_TIMEOUT_S)
    except Unreachable as error:
        return None, f"{base} does not answer now ({error}): {later}"
    if answer.status != 200:
        hint = "; --token-file gives a token" if answer.status in (401, 403) and token is None else ""
        return None, f"{url} answers with status {answer.status}{hint}: {later}"
    data = answer.body.get("data") if isinstance(answer.body, dict) else None
    names = [str(m["id"]) for m in data if isinstance(m, dict) and "id" in m] if isinstance(data, list) else []
    if len(names) > 1:
        raise ConfigError(f"{base} serves several models; choose one with --model (valid: {', '.join(names)})")
    if not names:
        return None, f"{url} lists no model: {later}"
    return names[0], None


def _existing(run: RunDir, *, expert: str, url: str) -> str | None:
    for name, record in RegistryReader(run.registry).snapshot().items():
        if record.kind is RecordKind.EXTERNAL and record.url == url and expert in record.serves:
            return name
    return None


def _publish(run: RunDir, record: Record, *, new: bool, token: str | None) -> Record:
    """Writes the record and its token, and returns the record. `new`: whether the record gets a new name, with the
    first free number."""
    if not new:
        _write_token(run, record.replica, token)
        registry.publish(run.registry, record)
        return record
    for number in itertools.count():
        record = replace(record, replica=replica_name(split_replica(record.replica)[0], f"x{number}", 1))
        path = run.registry / f"{record.replica}.json"
        if not path.exists() and create_text(path, json.dumps(record.to_json(), indent=1, sort_keys=True) + "\n"):
            break
    _write_token(run, record.replica, token)
    return record


def _write_token(run: RunDir, replica: str, token: str | None) -> None:
    (run.path / "tokens" / replica).unlink(missing_ok=True)
    if token is not None:
        run.store_external_token(replica, token)
