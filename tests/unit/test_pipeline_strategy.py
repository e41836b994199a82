"""MoEtionStrategy with pipelines: what it refuses and when, what class it is, and a whole pipeline on one rank."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import AUROC, MeanMetric, MetricCollection

from moetion_lightning.errors import ConfigurationError
from moetion_lightning.pipeline.hollow import hollow
from moetion_lightning.pipeline.runner import StageShapes
from moetion_lightning.pipeline.specs import LayerSpec, LeafSpec, TensorSpec
from moetion_lightning.strategies import MoEtionStrategy
from moetion_lightning.strategies.pipeline_steps import loss_of, step_arguments
from moetion_lightning.strategies.pipeline_strategy import PipelineStrategy
from moetion_lightning.strategies.pipeline_values import decode, encode
from tests.runs.pipeline_models import VOCAB, Decoder


def strategy(world_size: int = 1, rank: int = 0, **settings: Any) -> PipelineStrategy:
    """A strategy that knows its ranks, without process groups."""
    environment = LightningEnvironment()
    environment.set_world_size(world_size)
    environment.set_global_rank(rank)
    made: Any = MoEtionStrategy(cluster_environment=environment, **settings)
    assert type(made) is PipelineStrategy
    return made


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"schedule": "gpipes"}, ["schedule='gpipes'", "expected one of", "'1f1b'"]),
        ({"chunks_per_rank": 2}, ["schedule='1f1b', chunks_per_rank=2", "1 stages on each rank", "Change one"]),
        ({"schedule": "interleaved_1f1b"}, ["chunks_per_rank=1", "2 or more stages on each rank"]),
        ({"num_microbatches": 1}, ["num_microbatches=1", "pipeline_parallel_size=2", "at least as many micro-batches"]),
        (
            {"schedule": "interleaved_1f1b", "chunks_per_rank": 2, "num_microbatches": 5},
            ["num_microbatches=5", "a multiple of pipeline_parallel_size=2"],
        ),
        (
            {"expert_parallel_size": 2},
            ["pipeline_parallel_size=2, expert_parallel_size=2", "not both", "Set the other one to 1"],
        ),
        ({"balance": "memory"}, ["balance='memory'", "'parameters', 'time', or the first layer of each stage"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_construction(
    settings: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        MoEtionStrategy(**{"pipeline_parallel_size": 2, **settings})
    assert "MoEtionStrategy(" in str(raised.value)
    assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize(
    "name", ["pipeline_parallel_size", "num_microbatches", "chunks_per_rank", "expert_parallel_size"]
)
@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "2"])
def test_sizes_are_counts(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        MoEtionStrategy(**{name: value})
    assert f"MoEtionStrategy({name}={value!r}): expected a number >= 1" in str(raised.value)


@pytest.mark.parametrize("wrong", [3, None, [0, True], [0, "1"], {0, 1}, []])
def test_bounds_are_numbers_of_layers(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"MoEtionStrategy\(balance=.*the first layer of each stage"):
        MoEtionStrategy(pipeline_parallel_size=2, balance=wrong)


@pytest.mark.parametrize("wrong", [["1f1b"], None, 3])
def test_schedules_are_names(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"MoEtionStrategy\(schedule=.*expected one of"):
        MoEtionStrategy(pipeline_parallel_size=2, schedule=wrong)


@pytest.mark.parametrize(
    "settings", [{"schedule": "gpipe"}, {"chunks_per_rank": 2}, {"layers": "model.layers"}, {"balance": "time"}]
)
def test_settings_of_pipelines_without_one_are_warned_of(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ((name, value),) = settings.items()
    with caplog.at_level(logging.WARNING, "moetion_lightning"):
        MoEtionStrategy(**settings)
        MoEtionStrategy(num_microbatches=4)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"MoEtionStrategy({name}={value!r}) has no effect without pipeline_parallel_size")


def test_subclasses_that_would_not_cut_are_refused() -> None:
    class Own(MoEtionStrategy):
        pass

    assert type(Own()) is Own
    with pytest.raises(ConfigurationError, match=r"Own\(pipeline_parallel_size=2.*PipelineStrategy"):
        Own(pipeline_parallel_size=2)


def test_micro_batches_are_as_many_as_ranks_unless_said() -> None:
    assert strategy(4, pipeline_parallel_size=4).num_microbatches == 4
    assert strategy(4, pipeline_parallel_size=4, num_microbatches=8).num_microbatches == 8


@pytest.mark.parametrize("world_size", [1, 3, 6])
def test_ranks_that_make_no_whole_pipelines_are_refused(world_size: int) -> None:
    made = strategy(world_size, pipeline_parallel_size=4)
    with pytest.raises(ConfigurationError) as raised:
        _ = made.pipeline_layout
    assert f"pipeline_parallel_size=4): it must divide the number of ranks, which is {world_size}" in str(raised.value)


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"pipeline_parallel_size": 1}, {"num_microbatches": None}])
def test_without_a_pipeline_it_is_the_plain_class(settings: dict[str, Any]) -> None:
    assert type(MoEtionStrategy(**settings)) is MoEtionStrategy


@pytest.mark.parametrize("settings", [{"pipeline_parallel_size": 2}, {"num_microbatches": 3}])
def test_pipelines_have_a_class_of_their_own(settings: dict[str, Any]) -> None:
    assert type(MoEtionStrategy(**settings)) is PipelineStrategy
    assert type(PipelineStrategy(**settings)) is PipelineStrategy


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pipeline_parallel_size": 2, "num_microbatches": 6, "schedule": "gpipe", "layers": ["a", "b"]},
        {"pipeline_parallel_size": 2, "schedule": "zbv_zero_bubble", "chunks_per_rank": 2, "balance": [0, 1, 2, 3]},
    ],
)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_keep_class_and_settings(settings: dict[str, Any], copied: Any) -> None:
    made = MoEtionStrategy(**settings)
    other = copied(made)
    assert type(other) is type(made)
    for name in ("pipeline_parallel_size", "num_microbatches", "schedule", "chunks_per_rank", "layers", "balance"):
        assert getattr(other, name) == getattr(made, name)
    if isinstance(made, PipelineStrategy):
        assert (other.kind.name, other.cut, other.link) == (made.schedule, None, None)


def test_trainers_know_it_by_name() -> None:
    assert StrategyRegistry["moetion"]["strategy"] is MoEtionStrategy
    trainer = pl.Trainer(strategy="moetion", accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is MoEtionStrategy


# --- what others ask before there are groups -------------------------------------------------------------------------


def test_ranks_of_one_pipeline_read_the_same_data_and_replicas_other_data() -> None:
    asked = [strategy(6, rank, pipeline_parallel_size=3).distributed_sampler_kwargs for rank in range(6)]
    assert asked == [{"num_replicas": 2, "rank": rank % 2} for rank in range(6)]


def test_replicas_hold_the_same_parameters() -> None:
    made = strategy(6, 3, pipeline_parallel_size=3)
    assert made.replica_ranks("any") == (2, 3)
    assert made.spreads_state
    assert made.local_parameters() is None  # before the first batch


def test_v_shaped_schedules_deal_the_stages_out_like_that() -> None:
    made = strategy(2, 0, pipeline_parallel_size=2, schedule="zbv_zero_bubble", chunks_per_rank=2)
    assert made.pipeline_layout.stages(0) == (0, 3)
    made = strategy(2, 0, pipeline_parallel_size=2, schedule="interleaved_1f1b", chunks_per_rank=2)
    assert made.pipeline_layout.stages(0) == (0, 2)


# --- losses and arguments --------------------------------------------------------------------------------------------


def test_losses_are_taken_out_of_what_steps_return() -> None:
    loss = torch.tensor([2.0])
    assert torch.equal(loss_of(loss), torch.tensor(2.0))
    assert torch.equal(loss_of({"loss": loss, "more": 1}), torch.tensor(2.0))


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (None, "NoneType"), (2.0, "float"), ({"los": torch.ones(1)}, "dict"), ([torch.ones(1)], "list"),
        (torch.ones(2), r"a tensor of shape \(2,\)"), ({"loss": torch.ones(1, 3)}, r"a tensor of shape \(1, 3\)"),
    ],
)  # fmt: skip
def test_steps_without_a_loss_are_refused(result: Any, found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"training_step returned {found}: .*expected a loss .*\"loss\""):
        loss_of(result)


def test_steps_are_told_the_index_only_if_they_ask() -> None:
    class Asking(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    class Silent(pl.LightningModule):
        def training_step(self, batch: Any) -> None: ...

    assert (step_arguments(Asking(), 3), step_arguments(Silent(), 3)) == ((3,), ())


# --- what ranks tell each other --------------------------------------------------------------------------------------


def test_results_of_steps_travel_as_json_and_tensors() -> None:
    result = {"ids": torch.arange(3), ("a", 1): [1, 0.5, None, True, "é"], None: (torch.tensor(2.0), {}), 4: []}
    described, tensors = encode(result)
    found = decode(json.loads(json.dumps(described)), tensors)
    assert list(found) == list(result)
    assert found["ids"] is tensors[0]
    assert found["a", 1] == [1, 0.5, None, True, "é"]
    assert isinstance(found[None], tuple)
    assert decode(*encode({"x": object(), "y": 1})) == {"x": None, "y": 1}


def test_shapes_survive_json() -> None:
    floats, indices = TensorSpec((2, 3), "float32", True), TensorSpec((2,), "int64", False)
    leaves = (LeafSpec("tensor", "float32", (2, 3)), LeafSpec("value", None))
    shapes = StageShapes(payloads=((), (floats, indices)), layers=(LayerSpec(leaves, ((LeafSpec("argument", 1),),)),))
    assert StageShapes.from_json(json.loads(json.dumps(shapes.to_json()))) == shapes


# --- a pipeline on one rank ------------------------------------------------------------------------------------------


class Net(pl.LightningModule):
    def __init__(self, num_layers: int = 3, lr: float = 0.01) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model, self.lr = Decoder(num_layers), lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        loss = self.model(batch[0])
        self.log("loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(batch[0]), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model(batch[0])

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(
    module: pl.LightningModule, path: Path, made: Any, batch_size: int = 8, function: str = "fit", **options: Any
) -> pl.Trainer:
    ids = torch.randint(1, VOCAB, (40, 6), generator=torch.Generator().manual_seed(4))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=made, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path, log_every_n_steps=1,
        num_sanity_val_steps=0, use_distributed_sampler=False, **options,
    )  # fmt: skip
    loaders = [DataLoader(TensorDataset(ids[:8]), 4)]
    if function == "fit":
        loaders.insert(0, DataLoader(TensorDataset(ids), batch_size))
    try:
        getattr(trainer, function)(module, *loaders)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return trainer


class Started(LightningEnvironment):
    """All processes are there: Lightning starts none, and no thread that watches them."""

    @property
    def creates_processes_externally(self) -> bool:
        return True


def one_rank(**settings: Any) -> MoEtionStrategy:
    return MoEtionStrategy(num_microbatches=4, process_group_backend="gloo", cluster_environment=Started(), **settings)


@pytest.fixture(autouse=True)
def _free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning chooses a port and leaves it in the environment."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "interleaved_1f1b", "chunks_per_rank": 3},
        {"schedule": "zbv_zero_bubble", "chunks_per_rank": 2, "balance": [0, 2], "layers": "model.blocks"},
    ],
)
def test_it_trains_what_one_process_trains_on_the_micro_batches(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, cut = Net(), Net()
    expected = fit(plain, tmp_path, "auto", batch_size=2, accumulate_grad_batches=4, gradient_clip_val=0.1)
    found = fit(cut, tmp_path, one_rank(**settings), gradient_clip_val=0.1)
    assert found.global_step == expected.global_step == 5
    state = cut.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(found.callback_metrics["val_loss"], expected.callback_metrics["val_loss"])
    assert not vars(cut).get("log")


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class BySearch(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


class WithoutLoss(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"lose": super().training_step(batch, batch_idx)["loss"]}


@pytest.mark.parametrize(
    ("module", "settings", "parts"),
    [
        (Net, {"chunks_per_rank": 4}, ["Net has 3 layers", "for 4 stages", "Use fewer stages, or name finer layers"]),
        (Net, {"balance": [0, 1, 2]}, ["[0, 1, 2]", "2 stages"]),
        (Net, {"layers": "model.missing"}, ["model.missing"]),
        (ByHand, {}, ["ByHand sets automatic_optimization = False", "MoEtionStrategy(pipeline_parallel_size=1)"]),
        (BySearch, {}, ["configure_optimizers gives LBFGS", "expected one optimizer", "AdamW, SGD, Lion"]),
        (WithoutLoss, {}, ["training_step returned dict", "expected a loss"]),
    ],
)
def test_modules_that_cannot_be_cut_are_refused_before_the_first_step(
    module: type[Net], settings: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    given = {"schedule": "interleaved_1f1b", "chunks_per_rank": 2, **settings}
    net = module()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError) as raised:
        fit(net, tmp_path, one_rank(**given))
    assert all(part in str(raised.value) for part in parts), raised.value
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_module_that_was_cut_is_refused_by_another_strategy(tmp_path: Path) -> None:
    net = Net()
    fit(net, tmp_path, one_rank())
    with pytest.raises(ConfigurationError, match=r"Net holds the stages of one rank only.*Make a new module"):
        fit(net, tmp_path, one_rank())


# --- what is refused at setup ----------------------------------------------------------------------------------------


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: pl.LightningModule) -> None: ...

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None: ...


def setup_of_two(module: pl.LightningModule, *callbacks: Any, fitting: bool = True) -> None:
    """What a rank of a pipeline of two does first in setup, without process groups."""
    strategy(2, pipeline_parallel_size=2)._refuse(SimpleNamespace(callbacks=callbacks), module, fitting)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options"), [("EMAWeightAveraging", {}), ("StochasticWeightAveraging", {"swa_lrs": 0.1})]
)
def test_averages_of_the_whole_module_are_refused(name: str, options: dict[str, Any]) -> None:
    if not hasattr(pl.callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    averaging = getattr(pl.callbacks, name)(**options)
    with pytest.raises(ConfigurationError, match=rf"^{name} in Trainer\(callbacks=.*every rank holds only.*Remove"):
        setup_of_two(Net(), pl.Callback(), averaging)
    setup_of_two(Net(), averaging, fitting=False)


def test_callbacks_that_unfreeze_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^BackboneFinetuning in .*Freeze in the module's __init__"):
        setup_of_two(Net(), BackboneFinetuning())
    with pytest.raises(ConfigurationError, match=r"^Unfreezing in Trainer\(callbacks=.*adds parameter groups"):
        fit(Net(), tmp_path, one_rank(), callbacks=[Unfreezing()])


def test_metrics_that_gather_lists_are_refused() -> None:
    net = Net()
    net.fixed = MetricCollection([MeanMetric(), AUROC(task="binary", thresholds=5)])
    net.sum = MeanMetric() + MeanMetric()
    setup_of_two(net)
    net.lists = MetricCollection({"auroc": AUROC(task="binary")})
    setup_of_two(net, fitting=False)
    with pytest.raises(ConfigurationError, match=r"^Net\.lists\.auroc \(BinaryAUROC\): .*lists.*thresholds=\.\.\."):
        setup_of_two(net)


@pytest.mark.parametrize("function", ["fit", "validate", "test", "predict"])
def test_a_module_whose_stages_are_elsewhere_is_refused_by_every_loop(function: str, tmp_path: Path) -> None:
    net = Net()
    hollow(net, [name for name, _ in net.named_parameters()][1:])
    with pytest.raises(ConfigurationError, match=r"other stages are on other ranks.*Make a new module"):
        fit(net, tmp_path, one_rank(), function=function)


def test_a_marked_module_has_other_ranks_even_if_none_of_it_is_empty(tmp_path: Path) -> None:
    net = Net()
    fit(net, tmp_path, one_rank())
    with pytest.raises(ConfigurationError, match="other stages are on other ranks"):
        setup_of_two(net, fitting=False)
    fit(net, tmp_path, one_rank(), function="validate")  # one rank has all stages


def test_a_module_that_cuts_its_batches_itself_is_asked(tmp_path: Path) -> None:
    class Own(Net):
        def split_batch(self, batch: list[Tensor], num_micro_batches: int) -> list[Any]:
            return [[rows] for rows in batch[0].flip(0).chunk(num_micro_batches)]

    flipped, plain = Own(), Net()
    fit(flipped, tmp_path, one_rank())
    fit(plain, tmp_path, one_rank())
    assert not torch.equal(flipped.model.head.weight, plain.model.head.weight)
