"""The base of a run with ``calibrate``: quantized with regard to its inputs on the run's examples, and kept in the run's folder.

The folder is one that ``veneer quantize`` writes. Resuming, and every later use of the adapters, reads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from veneer.checkpoints.base_files import skeleton
from veneer.checkpoints.quantized_folder import (
    CALIBRATION_TOKENS,
    calibrate,
    check_quantizable,
    draw,
    quantize_to_folder,
)
from veneer.config import TrainOptions
from veneer.errors import ConfigError
from veneer.models.classifiers.heads import HEADS
from veneer.models.load import Base, load_base
from veneer.models.quantized.scheme import scheme_for
from veneer.training.run.console import Console
from veneer.training.run.setup import context_of, load_all
from veneer.training.shared_base import SharedBase

FOLDER = "base"
"""The base's folder in that of the run."""


def base_of_run(
    options: TrainOptions,
    jobs: Mapping[str, TrainOptions],
    given: Base | SharedBase | None,
    out: Path,
    console: Console,
    *,
    known: bool,
    alone: bool,
) -> Base | SharedBase | None:
    """The base of a run if it is calibrated, else the one that is given.

    Args:
        options: of the run.
        jobs: the options of each job, whose examples the base is calibrated on in equal shares.
        given: a base in memory.
        out: the folder of the run.
        console: follows the calibration.
        known: the folder holds this run, so that a base which is there is its own.
        alone: no other process takes part.

    Raises:
        ConfigError: a base in memory would have to be quantized or calibrated, several processes take part, or a job trains a head.
    """
    if not options.calibrate:
        held = given.base if isinstance(given, SharedBase) else given
        if held is not None and options.quantize and not getattr(held.model.config, "quantization_config", None):
            raise ConfigError(
                f"quantize quantizes a base while it is read, and a plain base in memory is given; load it with load_base(..., "
                f"quantize={options.quantize!r}), or leave quantize out"
            )
        return given
    if not alone:
        raise ConfigError(
            "calibrate runs in one process, and several take part; write the base with veneer quantize BASE --calibrate ROWS, and train on "
            "that folder"
        )
    if given is not None:
        raise ConfigError(
            "calibrate quantizes the base that the options name, and a base in memory is given; leave one of them out"
        )
    if any(job.task in HEADS for job in jobs.values()):
        raise ConfigError(
            "calibrate takes examples of texts, and a job trains a head on labels; write the base with veneer quantize BASE --calibrate "
            "ROWS, and train on that folder"
        )
    folder = out / FOLDER
    if not (known and (folder / "config.json").is_file()):
        shutil.rmtree(folder, ignore_errors=True)
        _write(options, jobs, folder, console)
    return load_base(folder, dtype=options.dtype, device=options.device)


def _write(options: TrainOptions, jobs: Mapping[str, TrainOptions], folder: Path, console: Console) -> None:
    """Quantize the base that the options name, and write it to the folder."""
    base = load_base(options.base, dtype=options.dtype, revision=options.revision, device=options.device)
    data = {id(found): found for found in load_all(jobs, base, context_of(base)).values()}
    examples = [example for each in data.values() for example in draw(each.train, CALIBRATION_TOKENS // len(data))]
    scheme = scheme_for(str(options.quantize))
    assert base.path is not None
    files = skeleton(base.path)
    check_quantizable(files, scheme)
    calibrated = calibrate(
        base, examples, scheme, lambda done, count: console.progress(f"calibrated {done} of {count} blocks")
    )
    report = quantize_to_folder(files, folder, scheme, calibrated=calibrated)
    console.line(
        f"quantized {options.base} to {scheme.format} by the outputs of its layers on {calibrated.record['tokens']:,} training tokens: "
        f"{report.after / 1e9:.2f} GB in {folder}"
    )
