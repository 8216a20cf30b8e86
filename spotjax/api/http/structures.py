"""What the output must match, in OpenAI's dialect (``response_format``) and in vLLM's (``structured_outputs``)."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from spotjax.api.proto.spotjax.v1 import generation_pb2 as pb
from spotjax.errors import InvalidRequest

MAX_CHOICES = 1000


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Anything."""


class JsonObject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON schema. Output is always held to it, so ``strict`` changes nothing; nor do name and description."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that a schema describes."""

    json_schema: NamedSchema


ResponseFormat = Text | JsonObject | JsonSchema


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def structure_of(response_format: ResponseFormat | None, outputs: StructuredOutputs | None) -> pb.Structure | None:
    """What a body says about it.

    Raises:
      InvalidRequest: it says two things, or something that cannot be.
    """
    if outputs is None:
        return _of_format(response_format)
    if response_format is not None:
        raise InvalidRequest("response_format", "has no meaning beside structured_outputs; give one of them")
    given = {name: value for name in outputs.__struct_fields__ if (value := getattr(outputs, name)) is not None}
    if len(given) != 1:
        kinds = ", ".join(outputs.__struct_fields__)
        raise InvalidRequest("structured_outputs", f"exactly one of {kinds}, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if name == "json":
        return pb.Structure(json_schema=value if isinstance(value, str) else msgspec.json.encode(value).decode())
    return pb.Structure(regex=_one_of(value)) if name == "choice" else pb.Structure(**{name: value})


def structure_names(outputs: StructuredOutputs | None) -> dict[str, str]:
    """What fields of the message ``Structure`` are called in a body, most special first."""
    if outputs is None:
        whole = "response_format"
        return {"sampling.structure.json_schema": f"{whole}.json_schema.schema", "sampling.structure": whole}
    names = {"json_schema": "json", "regex": "choice" if outputs.regex is None else "regex"}
    special = {f"sampling.structure.{ours}": f"structured_outputs.{theirs}" for ours, theirs in names.items()}
    return special | {"sampling.structure": "structured_outputs"}


def _of_format(given: ResponseFormat | None) -> pb.Structure | None:
    match given:
        case JsonObject():
            return pb.Structure(json_object=True)
        case JsonSchema():
            return pb.Structure(json_schema=msgspec.json.encode(given.json_schema.schema).decode())
    return None


def _one_of(choices: list[str]) -> str:
    """A regular expression for one of some texts."""
    if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
        raise InvalidRequest("structured_outputs.choice", f"must be 1 to {MAX_CHOICES} texts, none empty")
    return "|".join(re.sub(r"[^\w\s]", lambda found: rf"\x{{{ord(found[0]):x}}}", choice) for choice in choices)
