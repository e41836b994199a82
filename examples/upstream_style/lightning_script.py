"""Train a small Mixture-of-Experts on the text of the Python standard library, with Lightning."""

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
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


class LitByteModel(L.LightningModule):
    def __init__(self, dim=32, num_layers=2, num_experts=4, dropout=0.1, lr=5e-3):
        super().__init__()
        self.save_hyperparameters()
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

    def loss(self, batch):
        (tokens,) = batch
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def get_dataloaders(batch_size):
    text = b"".join(path.read_bytes() for path in sorted(Path(argparse.__file__).parent.glob("a*.py")))
    rows = torch.tensor(list(text[: 112 * (SEQUENCE_LENGTH + 1)])).view(-1, SEQUENCE_LENGTH + 1)
    train_dataloader = DataLoader(TensorDataset(rows[:96]), shuffle=True, batch_size=batch_size)
    val_dataloader = DataLoader(TensorDataset(rows[96:]), batch_size=batch_size)
    return train_dataloader, val_dataloader


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output_dir", type=Path, default=Path("lightning_logs"))
    args = parser.parse_args()

    L.seed_everything(42)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_epochs=args.max_epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        default_root_dir=args.output_dir,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(LitByteModel(), *get_dataloaders(args.batch_size))
    trainer.save_checkpoint(args.output_dir / "final.ckpt")


if __name__ == "__main__":
    main()
