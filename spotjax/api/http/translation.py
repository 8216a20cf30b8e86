"""From bodies in OpenAI's dialect to requests of ``spotjax.v1``, whose limits hold for both; and errors back.

What this server does not do is refused here, where the type of the field alone does not say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from spotjax.api.conversation import ROLES_BACK
from spotjax.api.http.bodies import Body, ChatBody, CompletionBody, Message
from spotjax.api.http.progress import FIELD
from spotjax.api.http.structures import structure_names, structure_of
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.api.requests import built
from spotjax.errors import InvalidRequest

MAX_PROMPTS = 128
"""Of one request for completions."""


def completion_requests(body: CompletionBody) -> list[pb.GenerateRequest]:
    """One request for each prompt.

    Raises:
      InvalidRequest: something is not supported, or cannot be; names the field.
    """
    choices = 1 if body.n is None else body.n
    if body.best_of not in (None, choices):
        refuse("best_of", f"only n ({choices}): none of the choices is thrown away")
    if body.echo:
        refuse("echo", "only false: the prompt is not sent back")
    sampling = sampling_of(body, body.max_tokens, body.logprobs)
    requests = []
    for prompt in prompts_of(body):
        given = (
            {"text": prompt} if isinstance(prompt, str) else {"token_ids": built(pb.TokenIds, "token_ids.", ids=prompt)}
        )
        requests.append(built(pb.GenerateRequest, **common(body, sampling), **given))
    return requests


def chat_requests(body: ChatBody) -> list[pb.GenerateRequest]:
    """The one request.

    Raises:
      InvalidRequest: something is not supported, or cannot be; names the field.
    """
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        refuse("max_tokens", "is the older name of max_completion_tokens; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        refuse("top_logprobs", "has no meaning without logprobs")
    if body.tool_choice not in (None, "none", "auto"):
        refuse("tool_choice", "only none and auto: what the model writes is not held to calls of tools")
    if body.parallel_tool_calls is False:
        refuse("parallel_tool_calls", "only true: calls of tools are part of the text")
    tools = [] if body.tool_choice == "none" else [raw_text(f"tools[{n}]", t) for n, t in enumerate(body.tools or ())]
    chat = pb.ChatMessages(messages=[turn(f"messages[{n}]", m) for n, m in enumerate(body.messages)], tools=tools)
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return [built(pb.GenerateRequest, **common(body, sampling_of(body, most, logprobs)), chat=chat)]


def common(body: Body, sampling: pb.Sampling) -> dict[str, Any]:
    """Fields of a request that do not depend on the prompt."""
    return {"model": body.model, "n": body.n, "sampling": sampling, "resumable": body.resumable or False}


def sampling_of(body: Body, max_tokens: int | None, logprobs: int | None) -> pb.Sampling:
    """How tokens are chosen."""
    if body.stream_options is not None and not body.stream:
        refuse("stream_options", "has no meaning without stream")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        refuse("stream_options.include_obfuscation", "only false")
    return built(
        pb.Sampling,
        "sampling.",
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_k=0 if body.top_k == -1 else body.top_k,  # which means all elsewhere
        top_p=body.top_p,
        min_p=body.min_p,
        seed=None if body.seed is None else unsigned(body.seed),
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        logprobs=logprobs,
        stop=[body.stop] if isinstance(body.stop, str) else body.stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        structure=structure_of(body.response_format if isinstance(body, ChatBody) else None, body.structured_outputs),
    )


def unsigned(seed: int) -> int:
    """The seed as 64 bits, two's complement: OpenAI's seeds are signed, ours are not."""
    if not -(2**63) <= seed < 2**64:
        refuse("seed", f"must be a number of 64 bits, got {seed}")
    return seed % 2**64


def prompts_of(body: CompletionBody) -> Sequence[str | list[int]]:
    """The prompts: one, or a list of them, each text or token ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(part, int) for part in given):
        return [[part for part in given if isinstance(part, int)]]
    prompts = [part for part in given if not isinstance(part, int)]
    if not prompts or len(prompts) < len(given):
        refuse("prompt", "must be text, token ids, or a list of either, not empty")
    if len(prompts) > MAX_PROMPTS:
        refuse("prompt", f"must be at most {MAX_PROMPTS} prompts, got {len(prompts)}")
    return prompts


def turn(path: str, message: Message) -> pb.ChatMessage:
    """One message. ``developer`` is a newer name of ``system``, which templates know."""
    if message.content is None and message.role != "assistant":
        refuse(f"{path}.content", "must be given")
    if isinstance(message.content, list):
        content = "\n".join(part.text for part in message.content)
    else:
        content = message.content or ""
    role = "system" if message.role == "developer" else message.role
    return built(
        pb.ChatMessage,
        f"{path}.",
        role=ROLES_BACK[role],
        content=content,
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=[
            built(
                pb.ToolCall,
                f"{path}.tool_calls[{n}].",
                id=call.id,
                name=call.function.name,
                arguments=call.function.arguments,
            )
            for n, call in enumerate(message.tool_calls or ())
        ],
    )


def raw_text(path: str, raw: Any) -> str:
    """JSON as it was sent."""
    try:
        return bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(path, f"must be UTF-8: {error}") from error


def completion_names(body: CompletionBody) -> dict[str, str]:
    """What fields of ``GenerateRequest`` are called in bodies, by how they begin."""
    names = {"text": "prompt", "token_ids.ids": "prompt", "sampling.": "", "offsets": FIELD}
    return structure_names(body.structured_outputs) | names


def chat_names(body: ChatBody) -> dict[str, str]:
    """The same in bodies for chats."""
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return structure_names(body.structured_outputs) | {
        "sampling.max_tokens": limit,
        "sampling.logprobs": "top_logprobs",
        "sampling.": "",
        "chat.": "",
        "offsets": FIELD,
    }


def renamed(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """The error with the field as the body calls it."""
    if type(error) is not InvalidRequest:
        return error
    for begin, name in names.items():
        if error.field.startswith(begin):
            return InvalidRequest(name + error.field[len(begin) :], str(error).removeprefix(f"{error.field}: "))
    return error


def refuse(field: str, problem: str) -> NoReturn:
    """Raises InvalidRequest."""
    raise InvalidRequest(field, problem)
