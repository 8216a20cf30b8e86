"""Start-up scripts: what they contain for which options; shellcheck has nothing to say, values stay values."""

import base64
import getpass
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linters import SHELLCHECK
from pairs import pairwise

from spotjax.bootstrap.options import BootstrapOptions, Platform
from spotjax.bootstrap.places import place
from spotjax.bootstrap.script import USER_DATA_LIMIT, script
from spotjax.errors import ConfigError
from spotjax.settings import from_file

JOIN = "controller.internal:8470"
TOKEN = "/srv/join-token"
MACHINES: tuple[Platform, ...] = ("gce", "tpu", "aws")
PLACES = {
    "gce": ("", "/etc/a b.pem", "https://host/x", "gs://bucket/x y", "secret:projects/p/secrets/s"),
    "tpu": ("", "/etc/a b.pem", "secret:projects/p/secrets/s/versions/3"),
    "aws": ("", "/etc/a b.pem", "s3://bucket/x y", "ssm:/fleet/key"),
}
# those that change the structure of a script, not only a value in it
CHOICES: dict[str, tuple[Any, ...]] = {
    "accelerator": ("auto", "cpu"),
    "installed": ("index", "wheel", "url", "links", "constraints", "image"),
    "system_packages": (False, True),
    "python": ("", "/opt/python/bin/python3"),
    "join_minutes": (0, 20),
}
OTHER = {"accelerator": ("auto", "cpu"), "installed": ("url", "image"), "system_packages": (False,), "python": ("",)}
INSTALLED = {
    "index": {},
    "wheel": {"wheel": "/srv/spotjax-0.1.0-py3-none-any.whl"},
    "url": {"wheel": "https://host/spotjax-0.1.0-py3-none-any.whl", "index_url": "https://index/simple"},
    "links": {"find_links": "/srv/wheels of mine"},
    "constraints": {"constraints": "/srv/constraints.txt", "version": "0.2.0rc1"},
    "image": {"image": "ghcr.io/me/spotjax:0.1.0"},
}


def options_of(platform: Platform, chosen: dict[str, Any]) -> BootstrapOptions | None:
    given = dict(chosen)
    given |= INSTALLED[given.pop("installed")]
    given["settings"] = {"log_format": "json", "compilation_cache": "/a 'b'\n \"d\x7f"}
    if tls := given.pop("tls"):
        given |= {"tls_certificate": tls, "tls_key": tls, "tls_authority": tls}
    if "image" in given and (given["system_packages"] or given["python"]):
        return None  # refused
    return BootstrapOptions(join=JOIN, join_token=TOKEN, **given)


def test_shellcheck_has_nothing_to_say_of_any_two_options_together(tmp_path: Path) -> None:
    texts = [
        script("slurm", BootstrapOptions(join=JOIN, join_token=TOKEN, zone=zone, python=path))
        for zone, path in product(("", "a"), ("", "/shared/bin/python"))
    ]
    for platform in MACHINES:
        choices = CHOICES if platform == "gce" else OTHER
        for chosen in pairwise(choices | {"tls": PLACES[platform]}):
            if (options := options_of(platform, chosen)) is not None:
                texts.append(script(platform, options))
    assert len(texts) > 35
    files = []
    for number, text in enumerate(texts):
        files.append(tmp_path / f"{number}.sh")
        files[-1].write_text(text)
    # SC2317 and SC2329, "never called": retry calls what it is given
    checked = subprocess.run(
        [SHELLCHECK, "--exclude=SC2317,SC2329", "--severity=style", *files], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def run_part(text: str, begin: str, count: int, before: str) -> bytes:
    """Runs ``count`` lines of a script, from the one that begins so, in a shell of its own, with other functions."""
    lines = text.split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith(begin))
    part = "\n".join([before, *lines[first : first + count]])
    return subprocess.run(["bash", "-euo", "pipefail", "-c", part], capture_output=True, check=True).stdout


printable = st.text(st.characters(blacklist_categories=["Cc", "Cs"]), min_size=1, max_size=30)
hostile = st.sampled_from(
    ["$(touch /tmp/x)", "`id`", "'; id; '", '"', "\\", "-rf", "${HOME}", "!!", "{{ x }}", "{% if %}"]
)
value = printable | hostile | st.builds(str.__add__, printable, hostile)


@settings(max_examples=40, deadline=None)
@given(text=value | st.just("a\nb\x7f\x01"), join=st.sampled_from(["$(id)`x`';\":1", JOIN]))
def test_whatever_a_setting_is_the_worker_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, text: str, join: str
) -> None:
    options = BootstrapOptions(join=join, join_token=TOKEN, settings={"compilation_cache": text})
    before = "put() { cat; }; name=spot-a zone=z price_class=spot any=0.0.0.0 address=10.0.0.2"
    file = tmp_path_factory.mktemp("worker") / "worker.toml"
    file.write_bytes(run_part(script("gce", options), "put 644 root /etc/spotjax/worker.toml", 10, before))
    assert from_file(file) == {
        "join": join, "grace_seconds": 25.0, "abandoned_seconds": 3600.0, "compilation_cache": text, "name": "spot-a",
        "join_token": "/etc/spotjax/join-token",
        "zone": "z", "price_class": "spot", "data_listen": "0.0.0.0:8472", "advertise": "10.0.0.2",
    }  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(links=value, path=value)
def test_whatever_a_path_is_pip_and_cp_get_it_as_it_is(links: str, path: str) -> None:
    text = script("gce", BootstrapOptions(join=JOIN, join_token=TOKEN, find_links=links, constraints="/" + path))
    shown = """ { shift; printf '%s\\0' "$@"; }; state=/nowhere"""
    pip = run_part(text, "  timeout 1800", 1, f"timeout(){shown}").split(b"\0")
    assert pip[pip.index(b"--find-links") + 1].decode() == links
    fetched = run_part(text, "retry fetch file", 1, f"retry(){shown}").split(b"\0")
    assert fetched[1].decode() == "/" + path


@pytest.mark.parametrize("hostile_name", ["a b", "$(id)", "a;b", "-a", "a\n", "ä", "x" * 64])
def test_names_of_machines_zones_and_users_are_refused_rather_than_quoted(hostile_name: str) -> None:
    for option in ("name", "zone", "user"):
        with pytest.raises(ConfigError, match=option):
            script("gce", BootstrapOptions(join=JOIN, join_token=TOKEN, **{option: hostile_name}))


def test_a_name_from_metadata_that_is_none_ends_the_script() -> None:
    text = script("gce", BootstrapOptions(join=JOIN, join_token=TOKEN))
    definition = text[text.index("fits() {") : text.index("metadata() {")]
    for name in ("a b", 'a"\nb = "', "$(id)", ""):
        with pytest.raises(subprocess.CalledProcessError):
            run_part(text, "fits name", 1, f"{definition}\nname={shlex.quote(name)}")
    run_part(text, "fits name", 1, f"{definition}\nname=spot-a")


@pytest.mark.parametrize(
    ("platform", "options", "says"),
    [
        ("gce", {"join": "nowhere"}, "join"),
        ("gce", {"join_minutes": -1}, "join_minutes"),
        ("gce", {"accelerator": "tpu"}, "accelerator"),
        ("tpu", {"accelerator": "cuda13"}, "accelerator"),
        ("slurm", {"image": "a/b"}, "image"),
        ("gce", {"image": "a/b", "find_links": "/x"}, "find_links"),
        ("gce", {"image": "A b"}, "image"),
        ("gce", {"find_links": "/x", "index_url": "https://x"}, "index_url"),
        ("gce", {"index_url": "https://me:secret@x"}, "index_url"),
        ("gce", {"wheel": "https://me:secret@x/y.whl"}, "secret store"),
        ("gce", {"wheel": "/x"}, "whl"),
        ("gce", {"tls_key": "/x"}, "tls_certificate and tls_authority"),
        ("gce", {"tls_key": "x", "tls_certificate": "/x", "tls_authority": "/x"}, "tls_key"),
        ("gce", {"constraints": "s3://a/b"}, "AWS"),
        ("aws", {"constraints": "gs://a/b"}, "Google"),
        ("slurm", {"tls_key": "gs://x", "tls_certificate": "/x", "tls_authority": "/x"}, "path"),
        ("gce", {"settings": {"mesh": "auto"}}, "mesh"),
        ("gce", {"settings": {"zone": "z"}}, "zone"),
        ("gce", {"settings": {"log_formt": "json"}}, "log_format"),
        ("gce", {"settings": {"log_format": "xml"}}, "xml"),
        ("aws", {"settings": {"compilation_cache": "x" * USER_DATA_LIMIT}}, str(USER_DATA_LIMIT)),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(platform: Platform, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        script(platform, BootstrapOptions(**({"join": JOIN, "join_token": TOKEN} | options)))


def test_a_script_has_places_of_secrets_and_no_secret() -> None:
    secrets = {"tls_certificate": "/c", "tls_key": "secret:projects/p/secrets/s", "tls_authority": "gs://b/a"}
    text = script("gce", BootstrapOptions(join=JOIN, join_token=TOKEN, **secrets))
    assert "https://secretmanager.googleapis.com/v1/projects/p/secrets/s/versions/latest:access" in text
    assert "/etc/spotjax/key.pem 400 spotjax" in text
    assert "set -x" not in text


def test_a_secret_is_fetched_with_the_machines_own_rights_and_said_to_nobody(tmp_path: Path) -> None:
    tls = dict.fromkeys(("tls_certificate", "tls_key", "tls_authority"), "secret:projects/p/secrets/s")
    text = script("gce", BootstrapOptions(join=JOIN, join_token=TOKEN, **tls))
    functions = text[text.index("put() {") : text.index("fits() {")] + text[text.index("fetch_from() {") :]
    functions = functions[: functions.index("\nretry fetch")]
    sent, target = tmp_path / "sent", tmp_path / "key.pem"
    payload = base64.b64encode(b"-----BEGIN\nprivate\n").decode()
    stubs = f"""
        state={tmp_path} python={sys.executable}
        metadata() {{ echo '{{"access_token": "bearer-of-{{}}", "expires_in": 1}}'; }}
        web() {{ printf '%s|%s' "$1" "$3" >{sent}; echo '{{"payload": {{"data": "{payload}"}}}}' >"$2"; }}
    """
    owner = getpass.getuser()
    call = f"{stubs}\n{functions}\nfetch google-secret https://secrets/x {target} 400 {owner}; echo $changed"
    ran = subprocess.run(["bash", "-euo", "pipefail", "-c", call], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "yes\n", "")
    assert target.read_bytes() == b"-----BEGIN\nprivate\n" and target.stat().st_mode & 0o777 == 0o400
    assert sent.read_text() == 'https://secrets/x|header = "Authorization: Bearer bearer-of-{}"'
    assert sorted(file.name for file in tmp_path.iterdir()) == ["key.pem", "sent"], "nothing is left beside it"


def test_what_cannot_be_fetched_leaves_the_file_of_before(tmp_path: Path) -> None:
    text = script("gce", BootstrapOptions(join=JOIN, join_token=TOKEN, constraints="https://host/c"))
    functions = text[text.index("put() {") : text.index("fits() {")] + text[text.index("fetch_from() {") :]
    functions = functions[: functions.index("\nretry fetch")]
    (tmp_path / "c").write_text("before")
    stubs = f"state={tmp_path}; web() {{ return 22; }}"
    call = f"{stubs}\n{functions}\nfetch web https://host/c {tmp_path}/c 644 root || echo no"
    ran = subprocess.run(["bash", "-euo", "pipefail", "-c", call], capture_output=True, text=True)
    assert (ran.stdout, (tmp_path / "c").read_text()) == ("no\n", "before")
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_the_unit_outlasts_the_grace_and_systemd_takes_it(tmp_path: Path) -> None:
    text = script("gce", BootstrapOptions(join=JOIN, join_token=TOKEN, grace_seconds=110.5, accelerator="cpu"))
    unit = text[text.index("[Unit]") : text.index("WantedBy=multi-user.target")]
    assert "TimeoutStopSec=116\n" in unit and "Restart=on-failure\n" in unit and "SuccessAction=poweroff\n" in unit
    if shutil.which("systemd-analyze"):
        file = tmp_path / "spotjax-worker.service"
        file.write_text(unit.replace("/opt/spotjax/venv/bin/spotjax", "/bin/true"))
        verified = subprocess.run(["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True)
        assert str(file.name) not in verified.stderr, verified.stderr
    assert "SuccessAction" not in script("gce", BootstrapOptions(join=JOIN, join_token=TOKEN, join_minutes=0))


def test_places_keep_the_name_of_a_file() -> None:
    assert place("https://host/a/b.whl?x=1", "wheel").file_name == "b.whl"
    assert place("/a/b.whl", "wheel").file_name == "b.whl"
    assert place("gs://b/a c/d.whl", "wheel").location == "https://storage.googleapis.com/b/a%20c/d.whl"


def test_every_platform_has_a_script_with_defaults() -> None:
    for platform in get_args(Platform):
        assert JOIN in script(platform, BootstrapOptions(join=JOIN, join_token=TOKEN))
