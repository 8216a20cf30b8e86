"""What one side says on the control stream the other side understands, and nothing that is no message is taken."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.fleet.notices.notice import NoticeKind
from spotjax.meshes.instance import DeviceRef, InstanceType
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape
from spotjax.meshes.slices import ArraySlice
from spotjax.planner.plan import MigrationPlan, Phase, Transfer
from spotjax.protocol import control
from spotjax.reshard.transfer import PageTransfer
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.controls import Variant

numbers = st.integers(0, 2**40)
ranges = st.tuples(st.integers(0, 99), st.integers(0, 99))
indices = st.lists(ranges, max_size=4).map(tuple)
devices = st.builds(DeviceRef, st.text(max_size=8), st.integers(0, 7))
kinds = st.builds(InstanceType, st.text(), numbers, numbers, *[st.floats(0, 1e12)] * 4)


@st.composite
def any_placement(draw: st.DrawFn) -> Placement:
    shape = MeshShape(*(draw(st.integers(1, 2)) for _ in range(3)))
    layers = tuple(draw(ranges) for _ in range(shape.stage))
    places = list(shape.positions())
    found = draw(st.lists(devices, min_size=len(places), max_size=len(places), unique=True))
    return Placement(draw(numbers), shape, layers, dict(zip(places, found, strict=True)))


placements = any_placement()
parts = st.builds(control.Parts, st.integers(0, 7), st.dictionaries(st.text(max_size=8), indices, max_size=3))
pieces = st.lists(st.builds(ArraySlice, st.text(max_size=8), indices), min_size=1, max_size=3).map(tuple)
transfers = st.builds(Transfer, pieces, st.none() | devices, devices, numbers, st.sampled_from(Phase))
pairs = st.lists(st.tuples(numbers, numbers), max_size=4).map(tuple)
pages = st.lists(st.builds(PageTransfer, st.integers(0, 9), st.integers(0, 9), pairs, pairs), max_size=3).map(tuple)
steps = st.tuples(st.builds(StepShape, numbers, numbers, numbers), st.sampled_from(Variant), st.booleans())
setups = st.builds(
    control.ModelSetup,
    *[st.text()] * 3,
    *[numbers] * 5,
    st.lists(st.integers(1, 8), max_size=3).map(tuple),
)
messages = st.builds(control.PlacementMessage.of, placements)
kept = st.lists(st.tuples(numbers, st.lists(numbers, max_size=3).map(tuple), numbers), max_size=3).map(tuple)
remains = st.builds(control.StageRemains, st.integers(0, 9), st.integers(0, 9), kept)
replicas = st.dictionaries(st.integers(0, 9), st.integers(0, 9), max_size=3)

from_worker = st.one_of(
    st.builds(control.Register, numbers, st.text(), st.text(), kinds, st.text(), st.booleans(), st.text(), st.text()),
    st.builds(control.Ready, st.lists(parts, max_size=3).map(tuple), numbers, st.none() | messages),
    st.builds(
        control.Done,
        numbers,
        numbers,
        numbers,
        numbers,
        st.lists(numbers, max_size=3).map(tuple),
        st.lists(remains, max_size=3).map(tuple),
        st.text(),
    ),
    st.builds(control.Failed, numbers, st.text(), st.text()),
    st.builds(
        control.Noticed,
        st.text(),
        st.sampled_from([kind.value for kind in NoticeKind]),
        st.none() | st.floats(0, 1e6),
        st.text(),
    ),
    st.builds(control.NoticeWithdrawn, st.text(), st.text()),
    st.builds(control.StepLost, st.text(), st.text()),
)
from_controller = st.one_of(
    st.builds(control.Welcome, setups, st.integers(0, 65535), st.floats(0, 60), st.text(), numbers, st.booleans()),
    st.builds(control.Refused, st.text(), st.booleans()),
    st.builds(
        control.Prepare,
        numbers,
        messages,
        st.none() | messages,
        st.lists(parts, max_size=2).map(tuple),
        st.lists(transfers, max_size=2).map(tuple),
        replicas,
        replicas,
        st.lists(st.tuples(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.text()), max_size=2).map(tuple),
        st.dictionaries(st.text(max_size=8), st.text(), max_size=2),
        st.lists(steps, max_size=2).map(tuple),
    ),
    st.builds(control.CopyPages, numbers, pages),
    st.builds(control.Switch, numbers, pages),
    st.builds(control.Adopt, numbers, st.lists(st.text(), max_size=3).map(tuple), st.text(), numbers),
    st.builds(control.Clear, numbers),
    st.builds(control.Reunite, numbers, numbers, pairs),
    st.builds(control.SaveKv, numbers, st.text(), st.floats(0, 60), st.booleans()),
    st.builds(control.SaveParameters, numbers, st.text()),
    st.builds(control.Coverage, numbers, ranges, st.lists(numbers, max_size=4).map(tuple), st.text(), pairs),
    st.builds(control.Forget, st.lists(numbers, max_size=4).map(tuple)),
    st.builds(control.Release, st.booleans()),
)


@given(from_worker)
def test_the_controller_understands_workers(message: msgspec.Struct) -> None:
    assert control.decode_from_worker(control.encode(message)) == message


@given(from_controller)
def test_workers_understand_the_controller(message: msgspec.Struct) -> None:
    assert control.decode_from_controller(control.encode(message)) == message


@given(placements)
def test_a_placement_is_the_same_on_both_sides(placement: Placement) -> None:
    message = control.PlacementMessage.of(placement)
    encoded = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(encoded, type=control.PlacementMessage).placement() == placement


@given(st.lists(transfers, max_size=3))
def test_what_moves_is_the_same_on_both_sides(some: list[Transfer]) -> None:
    message = control.Prepare(
        1, control.PlacementMessage(1, MeshShape(1, 1, 1), (), ()), None, (), tuple(some), {}, {}, (), {}, ()
    )
    again = control.decode_from_controller(control.encode(message))
    assert isinstance(again, control.Prepare)
    assert repr(MigrationPlan(again.transfers, (), 0, 0, 0)) == repr(MigrationPlan(tuple(some), (), 0, 0, 0))


@given(st.binary(max_size=64))
def test_bytes_that_are_no_message_raise_one_kind_of_error(content: bytes) -> None:
    for decode in (control.decode_from_worker, control.decode_from_controller):
        with contextlib.suppress(msgspec.DecodeError):
            decode(content)


@pytest.mark.parametrize("message", [control.Clear(1), control.Release(at_once=True)])
def test_nobody_takes_what_is_for_the_other_side(message: msgspec.Struct) -> None:
    with pytest.raises(msgspec.ValidationError):
        control.decode_from_worker(control.encode(message))
    with pytest.raises(msgspec.ValidationError):
        control.decode_from_controller(control.encode(control.NoticeWithdrawn("gce", "")))


def test_every_command_can_be_told_apart_and_has_an_id() -> None:
    kinds = [*typing.get_args(control.FromWorker), *typing.get_args(control.FromController)]
    tags = [kind.__struct_config__.tag for kind in kinds]
    assert len(set(tags)) == len(tags)
    assert all("id" in command.__struct_fields__ for command in typing.get_args(control.Command))


def test_a_plan_for_many_devices_fits_into_one_message() -> None:
    layers = [f"layers.{layer}.{name}" for layer in range(128) for name in ("query", "key", "value", "gate", "up")]
    held = tuple(control.Parts(n, dict.fromkeys(layers, ((0, 8192), (0, 8192)))) for n in range(8))
    assert len(control.encode(control.Ready(held, 0))) < control.MAX_MESSAGE_BYTES / 2
    moved = tuple((page, page + 10**5) for page in range(10**5))
    assert len(control.encode(control.Switch(1, (PageTransfer(0, 0, moved[:50_000], moved[:50_000]),)))) < 2**21


def test_what_many_sequences_have_left_fits_into_one_message() -> None:
    sequences = tuple((10**6 + key, tuple(range(key * 100, key * 100 + 100)), 1600) for key in range(2000))
    remains = tuple(control.StageRemains(replica, 3, sequences[:1000]) for replica in range(4))
    assert len(control.encode(control.Done(1, remains=remains))) < control.MAX_MESSAGE_BYTES / 2
    assert len(control.encode(control.Reunite(1, 9, tuple((key, n) for key, _, n in sequences)))) < 2**16


def test_the_protocol_needs_no_jax() -> None:
    program = "import sys, spotjax.protocol.control; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
