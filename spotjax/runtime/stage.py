"""One pipeline stage of one replica: its parameters and KV pages on its devices, and how a step runs through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from spotjax.meshes.sharding import joined, own, own_part, place, replicated, stage_mesh
from spotjax.meshes.slices import Range
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices
from spotjax.runtime.kv import DevicePages, StepInput


class Stage:
    """Runs decoder layers ``layers`` on M devices; the first stage also embeds, the last computes logits.

    Args:
      model: compiled functions.
      devices: M devices in tensor order.
      layers: half-open range of decoder layers.
      first, last: place in the pipeline.
      parameters: every array that the stage needs, on its devices.

    Where the devices are those of several processes, all of them have the stage and must make the same calls of ``run``
    in the same order.

    Attributes:
      own, own_mesh: this process's devices, all of them unless it is a host of a TPU slice.
      pages: KV pages of every layer in the range; whoever builds the stage puts them in before the first step.
    """

    def __init__(
        self,
        model: CompiledModel,
        devices: Devices,
        layers: Range,
        *,
        first: bool,
        last: bool,
        parameters: Mapping[str, jax.Array],
    ) -> None:
        self.devices, self.layers, self.first, self.last = devices, layers, first, last
        self.own = own(devices)
        self.own_mesh = stage_mesh(self.own)
        self.mesh = stage_mesh(devices)
        self.pages: dict[int, DevicePages] = {}
        self._model = model
        self._parameters = parameters
        self._replicated = replicated(self.mesh)
        self._kinds = model.spec.layer_kinds[slice(*layers)]
        self._layers = tuple(
            {name: parameters[f"layers.{layer}.{name}"] for name in model.spec.layer_arrays} for layer in range(*layers)
        )
        self._inputs = {name: parameters[name] for name in model.spec.inputs} if first else {}
        self._outputs = {name: parameters[name] for name in model.spec.outputs} if last else {}

    def empty_pages(self) -> DevicePages:
        """Fresh KV pages for one layer."""
        return tuple(joined(part, self.devices) for part in self._model.empty_pages(self.devices)())

    def own_pages(self, layer: int) -> DevicePages:
        """The part of a layer's KV pages that is on this process's devices."""
        return tuple(map(own_part, self.pages[layer]))

    def put_pages(self, layer: int, part: Sequence[jax.Array]) -> None:
        """Replaces that part."""
        self.pages[layer] = tuple(joined(array, self.devices) for array in part)

    def arrays(self) -> Iterator[jax.Array]:
        """Everything that the stage holds on its devices."""
        yield from self._parameters.values()
        for pages in list(self.pages.values()):
            yield from pages

    def has_block(self, shape: StepShape) -> bool:
        """Whether all layers are compiled as one executable for this shape; asks for it if not."""
        if self._model.block(self.devices, shape, self._kinds) is not None:
            return True
        self._model.request_block(self.devices, shape, self._kinds)
        return False

    def run(
        self,
        shape: StepShape,
        rows: np.ndarray | jax.Array,
        pages: np.ndarray,
        hidden: jax.Array | np.ndarray | None,
    ) -> jax.Array:
        """Dispatches one step; returns at once with arrays that are still being computed.

        Args:
          shape: padded extents of the step.
          rows, pages: as in ``kv.StepInput``; at the first stage the rows may be on the first of its own devices.
          hidden: (B, T, D) from the stage before; None at the first.

        Returns: hidden vectors (B, T, D), or logits (B, V) from the last stage.
        """
        with self._model.calls(self.devices):
            return self._run(shape, self._step_input(rows, pages), hidden)

    def _step_input(self, rows: np.ndarray | jax.Array, pages: np.ndarray) -> StepInput:
        if len(self.own) == len(self.devices):
            return StepInput(*jax.device_put((rows, pages), self._replicated))
        return StepInput(place(rows, self._replicated), place(pages, self._replicated))

    def _run(self, shape: StepShape, step: StepInput, hidden: jax.Array | np.ndarray | None) -> jax.Array:
        if self.first:
            begun = self._model.embed(self.devices, shape.rows, shape.span)(self._inputs, step.rows)
        else:
            assert hidden is not None, "only the first stage begins without"
            begun = self._take_over(hidden)
        out: jax.Array = self._run_layers(shape, begun, step)
        if not self.last:
            return out
        compute_logits = self._model.logits(self.devices, shape.rows, shape.span)
        logits: jax.Array = compute_logits(self._outputs, out, step.rows)
        return logits

    def _take_over(self, hidden: jax.Array | np.ndarray) -> jax.Array:
        if len(self.own) < len(self.devices):
            return place(np.asarray(hidden), self._replicated)
        placed: jax.Array = jax.device_put(hidden, self._replicated)
        return placed

    def _run_layers(self, shape: StepShape, hidden: Any, step: StepInput) -> Any:
        """All layers in one executable where that is compiled for this shape, else one after another."""
        order = range(*self.layers)
        block = self._model.block(self.devices, shape, self._kinds)
        if block is not None:
            hidden, extended = block(self._layers, tuple(self.pages[layer] for layer in order), hidden, step)
            self.pages.update(zip(order, extended, strict=True))
            return hidden
        run = {kind: self._model.layer(self.devices, shape, kind) for kind in set(self._kinds)}
        for layer, kind, arrays in zip(order, self._kinds, self._layers, strict=True):
            hidden, (self.pages[layer],) = run[kind]((arrays,), (self.pages[layer],), hidden, step)
        return hidden
