"""What nobody should send is refused by all that reads from outside; the tool tries far more of it."""

from __future__ import annotations

from random import Random

import pytest

from spotjax.tools import fuzz, fuzz_inputs


def test_hundreds_of_inputs_that_nobody_should_send_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--inputs", "500", "--seed", "1"]) == 0, capsys.readouterr().out
    assert "0 bugs" in capsys.readouterr().out.splitlines()[-1]


def test_an_error_that_is_no_refusal_is_a_bug_and_its_input_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(draw: Random) -> bool:
        if draw.random() < 0.2:
            raise KeyError("unexpected")
        return True

    monkeypatch.setitem(fuzz_inputs.OFFLINE, "keys", broken)
    assert fuzz.main(["--inputs", "1000", "--part", "keys"]) == 1
    name = next(line for line in capsys.readouterr().out.splitlines() if "KeyError" in line).split(":")[0].split()
    assert fuzz.main(["--part", name[0], "--only", name[1]]) == 1


def test_inputs_follow_from_seed_part_and_number() -> None:
    drawn = [fuzz_inputs.request(Random(f"0 requests {number}")) for number in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
