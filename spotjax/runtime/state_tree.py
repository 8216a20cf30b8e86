"""Makes the generation state a jax pytree, so that whatever handles pytrees (Orbax, ``jax.tree``) handles requests too.

Token ids, counters and numbers are leaves; names, texts and the reason to end are structure. Importing this module
registers the classes; the engine itself knows nothing of jax.
"""

from __future__ import annotations

import dataclasses

import jax

from spotjax.engine.request import RequestState, SamplingParams

STATE_STRUCTURE = ("request_id", "end_tokens", "text", "pending", "finish")
"""Fields of ``RequestState`` that are structure; all others are leaves or trees of leaves."""
SAMPLING_STRUCTURE = ("stop", "ignore_eos")
"""The same for ``SamplingParams``."""


def _register(kind: type, structure: tuple[str, ...]) -> None:
    leaves = [field.name for field in dataclasses.fields(kind) if field.name not in structure]
    jax.tree_util.register_dataclass(kind, data_fields=leaves, meta_fields=list(structure))


_register(RequestState, STATE_STRUCTURE)
_register(SamplingParams, SAMPLING_STRUCTURE)
