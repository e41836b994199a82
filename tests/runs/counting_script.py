"""A Lightning script that knows nothing of this package; with --count its data hang on a global variable."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

DRAWN = [0]


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        DRAWN[0] += 1
        return torch.full((4,), float(DRAWN[0] if "--count" in sys.argv else index))


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return self.layers(batch / 40).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


if __name__ == "__main__":
    pl.seed_everything(3, verbose=False)
    loader = torch.utils.data.DataLoader(Samples(), batch_size=2, shuffle="--count" not in sys.argv)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_epochs=3, accelerator="cpu", **quiet).fit(Net(), loader)
    Path("ended.txt").write_text("never: a drill is shorter")
