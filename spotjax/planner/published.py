"""SpotServe's published tables: read, used as latencies for our planning, and under the original's own rules.

The original (Miao et al. 2024; its artifact's ``solver.py``) predicts the time of a whole static batch and chooses the
mesh by it; ``request_seconds`` and ``choose_as_original`` are that, formula by formula, to compare with. Its oddity, a
prefill communication divided by the number of micro-batches, is kept there and left out of ``PublishedProfile``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

import numpy as np

from spotjax.errors import ConfigError
from spotjax.meshes.shape import MeshShape
from spotjax.planner.latency import Stage, Work
from spotjax.planner.published_tables import Table

PROMPT = 512
"""Tokens of the prompts that the tables were measured with."""
BATCHES = (1, 2, 4, 8)


def read_table(text: str) -> Table:
    """Reads a profile of the artifact's JSON format.

    Raises:
      ConfigError: it is not one; the message says what is missing.
    """
    try:
        content: dict[str, Any] = json.loads(text)
        degrees = sorted(int(key[3:]) for key in content if key.startswith("tp-"))
        cells = {
            m: tuple((cell["init"], cell["incr"]) for b in BATCHES for cell in [content[f"tp-{m}"][f"bsz-{b}"]])
            for m in degrees
        }
        return Table(
            layers=content["layer_num"],
            padded_layers=content["padded_layer_num"],
            hidden_size=content["hidden_size"],
            max_tensor=content.get("max_tp", max(degrees)),
            prefill_hop=content["pp_init_comm"],
            decode_hop=content["pp_incr_comm"],
            embed=tuple(content["embed"]),
            final_factor=content["final_fix_factor"],
            cells=cells,
        )
    except (ValueError, KeyError, TypeError) as problem:
        raise ConfigError(f"not a profile in the format of SpotServe's artifact: {problem!r}") from problem


@dataclass(frozen=True, eq=False)
class PublishedProfile:
    """The tables as latencies of single stages. A ``LatencyModel``.

    Times are interpolated between batches of 1, 2, 4 and 8, and grow beyond 8 as between 4 and 8; prompts take time in
    proportion to their tokens. Tensor degrees that were not measured are not offered.
    """

    table: Table

    def stage_seconds(self, stage: Stage, tensor: int, work: Work) -> float:
        """One call of one stage."""
        table = self.table
        if tensor not in table.cells:
            return inf
        prefill = work.tokens > work.sequences
        cells = [cell[0] if prefill else cell[1] for cell in table.cells[tensor]]
        layer = _interpolate(work.sequences, cells) * (work.tokens / work.sequences / PROMPT if prefill else 1)
        # As in the original, embedding and logits are charged once for a request: with its prompt.
        ends = (stage.first + stage.last) * _interpolate(work.sequences, table.embed) if prefill else 0.0
        return (stage.layers * layer + ends) * table.final_factor / 1000

    def hop_seconds(self, tokens: int) -> float:
        """A prompt's hidden vectors take the prefill time in proportion, a few tokens the decode time."""
        prefill = self.table.prefill_hop * tokens / PROMPT
        return max(self.table.decode_hop, prefill) * self.table.final_factor / 1000


def _interpolate(batch: int, values: tuple[float, ...] | list[float]) -> float:
    if batch > BATCHES[-1]:
        return values[-1] + (batch - BATCHES[-1]) * max(0.0, values[-1] - values[-2]) / (BATCHES[-1] - BATCHES[-2])
    return float(np.interp(batch, BATCHES, values))


@dataclass(frozen=True, slots=True)
class OriginalChoice:
    """What the original would run.

    Attributes:
      shape: degrees (D, P, M).
      batch: B, sequences of a replica's static batch.
      requests_per_second: phi.
      seconds: l_exe of a batch.
      feasible: phi reaches what is required.
      micro_batches: (M1, M2), micro-batches of prompts and of decode steps.
    """

    shape: MeshShape
    batch: int
    requests_per_second: float
    seconds: float
    feasible: bool
    micro_batches: tuple[int, int]


def request_seconds(table: Table, stages: int, tensor: int, batch: int = 1, output: int = 128) -> float:
    """The original's l_exe: seconds of one static batch, with the best numbers of micro-batches."""
    return min(
        _seconds(table, stages, tensor, batch, m1, m2, output)
        for m1 in powers_of_two(batch)
        for m2 in powers_of_two(batch)
    )


def choose_as_original(
    table: Table, devices: int, required: float, least_devices: int, most_batch: int = 4, output: int = 128
) -> OriginalChoice:
    """The shape and batch that the original's rule takes on so many devices.

    Least l_exe among those that reach ``required`` requests per second, first in the order of its loops; else the most
    throughput. Tensor degrees are powers of two, also across instances; P must divide the padded layers.

    Raises:
      ValueError: fewer devices than one replica takes.
    """
    choices = list(_choices(table, devices, least_devices, most_batch, output, required))
    if not choices:
        raise ValueError(f"one replica takes at least {least_devices} devices, got {devices}")
    feasible = [choice for choice in choices if choice.feasible]
    if feasible:
        return min(feasible, key=lambda choice: choice.seconds)
    return max(choices, key=lambda choice: choice.requests_per_second)


def _choices(
    table: Table, devices: int, least_devices: int, most_batch: int, output: int, required: float
) -> Iterator[OriginalChoice]:
    """All that it looks at, in its order."""
    for tensor in powers_of_two(table.max_tensor):
        for batch in powers_of_two(most_batch):
            for m1 in powers_of_two(batch):
                for m2 in powers_of_two(batch):
                    for stages in range(ceil(least_devices / tensor), devices // tensor + 1):
                        if table.padded_layers % stages == 0:
                            seconds = _seconds(table, stages, tensor, batch, m1, m2, output)
                            data = devices // (stages * tensor)
                            rate = data * batch / seconds
                            shape = MeshShape(data, stages, tensor)
                            yield OriginalChoice(shape, batch, rate, seconds, rate >= required, (m1, m2))


def published_phases(table: Table, stages: int, tensor: int, batch: int, m1: int, m2: int) -> tuple[float, float]:
    """The original's seconds of a static batch: (until its first tokens, embedding included; one decode step)."""
    layers = ceil(table.layers / stages)
    cells = table.cells[tensor]
    prefill = cells[_log2(batch // m1)][0] * layers * (stages + m1 - 1) / m1 + table.prefill_hop * (stages - 1) / m1
    decode = cells[_log2(batch // m2)][1] * layers * (stages + m2 - 1) + table.decode_hop * (stages - 1) / m2
    factor = table.final_factor / 1000
    return (prefill + 2 * table.embed[_log2(batch)]) * factor, decode * factor


def _seconds(table: Table, stages: int, tensor: int, batch: int, m1: int, m2: int, output: int) -> float:
    prefill, decode = published_phases(table, stages, tensor, batch, m1, m2)
    return prefill + output * decode


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4 and so on up to a limit."""
    return [1 << exponent for exponent in range(_log2(limit) + 1)]


def _log2(value: int) -> int:
    return value.bit_length() - 1
