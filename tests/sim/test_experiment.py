import pytest
from results_cases import G4DN, FixedTime, scenario

from spotjax.errors import ConfigError
from spotjax.meshes.instance_types import instance_type
from spotjax.models.presets import preset
from spotjax.sim.experiment import TICKS, prefill_share, simulate
from spotjax.sim.systems import registry
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace, by_counts
from spotjax.sim.world import Scenario

CASE = scenario(RequestTrace.of("some", [0.0, 1.0, 70.0], 300, 20), by_counts("some", [(0, 2), (40, 3)], 80.0))


@pytest.fixture(autouse=True)
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**registry.SYSTEMS, "fixed": lambda scenario, required: FixedTime(2.0)}
    monkeypatch.setattr(registry, "SYSTEMS", known)


def test_a_run_is_named_as_it_was_asked_for_and_tells_how_far_it_is() -> None:
    told: list[float] = []
    result = simulate(CASE, "fixed", seed=4, progress=told.append)
    assert (result.system, result.seed, result.duration) == ("fixed", 4, 80)
    assert result.latency().tolist() == [2, 3, 2]
    assert told == [n / TICKS for n in range(1, TICKS + 1)]
    assert simulate(CASE, "fixed", seed=4).summary() == result.summary()


def test_a_number_after_a_colon_replaces_the_spot_trace_by_on_demand_instances() -> None:
    result = simulate(CASE, "fixed:3")
    assert result.system == "fixed:3" and result.instances == ((0.0, 3),)
    assert (result.spot_hours, result.on_demand_hours) == (0, 3 * 80 / 3600)
    assert result.usd == pytest.approx(3 * 80 / 3600 * G4DN.on_demand_price)
    tested, rented = registry.system("on-demand:5", CASE)
    assert tested.name == "spotjax" and rented.spot.counts() == [(0, 5)] and rented.spot.duration == 80


@pytest.mark.parametrize("name", [*registry.SYSTEMS, "spotserve:4", "rerouting:4", "on-demand:4"])
def test_every_system_can_be_set_up_and_serves(name: str) -> None:
    summary = simulate(CASE, name).summary()
    assert summary.finished == 3 and summary.lost == 0 and summary.censored == 0
    assert summary.changes >= 1 and summary.number("latency.largest") < 30


RECOVERING = ["spotjax", "skyserve", "spotserve", "reparallelization", "rerouting"]


@pytest.mark.parametrize("name", RECOVERING)
def test_clients_that_wait_for_a_token_at_the_end_have_waited_since_their_last_one(name: str) -> None:
    """All instances go at 45 s, while it decodes."""
    spot = by_counts("gone", [(0, 2), (45, 0)], 100.0)
    result = simulate(scenario(RequestTrace.of("one", [40.0], 300, 400), spot, notice_seconds=0.0), name)
    assert not result.finished.any() and result.first_token[0] < 45
    assert 55 <= result.largest_gap[0] < 56


@pytest.mark.parametrize("name", RECOVERING)
def test_requests_that_run_at_the_end_have_waited_for_the_tokens_that_they_have(name: str) -> None:
    request, steady = RequestTrace.of("one", [40.0], 300, 400), by_counts("steady", [(0, 2)], 45.0)
    result = simulate(scenario(request, steady), name)
    assert not result.finished.any() and 0 < result.largest_gap[0] < 1


@pytest.mark.parametrize("name", [*RECOVERING, "on-demand:2", "spotserve:2", "skyserve:2"])
def test_every_system_waits_for_its_processes_to_start(name: str) -> None:
    """Also where instances come later, and where it has never had any."""
    first = []
    for spot in (by_counts("there", [(0, 2)], 200.0), by_counts("later", [(50, 2)], 200.0)):
        for seconds in (0.0, 20.0):
            case = scenario(RequestTrace.of("one", [0.0], 300, 4), spot, engine_start_seconds=seconds)
            first.append(float(simulate(case, name).first_token[0]))
    assert first[1] == pytest.approx(first[0] + 20)
    if ":" in name:
        assert first[2:] == first[:2]
    else:
        assert 50 < first[2] < first[3]


def test_published_systems_are_told_the_rate_that_they_must_serve_and_their_pool() -> None:
    workload = registry.published_workload(CASE, None)
    assert workload.least_devices == 4 and workload.required == ((0.0, 3 / 80),)
    assert registry.published_workload(CASE, ((0.0, 2.0),)).required == ((0.0, 2.0),)


def test_published_systems_may_span_instances_with_tensor_groups_as_their_tables_do_and_others_as_told() -> None:
    for name, across in (("spotserve", 4), ("rerouting:2", 4), ("spotjax", 1)):
        assert registry.system(name, CASE)[1].kind.tensor_instances == across


@pytest.mark.parametrize("name", ["spotserve", "rerouting", "reparallelization"])
def test_published_systems_need_published_tables(name: str) -> None:
    for spec, kind in ((preset("llama-3-8b"), G4DN), (CASE.spec, instance_type("g5.12xlarge"))):
        other = Scenario("other", spec, CASE.latency, kind, CASE.spot, CASE.requests)
        with pytest.raises(ConfigError, match="tables of"):
            registry.system(name, other)


@pytest.mark.parametrize("name", ["", "banana", "on-demand", "fixed:", "fixed:x", "fixed:0", "spotjax-no-banana"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="system"):
        registry.system(name, CASE)


def test_the_share_of_prompts_is_that_of_the_mesh_that_served_longest() -> None:
    spot = SpotTrace("shrinks", (SpotEvent(0, ("a", "b")), SpotEvent(70, removed=("b",))), 80.0)
    case = scenario(CASE.requests, spot)
    long_prompts = scenario(RequestTrace.of("long", [0.0, 1.0], 3000, 20), spot)
    share, longer = (prefill_share(simulate(one, "fixed"), one) for one in (case, long_prompts))
    assert share is not None and longer is not None and 0 < share < longer < 1
    assert prefill_share(simulate(scenario(RequestTrace.of("none", [], 1, 1)), "fixed"), case) is None
