"""Saves the parameters that a process serves with, from its devices."""

from __future__ import annotations

from spotjax.checkpoint.parameters import ParameterWriter, source_of
from spotjax.errors import CheckpointError
from spotjax.reshard.host import Host


def save_parameters(host: Host, location: str) -> int:
    """Writes the parts of a checkpoint whose arrays are on stages of replica 0 that this process has.

    An array that two stages have (a tied embedding) is written by the first. What an earlier save that was given up has
    written of the same weights stays. The mesh may change meanwhile, as long as the devices keep the arrays.

    Returns: bytes of these parts.

    Raises:
      CheckpointError: they cannot be written, or a stage spans hosts of a TPU slice.
      RuntimeError, SliceUnavailable: an array is not there any more.
    """
    placement, model, stages, store = host.placement, host.model, dict(host.stages), host.store
    if placement is None:
        return 0
    writer = ParameterWriter(location, model.spec.config, model.dtype.name, model.spec.quantization)
    saved = 0
    try:
        for (data, number), stage in sorted(stages.items()):
            if data:
                continue
            if stage.own != stage.devices:
                raise CheckpointError(
                    "parameters of a stage that spans hosts of a TPU slice cannot be saved from there; convert the "
                    "model's files instead: spotjax convert"
                )
            group = placement.group(0, number)
            for part, arrays in writer.parts.items():
                names = [array.name for array in arrays.values()]
                first = part != "embedding" or number == 0
                if first and all(store.get(group[0], name) is not None for name in names):
                    sources = {name: source_of([store.at(device)[name] for device in group]) for name in names}
                    saved += (writer.written(part, sources) or writer.write(part, sources)).bytes
    finally:
        writer.close()
    return saved
