"""A Mixture-of-Experts in a Lightning Fabric loop. Kill it (kill -9), start it again: it ends bit for bit the same."""

import torch
from lightning.fabric import Fabric
from torch.nn import functional as F

from moetion_lightning.integrations import FabricCheckpointing
from moetion_lightning.recipes.data import StdlibText
from moetion_lightning.recipes.models import ByteMoE

run = FabricCheckpointing(window=4)
fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed", callbacks=[run])
fabric.launch()
fabric.seed_everything(0, verbose=False)
module = ByteMoE(max_seq_len=32, d_model=32, d_expert=64, num_layers=2, num_experts=4)
model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=3e-3))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
loader = fabric.setup_dataloaders(StdlibText(seq_len=32, batch_size=8, max_bytes=6_000).train_dataloader())
run.track(optimizer, scheduler=scheduler)

for epoch in run.epochs(3):
    for step, batch in run.steps(loader):
        logits, balance = model(batch["input_ids"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()) + 0.01 * balance
        optimizer.zero_grad()
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        fabric.print(f"step {step}: loss {loss.item():.6f}", flush=True)
    scheduler.step()
    fabric.print(f"epoch {epoch} is done", flush=True)
run.close()
