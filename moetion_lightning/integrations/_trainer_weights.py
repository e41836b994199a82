"""Weights that a Hugging Face checkpoint holds and the Trainer's own resume leaves out.

``save_pretrained`` writes the experts of most families one by one, while the module holds them fused.
``from_pretrained`` converts between the two; ``Trainer`` resumes by ``load_state_dict(file, strict=False)``, which does
not (transformers 5.23, ``Trainer._load_from_checkpoint`` and ``_load_best_model``): fused experts keep the values that
they happen to have.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from moetion_lightning.core.run_state import get_rng, set_rng
from moetion_lightning.errors import ForeignWindowError

__all__ = ["restore_left_out"]

_log = logging.getLogger(__name__)
_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 3


def restore_left_out(model: nn.Module, folder: Path) -> list[str]:
    """Put weights in place that are in a checkpoint's files under other names than in the module.

    Args:
        model: The module, which the Trainer has loaded from the folder.
        folder: A ``checkpoint-N`` folder of the Trainer.

    Returns:
        Names of the weights that were put in place; none where the Trainer has loaded everything.

    Raises:
        ForeignWindowError: The folder does not hold them under any name that the model's class knows.
    """
    if not isinstance(model, PreTrainedModel) or not (folder / "config.json").is_file():
        return []
    stored = _stored_names(folder)
    weights = model.state_dict()
    missing = [] if stored is None else _left_out(weights, stored)
    if not missing:
        return []
    generators = get_rng()
    kind: Any = type(model)
    loaded, report = kind.from_pretrained(
        folder, config=model.config, dtype=model.dtype, output_loading_info=True, local_files_only=True
    )
    set_rng(generators)
    found = loaded.state_dict()
    absent = [n for n in missing if n in report["missing_keys"] or found[n].shape != weights[n].shape]
    if absent:
        raise ForeignWindowError(
            f"{folder} holds no weights for {', '.join(absent[:_SHOWN])} of {type(model).__name__}, and the Trainer "
            "would go on with whatever values they have. Resume from a checkpoint of this model."
        )
    with torch.no_grad():
        for name in missing:
            weights[name].copy_(found[name])
    _log.warning(
        "%s: the Trainer's own resume leaves %d weights of %s at other values, because the files hold them under other "
        "names (%s%s); they were read by from_pretrained and put in place",
        folder, len(missing), type(model).__name__, ", ".join(missing[:_SHOWN]),
        ", ..." if len(missing) > _SHOWN else "",
    )  # fmt: skip
    return missing


def _stored_names(folder: Path) -> frozenset[str] | None:
    """Names of the weights in the files; None where there are none in a known form."""
    if (folder / _FILE).is_file():
        with safe_open(folder / _FILE, framework="pt") as file:
            return frozenset(file.keys())
    if (folder / _INDEX).is_file():
        return frozenset(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
    return None


def _left_out(weights: Mapping[str, Tensor], stored: frozenset[str]) -> list[str]:
    """Names that are not stored, nor tied to one that is."""
    present = {weights[name].data_ptr() for name in stored if name in weights}
    return [name for name, weight in weights.items() if name not in stored and weight.data_ptr() not in present]
