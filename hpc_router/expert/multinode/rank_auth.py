"""How the ranks of one engine trust each other: a key of their own, which never travels.

A report carries a token, and a challenge that its answer must prove. Whoever took over rank 0's port learns only the
token, which nobody else takes, and cannot give orders: these say where an engine connects to, unauthenticated. The key
is none that the open challenge of `/health` could be asked to use.
"""

from typing import Final

from hpc_router.net.auth import challenge_answer, equal_secrets, replica_key
from hpc_router.net.protocol import RankOrder

_REPORT: Final = "report"


def rank_key(secret: str, nonce: str) -> str:
    """Of the replica that published `nonce`, in hex."""
    return replica_key(secret, f"{nonce}:rank")


def report_token(key: str) -> str:
    """What every report carries as its bearer token."""
    return challenge_answer(key, _REPORT)


def proof(key: str, challenge: str, order: RankOrder) -> str:
    """What only rank 0 can add to its order."""
    said = (challenge, order.action.value, order.attempt, order.master_address, order.master_port)
    return challenge_answer(key, " ".join(map(str, said)))


def is_proven(key: str, challenge: str, order: RankOrder) -> bool:
    return equal_secrets(order.proof, proof(key, challenge, order))
