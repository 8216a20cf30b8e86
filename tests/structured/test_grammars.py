"""What can be kept to is taken, everything else is refused by name before a request is accepted, soon enough."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structured_cases import bytes_only, guide, regex, sentencepiece, text_bytes, tiny
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from spotjax.engine.structure import Structure, StructureKind
from spotjax.errors import InvalidRequest
from spotjax.models.tokenizer import Tokenizer
from spotjax.structured import grammars
from spotjax.structured.grammars import KEPT, MAX_BYTES, Grammars, compile_structure
from spotjax.structured.vocabulary import Vocabulary

SCHEMA, GRAMMAR, REGEX = StructureKind.JSON_SCHEMA, StructureKind.GRAMMAR, StructureKind.REGEX


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(tiny(), tiny().vocab_size)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (StructureKind.JSON_OBJECT, ""),
        (SCHEMA, '{"type": "object", "description": "no matter"}'),
        (SCHEMA, '{"type": "string", "format": "date-time"}'),
        (SCHEMA, "{}"),
        (REGEX, r"\d+(\.\d*)?"),
        (GRAMMAR, 'start: "yes" | "no" WORD\nWORD: /[a-z]+/'),
    ],
)
def test_what_is_supported_is_taken(vocabulary: Vocabulary, kind: StructureKind, text: str) -> None:
    compile_structure(Structure(kind, text), vocabulary)


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        (SCHEMA, "", "is not JSON"),
        (SCHEMA, "{", "is not JSON"),
        (SCHEMA, "[]", "must be an object, got list"),
        (SCHEMA, "true", "must be an object, got bool"),
        (SCHEMA, '{"type": "foo"}', "foo"),
        (SCHEMA, '{"if": {}}', "if"),
        (SCHEMA, '{"if": {}, "x-guidance": {"lenient": true}}', "if"),
        (SCHEMA, '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        (SCHEMA, '{"type": "string", "format": "idn-email"}', "idn-email"),
        (SCHEMA, '{"$ref": "http://127.0.0.1:9/schema.json"}', "does not fetch"),
        (SCHEMA, '{"$ref": "#/nowhere"}', "nowhere"),
        (SCHEMA, json.dumps({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
        (SCHEMA, '{"a":' * 200 + "1" + "}" * 200, ""),
        (SCHEMA, '{"a":' * 5000 + "1" + "}" * 5000, "is not JSON"),
        (REGEX, "", "no text but the empty one"),
        (REGEX, "a(", "unclosed group"),
        (REGEX, "(?=a)b", "look-around"),
        (REGEX, r"(?P<x>a)\1", "backreferences"),
        (GRAMMAR, "", "Empty grammar"),
        (GRAMMAR, 'start: "a" b', "unknown name"),
        (GRAMMAR, 'start[temperature=0.3]: "a"', "temperature is not supported"),
        (GRAMMAR, '{"grammars": [{"lark_grammar": "start: /a/"}]}', "Lark syntax, got JSON"),
        (REGEX, "a" * (MAX_BYTES + 1), f"at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    vocabulary: Vocabulary, kind: StructureKind, text: str, problem: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compile_structure(Structure(kind, text), vocabulary)
    assert refused.value.field == f"sampling.structure.{kind}"
    assert problem in str(refused.value)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([SCHEMA, REGEX, GRAMMAR]), st.text(max_size=40) | st.text('start:"a/|*()[]{}\\\n', max_size=40))
def test_no_text_does_worse_than_be_refused(kind: StructureKind, text: str) -> None:
    try:
        compile_structure(Structure(kind, text), guide()._grammars.vocabulary)
    except InvalidRequest as refused:
        assert refused.field == f"sampling.structure.{kind}"


def test_grammars_made_to_be_hard_are_done_with_soon(vocabulary: Vocabulary) -> None:
    deep: object = {"type": "string"}
    for _ in range(6):
        deep = {"type": "object", "properties": {f"p{n}": deep for n in range(4)}, "additionalProperties": False}
    hard = (
        regex("((a{0,500}b){0,500}c){0,500}"),
        regex("(" + "|".join(f"x{n}.*y{n}" for n in range(3000)) + ")"),
        regex(r"(\w{0,9}\pL){0,999}" * 40),
        Structure(GRAMMAR, "start: s\ns: s s | s s s | /a*/ | "),
        Structure(SCHEMA, json.dumps(deep)[:MAX_BYTES] if len(json.dumps(deep)) < MAX_BYTES else "{}"),
        Structure(SCHEMA, json.dumps({"type": "string", "allOf": [{"pattern": f"a.*{c}.*"} for c in "bcdefghijklm"]})),
        Structure(SCHEMA, json.dumps({"enum": [f"value number {n}" for n in range(4000)]})),
    )
    for structure in hard:
        began = time.perf_counter()
        with contextlib.suppress(InvalidRequest):
            compile_structure(structure, vocabulary)
        assert time.perf_counter() - began < 5, structure.text[:60]


def slow_grammars(monkeypatch: pytest.MonkeyPatch, vocabulary: Vocabulary) -> tuple[Grammars, threading.Event]:
    """Grammars that take until an event is set, and a patience of next to nothing."""
    go_on = threading.Event()
    real = grammars.compile_structure

    def slow(structure: Structure, over: Vocabulary) -> object:
        assert go_on.wait(30)
        return real(structure, over)

    monkeypatch.setattr(grammars, "compile_structure", slow)
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.05)
    return Grammars(lambda: vocabulary), go_on


async def test_a_structure_that_takes_too_long_is_refused_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, vocabulary: Vocabulary
) -> None:
    slow, go_on = slow_grammars(monkeypatch, vocabulary)
    try:
        checks = await asyncio.gather(*(slow.check(regex(f"a{n}")) for n in range(3)), return_exceptions=True)
        assert sorted(type(check).__name__ for check in checks) == ["InvalidRequest", "InvalidRequest", "Overloaded"]
        assert "longer than 0.05 s" in str(next(check for check in checks if isinstance(check, InvalidRequest)))
    finally:
        go_on.set()
        slow.close()


async def test_the_same_structure_is_compiled_once(monkeypatch: pytest.MonkeyPatch, vocabulary: Vocabulary) -> None:
    compiled: list[str] = []

    def counted(structure: Structure, over: Vocabulary) -> object:
        compiled.append(structure.text)
        return compile_structure(structure, over)

    monkeypatch.setattr(grammars, "compile_structure", counted)
    kept = Grammars(lambda: vocabulary)
    for _ in range(3):
        await kept.check(regex("abc"))
    assert compiled == ["abc"]
    first, second = kept.matcher(regex("abc")), kept.matcher(regex("abc"))
    assert first.consume_token(tiny().encode("a", add_special_tokens=False)[0])
    assert second.compute_bitmask() == kept.matcher(regex("abc")).compute_bitmask(), "matchers do not share their place"
    for n in range(KEPT):
        await kept.check(regex(f"x{n}"))
    await kept.check(regex("abc"))
    assert compiled.count("abc") == 2, "what was not used for long is forgotten"
    kept.close()


@pytest.mark.parametrize("tokenizer", [tiny(), sentencepiece(), bytes_only()], ids=["tiny", "sentencepiece", "bytes"])
def test_tokens_are_the_bytes_that_the_tokenizers_own_decoder_gives(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    anchor = tokenizer.encode("x", add_special_tokens=False)[-1]  # after it no space is lost
    for token, piece in enumerate(text_bytes(tokenizer)):
        if piece is not None and token > 2:
            text = tokenizer.decode([anchor, token])
            assert vocabulary.bytes_of(token) == text.removeprefix("x").encode(), token
    assert all(vocabulary.bytes_of(token) == b"" for token in tokenizer.end_tokens)


def words_only() -> Tokenizer:
    library = Library(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(library, frozenset({2}))


def metaspace() -> Tokenizer:
    """Its words are not marked in a way that llguidance knows."""
    ours = sentencepiece()
    library = ours._tokenizer
    library.normalizer, library.pre_tokenizer = None, pre_tokenizers.Metaspace()  # type: ignore[assignment]
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])  # type: ignore[assignment]
    return ours


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        (words_only(), "decoder"),
        (metaspace(), "are not the bytes"),
        (bytes_only(missing="{"), "'{' is no token"),
        (Tokenizer(bytes_only()._tokenizer, frozenset()), "no end token"),
    ],
    ids=["words", "metaspace", "no brace", "no end"],
)
async def test_a_tokenizer_that_cannot_be_served_is_refused_by_name(tokenizer: Tokenizer, problem: str) -> None:
    unserved = Grammars(lambda: Vocabulary(tokenizer, tokenizer.vocab_size))
    with pytest.raises(InvalidRequest, match=problem) as refused:
        await unserved.check(regex("a"))
    assert refused.value.field == "sampling.structure"
    unserved.close()
