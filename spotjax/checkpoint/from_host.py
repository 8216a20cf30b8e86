"""Saves the parameters that a process serves with, from its devices."""

from __future__ import annotations

from spotjax.checkpoint.parameters import ParameterWriter, source_of
from spotjax.errors import CheckpointError
from spotjax.reshard.host import Host


def save_parameters(host: Host, location: str) -> int:
    """Writes the parts of a checkpoint whose arrays are on stages of replica 0 that this process has.

    An array that two stages have (a tied embedding) is written by the first. Returns: bytes written.

    Raises:
      CheckpointError: they cannot be written, or a stage spans hosts of a TPU slice.
    """
    placement, model = host.placement, host.model
    if placement is None:
        return 0
    writer, written = ParameterWriter(location, model.spec.config, model.dtype.name), 0
    try:
        for (data, number), stage in sorted(host.stages.items()):
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
                if first and all(host.store.get(group[0], name) is not None for name in names):
                    sources = {name: source_of([host.store.at(device)[name] for device in group]) for name in names}
                    writer.write(part, sources)
                    written += sum(array.size for array in arrays.values()) * model.dtype.itemsize
    finally:
        writer.close()
    return written
