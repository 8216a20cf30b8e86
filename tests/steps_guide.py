"""A structure that needs no grammar: every token is so much more than the one before, modulo the vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from spotjax.engine.structure import GuidedRow, Masks, Structure, StructureFailed, StructureKind, Tokens
from spotjax.runtime.controls import mask_words


def rising(step: int, length: int) -> Structure:
    """Tokens that rise by 1 to ``step``; ``length`` of them."""
    return Structure(StructureKind.GRAMMAR, f"{step} {length}")


@dataclass
class RisingMatcher:
    """See ``engine.structure.Matcher``."""

    structure: Structure
    vocab: int

    def allowed(self, tokens: Tokens) -> set[int]:
        step, _ = map(int, self.structure.text.split())
        return {(tokens[-1] + n) % self.vocab for n in range(1, step + 1)} if tokens else set(range(0, self.vocab, 2))

    def completed_by(self, tokens: Tokens, token: int) -> bool:
        """See ``engine.structure.Matcher``."""
        if token not in self.allowed(tokens):
            raise StructureFailed("the token does not rise")
        return len(tokens) + 1 == int(self.structure.text.split()[1])


@dataclass
class RisingGuide:
    """See ``engine.structure.Guide``.

    Attributes:
      vocab: of the model.
      gate: masks wait for it.
      asked: outputs so far of all rows that masks were computed for.
      fails_at: length of output at which masks cannot be told.
    """

    vocab: int
    gate: threading.Event = field(default_factory=threading.Event)
    asked: list[Tokens] = field(default_factory=list)
    fails_at: int = -1

    def __post_init__(self) -> None:
        self.gate.set()
        self._thread = ThreadPoolExecutor(1)

    def matcher(self, structure: Structure, *, ends: bool) -> RisingMatcher:
        """See ``Guide.matcher``."""
        return RisingMatcher(structure, self.vocab)

    def masks(self, rows: Mapping[int, GuidedRow]) -> Future[Masks]:
        """See ``Guide.masks``."""
        return self._thread.submit(self._masks, dict(rows))

    def _masks(self, rows: dict[int, GuidedRow]) -> Masks:
        assert self.gate.wait(60)
        bits = np.zeros((len(rows), 32 * mask_words(self.vocab)), np.uint8)
        failed = {}
        for place, (row, guided) in enumerate(rows.items()):
            assert isinstance(guided.matcher, RisingMatcher)
            self.asked.append(guided.tokens)
            bits[place, sorted(guided.matcher.allowed(guided.tokens))] = 1
            if len(guided.tokens) == self.fails_at:
                failed[row] = "as was to be tested"
        return Masks(tuple(rows), np.packbits(bits, axis=1, bitorder="little").view(np.int32), failed)
