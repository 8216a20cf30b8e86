"""Who computes a model's products on a device."""

from __future__ import annotations

import logging
from typing import Literal

import jax

from spotjax.errors import ConfigError
from spotjax.models.projection import BY_XLA, Products
from spotjax.runtime.native.library import NativeUnavailable
from spotjax.runtime.native.products import native_products

log = logging.getLogger(__name__)

KernelSetting = Literal["auto", "native", "xla"]


def choose_products(setting: KernelSetting, device: jax.Device) -> Products:
    """Whom was asked for; with ``auto`` the native kernel on CPUs where it can be compiled, else XLA. Blocks.

    Raises:
      ConfigError: the native kernel was asked for and cannot be had.
    """
    if setting == "xla" or (setting == "auto" and device.platform != "cpu"):
        return BY_XLA
    if device.platform != "cpu":
        raise ConfigError(f"cpu_kernels ({setting}) needs a CPU; the devices here are {device.platform}")
    try:
        return native_products()
    except NativeUnavailable as reason:
        if setting == "native":
            raise ConfigError(
                f"cpu_kernels ({setting}) cannot be had: {reason}; cpu_kernels xla does without"
            ) from reason
        log.warning("products are computed by XLA, not by the native kernel: %s", reason)
        return BY_XLA
