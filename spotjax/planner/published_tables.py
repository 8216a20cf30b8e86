"""Per-layer times that SpotServe's authors measured on g4dn.12xlarge (4 x T4), float32: data only.

Source: artifact of Miao et al., ASPLOS 2024 (Apache-2.0), branch ``artifact``, profiles ``T4-4x/megatron_6.7B``,
``megatron_h6144`` and ``megatron_h7168``. Rows are tensor degrees; each cell is milliseconds of one decoder layer for
(a prompt of 512 tokens, one decode step), for 1, 2, 4 and 8 sequences.
"""

from __future__ import annotations

from typing import NamedTuple

Cell = tuple[float, float]


class Table(NamedTuple):
    """One model.

    Attributes:
      layers, padded_layers: decoder layers, and the number that stages must divide in the original.
      hidden_size: width.
      max_tensor: highest tensor degree that the original uses.
      prefill_hop, decode_hop: milliseconds between two stages.
      embed: milliseconds of embedding or logits for 1, 2, 4 and 8 sequences.
      final_factor: factor on everything that makes the model fit whole requests.
      cells: by tensor degree, for 1, 2, 4 and 8 sequences.
    """

    layers: int
    padded_layers: int
    hidden_size: int
    max_tensor: int
    prefill_hop: float
    decode_hop: float
    embed: tuple[float, ...]
    final_factor: float
    cells: dict[int, tuple[Cell, ...]]


TABLES = {
    "opt-6.7b": Table(
        32, 36, 4096, 16, 5.3, 0.07, (0.298, 0.372, 0.461, 0.719), 1.1,
        {
            1: ((44.087, 3.224), (97.182, 3.31), (191.815, 3.632), (404.76, 4.435)),
            2: ((26.411, 1.841), (50.779, 1.701), (105.607, 1.898), (218.979, 2.26)),
            4: ((19.567, 1.056), (31.043, 0.932), (61.566, 1.021), (124.341, 1.314)),
            8: ((17.733, 1.278), (26.569, 1.05), (44.562, 1.309), (85.833, 1.442)),
            16: ((14.31, 1.437), (24.214, 1.568), (35.517, 1.695), (69.537, 1.867)),
        },
    ),
    "gpt-20b": Table(
        44, 48, 6144, 8, 7.0, 0.1, (0.318, 0.471, 0.607, 1.079), 1.1,
        {
            1: ((107.203, 7.144), (224.025, 7.259), (454.014, 7.949), (912.695, 9.919)),
            2: ((54.478, 3.808), (115.698, 3.759), (244.748, 4.076), (509.399, 4.702)),
            4: ((37.562, 1.968), (64.61, 1.938), (132.855, 2.13), (275.512, 2.484)),
            8: ((32.2, 1.758), (42.778, 1.764), (80.624, 1.932), (165.775, 2.149)),
            16: ((22.921, 1.893), (38.432, 1.758), (61.086, 2.163), (118.336, 2.444)),
        },
    ),
    "llama-30b": Table(
        48, 48, 7168, 8, 8.0, 0.15, (0.404, 0.519, 0.797, 1.448), 1.1,
        {
            1: ((160.742, 9.541), (347.878, 10.286), (823.624, 10.838), (1326.51, 11.402)),
            2: ((84.197, 4.98), (173.763, 5.235), (362.301, 5.657), (798.263, 5.91)),
            4: ((66.079, 2.618), (93.799, 2.632), (191.445, 2.837), (422.916, 3.172)),
            8: ((41.947, 2.263), (67.061, 2.493), (109.761, 2.418), (232.918, 2.618)),
        },
    ),
}  # fmt: skip
