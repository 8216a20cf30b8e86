"""SpotServe's tables and its own rule, against what its paper and artifact say."""

import json

import pytest

from spotjax.errors import ConfigError
from spotjax.meshes.instance_types import parse_instances
from spotjax.meshes.layout import split_layers
from spotjax.meshes.shape import MeshShape
from spotjax.models.presets import preset
from spotjax.planner.demand import Demand
from spotjax.planner.goal import Goal
from spotjax.planner.latency import Stage, Work, prefill_seconds, step_seconds
from spotjax.planner.load import Load
from spotjax.planner.optimizer import choose_shape
from spotjax.planner.published import BATCHES, PublishedProfile, choose_as_original, read_table, request_seconds
from spotjax.planner.published_tables import TABLES, Table

PAPER_TABLE_1 = {"opt-6.7b": (1, 4, 5.447), "gpt-20b": (3, 4, 14.373), "llama-30b": (2, 8, 17.540)}
REQUIRED = {"opt-6.7b": (2.0, 4), "gpt-20b": (0.4, 12), "llama-30b": (0.2, 16)}
# Chosen by running the artifact's rule on its profiles: shape, B where it matters, phi, l_exe, feasible.
CHOSEN_BY_ORIGINAL = {
    "opt-6.7b": {
        12: ("6x2x4", 2.54), 10: ("5x2x4", 2.11), 9: ("9x1x4", 3.68), 8: ("8x1x4", 3.27), 7: ("7x1x4", 2.86),
        6: ("6x1x4", 2.46), 4: ("4x1x4", 3.03), 3: ("3x1x4", 2.27),
    },
    "gpt-20b": {
        12: ("3x2x8", 0.495), 10: ("2x2x8", 0.617), 9: ("2x2x8", 0.617), 8: ("2x2x8", 0.617), 7: ("2x3x4", 0.553),
        6: ("2x3x4", 0.553), 4: ("1x2x8", 0.309), 3: ("1x3x4", 0.277),
    },
    "llama-30b": {
        12: ("1x6x8", 0.231), 10: ("1x4x8", 0.230), 9: ("1x4x8", 0.230), 8: ("1x4x8", 0.230), 7: ("1x3x8", 0.229),
        6: ("1x3x8", 0.229), 4: ("1x2x8", 0.225),
    },
}  # fmt: skip


@pytest.mark.parametrize("model", PAPER_TABLE_1)
def test_the_tables_give_the_request_latencies_of_the_paper(model: str) -> None:
    stages, tensor, seconds = PAPER_TABLE_1[model]
    assert request_seconds(TABLES[model], stages, tensor) == pytest.approx(seconds, abs=5e-4)


@pytest.mark.parametrize("model", CHOSEN_BY_ORIGINAL)
def test_the_original_rule_chooses_what_the_artifact_chooses_for_every_number_of_instances(model: str) -> None:
    required, least = REQUIRED[model]
    for instances, (shape, rate) in CHOSEN_BY_ORIGINAL[model].items():
        choice = choose_as_original(TABLES[model], 4 * instances, required, least)
        assert (str(choice.shape), choice.requests_per_second) == (shape, pytest.approx(rate, abs=6e-3)), instances
        assert choice.feasible == (rate >= required)


def test_the_original_rule_under_other_loads() -> None:
    table = TABLES["gpt-20b"]
    assert str(choose_as_original(table, 40, 0.8, 12).shape) == "3x3x4"
    assert str(choose_as_original(table, 48, 0.8, 12).shape) == "3x2x8"
    assert not choose_as_original(table, 32, 0.8, 12).feasible
    assert choose_as_original(table, 24, 0.4, 12).seconds == pytest.approx(14.46, abs=5e-3)
    with pytest.raises(ValueError, match="at least 12 devices, got 8"):
        choose_as_original(table, 8, 0.4, 12)


def choose_ours(model: str, instances: int, rate: float):
    return choose_shape(
        preset(model),
        parse_instances(f"{instances}xg4dn.12xlarge"),
        Demand(batch=8),
        goal=Goal(load=Load(rate, arrival_scv=1.0, service_scv=0.0)),
        latency=lambda _: PublishedProfile(TABLES[model]),
    )


def test_our_choice_serves_loads_that_the_original_cannot_on_as_many_instances() -> None:
    for instances in (3, 4):
        assert not choose_as_original(TABLES["gpt-20b"], 4 * instances, 0.4, 12).feasible
        ours = choose_ours("gpt-20b", instances, 0.4)
        assert ours.rate > 0.4 and ours.seconds < 60


@pytest.mark.parametrize("model", ["gpt-20b", "llama-30b"])
def test_our_choice_serves_more_on_every_number_of_instances(model: str) -> None:
    required, least = REQUIRED[model]
    for instances in CHOSEN_BY_ORIGINAL[model]:
        original = choose_as_original(TABLES[model], 4 * instances, required, least)
        ours = choose_shape(
            preset(model),
            parse_instances(f"{instances}xg4dn.12xlarge"),
            Demand(batch=8),
            latency=lambda _: PublishedProfile(TABLES[model]),
        )
        assert ours.rate > original.requests_per_second, instances


def as_json(table: Table) -> dict:
    """The artifact's format."""
    return {
        "layer_num": table.layers, "padded_layer_num": table.padded_layers, "hidden_size": table.hidden_size,
        "max_tp": table.max_tensor, "final_fix_factor": table.final_factor, "embed": list(table.embed),
        "pp_init_comm": table.prefill_hop, "pp_incr_comm": table.decode_hop,
    } | {
        f"tp-{m}": {f"bsz-{b}": {"init": init, "incr": incr} for b, (init, incr) in zip(BATCHES, cells, strict=True)}
        for m, cells in table.cells.items()
    }  # fmt: skip


def test_a_profile_of_the_artifact_is_read() -> None:
    content = as_json(TABLES["gpt-20b"])
    assert read_table(json.dumps(content)) == TABLES["gpt-20b"]
    del content["tp-2"]["bsz-4"]
    with pytest.raises(ConfigError, match="bsz-4"):
        read_table(json.dumps(content))
    with pytest.raises(ConfigError, match="SpotServe's artifact"):
        read_table("[]")


def test_stages_of_the_published_profile_add_up_to_a_request_of_the_original() -> None:
    model = PublishedProfile(TABLES["opt-6.7b"])
    shape, layers = MeshShape(1, 1, 4), split_layers(32, 1)
    whole = prefill_seconds(model, shape, layers, 512) + 128 * step_seconds(model, shape, layers, 1, 512)
    assert whole == pytest.approx(request_seconds(TABLES["opt-6.7b"], 1, 4))
    assert model.stage_seconds(Stage(1, True, True), 3, Work.decode(1, 512)) == float("inf")
