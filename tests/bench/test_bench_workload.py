"""What is asked for is as long as asked for, the same for a seed, and other than what was asked before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from spotjax.bench.arrivals import Arrivals
from spotjax.bench.lengths import Fixed, Lognormal, Uniform, parse_lengths
from spotjax.bench.prompts import WORDS, GivenPrompt, TokenIds, TokenText, Vocabulary, Words, read_prompts
from spotjax.bench.workload import Workload
from spotjax.errors import ConfigError
from spotjax.sim.workload import RequestTrace

ALL = Arrivals("all")
RANDOM = np.random.default_rng


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """Bytes, some pairs of them, and a special token: pairs that meet join into other tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "abc" for b in "abc"]
    tokens = [*alphabet, *(a + b for a, b in pairs)]
    made = tokenizers.Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    made.add_special_tokens(["<end>"])
    return Vocabulary(made)


def test_lengths_are_spelled_as_the_help_says() -> None:
    assert parse_lengths("--x", "128") == Fixed(128)
    assert parse_lengths("--x", "uniform:mean=10,ratio=0.5") == Uniform(10, 0.5)
    assert parse_lengths("--x", "lognormal:mean=10,cv=2,most=64") == Lognormal(10, 2, 64)
    assert parse_lengths("--x", "lognormal:mean=10,cv=0") == Lognormal(10, 0, None)


@pytest.mark.parametrize(
    "text",
    ["", "0", "1.5", "x", "normal:mean=1", "uniform:mean=5", "uniform:mean=5,ratio=1", "uniform:mean=5,ratio=0,x=1",
     "lognormal:mean=0,cv=1", "lognormal:mean=5,cv=-1", "lognormal:mean=5,cv=1,most=0", "lognormal:mean=nan,cv=1"],
)  # fmt: skip
def test_lengths_of_no_meaning_are_refused_by_the_flags_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-tokens"):
        parse_lengths("--prompt-tokens", text)


def test_uniform_lengths_are_those_of_vllms_random_data_set() -> None:
    drawn = Uniform(10, 0.25).draw(5000, RANDOM(0))
    assert set(drawn) == set(range(7, 14))  # floor(7.5) to ceil(12.5)
    assert np.bincount(drawn)[7:].min() > 600
    assert set(Uniform(1, 0.9).draw(100, RANDOM(0))) == {1, 2}


def test_lognormal_lengths_have_their_mean_and_limit() -> None:
    drawn = Lognormal(200, 1.0, None).draw(50_000, RANDOM(1))
    assert drawn.mean() == pytest.approx(200, rel=0.03) and drawn.std() / drawn.mean() == pytest.approx(1, rel=0.05)
    assert Lognormal(200, 1.0, 256).draw(1000, RANDOM(1)).max() == 256


def test_words_are_as_many_as_tokens_and_each_is_there_once() -> None:
    text, tokens = Words().draw(40, RANDOM(0))
    assert isinstance(text, str) and len(text.split()) == 40 == tokens and set(text.split()) <= set(WORDS)
    assert len(set(WORDS)) == len(WORDS) > 200


def test_text_of_tokens_has_the_length_that_is_said(vocabulary: Vocabulary) -> None:
    exact = 0
    for seed in range(40):
        text, tokens = TokenText(vocabulary).draw(30, RANDOM(seed))
        assert isinstance(text, str) and tokens == vocabulary.count(text) and "<end>" not in text
        exact += tokens == 30
    assert exact > 30


def test_special_tokens_are_never_drawn_and_the_tokenizer_is_read_from_a_directory(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    vocabulary._tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = Vocabulary.read(tmp_path)
    assert read.usable == vocabulary.usable == tuple(range(len(read.usable)))
    assert read.encode("<end>") == [len(read.usable)]
    with pytest.raises(ConfigError, match="--tokenizer"):
        Vocabulary.read(tmp_path / "none")


def test_a_seed_gives_the_same_requests_and_each_point_and_the_warm_up_others() -> None:
    workload = Workload(20, Arrivals("poisson", 2.0), Uniform(9, 0.5), Fixed(3), TokenIds(range(1000)), seed=4)
    assert workload.plan() == workload.plan()
    asked = [
        {request.prompt for request in plan} for plan in (workload.plan(0), workload.plan(1), workload.warm_up(20))
    ]
    assert not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])
    assert all(request.arrival == 0 for request in workload.warm_up(3))


def test_another_rate_asks_for_the_same_prompts() -> None:
    slow, fast = (
        Workload(10, Arrivals("poisson", rate), Uniform(9, 0.5), Uniform(5, 0.5), Words()).plan() for rate in (1.0, 9.0)
    )
    assert [(r.prompt, r.output_tokens) for r in slow] == [(r.prompt, r.output_tokens) for r in fast]
    assert [r.arrival / 9 for r in slow] == pytest.approx([r.arrival for r in fast])


def test_prompts_of_a_run_begin_alike_where_that_is_asked_for() -> None:
    plan = Workload(5, ALL, Fixed(4), Fixed(1), TokenIds(range(1000)), shared_prefix=6).plan()
    assert len({request.prompt[:6] for request in plan}) == 1 and len({request.prompt[6:] for request in plan}) == 5
    assert all(request.prompt_tokens == 10 == len(request.prompt) for request in plan)


def test_a_trace_gives_arrivals_and_lengths_and_can_be_stretched() -> None:
    trace = RequestTrace.of("t", [2.0, 3.0, 7.0, 8.0], [5, 6, 7, 8], [1, 2, 3, 4])
    plan = Workload(3, Arrivals("trace"), None, None, TokenIds(range(50)), trace=trace).plan()
    assert [(r.arrival, r.prompt_tokens, r.output_tokens) for r in plan] == [(0, 5, 1), (1, 6, 2), (5, 7, 3)]
    twice = Workload(4, Arrivals("trace", 1.0), None, Fixed(9), Words(), trace=trace).plan()
    assert [r.arrival for r in twice] == pytest.approx([0, 0.5, 2.5, 3]) and twice[0].output_tokens == 9
    with pytest.raises(ConfigError, match="--requests 5"):
        Workload(5, Arrivals("trace"), None, None, Words(), trace=trace)


def test_prompts_of_a_file_are_taken_in_turn_and_may_say_how_long_their_output_is(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("One.\n\nTwo {x}.\n")
    lines.write_text('{"prompt": "One.", "output_tokens": 5}\n{"prompt": "Two."}\n')
    assert read_prompts(text) == [GivenPrompt("One."), GivenPrompt("Two {x}.")]
    plan = Workload(3, ALL, None, Fixed(2), Words(), given=read_prompts(lines)).plan()
    assert [(r.prompt, r.prompt_tokens, r.output_tokens) for r in plan] == [
        ("One.", None, 5),
        ("Two.", None, 2),
    ] * 1 + [("One.", None, 5)]


@pytest.mark.parametrize("line", ['{"prompt": ""}', '{"prompt": "a", "output_tokens": 0}', '{"text": "a"}', "a", ""])
def test_a_bad_line_of_prompts_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=r"prompts.jsonl(, line 1| has no prompts)"):
        read_prompts(path)
