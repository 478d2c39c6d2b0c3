"""``veneer compose A:0.5 B:0.5 --op sum --out DIR``: one adapter from several, and how exactly it is what was asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli._json import as_json
from veneer.cli._mix import base_of, parse_mix
from veneer.errors import ComposeError, ConfigError

if TYPE_CHECKING:
    from veneer.compose.combine import Composition
    from veneer.deltas.delta import Weights
    from veneer.deltas.parents import Parent

_OPERATIONS = {
    "sum": "the weighted sum of the changes, exact (negative weights take away)",
    "ties": "trim, elect signs, average who agrees",
    "dare": "drop elements at random, rescale, add",
    "iso-c": "the sum with equal singular values",
    "outside": "what of the first lies outside the others",
    "peft_linear": "PEFT's sum of factors, which is not the sum of the changes",
}
_SHOWN = 8
"""Parents that are named on the screen; the receipt names them all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "adapter", nargs="+", metavar="ADAPTER", help="folders with weights: a:0.5 b:0.5, or a:0.5,b:0.5"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new adapter's folder")
    parser.add_argument("--name", metavar="NAME", help="the new adapter's name (default: the folder's)")
    parser.add_argument(
        "--op",
        choices=tuple(_OPERATIONS),
        default="sum",
        help="; ".join(f"{name}: {text}" for name, text in _OPERATIONS.items()),
    )
    parser.add_argument("--base", metavar="MODEL", help="the base; needed where DoRA takes part, and for --data")
    parser.add_argument("--rank", type=int, metavar="R", help="cut to this rank (default: what the sum has)")
    parser.add_argument(
        "--energy", type=float, metavar="X", help="cut to the least rank that keeps this share, site by site"
    )
    parser.add_argument(
        "--form", choices=("auto", "lora", "dora"), default="auto", help="auto: DoRA where DoRA takes part in a sum"
    )
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="factor on the result (default 1)")
    parser.add_argument(
        "--density", type=float, default=0.2, metavar="X", help="ties: share of elements kept (default 0.2)"
    )
    parser.add_argument(
        "--drop", type=float, default=0.9, metavar="P", help="dare: probability of dropping (default 0.9)"
    )
    parser.add_argument("--side", choices=("both", "out", "in"), default="both", help="outside: which sides to project")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="dare: of the draw (default 0)")
    parser.add_argument(
        "--data", metavar="FILE", help="held-out examples: print the loss of parents, average and result"
    )
    parser.add_argument("--search", action="store_true", help="sum: find the weights with the lowest loss on --data")
    parser.add_argument("--budget", type=int, default=40, metavar="N", help="mixes that --search tries (default 40)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples of --data")
    parser.add_argument("--force", action="append", default=[], metavar="WHAT", help="override a check, such as base")
    parser.add_argument(
        "--sites", type=int, default=5, metavar="N", help="how many of the worst sites to show (default 5)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Compose, write, and say how exact it is."""
    _check(args)
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.model_folder import check_free
    from veneer.compose.combine import combine
    from veneer.compose.ops import OperationSettings
    from veneer.deltas.parents import Parent, base_name, read_parents

    check_free(args.out)
    parents = read_parents(parse_mix(args.adapter), force=args.force)
    if args.search and any(parent.weight != 1 for parent in parents):
        raise ConfigError("--search finds the weights itself; give the adapters without any")
    weights = _weights(args, parents)
    judge = _Judge(args, base_of(parents, args.base), parents) if args.data else None
    searched = judge.search(args.budget) if judge and args.search else None
    if searched is not None:
        parents = [Parent(p.adapter, w) for p, w in zip(parents, searched["weights"], strict=True) if w]
        if not parents:
            raise ComposeError(
                f"on these examples no mix of the adapters is better than the base alone (loss {searched['loss']:.4f}); nothing was written"
            )
    composition = combine(
        args.op,
        parents,
        name=args.name or args.out.resolve().name,
        weights=weights,
        rank=args.rank,
        energy=args.energy,
        form=args.form,
        settings=OperationSettings(args.scale, args.density, args.drop, args.side, args.seed),
        any_base="base" in args.force,
    )
    losses = judge.losses(composition) if judge else {}
    write_adapter(
        composition.adapter,
        args.out,
        base_name=args.base or base_name(p.adapter for p in parents),
        task_type=_task(parents),
        receipt=composition.receipt(),
        template=composition.template,
    )
    report = {**composition.as_dict(), "out": str(args.out), "losses": losses, "search": searched}
    print(as_json(report) if args.json else "\n".join(_lines(composition, report, args.sites)))
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.search and (not args.data or args.op != "sum"):
        raise ConfigError("--search finds the weights of a sum on data; give --data FILE, and no other --op than sum")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit: expected 1 or more, found {args.limit}")
    if args.rank is not None and args.rank < 1:
        raise ConfigError(f"--rank: expected 1 or more, found {args.rank}")


def _weights(args: argparse.Namespace, parents: Sequence[Parent]) -> Weights | None:
    """The base's weights, checked against the parents; None where no base is needed."""
    gains = any(parent.adapter.method.needs_base_weights for parent in parents)
    if args.base is None and not gains and args.form != "dora":
        return None
    from veneer.checkpoints.base_files import base_folder, fit, skeleton
    from veneer.deltas.parents import check_base

    name = base_of(parents, args.base)
    base = skeleton(base_folder(name))
    for adapter in {id(parent.adapter): parent.adapter for parent in parents}.values():
        fit(adapter, base)
        if "base" not in args.force:
            check_base(adapter, base.weight_2d, name)
    return base.weight_2d


def _task(parents: Sequence[Parent]) -> str | None:
    tasks = {(parent.adapter.meta.get("settings") or {}).get("task_type") for parent in parents}
    task = tasks.pop() if len(tasks) == 1 else None
    return task if isinstance(task, str) else None


class _Judge:
    """Held-out losses of mixes, each of them a route: nothing has to be composed to be judged."""

    def __init__(self, args: argparse.Namespace, base: str, parents: Sequence[Parent]) -> None:
        from veneer.adapters import attach
        from veneer.data.chat.render import Renderer, RenderOptions
        from veneer.data.dataset import load_examples
        from veneer.deltas.parents import copy_as
        from veneer.models.flat import FlatRunner
        from veneer.models.load import load_base

        # In bf16 the rounding of a forward is as large as what mixes differ by.
        loaded = load_base(base, dtype="float32")
        renderer = Renderer(loaded.tokenizer, RenderOptions())
        self.examples = load_examples([args.data], renderer, truncate="end")[0][: args.limit]
        self.bank, self.runner = attach(loaded.model), FlatRunner(loaded.model)
        self.parents = list(parents)
        self.names = [f"parent-{number}" for number in range(len(parents))]
        for name, parent in zip(self.names, parents, strict=True):
            self.bank.insert(copy_as(parent.adapter, name))

    def loss(self, route: Any) -> float:
        """Mean held-out loss under a route."""
        from veneer.evaluate.losses import example_losses

        return example_losses(self.runner, self.examples, bank=self.bank, route=route).mean

    def search(self, budget: int) -> dict[str, Any]:
        """The weights with the lowest loss, and what was tried."""
        from veneer.compose.search import search_weights

        found = search_weights(lambda weights: self.loss(self._mix(weights)), len(self.names), budget=budget)
        tried = [{"weights": list(weights), "loss": loss} for weights, loss in found.tried]
        return {"weights": list(found.weights), "loss": found.score, "tried": tried}

    def losses(self, composition: Composition) -> dict[str, float]:
        """Base, each parent alone, their average, and the result."""
        from veneer.deltas.parents import copy_as

        self.bank.insert(copy_as(composition.adapter, "result"))
        found = {"base": self.loss(None)}
        for number, (name, parent) in enumerate(zip(self.names, self.parents, strict=True), 1):
            own = parent.adapter.name
            found[f"{own} ({number})" if own in (*found, "average", "result") else own] = self.loss(name)
        found["average"] = self.loss(self._mix([1 / len(self.names)] * len(self.names)))
        found["result"] = self.loss("result")
        return found

    def _mix(self, weights: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.names, weights, strict=True))


def _lines(composition: Composition, report: dict[str, Any], count: int) -> list[str]:
    from veneer.cli._table import percent, table

    each = [f"{p['name']} x {p['weight']:g}" for p in composition.origin["parents"]]
    more = f" and {len(each) - _SHOWN} more" if len(each) > _SHOWN else ""
    parents = " + ".join(each[:_SHOWN]) + more
    adapter = composition.adapter
    lines = []
    if report["search"] is not None:
        lines.append(
            f"searched {len(report['search']['tried'])} mixes; the best has loss {report['search']['loss']:.4f}"
        )
    ranks = sorted({site.rank for site in composition.sites})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines.append(
        f"{composition.operation} of {parents}: a {adapter.method.label} adapter of rank {span} at "
        f"{len(composition.sites)} sites, {adapter.num_parameters():,} parameters, in {report['out']}"
    )
    lines.append(f"it differs from the exact change by {percent(composition.error)}")
    if composition.error > 1e-5:
        rows = [[s.site, str(s.rank), f"{s.norm:.3g}", percent(s.error)] for s in composition.worst(count)]
        lines += ["", *table(["worst sites", "rank", "change", "error"], rows), ""]
    if report["losses"]:
        lines += table(["held-out loss", ""], [[name, f"{loss:.4f}"] for name, loss in report["losses"].items()])
    return lines + composition.notes
