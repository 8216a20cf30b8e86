"""What a client asks for and what it is sent. Data only; the API maps these to its wire formats."""

from __future__ import annotations

from dataclasses import dataclass

from spotjax.engine.request import FinishReason, Logprobs, SamplingParams


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One accepted request, already tokenized.

    Attributes:
      request_id: unique; chosen by the server unless the client names one.
      prompt: token ids, at least one.
      sampling: how tokens are chosen.
      n: number of independent sequences to generate from the prompt.
      resumable: goes on when its client disconnects, and can be taken up again by ``Resume``.
      owner: name of the API key that it was sent with, to whom alone it belongs; empty where there are none.
      traceparent: W3C trace context that it was sent with; empty for none.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    resumable: bool = False
    owner: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request so far."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one sequence's output, sent only after its tokens were committed.

    Attributes:
      request_id: of the request.
      choice: which of the ``n`` sequences.
      offset: number of output tokens before ``tokens``; a stream is taken up again at ``offset + len(tokens)``.
      tokens: new output token ids.
      text: new final text; may lag behind ``tokens`` while a character or a possible stop text is incomplete.
      logprobs: one for each of ``tokens`` when asked for.
      finish: set on the last delta of the sequence.
      usage: set on the last delta of the sequence.
    """

    request_id: str
    choice: int
    offset: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
