"""What the service is asked to carry, as far as planning depends on it. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demand:
    """Load that a mesh is chosen for.

    Attributes:
      batch: B, sequences that one replica decodes at once.
      prompt: tokens of a typical prompt.
      output: new tokens of a typical request.
      page_size: token positions in one KV page.
      kv_pages: KV pages of one replica; None takes what ``batch`` typical requests fill.
      step_tokens: token positions that one step computes at most (prefill chunk).

    Raises:
      ValueError: a number is below 1.
    """

    batch: int = 8
    prompt: int = 512
    output: int = 128
    page_size: int = 16
    kv_pages: int | None = None
    step_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "output", "page_size", "kv_pages", "step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def context(self) -> int:
        """Positions that a typical sequence attends to, averaged over its decode steps."""
        return self.prompt + self.output // 2

    @property
    def pages(self) -> int:
        """KV pages of one replica."""
        if self.kv_pages is not None:
            return self.kv_pages
        return self.batch * -(-(self.prompt + self.output) // self.page_size)
