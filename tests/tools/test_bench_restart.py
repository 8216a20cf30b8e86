"""What the benchmark of restarts says of starts, and its readings of parameters. It is not run here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest

from spotjax.checkpoint.convert import convert
from spotjax.engine.generation import Delta
from spotjax.meshes.slices import whole
from spotjax.models.catalog import open_model
from spotjax.tools import cold_reads
from spotjax.tools.bench_restart import Client, write_huggingface
from spotjax.tools.start_phases import Way, compared, medians, what_happened

RECORDS = [
    {"message": "a line of another program"},
    {"message": "joining the fleet of 127.0.0.1:1", "time": 12.0},
    {"message": "joining the fleet of 127.0.0.1:1", "time": 13.0},
    {"message": "", "event": "plan", "time": 15.0},
    {"message": "", "event": "precopy", "time": 19.0, "bytes_loaded": 8_000_000},
    {"message": "", "event": "switch", "time": 19.5, "kept": 2},
    {"message": "", "event": "plan", "time": 90.0},
]


def test_the_phases_of_a_start_make_up_its_time() -> None:
    start = what_happened(10.0, RECORDS, [23.5, 21.5])
    assert (start.processes, start.programs, start.parameters, start.kv) == (3.0, 2.0, 4.0, 0.5)
    assert (start.first_token, start.last_token, start.kept) == (2.0, 2.0, 2)
    assert (start.to_first, start.to_last) == (11.5, 13.5)
    row = medians(Way("restart"), [start])
    assert row["parameter_MB_per_second"] == 2.0 and row["with_kv"] == 2


def test_new_services_are_compared_with_those_that_go_on() -> None:
    slow, fast = what_happened(0.0, RECORDS, [24.0]), what_happened(10.0, RECORDS, [22.0])
    (row,) = compared({Way("restart"): [fast, fast], Way("plain", asks_again=True): [slow, slow]})
    assert row == {"ways": "plain / restart", "to_first": 2.0, "to_last": 2.0}


def test_a_start_without_a_mesh_is_none() -> None:
    with pytest.raises(KeyError, match="precopy"):
        what_happened(10.0, RECORDS[:4], [23.0])


def test_both_forms_of_a_model_hold_the_same_and_can_be_read_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_reads, "CACHES", tmp_path / "caches")  # the machine keeps its cache
    plain, converted = tmp_path / "plain", tmp_path / "converted"
    write_huggingface("tiny", plain)
    convert(open_model(str(plain)), str(converted))
    there, here = open_model(str(plain)).checkpoint, open_model(str(converted)).checkpoint
    assert there.spec == here.spec == open_model("tiny").checkpoint.spec
    for array in there.spec.parameters:
        index = whole(array.shape)
        np.testing.assert_array_equal(there.read(array.name, index), here.read(array.name, index))
    rows = cold_reads.against_disk((converted, plain), 1)
    assert [row["model"] for row in rows] == ["converted", "plain"]
    assert all(row["parameter_bytes"] == 4 * sum(a.size for a in here.spec.parameters) for row in rows)
    assert (tmp_path / "caches").read_text() == "3"


def test_no_privilege_no_cold_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_reads, "CACHES", tmp_path / "nowhere" / "caches")
    assert not cold_reads.forget_files()


async def deltas(*pieces: tuple[int, tuple[int, ...]]) -> AsyncGenerator[Delta, None]:
    for offset, tokens in pieces:
        yield Delta("0", 0, offset, tokens, "")


async def test_a_client_compares_what_it_is_told_with_what_it_knows() -> None:
    client = Client("0", [1], {})
    await client.follow(deltas((0, (5, 6)), (2, (7,))))
    client.known, client.first = 3, 0.0
    await client.follow(deltas((1, (6, 7))))
    assert client.first == 0.0
    await client.follow(deltas((3, (8,))))
    assert client.first and client.tokens == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="tokens from 2 on are not those of before"):
        await client.follow(deltas((2, (7, 9))))
