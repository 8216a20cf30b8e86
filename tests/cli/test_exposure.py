"""Who can reach a process: which settings start, which are refused, and what the refusal says to do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytest

from spotjax import settings
from spotjax.config import ServeConfig
from spotjax.errors import ConfigError
from spotjax.exposure import concerns, exposures, is_loopback, refuse_exposure

TLS = ("--tls-certificate", "c", "--tls-key", "k")
MUTUAL = (*TLS, "--tls-authority", "a")
KEYS, TOKEN = ("--api-keys", "f"), ("--join-token", "t")


def load(flags: Sequence[str]) -> ServeConfig:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    return settings.load(parser.parse_args(flags), {})


EMBEDDED = ("--instances", "2", "--listen", "10.0.0.1:1")
CONTROLLER = ("--listen", "10.0.0.1:1", "--data-listen", "10.0.0.1:0")
WORKER = ("--join", "10.0.0.1:1", "--data-listen", "10.0.0.2:0")


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ((), []),
        (("--instances", "2"), []),
        (("--workers", "2"), []),
        (("--join", "10.0.0.1:1"), []),
        (("--http", "10.0.0.1:2"), ["api_keys"]),
        (EMBEDDED, ["api_keys"]),
        ((*EMBEDDED, *TLS), ["api_keys"]),  # which encrypts, and lets everybody in
        ((*EMBEDDED, *KEYS), []),
        ((*EMBEDDED, *MUTUAL), []),
        ((*EMBEDDED, *MUTUAL, "--no-client-certificates"), ["api_keys"]),
        ((*EMBEDDED, *MUTUAL, "--no-client-certificates", *KEYS), []),
        (CONTROLLER, ["api_keys", "join_token", "join_token"]),
        ((*CONTROLLER, *KEYS), ["join_token", "join_token"]),
        ((*CONTROLLER, *TOKEN), ["api_keys"]),
        ((*CONTROLLER, *KEYS, *TOKEN), []),
        ((*CONTROLLER, *MUTUAL), []),
        ((*CONTROLLER, *MUTUAL, "--no-client-certificates", *KEYS), ["join_token"]),
        ((*CONTROLLER, *MUTUAL, "--no-client-certificates", *KEYS, *TOKEN), []),
        (WORKER, ["join_token"]),
        ((*WORKER, *TOKEN), []),
        ((*WORKER, *MUTUAL), []),
    ],
)
def test_what_strangers_could_do_is_named_with_what_prevents_it(flags: tuple[str, ...], missing: list[str]) -> None:
    config = load(flags)
    found = exposures(config)
    assert [next(name for name in ("api_keys", "join_token") if name in line) for line in found] == missing
    if missing:
        with pytest.raises(ConfigError, match="insecure"):
            refuse_exposure(config)
    assert refuse_exposure(load([*flags, "--insecure"]))[: len(found)] == found


def test_keys_and_activations_that_cross_the_network_readable_are_a_concern() -> None:
    assert len(concerns(load([*CONTROLLER, *KEYS, *TOKEN]))) == 2
    assert not concerns(load([*CONTROLLER, *KEYS, *TOKEN, *MUTUAL]))
    assert not concerns(load(KEYS))


def test_loopback_is_recognised() -> None:
    assert all(map(is_loopback, ("127.0.0.1:1", "127.3.3.3:1", "[::1]:1", "localhost:1")))
    assert not any(map(is_loopback, ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.com:1")))
