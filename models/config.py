"""The shapes and constants of a decoder. Plain data, no jax; metadata formats are read elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of the original training.

    Attributes:
      kind: ``linear`` divides every frequency by ``factor``; ``llama3`` does so for long wavelengths only;
        ``yarn`` (Peng et al. 2023) interpolates per dimension and scales attention by ``attention_factor``.
      factor: how many times longer the context is.
      original_positions: context length of the original training (``llama3`` and ``yarn``).
      low_frequency, high_frequency: ``llama3`` wavelength bounds, in turns over the original context.
      beta_fast, beta_slow: ``yarn`` ramp bounds, in turns over the original context.
      attention_factor: ``yarn`` scale of the rotated vectors; None derives 0.1 ln(factor) + 1.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_positions: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder, by its sizes and by which of the known parts it is made of. Defaults are those of Llama.

    Covers Llama 2 and 3, SmolLM2, TinyLlama, Mistral without sliding window, dense Qwen2 and Qwen3; OPT; GPT-NeoX and
    Pythia; GPT-2.

    Attributes:
      vocab: V, rows of the embedding.
      width: D, size of a hidden vector.
      layers: L.
      heads: N, query heads.
      kv_heads: K, key and value heads; divides ``heads``.
      head_size: H.
      mlp: F, width of the feed-forward layer.
      max_positions: longest context that the model was made for, in tokens.
      positions: ``rotary`` turns queries and keys; ``learned`` adds a vector for each position to the embedding.
      rotary_size: how many of the H elements of a head are rotated, the first ones; None for all.
      rope_base: base of the rotary frequencies.
      rope_scaling: stretch of the rotary frequencies, or None.
      norm: ``rms`` is RMSNorm, ``layer`` LayerNorm with a bias.
      norm_epsilon: added to the mean square or variance in norms.
      norm_place: ``before`` attention and feed-forward, with a final norm; or ``after`` them, without one (OPT-350M).
      parallel_residual: attention and feed-forward take the same input and are added at once (GPT-NeoX).
      activation: of the feed-forward layer; ``gelu_tanh`` is the approximation of ``gelu`` by tanh.
      gated_mlp: the activation of one projection gates another (SwiGLU).
      embedding_width: size of a row of the embedding where projections lead to D and back (OPT-350M); None for D.
      tied_embeddings: the output projection is the embedding transposed.
      attention_bias: query, key and value projections have a bias.
      output_bias: the attention output projection has a bias.
      mlp_bias: the feed-forward projections have biases.
      qk_norm: queries and keys are RMS-normalised per head before rotation (Qwen3).
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    max_positions: int = 2048
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_size: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_place: Literal["before", "after"] = "before"
    parallel_residual: bool = False
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    embedding_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_size", "mlp", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.embedding_width is not None and self.embedding_width < 1:
            raise ValueError(f"embedding_width must be at least 1, got {self.embedding_width}")
        if self.parallel_residual and self.norm_place == "after":
            raise ValueError("parallel_residual needs norm_place 'before'")
        if self.positions == "rotary":
            self._check_rotary()

    def _check_rotary(self) -> None:
        if self.rotary_size is None:
            if self.head_size % 2:
                raise ValueError(f"head_size must be even for rotary positions, got {self.head_size}")
        elif self.rotary_size % 2 or not 0 < self.rotary_size <= self.head_size:
            raise ValueError(
                f"rotary_size must be even and from 2 to head_size {self.head_size}, got {self.rotary_size}"
            )
