"""On which platform this machine is, and which sources of notices belong to it.

Every platform's metadata server proves by something of its own that it is the one: only then it is listened to.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import httpx

from spotjax.fleet.notices import gce
from spotjax.fleet.notices.aws import AwsSource
from spotjax.fleet.notices.azure import AzureSource
from spotjax.fleet.notices.notice import NoticeSource
from spotjax.fleet.notices.patience import METADATA

log = logging.getLogger("spotjax.notices")

SECONDS = 2.0
"""For an answer."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0)
"""Between attempts, in seconds: a machine that boots has no network for some time, a laptop never has such a server."""
AWS_TOKEN = re.compile(r"[A-Za-z0-9_\-+/]{20,}={0,2}")


class Platform(StrEnum):
    """Where a machine can be."""

    GCE = "gce"
    TPU = "tpu"
    AWS = "aws"
    AZURE = "azure"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the sources of a machine need to know.

    Attributes:
      instance: its name in the fleet.
      base_url: of its metadata server, without a path.
      notice_seconds: that Compute Engine gives it between the notice of a preemption and its end.
      maintenance_seconds: the same of host maintenance.
    """

    instance: str
    base_url: str = METADATA
    notice_seconds: float = gce.PREEMPTED_SECONDS
    maintenance_seconds: float = gce.MAINTENANCE_SECONDS


async def detect(client: httpx.AsyncClient, base_url: str = METADATA) -> Platform | None:
    """The platform whose metadata server answers; None if none does. Asks for all at once."""
    asked = await asyncio.gather(*(_asked(ask, client, base_url) for ask in (_google, _aws, _azure)))
    return next((platform for platform in asked if platform is not None), None)


async def detect_patiently(
    client: httpx.AsyncClient, base_url: str = METADATA, pauses: Sequence[float] = PAUSES
) -> Platform | None:
    """The same, with several attempts; None if there is no metadata server after all of them."""
    for pause in (*pauses, None):
        if (platform := await detect(client, base_url)) is not None:
            log.info("this machine is on %s: listening for its notices", platform)
            return platform
        if pause is not None:
            await asyncio.sleep(pause)
    log.info("no metadata server answers at %s: this machine gets no notices from a cloud", base_url)
    return None


def sources_of(
    platform: Platform, machine: Machine, client: httpx.AsyncClient, clock: Callable[[], float]
) -> tuple[NoticeSource, ...]:
    """Everything that a platform can say of one of its machines."""
    match platform:
        case Platform.GCE | Platform.TPU:
            return gce.gce_sources(
                machine.instance, client, clock, machine.base_url, name=platform.value,
                preempted_seconds=machine.notice_seconds, maintenance_seconds=machine.maintenance_seconds,
            )  # fmt: skip
        case Platform.AWS:
            return (AwsSource(machine.instance, client, clock, machine.base_url),)
        case Platform.AZURE:
            return (AzureSource(machine.instance, client, clock, machine.base_url),)


async def _asked(
    ask: Callable[[httpx.AsyncClient, str], Awaitable[Platform | None]], client: httpx.AsyncClient, base_url: str
) -> Platform | None:
    try:
        async with asyncio.timeout(SECONDS):
            return await ask(client, base_url)
    except (httpx.HTTPError, TimeoutError, ValueError) as problem:
        log.debug("%s is not answered: %s", getattr(ask, "__name__", ask), problem)
        return None


async def _google(client: httpx.AsyncClient, base_url: str) -> Platform | None:
    """Compute Engine shows the header that it wants to see; TPU VMs know what they are part of."""
    url = f"{base_url}{gce.ROOT}instance/attributes/"
    answer = await client.get(url, headers=gce.FLAVOR, follow_redirects=False)
    if answer.status_code != 200 or answer.headers.get("Metadata-Flavor") != "Google":
        return None
    attributes = answer.text.split()
    return Platform.TPU if {"tpu-env", "agent-worker-number"} & set(attributes) else Platform.GCE


async def _aws(client: httpx.AsyncClient, base_url: str) -> Platform | None:
    """Only EC2 gives tokens in answer to PUT."""
    url, lifetime = f"{base_url}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    answer = await client.put(url, headers=lifetime, follow_redirects=False)
    return Platform.AWS if answer.status_code == 200 and AWS_TOKEN.fullmatch(answer.text.strip()) else None


async def _azure(client: httpx.AsyncClient, base_url: str) -> Platform | None:
    """Azure's knows which VM it is."""
    url, wanted = f"{base_url}/metadata/instance", {"Metadata": "true"}
    answer = await client.get(url, params={"api-version": "2021-02-01"}, headers=wanted, follow_redirects=False)
    described = answer.json() if answer.status_code == 200 else None
    compute = described.get("compute") if isinstance(described, dict) else None
    return Platform.AZURE if isinstance(compute, dict) and compute.get("vmId") else None
