"""Tokens and proofs: who may call, and whether an address still belongs to the replica it was published for.

Each replica has a key of its own, HMAC-SHA256(secret, nonce): the deployment's `secret` never leaves its 0600 file, the
nonce stands in the replica's record. The key answers the router's challenge and is the token the router sends, so a
process that took over a port can neither answer nor learn anything of use. Comparisons take constant time.
"""

import hashlib
import hmac
import secrets


def new_token() -> str:
    """256 random bits in hex; also used for nonces and challenges."""
    return secrets.token_hex(32)


def replica_key(secret: str, nonce: str) -> str:
    """The key of the replica that published `nonce`, in hex."""
    return hmac.new(secret.encode(), b"replica:" + nonce.encode(), hashlib.sha256).hexdigest()


def challenge_answer(key: str, challenge: str) -> str:
    """What a holder of `key` answers to `challenge`, in hex."""
    return hmac.new(key.encode(), b"challenge:" + challenge.encode(), hashlib.sha256).hexdigest()


def same(left: str, right: str) -> bool:
    """Constant-time equality of two secrets, whatever characters a stranger sends."""
    return hmac.compare_digest(left.encode("utf-8", "replace"), right.encode("utf-8", "replace"))


def bearer(header: str | None) -> str | None:
    """The token of an `Authorization: Bearer ...` header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
