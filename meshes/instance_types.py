"""Machines that clouds offer, as instance types: what they have and cost, roughly. Check them before you rely on them.

Approximate list figures: peak FLOP/s are of dense matrix products in the number format that the machine serves best
(float32 for T4 as SpotServe used it, bfloat16 or float16 tensor cores else), memory is what is usable of it, prices are
those of AWS us-east-1 on demand. Only g4dn.12xlarge has a source: devices, network and both prices are in SpotServe's
artifact. The other types are from memory, and their spot prices simply about 40 % of on demand. Look up what you rent.
"""

from __future__ import annotations

import re

from spotjax.errors import ConfigError
from spotjax.meshes.instance import Instance, InstanceType

_GIB = 2**30

INSTANCE_TYPES = {
    kind.name: kind
    for kind in (
        InstanceType("g4dn.12xlarge", 4, 15 * _GIB, 8.1e12, 3.2e11, 8e9, 6.25e9, 1e-4, 1.9046, 3.912),
        InstanceType("g5.12xlarge", 4, 22 * _GIB, 7.0e13, 6.0e11, 1.2e10, 5e9, 1e-4, 2.27, 5.672),
        InstanceType("p3.8xlarge", 4, 16 * _GIB, 1.25e14, 9.0e11, 1.0e11, 1.25e9, 1e-4, 4.9, 12.24),
        InstanceType("p4d.24xlarge", 8, 40 * _GIB, 3.12e14, 1.55e12, 3.0e11, 5e10, 5e-5, 13.1, 32.77),
        InstanceType("p5.48xlarge", 8, 80 * _GIB, 9.89e14, 3.35e12, 4.5e11, 4e11, 5e-5, 39.3, 98.32),
    )
}
"""By name: devices, memory, FLOP/s, memory, link and network bandwidth, latency, spot and on-demand price (USD/h)."""


VIRTUAL_CPU = InstanceType("virtual-cpu", 1, 0, 5e10, 1e10, 5e9, 5e9)
"""A part of a processor that plays a device; its figures are guesses, and its memory is what is asked for."""


def instance_type(name: str) -> InstanceType:
    """A known kind of machine.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in INSTANCE_TYPES:
        raise ConfigError(f"no instance type is known as {name!r}; known are {', '.join(INSTANCE_TYPES)}")
    return INSTANCE_TYPES[name]


def parse_instances(text: str) -> tuple[Instance, ...]:
    """Reads ``7xg4dn.12xlarge`` or ``3xp4d.24xlarge,2xg5.12xlarge`` as ready instances ``i-0``, ``i-1``, ...

    Raises:
      ConfigError: a part is not COUNTxTYPE, or the type is not known.
    """
    kinds: list[InstanceType] = []
    for part in text.split(","):
        counted = re.fullmatch(r"\s*([1-9]\d*)\s*x\s*(\S+)\s*", part)
        if not counted:
            raise ConfigError(f"instances are COUNTxTYPE, joined by commas, such as 7xg4dn.12xlarge; got {part!r}")
        kinds += [instance_type(counted[2])] * int(counted[1])
    return tuple(Instance(f"i-{number}", kind) for number, kind in enumerate(kinds))
