"""A worker saves what it is told to, and finds what was saved."""

from __future__ import annotations

from pathlib import Path

from ledger_cases import Row, arrays
from serving_cases import PAGE_SIZE, SHARED_HEADS, shared_heads
from worker_cases import Case, two_replicas

from spotjax.checkpoint.completion import find_record
from spotjax.protocol import control
from spotjax.worker.ledger import StageLedger

LAYERS = two_replicas().layers
PIPELINES = ("1.0", "1.1")


def compute(ledger: StageLedger, key: int, positions: int, pages: list[int]) -> None:
    """What a step tells that has computed KV."""
    rows: list[Row] = [(key, 0, positions, pages)]
    ledger.begin([key], *arrays(rows))
    ledger.written([key], arrays(rows)[0])


async def test_parameters_of_its_stages_of_replica_0_are_saved_and_no_others(case: Case, tmp_path: Path) -> None:
    await case.adopt(two_replicas(), PIPELINES)
    done = await case.worker.carry_out(control.SaveParameters(4, str(tmp_path)))
    parts = ["embedding", *(f"layers.{layer}" for layer in range(SHARED_HEADS.layers)), "output"]
    expected = ["embedding", *(f"layers.{layer}" for layer in range(*LAYERS[0]))]
    records = {part: record for part in parts if (record := find_record(str(tmp_path), part)) is not None}
    assert list(records) == expected and done.moved == sum(record.bytes for record in records.values())
    again = await case.worker.carry_out(control.SaveParameters(5, str(tmp_path)))
    assert again.moved == done.moved, "what is there already is part of it"


async def test_without_a_mesh_there_is_nothing_to_save(case: Case, tmp_path: Path) -> None:
    assert (await case.worker.carry_out(control.SaveParameters(1, str(tmp_path)))).moved == 0
    case.worker.expect_save(str(tmp_path))
    done = await case.worker.carry_out(control.SaveKv(2, str(tmp_path), 30.0, last=True))
    assert (done.moved, done.left_out) == (0, "")


async def test_kv_that_was_saved_is_a_copy_for_who_is_told_of_it(case: Case, tmp_path: Path) -> None:
    case.worker.serve(control.Welcome(case.worker.setup, 1, 2.0, "service", 0, reunion=False))
    await case.adopt(two_replicas(), PIPELINES)
    compute(case.worker._kv.ledgers[0, 0], 5, PAGE_SIZE + 3, [4, 7])
    compute(case.worker._kv.ledgers[1, 1], 6, 2, [4])
    for number, last in enumerate((False, True)):
        case.worker.expect_save(str(tmp_path))
        done = await case.worker.carry_out(control.SaveKv(4 + number, str(tmp_path), 30.0, last))
    spec = shared_heads()[0].spec.config
    row = 2 * spec.kv_heads * spec.head_size * PAGE_SIZE * 4
    here = [stop - start for start, stop in LAYERS]
    assert (done.moved, done.left_out) == (row * (2 * here[0] + here[1]), "")

    await case.worker.carry_out(control.Clear(6))
    sequences = (5, 6)

    async def covered(stage: int, *save: object) -> tuple[int, ...]:
        command = control.Coverage(7, LAYERS[stage], sequences, *save)  # type: ignore[arg-type]
        return (await case.worker.carry_out(command)).positions

    assert await covered(0) == (0, 0)
    assert await covered(0, str(tmp_path), ((5, 9), (6, 2))) == (9, 0)
    assert await covered(1, str(tmp_path), ((5, 9), (6, 2))) == (0, 2)
    assert await covered(0, str(tmp_path), ((6, 2),)) == (0, 0)
    case.worker.serve(control.Welcome(case.worker.setup, 1, 2.0, "another", 0, reunion=False))
    assert await covered(0, str(tmp_path), ((5, 9), (6, 2))) == (0, 0)
