"""instructor."""

from typing import Any

import instructor
import openai
from instructor.core import InstructorRetryException

from tests.clients.programs.cases import BASE_URL, MESSAGES, TOKEN, City, class_and_status, run, waits


def ask(model: str, mode: instructor.Mode = instructor.Mode.TOOLS, *, token: str = TOKEN, max_retries: int = 0) -> Any:
    """`max_retries` is the official client's; instructor's own repeats a request whose answer is not valid."""
    client = instructor.from_openai(openai.OpenAI(base_url=BASE_URL, api_key=token, max_retries=max_retries), mode=mode)
    try:
        return client.create(model=model, messages=MESSAGES, response_model=City, max_retries=1).model_dump()
    except InstructorRetryException as error:
        return [type(error).__name__, class_and_status(error.__cause__ or error)]


def partial() -> Any:
    client = instructor.from_openai(openai.OpenAI(base_url=BASE_URL, api_key=TOKEN), mode=instructor.Mode.JSON_SCHEMA)
    *_, last = client.create_partial(model="math", messages=MESSAGES, response_model=City)
    return last.model_dump()


run(
    {
        "tools": lambda: ask("math"),
        "json_schema": lambda: ask("math", instructor.Mode.JSON_SCHEMA),
        "partial": partial,
        "wrong_token": lambda: ask("math", token="wrong"),
        "unknown": lambda: ask("poetry"),
        "busy": lambda: ask("busy"),
        "away": lambda: ask("away"),
        "recovering": lambda: waits(lambda: ask("recovering", max_retries=1) != {}),
        "slow": lambda: ask("slow", max_retries=2),
    }
)
