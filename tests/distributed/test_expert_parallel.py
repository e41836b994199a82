"""Training with experts spread over ranks is the training of one process on the whole batch.

Compared in float64, where another order of summation leaves differences far below the tolerance; bitwise where the same
run is made twice. One start of the ranks serves all cases of one world size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runs.drill import Zygote, start
from tests.runs.expert_fit import fit
from tests.runs.references import References

pytestmark = pytest.mark.slow

COMMON = {"kind": "list"}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "list-ep1": {**COMMON, "ep": 1},
        "list-ep2": {**COMMON, "ep": 2},
        "fused-ep2": {"kind": "fused", "ep": 2},
        "fused-ep1": {"kind": "fused", "ep": 1},
        "unused-ep2": {**COMMON, "ep": 2, "usable": 2},
        "unused-ep1": {**COMMON, "ep": 1, "usable": 2},
        "fused-unused-ep2": {"kind": "fused", "ep": 2, "usable": 2},
        "padded-ep2": {**COMMON, "ep": 2, "padded": True},
        "padded-fused-ep2": {"kind": "fused", "ep": 2, "padded": True},
        "checkpointing-ep2": {**COMMON, "ep": 2, "padded": True, "checkpointing": True},
        "manual-ep2": {**COMMON, "ep": 2, "manual": True},
        "half-ep1": {**COMMON, "ep": 1, "steps": 2},
        "resumed-ep2": {**COMMON, "ep": 2, "resume": "half-ep1"},
        "half-fused-ep2": {"kind": "fused", "ep": 2, "steps": 2},
        "resumed-fused-ep1": {"kind": "fused", "ep": 1, "resume": "half-fused-ep2"},
        "bf16-ep2": {**COMMON, "ep": 2, "precision": "bf16-mixed"},
        "again-a": {**COMMON, "ep": 2, "precision": "32-true"},
        "again-b": {**COMMON, "ep": 2, "precision": "32-true"},
        "rebuilt": {**COMMON, "ep": 2, "precision": "32-true", "rebuild": True},
    },
    4: {
        "list-ep2": {**COMMON, "ep": 2},
        "list-ep4": {**COMMON, "ep": 4},
        "uneven-ep4": {**COMMON, "ep": 4, "num_experts": 6},
        "unused-ep2": {**COMMON, "ep": 2, "usable": 2},
        "fused-uneven-ep2": {"kind": "fused", "ep": 2, "num_experts": 5},
        "manual-ep2": {**COMMON, "ep": 2, "manual": True},
    },
}
BITWISE = ("again-a", "again-b", "rebuilt")
EXACT = [(w, n) for w, cases in CASES.items() for n in cases if n not in (*BITWISE, "bf16-ep2")]


@pytest.fixture
def runs(zygote: Zygote, references: References) -> Callable[[int], Path]:
    """Folder of the finished runs of a world size: one start of its ranks for all cases."""

    def of(world: int) -> Path:
        spec = {"runner": "tests.runs.expert_fit", "ranks": world, "cases": CASES[world]}
        return references.get(spec, lambda folder: start(zygote, spec, folder, 100.0))

    return of


def reference(case: dict[str, Any], folder: Path, checkpoints: Path) -> dict[str, Any]:
    """The checkpoint of one process, which resumes from the ranks' checkpoint where they did."""
    fit(case, folder / "single", 1, checkpoints)
    result: dict[str, Any] = torch.load(folder / "single.ckpt", weights_only=False)
    return result


def assert_close(actual: Any, expected: Any, where: str = "", **tolerance: float) -> None:
    """Tensors close, everything else equal, with the same names in the same order."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_close(actual[key], expected[key], f"{where}/{key}", **tolerance)
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(actual[index], value, f"{where}/{index}", **tolerance)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, msg=lambda m: f"{where}: {m}", **tolerance)
    else:
        assert actual == expected, where


@pytest.mark.parametrize(("world", "name"), EXACT)
def test_training_equals_that_of_one_process(world: int, name: str, runs: Any, tmp_path: Path) -> None:
    expected = reference(CASES[world][name], tmp_path, runs(world))
    actual = torch.load(runs(world) / f"{name}.ckpt", weights_only=False)
    # float64: summation order leaves about 1e-15, which Adam's division may enlarge.
    assert_close(actual["state_dict"], expected["state_dict"], rtol=1e-8, atol=1e-10)
    assert_close(actual["optimizer_states"], expected["optimizer_states"], rtol=1e-6, atol=1e-10)


def test_two_runs_are_bitwise_equal_and_rebuilt_groups_change_nothing(runs: Any) -> None:
    first, second, rebuilt = (torch.load(runs(2) / f"{name}.ckpt", weights_only=False) for name in BITWISE)
    for other in (second, rebuilt):
        assert_close(other["state_dict"], first["state_dict"], rtol=0, atol=0)
        assert_close(other["optimizer_states"], first["optimizer_states"], rtol=0, atol=0)


def test_mixed_precision_stays_near_one_process(runs: Any, tmp_path: Path) -> None:
    expected = reference(CASES[2]["bf16-ep2"], tmp_path, runs(2))
    actual = torch.load(runs(2) / "bf16-ep2.ckpt", weights_only=False)
    # Four Adam steps of 3e-3: bfloat16 may turn the sign of a small gradient, and with it a step.
    assert_close(actual["state_dict"], expected["state_dict"], rtol=0, atol=1.3e-2)
    close = [
        torch.isclose(actual["state_dict"][n], t, atol=2e-3).float().mean() for n, t in expected["state_dict"].items()
    ]
    assert torch.stack(close).mean() > 0.9


def test_replica_ranks_hold_equal_tensors_and_each_rank_only_its_experts(runs: Any) -> None:
    saved = [torch.load(runs(4) / f"list-ep2.rank{rank}", weights_only=False) for rank in range(4)]
    for rank, one in enumerate(saved):
        experts = {name.split(".")[3] for name in one["local"] if ".experts." in name}
        assert experts == ({"0", "1"} if rank % 2 == 0 else {"2", "3"})
        for name, ranks in one["replicas"].items():
            assert ranks == ((rank % 2, rank % 2 + 2) if ".experts." in name else (0, 1, 2, 3)), name
            for other in ranks:
                assert torch.equal(saved[other]["local"][name], one["local"][name]), name
