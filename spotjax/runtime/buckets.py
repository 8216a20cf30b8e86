"""Which padded shapes steps run at. A few fixed shapes keep the number of compilations small. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class StepShape(NamedTuple):
    """Padded extents of one step: rows, positions per row, KV pages per row."""

    rows: int
    span: int
    pages: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes that a model is served at.

    Attributes:
      max_batch: most sequences in one decode step.
      prefill_tokens: most padded positions of one prefill step.
      page_size: positions per KV page.
      max_positions: longest sequence.
    """

    max_batch: int
    prefill_tokens: int
    page_size: int
    max_positions: int

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """Row counts of decode steps; 2 is left out since XLA's CPU backend takes as long for it as for 4."""
        return (*(rows for rows in (1, 4, 8, 16, 32, 64, 128) if rows < self.max_batch), self.max_batch)

    @property
    def prefill_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, span) of prefill steps, shortest span first; many short prompts share one step.

        Spans double: CPUs take as long for padding as for a prompt, so less than half of a row may be padding.
        """
        shapes: list[tuple[int, int]] = []
        span = min(16, self.prefill_tokens)
        while span < self.prefill_tokens:
            shared = min(self.prefill_tokens // span, 8)
            shapes += [(1, span)] + ([(shared, span)] if shared > 1 else [])
            span *= 2
        return (*shapes, (1, self.prefill_tokens))

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_positions // self.page_size)

    def contexts(self, fine: bool) -> tuple[int, ...]:
        """Context lengths in pages: doubling (compiled at boot), or in smaller steps (compiled when used)."""
        sizes: list[int] = []
        positions = 128
        while positions < self.max_positions:
            sizes += [positions, positions * 3 // 2] if fine else [positions]
            positions *= 2
        pages = sorted({-(-size // self.page_size) for size in sizes if size < self.max_positions})
        return (*pages, self.max_pages)

    def shape(self, rows: int, span: int, pages: int, fine: bool = False) -> StepShape:
        """The smallest shape that holds a step.

        Raises:
          ValueError: no shape is large enough; the scheduler never asks for that.
        """
        fitting = [n for n in self.contexts(fine) if n >= pages]
        if span == 1:
            candidates = [(r, 1) for r in self.decode_rows if r >= rows]
        else:
            candidates = [(r, t) for r, t in self.prefill_shapes if r >= rows and t >= span]
        if not candidates or not fitting:
            raise ValueError(f"no step shape holds {rows} rows of {span} positions with {pages} pages each")
        rows, span = min(candidates, key=lambda shape: shape[0] * shape[1])
        return StepShape(rows, span, fitting[0])

    def all_shapes(self) -> tuple[StepShape, ...]:
        """Every shape compiled at boot."""
        steps = [(rows, 1) for rows in self.decode_rows] + list(self.prefill_shapes)
        return tuple(StepShape(rows, span, pages) for rows, span in steps for pages in self.contexts(fine=False))

    def prefill_fits(self, lengths: list[int]) -> bool:
        """Whether spans of these lengths can share one prefill step."""
        return any(rows >= len(lengths) and span >= max(lengths) for rows, span in self.prefill_shapes)
