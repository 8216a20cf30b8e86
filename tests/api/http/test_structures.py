"""What output must match is asked for over HTTP as other servers' clients do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from http_cases import Web, chat_body, error_of

from spotjax.api.http.structures import StructuredOutputs, structure_of
from spotjax.engine.structure import Structure, StructureKind

SCHEMA = {"type": "object", "properties": {"b": {"enum": ["caf\u00e9"]}, "a": {}}}
NAMED = {"name": "person", "schema": SCHEMA}


def asked(web: Web) -> Structure | None:
    """The structure of the request that was sent last."""
    return list(web.service.requests.values())[-1].request.sampling.structure


@pytest.mark.parametrize("more", [{}, {"strict": True}, {"strict": False, "description": "someone"}])
async def test_a_chats_response_format_is_the_structure_of_its_output(open_web: Web, more: dict[str, object]) -> None:
    format_ = {"type": "json_schema", "json_schema": {**NAMED, **more}}
    assert (await open_web.chat(response_format=format_, max_tokens=1)).status_code == 200
    found = asked(open_web)
    assert found is not None and found.kind is StructureKind.JSON_SCHEMA
    assert json.loads(found.text) == SCHEMA and found.text.index('"b"') < found.text.index('"a"'), "in its own order"
    assert (await open_web.chat(response_format={"type": "json_object"}, max_tokens=1)).status_code == 200
    assert asked(open_web) == Structure(StructureKind.JSON_OBJECT)
    assert (await open_web.chat(response_format={"type": "text"}, max_tokens=1)).status_code == 200
    assert asked(open_web) is None


@pytest.mark.parametrize(
    ("outputs", "structure"),
    [
        ({"json": {"type": "null"}}, Structure(StructureKind.JSON_SCHEMA, '{"type":"null"}')),
        ({"json": '{"type": "null"}'}, Structure(StructureKind.JSON_SCHEMA, '{"type": "null"}')),
        ({"json_object": True}, Structure(StructureKind.JSON_OBJECT)),
        ({"regex": "a+"}, Structure(StructureKind.REGEX, "a+")),
        ({"grammar": 'start: "x"'}, Structure(StructureKind.GRAMMAR, 'start: "x"')),
        ({"choice": ["yes", "no"]}, Structure(StructureKind.REGEX, "yes|no")),
    ],
)
async def test_vllms_structured_outputs_are_taken_by_both_endpoints(
    open_web: Web, outputs: dict[str, object], structure: Structure
) -> None:
    for send in (open_web.complete, open_web.chat):
        response = await send(structured_outputs=outputs, max_tokens=1)
        assert response.status_code == 200, response.text
        assert asked(open_web) == structure


def test_choices_are_texts_and_no_patterns() -> None:
    choices = ["a.b", "(x|y)*", "\\d", "it's 5 \u2603?", "a-b [c]"]
    asked_for = structure_of(None, StructuredOutputs(choice=choices))
    assert asked_for is not None
    ours = re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: re.escape(chr(int(found[1], 16))), asked_for.regex)
    assert [text for text in [*choices, "axb", "x", "5", "a"] if re.fullmatch(ours, text)] == choices


REFUSED = [
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "no"}}},
     "response_format.json_schema.schema"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["no"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "no"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "no"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": "no"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}, "response_format"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), REFUSED, ids=[f"{n}-{field}" for n, (_, field) in enumerate(REFUSED)])
async def test_what_cannot_be_asked_for_is_refused_by_name(open_web: Web, body: dict[str, Any], field: str) -> None:
    response = await open_web.client.post("/v1/chat/completions", json=chat_body(**body))
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == field, error_of(response)
    assert not open_web.service.requests
