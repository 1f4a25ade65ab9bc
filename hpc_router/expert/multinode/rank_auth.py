"""Authenticates the ranks of an engine to each other, with a key that is used only for this and is never sent.

A report contains a token and a challenge, and rank 0's order must contain a proof for the challenge. A process that has
taken over rank 0's port learns only the token, which is useless elsewhere, and cannot give orders. Orders need this
protection, because they name the address to which an engine connects without authentication. Anyone can send the same
challenge to `/health`, but its answer is computed with another key, so it is never a valid proof.
"""

from typing import Final

from hpc_router.net.auth import challenge_answer, equal_secrets, replica_key
from hpc_router.net.protocol import RankOrder

_REPORT: Final = "report"


def rank_key(secret: str, nonce: str) -> str:
    """Returns the rank key of the replica that published `nonce`, in hex."""
    return replica_key(secret, f"{nonce}:rank")


def report_token(key: str) -> str:
    """Returns the bearer token of a rank's reports, derived from the rank key."""
    return challenge_answer(key, _REPORT)


def proof(key: str, challenge: str, order: RankOrder) -> str:
    """Returns the proof that rank 0 adds to its order: an HMAC of challenge and order."""
    signed = (challenge, order.action.value, order.attempt, order.master_address, order.master_port)
    return challenge_answer(key, " ".join(map(str, signed)))


def is_proven(key: str, challenge: str, order: RankOrder) -> bool:
    """Returns whether the order has the right proof for the challenge."""
    return equal_secrets(order.proof, proof(key, challenge, order))
