"""What a request is and all that resuming it needs. Data only; text and stop handling is in ``text.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from spotjax.engine.structure import Structure
from spotjax.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 300


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    """What its structure allows next could not be told. What there is is the beginning of something that matches."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Ranges are checked at construction.

    Attributes:
      max_tokens: new tokens at most, at least 1.
      temperature: 0 is greedy; up to 100.
      top_k: keep only the k most likely tokens; 0 keeps all.
      top_p: keep the most likely tokens whose probabilities sum to at least this, in (0, 1].
      min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
      seed: 64-bit seed; the draw is a pure function of (seed, choice, position).
      repetition_penalty: divides (multiplies) positive (negative) logits of tokens in prompt or output, in (0, 10].
      presence_penalty: subtracted from logits of tokens in the output, in [-2, 2].
      frequency_penalty: the same times how often the token occurs in the output, in [-2, 2].
      logit_bias: token id to a value added to its logit, in [-100, 100].
      logprobs: report this many most likely tokens with each token; None reports nothing, 0 only the token's own.
      stop: texts that end generation and are not part of the output text.
      stop_token_ids: tokens that end generation, in addition to the model's own end tokens.
      ignore_eos: do not end at the model's end tokens.
      structure: what all of the output must match; None for anything.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    structure: Structure | None = None

    def __post_init__(self) -> None:
        self._check("max_tokens", self.max_tokens >= 1, "at least 1")
        self._check("temperature", 0 <= self.temperature <= 100, "in [0, 100]")
        self._check("top_k", self.top_k >= 0, "at least 0")
        self._check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        self._check("seed", 0 <= self.seed < 2**64, "an unsigned 64-bit integer")
        self._check("repetition_penalty", 0 < self.repetition_penalty <= 10, "in (0, 10]")
        self._check("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]")
        self._check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]")
        self._check("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"in [0, {MAX_LOGPROBS}]")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest("sampling.logit_bias", f"at most {MAX_LOGIT_BIAS} tokens, got {len(self.logit_bias)}")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise InvalidRequest("sampling.logit_bias", f"values must be in [-100, 100], token {token} has {bias}")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InvalidRequest("sampling.stop", f"at most {MAX_STOP_STRINGS} texts, none empty, got {len(self.stop)}")

    def _check(self, name: str, holds: bool, accepted: str) -> None:
        if not holds:
            raise InvalidRequest(f"sampling.{name}", f"must be {accepted}, got {getattr(self, name)}")

    @property
    def penalised(self) -> bool:
        """Whether tokens that came before make some less likely."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_output(self) -> bool:
        """Whether the next token depends on which tokens came before in other ways than through the model."""
        return self.penalised or self.structure is not None

    @property
    def plain_greedy(self) -> bool:
        """Whether the next token is simply the most likely one and nothing else is asked for."""
        return self.temperature == 0 and self.logprobs is None and not self.logit_bias and not self.penalised


class Logprobs(NamedTuple):
    """Natural log-probabilities at one position, of the model's own distribution (before temperature and filters)."""

    token: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the most likely tokens, best first."""


class Sampled(NamedTuple):
    """One sampled token."""

    token: int
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class RequestState:
    """One generated sequence: all that is needed to go on with it anywhere.

    A request with ``n`` choices is ``n`` of these. Random draws depend on (seed, choice, position) alone, so the
    counters are the lengths below and nothing else has to be kept.

    Attributes:
      request_id: of the request.
      choice: 0 .. n-1 within the request.
      prompt: token ids.
      sampling: how tokens are chosen.
      end_tokens: tokens of the model that end generation.
      tokens: committed output token ids.
      logprobs: one entry for each output token when asked for, else empty.
      text: output text that is final: no later token can change it, no stop text can begin in it.
      pending: decoded text held back because a stop text may begin in it (the stop-string tail).
      decoded: number of output tokens whose text is in ``text`` + ``pending``; the rest end inside a character.
      text_ends: length of ``text`` after each output token, so that a stream can be taken up at any token.
      finish: why the sequence ended, None while it runs.
    """

    request_id: str
    choice: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    end_tokens: frozenset[int] = frozenset()
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    text: str = ""
    pending: str = ""
    decoded: int = 0
    text_ends: tuple[int, ...] = ()
    finish: FinishReason | None = None

    @property
    def length(self) -> int:
        """Positions that prompt and output take."""
        return len(self.prompt) + len(self.tokens)

    def finished(self, reason: FinishReason) -> RequestState:
        """This state, ended; held-back text becomes final unless a stop text ended it."""
        return replace(self, finish=reason, text=self.text + self.pending, pending="")
