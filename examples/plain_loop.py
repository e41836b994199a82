"""A Mixture-of-Experts in a plain PyTorch loop. Kill it (kill -9), start it again: it ends bit for bit the same."""

import torch
from torch.nn import functional as F

from moetion_lightning.integrations import SparseCheckpointing
from moetion_lightning.recipes.data import StdlibText
from moetion_lightning.recipes.models import ByteMoE

torch.manual_seed(0)
model = ByteMoE(max_seq_len=32, d_model=32, d_expert=64, num_layers=2, num_experts=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
loader = StdlibText(seq_len=32, batch_size=8, max_bytes=6_000).train_dataloader()

with SparseCheckpointing(model, optimizer, scheduler=scheduler, window=4) as run:
    for step, batch in run.steps(loader, epochs=3):
        logits, balance = model(batch["input_ids"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()) + 0.01 * balance
        run.record_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        print(f"step {step}: loss {loss.item():.6f}", flush=True)
