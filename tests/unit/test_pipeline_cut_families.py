"""Models of transformers, unchanged and with their own loss, cut into stages: bitwise the same losses and gradients."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

from moetion_lightning.errors import ConfigurationError
from tests.runs.pipeline_models import VirtualPipeline, check_equal, plain_gradients

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

VOCAB = 64
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "olmoe": MOE,
    "gpt_oss": {**MOE, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
    "llama": {},
}  # fmt: skip
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {
        "vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    },
    "bart": {
        "vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
        "dropout": 0.0, "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "forced_eos_token_id": 2,
    },
}  # fmt: skip
WITH_AUXILIARY_LOSS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")


def _model(family: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    if family in SEQ2SEQ:
        config = transformers.AutoConfig.for_model(family, **{**SEQ2SEQ[family], **fields})
        return transformers.AutoModelForSeq2SeqLM.from_config(config).train()
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **fields})
    return transformers.AutoModelForCausalLM.from_config(config).train()


def _batches(*lengths: int, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (2, length), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if padded:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][0, -2:] = 0
            batch["labels"][0, -2:] = -100
            batch["labels"][1, :1] = -100
        batches.append(batch)
    return batches


def _step(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = module(**batch).loss
    return loss


def _check(model: nn.Module, batches: list[dict[str, Tensor]], num_stages: int, **options: Any) -> VirtualPipeline:
    expected = plain_gradients(model, _step, batches)
    pipeline = VirtualPipeline(model, _step, batches[0], num_stages, **options)
    check_equal(expected, pipeline.train(batches), pipeline.plan.tied())
    return pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_language_model_is_bitwise_equal(family: str) -> None:
    plan = _check(_model(family), _batches(6, 6, 8), 3).plan
    taps = {side.tap.split(".")[-1] for side in plan.sides}
    assert taps == ({"gate"} if family in WITH_AUXILIARY_LOSS and family != "gpt_oss" else taps)
    assert bool(plan.sides) == (family in WITH_AUXILIARY_LOSS)
    # Masks and rotary tables are computed again on every stage.
    assert [len(boundary.crossings) for boundary in plan.boundaries] == [1, 1]


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_padding_and_ignored_labels(family: str) -> None:
    _check(_model(family), _batches(6, 8, padded=True), 2)


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("bounds", [(0, 1), (0, 3), (0, 1, 3)])
def test_encoder_and_decoder_are_bitwise_equal(family: str, bounds: tuple[int, ...]) -> None:
    plan = _check(_model(family), _batches(6, 8), len(bounds), bounds=bounds).plan
    assert not plan.sides


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_cut_between_encoder_and_decoder(family: str) -> None:
    """Both sides of the cut read the encoder's output, whose gradient is summed in another order: up to rounding."""
    model = _model(family)
    pipeline = VirtualPipeline(model, _step, _batches(6)[0], 2, bounds=(0, 2))
    names = [name for name, _ in model.named_parameters()]
    check_equal(plain_gradients(model, _step, _batches(6, 8)), pipeline.train(_batches(6, 8)), names)


def test_tied_embedding() -> None:
    plan = _check(_model("llama", tie_word_embeddings=True), _batches(6, 6), 3).plan
    assert plan.tied() == {"model.embed_tokens.weight": (0, 2)}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_gradient_checkpointing_and_dropout_do_not_depend_on_the_number_of_stages() -> None:
    model = _model("mixtral", attention_dropout=0.1, attn_implementation="eager")
    model.gradient_checkpointing_enable()
    batches = _batches(6, 6)
    one, two, three = (VirtualPipeline(model, _step, batches[0], n).train(batches) for n in (1, 2, 3))
    check_equal(one, two)
    check_equal(one, three)
    model.gradient_checkpointing_disable()
    check_equal(one, VirtualPipeline(model, _step, batches[0], 2).train(batches))


def test_key_value_caches_are_no_obstacle() -> None:
    _check(_model("qwen3_moe", use_cache=True), _batches(6, 6), 2)


def test_frozen_front() -> None:
    model = _model("mixtral")
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    _check(model, _batches(6, 6), 3)


def test_hidden_states_of_earlier_stages_are_refused() -> None:
    class DeepSupervision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model("llama")

        def forward(self, **batch: Tensor) -> Any:
            out = self.model(**batch, output_hidden_states=True)
            out.loss = out.loss + out.hidden_states[1].pow(2).mean()
            return out

    with pytest.raises(ConfigurationError, match="intermediate hidden states"):
        VirtualPipeline(DeepSupervision(), _step, _batches(6)[0], 2, bounds=(0, 2))


def test_evaluation_returns_logits() -> None:
    def logits(module: nn.Module, batch: dict[str, Tensor]) -> Any:
        out = module(**batch)
        return {"logits": out.logits, "loss": out.loss}

    model = _model("mixtral").eval()
    pipeline = VirtualPipeline(model, _step, _batches(6)[0], 3)
    batch = _batches(6, 9)[1]
    expected, found = logits(model, batch), pipeline.evaluate(logits, batch)
    assert torch.equal(expected["logits"], found["logits"])
    assert torch.equal(expected["loss"], found["loss"])
