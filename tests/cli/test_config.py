"""One struct, four sources: precedence, conversion, and refusal by name."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax import settings
from spotjax.config import TYPES, ServeConfig, mode
from spotjax.errors import ConfigError


def load(flags: list[str] | None = None, environment: dict[str, str] | None = None) -> ServeConfig:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    return settings.load(parser.parse_args(flags or []), environment or {})


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
    assert (loaded.kv_pages, loaded.max_batch, loaded.page_size, loaded.queue_limit) == (3, 2, 1, 1024)


EMBEDDED = {
    "model": "m", "listen": "0.0.0.0:1", "http": "0.0.0.0:2", "http_names": "chat.example.com,chat",
    "instances": 1, "devices_per_instance": 3, "mesh": "1x2x3",
    "dtype": "bfloat16", "quantization": "int8", "max_model_len": 5, "max_batch": 6, "prefill_tokens": 7,
    "page_size": 8, "kv_pages": 9,
    "queue_limit": 10, "retain_seconds": 1.5, "drain_seconds": 2.5, "instance_memory_bytes": 11, "fuse": False,
    "prefix_cache": False,
    "attention": "xla", "cpu_kernels": "native", "compilation_cache": "off", "log_level": "debug", "log_format": "json",
    "leave": "late", "durability": "interval", "commit_log": "/logs",
    "notices": "gce,aws", "notice_seconds": 115.0, "notice_file": "/run/notice", "notice_command": "watch it",
    "metadata_url": "http://127.0.0.1:80", "traces": "http://127.0.0.1:4317",
    "api_keys": "keys.toml", "client_certificates": False, "insecure": True,
    "tls_certificate": "c", "tls_key": "k", "tls_authority": "a",
}  # fmt: skip
CONTROLLER = {
    "workers": 3, "data_listen": "0.0.0.0:1", "advertise": "10.0.0.1", "lease_seconds": 1.5, "kv_backup": False,
    "kv_backup_bandwidth": 5, "checkpoint": "gs://bucket/saves",
}  # fmt: skip
BASELINE = {"workers": 3, "recovery": "rerouting"}
BUYER = {"listen": "10.0.0.1:8470", "capacity": "capacity.toml"}
WORKER = {
    "join": "[::1]:2", "name": "vm-1", "parameter_store": "off", "grace_seconds": 3.5, "price_class": "on_demand",
    "read_bandwidth": 7, "acknowledge_notices": True, "abandoned_seconds": 60.0,
    "zone": "europe-west4-a", "slice_hosts": 4, "slice_host": 3, "slice_coordinator": "10.0.0.7:8476",
    "tls_certificate": "c", "tls_key": "k", "tls_authority": "a", "join_token": "token",
}  # fmt: skip


def test_every_setting_is_tried() -> None:
    assert {*EMBEDDED, *CONTROLLER, *BASELINE, *BUYER, *WORKER} == set(TYPES)


@pytest.mark.parametrize("values", [EMBEDDED, CONTROLLER, BASELINE, BUYER, WORKER])
def test_every_setting_can_come_from_each_source(tmp_path: Path, values: dict[str, Any]) -> None:
    expected = ServeConfig(**values)
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    assert load(flags) == expected
    assert load(environment={f"SPOTJAX_{name.upper()}": str(value) for name, value in values.items()}) == expected
    toml = "".join(f"{n} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for n, v in values.items())
    assert load(written(tmp_path, toml)) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slice-hosts", "2", "--slice-host", "2"], r"slice_host \(2\) must be less than slice_hosts \(2\)"),
        (["--slice-coordinator", "10.0.0.7:8476"], r"slice_coordinator \(10.0.0.7:8476\) has no meaning"),
    ],
)
def test_hosts_that_a_slice_cannot_have_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(["--join", "10.0.0.1:8470", *flags])


def test_capacity_is_bought_by_controllers_that_keep_a_log_and_start_no_workers_themselves() -> None:
    with pytest.raises(ConfigError, match=r"capacity \(c.toml\) does not go with workers \(2\)"):
        load(["--capacity", "c.toml", "--workers", "2"])
    with pytest.raises(ConfigError, match=r"capacity \(c.toml\) does not go with durability \(none\)"):
        load(["--capacity", "c.toml", "--listen", "10.0.0.1:8470", "--durability", "none"])


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
        ("instances", "-1"), ("instances", "two"), ("workers", "-1"), ("workers", "1025"), ("join", "host"),
        ("name", "a b"),         ("name", "-a"), ("lease_seconds", "0.1"), ("lease_seconds", "61"),
        ("grace_seconds", "-1"), ("zone", "a/b"), ("notices", "gcp"), ("notices", "auto,gce"), ("notices", ""),
        ("notice_seconds", "0"), ("metadata_url", "169.254.169.254"), ("metadata_url", "http://host/path"),
        ("grace_seconds", "3601"), ("abandoned_seconds", "-1"),
        ("data_listen", "x"), ("data_listen", ""), ("advertise", "10.0.0.1:5"),
        ("price_class", "cheap"), ("kv_backup", "maybe"), ("kv_backup_bandwidth", "-1"), ("read_bandwidth", "-1"),
        ("durability", "always"), ("max_batch", "0"), ("kv_pages", "-1"), ("page_size", "1.5"),
        ("mesh", "2x2"), ("mesh", "0x1x1"), ("listen", "8470"), ("listen", "host:"), ("http", "on"),
        ("http", ""), ("http_names", "a,"), ("http_names", "a:80"), ("dtype", "float16"),
        ("prefix_cache", "maybe"), ("retain_seconds", "-1"), ("fuse", "maybe"), ("log_level", "loud"),
        ("log_format", "xml"), ("traces", "127.0.0.1:4317"), ("model", ""),
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
    settings.add_flags(parser)
    text = " ".join(parser.format_help().split())
    for name in TYPES:
        assert f"--{name.replace('_', '-')}" in text
    for default in (
        "empty: 127.0.0.1:8470",
        "default: 1024",
        "0: 4 (for embedded mode; default: 0)",
        "default: on",
        "default: 600",
    ):
        assert default in text


@given(st.dictionaries(st.text(st.characters(categories=["Lu", "Nd"]), max_size=8), st.text(max_size=4), max_size=3))
def test_any_environment_loads_or_is_refused_by_name(variables: dict[str, str]) -> None:
    environment = {f"SPOTJAX_{name}": value for name, value in variables.items()}
    try:
        load(environment=environment)
    except ConfigError as error:
        assert any(name in str(error) for name in environment)
    else:
        assert all(name.removeprefix("SPOTJAX_").lower() in {*TYPES, "cache", "parent"} for name in environment)


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        ([], "embedded"),
        (["--instances", "2"], "embedded"),
        (["--listen", "127.0.0.1:9000", "--instances", "2"], "embedded"),
        (["--listen", "127.0.0.1:9000"], "controller"),
        (["--workers", "4"], "controller"),
        (["--workers", "4", "--listen", "127.0.0.1:9000", "--devices-per-instance", "1"], "controller"),
        (["--join", "127.0.0.1:1"], "worker"),
        (["--join", "127.0.0.1:1", "--data-listen", "0.0.0.0:0", "--advertise", "10.0.0.1"], "worker"),
    ],
)
def test_the_settings_choose_the_mode(flags: list[str], chosen: str) -> None:
    assert mode(load(flags)) == chosen


def test_what_is_not_given_means_four_instances_on_the_default_address() -> None:
    assert (load().address, load().embedded_instances) == ("127.0.0.1:8470", 4)
    assert load(["--instances", "2", "--listen", "h:1"]).embedded_instances == 2


@pytest.mark.parametrize(
    ("flags", "first", "second"),
    [
        (["--join", "h:1", "--workers", "2"], "workers", "join"),
        (["--join", "h:1", "--listen", "h:2"], "listen", "join"),
        (["--join", "h:1", "--instances", "2"], "instances", "join"),
        (["--join", "h:1", "--http", "off"], "http", "join"),
        (["--join", "h:1", "--model", "m"], "model", "join"),
        (["--join", "h:1", "--no-kv-backup"], "kv_backup", "join"),
        (["--workers", "2", "--instances", "2"], "instances", "workers"),
        (["--workers", "2", "--name", "n"], "name", "workers"),
        (["--listen", "h:1", "--zone", "z"], "zone", "listen"),
        (["--listen", "h:1", "--devices-per-instance", "4"], "devices_per_instance", "listen"),
        (["--listen", "h:1", "--compilation-cache", "off"], "compilation_cache", "listen"),
        (["--listen", "h:1", "--attention", "gpu"], "attention", "listen"),
        (["--listen", "h:1", "--cpu-kernels", "native"], "cpu_kernels", "listen"),
        (["--name", "n"], "name", "embedded"),
        (["--lease-seconds", "5"], "lease_seconds", "embedded"),
        (["--tls-key", "k"], "tls_key", "tls_certificate"),
        (
            ["--workers", "1", "--tls-key", "k", "--tls-certificate", "c"],
            "tls_certificate and tls_key",
            "tls_authority",
        ),
        (["--no-client-certificates"], "client_certificates", "tls_authority"),
        (["--join-token", "t"], "join_token", "embedded"),
        (["--join", "h:1", "--data-listen", "0.0.0.0:0"], "data_listen", "advertise"),
        (["--join", "h:1", "--durability", "none"], "durability", "join"),
        (["--join", "h:1", "--commit-log", "/logs"], "commit_log", "join"),
        (["--join", "h:1", "--checkpoint", "/saves"], "checkpoint", "join"),
        (["--instances", "2", "--checkpoint", "/saves"], "checkpoint", "embedded"),
        (["--durability", "none", "--commit-log", "/logs"], "commit_log", "durability none"),
        (["--workers", "2", "--durability", "none", "--commit-log", "/logs"], "commit_log", "durability none"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_naming_both(flags: list[str], first: str, second: str) -> None:
    with pytest.raises(ConfigError, match=f"^{first} .*{second}"):
        load(flags)


def test_a_setting_at_its_default_contradicts_nothing() -> None:
    environment = {"SPOTJAX_JOIN": "", "SPOTJAX_WORKERS": "0", "SPOTJAX_INSTANCES": "0", "SPOTJAX_LISTEN": ""}
    assert load(environment=environment) == ServeConfig()


def test_a_log_is_not_named_after_a_port_that_changes() -> None:
    with pytest.raises(ConfigError, match="another port at every start"):
        load(["--listen", "127.0.0.1:0"])
    assert load(["--listen", "127.0.0.1:0", "--durability", "none"]).durability == "none"
    assert load(["--listen", "127.0.0.1:0", "--commit-log", "log"]).commit_log == "log"
