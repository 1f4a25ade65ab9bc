"""Authentication between the ranks of one engine, by a key of their own that is never sent.

A report carries a token, and a challenge that the response must prove. A process that took over rank 0's port learns
only the token, which nothing else accepts, and cannot give orders; orders matter, because they say where an engine
connects to without authentication. The open challenge of `/health` cannot be used to compute with this key.
"""

from typing import Final

from hpc_router.net.auth import challenge_answer, equal_secrets, replica_key
from hpc_router.net.protocol import RankOrder

_REPORT: Final = "report"


def rank_key(secret: str, nonce: str) -> str:
    """The rank key of the replica that published `nonce`, in hex."""
    return replica_key(secret, f"{nonce}:rank")


def report_token(key: str) -> str:
    """The bearer token of every report."""
    return challenge_answer(key, _REPORT)


def proof(key: str, challenge: str, order: RankOrder) -> str:
    """The proof that rank 0 adds to its order."""
    signed = (challenge, order.action.value, order.attempt, order.master_address, order.master_port)
    return challenge_answer(key, " ".join(map(str, signed)))


def is_proven(key: str, challenge: str, order: RankOrder) -> bool:
    return equal_secrets(order.proof, proof(key, challenge, order))
