"""The shapes and constants of a decoder. Plain data, no jax; metadata formats are read elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
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
class LayerKind:
    """All that layers of one model may differ in, their arrays' contents aside; layers of a kind share compiled code.

    Attributes:
      window: how many positions a query sees, its own and those before it; None for all.
      rope_base, rope_scaling: of the rotary frequencies.
    """

    window: int | None
    rope_base: float
    rope_scaling: RopeScaling | None


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts of which a router chooses a few for each token, in place of one feed-forward layer.

    Attributes:
      count: E, experts of every layer.
      per_token: k, how many of them compute a token.
      normalized: the weights of the chosen ones are made to sum to one.
      shared_mlp: width of an expert that computes every token, scaled by a gate of its own (Qwen2-MoE); 0 for none.
    """

    count: int
    per_token: int
    normalized: bool = True
    shared_mlp: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.count:
            raise ValueError(f"per_token must be from 1 to the {self.count} experts, got {self.per_token}")
        if self.shared_mlp < 0:
            raise ValueError(f"shared_mlp must not be negative, got {self.shared_mlp}")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder, by its sizes and by which of the known parts it is made of. Defaults are those of Llama.

    Covers Llama 2 and 3, SmolLM2, TinyLlama, Mistral, dense Qwen2 and Qwen3; Gemma 2 and 3; OPT; GPT-NeoX and Pythia;
    GPT-2.

    Attributes:
      vocab: V, rows of the embedding.
      width: D, size of a hidden vector.
      layers: L.
      heads: N, query heads.
      kv_heads: K, key and value heads; divides ``heads``.
      head_size: H.
      mlp: F, width of the feed-forward layer; of each expert where there are experts.
      max_positions: longest context that the model was made for, in tokens.
      positions: ``rotary`` turns queries and keys; ``learned`` adds a vector for each position to the embedding.
      rotary_size: how many of the H elements of a head are rotated, the first ones; None for all.
      rope_base: base of the rotary frequencies.
      rope_scaling: stretch of the rotary frequencies, or None.
      windows: sliding windows of the first layers, in positions, None where a layer sees all; repeated for the layers
        after them. Empty where all layers see all.
      local_rope_base: base of the rotary frequencies in layers with a window, not stretched there (Gemma 3); None where
        they rotate as the other layers do.
      norm: ``rms`` is RMSNorm, ``layer`` LayerNorm with a bias.
      norm_epsilon: added to the mean square or variance in norms.
      norm_place: ``before`` attention and feed-forward, with a final norm; ``after`` them, without one (OPT-350M); or
        on ``both`` sides of them, with one (Gemma).
      zero_centered_norm: RMSNorm multiplies by 1 + scale (Gemma).
      parallel_residual: attention and feed-forward take the same input and are added at once (GPT-NeoX).
      activation: of the feed-forward layer; ``gelu_tanh`` is the approximation of ``gelu`` by tanh.
      gated_mlp: the activation of one projection gates another (SwiGLU).
      embedding_width: size of a row of the embedding where projections lead to D and back (OPT-350M); None for D.
      tied_embeddings: the output projection is the embedding transposed.
      attention_bias: query, key and value projections have a bias.
      output_bias: the attention output projection has a bias.
      mlp_bias: the feed-forward projections have biases.
      qk_norm: queries and keys are RMS-normalised per head before rotation (Qwen3).
      attention_scale: what products of queries and keys are multiplied by; None for 1 / sqrt(H).
      attention_softcap: bound c of the scores, c tanh(score / c); None for none.
      logit_softcap: the same of the logits.
      embedding_scale: what embedded tokens are multiplied by; None for 1.
      experts: what every layer has in place of one feed-forward layer, or None.
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
    norm_place: Literal["before", "after", "both"] = "before"
    parallel_residual: bool = False
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    embedding_width: int | None = None
    windows: tuple[int | None, ...] = ()
    local_rope_base: float | None = None
    zero_centered_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    experts: Experts | None = None

    def kind(self, layer: int) -> LayerKind:
        """What is special about a layer."""
        window = self.windows[layer % len(self.windows)] if self.windows else None
        if window is not None and self.local_rope_base is not None:
            return LayerKind(window, self.local_rope_base, None)
        return LayerKind(window, self.rope_base, self.rope_scaling)

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_size", "mlp", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.embedding_width is not None and self.embedding_width < 1:
            raise ValueError(f"embedding_width must be at least 1, got {self.embedding_width}")
        if self.parallel_residual and self.norm_place != "before":
            raise ValueError("parallel_residual needs norm_place 'before'")
        if self.zero_centered_norm and self.norm != "rms":
            raise ValueError("zero_centered_norm needs norm 'rms'")
        for name in ("attention_scale", "attention_softcap", "logit_softcap", "embedding_scale", "local_rope_base"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows must be at least 1, got {self.windows}")
        if self.experts is not None and (self.mlp_bias or not self.gated_mlp):
            raise ValueError("experts need gated_mlp, and have no mlp_bias")
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


def window_pattern(windows: Sequence[int | None], max_positions: int | None) -> tuple[int | None, ...]:
    """The shortest ``DecoderConfig.windows`` that gives every layer its window.

    Args:
      windows: of all layers, one by one; None where a layer sees all.
      max_positions: windows from here on leave nothing out and are none; None where a window means more than that.
    """
    limit = inf if max_positions is None else max_positions
    effective = tuple(None if window is None or window >= limit else window for window in windows)
    if not any(effective):
        return ()
    for period in range(1, len(effective)):
        if all(window == effective[layer % period] for layer, window in enumerate(effective)):
            return effective[:period]
    return effective
