"""One struct, four sources: precedence, conversion, and refusal by name."""

import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax import config
from spotjax.config import ServeConfig
from spotjax.errors import ConfigError


def load(flags: list[str] | None = None, environment: dict[str, str] | None = None) -> ServeConfig:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return config.load(parser.parse_args(flags or []), environment or {})


def written(directory: Path, text: str) -> list[str]:
    path = directory / "spotjax.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_nothing_given_is_the_defaults() -> None:
    assert load() == ServeConfig()


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = written(tmp_path, "kv_pages = 1\nmax_batch = 1\npage_size = 1\n")
    environment = {"SPOTJAX_KV_PAGES": "2", "SPOTJAX_MAX_BATCH": "2", "HOME": "/", "SPOTJAX_CACHE": "/c"}
    loaded = load([*file, "--kv-pages", "3"], environment)
    assert (loaded.kv_pages, loaded.max_batch, loaded.page_size, loaded.instances) == (3, 2, 1, 4)


def test_every_setting_can_come_from_each_source(tmp_path: Path) -> None:
    values = {
        "model": "m", "listen": "0.0.0.0:1", "instances": 1, "devices_per_instance": 3, "mesh": "1x2x3",
        "dtype": "bfloat16", "max_model_len": 5, "max_batch": 6, "prefill_tokens": 7, "page_size": 8, "kv_pages": 9,
        "queue_limit": 10, "retain_seconds": 1.5, "drain_seconds": 2.5, "instance_memory_bytes": 11, "fuse": False,
        "compilation_cache": "off", "log_level": "debug", "log_format": "json",
    }  # fmt: skip
    assert set(values) == set(config.TYPES)
    expected = ServeConfig(**values)
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        flags += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    assert load(flags) == expected
    assert load(environment={f"SPOTJAX_{name.upper()}": str(value) for name, value in values.items()}) == expected
    toml = "".join(f"{n} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for n, v in values.items())
    assert load(written(tmp_path, toml)) == expected


def test_unknown_names_are_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_page in .*toml; did you mean kv_pages\?"):
        load(written(tmp_path, "kv_page = 1"))
    with pytest.raises(ConfigError, match=r"SPOTJAX_KV_PAGE in the environment; did you mean SPOTJAX_KV_PAGES\?"):
        load(environment={"SPOTJAX_KV_PAGE": "1"})
    with pytest.raises(ConfigError, match=r"xyzzy.*there are model"):
        load(written(tmp_path, "xyzzy = 1"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("instances", "0"), ("instances", "two"), ("max_batch", "0"), ("kv_pages", "-1"), ("page_size", "1.5"),
        ("mesh", "2x2"), ("mesh", "0x1x1"), ("listen", "8470"), ("listen", "host:"), ("dtype", "float16"),
        ("retain_seconds", "-1"), ("fuse", "maybe"), ("log_level", "loud"), ("log_format", "xml"), ("model", ""),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"SPOTJAX_{name.upper()}.*{value}"):
        load(environment={f"SPOTJAX_{name.upper()}": value})
    with pytest.raises(ConfigError, match=f"{name} in .*toml"):
        load(written(tmp_path, f"{name} = '{value}'"))


@pytest.mark.parametrize("flags", [["--kv-pages", "-1"], ["--mesh", "big"], ["--listen", "x"]])
def test_a_flag_out_of_range_is_refused_by_name(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"^{flags[0]}: .*{flags[1]}"):
        load(flags)


def test_text_for_a_number_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_pages"):
        load(written(tmp_path, 'kv_pages = "5"'))


@pytest.mark.parametrize("text", ["kv_pages =", "[server]\nkv_pages = 1"])
def test_a_file_that_is_not_settings_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"spotjax\.toml"):
        load(written(tmp_path, text))
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load(["--config", str(tmp_path / "missing.toml")])


def test_help_names_every_setting_with_its_default() -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    text = " ".join(parser.format_help().split())
    for name in config.TYPES:
        assert f"--{name.replace('_', '-')}" in text
    for default in ("default: 127.0.0.1:8470", "default: 1024", "default: on", "default: 600"):
        assert default in text


@given(st.dictionaries(st.text(st.characters(categories=["Lu", "Nd"]), max_size=8), st.text(max_size=4), max_size=3))
def test_any_environment_loads_or_is_refused_by_name(variables: dict[str, str]) -> None:
    environment = {f"SPOTJAX_{name}": value for name, value in variables.items()}
    try:
        load(environment=environment)
    except ConfigError as error:
        assert any(name in str(error) for name in environment)
    else:
        assert all(name.removeprefix("SPOTJAX_").lower() in {*config.TYPES, "cache"} for name in environment)
