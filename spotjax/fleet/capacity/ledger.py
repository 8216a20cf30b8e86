"""What was asked of the provider and what it may have cost: plain data and functions of it. Where it is kept is in
``ledger_file``.

Everything is counted so that the truth can only be cheaper. A machine is in the ledger from before it is asked for
until it was given back and the provider does not list it any more; all that time counts as running, at the highest
price seen, but for stretches at both ends of which the provider said that it waits. Days are UTC.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.providers.provider import Offer
from spotjax.meshes.instance import PriceClass

DAY = 86400.0
HOUR = 3600.0
ANYWHERE = "*"
USEFUL_SECONDS = 600.0
"""A machine is only asked for if the day's money lasts so long with it."""


class Entry(msgspec.Struct, frozen=True):
    """A machine that may exist.

    Attributes:
      name: see ``Machine``.
      type, zone, price_class, price: of the offer; the price is the newest.
      asked: when it was first asked for, Unix seconds.
      counted: until when it is counted in what was spent, Unix seconds.
      waiting: the provider said, when it was counted, that it has none to give yet.
      released: it was given back: the provider has said so.
      joined: it was a member of the fleet.
    """

    name: str
    type: str
    zone: str
    price_class: PriceClass
    price: float
    asked: float
    counted: float
    waiting: bool = False
    released: bool = False
    joined: bool = False

    @property
    def offer(self) -> Offer:
        """What it was asked for as."""
        return Offer(self.type, self.zone, self.price_class, self.price)


class Ledger(msgspec.Struct, frozen=True):
    """All of it.

    Attributes:
      number: of the next machine's name.
      day: days since 1970 of what ``spent`` is of.
      spent: USD on that day.
      total: USD ever.
      entries: machines that may exist, by name.
      floor: instances that an operator wants at least.
      floor_until: as long, Unix seconds.
    """

    number: int = 0
    day: int = 0
    spent: float = 0.0
    total: float = 0.0
    entries: dict[str, Entry] = {}
    floor: int = 0
    floor_until: float = 0.0

    @property
    def rate(self) -> float:
        """USD per hour of all machines that may exist."""
        return sum(entry.price for entry in self.entries.values())


def on_demand_rate(ledger: Ledger, offers: Iterable[Offer]) -> float:
    """USD per hour of all machines that may exist if they were on demand; 0 if the price of one is not known.

    A type that has no such offer in a machine's zone counts at the cheapest of another zone.
    """
    prices: dict[tuple[str, str], float] = {}
    for offer in offers:
        if offer.price_class == "on_demand":
            for zone in (offer.zone, ANYWHERE):
                prices[offer.type, zone] = min(offer.price, prices.get((offer.type, zone), offer.price))
    total = 0.0
    for entry in ledger.entries.values():
        anywhere = prices.get((entry.type, ANYWHERE), 0.0)
        price = entry.price if entry.price_class == "on_demand" else prices.get((entry.type, entry.zone), anywhere)
        if not price:
            return 0.0
        total += price
    return total


def asked(ledger: Ledger, fleet: str, offer: Offer, now: float) -> tuple[Ledger, str]:
    """A machine is about to be asked for: the ledger with it, and its name, which none ever had."""
    name = f"{fleet}-{ledger.number}"
    entry = Entry(name, offer.type, offer.zone, offer.price_class, offer.price, now, now)
    return msgspec.structs.replace(ledger, number=ledger.number + 1, entries=ledger.entries | {name: entry}), name


def found(ledger: Ledger, fleet: str, name: str, offer: Offer, since: float) -> Ledger:
    """The provider lists a machine that the ledger does not know: it counts from when it was made on."""
    entry = Entry(name, offer.type, offer.zone, offer.price_class, offer.price, since, since)
    number = ledger.number
    prefix, _, rest = name.rpartition("-")
    if prefix == fleet and rest.isdecimal():
        number = max(number, int(rest) + 1)
    return msgspec.structs.replace(ledger, number=number, entries=ledger.entries | {name: entry})


def changed(ledger: Ledger, name: str, **fields: bool) -> Ledger:
    """One entry has changed."""
    entry = msgspec.structs.replace(ledger.entries[name], **fields)
    return msgspec.structs.replace(ledger, entries=ledger.entries | {name: entry})


def ended(ledger: Ledger, name: str) -> Ledger:
    """A machine does not exist any more. To be called when it was counted."""
    return msgspec.structs.replace(ledger, entries={n: e for n, e in ledger.entries.items() if n != name})


def counted(ledger: Ledger, now: float, waiting: Collection[str], prices: Mapping[str, float]) -> Ledger:
    """Counts what all machines may have cost until ``now``.

    Args:
      ledger: as it is.
      now: Unix seconds. If a clock went back, nothing is counted until it was there before; never less than before.
      waiting: machines that the provider says wait.
      prices: USD per hour now, of those of which it is known.
    """
    day = int(now // DAY)
    spent = 0.0 if day > ledger.day else ledger.spent
    total, entries = ledger.total, {}
    for name, entry in ledger.entries.items():
        price = prices.get(name, entry.price)
        if not (entry.waiting and name in waiting):
            each = max(price, entry.price) / HOUR
            total += each * max(0.0, now - entry.counted)
            spent += each * max(0.0, now - max(entry.counted, max(day, ledger.day) * DAY))
        entries[name] = msgspec.structs.replace(entry, counted=now, price=price, waiting=name in waiting)
    return msgspec.structs.replace(ledger, day=max(day, ledger.day), spent=spent, total=total, entries=entries)


@dataclass(frozen=True, slots=True)
class Budget:
    """What the caps leave.

    Attributes:
      room: USD per hour of machines that may be asked for now.
      excess: USD per hour of machines that must be given back now.
      why: which cap it is; empty where there is room.
    """

    room: float
    excess: float
    why: str


def budget(ledger: Ledger, settings: CapacitySettings, leaving: Collection[str]) -> Budget:
    """What may be asked for, so that no cap is exceeded even if all that may exist runs, and is given back too late.

    Args:
      ledger: counted until now.
      settings: the caps.
      leaving: machines that are being given back.
    """
    room, excess, why = float("inf"), 0.0, ""
    staying = sum(entry.price for name, entry in ledger.entries.items() if name not in leaving)
    if settings.cost_per_hour:
        room = settings.cost_per_hour - ledger.rate
        excess = staying - settings.cost_per_hour
        why = f"{ledger.rate:.2f} of {settings.cost_per_hour:g} USD per hour"
    if settings.cost_per_day:
        left = settings.cost_per_day - ledger.spent
        if left - ledger.rate * settings.stop_seconds / HOUR <= 0 and ledger.rate:
            excess = staying
        of_day = left * HOUR / (settings.stop_seconds + USEFUL_SECONDS) - ledger.rate
        if of_day < room:
            room = of_day
            why = f"{ledger.spent:.2f} of {settings.cost_per_day:g} USD spent today, {ledger.rate:.2f} USD per hour"
    return Budget(max(0.0, room), max(0.0, excess), why)
