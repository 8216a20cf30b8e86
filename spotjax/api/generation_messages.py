"""Generation messages to and from the dataclasses of the engine. Checks only what the dataclasses check."""

from __future__ import annotations

from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.engine.generation import Delta, Usage
from spotjax.engine.request import FinishReason, Logprobs, SamplingParams
from spotjax.engine.structure import Structure, StructureKind
from spotjax.errors import InvalidRequest

OPTIONAL = ("max_tokens", "temperature", "top_p", "seed", "repetition_penalty", "logprobs")
"""Sampling fields whose default is not zero; the others are simply present."""
PLAIN = ("top_k", "min_p", "presence_penalty", "frequency_penalty", "ignore_eos")

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
FINISH_REASONS_BACK = {number: reason for reason, number in FINISH_REASONS.items()}


def sampling_from(message: pb.Sampling) -> SamplingParams:
    """The sampling parameters of a request; an unset seed is 0 here.

    Raises:
      InvalidRequest: a value is out of range; names the field.
    """
    given = {name: getattr(message, name) for name in OPTIONAL if message.HasField(name)}
    return SamplingParams(
        **given,
        **{name: getattr(message, name) for name in PLAIN},
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        structure=structure_from(message.structure) if message.HasField("structure") else None,
    )


def structure_from(message: pb.Structure) -> Structure:
    """The structure of a request; whether it can be kept to is not looked at.

    Raises:
      InvalidRequest: there is none in the message.
    """
    kind = message.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest("sampling.structure", f"one of {', '.join(StructureKind)} must be set")
    if kind == StructureKind.JSON_OBJECT:
        if not message.json_object:
            raise InvalidRequest("sampling.structure.json_object", "must be true, got false; leave structure out")
        return Structure(StructureKind.JSON_OBJECT)
    return Structure(StructureKind(kind), getattr(message, kind))


def delta_to(delta: Delta) -> pb.GenerateResponse:
    """The message for a piece of output."""
    message = pb.GenerateResponse(
        request_id=delta.request_id,
        choice=delta.choice,
        offset=delta.offset,
        token_ids=delta.tokens,
        text=delta.text,
        logprobs=[
            pb.TokenLogprobs(
                logprob=entry.token,
                top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
            )
            for entry in delta.logprobs
        ],
    )
    if delta.finish is not None:
        message.finish_reason = FINISH_REASONS[delta.finish]
    if delta.usage is not None:
        message.usage.prompt_tokens = delta.usage.prompt_tokens
        message.usage.completion_tokens = delta.usage.completion_tokens
    return message


def delta_from(message: pb.GenerateResponse) -> Delta:
    """The piece of output that a message carries; ``delta_to`` gives the message back."""
    return Delta(
        request_id=message.request_id,
        choice=message.choice,
        offset=message.offset,
        tokens=tuple(message.token_ids),
        text=message.text,
        logprobs=tuple(
            Logprobs(entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top))
            for entry in message.logprobs
        ),
        finish=FINISH_REASONS_BACK.get(message.finish_reason),
        usage=Usage(message.usage.prompt_tokens, message.usage.completion_tokens)
        if message.HasField("usage")
        else None,
    )
