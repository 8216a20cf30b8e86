"""Readers of recorded traces: what a good file means, and what is said of a bad line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spotjax.errors import ConfigError
from spotjax.sim.traces import azure, mooncake, own, skypilot, spotserve
from spotjax.sim.traces.formats import open_requests, open_spot
from spotjax.sim.workload import SpotEvent

SEGMENT = """[0, "add", {"nodes": ["node-0", "node-1"]}]
[120000, "add", {"nodes": ["node-2"], "required_tpt": 0.8}]
[300000, "other", {"nodes": [], "required_tpt": 0.6}]
[600500, "remove", {"nodes": ["node-0", "node-2"]}]
[720000, "DONE", {"nodes": []}]
"""
RECORD = "480000,add,node1\n480000,add,node2\n540000,remove,node1\n540000,add,node3\n"
QUERIES = "0,2.9,512,0\n1,5.75,256,2966\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:05.2299600,3180,8"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n'
    '{"timestamp": 1500, "input_length": 7322, "output_length": 490, "hash_ids": [0]}\n'
)
OWN_REQUESTS = "# from nowhere\nseconds,prompt,output\n\n0.25,512,128\n0.25,1,1\n"
OWN_SPOT = "seconds,added,removed,on_demand\n0.0,a b,,0\n5.5,c,a,1\n60,END\n"


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "trace.txt"
        path.write_bytes(text.encode())
        return path

    return write


def test_a_segment_keeps_which_instance_goes_and_what_is_required(file: Callable[[str], Path]) -> None:
    spot, required = spotserve.read_segment(file(SEGMENT))
    assert spot.events == (
        SpotEvent(0, added=("node-0", "node-1")),
        SpotEvent(120, added=("node-2",)),
        SpotEvent(600.5, removed=("node-0", "node-2")),
    )
    assert (spot.name, spot.duration) == ("trace", 720)
    assert required == [(120, 0.8), (300, 0.6)]


def test_what_a_record_says_of_one_time_is_one_event(file: Callable[[str], Path]) -> None:
    trace = spotserve.read_record(file(RECORD))
    assert trace.events == (SpotEvent(480, added=("node1", "node2")), SpotEvent(540, ("node3",), ("node1",)))
    assert trace.duration == 540
    assert spotserve.read_record(file(RECORD), duration=900).duration == 900


def test_an_instance_of_a_record_that_goes_and_is_back_at_once_has_two_events(file: Callable[[str], Path]) -> None:
    trace = spotserve.read_record(file("0,add,n\n1000,remove,n\n1000,add,n\n"))
    assert trace.events == (SpotEvent(0, added=("n",)), SpotEvent(1, removed=("n",)), SpotEvent(1, added=("n",)))


def test_a_record_must_not_end_before_its_last_line(file: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"540\.0 s is out of order or after 500 s"):
        spotserve.read_record(file(RECORD), duration=500)


def test_queries_get_their_number_of_new_tokens_from_the_caller(file: Callable[[str], Path]) -> None:
    trace = spotserve.read_queries(file(QUERIES), output=7)
    assert trace.arrival.tolist() == [2.9, 5.75]
    assert trace.prompt.tolist() == [512, 256]
    assert trace.output.tolist() == [7, 7]
    assert spotserve.read_queries(file(QUERIES)).output.tolist() == [128, 128]


def test_azure_times_count_from_the_first_request(file: Callable[[str], Path]) -> None:
    trace = azure.read_requests(file(AZURE))
    assert trace.arrival.tolist() == [0, 1.25]
    assert trace.prompt.tolist() == [4808, 3180]
    assert trace.output.tolist() == [10, 8]


def test_mooncake_blocks_are_ignored(file: Callable[[str], Path]) -> None:
    trace = mooncake.read_requests(file(MOONCAKE))
    assert trace.arrival.tolist() == [0, 1.5]
    assert trace.prompt.tolist() == [6758, 7322]
    assert trace.output.tolist() == [500, 490]


def test_counts_are_numbers_of_instances_and_a_cap_wants_no_more(file: Callable[[str], Path]) -> None:
    path = file('{"metadata": {"gap_seconds": 300}, "data": [0, 3, 3, 1, 4], "prices": [0.9]}')
    assert skypilot.read_counts(path).counts() == [(300, 3), (900, 1), (1200, 4)]
    assert skypilot.read_counts(path).duration == 1500
    assert skypilot.read_counts(path, cap=2).counts() == [(300, 2), (900, 1), (1200, 2)]


def test_ones_can_stand_for_preempted(file: Callable[[str], Path]) -> None:
    path = file('{"metadata": {"gap_seconds": 10}, "data": [0, 1, 1, 0]}')
    assert skypilot.read_counts(path).counts() == [(10, 1), (30, 0)]
    assert skypilot.read_counts(path, inverted=True).counts() == [(0, 1), (10, 0), (30, 1)]


def test_windows_of_one_record_are_instances_side_by_side(file: Callable[[str], Path]) -> None:
    path = file('{"metadata": {"gap_seconds": 10}, "data": [1, 1, 0, 0, 1, 0, 1, 1]}')
    trace = skypilot.shifted_windows(path, instances=3, duration=40)  # 1100, 0010, 1011
    assert trace.events == (
        SpotEvent(0, added=("w0-1", "w2-1")),
        SpotEvent(10, removed=("w2-1",)),
        SpotEvent(20, added=("w1-1", "w2-2"), removed=("w0-1",)),
        SpotEvent(30, removed=("w1-1",)),
    )
    assert trace.duration == 40
    assert skypilot.shifted_windows(path, 1, 80).counts() == skypilot.read_counts(path).counts()


@pytest.mark.parametrize(
    ("instances", "duration", "message"),
    [(0, 20, "0 windows"), (2, 90, "it has 40.0 s"), (2, 1, "in steps of 10.0 s"), (1, 30, "single instance")],
)
def test_windows_that_cannot_be_cut_are_refused(
    file: Callable[[str], Path], instances: int, duration: float, message: str
) -> None:
    data = "[0, 2, 1, 0]" if message == "single instance" else "[0, 1, 1, 0]"
    path = file(f'{{"metadata": {{"gap_seconds": 10}}, "data": {data}}}')
    with pytest.raises(ConfigError, match=message):
        skypilot.shifted_windows(path, instances, duration)


def test_our_own_formats_skip_comments_and_empty_lines(file: Callable[[str], Path]) -> None:
    requests = own.read_requests(file(OWN_REQUESTS))
    assert requests.arrival.tolist() == [0.25, 0.25]
    assert requests.prompt.tolist() == [512, 1]
    spot = own.read_spot(file("# a comment\n" + OWN_SPOT))
    assert spot.events == (SpotEvent(0, added=("a", "b")), SpotEvent(5.5, ("c",), ("a",), on_demand=True))
    assert spot.duration == 60


@pytest.mark.parametrize(
    ("read", "text", "number", "problem"),
    [
        (spotserve.read_segment, '[0, "add", {"nodes": []}]\n', 1, "'add' of 0 nodes"),
        (spotserve.read_segment, '[0, "other", {"nodes": ["a"]}]\n', 1, "'other' of 1 nodes"),
        (spotserve.read_segment, '[0, "add", {"nodes": ["a"]}]\n\n[9, "lose", {"nodes": ["a"]}]\n', 3, "Invalid enum"),
        (spotserve.read_segment, '[0, "add", {"nodes": ["a"], "tpt": 1}]\n', 1, "unknown field `tpt`"),
        (spotserve.read_segment, '[0, "add"]\n', 1, "length"),
        (spotserve.read_segment, "[0, add]\n", 1, "malformed"),
        (spotserve.read_segment, '[-1, "add", {"nodes": ["a"]}]\n', 1, "a time of -0.001"),
        (spotserve.read_segment, '[0, "other", {"nodes": [], "required_tpt": 0}]\n', 1, "required throughput of 0"),
        (spotserve.read_segment, '[0, "add", {"nodes": ["a"]}]\n', 1, "ends without DONE"),
        (spotserve.read_segment, "", 1, "ends without DONE"),
        (spotserve.read_segment, '[0, "DONE", {"nodes": []}]\n' * 2, 2, "a line after DONE"),
        (spotserve.read_segment, '[0, "add", {"nodes": ["a"]}]\n' * 2, 2, "a comes but is there"),
        (spotserve.read_segment, '[0, "remove", {"nodes": ["a"]}]\n', 1, "a goes but is not there"),
        (spotserve.read_record, "0,add,a\n7,drop,a\n", 2, "'drop' of instance 'a'"),
        (spotserve.read_record, "0,add,\n", 1, "instance ''"),
        (spotserve.read_record, "0,add\n", 1, "2 fields instead of 3"),
        (spotserve.read_record, "zero,add,a\n", 1, "could not convert"),
        (spotserve.read_record, "nan,add,a\n", 1, "a time of nan"),
        (spotserve.read_record, "9000,add,a\n8000,add,b\n", 2, "an event at 8.0 s after one at 9.0 s"),
        (spotserve.read_queries, "0,1.5,512,0\n1,1.25,512,9\n", 2, "an arrival at 1.25 s after one at 1.5 s"),
        (spotserve.read_queries, "0,1.5,0,0\n", 1, "a request of 0 prompt and 128 output tokens"),
        (spotserve.read_queries, "0,1.5,512.5,0\n", 1, "invalid literal"),
        (spotserve.read_queries, "0,inf,512,0\n", 1, "a time of inf"),
        (spotserve.read_queries, "0,1.5,512,here\n", 1, "invalid literal"),
        (azure.read_requests, "2023-11-16 18:17:03.97,4808,10\n", 1, "no header"),
        (azure.read_requests, f"{azure.HEADER}\nyesterday,4808,10\n", 2, "Invalid isoformat"),
        (azure.read_requests, f"{azure.HEADER}\n2023-11-16 18:17:03,10,0\n", 2, "10 prompt and 0 output"),
        (
            azure.read_requests,
            f"{azure.HEADER}\n2023-11-16 18:17:03,1,1\n2023-11-16 18:17:04+00:00,1,1\n",
            3,
            "has a time zone and others have none",
        ),
        (azure.read_requests, f"{azure.HEADER}\n2023-11-16 18:17:03,1,1\n2023-11-16 18:17:02,1,1\n", 3, "-1.0 s after"),
        (mooncake.read_requests, '{"timestamp": 0, "input_length": 1}\n', 1, "missing required field `output_length`"),
        (
            mooncake.read_requests,
            '{"timestamp": "0", "input_length": 1, "output_length": 1}\n',
            1,
            "Expected `float`, got `str`",
        ),
        (mooncake.read_requests, '{"timestamp": 0, \n', 1, "truncated"),
        (skypilot.read_counts, '{"metadata": {"gap_seconds": 300},\n "data": [1, }', 2, "Expecting value"),
        (skypilot.read_counts, '{"metadata": {}, "data": [1]}', 1, "missing required field `gap_seconds`"),
        (skypilot.read_counts, '{"metadata": {"gap_seconds": 300}, "data": [1, 2.5]}', 1, "Expected `int`"),
        (skypilot.read_counts, '{"metadata": {"gap_seconds": 300}, "data": [1, -2]}', 1, r"data\[1\] is -2"),
        (skypilot.read_counts, '{"metadata": {"gap_seconds": 0}, "data": [1]}', 1, "1 points, 0.0 s apart"),
        (skypilot.read_counts, '{"metadata": {"gap_seconds": 300}, "data": []}', 1, "0 points"),
        (own.read_requests, "# comment\n0,1,1\n", 2, "no header"),
        (own.read_requests, "", 1, "no header"),
        (own.read_requests, f"{own.REQUEST_HEADER}\n0,1\n", 2, "2 fields instead of 3"),
        (own.read_requests, f"{own.REQUEST_HEADER}\n0,1,1\n# comment\n-1,1,1\n", 4, "a time of -1"),
        (own.read_spot, f"{own.SPOT_HEADER}\n0,a,,0\n", 2, "has no end"),
        (own.read_spot, f"{own.SPOT_HEADER}\n0,a,,yes\n9,END\n", 2, "'yes' for on_demand"),
        (own.read_spot, f"{own.SPOT_HEADER}\n0,a,,0\n1,,b,0\n9,END\n", 3, "b goes but is not there"),
        (own.read_spot, f"{own.SPOT_HEADER}\n0,a,,0\nlate,END\n", 3, "could not convert"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong_and_what_is_expected(
    file: Callable[[str], Path], read: Callable[[Path], object], text: str, number: int, problem: str
) -> None:
    path = file(text)
    with pytest.raises(ConfigError, match=rf"trace\.txt, line {number}: .*{problem}.*; expected .") as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_an_event_after_the_end_is_refused(file: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"an event at 9\.0 s is out of order or after 8\.0 s"):
        own.read_spot(file(f"{own.SPOT_HEADER}\n9,a,,0\n8,END\n"))


def test_inverted_files_hold_only_zeros_and_ones(file: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"data\[2\] is 2; expected 0 or 1"):
        skypilot.read_counts(file('{"metadata": {"gap_seconds": 10}, "data": [0, 1, 2]}'), inverted=True)


@pytest.mark.parametrize("read", [spotserve.read_queries, mooncake.read_requests])
def test_a_file_without_requests_is_refused(file: Callable[[str], Path], read: Callable[[Path], object]) -> None:
    with pytest.raises(ConfigError, match="has no requests"):
        read(file("\n"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.csv cannot be read: .*No such file"):
        open_spot(tmp_path / "absent.csv")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary cannot be read: .*utf-8"):
        open_requests(tmp_path / "binary")


@pytest.mark.parametrize(
    ("text", "requests"), [(QUERIES, 2), (AZURE, 2), (MOONCAKE, 2), (OWN_REQUESTS, 2), ("\ufeff" + AZURE, 2)]
)
def test_request_formats_are_recognised(file: Callable[[str], Path], text: str, requests: int) -> None:
    assert len(open_requests(file(text))) == requests


def test_the_output_length_reaches_a_format_that_has_none(file: Callable[[str], Path]) -> None:
    assert open_requests(file(QUERIES), output=9).output.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("text", "events"),
    [(SEGMENT, 3), (RECORD, 2), (OWN_SPOT, 2), ('{"metadata": {"gap_seconds": 1}, "data": [1, 2, 2]}', 2)],
)
def test_spot_formats_are_recognised(file: Callable[[str], Path], text: str, events: int) -> None:
    assert len(open_spot(file(text)).events) == events


@pytest.mark.parametrize("text", ["", "time,tokens\n1,2\n", '{"no": "trace"}\n'])
def test_an_unknown_request_format_names_those_that_are_known(file: Callable[[str], Path], text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"line 1: not the beginning of a request trace.*seconds,prompt,output.*TIMESTAMP"
    ):
        open_requests(file(text))


@pytest.mark.parametrize("text", ["", QUERIES, OWN_REQUESTS])
def test_an_unknown_spot_format_names_those_that_are_known(file: Callable[[str], Path], text: str) -> None:
    with pytest.raises(ConfigError, match=r"not the beginning of a spot trace.*seconds,added,removed.*gap_seconds"):
        open_spot(file(text))
