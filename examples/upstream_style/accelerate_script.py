"""Train a small Mixture-of-Experts on the text of the Python standard library, with Hugging Face Accelerate."""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SEQUENCE_LENGTH = 32


class MoELayer(nn.Module):
    def __init__(self, dim, num_experts):
        super().__init__()
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(num_experts)
        )

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


class ByteModel(nn.Module):
    def __init__(self, dim=32, num_layers=2, num_experts=4, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.mix = nn.ModuleList(nn.GRU(dim, dim, batch_first=True) for _ in range(num_layers))
        self.moe = nn.ModuleList(MoELayer(dim, num_experts) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, 256)

    def forward(self, tokens):
        x = self.embed(tokens)
        for mix, moe in zip(self.mix, self.moe):
            x = x + self.dropout(mix(x)[0])
            x = x + self.dropout(moe(x.flatten(0, 1))).view_as(x)
        return self.head(x)


def get_dataloaders(batch_size):
    text = b"".join(path.read_bytes() for path in sorted(Path(argparse.__file__).parent.glob("a*.py")))
    rows = torch.tensor(list(text[: 112 * (SEQUENCE_LENGTH + 1)])).view(-1, SEQUENCE_LENGTH + 1)
    train_dataloader = DataLoader(TensorDataset(rows[:96]), shuffle=True, batch_size=batch_size)
    eval_dataloader = DataLoader(TensorDataset(rows[96:]), shuffle=False, batch_size=batch_size)
    return train_dataloader, eval_dataloader


def training_function(args):
    # An expert may get no token of a process's batch.
    ddp_kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=args.cpu, gradient_accumulation_steps=args.gradient_accumulation_steps, kwargs_handlers=[ddp_kwargs]
    )
    set_seed(args.seed)
    train_dataloader, eval_dataloader = get_dataloaders(args.batch_size)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    num_updates = args.num_epochs * math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=num_updates + 1)

    # Prepare everything. There is no specific order to remember, we just need to unpack the objects in the same order
    # we gave them to the prepare method.
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )

    # Now we train the model
    for epoch in range(args.num_epochs):
        model.train()
        for (tokens,) in train_dataloader:
            with accelerator.accumulate(model):
                logits = model(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

        model.eval()
        losses = []
        for (tokens,) in eval_dataloader:
            with torch.no_grad():
                logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            losses.append(accelerator.gather_for_metrics(loss.repeat(tokens.shape[0])))
        accelerator.print(f"epoch {epoch}: validation loss {torch.cat(losses).mean():.4f}")

        if args.output_dir is not None:
            accelerator.save_state(args.output_dir / f"epoch_{epoch}")

    accelerator.end_training()


def main():
    parser = argparse.ArgumentParser(description="Simple example of training script.")
    parser.add_argument("--cpu", action="store_true", help="If passed, will train on the CPU.")
    parser.add_argument("--num_epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=None, help="Where the state of each epoch is saved.")
    args = parser.parse_args()
    training_function(args)


if __name__ == "__main__":
    main()
