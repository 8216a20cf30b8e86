"""What people see of how a controller comes by its machines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from spotjax.fleet.status import CapacityStatus

SHOWN_ACTIONS = 5


def capacity_view(capacity: CapacityStatus) -> RenderableType:
    """What is wanted, rented and spent, and what was done last."""
    table = Table(title=f"machines of {escape(capacity.provider)}", title_justify="left")
    for heading in ("name", "type", "zone", "price", "USD/h", "provider says", "in the fleet"):
        table.add_column(heading, no_wrap=heading == "name", justify="right" if heading == "USD/h" else "left")
    for machine in capacity.machines:
        price_class = machine.price_class.replace("_", "-")
        cells = (machine.name, machine.type, machine.zone, price_class)
        table.add_row(*map(escape, cells), f"{machine.price:.2f}", machine.state, machine.standing)
    parts: list[RenderableType] = [table, f"wanted: {capacity.wanted} ({escape(capacity.why)})"]
    if capacity.waiting:
        parts.append(f"waiting: {escape(capacity.waiting)}")
    parts.append(
        f"cost: {capped(capacity.cost_per_hour, capacity.most_per_hour)} USD per hour, "
        f"{capped(capacity.spent_today, capacity.most_per_day)} USD today (UTC)"
        + (f"; on demand {capacity.on_demand_per_hour:.2f} USD per hour" if capacity.on_demand_per_hour else "")
    )
    for event in capacity.actions[-SHOWN_ACTIONS:]:
        parts.append(f"{time.strftime('%H:%M:%S', time.localtime(event.time))} {event.kind}: {escape(event.message)}")
    return Group(*parts)


def dry_run_view(found: Mapping[str, Any]) -> RenderableType:
    """Offers, what is there, and what would be done."""
    offers = Table(title=f"offers of {escape(found['provider'])}", title_justify="left")
    for heading in ("type", "zone", "price", "USD/h"):
        offers.add_column(heading, justify="right" if heading == "USD/h" else "left")
    for offer in found["offers"]:
        offers.add_row(
            *map(escape, (offer.type, offer.zone, offer.price_class.replace("_", "-"))), f"{offer.price:.2f}"
        )
    parts: list[RenderableType] = [offers]
    parts += [f"is there: {escape(machine.name)} ({machine.state})" for machine in found["machines"]]
    parts.append(f"wanted: {found['wanted']} instances")
    for action in found["actions"]:
        as_what = f" as {escape(str(action['offer']))}" if action["offer"] is not None else ""
        parts.append(f"would {action['action']} {escape(action['machine'])}{as_what}: {escape(action['why'])}")
    if found["then"]:
        parts.append(f"would wait: {escape(found['then'])}")
    parts.append(f"all that may exist then: {capped(found['cost_per_hour'], found['most_per_hour'])} USD per hour")
    parts.append("nothing was rented")
    return Group(*parts)


def capped(value: float, most: float) -> str:
    """``1.20 of 5.00``."""
    return f"{value:.2f} of {most:.2f}" if most else f"{value:.2f}"
