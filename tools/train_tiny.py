"""Trains the small model that ships with Spotjax: a Llama of two million parameters that continues plays.

Owns the recipe. ``python -m spotjax.tools.train_tiny`` makes every file of the model directory from one hash-checked
archive with a fixed seed and a fixed number of steps; it needs the ``train`` extra.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer

from spotjax.models.config import DecoderConfig
from spotjax.models.decoder import Decoder
from spotjax.tools.tiny_corpus import (
    END,
    END_ID,
    REQUIREMENT,
    Tokens,
    encode,
    fetch_archive,
    read_works,
    split,
    train_tokenizer,
)
from spotjax.tools.tiny_directory import Figures, card, save_settings, save_weights

CONFIG = DecoderConfig(
    vocab=2048,
    width=192,
    layers=4,
    heads=6,
    kv_heads=2,
    head_size=32,
    mlp=512,
    max_positions=1024,
    tied_embeddings=True,
)

PROMPT = "MESSENGER.\nMy lord, the king"
"""Of the samples on the model card."""

State = nnx.State[Any, Any]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the model is trained.

    Attributes:
      steps: optimizer steps.
      batch: tokens per step.
      context: tokens per sequence, but for the last steps.
      long_context: tokens per sequence in the last ``long_fraction`` of the steps, so that late positions are learned.
      peak_rate: highest learning rate; falls along a cosine to a twentieth.
      warmup: fraction of the steps in which the learning rate rises.
      seed: of initial weights and order of the text.
    """

    steps: int = 3600
    batch: int = 2048
    context: int = 256
    long_context: int = 1024
    long_fraction: float = 0.1
    peak_rate: float = 3e-3
    warmup: float = 0.04
    seed: int = 0

    @property
    def short_steps(self) -> int:
        """Steps with ``context``."""
        return self.steps - round(self.steps * self.long_fraction)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipped gradients; norm scales do not decay."""
        peak, warmup = self.peak_rate, round(self.steps * self.warmup)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, self.steps, peak / 20)
        matrices = partial(jax.tree.map, lambda array: array.ndim > 1)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1, mask=matrices))


def sequences(tokens: Tokens, length: int, batch: int, rng: np.random.Generator) -> Iterator[Tokens]:
    """Endless (batch, length + 1) cuts of the text: every epoch once over it, from a new offset, shuffled."""
    while True:
        starts = np.arange(rng.integers(length), len(tokens) - length, length)
        rng.shuffle(starts)
        for chosen in starts[: len(starts) // batch * batch].reshape(-1, batch):
            yield tokens[chosen[:, None] + np.arange(length + 1)]


class Trainer:
    """The model, its optimizer, and the compiled functions over both."""

    def __init__(self, config: DecoderConfig, recipe: Recipe) -> None:
        self.recipe = recipe
        self.graph, self.state = nnx.split(Decoder(config, rngs=nnx.Rngs(recipe.seed)))
        # Residual branches start small (GPT-2), so that the depth does not raise the variance of the stream.
        for layer in self.state["layers"].values():
            for kernel in (layer["attention"]["output"], layer["mlp"]["down"]):
                kernel[...] = kernel[...] * (2 * config.layers) ** -0.5
        optimizer = recipe.optimizer()
        self.moments = optimizer.init(self.state)

        def token_losses(state: State, tokens: jax.Array) -> jax.Array:
            logits = nnx.merge(self.graph, state)(tokens[:, :-1])
            losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return losses

        def step(state: State, moments: optax.OptState, tokens: jax.Array) -> tuple[State, optax.OptState, jax.Array]:
            loss, gradients = jax.value_and_grad(lambda state: token_losses(state, tokens).mean())(state)
            updates, moments = optimizer.update(gradients, moments, state)
            return optax.apply_updates(state, updates), moments, loss

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._losses = jax.jit(token_losses)
        self._logits = jax.jit(lambda state, tokens: nnx.merge(self.graph, state)(tokens))

    def step(self, tokens: Tokens) -> float:
        """One optimizer step on (B, T + 1) tokens; returns the mean loss before it, in nats per token."""
        self.state, self.moments, loss = self._step(self.state, self.moments, jnp.asarray(tokens))
        return float(loss)

    def round_to_half(self) -> None:
        """Rounds the weights to the float16 in which they are stored."""
        self.state = jax.tree.map(lambda array: array.astype(jnp.float16).astype(jnp.float32), self.state)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The weights by the names of ``ModelSpec``."""
        return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(self.state)}

    def bits_per_byte(self, tokenizer: Tokenizer, texts: Sequence[str], window: int = 512) -> float:
        """Mean cost of texts; every token but a text's first half window is predicted from half a window or more."""
        nats, size, half = 0.0, 0, window // 2
        for text in texts:
            ids = np.concatenate([[END_ID], encode(tokenizer, [text])]).astype(np.int32)
            for start in range(0, max(len(ids) - 1 - half, 1), half):
                cut = ids[start : start + window + 1]
                padded = np.pad(cut, (0, window + 1 - len(cut)))[None]
                losses = np.asarray(self._losses(self.state, padded))[0, : len(cut) - 1]
                nats += float(losses[half if start else 0 :].sum())
            size += len(text.encode())
        return nats / size / float(np.log(2))

    def generate(self, tokens: Sequence[int], count: int, temperature: float = 0.0, window: int = 256) -> list[int]:
        """Continues a prompt by ``count`` tokens, greedily when the temperature is 0; recomputes the whole window."""
        rng = np.random.default_rng(self.recipe.seed)
        out = list(tokens)
        for _ in range(count):
            recent = out[-window:]
            padded = np.pad(np.asarray(recent, np.int32), (0, window - len(recent)))[None]
            logits = np.asarray(self._logits(self.state, padded))[0, len(recent) - 1].astype(np.float64)
            noise = rng.gumbel(size=logits.shape) if temperature else 0.0
            out.append(int(np.argmax(logits / (temperature or 1.0) + noise)))
        return out[len(tokens) :]


def train(trainer: Trainer, tokens: Tokens, console: Console) -> Iterator[int]:
    """Runs the recipe; yields the number of steps done after every quarter of them and at the end."""
    recipe, rng = trainer.recipe, np.random.default_rng(trainer.recipe.seed)
    short = sequences(tokens, recipe.context, recipe.batch // recipe.context, rng)
    long = sequences(tokens, recipe.long_context, recipe.batch // recipe.long_context, rng)
    figures = TextColumn("{task.fields[figures]}")
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), figures, console=console) as progress:
        task, loss, start = progress.add_task("training", total=recipe.steps, figures=""), 0.0, time.perf_counter()
        for done in range(1, recipe.steps + 1):
            now = trainer.step(next(short if done <= recipe.short_steps else long))
            loss = now if done == 1 else 0.98 * loss + 0.02 * now
            speed = done * recipe.batch / (time.perf_counter() - start)
            progress.update(task, advance=1, figures=f"loss {loss:.3f} nats/token, {speed:.0f} tokens/s")
            if done % max(recipe.steps // 4, 1) == 0 or done == recipe.steps:
                console.print(f"step {done}: training loss {loss:.3f} nats/token, {speed:.0f} tokens/s")
                yield done


def main() -> None:
    """Trains, evaluates and writes the model directory with its card."""
    parser = argparse.ArgumentParser(prog="python -m spotjax.tools.train_tiny", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("models/tiny"), help="directory to write (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="optimizer steps (default %(default)s)")
    parser.add_argument("--archive", type=Path, help=f"{REQUIREMENT} source archive, instead of downloading it")
    arguments = parser.parse_args()
    console, recipe = Console(), Recipe(steps=arguments.steps)
    with tempfile.TemporaryDirectory() as directory:
        parts = [split(work) for work in read_works(arguments.archive or fetch_archive(Path(directory)))]
    console.print(f"{len(parts)} works, {sum(len(part) for work in parts for part in work)} bytes")
    tokenizer = train_tokenizer([text for begin, _, end in parts for text in (begin, end)], CONFIG.vocab)
    tokens = encode(tokenizer, [text for begin, _, end in parts for text in (begin, end + END)])
    held_out = [text for _, text, _ in parts]
    trainer = Trainer(CONFIG, recipe)
    wall, cpu = time.perf_counter(), time.process_time()
    curve: list[tuple[int, float]] = []
    for done in train(trainer, tokens, console):
        if done == recipe.steps:
            trainer.round_to_half()
        curve.append((done, trainer.bits_per_byte(tokenizer, held_out)))
        console.print(f"step {done}: {curve[-1][1]:.3f} bits per byte of held-out text")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    prompt = tokenizer.encode(PROMPT).ids
    temperatures = {"Greedy": 0.0, "Temperature 0.8": 0.8}
    figures = Figures(
        steps=recipe.steps,
        batch=recipe.batch,
        context=recipe.context,
        long_context=recipe.long_context,
        peak_rate=recipe.peak_rate,
        seed=recipe.seed,
        train_bytes=sum(len(begin) + len(end) for begin, _, end in parts),
        train_tokens=len(tokens),
        held_out_bytes=sum(map(len, held_out)),
        curve=curve,
        wall=wall,
        cpu=cpu,
        samples={
            title: PROMPT + tokenizer.decode(trainer.generate(prompt, 120, temperature))
            for title, temperature in temperatures.items()
        },
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_weights(CONFIG, trainer.arrays(), arguments.out)
    save_settings(CONFIG, tokenizer, arguments.out)
    (arguments.out / "README.md").write_text(card(CONFIG, figures))
    console.print(f"wrote {arguments.out} after {wall / 60:.1f} minutes ({cpu / 60:.1f} of processor time)")


if __name__ == "__main__":
    main()
