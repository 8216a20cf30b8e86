"""API keys: the file, the command that changes it, and a server that follows it."""

from __future__ import annotations

import contextlib
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax import cli
from spotjax.api.access.callers import Role
from spotjax.api.access.key_file import KeyRecord, hash_of, name_of, new_secret, parse_keys, read_keys, written
from spotjax.api.access.keyed_gate import LOOK_SECONDS, KeyedGate
from spotjax.errors import ConfigError, Unauthenticated

times = st.datetimes(timezones=st.just(UTC))
records = st.builds(
    KeyRecord,
    hash=st.binary(max_size=8).map(lambda content: hash_of(content.hex())),
    role=st.sampled_from(Role),
    requests_per_minute=st.integers(0, 2**40),
    concurrent_requests=st.integers(0, 2**40),
    tokens_per_minute=st.integers(0, 2**40),
    tokens_per_day=st.integers(0, 2**40),
    models=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=3).map(tuple),
    expires=st.none() | times,
    disabled=st.booleans(),
)
names = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@given(st.dictionaries(names, records, max_size=4))
def test_what_is_written_is_read_again(keys: dict[str, KeyRecord]) -> None:
    if len({record.hash for record in keys.values()}) == len(keys):
        assert parse_keys(written(keys)) == keys


@given(st.text(max_size=200))
def test_any_text_is_keys_or_is_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert all(isinstance(record, KeyRecord) for record in parse_keys(text).values())


@pytest.mark.parametrize(
    "text",
    [
        "[a]\n",
        '[a]\nhash = "9f"\n',
        f'[a]\nhash = "{hash_of("x")}"\nrole = "king"\n',
        f'[a]\nhash = "{hash_of("x")}"\nrequests_per_minute = -1\n',
        f'[a]\nhash = "{hash_of("x")}"\nexpires = 2027-01-31T00:00:00\n',
        f'[a]\nhash = "{hash_of("x")}"\nunknown = 1\n',
        f'[a]\nhash = "{hash_of("x")}"\n[b]\nhash = "{hash_of("x")}"\n',
        f'["a b"]\nhash = "{hash_of("x")}"\n',
        "a = 1\n",
    ],
)
def test_a_file_that_is_not_as_it_must_be_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"keys.toml cannot be used"):
        read_keys(tmp_path / "keys.toml")


def test_a_key_is_its_owner_s_and_any_other_is_nobody_s() -> None:
    made = {f"k{number}": new_secret("sjx-key-") for number in range(20)}
    keys = {name: KeyRecord(hash=hash_of(key)) for name, key in made.items()}
    assert {name: name_of(key, keys) for name, key in made.items()} == {name: name for name in made}
    for key in ("", "x", made["k3"][:-1], made["k3"] + "x", keys["k3"].hash, "\udc80"):
        assert name_of(key, keys) is None


def test_keys_are_added_listed_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"

    def keys(*arguments: str) -> tuple[int, str]:
        code = cli.main(["keys", *arguments])
        return code, capsys.readouterr().out.strip()

    _, key = keys("add", "ann", str(file), "--role", "admin", "--tokens-per-day", "5", "--model", "m")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in file.read_text() and name_of(key, read_keys(file)) == "ann"
    _, other = keys("add", "bob", str(file), "--expires", "2027-01-31T00:00:00+01:00")
    assert other != key
    assert keys("add", "bob", str(file))[0] == 2
    assert keys("add", "b b", str(file))[0] == 2
    assert keys("add", "eve", str(file), "--expires", "tomorrow")[0] == 2
    _, listed = keys("list", str(file))
    assert listed.splitlines() == ["ann admin tokens_per_day=5 models=m", "bob user expires=2027-01-31T00:00:00+01:00"]
    assert keys("remove", "ann", str(file)) == (0, "")
    assert keys("remove", "ann", str(file))[0] == 2
    assert set(read_keys(file)) == {"bob"} and len(list(tmp_path.iterdir())) == 1


def test_a_join_token_is_written_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "token"
    assert cli.main(["keys", "join-token", str(file)]) == 0
    token = file.read_text()
    assert token.startswith("sjx-join-") and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cli.main(["keys", "join-token", str(file)]) == 2
    assert file.read_text() == token and list(tmp_path.iterdir()) == [file]


def test_a_server_follows_the_file_and_keeps_the_keys_when_it_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, now = tmp_path / "keys.toml", [0.0]
    file.write_text(written({"ann": KeyRecord(hash=hash_of("a"))}))
    gate = KeyedGate(file, lambda: now[0])

    def changed(text: str) -> None:
        file.write_text(text)
        now[0] += LOOK_SECONDS

    assert gate.caller_of("a").name == "ann"
    changed(written({"ann": KeyRecord(hash=hash_of("a")), "bob": KeyRecord(hash=hash_of("b"), role=Role.ADMIN)}))
    assert gate.caller_of("b").role is Role.ADMIN
    changed("[broken")
    assert gate.caller_of("a").name == "ann"
    assert "the keys stay as they were" in caplog.text
    file.unlink()
    now[0] += LOOK_SECONDS
    assert gate.caller_of("a").name == "ann"
    changed(written({"bob": KeyRecord(hash=hash_of("b"))}))
    with pytest.raises(Unauthenticated, match="not known"):
        gate.caller_of("a")


def test_keys_end_when_they_expire_or_are_disabled(tmp_path: Path) -> None:
    file, now = tmp_path / "keys.toml", [datetime(2026, 1, 1, tzinfo=UTC)]
    soon = now[0] + timedelta(hours=1)
    file.write_text(
        written({"ann": KeyRecord(hash=hash_of("a"), expires=soon), "bob": KeyRecord(hash=hash_of("b"), disabled=True)})
    )
    gate = KeyedGate(file, lambda: 0.0, lambda: now[0])
    assert gate.caller_of("a").name == "ann"
    with pytest.raises(Unauthenticated, match="disabled"):
        gate.caller_of("b")
    now[0] = soon
    with pytest.raises(Unauthenticated, match="expired"):
        gate.caller_of("a")
    with pytest.raises(Unauthenticated, match="wants an API key"):
        gate.caller_of(None)
