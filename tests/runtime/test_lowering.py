"""All that a server compiles is lowered for TPUs and GPUs without having one: types, shapes and kernels fit together.

It is not compiled, so what the compilers of these platforms would refuse is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax._src.pallas.mosaic import tpu_info

from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.runtime.attention.backend import AttentionBackend
from spotjax.runtime.attention.gpu import GpuAttention
from spotjax.runtime.attention.tpu import TpuAttention
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel, exact_products
from spotjax.runtime.warmup import warm

TPU = tpu_info.ChipVersion.TPU_V5E
BUCKETS = Buckets(max_batch=2, prefill_tokens=16, page_size=16, max_positions=64)
CONFIG = DecoderConfig(
    vocab=97, width=48, layers=2, heads=12, kv_heads=4, head_size=64, mlp=50, max_positions=64, windows=(16, None)
)
"""A layer with a window and one without; three shards have kv heads in common."""


class Lowering:
    """In the place of ``Executables``: lowers and compiles nothing."""

    def __init__(self) -> None:
        self.programs: dict[Any, str] = {}

    def get(self, key: Any, devices: Any, lower: Callable[[Any], jax.stages.Lowered]) -> None:
        self.programs[key] = lower(devices).as_text()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lowers for another platform from here on; what jax asks of its devices is answered."""
    monkeypatch.setitem(tpu_info.registry, "cpu", partial(tpu_info.get_tpu_info_for_chip, TPU, 1))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    if find_spec("jax._src.pallas.triton.gpu_info"):  # jax 0.12
        hopper = SimpleNamespace(compute_capability=90)
        monkeypatch.setattr("jax._src.pallas.triton.gpu_info.get_gpu_info", lambda: hopper)
    lower = jax.stages.Traced.lower
    return lambda platform: monkeypatch.setattr(
        jax.stages.Traced, "lower", lambda traced: lower(traced, lowering_platforms=(platform,))
    )


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # jax 0.12
@pytest.mark.parametrize(
    ("platform", "attention", "one_position", "span"),
    [
        ("tpu", TpuAttention(64, 16, 2), "tpu_custom_call", "tpu_custom_call"),
        ("cuda", GpuAttention(64, 16), "triton", "fmha"),
    ],
)
def test_whatever_a_stage_calls_is_lowered_for_accelerators(
    platform: str,
    attention: AttentionBackend,
    one_position: str,
    span: str,
    elsewhere: Callable[[str], None],
) -> None:
    elsewhere(platform)
    model = CompiledModel(ModelSpec(CONFIG, dtype_bytes=2), 17, 16, 64, jnp.bfloat16, attention=attention)
    model.executables = lowering = Lowering()  # type: ignore[assignment]
    warm(model, BUCKETS, [tuple(jax.devices()[:3])], threads=1)
    kinds = {key[0] for key in lowering.programs}
    assert kinds >= {"embed", "layers", "logits", "sample", "read pages", "write pages", "empty pages"}
    for key, program in lowering.programs.items():
        if key[0] == "layers" and key[3] == (1,):  # a layer without window
            assert (one_position if key[2].span == 1 else span) in program


@pytest.mark.parametrize(
    ("dtype", "platform", "exact"),
    [(jnp.float32, "tpu", True), (jnp.float32, "gpu", True), (jnp.float32, "cpu", False), (jnp.bfloat16, "tpu", False)],
)
def test_accelerators_multiply_float32_in_full_where_it_is_served(dtype: Any, platform: str, exact: bool) -> None:
    with exact_products(dtype, platform):
        program = jax.jit(jnp.matmul).lower(jnp.ones((2, 3), dtype), jnp.ones((3, 2), dtype)).as_text()
    assert ("HIGHEST" in program) == exact
