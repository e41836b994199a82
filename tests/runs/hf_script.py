"""A Trainer script that knows nothing of this package."""

import argparse

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments, set_seed


class Tokens(torch.utils.data.Dataset):
    def __init__(self):
        self.tokens = torch.randint(64, (40, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir")
    args = parser.parse_args()
    set_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2, attention_dropout=0.1)
    arguments = TrainingArguments(
        args.output_dir, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", num_train_epochs=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.01, warmup_steps=4,
    )  # fmt: skip
    trainer = Trainer(Qwen3MoeForCausalLM(config), arguments, train_dataset=Tokens())
    trainer.train()
    trainer.save_state()
    torch.save(
        {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()},
        f"{args.output_dir}/final.pt",
    )
