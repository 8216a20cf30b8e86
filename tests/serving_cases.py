"""Tiny models, and the shortest way to serve them on any mesh without a planner: what the device tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from recording_log import RecordingLog

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.pages import PageAllocator
from spotjax.engine.replica import Replica
from spotjax.engine.request import RequestState, SamplingParams
from spotjax.engine.scheduler import Limits, Scheduler
from spotjax.engine.sequence import Sequence as ScheduledSequence
from spotjax.engine.structure import Guide
from spotjax.meshes.layout import shard_index, shard_shape, split_layers, stage_holds
from spotjax.meshes.shape import MeshShape
from spotjax.meshes.sharding import assemble, stage_mesh
from spotjax.meshes.slices import Index
from spotjax.models.checkpoint import Checkpoint
from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.huggingface import HuggingFaceCheckpoint
from spotjax.models.spec import ArraySpec, ModelSpec
from spotjax.runtime.buckets import Buckets
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.pipeline import LocalPipeline
from spotjax.runtime.stage import Stage

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
PAGES, PAGE_SIZE, POSITIONS = 65, 8, 64
BUCKETS = Buckets(max_batch=4, prefill_tokens=16, page_size=PAGE_SIZE, max_positions=POSITIONS)
LONGER = Buckets(max_batch=4, prefill_tokens=16, page_size=PAGE_SIZE, max_positions=104)
"""For the longest golden prompt and its continuation."""


class FewBuckets(Buckets):
    """All decode steps have room for ``max_batch`` rows: less to compile for a model that few tests run."""

    @property
    def decode_rows(self) -> tuple[int, ...]:
        """One number of rows."""
        return (self.max_batch,)


SHARED_HEADS = DecoderConfig(
    vocab=97, width=24, layers=3, heads=12, kv_heads=4, head_size=4, mlp=50, max_positions=POSITIONS
)
"""Vocabulary and feed-forward width that split unevenly, kv heads that 3 and 6 shards share irregularly."""
_GPT = replace(
    SHARED_HEADS, kv_heads=12, norm="layer", gated_mlp=False, attention_bias=True, output_bias=True, mlp_bias=True
)
OPT = replace(_GPT, positions="learned", activation="relu", tied_embeddings=True)
NEOX = replace(_GPT, rotary_size=2, parallel_residual=True, activation="gelu")
POST_NORM = replace(OPT, norm_place="after", embedding_width=10)
GEMMA = replace(
    SHARED_HEADS,
    windows=(4, None),
    local_rope_base=500.0,
    norm_place="both",
    zero_centered_norm=True,
    activation="gelu_tanh",
    attention_scale=0.4,
    attention_softcap=3.0,
    logit_softcap=5.0,
    embedding_scale=24.0**0.5,
    tied_embeddings=True,
    qk_norm=True,
)
EXPERTS = replace(SHARED_HEADS, mlp=10, experts=Experts(4, 2, normalized=False, shared_mlp=7))
"""The other architectures, as small. ``GEMMA`` has layers of two kinds, and what Gemma 2 and Gemma 3 have."""


class Letters:
    """A tokenizer whose tokens are letters."""

    end_tokens: frozenset[int] = frozenset()

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens)


class RandomCheckpoint:
    """Normal weights of variance 1 / fan-in, sharpened so that greedy choices are clear."""

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        self.spec = ModelSpec(config)
        self._seed = seed
        self._arrays: dict[str, np.ndarray] = {}

    def whole(self, name: str) -> np.ndarray:
        if not self._arrays:
            generator, arrays = np.random.default_rng(self._seed), {}
            for array in self.spec.parameters:
                inputs = array.shape[array.axes[0] == "expert"]
                fan_in = np.prod(array.shape[:-1]) if array.name.endswith("output") else inputs
                scale = 1.0 if len(array.shape) < 2 else 2.0 * float(fan_in) ** -0.5
                content = generator.normal(0, scale, array.shape).astype(np.float32)
                scales = array.name.endswith(("scale", "_norm"))
                arrays[array.name] = 1 + content * np.float32(0.2) if scales else content
            self._arrays = arrays  # at once, because several threads read
        return self._arrays[name]

    def read(self, name: str, index: Index) -> np.ndarray:
        return self.whole(name)[tuple(slice(*extent) for extent in index)]

    def close(self) -> None:
        """Nothing is open."""


@cache
def checkpoint(case: str) -> HuggingFaceCheckpoint:
    """A golden checkpoint."""
    return HuggingFaceCheckpoint(GOLDEN / case)


@cache
def golden(case: str) -> Mapping[str, np.ndarray]:
    """What Hugging Face computed, see ``tools/make_golden.py``."""
    with np.load(GOLDEN / case / "golden.npz") as file:
        return dict(file)


@cache
def compiled(case: str) -> CompiledModel:
    """Compiled functions of a golden model, shared by all tests."""
    return CompiledModel(checkpoint(case).spec, PAGES, PAGE_SIZE, POSITIONS, jnp.float32)


@cache
def random_weights(config: DecoderConfig) -> tuple[CompiledModel, RandomCheckpoint]:
    """A model with random weights, shared by all tests."""
    weights = RandomCheckpoint(config)
    return CompiledModel(weights.spec, PAGES, PAGE_SIZE, POSITIONS, jnp.float32), weights


def shared_heads() -> tuple[CompiledModel, RandomCheckpoint]:
    """The model of ``SHARED_HEADS``."""
    return random_weights(SHARED_HEADS)


def shard(weights: Checkpoint, array: ArraySpec, tensor: int, m: int) -> np.ndarray:
    """What tensor shard ``m`` holds of an array, padding included."""
    part = weights.read(array.name, shard_index(array, weights.spec, tensor, m))
    content = np.zeros(shard_shape(array, weights.spec, tensor), part.dtype)
    content[tuple(slice(extent) for extent in part.shape)] = part
    return content


def build_stage(
    model: CompiledModel, weights: Checkpoint, devices: Sequence[jax.Device], stages: int, number: int
) -> Stage:
    """Stage ``number`` of ``stages`` on the given devices, with empty KV pages."""
    group, tensor = tuple(devices), len(devices)
    ranges, mesh = split_layers(model.spec.config.layers, stages), stage_mesh(group)
    parameters = {
        array.name: assemble(
            array,
            model.spec,
            mesh,
            [
                jax.device_put(shard(weights, array, tensor, m).astype(model.parameter_dtype(array.name)), device)
                for m, device in enumerate(group)
            ],
        )
        for array in model.spec.parameters
        if stage_holds(array, model.spec, ranges, number)
    }
    last = number == stages - 1
    stage = Stage(model, group, ranges[number], first=number == 0, last=last, parameters=parameters)
    stage.pages = {layer: stage.empty_pages() for layer in range(*ranges[number])}
    return stage


def build_pipelines(
    model: CompiledModel, weights: Checkpoint, shape: MeshShape, *, fuse: bool = False, buckets: Buckets = BUCKETS
) -> list[LocalPipeline]:
    """One pipeline per replica on the first D * P * M devices."""
    devices = iter(jax.devices())
    return [
        LocalPipeline(
            model,
            buckets,
            [
                build_stage(model, weights, [next(devices) for _ in range(shape.tensor)], shape.stage, p)
                for p in range(shape.stage)
            ],
            fuse=fuse,
        )
        for _ in range(shape.data)
    ]


def greedy(prompt: Iterable[int], new_tokens: int) -> RequestState:
    """A sequence that is continued with the most likely tokens."""
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0)
    return RequestState("greedy", 0, tuple(int(token) for token in prompt), sampling)


def generate(
    pipelines: Sequence[LocalPipeline], states: Sequence[RequestState], guide: Guide | None = None
) -> list[RequestState]:
    """Runs sequences (choice 0) to their ends, spread over the replicas, and closes the pipelines."""
    return asyncio.run(_generate(pipelines, states, guide))


async def _generate(
    pipelines: Sequence[LocalPipeline], states: Sequence[RequestState], guide: Guide | None
) -> list[RequestState]:
    log = RecordingLog()
    remaining = len(states)

    def deliver(changed: Sequence[RequestState]) -> None:
        nonlocal remaining
        remaining -= sum(state.finish is not None for state in changed)
        if not remaining:
            for replica in replicas:
                replica.stop()

    replicas = []
    for pipeline in pipelines:
        limits = Limits(BUCKETS.max_batch, BUCKETS.prefill_tokens, pipeline.depth, BUCKETS.prefill_fits)
        scheduler = Scheduler(limits, PageAllocator(PAGES, PAGE_SIZE))
        replicas.append(Replica(scheduler, pipeline, log, Letters(), deliver, guide=guide))
    names = [f"sequence-{number}" for number in range(len(states))]
    for number, (name, state) in enumerate(zip(names, states, strict=True)):
        named = replace(state, request_id=name)
        log.accept(GenerationRequest(name, state.prompt, state.sampling), [named], number)
        replicas[number % len(replicas)].scheduler.add(ScheduledSequence(number, named))
    await asyncio.gather(*(replica.run() for replica in replicas))
    for replica, pipeline in zip(replicas, pipelines, strict=True):
        replica.scheduler.check()
        assert replica.scheduler.pages.free == replica.scheduler.pages.total
        pipeline.close()
    return [log.states(name)[0] for name in names]
