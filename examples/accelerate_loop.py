"""A Mixture-of-Experts in an Accelerate loop. Kill it (kill -9), start it again: it ends bit for bit the same.

With several processes, all of which are started again when one is lost:
torchrun --nproc-per-node 2 --max-restarts 3 examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from moetion_lightning.integrations import attach, separate_restarts
from moetion_lightning.recipes.data import StdlibText
from moetion_lightning.recipes.models import ByteMoE

separate_restarts()  # under torchrun: processes that were restarted do not look for dead ones
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
model = ByteMoE(max_seq_len=32, d_model=32, d_expert=64, num_layers=2, num_experts=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
loader = StdlibText(seq_len=32, batch_size=4, max_bytes=6_000).train_dataloader()
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

run = attach(accelerator, window=4)
for step, batch in run.steps(loader, epochs=3):
    with accelerator.accumulate(model):
        logits, balance = model(batch["input_ids"])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()) + 0.01 * balance
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator.print(f"step {step}: loss {loss.item():.6f}", flush=True)
accelerator.end_training()
