"""Tokens, and challenges that show whether an address still belongs to the replica that published it.

Each replica has its own key, HMAC-SHA256(secret, nonce). The deployment's `secret` stays in a file of mode 0600; the
nonce is in the replica's record. A replica uses its key to answer the router's challenge, and the router sends the key
as the token of its requests. A process that took over a replica's port therefore cannot answer the challenge, and
learns no token of another replica. A user other than the owner has no secret, so the router also proves itself with a
key that both derive from the digest of the user's token. Comparisons take constant time.
"""

import hashlib
import hmac
import secrets


def new_token() -> str:
    """Returns 256 random bits in hex; also used for nonces and challenges."""
    return secrets.token_hex(32)


def replica_key(secret: str, nonce: str) -> str:
    """Returns the key of the replica that published `nonce`, in hex."""
    return hmac.new(secret.encode(), b"replica:" + nonce.encode(), hashlib.sha256).hexdigest()


def token_digest(token: str) -> str:
    """Returns the SHA-256 digest of a user's token, in hex. The router stores only this."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def user_key(digest: str, nonce: str) -> str:
    """Returns the key, in hex, with which the router that published `nonce` proves itself to the user whose token has
    this digest. It is not valid for another user or another router, and does not reveal the digest."""
    return hmac.new(digest.encode(), b"user:" + nonce.encode(), hashlib.sha256).hexdigest()


def challenge_answer(key: str, challenge: str) -> str:
    """Returns the answer to a challenge, in hex: its HMAC with `key`, which proves that the sender has the key."""
    return hmac.new(key.encode(), b"challenge:" + challenge.encode(), hashlib.sha256).hexdigest()


def equal_secrets(left: str, right: str) -> bool:
    """Compares two secrets in constant time. Accepts any text, also with characters that UTF-8 cannot encode."""
    return hmac.compare_digest(left.encode("utf-8", "replace"), right.encode("utf-8", "replace"))


def bearer_token(header: str | None) -> str | None:
    """Returns the token of an `Authorization: Bearer ...` header; None for any other header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
