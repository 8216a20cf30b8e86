"""Tables of providers: what is refused, and how it is said."""

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from spotjax.config import ServeConfig
from spotjax.errors import ConfigError
from spotjax.fleet.capacity.opening import open_described
from spotjax.fleet.providers.local import LocalConfig, LocalOffer
from spotjax.fleet.providers.provider import FleetIdentity, ProviderConfig
from spotjax.fleet.providers.registry import KINDS, open_provider, provider_config

WHERE = "[provider] in fleet.toml"


async def test_a_table_becomes_an_open_provider() -> None:
    offer = {"type": "small", "price_class": "on_demand", "price": 2}
    config = provider_config({"kind": "local", "most": 3, "offers": [offer]}, WHERE)
    assert config == LocalConfig(most=3, offers=(LocalOffer(type="small", price_class="on_demand", price=2.0),))
    provider = await open_provider(config, FleetIdentity("mine", "127.0.0.1:1", ServeConfig(parameter_store="off")))
    assert (provider.name, await provider.list()) == ("local", ())
    assert [(each.type, each.price) for each in await provider.offers()] == [("small", 2.0)]
    await provider.close()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"kind in \[provider\] in fleet.toml is '', .*there are local"),
        ({"kind": "locale"}, "'locale', which is no provider; did you mean local"),
        ({"kind": "local", "mots": 1}, "unknown field `mots`"),
        ({"kind": "local", "most": 0}, r">= 1 - at `\$.most`"),
        ({"kind": "local", "offers": []}, r"length >= 1 - at `\$.offers`"),
        ({"kind": "local", "offers": [{"price": -1}]}, r">= 0.0 - at `\$.offers\[0\].price`"),
        ({"kind": "local", "offers": [{"price_class": "free"}]}, r"Invalid enum value 'free' .*price_class"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        provider_config(table, WHERE)


async def test_machines_elsewhere_need_an_address_that_they_can_reach(tmp_path: Path) -> None:
    everywhere = FleetIdentity("mine", "0.0.0.0:8470", ServeConfig(parameter_store="off"))
    command = {"kind": "command", "command": ["/bin/env"]}
    with pytest.raises(ConfigError, match=r"listen \(0.0.0.0:8470\) is every address .* advertise must say"):
        await open_provider(provider_config(command, WHERE), everywhere)
    await (await open_provider(provider_config({"kind": "local"}, WHERE), everywhere)).close()
    path = tmp_path / "capacity.toml"
    path.write_text(f"""
        [provider]
        kind = "command"
        command = ["/bin/sh", "-c", 'echo "$SPOTJAX_JOIN" > {tmp_path}/join']
        [[provider.offers]]
        type = "t"
        price = 1
        [capacity]
        most = 1
        cost_per_hour = 2
    """)
    config = ServeConfig(listen="0.0.0.0:8470", advertise="10.0.0.1", capacity=str(path))
    _, provider = await open_described(config, config.listen)
    assert await provider.list() == () and (tmp_path / "join").read_text() == "10.0.0.1:8470\n"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_tag_of_its_class_and_all_of_its_keys_are_described(kind: str) -> None:
    module = __import__(f"spotjax.fleet.providers.{kind}", fromlist=[KINDS[kind]])
    described = getattr(module, KINDS[kind])
    assert issubclass(described, ProviderConfig)
    assert described.__struct_config__.tag == kind and described.__struct_config__.forbid_unknown_fields
    hints = __import__("typing").get_type_hints(described, include_extras=True)
    for name in described.__struct_fields__:
        assert any(getattr(meta, "description", None) for meta in get_args(hints[name])[1:]), name


def test_reading_a_table_imports_that_provider_and_no_cloud() -> None:
    program = (
        "import sys; from spotjax.fleet.providers.registry import provider_config; "
        "provider_config({'kind': 'local'}, 'here'); "
        "sys.exit(any(name in sys.modules for name in ('jax', 'google.cloud', 'ray', 'httpx')))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
