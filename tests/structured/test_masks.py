"""Masks allow exactly the tokens after which the text can still come to match, by brute force over the vocabulary."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from random import Random

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_cases import allowed, guide, masks, may_begin, regex, sentencepiece, text_bytes, tiny

from spotjax.engine.structure import Structure, StructureFailed, StructureKind, Tokens
from spotjax.structured.guide import SequenceMatcher

ALPHABET = "ab1 "
LONGEST = 4
PATTERNS = (
    r"a{1,3}b?", r"(ab|a1)+ ?b", r"[ab]{2} [ab]{2}", r"(a|ab)(b|1)", r"b*a", r"a( a){0,2}", r"1|1a|1ab|ba",
)  # fmt: skip
atoms = st.sampled_from(["a", "b", "1", " ", "[ab]", "ab"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        inner.map(lambda one: f"({one})?"),
        inner.map(lambda one: f"({one}){{1,2}}"),
    ),
    max_leaves=4,
)


def walk(pattern: str, seed: int, *, ends: bool = True) -> None:
    """Goes through tokens that masks allow to the end of a text; compares every mask with what trying them all says.

    Where only one text can follow, llguidance allows only the token that the tokenizer would begin it with.
    """
    tokenizer, draw, matcher = tiny(), Random(seed), guide().matcher(regex(pattern), ends=ends)
    pieces = {
        token: piece.decode()
        for token, piece in enumerate(text_bytes(tokenizer))
        if piece is not None and set(piece.decode()) <= set(ALPHABET)
    }
    tokens: Tokens = ()
    while True:
        text = "".join(pieces[token] for token in tokens)
        found = masks(guide(), (matcher, tokens))
        assert not found.failed
        expected = {t for t, piece in pieces.items() if may_begin(pattern, text + piece, ALPHABET, LONGEST)}
        if ends and re.fullmatch(pattern, text):
            expected |= tokenizer.end_tokens
        if (given := allowed(found.words[0])) != expected:
            chain = sorted((pieces[token] for token in expected), key=len)
            assert all(longer.startswith(shorter) for shorter, longer in pairwise(chain)), "only one text can follow"
            assert len(given) == 1 and given < expected, (pattern, text)
        token = draw.choice(sorted(given))
        complete = matcher.completed_by(tokens, token)
        if complete:
            whole = text + pieces.get(token, "")
            assert re.fullmatch(pattern, whole), "only what matches is complete"
            return
        tokens = (*tokens, token)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_allows_what_can_still_match_and_nothing_else(pattern: str) -> None:
    for seed in range(3):
        walk(pattern.replace("+", "{1,2}").replace("*", "{0,2}"), seed)


@settings(max_examples=25, deadline=None)
@given(patterns, st.integers(0, 9))
def test_masks_of_any_pattern_are_those_of_trying_every_token(pattern: str, seed: int) -> None:
    if not re.fullmatch(pattern, ""):
        walk(pattern, seed)


def test_ignored_end_tokens_are_left_out_where_the_text_could_end() -> None:
    walk("ab?1?", 0, ends=False)
    matcher = guide().matcher(regex("a+"), ends=False)
    (token,) = tiny().encode("a", add_special_tokens=False)
    found = allowed(masks(guide(), (matcher, (token,))).words[0])
    assert token in found and not found & tiny().end_tokens


@pytest.mark.parametrize("name", ["tiny", "bytes", "sentencepiece"])
def test_a_token_that_is_not_allowed_is_never_taken_for_one(name: str) -> None:
    matcher = guide(name).matcher(regex("abc"), ends=True)
    found = allowed(masks(guide(name), (matcher, ())).words[0])
    vocabulary = guide(name)._grammars.vocabulary
    assert {vocabulary.bytes_of(token) for token in found} <= {b"a", b"ab", b"abc"}
    with pytest.raises(StructureFailed, match="stopped") as failure:
        matcher.completed_by((), next(token for token in range(50) if token not in found | vocabulary.end_tokens))
    assert "satisfy" not in str(failure.value), "what was generated is nobody's business"


@pytest.mark.parametrize("name", ["tiny", "bytes", "sentencepiece"])
def test_an_end_token_is_taken_only_where_the_text_may_end(name: str) -> None:
    (end,) = guide(name)._grammars.vocabulary.end_tokens
    tokens: Tokens = ()
    for _ in range(2):
        with pytest.raises(StructureFailed):  # as a worker might send it that knows no masks
            guide(name).matcher(regex("ab+"), ends=True).completed_by(tokens, end)
        found = masks(guide(name), (guide(name).matcher(regex("ab"), ends=True), tokens))
        tokens = (*tokens, min(allowed(found.words[0])))
        if guide(name).matcher(regex("ab"), ends=True).completed_by(tokens[:-1], tokens[-1]):
            break
    assert guide(name).matcher(regex("ab+"), ends=True).completed_by(tokens, end)
    with pytest.raises(StructureFailed, match="end token"):
        guide(name).matcher(regex("ab+"), ends=False).completed_by(tokens, end)


def test_text_never_begins_with_a_space_that_the_tokenizer_would_lose() -> None:
    tokenizer, matcher = sentencepiece(), guide("sentencepiece").matcher(regex(" ?a(b| a)*"), ends=True)
    first = allowed(masks(guide("sentencepiece"), (matcher, ())).words[0])
    assert {tokenizer.decode([token]) for token in first} == {"a", "ab"}
    vocabulary = guide("sentencepiece")._grammars.vocabulary
    assert all(vocabulary.bytes_of(token).decode() == tokenizer.decode([token]) for token in first)
    begun = (min(first),)
    later = allowed(masks(guide("sentencepiece"), (matcher, begun)).words[0])
    assert " a" in {vocabulary.bytes_of(token).decode() for token in later}


def test_rows_beyond_the_tokenizer_are_never_drawn() -> None:
    wide = guide("tiny", vocab=2100)
    found = masks(wide, (wide.matcher(regex(".*"), ends=True), ()))
    assert found.words.shape == (1, 66) and max(allowed(found.words[0])) < tiny().vocab_size
    narrow = guide("tiny", vocab=1000)
    assert masks(narrow, (narrow.matcher(regex(".*"), ends=True), ())).words.shape == (1, 32)


def test_a_matcher_that_begins_in_the_middle_says_what_one_says_that_was_there_from_the_start() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 5}}}
    structure, draw = Structure(StructureKind.JSON_SCHEMA, json.dumps(schema)), Random(3)
    whole, tokens = guide().matcher(structure, ends=True), tuple[int, ...]()
    for _ in range(60):
        late = guide().matcher(structure, ends=True)
        found = masks(guide(), (whole, tokens), (late, tokens))
        np.testing.assert_array_equal(*found.words)
        token = draw.choice(sorted(allowed(found.words[0]) - tiny().end_tokens))
        complete = [matcher.completed_by(tokens, token) for matcher in (whole, late)]
        assert complete[0] == complete[1]
        tokens = (*tokens, token)
        if complete[0]:
            break
    shorter = tokens[: len(tokens) // 2]  # as after a log that lost its end
    again = guide().matcher(structure, ends=True)
    np.testing.assert_array_equal(masks(guide(), (whole, shorter)).words, masks(guide(), (again, shorter)).words)


SCHEMAS = (
    {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", None, 2.5, {"y": []}]}, "minItems": 1, "maxItems": 3},
    {"anyOf": [{"const": "caf\u00e9"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    {"$defs": {"n": {"type": "number", "minimum": 2, "maximum": 7}}, "$ref": "#/$defs/n"},
)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_any_walk_through_a_schema_ends_in_json_that_it_describes(schema: dict[str, object]) -> None:
    structure = Structure(StructureKind.JSON_SCHEMA, json.dumps(schema))
    for seed in range(5):
        draw, tokens, matcher = Random(seed), tuple[int, ...](), guide().matcher(structure, ends=True)
        while True:
            found = sorted(allowed(masks(guide(), (matcher, tokens)).words[0]))
            end = [token for token in found if token in tiny().end_tokens]
            token = (end or [found[int(len(found) * draw.random() ** 3)]])[0]
            complete = matcher.completed_by(tokens, token)
            tokens = (*tokens, token)
            if complete:
                break
        jsonschema.validate(json.loads(tiny().decode(tokens)), schema)


def test_one_row_that_cannot_go_on_does_not_keep_others_from_it() -> None:
    good, bad = (guide().matcher(regex("[ab]+"), ends=True) for _ in range(2))
    wrong = tiny().encode("x", add_special_tokens=False)
    found = masks(guide(), (bad, tuple(wrong)), (good, ()))
    assert found.rows == (0, 1) and set(found.failed) == {0}
    assert allowed(found.words[1]) == allowed(masks(guide(), (good, ())).words[0])


def test_a_structure_that_was_accepted_by_another_version_fails_its_sequence_alone() -> None:
    bad: SequenceMatcher = guide().matcher(regex("(?=a)b"), ends=True)
    found = masks(guide(), (bad, ()))
    assert "look-around" in found.failed[0]
