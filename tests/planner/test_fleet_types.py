"""Presets and instance types: what plans for well-known models start from."""

import pytest

from spotjax.errors import ConfigError
from spotjax.meshes.instance_types import INSTANCE_TYPES, instance_type, parse_instances
from spotjax.models.presets import preset
from spotjax.planner.published_tables import TABLES

# Sizes in GiB that SpotServe's paper gives (float32).
GIB = {"opt-6.7b": 25.0, "gpt-20b": 74.5, "llama-30b": 111.8}


@pytest.mark.parametrize("name", GIB)
def test_models_of_the_paper_have_its_sizes_layers_and_widths(name: str) -> None:
    spec, table = preset(name), TABLES[name]
    assert spec.parameter_bytes / 2**30 == pytest.approx(GIB[name], rel=0.02)
    assert (spec.config.layers, spec.config.width) == (table.layers, table.hidden_size)
    assert spec.config.heads * spec.config.head_size == spec.config.width


def test_kv_per_token_of_the_paper_models() -> None:
    megabytes = {name: preset(name).kv_bytes_per_position / 1e6 for name in GIB}
    assert megabytes == pytest.approx({"opt-6.7b": 1.05, "gpt-20b": 2.16, "llama-30b": 2.75}, rel=0.01)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"known are opt-6\.7b"):
        preset("gpt-5")
    with pytest.raises(ConfigError, match=r"known are g4dn\.12xlarge"):
        instance_type("banana")


def test_instances_are_counted_and_named_in_order() -> None:
    instances = parse_instances("2xg4dn.12xlarge, 1xp4d.24xlarge")
    assert [(i.name, i.type.name) for i in instances] == [
        ("i-0", "g4dn.12xlarge"),
        ("i-1", "g4dn.12xlarge"),
        ("i-2", "p4d.24xlarge"),
    ]
    for wrong in ("g4dn.12xlarge", "0xg4dn.12xlarge", "2xg4dn.12xlarge,", ""):
        with pytest.raises(ConfigError, match="COUNTxTYPE"):
            parse_instances(wrong)


def test_prices_are_those_of_how_an_instance_was_rented() -> None:
    spot = parse_instances("1xg4dn.12xlarge")[0]
    assert spot.price == 1.9046 and all(t.spot_price < t.on_demand_price for t in INSTANCE_TYPES.values())
