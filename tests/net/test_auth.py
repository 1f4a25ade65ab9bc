"""Each replica has its own key and answers challenges without sending the key."""

import pytest

from hpc_router.net.auth import bearer_token, challenge_answer, equal_secrets, new_token, replica_key


def test_a_key_belongs_to_one_secret_and_one_nonce() -> None:
    keys = {replica_key(secret, nonce) for secret in ("s", "t") for nonce in ("n", "o")}
    assert len(keys) == 4
    answers = {challenge_answer(key, challenge) for key in keys for challenge in ("c", "d")}
    assert len(answers) == 8
    assert not keys & answers


def test_tokens_do_not_repeat() -> None:
    assert len({new_token() for _ in range(100)}) == 100


@pytest.mark.parametrize(("left", "right", "equal"), [("a", "a", True), ("a", "b", False), ("ä\udcff", "ä", False)])
def test_any_text_can_be_compared(left: str, right: str, equal: bool) -> None:
    assert equal_secrets(left, right) is equal


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer t", "t"), ("bearer  t ", "t"), ("Basic t", None), ("Bearer ", None), ("", None), (None, None)],
)
def test_bearer(header: str | None, token: str | None) -> None:
    assert bearer_token(header) == token
