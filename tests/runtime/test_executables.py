"""Executables: compiled once, loaded anywhere, kept on disk, compiled again when the disk holds rubbish."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_cases import BUCKETS, PAGE_SIZE, PAGES, POSITIONS, SHARED_HEADS, build_stage, shared_heads

from spotjax.meshes.sharding import stage_mesh
from spotjax.models.spec import ModelSpec
from spotjax.runtime.buckets import Buckets, StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices, Executables, Key, Lower
from spotjax.runtime.program_cache import ProgramCache
from spotjax.runtime.warmup import warm

SHAPE = StepShape(1, 1, 8)


def programs_in(directory: Path) -> list[Path]:
    """Files of a program cache, less the locks."""
    return [file for file in directory.iterdir() if file.suffix != ".lock"]


def lower_sum(devices: Devices) -> jax.stages.Lowered:
    """Adds over all devices, and donates its argument."""
    mesh = stage_mesh(devices)
    spec = jax.sharding.PartitionSpec("tensor")
    at = jax.sharding.NamedSharding(mesh, spec)
    total = jax.shard_map(lambda x: x + jax.lax.psum(x, "tensor"), mesh=mesh, in_specs=spec, out_specs=spec)
    argument = jax.ShapeDtypeStruct((4 * len(devices),), jnp.float32, sharding=at)
    return jax.jit(total, donate_argnums=0, out_shardings=at).lower(argument)


def argument(devices: Devices) -> jax.Array:
    at = jax.sharding.NamedSharding(stage_mesh(devices), jax.sharding.PartitionSpec("tensor"))
    return jax.device_put(np.arange(4 * len(devices), dtype=np.float32), at)


def expected(count: int) -> np.ndarray:
    rows = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
    return (rows + rows.sum(0)).ravel()


def group(*numbers: int) -> Devices:
    return tuple(jax.devices()[number] for number in numbers)


@pytest.mark.parametrize(("first", "second"), [((0,), (5,)), ((0, 1), (6, 3)), ((0, 1, 2), (2, 0, 7))])
def test_a_function_is_compiled_once_and_gives_the_same_on_other_devices(
    first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    executables = Executables()
    for devices in (group(*first), group(*second), group(*first)):
        call = executables.get(("sum", len(devices)), devices, lower_sum)
        result = call(argument(devices))
        np.testing.assert_array_equal(result, expected(len(devices)))
        assert (
            tuple(part.device for part in sorted(result.addressable_shards, key=lambda s: s.index[0].start or 0))
            == devices
        )
    assert executables.compiled == 1
    executables.close()


def test_donation_works_on_the_devices_it_was_not_compiled_for() -> None:
    executables = Executables()
    for devices in (group(0, 1), group(4, 5)):
        given = jnp.copy(argument(devices))  # memory of the device's own, not of a numpy array
        pointers = [part.data.unsafe_buffer_pointer() for part in given.addressable_shards]
        result = executables.get(("sum", 2), devices, lower_sum)(given)
        assert given.is_deleted()
        assert [part.data.unsafe_buffer_pointer() for part in result.addressable_shards] == pointers
    executables.close()


def test_a_step_donates_its_pages_on_retargeted_devices() -> None:
    model, weights = shared_heads()
    rows, pages = np.array([[0, 1, 5]], np.int32), np.zeros((1, 8), np.int32)
    pages[0, 0] = 1
    logits = []
    for devices in (jax.devices()[:2], jax.devices()[4:6]):
        stage = build_stage(model, weights, devices, stages=1, number=0)
        before = [part.data.unsafe_buffer_pointer() for part in stage.pages[0][0].addressable_shards]
        kept = stage.pages[0]
        logits.append(np.asarray(stage.run(SHAPE, rows, pages, None)))
        assert all(array.is_deleted() for array in kept)
        assert [part.data.unsafe_buffer_pointer() for part in stage.pages[0][0].addressable_shards] == before
    np.testing.assert_array_equal(logits[0], logits[1])


def test_threads_that_ask_at_once_share_one_compilation() -> None:
    executables = Executables()
    start = threading.Barrier(6)

    def ask(number: int) -> jax.stages.Compiled:
        start.wait()
        return executables.get(("sum", 1), group(number % 3), lower_sum)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(6)))
    assert executables.compiled == 1
    assert all(found[number] is found[number + 3] for number in range(3))
    executables.close()


def test_background_compilation_is_there_afterwards_and_counted_apart() -> None:
    executables = Executables()
    assert executables.get_if_ready(("sum", 2), group(0, 1)) is None
    executables.request(("sum", 2), group(0, 1), lower_sum)
    executables.request(("sum", 2), group(2, 3), lower_sum)
    executables.wait_for_background()
    assert (executables.compiled, executables.compiled_in_background) == (0, 1)
    for devices in (group(0, 1), group(2, 3)):
        call = executables.get_if_ready(("sum", 2), devices)
        assert call is not None
        np.testing.assert_array_equal(call(argument(devices)), expected(2))
    executables.close()


def test_background_compilation_that_fails_costs_speed_not_service(caplog: pytest.LogCaptureFixture) -> None:
    def fail(devices: Devices) -> jax.stages.Lowered:
        raise ValueError("no such operation")

    executables = Executables()
    with caplog.at_level(logging.ERROR):
        executables.request(("broken",), group(0), fail)
        executables.wait_for_background()
    assert "background compilation of broken failed" in caplog.text
    assert executables.get_if_ready(("broken",), group(0)) is None
    executables.request(("sum", 1), group(0), lower_sum)
    executables.wait_for_background()
    assert executables.get_if_ready(("sum", 1), group(0)) is not None
    executables.close()


def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    for compiled in (1, 0):
        executables = Executables(ProgramCache(tmp_path))
        for devices in (group(3, 1), group(0, 2)):
            result = executables.get(("sum", 2), devices, lower_sum)(argument(devices))
            np.testing.assert_array_equal(result, expected(2))
        assert executables.compiled == compiled
        executables.close()


SECOND_PROCESS = """
import sys
import numpy as np
from test_executables import Executables, ProgramCache, Path, argument, expected, group, lower_sum
executables = Executables(ProgramCache(Path(sys.argv[1])))
np.testing.assert_array_equal(executables.get(("sum", 2), group(4, 6), lower_sum)(argument(group(4, 6))), expected(2))
print(executables.compiled)
"""


def test_another_process_compiles_nothing(tmp_path: Path) -> None:
    executables = Executables(ProgramCache(tmp_path))
    executables.get(("sum", 2), group(0, 1), lower_sum)
    executables.close()
    places = os.pathsep.join([*map(str, Path(__file__).parents[:2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr


@pytest.mark.parametrize("damage", [b"", b"rubbish", None], ids=["empty", "rubbish", "cut short"])
def test_a_damaged_program_is_compiled_again_with_a_warning(
    tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    executables = Executables(ProgramCache(tmp_path))
    executables.get(("sum", 1), group(0), lower_sum)
    executables.close()
    (entry,) = programs_in(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    again = Executables(ProgramCache(tmp_path))
    with caplog.at_level(logging.WARNING):
        result = again.get(("sum", 1), group(2), lower_sum)(argument(group(2)))
    np.testing.assert_array_equal(result, expected(1))
    assert again.compiled == 1 and "unusable and will be compiled again" in caplog.text
    again.close()
    third = Executables(ProgramCache(tmp_path))
    third.get(("sum", 1), group(1), lower_sum)
    assert third.compiled == 0
    third.close()


def test_a_program_is_found_by_its_key_alone(tmp_path: Path) -> None:
    ProgramCache(tmp_path).put("key", b"program")
    assert ProgramCache(tmp_path).get("key") == b"program"
    assert ProgramCache(tmp_path).get("other key") is None


def programs_of(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> dict[Key, Lower]:
    """All that a server makes ready on two devices, and how each is lowered."""
    asked: dict[Key, Lower] = {}
    with monkeypatch.context() as patch:
        patch.setattr(model.executables, "get", lambda key, devices, lower: asked.update({key: lower}))
        warm(model, Buckets(1, 1, PAGE_SIZE, POSITIONS), [group(0, 1)])
    return asked


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"pages": PAGES + 1}, {"embed", "logits", "sample", "fill in"}),
        ({"page_size": 2 * PAGE_SIZE}, {"embed", "logits", "sample", "fill in"}),
        ({"max_positions": POSITIONS // 2}, {"embed", "layers", "logits", "sample", "fill in", "read pages"}),
        ({"dtype": jnp.bfloat16}, {"sample", "fill in"}),
        ({"spec": ModelSpec(replace(SHARED_HEADS, mlp=60))}, {"sample", "fill in", "read pages"}),
        ({"spec": ModelSpec(replace(SHARED_HEADS, kv_heads=6))}, {"sample", "fill in"}),
        ({"spec": ModelSpec(replace(SHARED_HEADS, vocab=98))}, {"fill in", "read pages"}),
    ],
    ids=["pages", "page-size", "longest", "dtype", "width", "heads", "vocabulary"],
)
def test_programs_that_two_services_share_are_the_same_and_others_are_not_shared(
    change: dict[str, Any], kept: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"spec": ModelSpec(SHARED_HEADS), "pages": PAGES, "page_size": PAGE_SIZE, "max_positions": POSITIONS}
    one, other = (
        programs_of(CompiledModel(**{"dtype": jnp.float32, **settings, **changed}), monkeypatch)
        for changed in ({}, change)
    )
    shared = one.keys() & other.keys()
    assert kept <= {key[0] for key in shared} and shared != one.keys()
    for key in shared:
        devices = group(0) if key[0] in ("sample", "fill in") else group(0, 1)
        assert one[key](devices).as_text() == other[key](devices).as_text(), key


def test_the_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    ProgramCache(tmp_path / "programs").put("key", b"program")
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_written_costs_the_next_start_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "programs"
    cache = ProgramCache(directory)
    directory.rmdir()
    directory.write_text("not a directory")
    with caplog.at_level(logging.WARNING):
        cache.put("key", b"program")
        assert cache.get("key") is None
    assert "cannot write the program cache" in caplog.text


def test_fused_stages_give_what_single_layers_give() -> None:
    model, weights = shared_heads()
    rows, pages = np.array([[0, 1, 5]], np.int32), np.zeros((1, 8), np.int32)
    pages[0, 0] = 1
    single, fused = (build_stage(model, weights, jax.devices()[:2], stages=1, number=0) for _ in range(2))
    expected_logits = np.asarray(single.run(SHAPE, rows, pages, None))
    assert not fused.has_block(SHAPE)
    model.executables.wait_for_background()
    assert fused.has_block(SHAPE)
    np.testing.assert_allclose(fused.run(SHAPE, rows, pages, None), expected_logits, atol=1e-5)
    for layer, content in fused.pages.items():
        for ours, theirs in zip(content, single.pages[layer], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("windows", "kinds"), [((), 1), ((8,), 1), ((8, None), 2), ((None, 4, 8), 3)])
def test_a_layer_function_is_made_ready_for_each_kind_once(
    windows: tuple[int | None, ...], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec(replace(SHARED_HEADS, layers=6, windows=windows))
    model = CompiledModel(spec, PAGES, PAGE_SIZE, POSITIONS, jnp.float32)
    asked: list[Key] = []
    monkeypatch.setattr(model.executables, "get", lambda key, devices, lower: asked.append(key))
    warm(model, BUCKETS, [group(0)])
    assert len(asked) == len(set(asked))
    assert sum(key[0] == "layers" for key in asked) == kinds * len(BUCKETS.all_shapes())


def test_every_step_of_the_scheduler_finds_a_shape() -> None:
    find = partial(BUCKETS.shape, fine=True)
    for rows in range(1, BUCKETS.max_batch + 1):
        for pages in range(1, BUCKETS.max_pages + 1):
            for shape in (BUCKETS.shape(rows, 1, pages), find(rows, 1, pages)):
                assert shape.rows >= rows and shape.span == 1 and shape.pages >= pages
            assert BUCKETS.shape(rows, 1, pages) in BUCKETS.all_shapes()
    for span in range(2, BUCKETS.prefill_tokens + 1):
        assert BUCKETS.prefill_fits([span])
        assert BUCKETS.shape(1, span, 1) in BUCKETS.all_shapes()
    with pytest.raises(ValueError, match="no step shape holds"):
        BUCKETS.shape(BUCKETS.max_batch + 1, 1, 1)
    with pytest.raises(ValueError, match="no step shape holds"):
        BUCKETS.shape(1, BUCKETS.prefill_tokens + 1, 1)


def test_less_than_half_of_a_prompts_step_is_padding() -> None:
    buckets = Buckets(max_batch=8, prefill_tokens=256, page_size=16, max_positions=512)
    for length in range(16, buckets.prefill_tokens + 1):
        shape = buckets.shape(1, length, 1)
        assert shape.rows == 1 and length <= shape.span < 2 * length
    assert buckets.prefill_fits([128, 128]) and buckets.shape(2, 128, 8)[:2] == (2, 128)


SHARED = """
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import jax, jax.numpy as jnp
from spotjax.runtime.executables import Executables
from spotjax.runtime.program_cache import ProgramCache
from spotjax.runtime.warmup import warm

def lower(devices):
    at = jax.sharding.SingleDeviceSharding(devices[0])
    return jax.jit(lambda x: jnp.sum(x)).lower(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=at))

executables = Executables(ProgramCache(Path(sys.argv[1])))
for number in range(5):
    executables.get(("sum", number), (jax.devices()[0],), lower)
executables.close()
print(executables.compiled)
"""


def test_processes_that_start_together_share_the_work_of_compiling(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARED, str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    compiled = [int(process.communicate(timeout=120)[0]) for process in started]
    assert sum(compiled) == 5, f"each function once, by whoever came first: {compiled}"
