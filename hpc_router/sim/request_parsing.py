"""Checks OpenAI and Anthropic request bodies, and reduces them to the values that the simulation needs.

Errors are those of vLLM: its status, `type` and `code`, and a message that names the key. Unknown fields are ignored,
as in vLLM. This module knows neither the engine's state nor the answer.
"""

from typing import Final

from hpc_router.sim.api_error import ApiError
from hpc_router.sim.generation import Api, Embedding, Generation, ParsedPrompt, Tool
from hpc_router.sim.logprobs import MAX_LOGPROBS, VOCABULARY_SIZE
from hpc_router.sim.prompt_parsing import chat_prompt, inputs, items, message, messages
from hpc_router.sim.request_fields import RequestFields
from hpc_router.sim.sampling import check_sampling
from hpc_router.sim.structured_outputs import constrained_text, tool_arguments
from hpc_router.sim.tool_choice import chat_tool, message_tool, response_tool

MAX_CHOICES = 128
COMPLETION_TOKENS: Final = 16
"""Default of `max_tokens` for a completion (vllm/entrypoints/openai/completion/protocol.py, CompletionRequest)."""
_INCLUDE_LOGPROBS: Final = "message.output_text.logprobs"


def parse_chat(raw: bytes) -> Generation:
    fields = RequestFields(raw)
    check_sampling(fields)
    stream = fields.flag("stream")
    limit = fields.integer("max_completion_tokens", minimum=1)
    tool = chat_tool(fields.value("tools"), fields.value("tool_choice"))
    echo, top = fields.flag("echo"), fields.count("top_logprobs") or 0
    logprobs = fields.flag("logprobs")
    if top and not logprobs:
        raise ApiError("when using `top_logprobs`, `logprobs` must be set to true.", param="top_logprobs")
    return Generation(
        api=Api.CHAT,
        model=fields.text("model"),
        prompts=(chat_prompt(messages(fields.value("messages")), echo=echo),),
        n=fields.integer("n", minimum=1, maximum=MAX_CHOICES) or 1,
        max_tokens=fields.integer("max_tokens", minimum=1) if limit is None else limit,
        limit_name="max_tokens" if limit is None else "max_completion_tokens",
        min_tokens=fields.integer("min_tokens", minimum=0) or 0,
        ignore_eos=fields.flag("ignore_eos"),
        stop=_stop(fields.value("stop")),
        seed=fields.integer("seed", minimum=-(2**63)) or 0,
        stream=stream,
        include_usage=_include_usage(fields.value("stream_options"), stream=stream),
        tool=tool,
        literal=_literal(fields, tool),
        echo=echo,
        top_logprobs=_top_logprobs(fields, top if logprobs else None),
        prompt_logprobs=_prompt_logprobs(fields, stream=stream, echoed=top if echo else None),
        cache_salt=_cache_salt(fields),
        priority=fields.priority(),
        fault=fields.value("sim_fault"),
    )


def parse_completion(raw: bytes) -> Generation:
    fields = RequestFields(raw)
    check_sampling(fields)
    stream, echo, top = fields.flag("stream"), fields.flag("echo"), fields.count("logprobs")
    prompts = inputs(fields.value("prompt"), key="prompt")
    max_tokens = fields.integer("max_tokens", minimum=0)
    if max_tokens == 0 and not echo:
        raise ApiError("max_tokens must be at least 1, got 0.", param="max_tokens")
    return Generation(
        api=Api.TEXT,
        model=fields.text("model"),
        prompts=prompts,
        n=fields.integer("n", minimum=1, maximum=max(1, MAX_CHOICES // len(prompts))) or 1,
        max_tokens=COMPLETION_TOKENS if max_tokens is None else max_tokens,
        min_tokens=fields.integer("min_tokens", minimum=0) or 0,
        ignore_eos=fields.flag("ignore_eos"),
        stop=_stop(fields.value("stop")),
        seed=fields.integer("seed", minimum=-(2**63)) or 0,
        stream=stream,
        include_usage=_include_usage(fields.value("stream_options"), stream=stream),
        literal=_literal(fields, None),
        echo=echo,
        top_logprobs=_top_logprobs(fields, top),
        prompt_logprobs=_prompt_logprobs(fields, stream=stream, echoed=top if echo else None),
        cache_salt=_cache_salt(fields),
        priority=fields.priority(),
        fault=fields.value("sim_fault"),
    )


def parse_response(raw: bytes) -> Generation:
    fields = RequestFields(raw)
    check_sampling(fields)
    instructions, include = fields.text("instructions"), fields.value("include")
    system = [] if instructions is None else [("system", instructions)]
    tool = response_tool(fields.value("tools"), fields.value("tool_choice"))
    text = fields.value("text")
    form = text.get("format") if isinstance(text, dict) else None
    if form is not None and fields.value("structured_outputs") is not None:
        raise ApiError("Cannot specify both structured_outputs and text.format", param="structured_outputs")
    for key in ("background", "prompt"):
        if fields.value(key):
            raise ApiError(f"The simulated engine cannot follow '{key}'.", param=key)
    logprobs = isinstance(include, list) and _INCLUDE_LOGPROBS in include
    return Generation(
        api=Api.RESPONSE,
        model=fields.text("model"),
        prompts=(chat_prompt(system + items(fields.value("input"))),),
        max_tokens=fields.integer("max_output_tokens", minimum=1),
        limit_name="max_output_tokens",
        ignore_eos=fields.flag("ignore_eos"),
        stream=fields.flag("stream"),
        tool=tool,
        literal=_literal(fields, tool, form, key="text.format"),
        top_logprobs=_top_logprobs(fields, (fields.count("top_logprobs") or 0) if logprobs else None),
        previous_response_id=fields.text("previous_response_id"),
        store=fields.value("store") is None or fields.flag("store"),
        cache_salt=_cache_salt(fields),
        priority=fields.priority(),
        fault=fields.value("sim_fault"),
    )


def parse_message(raw: bytes) -> Generation:
    """Parses a request for /v1/messages, which has no `ignore_eos` (vllm/entrypoints/anthropic/protocol.py)."""
    fields = RequestFields(raw)
    check_sampling(fields)
    limit = fields.integer("max_tokens", minimum=1)
    if limit is None:
        raise ApiError("'max_tokens' is required.", param="max_tokens")
    tool = message_tool(fields.value("tools"), fields.value("tool_choice"))
    output = fields.value("output_config")
    return Generation(
        api=Api.MESSAGE,
        model=fields.text("model"),
        prompts=(_message_prompt(fields),),
        max_tokens=limit,
        limit_name="max_completion_tokens",
        stop=_stop(fields.value("stop_sequences")),
        stream=fields.flag("stream"),
        tool=tool,
        literal=_literal(
            fields, tool, output.get("format") if isinstance(output, dict) else None, key="output_config.format"
        ),
        fault=fields.value("sim_fault"),
    )


def parse_count_tokens(raw: bytes) -> tuple[str | None, int]:
    """Parses a request to count a message's tokens. Returns the model, and the number of tokens in the prompt."""
    fields = RequestFields(raw)
    return fields.text("model"), _message_prompt(fields).tokens


def parse_embedding(raw: bytes) -> Embedding:
    fields = RequestFields(raw)
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise ApiError("'encoding_format' must be 'float' or 'base64'.", param="encoding_format")
    return Embedding(
        model=fields.text("model"),
        inputs=inputs(fields.value("input"), key="input"),
        base64=encoding == "base64",
        dimensions=fields.integer("dimensions", minimum=1, maximum=65_536),
        priority=fields.priority(),
        fault=fields.value("sim_fault"),
    )


def check_prompt(prompt: ParsedPrompt, *, max_model_len: int) -> None:
    """Raises ApiError for a prompt that is too long, with the rules of `_token_len_check` in
    vllm/renderers/params.py."""
    if prompt.tokens > max_model_len:
        raise ApiError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
            f"{prompt.tokens} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
            "length of the input prompt.",
            param="input_tokens",
        )


def token_limit(generation: Generation, prompt: ParsedPrompt, *, max_model_len: int) -> int:
    """Returns the maximum number of tokens of the answer: `max_tokens`, or less if the context has less room.

    Follows `get_max_tokens` in vllm/entrypoints/serve/utils/api_utils.py, and the checks of vllm/renderers/params.py
    and vllm/sampling_params.py.
    """
    asked, name = generation.max_tokens, generation.limit_name
    if asked is not None and asked > max_model_len:
        raise ApiError(
            f"{name}={asked} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens.",
            param=name,
        )
    check_prompt(prompt, max_model_len=max_model_len)
    left = max_model_len - prompt.tokens
    limit = left if asked is None else min(max(1, asked), left)
    if limit < 1:
        raise ApiError(f"max_tokens must be at least 1, got {limit}.", param="max_tokens")
    if generation.min_tokens > limit:
        message = f"min_tokens must be less than or equal to max_tokens={limit}, got {generation.min_tokens}."
        raise ApiError(message, param="min_tokens")
    return limit


def _message_prompt(fields: RequestFields) -> ParsedPrompt:
    system = fields.value("system")
    turns = [] if system is None else [message({"role": "system", "content": system}, where="system")]
    return chat_prompt(turns + messages(fields.value("messages")))


def _literal(
    fields: RequestFields, tool: Tool | None, form: object = None, *, key: str = "response_format"
) -> str | None:
    if tool is not None:
        return tool_arguments(tool)
    form = fields.value("response_format") if key == "response_format" else form
    given = None if key == "output_config.format" else fields.value("structured_outputs")
    return constrained_text(response_format=form, structured_outputs=given, key=key)


def _top_logprobs(fields: RequestFields, count: int | None) -> int | None:
    if fields.value("logprob_token_ids") is not None:
        raise ApiError("The simulated engine cannot follow 'logprob_token_ids'.", param="logprob_token_ids")
    _check_count(count, "sample", param="logprobs")
    return count


def _prompt_logprobs(fields: RequestFields, *, stream: bool, echoed: int | None) -> int | None:
    count = fields.count("prompt_logprobs")
    if stream and count:
        raise ApiError("`prompt_logprobs` are not available when `stream=True`.", param="prompt_logprobs")
    _check_count(count, "prompt", param="prompt_logprobs")
    return echoed if count is None else count


def _check_count(count: int | None, kind: str, *, param: str) -> None:
    number = VOCABULARY_SIZE if count == -1 else count or 0
    if number > MAX_LOGPROBS:
        message = f"Requested {kind} logprobs of {number}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise ApiError(message, param=param)


def _cache_salt(fields: RequestFields) -> str | None:
    salt = fields.text("cache_salt")
    if salt == "":
        raise ApiError("Parameter 'cache_salt' must be a non-empty string if provided.", param="cache_salt")
    return salt


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise ApiError("'stop' must be a string or a list of strings, none of them empty.", param="stop")
    return tuple(strings)


def _include_usage(value: object, *, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise ApiError("Stream options can only be defined when `stream=True`.", param="stream_options")
    if not isinstance(value, dict):
        raise ApiError("'stream_options' must be an object.", param="stream_options")
    return bool(value.get("include_usage"))
