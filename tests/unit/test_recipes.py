"""The packaged recipes, their data and their models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.recipes import Recipe, list_recipes, recipe_path
from moetion_lightning.recipes.data import StdlibText, read_stdlib_bytes
from moetion_lightning.recipes.models import ByteMoE, CausalLM, MoELayer, warmup_cosine

RECIPES = list_recipes()
PIPELINES = {"pipeline_moe_cpu": 3, "pipeline_qwen3_moe_cpu": 3}
RANKS = {"ddp_moe_cpu": 2, "expert_parallel_moe_cpu": 2, "fsdp2_moe_cpu": 2, **PIPELINES}
NAMES = {"bf16_mixed", "mixtral_tiny", "partial_experts", "qwen3_moe_tiny", "tiny_moe_cpu", *RANKS}


def test_the_recipes_are_listed_by_name() -> None:
    assert NAMES <= {recipe.name for recipe in RECIPES}
    assert [recipe.name for recipe in RECIPES] == sorted(recipe.name for recipe in RECIPES)


@pytest.mark.parametrize("given", ["tiny_moe_cpu", "recipe:tiny_moe_cpu", "tiny_moe_cpu.yaml"])
def test_a_recipe_is_found_by_any_form_of_its_name(given: str) -> None:
    assert recipe_path(given).name == "tiny_moe_cpu.yaml"


def test_unknown_recipe_names_the_nearest_and_all_known() -> None:
    with pytest.raises(
        ConfigurationError, match=r"unknown recipe 'tiny_moe'\. Did you mean recipe:tiny_moe_cpu\?"
    ) as e:
        recipe_path("tiny_moe")
    assert all(name in str(e.value) for name in NAMES)


@pytest.mark.parametrize("name", ["../recipes/tiny_moe_cpu", "/etc/passwd", ""])
def test_a_recipe_is_no_path(name: str) -> None:
    with pytest.raises(ConfigurationError):
        recipe_path(name)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_header_has_title_launch_command_and_override(recipe: Recipe) -> None:
    text = recipe.path.read_text(encoding="utf-8")
    assert 20 < len(recipe.title) <= 120
    assert re.search(rf"^#\s+launch:\s+moetion fit --config recipe:{recipe.name}$", text, re.M)
    assert re.search(rf"^#\s+override:\s+moetion fit --config recipe:{recipe.name} --", text, re.M)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name in RANKS], ids=lambda r: r.name)
def test_recipe_of_several_ranks_names_its_launcher(recipe: Recipe) -> None:
    text = recipe.path.read_text(encoding="utf-8")
    module = "-m moetion_lightning fit --config recipe:" + recipe.name
    assert re.search(rf"^#\s+elastic:\s+moetion launch --nproc-per-node \d {module}$", text, re.M)
    assert yaml.safe_load(text)["trainer"]["devices"] == RANKS[recipe.name]


@pytest.mark.parametrize("name", PIPELINES)
def test_recipe_of_a_pipeline_names_torchrun_and_logs_its_boundaries(name: str) -> None:
    text = recipe_path(name).read_text(encoding="utf-8")
    assert re.search(
        rf"^#\s+restarts:\s+torchrun --nproc-per-node {PIPELINES[name]} -m moetion_lightning fit", text, re.M
    )
    trainer = yaml.safe_load(text)["trainer"]
    assert trainer["strategy"]["init_args"]["pipeline_parallel_size"] == PIPELINES[name]
    assert "moetion_lightning.callbacks.StageBoundaryLogging" in [c["class_path"] for c in trainer["callbacks"]]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_recipe_is_seeded_short_and_stochastic(recipe: Recipe) -> None:
    config = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    assert isinstance(config["seed_everything"], int)
    assert config["trainer"]["max_steps"] <= 100
    assert config["trainer"]["gradient_clip_val"] > 0
    model = config["model"]["init_args"]
    assert model["lr"] >= 1e-3  # so large that a wrong restore would show
    assert model.get("dropout", 0) > 0 or model["config"]["attention_dropout"] > 0
    assert config["trainer"]["callbacks"][0]["class_path"].startswith("moetion_lightning.callbacks.")


def test_text_is_the_same_each_time_and_real_source() -> None:
    first = read_stdlib_bytes(20_000)
    assert first == read_stdlib_bytes(20_000)
    assert len(first) == 20_000
    assert b"def " in first


def test_splits_are_disjoint_and_cover_the_text() -> None:
    data = StdlibText(seq_len=32, batch_size=4, max_bytes=20_000, val_fraction=0.1, drop_last=False)
    train = [i for batch in data.train_dataloader() for i in batch["sample_id"].tolist()]
    val = [i for batch in data.val_dataloader() for i in batch["sample_id"].tolist()]
    assert sorted(train + val) == list(range(20_000 // 32))
    assert len(val) == 62


def test_training_order_is_shuffled_by_its_own_seed() -> None:
    def order(seed: int | None) -> list[int]:
        data = StdlibText(seq_len=32, batch_size=4, max_bytes=20_000, seed=seed)
        return [i for batch in data.train_dataloader() for i in batch["sample_id"].tolist()]

    before = torch.get_rng_state()
    assert order(1) == order(1) != order(2)
    assert order(1) != sorted(order(1))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


def test_two_epochs_differ() -> None:
    loader = StdlibText(seq_len=32, batch_size=4, max_bytes=20_000).train_dataloader()
    first, second = ([b["sample_id"].tolist() for b in loader] for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seq_len": 1}, "seq_len=1"), ({"val_fraction": 1.0}, "val_fraction"), ({"max_bytes": 100}, "max_bytes=100")],
)
def test_impossible_data_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StdlibText(**arguments)


def test_moe_layer_equals_a_dense_mixture() -> None:
    """Routing rows to experts gives what running every expert on every token and weighting gives."""
    torch.manual_seed(0)
    layer = MoELayer(d_model=16, d_expert=32, num_experts=4, top_k=2).double()
    hidden = torch.randn(2, 8, 16, dtype=torch.float64)
    out, balance = layer(hidden)
    tokens = hidden.reshape(-1, 16)
    probabilities = layer.gate(tokens).float().softmax(-1)
    weights, chosen = probabilities.topk(2, -1)
    weights = (weights / weights.sum(-1, keepdim=True)).double()
    expected = sum(layer.experts[e](tokens) * (weights * (chosen == e)).sum(-1, keepdim=True) for e in range(4))
    torch.testing.assert_close(out.reshape(-1, 16), expected)
    assert 0.9 < balance.item() < 4.0


def test_byte_moe_trains_every_parameter_and_repeats_bitwise() -> None:
    def losses() -> list[float]:
        torch.manual_seed(3)
        model = ByteMoE(d_model=32, num_layers=1, num_experts=4, d_expert=32, max_seq_len=32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.randint(0, 256, (4, 32))
        values = []
        for _ in range(8):
            loss, balance = model._losses({"input_ids": ids})
            (loss + 0.01 * balance).backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    first = losses()
    assert first == losses()
    assert first[-1] < first[0] - 0.1


@pytest.mark.parametrize("arguments", [{"d_model": 30, "num_heads": 4}, {"top_k": 9, "num_experts": 8}, {"top_k": 0}])
def test_impossible_model_is_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        ByteMoE(**arguments)


def test_schedule_warms_up_and_ends_at_its_floor() -> None:
    factors = [warmup_cosine(s, warmup_steps=5, total_steps=50) for s in range(80)]
    assert factors[:5] == sorted(factors[:5])
    assert factors[5] == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[50:] == pytest.approx([0.1] * 30)


@pytest.mark.hf
def test_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="model_type='no_such_model'"):
        CausalLM(model_type="no_such_model")


def test_every_argument_is_in_the_class_docstring() -> None:
    """LightningCLI shows the class docstring's `Args` as help."""
    import inspect

    for cls in (ByteMoE, CausalLM, StdlibText):
        for name in list(inspect.signature(cls.__init__).parameters)[1:]:
            assert re.search(rf"^\s+{name}: ", cls.__doc__ or "", re.M), f"{cls.__name__}({name})"


def test_yaml_files_are_beside_their_package() -> None:
    assert all(recipe.path.parent == Path(recipe_path("tiny_moe_cpu")).parent for recipe in RECIPES)
