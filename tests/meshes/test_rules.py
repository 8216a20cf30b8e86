from dataclasses import replace

import pytest

from spotjax.meshes.layout import rules_of, tensor_axes
from spotjax.meshes.rules import DEFAULT_RULES, EXPERT_RULES, AxisRules
from spotjax.models.config import DecoderConfig, Experts
from spotjax.models.spec import ModelSpec

FULL = DecoderConfig(
    vocab=10,
    width=8,
    layers=2,
    heads=4,
    kv_heads=2,
    head_size=2,
    mlp=12,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
    positions="learned",
    norm="layer",
    embedding_width=6,
)


EXPERTS = replace(FULL, mlp_bias=False, experts=Experts(6, 2, shared_mlp=5))


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("config", [FULL, EXPERTS], ids=["dense", "experts"])
def test_every_array_of_a_model_and_its_kv_has_a_partition(config: DecoderConfig, tensor: int) -> None:
    spec = ModelSpec(config)
    for array in (*spec.parameters, spec.kv_array(0, 3, 4)):
        partition = rules_of(spec, tensor).partition(array.axes)
        assert len(partition) == len(array.shape)
        assert [axis in tensor_axes(spec, tensor) for axis in array.axes] == [to == "tensor" for to in partition]


def test_experts_are_whole_only_where_parts_are_narrow_and_shards_have_as_many() -> None:
    for mlp, tensor, rules in ((1024, 8, DEFAULT_RULES), (1023, 8, EXPERT_RULES), (8, 3, DEFAULT_RULES)):
        config = replace(EXPERTS, heads=24, kv_heads=24, mlp=mlp, experts=Experts(16, 2))
        assert rules_of(ModelSpec(config), tensor) is rules


def test_defaults_split_heads_mlp_vocabulary_and_positions_over_tensor_and_nothing_else() -> None:
    everywhere = {"heads", "kv_heads", "mlp", "vocab", "positions"}
    assert DEFAULT_RULES.split_by("tensor") == everywhere | {"expert_mlp"}
    assert EXPERT_RULES.split_by("tensor") == everywhere | {"expert"}
    assert not DEFAULT_RULES.split_by("data") and not DEFAULT_RULES.split_by("stage")
    assert DEFAULT_RULES.partition(("embed", "heads", "head_size")) == (None, "tensor", None)


def test_two_axes_on_one_mesh_axis_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'heads' and 'mlp' both map to mesh axis 'tensor'"):
        DEFAULT_RULES.partition(("embed", "heads", "mlp"))
    with pytest.raises(ValueError, match="'mlp' and 'mlp' both map"):
        DEFAULT_RULES.partition(("mlp", "mlp"))


def test_unknown_logical_axis_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no rule for logical axis 'experts'"):
        DEFAULT_RULES.partition(("embed", "experts"))


def test_unknown_mesh_axis_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="'heads' maps to 'model'"):
        AxisRules({"heads": "model"})


def test_own_rules_replace_the_defaults() -> None:
    rules = AxisRules({"batch": "data", "embed": None})
    assert rules.partition(("batch", "embed")) == ("data", None)
