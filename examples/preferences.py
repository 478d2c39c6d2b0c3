"""Train an adapter on preferences with DPO. The base without the adapter is the reference, so no second model is loaded.

python examples/preferences.py
"""

from __future__ import annotations

import sys

import veneer


def rows() -> list[dict[str, str]]:
    """Sums with a short and a long-winded answer, of which the short one is preferred."""
    return [
        {"prompt": f"{a} + {b} =", "chosen": f"{a + b}", "rejected": f"The sum of {a} and {b} is {a + b}, I think."}
        for a in range(12)
        for b in range(8)
    ]


def main(model: str = "smollm2-135m", out: str = "runs/preferences", steps: int = 40) -> tuple[float, float]:
    """Train; returns the reward accuracy of the base and of the adapter on held-out rows."""
    result = veneer.train(
        data=rows(), base=model, task="dpo", beta=0.1, valid_fraction=0.1, steps=steps, batch_size=8, out=out
    )
    (job,) = result.jobs.values()
    before, after = job.figures[0][1], job.figures[-1][1]
    print(f"reward accuracy {before['reward_accuracy']:.2f} -> {after['reward_accuracy']:.2f}")
    print(f"reward margin {before['reward_margin']:.3f} -> {after['reward_margin']:.3f}")
    return before["reward_accuracy"], after["reward_accuracy"]


if __name__ == "__main__":
    main(*sys.argv[1:3])
