"""Makes ready all that stages on given devices can be asked to run, so that nothing compiles on a request's path.

Only whole stages are fused later, in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from spotjax.meshes.sharding import own
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.controls import Variant
from spotjax.runtime.executables import Devices
from spotjax.runtime.sampling import drawn_width

Step = tuple[StepShape, Variant, bool]
"""What a step runs: its padded shape, how tokens are drawn, and whether some rows have masks."""
Progress = Callable[[int, int], None]
"""Told (done, total)."""


def warm(
    model: CompiledModel,
    buckets: Buckets,
    groups: Sequence[Devices],
    threads: int = 2,
    progress: Progress | None = None,
) -> None:
    """Makes every function ready on every device group; compiles each once per group size, the rest is loaded."""
    work = [call for devices in groups for call in _calls(model, buckets, devices)]
    with ThreadPoolExecutor(threads, thread_name_prefix="warm") as pool:
        for done, _ in enumerate(pool.map(lambda call: call(), work), start=1):
            if progress is not None:
                progress(done, len(work))


def load(model: CompiledModel, groups: Sequence[Devices], steps: Iterable[Step]) -> None:
    """Makes what these steps run ready on the device groups, so that no step has to wait for it there."""
    for shape, variant, masked in dict.fromkeys(steps):
        for devices in groups:
            model.embed(devices, shape.rows, shape.span)
            for kind in range(len(model.spec.kinds)):
                model.layer(devices, shape, kind)
            model.logits(devices, shape.rows, shape.span)
            model.sample(own(devices)[0], variant, shape.rows)
            if masked:
                model.restrict(own(devices)[0], shape.rows)
                model.with_logprobs(own(devices)[0], shape.rows)
            if shape.span == 1:
                model.fill_in(own(devices)[0], shape.rows, drawn_width(shape.rows))


def _calls(model: CompiledModel, buckets: Buckets, devices: Devices) -> Iterator[Callable[[], object]]:
    steps = [(rows, 1) for rows in buckets.decode_rows] + list(buckets.prefill_shapes)
    for rows, span in steps:
        yield lambda rows=rows, span=span: model.embed(devices, rows, span)  # type: ignore[misc]
        yield lambda rows=rows, span=span: model.logits(devices, rows, span)  # type: ignore[misc]
    for shape in buckets.all_shapes():
        for kind in range(len(model.spec.kinds)):
            yield lambda shape=shape, kind=kind: model.layer(devices, shape, kind)  # type: ignore[misc]
    for rows in sorted({rows for rows, _ in steps}):
        for variant in Variant:
            yield lambda rows=rows, variant=variant: model.sample(own(devices)[0], variant, rows)  # type: ignore[misc]
        yield lambda rows=rows: model.restrict(own(devices)[0], rows)  # type: ignore[misc]
        yield lambda rows=rows: model.with_logprobs(own(devices)[0], rows)  # type: ignore[misc]
    widths = sorted({drawn_width(rows) for rows, _ in steps})
    for rows, width in product(buckets.decode_rows, widths):
        yield lambda rows=rows, width=width: model.fill_in(own(devices)[0], rows, width)  # type: ignore[misc]
    yield lambda: model.read_pages(devices)
    yield lambda: model.write_pages(devices)
    yield lambda: model.empty_pages(devices)
