"""What a request for `auto` needs of its expert, and which experts lack it: pictures, sound, tools, context length.

Only what is known excludes an expert. An expert accepts what `experts.E.accepts` says, else what the registry records
of its replicas say; if neither says anything, it counts as accepting everything. Whether a request is too long can only
be estimated here, so a request that seems too long for all experts goes to those with the longest context. A request
that names its expert is not checked.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from hpc_router.config.schema import Deployment
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.router.worker.request_body import ApiCall

_MEDIA: Final = {
    **dict.fromkeys(("image_url", "image", "input_image", "image_pil", "image_embeds", "video_url"), "image"),
    **dict.fromkeys(("input_audio", "audio_url", "audio"), "audio"),
}
"""Type of a part of a message -> the kind of input that it is."""
MEDIA_KINDS: Final = frozenset(_MEDIA.values())
_CONVERSATIONS: Final = ("messages", "input")
_MAX_TOKENS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
BYTES_PER_TOKEN: Final = 4
"""Bytes of a body per token, for the estimate of a request's length."""
SHORT_TOKENS: Final = 512
"""Requests with fewer estimated tokens are short enough for every expert."""


def needs_of(fields: Mapping[str, Any]) -> frozenset[str]:
    """Returns the kinds of input in a decoded body beyond text: `image`, `audio`, `tools`. Tools count if the model may
    choose whether to call one, because engines serve a forced call without knowing the model's format of calls."""
    needs = set()
    if (fields.get("tools") or fields.get("functions")) and _may_choose(fields.get("tool_choice")):
        needs.add("tools")
    for name in _CONVERSATIONS:
        value = fields.get(name)
        if type(value) is list:
            for item in value:
                parts = item.get("content", item.get("output")) if type(item) is dict else None
                if type(parts) is list:
                    needs.update(_media(parts))
    return frozenset(needs)


def _may_choose(choice: object) -> bool:
    if isinstance(choice, dict):
        choice = choice.get("type")
    return choice is None or choice == "auto"


def _media(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        if type(part) is dict:
            kind = part.get("type")
            if type(kind) is str and kind in _MEDIA:
                yield _MEDIA[kind]
            elif kind == "tool_result" and type(part.get("content")) is list:
                yield from _media([one for one in part["content"] if type(one) is dict and "content" not in one])


def estimated_tokens(call: ApiCall) -> int:
    """Returns an estimate of the tokens of the prompt and the longest response together."""
    allowed = next((n for name in _MAX_TOKENS if type(n := call.fields.get(name)) is int), 0)
    return len(call.raw) // BYTES_PER_TOKEN + max(allowed, 0)


def lacking(
    experts: Collection[str], needs: frozenset[str], tokens: int, *, deployment: Deployment, table: ReplicaTable
) -> frozenset[str]:
    """Returns those of the experts that are known not to accept a request. `needs`: what it contains (`needs_of`).
    `tokens`: its length; 0: not known. If all experts lack something of `needs`, returns all of them."""
    if needs:
        unable = frozenset(e for e in experts if not needs <= (accepted(e, deployment, table) or needs))
    else:
        unable = frozenset()
    able = [expert for expert in experts if expert not in unable]
    lengths = {expert: length for expert in able if (length := context_length(expert, table)) is not None}
    too_short = {expert for expert, length in lengths.items() if length < tokens}
    if too_short and len(too_short) == len(able):
        longest = max(lengths.values())
        too_short = {expert for expert, length in lengths.items() if length < longest}
    return unable | too_short


def accepted(expert: str, deployment: Deployment, table: ReplicaTable) -> frozenset[str] | None:
    """Returns the kinds of input that an expert accepts; None if they are not known."""
    config = deployment.experts.get(expert)
    if config is not None and config.accepts is not None:
        return frozenset(config.accepts)
    known = [replica.record.accepts for replica in table.of(expert)]
    if not known or None in known:
        return None
    return frozenset(kind for kinds in known if kinds is not None for kind in kinds)


def context_length(expert: str, table: ReplicaTable) -> int | None:
    """Returns the longest context length of an expert's replicas, in tokens; None if it is not known."""
    lengths = [replica.max_model_len for replica in table.of(expert)]
    return None if not lengths or None in lengths else max(n for n in lengths if n is not None)
