"""The models that requests may name: the base, registered adapters, and checkpoints of jobs.

    base name            the base; also "base"
    sql                  an adapter of the folder that the server was started with, or of a job
    sql:step-120         a checkpoint of the job that makes sql

Registrations are rows in the state, so they are listed at once and are there again after a restart. A name is all that a client can give;
folders are found here.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.checkpoints.locate import adapters_at
from veneer.errors import CheckpointError, ServeError, VeneerError
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import Mix
from veneer.serve.store.database import Database
from veneer.serve.store.jobs import JobStore

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of adapters."""
_CHECKPOINT = re.compile(r"(.+):step-([0-9]{1,9})")
_LIKE_CHECKPOINT = re.compile(r".*\.step-[0-9]+")


class UnknownModelError(ServeError):
    """A name that no model has."""


@dataclass(frozen=True)
class ModelCard:
    """A model as it is listed. ``parent`` is None for the base."""

    id: str
    created_at: int
    parent: str | None
    loaded: bool = True


class ModelRegistry:
    """Names of models, and which of them the engine has loaded. Its methods may be called from any thread."""

    def __init__(
        self,
        database: Database,
        jobs: JobStore,
        engine: Engine,
        *,
        base_name: str,
        folder: Path | None,
        jobs_folder: Path,
    ) -> None:
        """``folder`` holds the adapters that the server was started with; ``jobs_folder`` the runs of jobs."""
        self._database = database
        self._jobs = jobs
        self._engine = engine
        self._folder = folder
        self._jobs_folder = jobs_folder
        self.base_id = _base_id(base_name)
        self._base_names = base_names(base_name)
        self._created = int(time.time())
        self._lock = threading.RLock()

    # Start

    def restore(self) -> dict[str, str]:
        """Register the adapters of the folder and load all that were loaded before; returns {name: problem} of those that cannot be."""
        problems: dict[str, str] = {}
        for name, folder in self._found().items():
            if self._name_problem(name):
                problems[name] = self._name_problem(name)
            else:
                self._register(name, folder, "folder", None)
        for row in self._rows():
            if not row["loaded"]:
                continue
            try:
                self._engine.load_adapter(row["name"], Path(row["folder"]))
            except (VeneerError, OSError) as error:
                self._set_loaded(row["name"], False)
                problems[row["name"]] = str(error)
        for job in self._database.rows("SELECT * FROM jobs"):
            for step in self._jobs.steps_of(job["id"]):
                folder = self._jobs_folder / job["id"] / "models" / f"step-{step}"
                try:
                    self._engine.load_adapter(_engine_name(job["name"], step), folder)
                except (VeneerError, OSError) as error:
                    self._jobs.forget_checkpoint(job["id"], step)
                    problems[f"{job['name']}:step-{step}"] = str(error)
        return problems

    def _found(self) -> dict[str, Path]:
        """{name: folder} of the adapters in the folder that the server was started with, runs included."""
        if self._folder is None or not self._folder.is_dir():
            return {}
        found = adapters_at(self._folder)
        for child in sorted(self._folder.iterdir()):
            if child.is_dir():
                with suppress(CheckpointError):  # one that cannot be read does not keep the others from being served
                    found = {**adapters_at(child), **found}
        return found

    def _name_problem(self, name: str) -> str:
        if name in self._base_names:
            return "the name is that of the base; rename the folder"
        if not NAME.fullmatch(name) or _LIKE_CHECKPOINT.fullmatch(name):
            return (
                "the name cannot be served: expected 1 to 64 letters, digits, dots, dashes or underscores, and no ending like "
                ".step-1; rename the folder"
            )
        row = self._row(name)
        return "a job of this server made another adapter of this name; rename the folder" if row and row["job"] else ""

    # What there is

    def _rows(self) -> list[dict[str, Any]]:
        return self._database.rows("SELECT * FROM adapters ORDER BY name")

    def _row(self, name: str) -> dict[str, Any] | None:
        return self._database.row("SELECT * FROM adapters WHERE name = ?", name)

    def cards(self) -> list[ModelCard]:
        """The base, then every registered adapter that is loaded, then checkpoints."""
        cards = [ModelCard(self.base_id, self._created, None)]
        cards += [ModelCard(row["name"], row["created_at"], self.base_id) for row in self._rows() if row["loaded"]]
        for row in self._database.rows(
            "SELECT jobs.name, checkpoints.step, checkpoints.created_at FROM checkpoints JOIN jobs ON jobs.id = checkpoints.job"
            " ORDER BY checkpoints.number"
        ):
            cards.append(ModelCard(f"{row['name']}:step-{row['step']}", row["created_at"], self.base_id))
        return cards

    def card(self, model: str) -> ModelCard:
        """The card of a model. Raises UnknownModelError."""
        if model in self._base_names:
            return ModelCard(self.base_id, self._created, None)
        for card in self.cards():
            if card.id == model:
                return card
        raise self._unknown(model)

    def _unknown(self, model: str) -> UnknownModelError:
        row = self._row(model)
        if row is not None:
            return UnknownModelError(f"the adapter {model} is not loaded; load it with POST /v1/load_lora_adapter")
        shown = model if len(model) <= 80 else f"{model[:77]}..."
        return UnknownModelError(f"there is no model {shown!r}; GET /v1/models lists the models")

    def folder_of(self, model: str) -> Path | None:
        """The folder of the adapter that a model's name means; None for the base. Raises UnknownModelError."""
        mix = self.mix_of(model)
        if not mix:
            return None
        checkpoint = _CHECKPOINT.fullmatch(model)
        if checkpoint is not None and (job := self._jobs.by_name(checkpoint.group(1))) is not None:
            return self._jobs_folder / str(job["id"]) / "models" / f"step-{checkpoint.group(2)}"
        row = self._row(model)
        return Path(str(row["folder"])) if row is not None else None

    def mix_of(self, model: str) -> Mix:
        """The mix that a model's name means; empty for the base. Raises UnknownModelError."""
        if model in self._base_names:
            return ()
        checkpoint = _CHECKPOINT.fullmatch(model)
        if checkpoint is not None:
            job = self._jobs.by_name(checkpoint.group(1))
            step = int(checkpoint.group(2))
            if job is None or step not in self._jobs.steps_of(job["id"]):
                raise self._unknown(model)
            return ((_engine_name(job["name"], step), 1.0),)
        row = self._row(model)
        if row is None or not row["loaded"]:
            raise self._unknown(model)
        return ((model, 1.0),)

    def mix(self, weights: Mapping[str, float]) -> Mix:
        """A mix of several models by weight. Raises UnknownModelError."""
        found: dict[str, float] = {}
        for model, weight in weights.items():
            for name, one in self.mix_of(model):
                found[name] = found.get(name, 0.0) + one * weight
        return tuple(found.items())

    # Changes

    def load(self, name: str) -> None:
        """Load a registered adapter, or replace it by what its folder holds now.

        Raises:
            UnknownModelError: no adapter of this name is registered or in the folder of adapters.
            VeneerError: it cannot be loaded; one that is loaded goes on being served.
        """
        with self._lock:
            found = self._found()
            in_folder = name in found and not self._name_problem(name)
            row = self._row(name)
            if not in_folder and row is None:
                raise UnknownModelError(f"no adapter {name!r} is registered or in the server's folder of adapters")
            folder = found[name] if in_folder or row is None else Path(row["folder"])
            self._engine.load_adapter(name, folder)  # first, so that a name is listed only if it answers
            if in_folder:
                self._register(name, folder, "folder", None)
            self._set_loaded(name, True)

    def unload(self, name: str) -> None:
        """Refuse new requests for an adapter; running ones end with it. Raises UnknownModelError."""
        with self._lock:
            row = self._row(name)
            if row is None or not row["loaded"]:
                raise UnknownModelError(f"no adapter {name!r} is loaded")
            self._set_loaded(name, False)
            self._engine.unload_adapter(name)

    def delete(self, name: str) -> None:
        """Delete an adapter that a job made, with its files.

        Raises:
            UnknownModelError: there is none of this name.
            ServeError: it is the base, or comes from the folder of adapters.
        """
        with self._lock:
            row = self._row(name)
            if name in self._base_names:
                raise ServeError("the base cannot be deleted")
            if row is None:
                raise self._unknown(name)
            if row["source"] != "job":
                raise ServeError(
                    f"{name} is in the folder of adapters that the server was started with, whose files it does not delete; unload it with "
                    "POST /v1/unload_lora_adapter"
                )
            self._database.run("DELETE FROM adapters WHERE name = ?", name)
            if row["loaded"]:
                self._engine.unload_adapter(name)
            shutil.rmtree(row["folder"], ignore_errors=True)

    # Models of jobs

    def publish(self, name: str, folder: Path, job_id: str, succeed: Callable[[], bool]) -> None:
        """Serve the adapter of a job that has finished training. Called again with the same values after a restart.

        Args:
            name: the model's name.
            folder: the adapter's folder.
            job_id: the job.
            succeed: records that the job has succeeded, in one transaction with the registration; False if it has ended otherwise,
                and the adapter is not served.
        """
        with self._lock:
            self._engine.load_adapter(name, folder)
            served = False
            try:
                with self._database.transaction():
                    served = succeed()
                    if served:
                        self._register(name, folder, "job", job_id)
            finally:
                if not served:
                    self._engine.unload_adapter(name)

    def publish_checkpoint(self, name: str, step: int, folder: Path) -> None:
        """Serve a checkpoint of a job."""
        self._engine.load_adapter(_engine_name(name, step), folder)

    def withdraw_checkpoint(self, name: str, step: int) -> None:
        """Refuse new requests for a checkpoint."""
        if any(status.name == _engine_name(name, step) for status in self._engine.adapters()):
            self._engine.unload_adapter(_engine_name(name, step))

    def _register(self, name: str, folder: Path, source: str, job: str | None) -> None:
        """Insert a registration, or update its folder. A new one is loaded."""
        self._database.run(
            "INSERT INTO adapters (name, folder, source, loaded, created_at, job) VALUES (?, ?, ?, 1, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET folder = excluded.folder",
            name,
            str(folder.resolve()),
            source,
            int(time.time()),
            job,
        )

    def _set_loaded(self, name: str, loaded: bool) -> None:
        self._database.run("UPDATE adapters SET loaded = ? WHERE name = ?", int(loaded), name)


def _engine_name(name: str, step: int) -> str:
    """The name of a checkpoint in the engine; no adapter may have such a name."""
    return f"{name}.step-{step}"


def base_names(name: str) -> set[str]:
    """The names under which requests may ask for a base."""
    return {_base_id(name), name, "base"}


def _base_id(name: str) -> str:
    """The base as it is listed: a hub id or an alias as it is, a folder or file by its last part, so that no path is shown."""
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() else name
