"""The benchmark of HTTP measures both ways, and its streams that wait hold up nobody."""

from __future__ import annotations

import argparse

import pytest

from spotjax.tools import bench_http


async def test_both_ways_are_measured_in_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_http, "IDLE", 4)
    monkeypatch.setattr(bench_http, "ACTIVE", 2)
    results = await bench_http.bench(argparse.Namespace(streams=[2], seconds=0.1, turns=1, model="", tokens=0))
    (row,) = results["per_token"]
    assert (
        row["http_messages_per_token"] > 0.2 and row["grpc_messages_per_token"] > 0.2
    )  # more come together if it lags
    assert row["service_us"] > 0 and results["many"]["idle"] == 4
    bench_http.show(results)
    assert "us per token" in capsys.readouterr().out
