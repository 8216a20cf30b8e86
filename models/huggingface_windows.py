"""Reads which layers have a sliding window off Hugging Face's ``layer_types``."""

from __future__ import annotations

from collections.abc import Sequence

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(layer_types: Sequence[str], layers: int, window: int | None) -> list[int | None]:
    """The window of every layer, None where it sees all positions.

    Args:
      layer_types: of all layers.
      layers: how many there are.
      window: of those that have one, in positions.

    Raises:
      ValueError: the types are not one for each layer, or of other kinds; or there is no window.
    """
    if unknown := sorted(set(layer_types) - {FULL, SLIDING}):
        raise ValueError(f"layer_types {', '.join(unknown)} are not supported, only {FULL} and {SLIDING}")
    if len(layer_types) != layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for {layers} layers")
    if SLIDING in layer_types and window is None:
        raise ValueError(f"layer_types {SLIDING} needs a sliding_window that is used")
    return [window if kind == SLIDING else None for kind in layer_types]
