"""What to do next so that the fleet gets what is wanted: at most one thing. Pure; does nothing itself.

In order: what is dead is released; what the caps do not allow is given back; what never joined, or does not come back,
is given back; what is missing is asked for, spot and on demand at once; what is too much is given back, on demand
first. The same situation gives the same action, so one that was cut off is simply decided again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.history import History
from spotjax.fleet.capacity.ledger import Budget
from spotjax.fleet.capacity.situation import SETTLE_SECONDS, Held, Situation, Standing
from spotjax.fleet.providers.provider import MachineState, Offer
from spotjax.meshes.instance import PriceClass


@dataclass(frozen=True, slots=True)
class Request:
    """Ask for a machine.

    Attributes:
      offer: as what.
      why: one line.
    """

    offer: Offer
    why: str


@dataclass(frozen=True, slots=True)
class Release:
    """Give a machine back, or what is left of it.

    Attributes:
      name: which one.
      why: one line.
      drain: the fleet moves off it first, and may refuse.
      forced: the fleet may not refuse.
      blame: what it was rented as has come to nothing, and is left alone for a time.
    """

    name: str
    why: str
    drain: bool = False
    forced: bool = False
    blame: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing.

    Attributes:
      until: monotonic seconds at which something may be to do even if nothing happens; infinite if there is nothing.
      why: one line; empty if all is as wanted.
      kind: ``cap`` or ``stockout`` if it is that which stands in the way.
    """

    until: float = inf
    why: str = ""
    kind: str = ""


Action = Request | Release | Wait


def next_action(
    settings: CapacitySettings,
    wanted: int,
    situation: Situation,
    offers: Sequence[Offer],
    history: History,
    budget: Budget,
    now: float,
) -> Action:
    """The next thing to do.

    Args:
      settings: the operator's limits.
      wanted: instances.
      situation: what there is.
      offers: what can be had, in order of preference.
      history: what was refused and since when things are as they are.
      budget: what the caps leave.
      now: monotonic seconds.
    """
    if now < history.provider.until:
        return Wait(history.provider.until, history.provider.why)
    if (forced := _remains(situation, history, now) or _over_budget(situation, history, budget, now)) is not None:
        return forced
    if now < history.last_action + settings.action_seconds:
        return Wait(history.last_action + settings.action_seconds, "one thing after the other")
    if (useless := _useless(settings, situation, offers, history, now)) is not None:
        return useless
    need = Need.of(settings, wanted, situation, history, now)
    missing = _missing(situation, need, offers, history, budget, now)
    if isinstance(missing, Request):
        return missing
    surplus = _surplus(situation, need, wanted, history, now)
    return surplus or missing or Wait(_soonest(settings, need, history, now))


@dataclass(frozen=True, slots=True)
class Need:
    """Machines that there should be, up or coming.

    Attributes:
      spot, on_demand: how many.
      always: of those on demand, how many do not stand in for spot ones.
      fallback_at: monotonic seconds at which on-demand ones will be needed for missing spot ones; infinite if not so.
    """

    spot: int
    on_demand: int
    always: int
    fallback_at: float = inf

    @classmethod
    def of(cls, settings: CapacitySettings, wanted: int, situation: Situation, history: History, now: float) -> Need:
        """How many of each, with those that were started by hand as they are."""
        spot_others = sum(not other.on_demand for other in situation.others)
        others = len(situation.others) - spot_others
        always = wanted if settings.on_demand == "always" else min(wanted, settings.least_on_demand)
        kept = on_demand = max(0, always - others)
        spot = max(0, wanted - max(always, others) - spot_others)
        fallback_at = inf
        if settings.on_demand == "fallback" and history.short_since is not None:
            fallback_at = history.short_since + settings.fallback_seconds
            if now >= fallback_at:
                on_demand += max(0, spot - situation.count(Standing.UP, on_demand=False))
        return cls(spot, on_demand, kept, fallback_at)


def _remains(situation: Situation, history: History, now: float) -> Release | None:
    """What is dead, and what is not listed and was not given back: it may be there nevertheless."""
    for held in _free(situation.machines, history, now):
        machine, released = held.machine, held.entry.released
        again = released and now >= history.given.get(held.name, history.started) + SETTLE_SECONDS
        if held.standing is Standing.DEAD and machine is not None and (again or not released):
            return Release(
                held.name,
                f"{machine.state}: {machine.detail or 'no reason given'}",
                blame=machine.state is MachineState.FAILED,
            )
        if held.standing is Standing.ABSENT and not released:
            return Release(held.name, "the provider does not list it")
        if again and machine is not None and machine.state is not MachineState.STOPPING:
            return Release(held.name, "it was given back and is still there")
    return None


def _over_budget(situation: Situation, history: History, budget: Budget, now: float) -> Release | None:
    """The one to give back because of a cap: those that have not joined first, then the dearest."""
    if budget.excess <= 0:
        return None
    machines = [
        held
        for held in _free(situation.machines, history, now)
        if held.standing in (Standing.COMING, Standing.UP, Standing.AWAY)
    ]
    if not machines:
        return None
    one = min(machines, key=lambda held: (held.standing is Standing.UP, -held.entry.price))
    return Release(one.name, f"cap: {budget.why}", drain=one.standing is Standing.UP, forced=True)


def _useless(
    settings: CapacitySettings, situation: Situation, offers: Sequence[Offer], history: History, now: float
) -> Release | None:
    """A machine that has not joined, or not come back, in time; one that waits where others could be had."""
    for held in _free(situation.machines, history, now):
        name, machine = held.name, held.machine
        late = name in history.keeping or now >= history.left.get(name, now) + settings.return_seconds
        if held.standing is Standing.AWAY and late:
            return Release(name, f"its worker has left and was not back in {settings.return_seconds:g} s")
        if held.standing is Standing.UP and now >= history.joining.get(name, now) + settings.ready_seconds:
            return Release(name, f"its worker was not ready in {settings.ready_seconds:g} s", blame=True)
        if held.standing is not Standing.COMING or machine is None:
            continue
        since = history.running.get(name, history.asked.get(name, history.started))
        if now < since + settings.join_seconds:
            continue
        if machine.state is not MachineState.WAITING:
            return Release(name, f"it is {machine.state}, but did not join in {settings.join_seconds:g} s", blame=True)
        others = [offer for offer in offers if offer.key != held.entry.offer.key]
        if _best(others, held.entry.price_class, history, inf, now) is not None:
            why = f"the provider has had none for {settings.join_seconds:g} s, others may be had"
            return Release(name, why, blame=True)
    return None


def _missing(
    situation: Situation, need: Need, offers: Sequence[Offer], history: History, budget: Budget, now: float
) -> Request | Wait | None:
    """A request for what is missing, or why there is none."""
    wait: Wait | None = None
    room = budget.room
    pairs: tuple[tuple[PriceClass, int], ...] = ("spot", need.spot), ("on_demand", need.on_demand)
    for price_class, wanted in pairs:
        on_demand = price_class == "on_demand"
        have = sum(situation.count(standing, on_demand=on_demand) for standing in (Standing.UP, Standing.COMING))
        if have >= wanted:
            continue
        best = _best(offers, price_class, history, room if not on_demand or have >= need.always else budget.room, now)
        if best is not None:
            return Request(best, f"{have} of {wanted} {price_class.replace('_', '-')} machines are there or coming")
        wait = wait or _why_none(offers, price_class, history, budget, now)
        cheapest = min((offer.price for offer in offers if offer.price_class == price_class), default=0.0)
        room -= (wanted - have) * cheapest  # what stands in must not take the money for what it stands in for
    return wait


def _surplus(situation: Situation, need: Need, wanted: int, history: History, now: float) -> Release | None:
    """The machine to give back: on demand first; of those that have not joined first; then the dearest, the newest."""
    up = len(situation.others) + sum(situation.count(Standing.UP, on_demand=each) for each in (False, True))
    for on_demand, needed in ((True, need.on_demand), (False, need.spot)):
        machines = [
            held
            for held in situation.machines
            if held.on_demand == on_demand and held.standing in (Standing.UP, Standing.COMING)
        ]
        advised = [held for held in machines if held.advised and held.standing is Standing.UP]
        may_drain = not history.leaving  # one after the other: each changes the mesh
        surplus = len(machines) - len(advised) > needed
        free = _free(machines, history, now)
        coming = [held for held in free if held.standing is Standing.COMING]
        members = [held for held in free if held.standing is Standing.UP and not held.advised]
        if surplus and coming:
            one = max(coming, key=lambda held: (_far(held), held.entry.price, held.entry.asked))
            return Release(one.name, "it is not needed any more")
        if advised_free := [held for held in advised if held in free and up >= wanted and may_drain]:
            return Release(advised_free[0].name, "its platform advises to leave it, and others are there", drain=True)
        if surplus and members and up > wanted and may_drain:
            one = max(members, key=lambda held: (held.entry.price, held.entry.asked))
            return Release(one.name, f"{up} instances are there, {wanted} are wanted", drain=True, forced=not wanted)
    return None


def _free(machines: Sequence[Held], history: History, now: float) -> list[Held]:
    """Those that may be given back: not being so already, and not refused lately."""
    return [
        held
        for held in machines
        if held.name not in history.leaving
        and not (held.name in history.keeping and now < history.keeping[held.name].until)
    ]


def _far(held: Held) -> int:
    """How far a machine is from joining."""
    states = (MachineState.RUNNING, MachineState.STARTING, MachineState.WAITING)
    return states.index(held.machine.state) if held.machine is not None and held.machine.state in states else 0


def _best(offers: Sequence[Offer], price_class: PriceClass, history: History, room: float, now: float) -> Offer | None:
    """The cheapest offer that is not left alone, of equals the first, if it fits; else a dearer one does not either."""
    able = [
        offer
        for offer in offers
        if offer.price_class == price_class
        and offer.price <= room
        and not (offer.key in history.offers and now < history.offers[offer.key].until)
    ]
    return min(able, key=lambda offer: offer.price, default=None)


def _why_none(offers: Sequence[Offer], price_class: PriceClass, history: History, budget: Budget, now: float) -> Wait:
    """Why no machine of a price class can be asked for."""
    shown = price_class.replace("_", "-")
    those = [offer for offer in offers if offer.price_class == price_class]
    if not those:
        return Wait(why=f"the provider offers no {shown} machines")
    refusals = [history.offers[offer.key] for offer in those if offer.key in history.offers]
    blocked = [refusal for refusal in refusals if now < refusal.until]
    if len(blocked) < len(those):
        return Wait(why=f"no {shown} machine fits under the cap: {budget.why}", kind="cap")
    soonest = min(blocked, key=lambda refusal: refusal.until)
    return Wait(soonest.until, f"no {shown} machine is to be had: {soonest.why}", kind="stockout")


def _soonest(settings: CapacitySettings, need: Need, history: History, now: float) -> float:
    """When something may be to do although nothing happens."""
    times = [need.fallback_at, *(refusal.until for refusal in history.keeping.values())]
    times += [since + settings.return_seconds for since in history.left.values()]
    times += [since + settings.join_seconds for since in history.running.values()]
    times += [since + settings.ready_seconds for since in history.joining.values()]
    return min((at for at in times if at > now), default=inf)
