"""Measured latencies: what ``spotjax profile`` records, kept as JSON, and a model fitted to it. Measures nothing.

A call of a stage takes a fixed time, a time per layer, and times in proportion to what it computes and reads; the
coefficients are fitted with non-negative least squares (Lawson and Hanson 1974) to relative errors, for prompts and for
decode steps apart, since kernels differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import inf
from statistics import median

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import ConfigError
from spotjax.planner.latency import Stage, Work

FORMAT = 1
"""Version of the file."""

Coefficients = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured call of a stage.

    Attributes:
      stage, tensor, work: what ran.
      seconds: shortest of several calls.
    """

    stage: Stage
    tensor: int
    work: Work
    seconds: float

    @property
    def is_prefill(self) -> bool:
        """Whether it computed prompts."""
        return self.work.tokens > self.work.sequences


def _features(stage: Stage, work: Work) -> list[float]:
    """What a call's time is a sum of: the call, its layers, their tokens and attention; logits of the last stage."""
    layers = stage.layers
    return [
        1.0,
        layers,
        layers * work.tokens,
        layers * work.pairs,
        float(stage.last),
        stage.last * work.sequences,
    ]


@dataclass(frozen=True)
class MeasuredProfile:
    """Samples of one model on one kind of hardware, and latencies fitted to them. A ``LatencyModel``.

    Attributes:
      model: name of what was measured.
      hardware: what it was measured on.
      samples: at least one prompt and one decode step for each tensor degree.
      hop_latency: seconds of a hop between stages without its bytes.
      hop_bandwidth: bytes per second of a hop.
      token_bytes: bytes of one hidden vector.
    """

    model: str
    hardware: str
    samples: tuple[Sample, ...]
    hop_latency: float
    hop_bandwidth: float
    token_bytes: int

    @cached_property
    def _coefficients(self) -> Mapping[tuple[int, bool], Coefficients]:
        kinds = sorted({(sample.tensor, sample.is_prefill) for sample in self.samples})
        return {kind: _fit([s for s in self.samples if (s.tensor, s.is_prefill) == kind]) for kind in kinds}

    def stage_seconds(self, stage: Stage, tensor: int, work: Work) -> float:
        """One call of one stage; infinite for tensor degrees that were not measured."""
        coefficients = self._coefficients.get((tensor, work.tokens > work.sequences))
        return inf if coefficients is None else float(np.dot(_features(stage, work), coefficients))

    def hop_seconds(self, tokens: int) -> float:
        """Hidden vectors from one stage to the next."""
        return self.hop_latency + tokens * self.token_bytes / self.hop_bandwidth

    def errors(self, samples: Iterable[Sample]) -> list[float]:
        """Relative errors of the predictions for samples, which may be others than those fitted to."""
        return [self.stage_seconds(s.stage, s.tensor, s.work) / s.seconds - 1 for s in samples]

    def held_out_error(self) -> float:
        """Median relative error for each sample when it is left out of the fit."""
        errors: list[float] = []
        for left_out in self.samples:
            others = tuple(sample for sample in self.samples if sample is not left_out)
            if any((s.tensor, s.is_prefill) == (left_out.tensor, left_out.is_prefill) for s in others):
                profile = MeasuredProfile(
                    self.model, self.hardware, others, self.hop_latency, self.hop_bandwidth, self.token_bytes
                )
                errors += map(abs, profile.errors([left_out]))
        return median(errors) if errors else inf

    def to_json(self) -> str:
        """What ``from_json`` reads."""
        samples = [
            {
                "stage": sample.stage._asdict(),
                "tensor": sample.tensor,
                "work": sample.work._asdict(),
                "seconds": sample.seconds,
            }
            for sample in self.samples
        ]
        plain = {name: value for name, value in asdict(self).items() if name != "samples"}
        return json.dumps({"format": FORMAT, **plain, "samples": samples}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> MeasuredProfile:
        """Reads a recorded profile.

        Raises:
          ConfigError: it is not one, or of a version that this one does not read.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ConfigError(f"the profile has format {content['format']}, this version reads {FORMAT}")
            samples = tuple(
                Sample(Stage(**entry["stage"]), entry["tensor"], Work(**entry["work"]), entry["seconds"])
                for entry in content["samples"]
            )
            rest = {name: value for name, value in content.items() if name not in ("format", "samples")}
            return cls(samples=samples, **rest)
        except (ValueError, KeyError, TypeError) as problem:
            raise ConfigError(f"not a recorded profile: {problem!r}; record one with spotjax profile") from problem


def _fit(samples: Sequence[Sample]) -> Coefficients:
    from scipy.optimize import nnls  # a third of a second that processes without a profile do without

    seconds = np.array([sample.seconds for sample in samples])
    features = np.array([_features(sample.stage, sample.work) for sample in samples])
    scale = np.maximum(features.max(axis=0), 1e-30)
    coefficients: Coefficients = nnls(features / scale / seconds[:, None], np.ones(len(samples)))[0] / scale
    return coefficients
