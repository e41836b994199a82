"""Discovery and token counts over every MoE family of the installed transformers, with tiny random configurations.

A family is any whose configuration names a number of experts. For each: an expert has tokens if and only if its slice
of the gradient is not zero, the counts sum to tokens x top-k, and every element of every parameter is in exactly one
operator (``build_operators`` checks it).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import re
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import nn

from moetion_lightning.core.discovery import discover_layers
from moetion_lightning.core.partition import build_operators
from moetion_lightning.moe.routing.counter import TokenCounter

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

NUMBER_OF_EXPERTS = re.compile("num_experts|num_local_experts|n_routed_experts")
# Rows of an embedding as experts, tokens that are not routed, a model around others.
NO_FAMILY = {"doge", "vitpose_backbone", "nemotron3_5_transcribe"}
BROKEN = {
    "nllb_moe": "transformers: NllbMoeExperts one-hots a mask that already is one-hot, so that only experts 0 and 1 "
    "ever run",
}
# Before version 5 transformers has lists of experts, publishes no plan of theirs, and has one implementation of them.
IS_OLD = int(transformers.__version__.partition(".")[0]) < 5
# Whose configurations want other fields there.
NOT_IN_OLD = {"glm4v_moe", "granitemoehybrid", "jamba", "qwen3_omni_moe", "qwen3_vl_moe"}
of_version_5 = pytest.mark.skipif(IS_OLD, reason="transformers before 5")
NUM_TOKENS, TOP_K, NUM_EXPERTS = 6, 2, 8
SPARSE = ["dense", "sparse", "sparse"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}

# Fields are set where a configuration has them.
TINY: dict[str, Any] = {
    "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
    "hidden_size": 32, "d_model": 32, "intermediate_size": 32, "d_ff": 32, "max_position_embeddings": 64,
    "num_hidden_layers": 3, "num_layers": 3, "n_layers": 3, "num_decoder_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "num_attention_heads": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "d_kv": 8,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32,
    "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS, "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "moe_top_k": TOP_K, "moe_topk": TOP_K,
    "moe_k": TOP_K, "top_k_experts": TOP_K, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "expert_capacity": 64,
    "encoder_sparse_step": 1, "decoder_sparse_step": 1, "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}  # fmt: skip
# What a family needs besides: it has other names, checks its numbers, or has only dense layers at this size.
SPECIAL: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": SPARSE},
    "dbrx": {"attn_config": {"kv_n_heads": 4, "rope_theta": 1e4, "clip_qkv": 8},
             # one width, and no second name of it before version 5: some versions mix them up
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2,
                            **({} if IS_OLD else {"hidden_size": 32})}},
    "deepseek_ocr2": {"mlp_layer_types": SPARSE},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"index_head_dim": 16, "index_n_heads": 2, "shared_experts_intermediate_size": 16,
                   "num_hidden_layers": 2, "mlp_layer_types": SPARSE[:2]},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [16, 16], "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "gemma4": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
               "enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}},
    "glm_moe_dsa": {"mlp_layer_types": SPARSE},
    "glm5_next": {"qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4, "index_head_dim": 8,
                  "index_n_heads": 4, "mlp_layer_types": SPARSE},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2},
    "hy_v4_vl": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 4},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "muse_spark": {"moe_hidden_size": 16},
    "nllb_moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "step3p7": {"sliding_window": 4, "mlp_layer_types": SPARSE},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Tokens x top-k, less those that go to experts without parameters (identity, skip).
FEWER_COUNTS = ("longcat_flash", "zaya")
# Layers whose experts a batch of text does not reach.
IDLE = {"ernie4_5_vl_moe": "vision_moe"}


def _families() -> list[str]:
    root = Path(transformers.__file__).parent / "models"
    found = {p.parent.name for p in root.glob("*/configuration_*.py") if NUMBER_OF_EXPERTS.search(p.read_text())}
    return sorted(found - NO_FAMILY - (NOT_IN_OLD if IS_OLD else set()))


def _classes(module: Any, base: type) -> list[type]:
    return [c for c in vars(module).values()
            if inspect.isclass(c) and c.__module__ == module.__name__ and issubclass(c, base)]  # fmt: skip


def _configuration(family: str) -> Any:
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    classes = [c for c in _classes(module, transformers.PretrainedConfig) if "Vision" not in c.__name__]
    planned = [c for c in classes if "ep_dispatch_experts" in (vars(c).get("base_model_ep_plan") or {}).values()]
    candidates = planned or classes
    text = [c for c in candidates if "Text" in c.__name__]
    cls = (text or candidates[-1:])[0]
    special = SPECIAL.get(family, {})
    if dataclasses.is_dataclass(cls):
        known = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    else:  # transformers before 5.2
        known = set(inspect.signature(cls).parameters) | set(cls.attribute_map)
    fields = {name: value for name, value in {**TINY, **special}.items() if name in known or name in special}
    for alias, name in cls.attribute_map.items():
        if alias in fields and name in fields:
            del fields[alias]
    return cls(**fields)


def _build(family: str) -> nn.Module:
    config = _configuration(family)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    models = [c for c in _classes(module, transformers.PreTrainedModel)
              if c.__name__.endswith("Model") and "PreTrained" not in c.__name__]  # fmt: skip
    own = [c for c in models if getattr(c, "config_class", None) is type(config)]
    cls = (own or [c for c in models if c.__name__.endswith("TextModel")])[0]
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    assert size < 5_000_000, f"{family}: {size} parameters; give it smaller fields in SPECIAL"
    torch.manual_seed(0)
    model = cls(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(torch.isfinite(parameter).all()) or float(parameter.abs().max()) > 1e3:
                parameter.normal_(std=0.02)  # left uninitialized by some families
    return model


@functools.cache
def _inputs(family: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    pairs = family in ("switch_transformers", "nllb_moe")
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if pairs else {"input_ids": ids}


def _backward(model: nn.Module, family: str) -> None:
    model(**_inputs(family)).last_hidden_state.float().square().sum().backward()


def _expected(family: str, model: nn.Module) -> int:
    if family == "switch_transformers":
        return NUM_TOKENS  # its router has no top_k, it is top-1
    names = ("num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts")
    return NUM_TOKENS * next((int(k) for name in names if (k := getattr(model.config, name, None))), TOP_K)


@pytest.mark.parametrize("family", _families())
def test_family_is_found_counted_and_cut(family: str) -> None:
    if family in BROKEN:
        pytest.skip(BROKEN[family])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _build(family)
    except ImportError as error:
        pytest.skip(f"{family} needs a package that is not installed: {error}")
    counter = TokenCounter(model, discover_layers(model))
    _backward(model, family)
    counts = counter.drain()
    layers = counter.layers
    assert layers, f"{family}: no MoE layer found in {type(model).__name__}"
    assert not counter.rejected
    assert {layer.num_experts for layer in layers} == {NUM_EXPERTS}
    assert all(layer.gate for layer in layers)
    parameters = dict(model.named_parameters())
    for row, layer in zip(counts, layers, strict=True):
        for expert, pieces in enumerate(layer.experts):
            grads = [(parameters[piece.parameter].grad, piece) for piece in pieces]
            used = any(grad is not None and bool(piece.of(grad).any()) for grad, piece in grads)
            assert (int(row[expert]) > 0) == used, f"{layer.name} expert {expert}: {int(row[expert])} tokens, {used}"
        if family in IDLE and IDLE[family] in layer.name:
            assert int(row.sum()) == 0
        elif family in FEWER_COUNTS:
            assert 0 < int(row.sum()) <= _expected(family, model)
        else:
            assert int(row.sum()) == _expected(family, model)

    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    result = build_operators(model, layers, trainable=trainable, sliceable=lambda name: True)
    assert not result.unsliced
    assert sum(operator.kind.value == "expert" for operator in result.operators) == NUM_EXPERTS * len(layers)


def test_the_broken_family_is_still_discovered() -> None:
    layers = discover_layers(_build("nllb_moe"))
    assert [layer.num_experts for layer in layers] == [NUM_EXPERTS] * 2


@of_version_5
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_counts_do_not_depend_on_the_experts_implementation(implementation: str) -> None:
    model = _build("qwen3_moe")
    model.set_experts_implementation(implementation)
    counter = TokenCounter(model, discover_layers(model))
    _backward(model, "qwen3_moe")
    assert counter.drain().sum(dim=1).tolist() == [NUM_TOKENS * TOP_K] * 3


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "llama4"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_are_counted_once(family: str, reentrant: bool) -> None:
    model = _build(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    layers = discover_layers(model)
    counter = TokenCounter(model, layers)
    _backward(model, family)
    assert set(counter.drain().sum(dim=1).tolist()) == {NUM_TOKENS * TOP_K}


def test_the_plan_of_a_model_inside_a_lightning_module_is_found() -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = nn.ModuleDict({"net": _build("mixtral")})

    if "ep_dispatch_experts" not in (_configuration("mixtral").base_model_ep_plan or {}).values():
        pytest.skip("this version publishes no plan of its experts")
    layers = discover_layers(Module())
    assert [layer.source for layer in layers] == ["ep_plan"] * 3
    assert layers[0].name == "wrapped.net.layers.0.mlp"


@of_version_5
@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch before 2.10 breaks its graph at every disabled function")
def test_a_compiled_transformers_model_is_counted_without_a_graph_break() -> None:
    model = _build("qwen3_moe")
    model.set_experts_implementation("batched_mm")  # others can not be compiled in each version
    counter = TokenCounter(model, discover_layers(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(**_inputs("qwen3_moe")).last_hidden_state.sum().backward()
    assert counter.drain().sum(dim=1).tolist() == [2 * NUM_TOKENS * TOP_K] * 3
    torch._dynamo.reset()
