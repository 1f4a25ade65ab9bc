"""Real clients, unmodified, against one deployment: each does what its users do, and meets each kind of trouble."""

from typing import Any, Final

import pytest

from tests.clients.endpoint import Endpoint

pytestmark = [pytest.mark.e2e, pytest.mark.long]

CITY: Final = {"name": "simulated", "founded": 1000, "tags": ["simulated", "simulated"]}
"""What the simulated engine answers to the programs' schema of a city."""
MODELS: Final = ["auto", "away", "broken", "busy", "code", "endless", "math", "recovering", "slow"]


OFFICIAL: Final = {
    "wrong_token": "AuthenticationError 401",
    "unknown": "NotFoundError 404",
    "busy": "RateLimitError 429",
    "away": "InternalServerError 503",
    "slow": "InternalServerError 504",
}
"""The errors of the official OpenAI clients."""


def asked(endpoint: Endpoint, program: str, *, expert: str) -> int:
    """How many requests of a program reached the expert's engine."""
    return len(endpoint.received(expert, f"({program})"))


def test_openai(endpoint: Endpoint) -> None:
    assert endpoint.python("openai_client") == OFFICIAL | {
        "models": MODELS,
        "chat": True,
        "auto": "math",
        "usage": [0, 5],
        "completion": True,
        "logprobs": True,
        "tool": ["add", '{"a": 0, "b": 0}', "text"],
        "tool_stream": '{"a": 0, "b": 0}',
        "parsed": CITY,
        "parsed_stream": CITY,
        "parsed_response": CITY,
        "response_stream": ["response.completed", True],
        "next_turn": True,
        "embeddings": 2,
        "recovering": [True, True],
        "cut": [3, "APIError", "simulated fault"],
        "abandoned": [3, True],
        "abandoned_async": [True],
        "timed_out": True,
    }
    assert asked(endpoint, "openai_client", expert="slow") == 2, "one of them is `timed_out`"
    assert asked(endpoint, "openai_client", expert="recovering") == 2


def test_openai_for_javascript(endpoint: Endpoint) -> None:
    assert endpoint.node("openai_client") == OFFICIAL | {
        "models": MODELS,
        "chat": True,
        "tool": {"name": "add", "arguments": '{"a": 0}'},
        "parsed": CITY,
        "parsed_response": CITY,
        "response_stream": ["response.completed", True],
        "embeddings": 2,
        "recovering": [True, True],
        "cut": [3, "APIError", "simulated fault"],
        "abandoned": [True],
        "aborted": ["APIUserAbortError", True],
    }
    assert asked(endpoint, "openai_client.mjs", expert="slow") == 2, "one of them is `aborted`"
    assert asked(endpoint, "openai_client.mjs", expert="recovering") == 2


def test_anthropic(endpoint: Endpoint) -> None:
    """The client writes bounds of a schema into its description, which an engine does not enforce."""
    assert endpoint.python("anthropic_client") == OFFICIAL | {
        "away": "ServiceUnavailableError 503",
        "slow": "GatewayTimeoutError 504",
        "chat": True,
        "tool": ["add", {"a": 0}, "tool_use", "text"],
        "parsed": {"name": "simulated", "founded": 0, "tags": []},
        "parsed_bounds": "ValidationError",
        "recovering": [True, True],
        "cut": [3, "APIStatusError 200"],
        "abandoned": [3, True],
    }
    assert asked(endpoint, "anthropic_client", expert="slow") == 1


def test_litellm(endpoint: Endpoint) -> None:
    assert endpoint.python("litellm_client", environment="clients") == OFFICIAL | {
        "away": "ServiceUnavailableError 503",
        "slow": "Timeout 504",
        "chat": True,
        "hosted_vllm": True,
        "tool": '{"a": 0}',
        "parsed": CITY,
        "response": True,
        "anthropic": [True, True],
        "embeddings": 2,
        "recovering": [True, True],
        "cut": [3, "MidStreamFallbackError 500"],
        "abandoned": [3, True],
    }
    assert asked(endpoint, "litellm_client", expert="slow") == 1


def test_langchain(endpoint: Endpoint) -> None:
    assert endpoint.python("langchain_client", environment="clients") == {
        "chat": True,
        "tool": {"a": 0, "b": 0},
        "usage": [False, True],
        "parsed": CITY,
        "parsed_by_tool": CITY,
        "json_mode": {"simulated": True},
        "responses": True,
        "embeddings": [2, 64],
        "wrong_token": "OpenAIAuthenticationError 401",
        "unknown": "OpenAIModelNotFoundError 404",
        "busy": "OpenAIRateLimitError 429",
        "away": "OpenAIAPIError 503",
        "slow": "OpenAIAPIError 504",
        "recovering": [True, True],
        "cut": [3, "APIError", "simulated fault"],
        "abandoned": [True],
    }
    assert asked(endpoint, "langchain_client", expert="slow") == 1


def test_instructor(endpoint: Endpoint) -> None:
    assert endpoint.python("instructor_client", environment="instructor") == {
        name: ["InstructorRetryException", error] for name, error in OFFICIAL.items()
    } | {"tools": CITY, "json_schema": CITY, "partial": CITY, "recovering": [True, True]}
    assert asked(endpoint, "instructor_client", expert="slow") == 1


def test_pydantic_ai(endpoint: Endpoint) -> None:
    expected: dict[str, Any] = {}
    for kind, away in {"openai": "ModelUnavailableError 503", "anthropic": "ModelOverloadedError 503"}.items():
        expected |= {
            f"{kind} chat": True,
            f"{kind} parsed": CITY,
            f"{kind} wrong_token": "ModelAuthenticationError 401",
            f"{kind} unknown": "ModelNotFoundError 404",
            f"{kind} busy": "ModelRateLimitError 429",
            f"{kind} away": away,
            f"{kind} slow": "ModelServerError 504",
            f"{kind} abandoned": [True],
        }
    assert endpoint.python("pydantic_ai_client", environment="clients") == expected | {
        "openai cut": "ModelServerError 500",
        "anthropic cut": "ModelAPIError",
        "responses chat": True,
        "native output": CITY,
    }
    assert asked(endpoint, "pydantic_ai_client", expert="slow") == 2


def test_ai_sdk(endpoint: Endpoint) -> None:
    """It repeats every 5xx, also what carries `x-should-retry: false`; and its provider for OpenAI refers to earlier
    turns by their id, which vLLM refuses."""
    assert endpoint.node("ai_sdk_client") == {
        "chat": True,
        "usage": True,
        "tool": [{"a": 0}, 1],
        "parsed": CITY,
        "parsed_without_option": "NoObjectGeneratedError",
        "responses": True,
        "response_stream": True,
        "response_turns": "APICallError 400",
        "response_turns_unstored": True,
        "embeddings": 2,
        "wrong_token": "APICallError 401",
        "unknown": "APICallError 404",
        "busy": "APICallError 429",
        "away": "APICallError 503",
        "slow": "RetryError 504",
        "recovering": [True, True],
        "cut": [3, ["simulated fault"]],
        "aborted": [True],
    }
    assert asked(endpoint, "ai_sdk_client.mjs", expert="slow") == 3
