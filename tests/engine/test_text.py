"""The text of a sequence depends on its tokens alone, never on when they came or how text was cut into them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pure_model import END, Bytes

from spotjax.engine.request import FinishReason, Logprobs, RequestState, Sampled, SamplingParams
from spotjax.engine.text import advance, split_at_stop

BYTES = Bytes()


class Pieces:
    """Tokens are arbitrary runs of bytes, as in a byte-level BPE vocabulary."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode("utf-8", "replace")


def start(max_tokens: int, **sampling: object) -> RequestState:
    return RequestState("r", 0, (1,), SamplingParams(max_tokens=max_tokens, **sampling), BYTES.end_tokens)


def grown(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> list[RequestState]:
    """The states of a sequence whose tokens are these pieces, up to its end."""
    states = [start(len(pieces), stop=tuple(stop))]
    for token in range(len(pieces)):
        states.append(advance(states[-1], Sampled(token), Pieces(pieces)))
        if states[-1].finish is not None:
            break
    return states


def cut(text: str, stops: Sequence[str]) -> str:
    """What is left of a text that is written one character at a time until a stop text is complete."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


def cuts(content: bytes, random) -> list[bytes]:
    """The same bytes in random pieces."""
    places = sorted(random.sample(range(1, len(content)), random.randint(0, len(content) - 1)))
    return [content[a:b] for a, b in zip([0, *places], [*places, len(content)], strict=True)]


NEAR_UTF8 = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=3),
        st.sampled_from(["a", "é", "€", "😀", "\N{REPLACEMENT CHARACTER}"]).map(str.encode),
        st.sampled_from([b"\xf0\x9f\x98", b"\xe2\x82", b"\xe2", b"\x80", b"\xff"]),
    ),
    min_size=1,
    max_size=12,
)


@given(NEAR_UTF8)
@example([b"\x80"] * 7 + [b"\xe2", b"\x82", b"\xac"])
@example([b"hello\xe2"])
@example([b"\xf0", b"\x9f", b"\x98", b"\x80\xe2", b"\x82", b"\xac"])
def test_text_is_that_of_all_tokens_at_once(pieces: list[bytes]) -> None:
    states = grown(pieces)
    assert states[-1].text == b"".join(pieces).decode("utf-8", "replace")
    assert states[-1].finish is FinishReason.LENGTH


@given(NEAR_UTF8)
def test_one_byte_a_token_gives_the_same_text(pieces: list[bytes]) -> None:
    content = b"".join(pieces)
    assert grown([bytes([byte]) for byte in content])[-1].text == content.decode("utf-8", "replace")


@given(NEAR_UTF8, st.lists(st.sampled_from(["a", "é€", "aa", "😀a"]), max_size=2))
def test_text_only_grows_and_every_token_knows_where_its_text_ends(pieces: list[bytes], stops: list[str]) -> None:
    states = grown(pieces, stops)
    for before, after in pairwise(states):
        assert after.text.startswith(before.text)
        assert after.text_ends == (*before.text_ends, len(after.text))
    assert states[-1].pending == ""


def test_text_is_not_held_back_for_long_after_bytes_that_are_no_character() -> None:
    states = grown([b"\x80"] * 12)
    assert [len(state.tokens) - len(state.text) for state in states[4:-1]] == [3] * 8


@given(
    st.text("abé", min_size=1, max_size=12),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    st.randoms(use_true_random=False),
)
@example("abcd", ["abcd", "bc"], None)
def test_a_stop_text_ends_the_text_where_it_begins_however_tokens_are_cut(text: str, stops: list[str], random) -> None:
    content = text.encode()
    by_byte = [bytes([byte]) for byte in content]
    for pieces in [by_byte, [content]] + ([cuts(content, random)] if random else []):
        last = grown(pieces, stops)[-1]
        assert last.text == cut(text, stops)
        assert last.finish is (FinishReason.STOP if any(stop in text for stop in stops) else FinishReason.LENGTH)
        assert last.pending == ""


def test_text_in_which_a_stop_text_may_begin_is_held_back() -> None:
    states = grown([b"so", b" lo", b"ng", b"!"], stop=["long."])
    assert [(state.text, state.pending) for state in states[1:]] == [
        ("so", ""), ("so ", "lo"), ("so ", "long"), ("so long!", "")
    ]  # fmt: skip


def test_held_back_text_becomes_final_at_the_end() -> None:
    (*_, before, last) = grown([b"so", b" lo"], stop=["long"])
    assert (before.text, last.text, last.pending, last.finish) == ("so", "so lo", "", FinishReason.LENGTH)


def test_held_back_text_becomes_final_when_cancelled() -> None:
    state = grown([b"so", b" lo", b"x"], stop=["long"])[2].finished(FinishReason.CANCELLED)
    assert (state.text, state.pending, state.finish) == ("so lo", "", FinishReason.CANCELLED)
    assert state.text_ends == (2, 3), "a stream that ended at the last token still gets the rest"


def test_of_stop_texts_that_are_complete_together_the_longest_counts() -> None:
    assert split_at_stop("xabc", ["c", "abc", "bc"]) == ("x", "", True)


@pytest.mark.parametrize(
    ("sampling", "token", "reason"),
    [
        ({}, END, FinishReason.STOP),
        ({"ignore_eos": True}, END, None),
        ({"stop_token_ids": (65,)}, 65, FinishReason.STOP),
        ({"stop_token_ids": (65,), "ignore_eos": True}, 65, FinishReason.STOP),
        ({"stop": ("A",)}, 65, FinishReason.STOP),
        ({}, 65, None),
        ({"max_tokens": 1}, 65, FinishReason.LENGTH),
        ({"max_tokens": 1}, END, FinishReason.STOP),
        ({"max_tokens": 1, "stop": ("A",)}, 65, FinishReason.STOP),
    ],
)
def test_why_a_token_ends_a_sequence(sampling: dict[str, object], token: int, reason: FinishReason | None) -> None:
    state = advance(start(**{"max_tokens": 9} | sampling), Sampled(token), BYTES)
    assert state.finish is reason
    assert state.tokens == (token,)


def test_logprobs_are_kept_when_there_are_any() -> None:
    first = Logprobs(-0.5, ((65, -0.5),))
    state = advance(start(3, logprobs=1), Sampled(65, first), BYTES)
    assert advance(state, Sampled(66, first), BYTES).logprobs == (first, first)
    assert advance(start(3), Sampled(65), BYTES).logprobs == ()
