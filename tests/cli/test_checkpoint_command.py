"""``spotjax checkpoint``: what a running service saved, and what is in a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_cases import save
from command_line import CommandLine
from serving_cases import SHARED_HEADS, RandomCheckpoint

from spotjax import cli
from spotjax.checkpoint.saves import complete, next_path


async def test_parameters_are_saved_and_a_relative_directory_is_ours(
    command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = await command_line.run("checkpoint", "save", "here")
    assert code == 0 and out == f"saved to {tmp_path / 'here'} in 1.5 s\nparameters: 4 MiB\n"
    code, out, err = await command_line.run("checkpoint", "save", str(tmp_path / "here"))
    assert (code, out) == (1, "") and err == f"spotjax: {tmp_path / 'here'} is a complete checkpoint already\n"


async def test_the_state_is_saved_when_asked_for(command_line: CommandLine) -> None:
    await command_line.run("generate", "hello", "--request-id", "r")
    code, out, _ = await command_line.run("checkpoint", "save", "gs://bucket/here", "--state", "--no-parameters")
    assert code == 0
    assert out.splitlines()[1:] == ["requests: 1", "KV: 1 MiB for 0 sequences of 0 positions; not all that i-1 had"]
    _, out, _ = await command_line.run("checkpoint", "save", "/here", "--state", "--json")
    saved = json.loads(out)
    assert (saved["directory"], saved["parameter_bytes"], saved["left_out"]) == ("/here", 1 << 22, ["i-1"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--no-parameters"], "parameters: there is nothing to save"),
        (["--state", "--seconds", "0"], "seconds: must be in (0, 3600], got 0"),
    ],
)
async def test_what_makes_no_sense_is_refused(command_line: CommandLine, flags: list[str], said: str) -> None:
    code, _, err = await command_line.run("checkpoint", "save", "/here", *flags)
    assert code == 1 and said in err


def test_show_says_what_a_directory_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(RandomCheckpoint(SHARED_HEADS), tmp_path, "bfloat16")
    complete(next_path(str(tmp_path), "one"), "one", 7, 1, {1: 40, 2: 2})
    Path(next_path(str(tmp_path), "one")).mkdir()
    Path(next_path(str(tmp_path), "one") + ".generation").mkdir()
    assert cli.main(["checkpoint", "show", str(tmp_path)]) == 0
    numbers = RandomCheckpoint(SHARED_HEADS).spec.parameter_bytes // 4
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path),
        f"parameters: {numbers} as bfloat16, {2 * numbers / 1024:.3g} KiB in 5 parts",
        "save 1 of service one: KV of 2 sequences, at most 42 positions, epoch 7",
        "save 2 of service one: KV that was cut off and is not used",
        "save 3 of service one: no KV, requests with their tokens",
    ]
    assert cli.main(["checkpoint", "show", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["parameters"] == {
        "complete": True, "dtype": "bfloat16", "parts": 5, "bytes": 2 * numbers, "parameters": numbers
    }  # fmt: skip
    assert [one["kv"] for one in shown["saves"]] == ["complete", "cut off", "none"]


def test_show_tells_no_checkpoint_from_an_incomplete_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "show", str(tmp_path / "nowhere")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    cli.main(["checkpoint", "show", str(tmp_path)])
    assert "parameters: none" in capsys.readouterr().out
    (tmp_path / "parameters").mkdir()
    cli.main(["checkpoint", "show", str(tmp_path)])
    assert "parameters: incomplete" in capsys.readouterr().out
