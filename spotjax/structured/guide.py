"""Follows sequences through their structures: masks of what they may draw, and whether they are complete.

Masks are computed in a thread of its own, one step after another, so no matcher is ever used twice at once; llguidance
spreads the rows of a step over as many processors as there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from spotjax.engine.structure import GuidedRow, Masks, Matcher, Structure, StructureFailed, Tokens
from spotjax.errors import InvalidRequest
from spotjax.structured.grammars import Grammars


class SequenceMatcher:
    """Follows one sequence; see ``engine.structure.Matcher``. Compiles the structure when it is first needed.

    Args:
      grammars: where compiled structures come from.
      structure: that the sequence keeps to.
      ends: whether the model's end tokens are allowed where the structure may end.
    """

    def __init__(self, grammars: Grammars, structure: Structure, *, ends: bool) -> None:
        self._grammars, self._structure, self.ends = grammars, structure, ends
        self._matcher: LLMatcher | None = None
        self._seen = 0

    def completed_by(self, tokens: Tokens, token: int) -> bool:
        """See ``engine.structure.Matcher``."""
        ends = token in self._grammars.vocabulary.end_tokens
        if ends and not self.ends:
            raise StructureFailed("an end token was drawn, which the request ignores")
        matcher = self.at((*tokens, token))  # takes an end token only where the structure may end
        return ends or matcher.is_stopped()

    def at(self, tokens: Tokens) -> LLMatcher:
        """The matcher after these tokens, the output so far.

        Raises:
          StructureFailed: they do not match, or that cannot be told.
        """
        if self._matcher is None or self._seen > len(tokens):
            try:
                self._matcher, self._seen = self._grammars.matcher(self._structure), 0
            except InvalidRequest as problem:  # it was accepted by another version, or by another model's server
                raise StructureFailed(str(problem)) from problem
        new = list(tokens[self._seen :])
        if new and not self._matcher.consume_tokens(new):
            raise StructureFailed(_why(self._matcher))
        self._seen = len(tokens)
        return self._matcher


class StructureGuide:
    """See ``engine.structure.Guide``.

    Args:
      grammars: of the model.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._rows = LLExecutor()

    def matcher(self, structure: Structure, *, ends: bool) -> SequenceMatcher:
        """See ``Guide.matcher``."""
        return SequenceMatcher(self._grammars, structure, ends=ends)

    def masks(self, rows: Mapping[int, GuidedRow]) -> Future[Masks]:
        """See ``Guide.masks``."""
        return self._thread.submit(self._masks, rows)

    def close(self) -> None:
        """Ends the threads."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()

    def _masks(self, rows: Mapping[int, GuidedRow]) -> Masks:
        vocabulary, failed = self._grammars.vocabulary, dict[int, str]()
        filled = np.full((len(rows), vocabulary.filled), -1, np.int32)
        following: dict[int, tuple[LLMatcher, int]] = {}
        for place, (row, guided) in enumerate(rows.items()):
            try:
                following[row] = _own(guided.matcher).at(guided.tokens), place
            except StructureFailed as problem:
                failed[row] = str(problem)
        if following:
            fill_next_token_bitmask_par(self._rows, list(following.values()), filled)
        words = np.ascontiguousarray(filled[:, : vocabulary.words])
        for row, (matcher, place) in following.items():
            if not _own(rows[row].matcher).ends:
                words[place] &= ~vocabulary.ends
            if not rows[row].tokens:
                words[place] &= ~vocabulary.blanks
            if matcher.is_error():
                failed[row] = _why(matcher)
            elif not words[place].any():
                failed[row] = "none of the model's tokens goes on with it"
        return Masks(tuple(rows), words, failed)


def _own(matcher: Matcher) -> SequenceMatcher:
    """A guide is given the matchers that it made."""
    assert isinstance(matcher, SequenceMatcher)
    return matcher


def _why(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on; its own words would tell what was generated."""
    return f"its matcher stopped with {matcher.stop_reason()}"
