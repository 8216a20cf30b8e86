"""Whatever happens, in any order: no cap is exceeded, no machine leaks, and what is wanted comes in the end."""

from __future__ import annotations

import msgspec
from capacity_cases import OFFERS, SETTINGS, SPOT_A, SPOT_B, Simulated
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from spotjax.errors import ProviderRefused, ProviderUnavailable, QuotaExceeded
from spotjax.fleet.capacity.ledger import DAY
from spotjax.fleet.capacity.next_action import Wait
from spotjax.fleet.providers.provider import MachineState
from spotjax.testing.scripted_provider import PAID

HOURLY, DAILY = 9.0, 12.0
LIMITS = msgspec.structs.replace(
    SETTINGS, cost_per_hour=HOURLY, cost_per_day=DAILY, add_seconds=30 * DAY, stop_seconds=300.0
)
"""All releases are through, retries and restarts included, within ``stop_seconds``: calls fail now and then only."""
TROUBLE = st.sampled_from([ProviderUnavailable("down"), QuotaExceeded("full"), ProviderRefused("no")])


class Buying(RuleBasedStateMachine):
    """A controller, a cloud and a clock."""

    names = Bundle("names")

    @initialize(
        seed=st.integers(0, 1000),
        waits=st.booleans(),
        late=st.floats(0, 7200),
        mode=st.sampled_from(["never", "fallback", "always"]),
        fixed=st.integers(0, 1),
    )
    def begin(self, seed: int, waits: bool, late: float, mode: str, fixed: int) -> None:
        limits = msgspec.structs.replace(LIMITS, on_demand=mode, least_on_demand=0 if mode == "never" else fixed)
        self.simulated = Simulated(limits, start=11 * DAY - late, seed=seed, waits=waits)
        self.wanted, self.dear = 1, False
        self.asked: dict[str, tuple[str, str]] = {}

    @rule(count=st.integers(1, 5))
    def want(self, count: int) -> None:
        self.wanted = count
        self.simulated.want(count)

    @rule(seconds=st.integers(1, 240))
    def run(self, seconds: int) -> None:
        self.simulated.run(seconds, 2.0)

    @rule(hours=st.integers(1, 4))
    def run_long(self, hours: int) -> None:
        self.simulated.run(hours * 3600, 20.0)

    @rule(which=st.integers(0, 9))
    def preempt(self, which: int) -> None:
        if machines := self.simulated.machines:
            self.simulated.cloud.preempt(machines[which % len(machines)].name, "f")

    @rule(which=st.integers(0, 9))
    def break_down(self, which: int) -> None:
        if machines := self.simulated.machines:
            self.simulated.cloud.break_down(machines[which % len(machines)].name, None, "f")

    @rule(which=st.integers(0, 9), leaves=st.booleans())
    def lose_a_worker(self, which: int, leaves: bool) -> None:
        if machines := self.simulated.machines:
            (self.simulated.left if leaves else self.simulated.deaf).add(machines[which % len(machines)].name)

    @rule(offer=st.sampled_from(OFFERS), machines=st.integers(0, 3))
    def stock(self, offer: object, machines: int) -> None:
        self.simulated.cloud.set_capacity(offer, machines)  # type: ignore[arg-type]

    @rule(price=st.floats(0.5, 1.0))
    def cheaper(self, price: float) -> None:
        self.simulated.cloud.set_price(SPOT_A, price)

    @rule(call=st.sampled_from(["list", "request", "release"]), error=TROUBLE)
    def fail(self, call: str, error: object) -> None:
        if call != "request":
            error = ProviderUnavailable("down")
        self.simulated.cloud.fail(call, error)  # type: ignore[arg-type]
        self.simulated.run(30, 2.0)

    @rule(call=st.sampled_from(["list", "request", "release"]))
    def lose_an_answer(self, call: str) -> None:
        self.simulated.cloud.lose_answer(call)  # type: ignore[arg-type]
        self.simulated.run(30, 2.0)

    @rule(effects=st.integers(1, 6), down=st.integers(0, 60))
    def crash(self, effects: int, down: int) -> None:
        self.simulated.crash_in = effects
        self.simulated.run(60, 2.0)
        self.simulated.crash_in = 0
        self.simulated.advance(down)
        self.simulated.restart()

    @rule(refuses=st.booleans())
    def mesh_needs_all(self, refuses: bool) -> None:
        self.simulated.refuse_drain = refuses

    @invariant()
    def the_caps_hold(self) -> None:
        if hasattr(self, "simulated"):
            assert self.simulated.rate <= HOURLY + 1e-9
            assert all(spent <= DAILY + 1e-9 for spent in self.simulated.by_day.values()), self.simulated.by_day

    @invariant()
    def nothing_costs_that_the_ledger_does_not_know(self) -> None:
        if hasattr(self, "simulated"):
            paid = {machine.name for machine in self.simulated.machines if machine.state in PAID}
            known = set(self.simulated.keeper.ledger.entries)
            assert paid <= known, (paid, known)

    @invariant()
    def the_account_is_never_below_the_truth(self) -> None:
        if hasattr(self, "simulated"):
            simulated = self.simulated
            simulated.look()
            assert simulated.keeper.ledger.total >= simulated.cloud.spent - 1.0 / 3600 * 60 * HOURLY

    @invariant()
    def a_name_is_asked_for_once(self) -> None:
        if hasattr(self, "simulated"):
            for asked in self.simulated.cloud.asked:
                if asked.call == "request" and asked.offer is not None:
                    key = asked.offer.type + asked.offer.zone, asked.offer.price_class
                    assert self.asked.setdefault(asked.name, key) == key

    def teardown(self) -> None:
        """The provider behaves, and a new day begins: what is wanted is there, and nothing else."""
        if not hasattr(self, "simulated"):
            return
        simulated, cloud = self.simulated, self.simulated.cloud
        simulated.deaf, simulated.left, simulated.refuse_drain = set(), set(), False
        for offer in OFFERS:
            cloud.set_capacity(offer, 100)
        simulated.run(DAY - simulated.now % DAY, 20.0)
        simulated.run(600, 5.0)
        self.the_caps_hold()
        limits = simulated.settings
        on_demand = self.wanted if limits.on_demand == "always" else min(self.wanted, limits.least_on_demand)
        affordable = on_demand * 3.0 + (self.wanted - on_demand) * 1.2 <= HOURLY
        if affordable:
            spot = self.wanted - on_demand
            assert (simulated.up("spot"), simulated.up("on_demand")) == (spot, on_demand), simulated.last
            assert len(simulated.machines) == self.wanted
        states = {machine.state for machine in simulated.machines}
        assert states <= {MachineState.RUNNING, MachineState.STOPPING, MachineState.STARTING}
        assert isinstance(simulated.last, Wait)
        assert {machine.name for machine in simulated.machines} == set(simulated.keeper.ledger.entries)
        assert SPOT_B.price > SPOT_A.price


TestBuying = Buying.TestCase
TestBuying.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
