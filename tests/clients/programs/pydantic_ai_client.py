"""pydantic-ai with its models for OpenAI (chat and responses) and for Anthropic."""

from typing import Any

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.programs.cases import BASE_URL, QUESTION, TOKEN, URL, City, left, run


def openai_model(name: str, *, token: str = TOKEN, max_retries: int = 0) -> Model:
    client = AsyncOpenAI(base_url=BASE_URL, api_key=token, max_retries=max_retries)
    return OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))


def anthropic_model(name: str, *, token: str = TOKEN, max_retries: int = 0) -> Model:
    client = AsyncAnthropic(base_url=URL, api_key=token, max_retries=max_retries)
    return AnthropicModel(name, provider=AnthropicProvider(anthropic_client=client))


def responses_model(name: str) -> Model:
    return OpenAIResponsesModel(name, provider=OpenAIProvider(base_url=BASE_URL, api_key=TOKEN))


async def said(model: Model, **options: Any) -> Any:
    return (await Agent(model, **options).run(QUESTION)).output


async def structured(model: Model, output: Any = City) -> object:
    return (await said(model, output_type=output)).model_dump()


async def chat(model: Model) -> bool:
    whole = await said(model)
    async with Agent(model).run_stream(QUESTION) as result:
        return bool("".join([text async for text in result.stream_text(delta=True)]) == whole != "")


async def abandoned(model: Model) -> list[object]:
    async with Agent(model).run_stream(QUESTION) as result:
        async for _ in result.stream_text(delta=True):
            break
    return [left("endless")]


async def cut(model: Model) -> str:
    async with Agent(model).run_stream(QUESTION) as result:
        return "".join([text async for text in result.stream_text(delta=True, debounce_by=None)])


cases: dict[str, Any] = {}
for kind, make in {"openai": openai_model, "anthropic": anthropic_model}.items():
    cases |= {
        f"{kind} chat": lambda make=make: chat(make("math")),
        f"{kind} parsed": lambda make=make: structured(make("math")),
        f"{kind} wrong_token": lambda make=make: said(make("math", token="wrong")),
        f"{kind} unknown": lambda make=make: said(make("poetry")),
        f"{kind} busy": lambda make=make: said(make("busy")),
        f"{kind} away": lambda make=make: said(make("away")),
        f"{kind} slow": lambda make=make: said(make("slow", max_retries=2)),
        f"{kind} cut": lambda make=make: cut(make("broken")),
        f"{kind} abandoned": lambda make=make: abandoned(make("endless")),
    }
run(
    cases
    | {
        "responses chat": lambda: chat(responses_model("math")),
        "native output": lambda: structured(openai_model("math"), NativeOutput(City)),
    }
)
