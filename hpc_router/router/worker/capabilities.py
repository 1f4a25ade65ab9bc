"""Which experts lack what a request for `auto` needs of its expert: pictures, sound, tools, context length.

Only what is known excludes an expert. An expert accepts what `experts.E.accepts` says, else what the registry records
of its replicas say; if neither says anything, it counts as accepting everything. Whether a request is too long can only
be estimated here, so a request that seems too long for all experts goes to those with the longest context. A request
that names its expert is not checked.
"""

from collections.abc import Collection
from typing import Final

from hpc_router.config.schema import Deployment
from hpc_router.router.replicas.table import ReplicaTable

SHORT_TOKENS: Final = 512
"""Requests with fewer estimated tokens are short enough for every expert."""


def lacking(
    experts: Collection[str], needs: frozenset[str], tokens: int, *, deployment: Deployment, table: ReplicaTable
) -> frozenset[str]:
    """Returns those of the experts that are known not to accept a request. `needs`: what it contains beyond text, as
    `request_body.needs_of` returns it. `tokens`: its length; 0: not known. If all experts lack something of `needs`,
    returns all of them."""
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
