"""Finds what a client sent that this version does not know. protobuf keeps such fields silently; we refuse them."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from spotjax.errors import InvalidRequest


def refuse_unknown_fields(message: Message) -> None:
    """Checks a message and all messages in it.

    Raises:
      InvalidRequest: a field number is not defined; names it and the message that holds it.
    """
    for path in unknown_fields(message):
        raise InvalidRequest(path, "unknown field; this server does not support it, leave it out")


def unknown_fields(message: Message, path: str = "") -> Iterator[str]:
    """Path of every undefined field, such as ``sampling.99``. Map entries count as fields of their message."""
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        yield f"{path}{unknown[index].field_number}"
    for field, value in message.ListFields():
        if isinstance(value, Message):
            yield from unknown_fields(value, f"{path}{field.name}.")
        elif field.message_type is not None:
            for index, part in enumerate(value):
                if isinstance(part, Message):  # the keys of a map are not
                    yield from unknown_fields(part, f"{path}{field.name}[{index}].")
