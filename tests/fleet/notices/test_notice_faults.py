"""Whatever goes wrong between a platform and those who listen to it, no notice is false, missed or far too late."""

from __future__ import annotations

import random

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metadata_cases import URL, now, wall
from virtual_time import run

from spotjax.testing.metadata_server import MetadataTransport
from spotjax.tools.notice_chaos import Play, Verdict, draw_spells, judge, play
from spotjax.tools.notice_sites import SITES, Site

SECONDS = 120.0


async def one(kind: type[Site], seed: int, count: int, skew: float) -> Verdict:
    """A play in virtual time."""
    draw = random.Random(seed)
    begun = now()
    site = kind(wall, skew, wall())
    acted = Play(site, draw_spells(draw, count, SECONDS, site.paths))
    transport = MetadataTransport(site.metadata, lambda request: acted.fault(now() - begun, request))
    async with httpx.AsyncClient(transport=transport) as client:
        await play(acted, site.source(client, now, URL), now, begun, site.draw_moves(draw, SECONDS), SECONDS)
    return judge(acted)


@pytest.mark.parametrize("site", SITES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 30), skew=st.sampled_from([0.0, 300.0, -300.0]))
def test_notices_are_true_and_in_time_whatever_goes_wrong(site: str, seed: int, count: int, skew: float) -> None:
    assert run(one(SITES[site], seed, count, skew)).problems == []
