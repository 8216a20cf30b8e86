import pytest

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.placement import Placement
from spotjax.meshes.shape import MeshShape, Position

SHAPE = MeshShape(2, 1, 2)
DEVICES = dict(zip(SHAPE.positions(), [DeviceRef(name, i) for name in ("b", "a") for i in (0, 1)], strict=True))


def test_groups_are_in_tensor_order_and_replicas_know_their_instances() -> None:
    placement = Placement(3, SHAPE, ((0, 4),), DEVICES)
    assert placement.group(1, 0) == (DeviceRef("a", 0), DeviceRef("a", 1))
    assert placement.instances(0) == {"b"} and placement.instances(1) == {"a"}


def test_a_position_without_a_device_is_refused() -> None:
    missing = {position: device for position, device in DEVICES.items() if position != Position(1, 0, 1)}
    with pytest.raises(ValueError, match="2x1x2 mesh needs a device for each of its positions, got 3"):
        Placement(0, SHAPE, ((0, 4),), missing)


def test_a_device_at_two_positions_is_refused() -> None:
    twice = DEVICES | {Position(1, 0, 1): DeviceRef("b", 0)}
    with pytest.raises(ValueError, match="only one position"):
        Placement(0, SHAPE, ((0, 4),), twice)


def test_layer_ranges_must_be_as_many_as_stages() -> None:
    with pytest.raises(ValueError, match="1 stages need as many layer ranges, got 2"):
        Placement(0, SHAPE, ((0, 2), (2, 4)), DEVICES)


def test_without_an_instance_its_devices_are_nobodys_and_all_else_is_as_it_was() -> None:
    placement = Placement(3, SHAPE, ((0, 4),), DEVICES)
    left = placement.without("b")
    assert (left.epoch, left.shape, left.layers) == (3, SHAPE, ((0, 4),))
    assert left.instances(1) == {"a"} and left.instances(0).isdisjoint({"a", "b"})
    assert len(set(left.devices.values())) == 4
    assert left.without("b") == left == placement.without("b").without("c")
