"""From a ``GenerateRequest`` to the request that the engine takes. Owns every limit that the protos document."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import Protocol

from spotjax.api.generation_messages import sampling_from
from spotjax.api.prompt import Tokenizer, check_tokens, prompt_tokens
from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.engine.structure import Structure
from spotjax.errors import InvalidRequest, UnknownModel
from spotjax.telemetry.trace_context import current_traceparent

MAX_MESSAGE_BYTES = 4 * 2**20
"""Far above any prompt that fits a model; a larger message is refused with RESOURCE_EXHAUSTED before it is read."""

MAX_CHOICES = 16
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model that requests are for.

    Attributes:
      name: what requests may call it.
      tokenizer: text to tokens and back.
      max_model_len: positions that prompt and output together may take.
      structures: says which structures output can be kept to; None where it can be kept to none.
    """

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    structures: Structures | None = None


class Structures(Protocol):
    """What the API needs to know of structured output; ``spotjax.structured`` has the real one."""

    async def check(self, structure: Structure) -> None:
        """Returns if output can be kept to it.

        Raises:
          InvalidRequest: it cannot.
          Overloaded: nobody has had the time to look.
        """
        ...


async def accepted_request(
    request: pb.GenerateRequest, model: ServedModel, *, to_the_end: bool = False
) -> GenerationRequest:
    """The request, tokenized, with what the client left open filled in.

    Args:
      to_the_end: an unset ``max_tokens`` is all that the prompt leaves of ``max_model_len``, instead of 16.

    Raises:
      InvalidRequest: a field is out of range; names it and what is accepted.
    """
    if request.HasField("model") and request.model != model.name:
        raise UnknownModel(request.model, model.name)
    if request.HasField("n") and not 1 <= request.n <= MAX_CHOICES:
        raise InvalidRequest("n", f"must be in [1, {MAX_CHOICES}], got {request.n}")
    request_id = checked_request_id(request.request_id) if request.HasField("request_id") else secrets.token_hex(16)
    sampling = accepted_sampling(request.sampling, model.tokenizer.vocab_size)
    if sampling.structure is not None:
        await check_structure(sampling.structure, model.structures)
    prompt = await prompt_tokens(request, model.tokenizer)
    if to_the_end and not request.sampling.HasField("max_tokens"):
        sampling = replace(sampling, max_tokens=max(1, model.max_model_len - len(prompt)))
    check_length(str(request.WhichOneof("input")), len(prompt), sampling.max_tokens, model.max_model_len)
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        n=request.n if request.HasField("n") else 1,
        resumable=request.resumable,
        traceparent=current_traceparent(),
    )


def checked_request_id(request_id: str) -> str:
    """The id; raises InvalidRequest if it is not one."""
    if not REQUEST_ID.fullmatch(request_id):
        raise InvalidRequest("request_id", f"must be 1 to 64 characters of A-Z a-z 0-9 _ -, got {request_id[:80]!r}")
    return request_id


def accepted_sampling(message: pb.Sampling, vocab_size: int) -> SamplingParams:
    """Sampling parameters whose tokens exist; with a random seed where the client gave none.

    Raises:
      InvalidRequest: a value is out of range, or a token does not exist.
    """
    check_tokens("sampling.stop_token_ids", message.stop_token_ids, vocab_size)
    check_tokens("sampling.logit_bias", list(message.logit_bias), vocab_size)
    sampling = sampling_from(message)
    return replace(
        sampling,
        seed=sampling.seed if message.HasField("seed") else secrets.randbits(64),
        top_k=min(sampling.top_k, vocab_size),  # beyond the vocabulary it keeps all just the same
    )


async def check_structure(structure: Structure, structures: Structures | None) -> None:
    """Raises InvalidRequest unless output can be kept to the structure."""
    if structures is None:
        raise InvalidRequest("sampling.structure", "this server cannot keep output to a structure")
    await structures.check(structure)


def check_length(field: str, prompt: int, max_tokens: int, max_model_len: int) -> None:
    """Raises InvalidRequest unless prompt and output, in tokens, fit into ``max_model_len``."""
    room = max_model_len - prompt
    if room < 1:
        raise InvalidRequest(
            field, f"must come to at most {max_model_len - 1} tokens (max_model_len {max_model_len}), got {prompt}"
        )
    if max_tokens > room:
        raise InvalidRequest(
            "sampling.max_tokens",
            f"must be in [1, {room}] with {prompt} prompt tokens (max_model_len {max_model_len}), got {max_tokens}",
        )
