"""Stages in processes of their own, each with a time limit: what one of them does, a crash too, costs the others nothing.

A stage is a function ``run(setting)`` that yields rows, dictionaries with ``what``, ``value`` and ``unit``, and for a check ``bound`` and
``ok``. Rows are written to ``STAGE.json`` as they come, so that a stage that is ended leaves what it found. This file imports no torch:
the process that supervises must not open the device.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A stage: its name, the module that has its ``run``, and its limit in seconds."""

    name: str
    module: str
    seconds: float


@dataclass(frozen=True)
class Setting:
    """The circumstances of a stage. device: as torch names it. tiny: the smallest sizes. seconds: the limit. out: folder of all results."""

    device: str
    tiny: bool
    seconds: float
    out: Path

    def result_of(self, stage: str) -> dict[str, Any]:
        """What another stage wrote; {} if there is none."""
        path = self.out / f"{stage}.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def context() -> BaseContext:
    """Processes that are forked from one that has imported everything and opened no device."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["bench.device.preload"])
    return found


def supervise(stage: Stage, setting: Setting, processes: BaseContext) -> dict[str, Any]:
    """Run a stage until it ends or its time is over; returns what it left in ``STAGE.json``."""
    path = setting.out / f"{stage.name}.json"
    _write(path, "running", [], 0.0)
    began = time.monotonic()
    process: Any = processes.Process(target=_work, args=(stage.module, setting, path))  # type: ignore[attr-defined]
    process.start()
    process.join(setting.seconds)
    over = process.is_alive()
    if over:
        process.kill()
        process.join()
    found = dict(json.loads(path.read_text(encoding="utf-8")))
    if found["state"] == "running":
        why = f"over its limit of {setting.seconds:g} s" if over else f"ended by itself with code {process.exitcode}"
        _write(path, "stopped", found["rows"], time.monotonic() - began, why)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _work(module: str, setting: Setting, path: Path) -> None:
    """The process of a stage."""
    began, rows = time.monotonic(), list[Row]()
    try:
        for row in importlib.import_module(module).run(setting):
            rows.append(row)
            _write(path, "running", rows, time.monotonic() - began)
    except BaseException as error:
        traceback.print_exc()
        _write(path, "failed", rows, time.monotonic() - began, f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    _write(path, "done", rows, time.monotonic() - began)


def _write(path: Path, state: str, rows: Sequence[Row], seconds: float, error: str = "") -> None:
    content = {"state": state, "seconds": round(seconds, 2), "error": error, "rows": rows}
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def check(what: str, value: float, bound: float, unit: str = "") -> Row:
    """A row whose value must not exceed a bound."""
    return {"what": what, "value": value, "unit": unit, "bound": bound, "ok": bool(value <= bound)}


def figure(what: str, value: Any, unit: str = "", **more: Any) -> Row:
    """A row that is reported and not judged."""
    return {"what": what, "value": value, "unit": unit, **more}


def sound(results: Mapping[str, Mapping[str, Any]]) -> bool:
    """True if every stage ended by itself and every check holds."""
    return all(one["state"] == "done" and all(row.get("ok", True) for row in one["rows"]) for one in results.values())


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows as a table in Markdown; a stage that did not end by itself has a row that says so."""
    lines = ["| stage | what | value | bound | |", "|---|---|---|---|---|"]
    for name, one in results.items():
        for row in one["rows"]:
            verdict = {True: "ok", False: "**too large**", None: ""}[row.get("ok")]
            unit = f" {row['unit']}" if row["unit"] else ""
            lines.append(
                f"| {name} | {row['what']} | {_text(row['value'])}{unit} | {_text(row.get('bound'))} | {verdict} |"
            )
        if one["state"] != "done":
            lines.append(
                f"| {name} | {one['state']} after {one['seconds']:.0f} s | {one['error'][:200]} | | **{one['state']}** |"
            )
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:,.3f}".rstrip("0").rstrip(".")


def chosen(stages: Iterable[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages with these names, all if there are none."""
    return [stage for stage in stages if not names or stage.name in names]
