"""Requests with structures of every kind, drawn by seed, and an independent look at whether output matches."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spotjax.engine.request import SamplingParams
from spotjax.engine.structure import Structure, StructureKind

LONGEST = 440
"""New tokens, more than anything here takes."""
COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""No blanks at all."""
NAMES = ("name", "age", "tags", "x y", "caf\u00e9", "id", "ok")
REGEXES = (
    r"[0-9]{4}-(0[1-9]|1[0-2])-[0-9]{2}",
    r"(yes|no|may be){1,3}",
    r"[a-z]{1,9}@[a-z]{2,9}\.(com|org)",
    r'"([^"\\]|\\["\\]){0,12}"',
    r"\p{Lu}\p{Ll}{2,12}( \p{Lu}\p{Ll}{2,12}){0,2}",
)
PAIRS = r"\[([a-z]{1,4}=\d{1,3}(,[a-z]{1,4}=\d{1,3}){0,3})?\]"
GRAMMARS = (
    ('start: "[" [pair ("," pair){0,3}] "]"\npair: /[a-z]{1,4}/ "=" /[0-9]{1,3}/', PAIRS),
    ('start: "(" start ")" | WORD\nWORD: /[xyz]{1,3}/', None),
)
"""In Lark, and a regular expression that says the same; None for brackets around a word."""


@dataclass(frozen=True)
class StructuredRequest:
    """Something to ask of a server again and again; the answer is always the same.

    Attributes:
      name: unique in its mix.
      prompt: text.
      sampling: how tokens are chosen.
      matches: whether a text is what was asked for.
    """

    name: str
    prompt: str
    sampling: SamplingParams
    matches: Callable[[str], bool]


def structure_mix(seed: int, count: int) -> list[StructuredRequest]:
    """``count`` different requests, most of them with a JSON schema."""
    draw = random.Random(seed)
    return [_request(number, draw) for number in range(count)]


def _request(number: int, draw: random.Random) -> StructuredRequest:
    kind = draw.choices(("schema", "regex", "grammar"), (8, 1, 1))[0]
    if kind == "schema":
        schema = {**random_schema(draw, 2), **(COMPACT if draw.random() < 0.7 else {})}
        structure = Structure(StructureKind.JSON_SCHEMA, json.dumps(schema))
        matches: Callable[[str], bool] = lambda text: valid(text, schema)  # noqa: E731
    elif kind == "regex":
        pattern = draw.choice(REGEXES)
        structure, matches = Structure(StructureKind.REGEX, pattern), lambda text: _whole(pattern, text)
    else:
        grammar, pattern_of = draw.choice(GRAMMARS)
        structure = Structure(StructureKind.GRAMMAR, grammar)
        matches = lambda text: _whole(pattern_of, text) if pattern_of else _bracketed(text)  # noqa: E731
    sampling = SamplingParams(
        max_tokens=LONGEST,
        temperature=draw.choice((0.0, 0.7, 1.0, 1.3)),
        top_p=draw.choice((1.0, 0.9)),
        top_k=draw.choice((0, 0, 40)),
        seed=draw.getrandbits(63),
        repetition_penalty=draw.choice((1.0, 1.0, 1.2)),
        logit_bias=draw.choice(({}, {}, {4: 3.0, 9: -50.0})),
        logprobs=draw.choice((None, None, 2)),
        ignore_eos=draw.random() < 0.2,
        structure=structure,
    )
    return StructuredRequest(f"{kind}-{number}", f"{draw.choice(NAMES)} {number}: ", sampling, matches)


def random_schema(draw: random.Random, depth: int) -> dict[str, Any]:
    """A JSON schema that something of limited length matches."""
    kinds = ["integer", "boolean", "string", "pattern", "enum", "const", "date"]
    match draw.choice(kinds + ["object", "object", "array", "anyOf"] * 2 if depth else kinds):
        case "integer":
            least = draw.randint(-2000, 2000)
            return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 5000)}
        case "boolean":
            return {"type": draw.choice(["boolean", ["boolean", "null"]])}
        case "string":
            least = draw.randint(0, 4)
            return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 12)}
        case "pattern":
            return {"type": "string", "pattern": draw.choice(["^[A-Z]{2,5}-[0-9]{1,4}$", "^(left|right)( turn)?$"])}
        case "enum":
            return {"enum": draw.sample(["red", "green", 3, None, 2.5, ["a", 1], {"k": False}], draw.randint(1, 4))}
        case "const":
            return {"const": draw.choice(["fixed", 17, {"a": [1, 2]}])}
        case "date":
            return {"type": "string", "format": draw.choice(["date", "uuid", "ipv4"])}
        case "array":
            least = draw.randint(0, 2)
            items = random_schema(draw, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + draw.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    names = draw.sample(NAMES, draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(draw, depth - 1) for name in names},
        "required": draw.sample(names, draw.randint(0, len(names))),
        "additionalProperties": False,
    }


def valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON that the schema describes, as ``jsonschema`` sees it."""
    import jsonschema

    try:
        jsonschema.validate(
            json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=jsonschema.FormatChecker()
        )
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _whole(pattern: str, text: str) -> bool:
    classes = {r"\p{Lu}": "(?:(?=\\w)[^\\W\\d_])", r"\p{Ll}": "(?:(?=\\w)[^\\W\\d_])"}  # re has no such classes
    for ours, theirs in classes.items():
        pattern = pattern.replace(ours, theirs)
    return re.fullmatch(pattern, text) is not None


def _bracketed(text: str) -> bool:
    while text.startswith("("):
        if not text.endswith(")"):
            return False
        text = text[1:-1]
    return re.fullmatch("[xyz]{1,3}", text) is not None
