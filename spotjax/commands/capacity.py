"""``spotjax capacity``: what a controller would buy, without buying anything."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import TYPE_CHECKING, Any

from spotjax.commands.arguments import add_command
from spotjax.errors import ConfigError

if TYPE_CHECKING:
    from spotjax.commands.arguments import Commands

MOST_ACTIONS = 1024


def add_commands(commands: Commands) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "capacity",
        run,
        "print what a controller would rent with a capacity file, and rent nothing",
        "  spotjax capacity capacity.toml                    for a service that nobody uses yet\n"
        "  spotjax capacity capacity.toml --instances 6      if the load needs six, as spotjax plan may say\n",
    )
    parser.add_argument("file", metavar="FILE", help="as serve takes it with --capacity")
    parser.add_argument(
        "--instances", type=int, default=0, metavar="N", help="instances that the load needs (default: none)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    if arguments.instances < 0:
        raise ConfigError(f"--instances must be at least 0, got {arguments.instances}")
    from spotjax.commands.output import print_json

    found = asyncio.run(plan(arguments.file, arguments.instances))
    if arguments.json:
        print_json(found)
    else:
        from rich.console import Console

        from spotjax.commands.capacity_views import dry_run_view

        Console().print(dry_run_view(found))
    return 0


async def plan(file: str, instances: int) -> dict[str, Any]:
    """What would be done, with what can be had and what is there already.

    Raises:
      ConfigError: the file is not as it must be, or asks for more than it allows.
      ProviderError: the provider does not answer.
    """
    from spotjax.config import ServeConfig
    from spotjax.fleet.capacity.opening import open_described

    config = ServeConfig(listen="127.0.0.1:8470", capacity=os.path.abspath(file))
    settings, provider = await open_described(config, config.address)
    try:
        if instances > settings.most:
            raise ConfigError(f"--instances ({instances}) must be at most {settings.most}, as [capacity] says")
        return rehearse(settings, provider.name, await provider.offers(), await provider.list(), instances)
    finally:
        await provider.close()


def rehearse(settings: Any, name: str, offers: Any, machines: Any, instances: int) -> dict[str, Any]:
    """The first actions of a controller, if the provider grants whatever it is asked for and nothing has joined yet.

    Args:
      settings: the operator's limits.
      name: of the provider.
      offers, machines: what it says.
      instances: that the load needs.
    """
    from random import Random

    import msgspec

    from spotjax.fleet.capacity.keeper import Keeper
    from spotjax.fleet.capacity.ledger import Ledger
    from spotjax.fleet.capacity.load import Measured
    from spotjax.fleet.capacity.next_action import Release, Request
    from spotjax.fleet.providers.provider import Machine, MachineState
    from spotjax.planner.load import Load

    at_once = msgspec.structs.replace(settings, action_seconds=0.0)
    keeper, now, actions, why = Keeper(at_once, Ledger(), Random(0), 0.0), 0.0, list[dict[str, Any]](), ""
    keeper.offers = offers
    keeper.listed(machines, now, now, now)
    keeper.hold(instances, now)
    while len(actions) < MOST_ACTIONS:
        action = keeper.decide(now, now, (), Measured(Load(0.0)), None)
        if isinstance(action, Request):
            named = keeper.asking(action.offer, now, now)
            keeper.asked(Machine(named, action.offer, MachineState.WAITING), now)
            actions.append({"action": "request", "machine": named, "offer": action.offer, "why": action.why})
        elif isinstance(action, Release):
            keeper.giving_back(action, now)
            keeper.given_back(action.name, now)
            actions.append({"action": "release", "machine": action.name, "offer": None, "why": action.why})
        else:
            why = action.why if action is not None else ""
            break
    return {
        "provider": name,
        "offers": offers,
        "machines": machines,
        "wanted": keeper.wanted.instances if keeper.wanted else 0,
        "actions": actions,
        "then": why,
        "cost_per_hour": keeper.ledger.rate,
        "most_per_hour": settings.cost_per_hour,
        "most_per_day": settings.cost_per_day,
    }
