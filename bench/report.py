"""Tables, claims, JSON and a plot of a case's results."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.cases import Case, Claim
from bench.contest import Result

MB = 1e6


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(over: Result, under: Result, of: str = "seconds") -> list[float]:
    """Ratios per round for seconds; one ratio for memory."""
    if of == "memory":
        return [over.memory / under.memory]
    return [a / b for a, b in zip(over.seconds, under.seconds, strict=True)]


def facts(case: Case, results: list[Result], *, steps: Any, checks: int, machine: dict[str, Any]) -> dict[str, Any]:
    """All results of a case, for JSON."""
    rounds = len(results[0].seconds)
    seen = [steps[(checks + i) % len(steps)] for i in range(rounds)]
    tokens = sum(len(row["ids"]) for step in seen for row in step)
    trained = sum(sum(1 for w in row["weights"] if w) for step in seen for row in step)
    by_name = {result.contestant.name: result for result in results}
    return {
        "case": case.name,
        "workload": asdict(case.workload),
        "machine": machine,
        "rounds": rounds,
        "tokens_per_step": tokens / rounds,
        "trained_per_step": trained / rounds,
        "contestants": {
            name: {
                **asdict(one.contestant),
                "losses": one.losses,
                "memory": one.memory,
                "each": one.seconds,
                "seconds": spread(one.seconds),
                "beside_first": spread(ratios(one, results[0])),
                "tokens_per_second": tokens / sum(one.seconds),
                "trained_per_second": trained / sum(one.seconds),
                **one.more,
            }
            for name, one in by_name.items()
        },
        "claims": [verdict(claim, by_name) for claim in case.claims if {claim.over, claim.under} <= set(by_name)],
    }


def verdict(claim: Claim, by_name: dict[str, Result]) -> dict[str, Any]:
    """A claim with its measured ratio; it holds if the median does."""
    found = spread(ratios(by_name[claim.over], by_name[claim.under], claim.of))
    met = found["median"] >= claim.bound if claim.least else found["median"] <= claim.bound
    return {"claim": str(claim), "found": found, "met": met}


def table(found: dict[str, Any]) -> str:
    """The results of a case as Markdown."""
    load = found["workload"]
    shape = f"{load['batch']} x {load['length']}" if load["rows"] == "uniform" else f"{load['batch']} ragged rows"
    lines = [
        f"**{found['case']}**: {load['base']}, {shape}; {found['tokens_per_step']:.0f} tokens per step, "
        f"{found['trained_per_step']:.0f} trained; {found['rounds']} rounds",
        "",
        f"| | s per step: median (min to max) | / {next(iter(found['contestants']))}'s time | tokens/s | trained/s | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found["contestants"].items():
        s, r = one["seconds"], one["beside_first"]
        floor = one["engine"] == "gemms"
        lines.append(
            f"| {name} | {s['median']:.3f} ({s['min']:.3f} to {s['max']:.3f}) | "
            f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f}) | {one['tokens_per_second']:.0f} | "
            f"{one['trained_per_second']:.0f} | {'' if floor else format(one['memory'] / MB, '.0f')} |"
        )
    lines.append("")
    for claim in found["claims"]:
        f = claim["found"]
        met = "met" if claim["met"] else "NOT MET"
        lines.append(f"- {claim['claim']}: {f['median']:.2f} ({f['min']:.2f} to {f['max']:.2f}), {met}")
    floor = next((one for one in found["contestants"].values() if "flops" in one), None)
    if floor is not None:
        rate = floor["products"] / floor["seconds"]["median"] / 1e9
        lines.append(f"- products at {rate:.0f} GFLOP/s")
        lines += _beside_full(found, floor["flops"] / floor["flops_full"])
    return "\n".join(lines) + "\n"


def _beside_full(found: dict[str, Any], theory: float) -> list[str]:
    """An adapter's step / full fine-tuning's, compared with the ratio of their FLOPs (attention included)."""
    who, lines = found["contestants"], []
    for one, other in (("veneer", "full-same"), ("peft", "full")):
        if one in who and other in who:
            each = [a / b for a, b in zip(who[one]["each"], who[other]["each"], strict=True)]
            s = spread(each)
            lines.append(
                f"- {one} / {other}: {s['median']:.3f} ({s['min']:.3f} to {s['max']:.3f}); FLOPs {theory:.3f}; "
                f"{s['median'] / theory - 1:+.1%}"
            )
    return lines


def machine(threads: int, peers: dict[str, str]) -> dict[str, Any]:
    """Hardware and versions that the results depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return {
        "processor": cpu,
        "bf16": [name for name in ("avx512_bf16", "amx_bf16") if name in flags],
        "threads": threads,
        "python": platform.python_version(),
        "veneer_side": {name: metadata.version(name) for name in ("torch", "transformers")},
        "peers_side": peers,
    }


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Plot each contestant's time relative to the first, per case, with the spread over rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(cases), 1, figsize=(8, 0.6 + sum(0.5 + 0.35 * len(c["contestants"]) for c in cases)),
                                   squeeze=False, gridspec_kw={"height_ratios": [1 + len(c["contestants"]) for c in cases]})  # fmt: skip
    for axis, found in zip(axes[:, 0], cases, strict=True):
        names = list(found["contestants"])
        seen = [found["contestants"][name]["beside_first"] for name in names]
        middle = [one["median"] for one in seen]
        errors = [[m - one["min"] for m, one in zip(middle, seen, strict=True)],
                  [one["max"] - m for m, one in zip(middle, seen, strict=True)]]  # fmt: skip
        axis.barh(names, middle, xerr=errors, color="#4878a8", ecolor="#333333", height=0.6)
        axis.invert_yaxis()
        axis.axvline(1.0, color="#333333", linewidth=0.8)
        axis.set_title(f"{found['case']}: time of a step, {names[0]} = 1", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
