"""Random parameters of modules with their logical axes, from the one list of arrays in ``spec``."""

from __future__ import annotations

from math import prod

import jax
import jax.numpy as jnp
from flax import nnx

from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ArraySpec, ModelSpec

Parameter = nnx.Param[jax.Array]


def parameter(array: ArraySpec, config: DecoderConfig, rngs: nnx.Rngs) -> Parameter:
    """Norms start at multiplying by one, biases at zero; the rest is normal with variance 1 / fan-in."""
    name = array.name.rsplit(".", 1)[-1]
    if name.endswith("bias"):
        value = jnp.zeros(array.shape, jnp.float32)
    elif name == "scale" or name.endswith("norm"):
        value = jnp.full(array.shape, 0 if config.zero_centered_norm else 1, jnp.float32)
    else:
        fan_in = array.shape[-1] if name in ("embedding", "positions") else array.size // _outputs(array)
        value = jax.random.normal(rngs.params(), array.shape, jnp.float32) * fan_in**-0.5
    return nnx.Param(value, logical_axes=array.axes)


def add_parameters(module: nnx.Module, config: DecoderConfig, name: str, rngs: nnx.Rngs) -> None:
    """Gives a module all the parameters that the configuration has for it; ``""`` names the decoder itself."""
    spec = ModelSpec(config)
    layer = [ArraySpec(path, shape, axes) for path, (shape, axes) in spec.layer_arrays.items()]
    for array in (*spec.edges, *layer):
        owner, _, own_name = array.name.rpartition(".")
        if owner == name:
            setattr(module, own_name, parameter(array, config, rngs))


def _outputs(array: ArraySpec) -> int:
    """To how many outputs a kernel connects each input; to those of all experts."""
    if array.axes[0] == "expert":
        return array.size // array.shape[1]
    inputs = 2 if array.axes[0] == "heads" else 1
    return prod(array.shape[inputs:])
