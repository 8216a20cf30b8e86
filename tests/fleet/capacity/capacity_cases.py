"""A controller's keeper and a cloud in memory, driven step by step in time of their own, with crashes at any point."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import msgspec

from spotjax.errors import ProviderError, ProviderUnavailable
from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.keeper import Keeper
from spotjax.fleet.capacity.ledger import DAY, Ledger
from spotjax.fleet.capacity.load import Measured
from spotjax.fleet.capacity.next_action import Action, Release, Request
from spotjax.fleet.providers.provider import Machine, MachineState, Offer
from spotjax.meshes.instance import Instance, InstanceState, InstanceType
from spotjax.planner.load import Load
from spotjax.testing.scripted_provider import PAID, ScriptedCloud

T = TypeVar("T")
KIND = InstanceType("box", 1, 2**30, 1e9, 1e9, 1e9, 1e8)
SPOT_A = Offer("box", "a", "spot", 1.0)
SPOT_B = Offer("box", "b", "spot", 1.2)
ON_DEMAND = Offer("box", "a", "on_demand", 3.0)
OFFERS = (SPOT_A, SPOT_B, ON_DEMAND)
QUIET = Measured(Load(0.0))
SETTINGS = CapacitySettings(
    fleet="f", most=8, cost_per_hour=100.0, retry_seconds=5.0, most_retry_seconds=20.0, join_seconds=100.0,
    return_seconds=40.0, shrink_seconds=0.0, action_seconds=1.0,
)  # fmt: skip


def at_once(call: Coroutine[Any, Any, T]) -> T:
    """What a call comes to that waits for nothing."""
    try:
        call.send(None)
    except StopIteration as ended:
        return ended.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


class Crash(Exception):
    """The controller is killed here."""


@dataclass
class Simulated:
    """Both of them.

    Attributes:
      deaf: machines whose worker never joins.
      hung: machines whose worker registers and never becomes ready.
      refuse_drain: the fleet cannot do without any of its members.
      crash_in: the controller is killed when so many more effects have begun or ended; 0 lets it live.
      by_day: USD that were really spent, by day.
    """

    settings: CapacitySettings = SETTINGS
    start: float = 10 * DAY
    start_seconds: float = 20.0
    waits: bool = False
    seed: int = 0
    deaf: set[str] = field(default_factory=set)
    hung: set[str] = field(default_factory=set)
    others: list[Instance] = field(default_factory=list)
    left: set[str] = field(default_factory=set)
    advised: frozenset[str] = frozenset()
    refuse_drain: bool = False
    crash_in: int = 0
    by_day: dict[int, float] = field(default_factory=dict)
    done: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.now = self.start
        self.cloud = ScriptedCloud(
            OFFERS, lambda: self.now, start_seconds=self.start_seconds, stop_seconds=10.0, waits=self.waits
        )
        self.provider = self.cloud.provider("f")
        self.saved = msgspec.json.encode(Ledger())
        self.last: Action | None = None
        self.restart()

    def restart(self) -> None:
        """A new controller on what was saved."""
        ledger = msgspec.json.decode(self.saved, type=Ledger)
        self.keeper = Keeper(self.settings, ledger, Random(self.seed), self.now)

    @property
    def machines(self) -> tuple[Machine, ...]:
        """What there really is."""
        return self.cloud.machines("f")

    @property
    def rate(self) -> float:
        """USD per hour that is really paid."""
        prices = {offer.key: offer.price for offer in self.cloud.offers}
        return sum(prices[machine.offer.key] for machine in self.machines if machine.state in PAID)

    def members(self) -> list[Instance]:
        """Workers that run and have joined."""
        ours = [
            Instance(
                machine.name,
                KIND,
                InstanceState.JOINING if machine.name in self.hung else InstanceState.READY,
                on_demand=machine.offer.price_class == "on_demand",
            )
            for machine in self.machines
            if machine.state is MachineState.RUNNING and machine.name not in self.deaf | self.left
        ]
        return ours + self.others

    def up(self, price_class: str) -> int:
        """Members of a price class."""
        return sum(member.on_demand == (price_class == "on_demand") for member in self.members())

    def advance(self, seconds: float) -> None:
        """Time passes, and is paid."""
        end = self.now + seconds
        while self.now < end:
            midnight = (self.now // DAY + 1) * DAY
            before, day = self.cloud.spent, int(self.now // DAY)
            self.cloud.advance()
            self.now = min(end, midnight)
            self.cloud.advance()
            self.by_day[day] = self.by_day.get(day, 0.0) + self.cloud.spent - before

    def want(self, instances: int) -> None:
        """So many are wanted from now on."""
        self.keeper.hold(instances, self.now)
        self.save()

    def run(self, seconds: float, step: float = 1.0) -> None:
        """The controller looks and acts as time passes: once in every step, or until there is nothing to do now."""
        end = self.now + seconds
        while self.now < end:
            self.look()
            for _ in range(round(step) - 1):
                if not isinstance(self.last, Release):
                    break
                self.look()
            self.advance(step)

    def look(self) -> None:
        """One round of the controller; it may be killed in it, and comes back at once."""
        try:
            self._look()
        except Crash:
            self.restart()

    def _look(self) -> None:
        keeper = self.keeper
        if self.now >= keeper.history.provider.until:
            try:
                keeper.offers = at_once(self.provider.offers())
                keeper.listed(at_once(self.provider.list()), self.now, self.now, self.now)
            except ProviderError as problem:
                keeper.history.unavailable(self.now, str(problem))
        action = keeper.decide(self.now, self.now, self.members(), QUIET, None, self.advised)
        self.last = action
        if isinstance(action, Request):
            self.done.append(action)
            self._request(action)
        elif isinstance(action, Release):
            self.done.append(action)
            self._release(action)
        self.save()

    def _request(self, request: Request) -> None:
        keeper = self.keeper
        name = keeper.asking(request.offer, self.now, self.now)
        self._may_crash()
        self.save()
        self._may_crash()
        try:
            machine = at_once(self.provider.request(name, request.offer))
        except ProviderUnavailable as problem:
            keeper.unanswered(name, problem, None, self.now)
        except ProviderError as problem:
            self._may_crash()
            keeper.not_asked(name, request.offer, problem, self.now)
        else:
            self._may_crash()
            keeper.asked(machine, self.now)

    def _release(self, release: Release) -> None:
        keeper = self.keeper
        keeper.giving_back(release, self.now)
        self._may_crash()
        if release.drain and self.refuse_drain and not release.forced:
            keeper.kept(release.name, RuntimeError("no mesh fits without it"), self.now)
            return
        if release.drain:
            self.left.add(release.name)
        self._may_crash()
        try:
            at_once(self.provider.release(release.name))
        except ProviderError as problem:
            keeper.kept(release.name, problem, self.now)
            return
        self._may_crash()
        keeper.given_back(release.name, self.now)

    def _may_crash(self) -> None:
        if self.crash_in:
            self.crash_in -= 1
            if not self.crash_in:
                raise Crash

    def save(self) -> None:
        """The ledger is on disk."""
        self.saved = msgspec.json.encode(self.keeper.ledger)
