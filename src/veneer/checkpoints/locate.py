"""The adapters that a path means: the one answer for ``bank.load``, training options and every command.

    out/                               a PEFT folder                        out
    out/adapter_model.safetensors      a file of one                        out
    runs/a/                            a run of one job (runs/a/adapter)    a
    runs/a/best/                       a folder of a run                    a
    runs/a/, runs/a/best/              a run of several jobs                one adapter per job, named after it
    parts/                             a folder of PEFT folders             one adapter per folder

Boundary: looks at names only, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from veneer.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_IN_A_RUN = ("adapter", "best", "last", "final")


def adapters_at(path: Path) -> dict[str, Path]:
    """{name: folder} of every adapter that a path means; empty if there is none, or the path cannot be read."""
    try:
        return _adapters_at(path)
    except (OSError, ValueError, RuntimeError):  # no permission, too long, a NUL, links in a circle
        return {}


def _adapters_at(path: Path) -> dict[str, Path]:
    if path.name == WEIGHTS and path.is_file():
        path = path.parent
    if is_adapter(path):
        return {adapter_name(path): path}
    if (path / WEIGHTS).is_file():
        return {}  # a damaged adapter folder; an adapter inside it is another one
    if is_adapter(path / "adapter"):
        return {path.resolve().name: path / "adapter"}
    if below := _named(path.glob(f"adapters/*/{CONFIG}")):
        return below
    holds_else = is_run(path) or (path / "config.json").is_file()
    return {} if holds_else else _named(path.glob(f"*/{CONFIG}"))


def find_adapter(path: Path) -> tuple[str, Path]:
    """(name, folder) of the one adapter that a path means.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    found = adapters_at(path)
    if not found:
        raise CheckpointError(
            f"{path} holds no adapter ({CONFIG}); give an adapter folder, or a run that has written one"
        )
    if len(found) > 1:
        first = next(iter(found.values()))
        raise CheckpointError(
            f"{path} holds several adapters ({', '.join(found)}); give the folder of one, such as {first}"
        )
    return next(iter(found.items()))


def adapter_of_job(run: Path, job: str) -> Path | None:
    """The folder of the last adapter of one job of a run, or None before it is written."""
    return next((folder for folder in (run / "adapters" / job, run / "adapter") if is_adapter(folder)), None)


def adapter_name(folder: Path) -> str:
    """The default name of an adapter: that of its folder, or of the run for a folder such as ``best``."""
    folder = folder.resolve()
    return folder.parent.name if folder.name in _IN_A_RUN else folder.name


def is_adapter(path: Path) -> bool:
    """A path is a PEFT folder."""
    return (path / CONFIG).is_file()


def is_run(path: Path) -> bool:
    """A path is the folder of a training run."""
    return (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()


def _named(configs: Iterable[Path]) -> dict[str, Path]:
    return {file.parent.name: file.parent for file in sorted(configs)}
