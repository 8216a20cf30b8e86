"""What structured output costs: masks by themselves, and the rate of sequences of which some have a structure.

``python -m spotjax.tools.bench_structured`` walks at random through structures over the vocabulary of
SmolLM2-135M-Instruct and times compilation, masks and the taking in of tokens. Then it serves the model in float32 on
one device: 32 sequences of 64-token prompts and 48 new tokens, of which 0, 1, 8 or 32 have a structure, in turns in one
process. Prints tables; rates are medians, and relative to none in the same round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from spotjax import embedded
from spotjax.config import ServeConfig
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.engine.structure import GuidedRow, Structure, StructureKind, Tokens
from spotjax.models.catalog import Model, open_model
from spotjax.structured.grammars import Grammars, compile_structure
from spotjax.structured.guide import StructureGuide
from spotjax.structured.vocabulary import Vocabulary

MODEL = "smollm2-135m-instruct"
ROWS, PROMPT, NEW = 32, 64, 48
BOUND = (0, 1, 8, 32)
WALK = 200
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
STRUCTURES = {
    "schema": Structure(StructureKind.JSON_SCHEMA, json.dumps(PERSON)),
    "any object": Structure(StructureKind.JSON_OBJECT),
    "regex": Structure(StructureKind.REGEX, r"[A-Z][a-z]+( [A-Z][a-z]+)*, \d{4}-\d{2}-\d{2}: .*"),
    "grammar": Structure(StructureKind.GRAMMAR, 'start: sum\nsum: term ("+" term)*\nterm: /[0-9]+/ | "(" sum ")"'),
}
ENDLESS = Structure(StructureKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "string"}, "minItems": 99}')
"""Has more to say than is asked for."""
console = Console()


def walked(vocabulary: Vocabulary, structure: Structure, seed: int) -> tuple[float, list[float], list[float]]:
    """Seconds of compiling, of every mask and of every token that is taken in, on a random walk."""
    began = time.perf_counter()
    matcher = compile_structure(structure, vocabulary)
    compiled = time.perf_counter() - began
    draw, masks, taken = np.random.default_rng(seed), list[float](), list[float]()
    for _ in range(WALK):
        began = time.perf_counter()
        mask = matcher.compute_bitmask()
        masks.append(time.perf_counter() - began)
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        going_on = [int(token) for token in allowed if token not in vocabulary.end_tokens]
        token = int(draw.choice(going_on))
        began = time.perf_counter()
        matcher.consume_token(token)
        taken.append(time.perf_counter() - began)
        if matcher.is_stopped():
            matcher.reset()
    return compiled, masks, taken


def show_masks(vocabulary: Vocabulary) -> None:
    """Prints a table of all structures."""
    table = Table("structure", "compile ms", "mask us, median", "99 %", "longest", "token us, median", "99 %")
    for name, structure in STRUCTURES.items():
        compiled, masks, taken = walked(vocabulary, structure, 0)
        figures = (*np.percentile(masks, (50, 99, 100)), *np.percentile(taken, (50, 99)))
        table.add_row(name, f"{1e3 * compiled:.1f}", *(f"{1e6 * figure:.0f}" for figure in figures))
    console.print(table)


def show_rows(vocabulary: Vocabulary) -> None:
    """Prints how long masks of many rows take together."""
    guide = StructureGuide(Grammars(lambda: vocabulary))
    table = Table("rows", "all masks of a step, us")
    for rows in (1, 8, 32):
        matchers = [guide.matcher(ENDLESS, ends=False) for _ in range(rows)]
        draw, tokens, seconds = np.random.default_rng(0), [Tokens()] * rows, list[float]()
        for _ in range(40):
            began = time.perf_counter()
            masks = guide.masks({row: GuidedRow(matchers[row], tokens[row]) for row in range(rows)}).result()
            seconds.append(time.perf_counter() - began)
            for row in range(rows):
                bits = np.unpackbits(masks.words[row].view(np.uint8), bitorder="little")
                tokens[row] = (*tokens[row], int(draw.choice(np.flatnonzero(bits))))
        table.add_row(str(rows), f"{1e6 * statistics.median(seconds):.0f}")
    console.print(table)


async def seconds_of(server: embedded.EmbeddedServer, tag: str, bound: int, prompts: np.ndarray) -> float:
    """Seconds from the first token of the last sequence to the last token of all."""
    free = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    held = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, structure=ENDLESS)
    await server.grammars.check(ENDLESS)
    firsts: list[float] = []

    async def read(row: int) -> None:
        request = GenerationRequest(f"{tag}-{row}", tuple(prompts[row].tolist()), held if row < bound else free)
        await server.service.submit(request)
        first = True
        async for _ in server.service.stream(request.request_id):
            if first:
                firsts.append(time.perf_counter())
                first = False

    await asyncio.gather(*(read(row) for row in range(len(prompts))))
    return time.perf_counter() - max(firsts)


async def show_rates(model: Model, rounds: int) -> None:
    """Prints rates with and without structures."""
    config = ServeConfig(
        model=model.name, instances=1, devices_per_instance=1, mesh="1x1x1", max_batch=ROWS, max_model_len=256,
        prefill_tokens=256, durability="none", prefix_cache=False,
    )  # fmt: skip
    vocab = model.checkpoint.spec.config.vocab
    prompts = np.random.default_rng(0).integers(0, vocab, (ROWS, PROMPT)).astype(np.int32)
    server = await embedded.serve_model(config, model, embedded.local_instances(1, 1))
    found: dict[int, list[float]] = {bound: [] for bound in BOUND}
    try:
        for turn in range(rounds + 1):  # the first compiles whole stages
            for bound in BOUND:
                seconds = await seconds_of(server, f"{turn}-{bound}", bound, prompts)
                await asyncio.to_thread(server.cluster.model.executables.wait_for_background)
                if turn:
                    found[bound].append(seconds)
    finally:
        await server.close()
    table = Table("sequences with a structure, of 32", "tokens/s", "time, of that without")
    for bound, all_seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(all_seconds, found[0], strict=True))
        rate = ROWS * (NEW - 1) / statistics.median(all_seconds)
        table.add_row(str(bound), f"{rate:.0f}", f"{ratio:.3f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help=f"name or directory (default: {MODEL})")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every count (default: 5); 0 times masks only")
    options = parser.parse_args(argv)
    model = open_model(options.model)
    vocabulary = Vocabulary(model.tokenizer, model.checkpoint.spec.config.vocab)
    show_masks(vocabulary)
    show_rows(vocabulary)
    if options.rounds:
        asyncio.run(show_rates(model, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
