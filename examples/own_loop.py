"""Attach adapters to any model and train one in your own loop.

python examples/own_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

import veneer
from veneer import DoRA


def main(steps: int = 200) -> float:
    """Teach an adapter the difference between two functions; returns the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)).requires_grad_(False)
    bank = veneer.attach(model)
    bank.add("shifted", DoRA(r=4))
    optimizer = torch.optim.AdamW(bank.parameters("shifted"), lr=2e-2)
    x = torch.randn(256, 8)
    before = model(x)
    target = before + x[:, :1].sin()
    for step in range(steps):
        with bank.use("shifted"):
            loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.detach():.4f}")
    assert torch.equal(model(x), before)  # outside `use`, the base is what it was
    print(f"last loss {loss.detach():.4f}")
    return float(loss.detach())


if __name__ == "__main__":
    main()
