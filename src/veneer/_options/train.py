"""Options of a training run: ``TrainOptions``.

The defaults: all linear layers, r = 16, lora_alpha = 32, A uniform, B zero, no dropout, AdamW, a learning rate that falls
linearly to zero after a short warm-up, and the loss on the assistant's tokens only.

Without ``learning_rate``, the learning rate follows the size of the base model: ten times a good one for full fine-tuning, after "LoRA
Without Regret" (Schulman and Thinking Machines Lab, 2025), whose published fit is

    lr = 10 * 5e-5 * (2000 / hidden)^p,    p = 0.781 for the Llama family, 0.0775 for the Qwen family
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from veneer._options.base import (
    PER_RUN,
    Count,
    Flag,
    Fraction,
    NotNegative,
    Options,
    Paths,
    PerRun,
    Positive,
    Prompts,
    Whole,
)
from veneer._options.low_rank import LowRankOptions
from veneer._options.other_methods import BottleneckOptions, IA3Options, VeRAOptions
from veneer._options.text import kinds_of, read
from veneer._options.virtual_tokens import VirtualTokenOptions


def default_learning_rate(hidden: int, model_type: str) -> float:
    """The learning rate for a base model with ``hidden`` features, of transformers' ``model_type``.

    Families without a fitted exponent get the smaller of the two known results.

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


Name = Annotated[str, Field(max_length=100), AfterValidator(_name)]


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", value):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, found {value!r}")
    return value


Device = Annotated[str, AfterValidator(_device)]


class BaseOptions(Options):
    """The base model, and how it is held and computed with."""

    title: ClassVar[str] = "Base model"

    base: PerRun[str] = "smollm2-135m"
    """Base model: a Hugging Face Hub id, a folder, a GGUF file, or smollm2-135m, which is included."""
    revision: PerRun[str | None] = None
    """Commit, tag or branch of a Hub model."""
    dtype: PerRun[Literal["auto", "float32", "bfloat16"]] = "auto"
    """Data type of the base weights; auto uses bfloat16 where the hardware is fast at it."""
    device: PerRun[Device] = "auto"
    """Device: cpu, cuda, cuda:N, mps, or auto, a GPU where there is one."""
    quantize: PerRun[Literal["nf4", "fp4", "int8"] | None] = None
    """Quantize the base's linear layers while it is read, to save memory; a base that is quantized already needs no option."""
    calibrate: PerRun[Flag] = False
    """With quantize: choose the quantized values by the layers' outputs on training examples (GPTQ), which loses less; takes minutes, and
    writes the quantized base to the run's folder."""
    processes: PerRun[Count] = 1
    """Processes that train together on this machine: one GPU each, or an equal share of the cores. With torchrun, leave it out."""
    cluster: PerRun[str | None] = None
    """Ray cluster whose workers share the jobs: HOST:PORT, or auto, the one that this machine belongs to; --out is a shared folder."""
    shard: PerRun[Literal["auto", "none", "full"]] = "auto"
    """Divide the base among the processes: full, none, or auto, where it would take more than half of a process's memory."""
    sequence_parallel: PerRun[Count] = 1
    """Processes that compute each batch together, a share of its tokens each, for texts that one device cannot hold."""
    answer_minutes: PerRun[Positive] = 10.0
    """Minutes after which a process that does not answer ends a run of several processes."""
    threads: PerRun[Count | None] = None
    """Number of CPU threads (default: PyTorch's choice)."""
    compile: PerRun[Flag | Literal["auto"]] = "auto"
    """Use C++ kernels on a CPU, built once per processor, and compiled chains on a GPU; true also reports why kernels cannot be used and
    compiles for short runs, false leaves them out."""


class DataOptions(Options):
    """The examples of a job, and how they are rendered."""

    title: ClassVar[str] = "Data"

    task: Literal["sft", "dpo", "orpo", "kto", "classification", "regression", "token-classification"] = "sft"
    """Task: sft trains on the answers of the rows; dpo and orpo train on preferences, rows with prompt, chosen and rejected; kto on rows
    with prompt, completion and label (true or false); the others train a head, saved with the adapter, that predicts the label of a
    text, of a pair, or of each word."""
    data: Paths = ()
    """Files of training examples, or data sets of the hub (org/name:SPLIT)."""
    valid: Paths = ()
    """Files of held-out examples for evaluation."""
    valid_fraction: Fraction = 0.0
    """Fraction of the training examples to hold out for evaluation, if no held-out file is given."""
    watch_general: Flag = False
    """Also evaluate on a general text (Python's documentation), as general_loss, to measure forgetting."""
    format: Literal["auto", "messages", "sharegpt", "prompt", "alpaca", "text"] = "auto"
    """Row format; auto detects it from the keys."""
    columns: dict[str, str] = {}
    """Rename columns: prompt=question,completion=answer."""
    roles: dict[str, Literal["system", "developer", "user", "assistant", "tool", "function_call"]] = {}
    """Map other role names in sharegpt rows: npc=assistant."""
    chat_template: Path | None = None
    """Chat template to use in place of the model's: a Jinja file, chatml, chatml-tools, or a name of the tokenizer's own;
    saved with the adapter."""
    parse_specials: Flag = False
    """Parse control tokens in plain text rows, as needed for text that a template has already rendered."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that count towards the loss: the assistant's, those of its last turn, or all."""
    max_length: Count | None = None
    """Maximum length of an example in tokens (default: the model's context length)."""
    truncate: Literal["error", "drop", "end"] = "error"
    """Handling of longer examples: raise an error, drop them, or cut off their end; dropped and cut examples are counted."""


class AdapterOptions(VirtualTokenOptions, LowRankOptions, IA3Options, BottleneckOptions, VeRAOptions):
    """The method of a job's adapter, with the options of all methods."""

    title: ClassVar[str] = "Adapter"

    method: Literal["lora", "dora", "full", "bitfit", "ia3", "houlsby", "pfeiffer", "vera", "prefix", "prompt"] = "lora"
    """Adapter method: lora, dora, full (copies of the layers), bitfit (biases), ia3, houlsby, pfeiffer, vera, or virtual tokens
    before the sequence: prefix (keys and values of every layer), or prompt (embeddings)."""


class ContinualOptions(Options):
    """What earlier adapters and tasks the training respects."""

    title: ClassVar[str] = "Continual learning"

    init_from: Path | None = None
    """Adapter (a folder or a run) whose weights the new adapter starts from, with the method, rank and modules that it has."""
    on_top_of: Paths = ()
    """Frozen adapters (folders or runs) that are active during training; the new adapter is meant to be used with them."""
    orthogonal_to: Paths = ()
    """Earlier adapters (folders or runs) whose input directions the new adapter avoids, to reduce forgetting."""
    orthogonal: Literal["penalty", "projection"] = "penalty"
    """Orthogonality method: a penalty on the overlap of the A factors (O-LoRA), or projection onto the orthogonal complement."""
    orthogonal_weight: Positive = 0.5
    """Weight of the orthogonality penalty in the loss."""


class PreferenceOptions(Options):
    """Options of the tasks that read preferences."""

    title: ClassVar[str] = "Preference data"

    beta: Positive = 0.1
    """DPO and KTO: strength of the tie to the model without the adapter; ORPO: weight of the odds ratio in the loss."""
    label_smoothing: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=0.5)] = 0.0
    """Assumed fraction of preferences that are the wrong way round, less than 0.5 (DPO)."""
    preference_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of DPO: sigmoid is the original one, ipo the bounded one of IPO."""
    desirable_weight: Positive = 1.0
    """Weight of answers with the label true in the loss (KTO)."""
    undesirable_weight: Positive = 1.0
    """Weight of answers with the label false in the loss (KTO)."""


class StepOptions(Options):
    """The steps of a job: their number, size and learning rate."""

    title: ClassVar[str] = "Optimization"

    steps: Count | None = None
    """Number of optimizer steps."""
    epochs: Positive | None = None
    """Number of passes over the data, if steps is not given (default: 1)."""
    batch_size: Count = 16
    """Examples per optimizer step."""
    tokens_per_pass: PerRun[Count] = 1024
    """Maximum tokens in one forward and backward pass; larger batches are split into micro-batches with the same result."""
    tokens_per_shared_pass: PerRun[Whole | Literal["auto"]] = "auto"
    """Maximum tokens in a pass shared by several jobs; auto measures the fastest size, 0 runs jobs in turn."""
    learning_rate: Positive | None = None
    """Peak learning rate (default: based on the model's size)."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate schedule after warm-up; linear and cosine decay to zero."""
    warmup_steps: Whole = 10
    """Steps of linear learning rate warm-up."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    weight_decay: NotNegative = 0.0
    """Weight decay of the adapter's weights, decoupled in AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the moment estimates."""
    eps: Positive = 1e-8
    """AdamW's term for numerical stability."""
    clip: Positive | None = 1.0
    """Maximum gradient norm; none disables clipping."""
    activation_checkpointing: PerRun[Flag | Literal["auto"]] = False
    """Recompute activations in the backward pass to save memory; auto does so only if the run would not fit otherwise."""


class RunOptions(Options):
    """The run around the steps: evaluation, checkpoints, devices, limits."""

    title: ClassVar[str] = "Run"

    out: PerRun[Path | None] = None
    """Output folder (default: runs/NAME)."""
    name: Name | None = None
    """Name of the adapter (default: the output folder's name)."""
    seed: Whole = 0
    """Random seed."""
    eval_every: Count | None = None
    """Evaluate every N steps (default: about ten evaluations per run, at least 5 steps apart)."""
    samples: Whole = 0
    """Answers to generate and print at each evaluation, for the prompts of so many held-out examples (or else training examples)."""
    sample_prompts: Prompts = ()
    """Prompts to answer at each evaluation; repeat the flag for several."""
    sample_tokens: Count = 64
    """Maximum tokens of each of these answers."""
    save_every: PerRun[Count | None] = None
    """Save a checkpoint every N steps, in addition to those by time."""
    checkpoint_minutes: PerRun[Positive | None] = 10.0
    """Minutes between checkpoints; none saves only by steps and at the end."""
    early_stop_patience: Count | None = None
    """Stop after N evaluations without improvement (default: no early stopping)."""
    plan: PerRun[Flag] = True
    """Estimate memory and time before the first step, and stop if the run does not fit in memory."""
    halving: PerRun[Flag] = False
    """Stop the worse half of a sweep's jobs by held-out loss at 1/8, 1/4, 1/2 of the steps and so on (successive halving)."""
    track: PerRun[Literal["tensorboard", "trackio", "wandb"] | None] = None
    """Also log metrics to an experiment tracker, whose package must be installed."""


class TrainOptions(
    RunOptions, StepOptions, PreferenceOptions, ContinualOptions, AdapterOptions, DataOptions, BaseOptions
):
    """All options of ``veneer train``; see `veneer.train`."""

    title: ClassVar[str] = "Several jobs in one run"

    jobs: PerRun[tuple[dict[str, Any], ...]] = ()
    """Adapters to train together on one base: for each a name and the options that differ."""
    sweep: PerRun[dict[str, list[Any]]] = {}
    """Values to try in every combination, one job each; a list in place of a single value does the same: r: [4, 16]."""

    @model_validator(mode="before")
    @classmethod
    def _move_lists_to_sweep(cls, values: Any) -> Any:
        """Move lists given for options of one value into ``sweep``; text from the command line is parsed by the option's type."""
        if not isinstance(values, dict):
            return values
        lists = {key: found for key, value in values.items() if (found := _swept_values(cls, key, value)) is not None}
        sweep = values.get("sweep") or {}
        if not lists or not isinstance(sweep, dict):
            return values
        return {**{key: value for key, value in values.items() if key not in lists}, "sweep": {**sweep, **lists}}

    @model_validator(mode="after")
    def _check_combinations(self) -> TrainOptions:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("`steps` and `epochs` are both given; give only one of them")
        if self.valid and self.valid_fraction:
            raise ValueError("`valid` and `valid_fraction` are both given; give only one of them")
        if not self.data and not self.jobs:  # the data of each job is checked when the jobs are made
            raise ValueError(
                "data names no file of examples; give ROWS.jsonl, or add a line data: ROWS.jsonl to the configuration"
            )
        held_out = bool(self.valid or self.valid_fraction)
        if self.early_stop_patience and not held_out:
            raise ValueError("`early_stop_patience` needs held-out examples; give `valid` or `valid_fraction`")
        if self.watch_general and not held_out:
            raise ValueError(
                "`watch_general` is evaluated along with held-out examples; give `valid` or `valid_fraction`"
            )
        if self.init_from is not None and self.orthogonal_to and self.orthogonal == "projection":
            raise ValueError(
                "`init_from` and a projection are both given, and the projection would change the weights that training starts from; "
                "use `orthogonal: penalty`"
            )
        self._check_task()
        self._check_calibrate()
        if self.init_lora_weights in ("pissa", "olora") and self.orthogonal_to:
            raise ValueError(
                f"{self.init_lora_weights} holds the factors that training starts from, and `orthogonal_to` would change them; leave it out"
            )
        if self.eva_rho != 2.0 and self.init_lora_weights != "eva" and "init_lora_weights" not in self.sweep:
            raise ValueError("`eva_rho` is part of `init_lora_weights: eva`; leave it out")
        for key in self.sweep:
            field = type(self).model_fields.get(key)
            if field is not None and getattr(self, key) != field.default:
                raise ValueError(f"`{key}` is given both as one value and in `sweep`; give only one of them")
        return self

    def _check_calibrate(self) -> None:
        """Raise ValueError where a base cannot be calibrated in this run."""
        if not self.calibrate:
            return
        if self.quantize is None:
            raise ValueError(
                "`calibrate` chooses the values of a quantized base; give `quantize: nf4` too, or leave it out"
            )
        if self.processes > 1 or self.cluster is not None:
            raise ValueError(
                "`calibrate` runs in one process; write the base with veneer quantize BASE --calibrate ROWS, and train on that folder"
            )

    def _check_task(self) -> None:
        """Raise ValueError for options that have no effect with the task."""
        weighted = (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0)
        if weighted and self.task != "kto":
            raise ValueError("`desirable_weight` and `undesirable_weight` are weights of `task: kto`; leave them out")
        if self.task == "sft":
            return
        if self.task == "kto" and self.batch_size == 1:
            raise ValueError(
                "`batch_size` is 1, and `task: kto` compares the answers of a step with those of its other rows; use at least 2"
            )
        if self.task not in ("dpo", "orpo", "kto"):
            if self.format != "auto" or self.train_on != "assistant" or self.chat_template is not None:
                raise ValueError(
                    f"`format`, `train_on` and `chat_template` are for answers, and `task: {self.task}` predicts labels; leave them out"
                )
            if self.watch_general:
                raise ValueError(
                    f"`watch_general` needs a language model, and `task: {self.task}` trains a head; leave it out"
                )
            if self.samples or self.sample_prompts:
                raise ValueError(f"`samples` are answers, and `task: {self.task}` predicts labels; leave them out")
        elif self.train_on == "all":
            raise ValueError(
                f"`train_on: all` would also score the prompt, and `task: {self.task}` compares answers; use assistant"
            )
        elif self.format != "auto":
            raise ValueError(
                f"`format` is {self.format}, and `task: {self.task}` reads preferences; leave `format` out"
            )
        smoothed = self.task == "dpo" and self.preference_loss == "sigmoid"
        if self.label_smoothing and not smoothed:
            raise ValueError("`label_smoothing` is part of DPO's sigmoid loss only; leave it out")


PER_RUN_OPTIONS = tuple(name for name, field in TrainOptions.model_fields.items() if PER_RUN in field.metadata)
"""Options that belong to the whole run: a job cannot set them and a sweep cannot vary them."""


def _swept_values(model: type[Options], key: str, value: Any) -> list[Any] | None:
    """The values given for an option that takes one number, word or truth value, if several are given; else None."""
    field = model.model_fields.get(key)
    if field is None or PER_RUN in field.metadata:
        return None
    kinds = kinds_of(field.annotation)
    if kinds.item is not None or kinds.entry is not None or kinds.model is not None or {str, Path} & set(kinds.plain):
        return None
    if isinstance(value, str) and "," in value:
        value = [read(part.strip(), field.annotation) for part in value.strip("[]").split(",")]
    return list(value) if isinstance(value, (list, tuple)) and value else None
