"""Which attention backend serves a model on a device."""

from __future__ import annotations

import logging
from typing import Literal

import jax
import numpy as np

from spotjax.errors import ConfigError
from spotjax.models.spec import ModelSpec
from spotjax.runtime.attention.backend import AttentionBackend
from spotjax.runtime.attention.xla import XlaAttention

log = logging.getLogger(__name__)

AttentionSetting = Literal["auto", "xla", "tpu", "gpu"]


def choose_attention(
    setting: AttentionSetting, spec: ModelSpec, page_size: int, dtype: np.dtype, device: jax.Device
) -> AttentionBackend:
    """The backend that was asked for, or with ``auto`` the platform's own where it can serve the model, else XLA's.

    Raises:
      ConfigError: what was asked for cannot serve the model on this device.
    """
    wanted = device.platform if setting == "auto" else setting
    plain = XlaAttention(spec.config.head_size, page_size)
    if wanted not in ("tpu", "gpu"):
        return plain
    if device.platform != wanted:
        raise ConfigError(f"attention ({setting}) needs a {wanted.upper()}; the devices here are {device.platform}")
    found = _on_tpu(spec, page_size, dtype, device) if wanted == "tpu" else _on_gpu(spec, page_size, dtype, device)
    if not isinstance(found, str):
        return found
    if setting != "auto":
        raise ConfigError(f"attention ({setting}) cannot serve this model here: {found}; attention xla can")
    log.warning("attention runs without the kernels of the platform: %s", found)
    return plain


def _on_tpu(spec: ModelSpec, page_size: int, dtype: np.dtype, device: jax.Device) -> AttentionBackend | str:
    """The backend, or why there is none."""
    try:
        from spotjax.runtime.attention.tpu import TpuAttention
    except ImportError as missing:
        return f"jax {jax.__version__} does not have the kernel ({missing})"
    reason = TpuAttention.misfit(spec.config, dtype, device)
    return reason or TpuAttention(spec.config.head_size, page_size, dtype.itemsize)


def _on_gpu(spec: ModelSpec, page_size: int, dtype: np.dtype, device: jax.Device) -> AttentionBackend | str:
    try:
        from spotjax.runtime.attention.gpu import GpuAttention
    except ImportError as missing:
        return f"jax {jax.__version__} does not have the kernel ({missing})"
    return GpuAttention.misfit(spec.config, page_size, dtype, device) or GpuAttention(spec.config.head_size, page_size)
