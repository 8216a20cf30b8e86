"""Which attention backend is taken for which model on which device."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from spotjax.errors import ConfigError
from spotjax.models.config import DecoderConfig
from spotjax.models.spec import ModelSpec
from spotjax.runtime.attention.choice import AttentionSetting, choose_attention
from spotjax.runtime.attention.gpu import GpuAttention
from spotjax.runtime.attention.tpu import TpuAttention
from spotjax.runtime.attention.xla import XlaAttention

LLAMA = DecoderConfig(vocab=97, width=64, layers=2, heads=8, kv_heads=2, head_size=64, mlp=50)


def device(platform: str, kind: str, capability: str = "") -> Any:
    """What is asked of a device."""
    runtime = SimpleNamespace(platform_version="PJRT\ncuda 12090" if platform == "gpu" else platform)
    return SimpleNamespace(platform=platform, device_kind=kind, client=runtime, compute_capability=capability or "0")


CPU, TPU, HOPPER = device("cpu", "cpu"), device("tpu", "TPU v5 lite"), device("gpu", "NVIDIA H100", "9.0")
AMPERE, VOLTA, OLD_TPU = (
    device("gpu", "NVIDIA A100", "8.0"),
    device("gpu", "NVIDIA V100", "7.0"),
    device("tpu", "TPU v3"),
)


def choose(
    where: Any, setting: AttentionSetting = "auto", dtype: Any = jnp.bfloat16, page_size: int = 16, **changed: Any
) -> object:
    spec = ModelSpec(replace(LLAMA, **changed))
    return choose_attention(setting, spec, page_size, jnp.dtype(dtype), where)


def test_every_platform_gets_its_own_backend() -> None:
    assert choose(CPU) == XlaAttention(64, 16)
    assert choose(TPU) == choose(TPU, "tpu") == TpuAttention(64, 16, 2)
    assert choose(TPU, dtype=jnp.float32) == TpuAttention(64, 16, 4)
    assert choose(HOPPER) == choose(HOPPER, "gpu") == GpuAttention(64, 16)
    assert choose(TPU, "xla") == choose(HOPPER, "xla") == XlaAttention(64, 16)
    assert choose(HOPPER, head_size=256) == GpuAttention(256, 16)
    assert choose(TPU, attention_softcap=50.0, windows=(8, None)) == TpuAttention(64, 16, 2)
    assert choose(HOPPER, windows=(8, None)) == GpuAttention(64, 16)


@pytest.mark.parametrize(
    ("where", "arguments", "reason"),
    [
        (HOPPER, {"dtype": jnp.float32}, "in bfloat16, not in float32"),
        (HOPPER, {"head_size": 96}, "heads of 96"),
        (HOPPER, {"head_size": 8}, "heads of 8"),
        (AMPERE, {"head_size": 256}, "heads of 256"),
        (HOPPER, {"page_size": 24}, "pages of 24"),
        (HOPPER, {"attention_softcap": 50.0}, "no soft cap"),
        (VOLTA, {}, "NVIDIA V100"),
        (OLD_TPU, {}, "TPU v3"),
        (TPU, {"dtype": jnp.float32, "kv_heads": 8}, "float32"),
    ],
)
def test_what_a_kernel_cannot_serve_is_said_and_left_to_xla_or_refused(
    where: Any, arguments: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose(where, **arguments), XlaAttention)
    (line,) = caplog.messages
    assert reason in line
    with pytest.raises(ConfigError, match=re.escape(reason)):
        choose(where, where.platform, **arguments)


def test_kernels_of_another_platform_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a GPU; the devices here are cpu"):
        choose(CPU, "gpu")
    with pytest.raises(ConfigError, match="needs a TPU; the devices here are gpu"):
        choose(HOPPER, "tpu")


@pytest.mark.parametrize(("where", "module"), [(TPU, "tpu"), (HOPPER, "gpu")])
def test_a_jax_without_the_kernel_is_served_by_xla(
    where: Any, module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, f"spotjax.runtime.attention.{module}", None)
    assert isinstance(choose(where), XlaAttention)
    assert f"jax {jax.__version__} does not have the kernel" in caplog.text
    with pytest.raises(ConfigError, match="does not have the kernel"):
        choose(where, where.platform)
