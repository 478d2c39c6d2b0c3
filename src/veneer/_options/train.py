"""Every option of a training run, with the default that the evidence supports.

All linear layers, r = 16, lora_alpha = 32, A uniform, B zero, no dropout, AdamW, a constant learning rate after a short
warm-up, the loss on the assistant's tokens only.

The learning rate follows the base's size where none is given: ten times a good one for full fine-tuning, after "LoRA
Without Regret" (Schulman and Thinking Machines Lab, 2025), whose published fit is

    lr = 10 * 5e-5 * (2000 / hidden)^p,    p = 0.781 for the Llama family, 0.0775 for the Qwen family
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from veneer._options.base import (
    Count,
    Flag,
    Fraction,
    NotNegative,
    Options,
    Paths,
    Positive,
    Whole,
)
from veneer._options.low_rank import LowRankOptions
from veneer._options.text import kinds_of, read


def default_learning_rate(hidden: int, model_type: str) -> float:
    """The learning rate for a base with ``hidden`` features, of transformers' ``model_type``.

    Families whose exponent has not been fitted get the smaller of the two known results.

    >>> round(default_learning_rate(2048, "llama"), 6)
    0.000491
    """
    llama, qwen = (10 * 5e-5 * math.pow(2000 / hidden, power) for power in (0.781, 0.0775))
    if model_type.startswith("llama"):
        return llama
    return qwen if model_type.startswith("qwen") else min(llama, qwen)


def _name(value: str) -> str:
    if not value.strip() or value != value.strip() or any(letter in value for letter in '/\\:*?"<>|\0\n\r\t'):
        raise ValueError("a name has letters, digits, spaces inside, dots and dashes, so that it can name a folder")
    return value


_ONE = frozenset(
    {
        "dtype",
        "threads",
        "compile",
        "tokens_per_pass",
        "share",
        "save_every",
        "checkpoint_minutes",
        "halving",
        "track",
        "jobs",
        "sweep",
    }
)
"""Options of the base, the machine or the run, of which there is one."""

Name = Annotated[str, Field(max_length=100), AfterValidator(_name)]


def _listed(model: type[Options], key: str, value: Any) -> list[Any] | None:
    """The values of an option that takes one number, word or truth value, where several are given; None otherwise."""
    field = model.model_fields.get(key)
    if field is None or key in _ONE:
        return None
    kinds = kinds_of(field.annotation)
    if kinds.item is not None or kinds.entry is not None or kinds.model is not None or {str, Path} & set(kinds.plain):
        return None
    if isinstance(value, str) and "," in value:
        value = [read(part.strip(), field.annotation) for part in value.strip("[]").split(",")]
    return list(value) if isinstance(value, (list, tuple)) and value else None


class BaseOptions(Options):
    """The base."""

    base: str = "smollm2-135m"
    """The model to adapt: a hub id, a folder, a GGUF file, or smollm2-135m, the embedded one."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers of the base's weights; auto takes bfloat16 where the hardware is fast at it."""
    threads: Count | None = None
    """Threads for the arithmetic; none leaves it to torch."""
    compile: Flag | Literal["auto"] = "auto"
    """Take kernels in C++ on a CPU, built once for the processor, and let torch compile elementwise chains after the first step; auto
    does the second only where there are no such kernels and the run is long enough to earn it back."""


class DataOptions(Options):
    """The examples."""

    data: Paths = ()
    """Files of examples to train on."""
    valid: Paths = ()
    """Files of held-out examples, never trained on."""
    valid_fraction: Fraction = 0.0
    """Part of the training examples to hold out where no held-out file is given."""
    watch_general: Flag = False
    """Judge a general text (Python's own documentation) with the held-out examples, as general_loss, to see what is forgotten."""
    format: Literal["auto", "messages", "sharegpt", "prompt", "alpaca", "text"] = "auto"
    """Shape of the rows; auto recognises it by their keys."""
    columns: dict[str, str] = {}
    """Other names of columns in the files: prompt=question,completion=answer."""
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool", "function_call"]] = {}
    """Roles of other tags in sharegpt rows: npc=assistant."""
    chat_template: Path | None = None
    """File with a chat template (Jinja) to use in place of the base's; it is kept beside the adapter."""
    parse_specials: Flag = False
    """Control strings in plain text rows are control tokens, as in rows that a template rendered before."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are learnt: the assistant's, its last turn's, or all."""
    max_length: Count | None = None
    """Most tokens of an example; none takes what the base can hold."""
    truncate: Literal["error", "drop", "end"] = "error"
    """What becomes of a longer example: an error, left out, or cut at its end; the last two are counted and told."""


class AdapterOptions(LowRankOptions):
    """The adapter."""

    method: Literal["lora", "dora", "full"] = "lora"
    """How the weights are adapted; full trains copies of the layers whole, to compare with."""


class ContinualOptions(Options):
    """What was learnt before."""

    on_top_of: Paths = ()
    """Adapters (folders or runs) that act, frozen, while the new one is trained; it then belongs on top of them."""
    orthogonal_to: Paths = ()
    """Adapters (folders or runs) whose input directions the new one leaves alone, so that less of them is forgotten."""
    orthogonal: Literal["penalty", "projection"] = "penalty"
    """How: a penalty on the overlap of the A factors (O-LoRA), or no component along the old ones at all."""
    orthogonal_weight: Positive = 0.5
    """Weight of the penalty in the loss."""


class StepOptions(Options):
    """The steps."""

    steps: Count | None = None
    """Optimizer steps of the run."""
    epochs: Positive | None = None
    """Passes over the examples, where steps are not given; one if neither is."""
    batch_size: Count = 16
    """Examples of an optimizer step."""
    tokens_per_pass: Count = 1024
    """Most tokens that go through the base at once; a step takes as many passes as it needs, with the same result."""
    share: Whole | Literal["auto"] = "auto"
    """Most tokens of a pass that several jobs fill together; auto measures whether that is quicker, 0 lets them take turns."""
    learning_rate: Positive | None = None
    """Peak learning rate; none takes ten times that of full fine-tuning, by the base's size."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: stays, or falls to zero at the end."""
    warmup_steps: Whole = 10
    """Steps over which the learning rate rises from zero."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Rule of the update."""
    weight_decay: NotNegative = 0.0
    """Decay of the adapter's weights (AdamW's decoupled form)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's two averages."""
    eps: Positive = 1e-8
    """AdamW's guard against division by zero."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; none clips nothing."""
    activation_checkpointing: Flag | Literal["auto"] = False
    """Compute activations twice to save memory; auto does so where the run would not fit."""


class RunOptions(Options):
    """The run."""

    out: Path | None = None
    """Folder of the run; none takes runs/NAME."""
    name: Name | None = None
    """Name of the adapter; none takes the folder's."""
    seed: Whole = 0
    """Where all randomness of the run comes from."""
    eval_every: Count | None = None
    """Steps between two looks at the held-out examples; none looks about ten times."""
    save_every: Count | None = None
    """Steps between two checkpoints, besides those by the clock."""
    checkpoint_minutes: Positive | None = 10.0
    """Minutes between two checkpoints; none saves by steps and at the end only."""
    early_stop_patience: Count | None = None
    """Stop after so many looks without a better held-out loss; none goes on to the end."""
    plan: Flag = True
    """Plan memory and time before the first step, and refuse what does not fit."""
    halving: Flag = False
    """Of a sweep's jobs, stop the worse half by held-out loss at an eighth, a quarter, half of the steps and so on."""
    track: Literal["tensorboard", "trackio", "wandb"] | None = None
    """Hand the figures to an experiment tracker too, whose package must be installed."""


class TrainOptions(RunOptions, StepOptions, ContinualOptions, AdapterOptions, DataOptions, BaseOptions):
    """Every option of a training run; YAML holds them flat, by these names."""

    jobs: tuple[dict[str, Any], ...] = ()
    """Several adapters on one base at once: for each a name, and the options in which it differs."""
    sweep: dict[str, list[Any]] = {}
    """Values to try, in every combination, each as a job of its own; so is a list where one value is expected: r: [4, 16]."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_swept(cls, values: Any) -> Any:
        """Move lists that stand where one value is expected into ``sweep``, with text from a command line read by the type."""
        if not isinstance(values, dict):
            return values
        lists = {key: found for key, value in values.items() if (found := _listed(cls, key, value)) is not None}
        if not lists:
            return values
        sweep = values.get("sweep") or {}
        if not isinstance(sweep, dict):
            return values
        return {**{key: value for key, value in values.items() if key not in lists}, "sweep": {**sweep, **lists}}

    @model_validator(mode="after")
    def _agree(self) -> TrainOptions:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given; give the one that is meant")
        if self.valid and self.valid_fraction:
            raise ValueError("valid and valid_fraction are both given; give the one that is meant")
        if not self.data and not self.jobs:  # each job's own is looked at when the jobs are made
            raise ValueError(
                "data names no file of examples: veneer train ROWS.jsonl, or a line data: ROWS.jsonl in a file of options"
            )
        if self.early_stop_patience and not (self.valid or self.valid_fraction):
            raise ValueError("early_stop_patience needs held-out examples; give valid or valid_fraction")
        if self.watch_general and not (self.valid or self.valid_fraction):
            raise ValueError("watch_general looks when held-out examples are judged; give valid or valid_fraction")
        for key in self.sweep:
            field = type(self).model_fields.get(key)
            if field is not None and getattr(self, key) != field.default:
                raise ValueError(f"{key} is given as one value and swept too; give the one that is meant")
        return self
