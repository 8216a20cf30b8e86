"""Structures to compiled grammars: what is accepted, within which limits. Compiled on threads, kept by content."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits

from spotjax.engine.structure import Structure, StructureKind
from spotjax.errors import InvalidRequest, Overloaded
from spotjax.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_BYTES = 128 * 1024
"""Of a structure's text, in UTF-8."""
COMPILE_SECONDS = 5.0
"""For one request; far above what grammars within the limits take."""
KEPT = 64
"""Compiled grammars, those that were used last."""
THREADS = 2
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms for one mask
    step_max_items=50_000,  # about 3 ms for one mask
    max_lexer_states=50_000,  # about 100 MB for one sequence
    max_grammar_size=500_000,
    precompute_large_lexemes=False,  # would be done before the limits apply
    verbose_errors=False,  # would name what was generated
)

JSON: JsonCompileOptions = {"whitespace_pattern": r" |\r?\n[ \t]{0,20}"}
"""A space, or a new line and its indentation: models that are not sure what comes next fill whatever room there is."""
TEMPERATURE = re.compile(r"\[[^\]\"]*\btemperature\s*=")
"""As an attribute of a rule."""
STRICT: JsonCompileOptions = {"lenient": False}
"""Keywords of a schema that are not supported are refused, whatever the schema says."""


class Grammars:
    """Compiled grammars of one model. May be used from any thread.

    Args:
      vocabulary: makes the model's, which is made when a grammar is wanted for the first time.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._make_vocabulary = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[Structure, LLMatcher] = OrderedDict()
        self._making, self._kept = threading.Lock(), threading.Lock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens; takes about a second the first time.

        Raises:
          InvalidRequest: the model's tokenizer is unsuitable.
        """
        with self._making:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            return self._vocabulary

    async def check(self, structure: Structure) -> None:
        """Makes sure that a structure can be kept to; what was compiled for that is kept.

        Raises:
          InvalidRequest: it cannot; names the field.
          Overloaded: too many others are being compiled.
        """
        begun, loop = threading.Event(), asyncio.get_running_loop()
        if self._vocabulary is None:
            await asyncio.to_thread(lambda: self.vocabulary)  # takes long whatever the structure is
        compiling = loop.run_in_executor(self._threads, self._begin, structure, begun)
        try:
            await asyncio.wait_for(compiling, COMPILE_SECONDS)
        except TimeoutError:
            if begun.is_set():
                raise refusal(structure, f"takes longer than {COMPILE_SECONDS:g} s to compile; simplify it") from None
            raise Overloaded("too many structures are being compiled; try again later", retry_after=1.0) from None

    def matcher(self, structure: Structure) -> LLMatcher:
        """A matcher at the beginning. Compiles; blocks.

        Raises:
          InvalidRequest: the structure cannot be kept to.
        """
        with self._kept:
            compiled = self._compiled.get(structure)
            if compiled is not None:
                self._compiled.move_to_end(structure)
                return compiled.deep_copy()
        compiled = compile_structure(structure, self.vocabulary)
        with self._kept:
            self._compiled[structure] = compiled
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, structure: Structure, begun: threading.Event) -> None:
        begun.set()
        self.matcher(structure)


def compile_structure(structure: Structure, vocabulary: Vocabulary) -> LLMatcher:
    """The matcher of a structure, at the beginning.

    Raises:
      InvalidRequest: it is malformed, too large, has features that are not supported, or allows no text.
    """
    if (size := len(structure.text.encode())) > MAX_BYTES:
        raise refusal(structure, f"must be at most {MAX_BYTES} bytes, got {size}")
    try:
        matcher = LLMatcher(vocabulary.tokens, _grammar(structure), log_level=0, limits=LIMITS)
    except ValueError as problem:
        raise refusal(structure, str(problem)) from problem
    if matcher.is_error():
        raise refusal(structure, matcher.get_error().strip())
    if warnings := matcher.get_grammar_warnings():
        raise refusal(structure, "; ".join(warnings))
    begins = np.frombuffer(matcher.compute_bitmask(), np.int32)  # takes long once only: copies are spared it
    if matcher.is_error():
        raise refusal(structure, f"is too complex to begin with ({matcher.stop_reason()}); simplify it")
    if not (begins[: vocabulary.words] & ~vocabulary.ends).any():
        raise refusal(structure, "allows no text but the empty one")
    return matcher


def refusal(structure: Structure, problem: str) -> InvalidRequest:
    """What a client is told of a structure that is not taken."""
    return InvalidRequest(f"sampling.structure.{structure.kind}", problem)


def _grammar(structure: Structure) -> str:
    """The structure as llguidance wants it."""
    match structure.kind:
        case StructureKind.REGEX:
            return LLMatcher.grammar_from_regex(structure.text)
        case StructureKind.GRAMMAR:
            _check_grammar(structure)
            return LLMatcher.grammar_from_lark(structure.text)
        case StructureKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=JSON)
        case StructureKind.JSON_SCHEMA:
            defaults = {} if "x-guidance" in _schema(structure) else JSON
            return LLMatcher.grammar_from_json_schema(structure.text, defaults=defaults, overrides=STRICT)


def _check_grammar(structure: Structure) -> None:
    """Raises InvalidRequest for what llguidance would pass over in silence, and for its format other than Lark."""
    if structure.text.lstrip().startswith("{"):
        raise refusal(structure, "must be a grammar in Lark syntax, got JSON")
    if TEMPERATURE.search(structure.text):
        raise refusal(structure, "temperature is not supported within a grammar; it is a field of sampling")


def _schema(structure: Structure) -> dict[str, Any]:
    """A JSON schema as an object. One that has ``x-guidance`` says itself where blanks may be.

    Raises:
      InvalidRequest: it is not JSON, or no object.
    """
    try:
        schema = msgspec.json.decode(structure.text)
    except (msgspec.DecodeError, RecursionError) as problem:
        raise refusal(structure, f"is not JSON: {problem}") from problem
    if not isinstance(schema, dict):
        raise refusal(structure, f"must be an object, got {type(schema).__name__}")
    return schema
