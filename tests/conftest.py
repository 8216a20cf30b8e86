"""Eight virtual CPU devices and strict arithmetic for every test that uses jax. Tests without jax do not pay for it."""

from __future__ import annotations

import os
import sys

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
assert "jax" not in sys.modules, "jax must not be imported before its configuration is set"

settings.register_profile("spotjax", deadline=None)  # correctness is tested; a loaded machine is slow
settings.load_profile("spotjax")
