"""Memory for bytes that arrive. Owns nothing: whoever receives a block keeps it."""

from __future__ import annotations

import ctypes

import numpy as np

ALIGNMENT = 64
"""Bytes. Devices that share the host's memory use an array that begins at a multiple of this without copying it."""


def aligned(size: int) -> memoryview:
    """A fresh writable block of ``size`` bytes that begins at a multiple of ``ALIGNMENT``.

    Never handed out again while anybody refers to it: ``jax.device_put`` may alias what it is given.
    """
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % ALIGNMENT  # faster than block.ctypes
    return memoryview(block)[start : start + size]
