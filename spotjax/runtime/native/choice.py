"""Whether native kernels compute a model on a device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import jax

from spotjax.errors import ConfigError
from spotjax.models.projection import BY_XLA, Products
from spotjax.runtime.attention.backend import AttentionBackend
from spotjax.runtime.attention.xla import XlaAttention
from spotjax.runtime.native.attention import NativeAttention
from spotjax.runtime.native.library import NativeUnavailable, load_library
from spotjax.runtime.native.products import NativeProducts

log = logging.getLogger(__name__)

KernelSetting = Literal["auto", "native", "xla"]


@dataclass(frozen=True)
class NativeKernels:
    """The kernels of the library under the names by which XLA knows them, which differ where the library does."""

    library: str

    @property
    def products(self) -> NativeProducts:
        """Who computes products."""
        return NativeProducts(f"spotjax-products-{self.library}")

    def attention(self, head_size: int, page_size: int) -> NativeAttention:
        """Who computes attention over pages."""
        return NativeAttention(head_size, page_size, f"spotjax-attention-{self.library}")


def native_kernels() -> NativeKernels:
    """Compiles the library if need be and makes it known to XLA. May take seconds, blocks.

    Raises:
      NativeUnavailable: see ``load_library``.
    """
    library = load_library()
    kernels = NativeKernels(library.name)
    for target, function in [
        (kernels.products.target, library.functions.spotjax_products),
        (kernels.attention(1, 1).target, library.functions.spotjax_attention),
    ]:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return kernels


def choose_kernels(setting: KernelSetting, device: jax.Device) -> NativeKernels | None:
    """The native kernels if they were asked for, with ``auto`` on CPUs where they can be compiled. Blocks.

    Raises:
      ConfigError: they were asked for and cannot be had.
    """
    if setting == "xla" or (setting == "auto" and device.platform != "cpu"):
        return None
    if device.platform != "cpu":
        raise ConfigError(f"cpu_kernels ({setting}) needs a CPU; the devices here are {device.platform}")
    try:
        return native_kernels()
    except NativeUnavailable as reason:
        if setting == "native":
            raise ConfigError(
                f"cpu_kernels ({setting}) cannot be had: {reason}; cpu_kernels xla does without"
            ) from reason
        log.warning("products and attention are computed by XLA, not by native kernels: %s", reason)
        return None


def products_of(kernels: NativeKernels | None) -> Products:
    """Who computes products."""
    return BY_XLA if kernels is None else kernels.products


def attention_of(kernels: NativeKernels | None, chosen: AttentionBackend, setting: str) -> AttentionBackend:
    """Who computes attention: where nobody in particular was asked for, the native kernel in the place of XLA."""
    if kernels is None or setting != "auto" or not isinstance(chosen, XlaAttention):
        return chosen
    return kernels.attention(chosen.head_size, chosen.page_size)
