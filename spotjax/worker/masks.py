"""Masks on their way to the last stage: they come beside the step that they are for, and the step waits for them.

What waits and never gets any must not stand in the way of what comes after it, so there is an end to waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from spotjax.engine.structure import Masks


class StepMasks:
    """Masks by pipeline and step. From any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._masks: dict[tuple[str, int], Masks] = {}
        self._open: frozenset[str] = frozenset()

    def open(self, pipelines: Iterable[str]) -> None:
        """Steps of these pipelines wait for their masks from now on; those of others do not, nor any longer."""
        with self._changed:
            self._open = frozenset(pipelines)
            self._masks = {key: masks for key, masks in self._masks.items() if key[0] in self._open}
            self._changed.notify_all()

    def put(self, pipeline: str, step: int, masks: Masks) -> None:
        """Masks have come; those that no step can wait for are dropped."""
        with self._changed:
            if pipeline in self._open:
                self._masks[pipeline, step] = masks
                self._changed.notify_all()

    def take(self, pipeline: str, step: int) -> Masks | None:
        """Waits for the masks of a step; None where nobody has a use any more for what it draws."""
        key = pipeline, step
        with self._changed:
            self._changed.wait_for(lambda: key in self._masks or pipeline not in self._open)
            return self._masks.pop(key, None)
