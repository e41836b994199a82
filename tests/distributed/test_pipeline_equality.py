"""A pipeline trains exactly what one process trains on the same micro-batches: unchanged modules, every schedule.

Bitwise, where the order of summation is that of one process. It is another one, and only then something else than
``torch.equal`` is asked for, where gradients of two stages are added up (tied parameters), or of replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetion_lightning.pipeline.schedules import SEVERAL_STAGES
from tests.runs import pipeline_fit
from tests.runs.drill import Zygote, start
from tests.runs.references import References

# One start of the ranks serves many tests; the first of them waits for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {"dropout": {"dropout": 0.1, "plain": False}, "ragged": {"ragged": True, "plain": False}},
    2: {
        "1f1b": {"evaluate": True},
        "gpipe-six": {"schedule": "gpipe", "num_microbatches": 6},
        "interleaved": {"schedule": "interleaved_1f1b", "chunks_per_rank": 2},
        "zero-bubble": {"schedule": "interleaved_zero_bubble", "chunks_per_rank": 2},
        "zbv": {"schedule": "zbv_zero_bubble", "chunks_per_rank": 2},
        "accumulate": {"accumulate": 2, "num_microbatches": 2},
        "ragged": {"ragged": True, "plain": False},
        "bf16": {"precision": "bf16-mixed"},
        "fp16": {"precision": "16-mixed"},
        "frozen": {"frozen_front": True},
        "fused": {"block": "fused", "optimizer": "sgd"},
        "bounds": {"balance": [0, 1]},
        "dropout": {"dropout": 0.1, "plain": False},
        "tied": {"tied": True, "precision": "64-true"},
        "tied-zbv": {"tied": True, "precision": "64-true", "schedule": "zbv_zero_bubble", "chunks_per_rank": 2},
        "half": {"steps": pipeline_fit.EPOCH},
        "resumed": {"resume": "half"},
    },
    3: {
        "decoder": {"evaluate": True},
        "mixtral": {"model": "mixtral", "aux": True},
        "qwen3_moe": {"model": "qwen3_moe", "aux": True, "padded": True},
        "olmoe": {"model": "olmoe", "aux": True},
        "gpt_oss": {"model": "gpt_oss", "aux": True},
        "deepseek_v3": {"model": "deepseek_v3"},
        "t5": {"model": "t5", "precision": "64-true"},
        "mixtral-bf16": {"model": "mixtral", "aux": True, "precision": "bf16-mixed"},
        "dropout": {"dropout": 0.1, "plain": False},
        "ragged": {"ragged": True, "plain": False},
        "time": {"balance": "time"},
        "resumed": {"resume": "2/half"},
    },
    4: {"dp2": {"dp": 2, "block": "fused", "precision": "64-true"}},
}
#: Gradients of several stages (a tied head; T5's embedding serves encoder and decoder) or of replicas are added up.
OTHER_ORDER = {"tied", "tied-zbv", "t5", "dp2"}
if not SEVERAL_STAGES:
    CASES = {world: {n: c for n, c in cases.items() if "chunks_per_rank" not in c} for world, cases in CASES.items()}
CASES_OF = [(world, name) for world, cases in CASES.items() for name in cases if cases[name].get("plain", True)]


@pytest.fixture
def runs(zygote: Zygote, references: References) -> Callable[[int], Path]:
    """Folder of the finished runs of a world size: one start of its ranks for all cases."""

    def of(world: int) -> Path:
        def whole(case: dict[str, Any]) -> dict[str, Any]:
            if "/" not in case.get("resume", ""):
                return case
            of_world, _, name = case["resume"].partition("/")
            return {**case, "resume": str(of(int(of_world)) / name)}

        cases = {name: whole(case) for name, case in CASES[world].items()}
        spec = {"runner": pipeline_fit.__name__, "ranks": world, "cases": cases}
        return references.get(spec, lambda folder: start(zygote, spec, folder, 500.0))

    return of


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def differences(actual: Any, expected: Any, where: str = "") -> list[str]:
    """Everything that is not equal to the bit."""
    if isinstance(expected, dict):
        if list(actual) != list(expected):
            return [f"{where}: {list(actual)} instead of {list(expected)}"]
        return [d for key in expected for d in differences(actual[key], expected[key], f"{where}/{key}")]
    if isinstance(expected, (list, tuple)):
        if len(actual) != len(expected):
            return [f"{where}: {len(actual)} instead of {len(expected)}"]
        return [d for i, value in enumerate(expected) for d in differences(actual[i], value, f"{where}/{i}")]
    if isinstance(expected, Tensor):
        return [] if torch.equal(actual, expected) else [f"{where}: differs by {(actual - expected).abs().max()}"]
    return [] if actual == expected else [f"{where}: {actual} instead of {expected}"]


@pytest.fixture
def plain(references: References) -> Any:
    """The checkpoint and the results of one process that knows nothing of pipelines."""

    def of(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        layout = ("schedule", "chunks_per_rank", "balance", "layers", "resume")
        bare = {k: v for k, v in case.items() if k not in layout}
        # Replicas average over their batches: one process would see them as more micro-batches.
        size = {**pipeline_fit.COMMON, **bare}["num_microbatches"] * bare.get("dp", 1)
        given = {**bare, "dp": 1, "num_microbatches": size}
        folder = references.get(["plain", given], lambda made: pipeline_fit.fit(given, made / "run", 1, plain=True))
        return load(folder / "run.ckpt"), load(folder / "run.rank0")

    return of


@pytest.mark.parametrize(("world", "name"), CASES_OF)
def test_training_equals_that_of_one_process(world: int, name: str, runs: Any, plain: Any) -> None:
    """Where the sums have another order, in float64: it leaves about 1e-15, which Adam's division enlarges.

    The validation loss is float32, and here the mean of the micro-batches' means instead of that of one batch.
    """
    case = CASES[world][name]
    expected, results = plain(case)
    actual = load(runs(world) / f"{name}.ckpt")
    if name in OTHER_ORDER:
        for parameter, value in expected["state_dict"].items():
            torch.testing.assert_close(actual["state_dict"][parameter], value, rtol=1e-8, atol=1e-10, msg=parameter)
        return
    assert differences(actual["state_dict"], expected["state_dict"]) == []
    assert differences(actual["optimizer_states"], expected["optimizer_states"]) == []
    assert differences(actual["lr_schedulers"], expected["lr_schedulers"]) == []
    found = load(runs(world) / f"{name}.rank0")
    assert found["metrics"]["val_loss"] == pytest.approx(results["metrics"]["val_loss"], rel=1e-6)
    assert differences(found["scale"], results["scale"]) == []


@pytest.mark.parametrize("name", ["dropout", "ragged"])
def test_the_partition_makes_no_difference(name: str, runs: Any) -> None:
    """Neither to what is dropped nor to how a short batch is cut."""
    one, two, three = (load(runs(world) / f"{name}.ckpt") for world in (1, 2, 3))
    assert differences(two["state_dict"], one["state_dict"]) == []
    assert differences(three["state_dict"], one["state_dict"]) == []


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_knows_the_metrics_and_holds_its_own_stages_only(world: int, runs: Any, plain: Any) -> None:
    """Metrics of the validation are means over micro-batches, which one process takes over the batch, in float32."""
    name = {2: "1f1b", 3: "decoder"}[world]
    found = [load(runs(world) / f"{name}.rank{rank}") for rank in range(world)]
    _, expected = plain(CASES[world][name])
    for one in found:
        assert differences(one["metrics"], found[0]["metrics"]) == []
        assert one["best"] == found[0]["best"]
        assert one["test"] == found[0]["test"]
        assert differences(one["predictions"], expected["predictions"]) == []
        assert one["metrics"]["val_seen"] == pytest.approx(expected["metrics"]["val_seen"], rel=1e-6)
    # One element stands for each parameter of another rank.
    assert sum(one["elements"] for one in found) < 1.1 * expected["elements"]
    assert max(one["elements"] for one in found) < 0.7 * expected["elements"]


def test_a_checkpoint_loads_without_a_pipeline(runs: Any) -> None:
    module = pipeline_fit.module_of({**pipeline_fit.COMMON, **CASES[2]["1f1b"]})
    saved = load(runs(2) / "1f1b.ckpt")
    module.load_state_dict(saved["state_dict"])
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(saved["optimizer_states"][0])
