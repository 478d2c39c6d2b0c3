"""``veneer compose A:0.5 B:0.5 --op sum --out DIR``: combine adapters into one and report its error."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer._terminal import status
from veneer.cli._output import as_json, difference_from, percent, print_lines, table
from veneer.cli._parents import base_of, checked_base, needs_base_weights, parse_mix
from veneer.cli._parser import add_device, add_force, add_json, add_sites, at_least
from veneer.errors import ComposeError, ConfigError, listed

if TYPE_CHECKING:
    from veneer.compose.combine import Composition
    from veneer.deltas.delta import Weights
    from veneer.deltas.parents import Parent

_OPERATIONS = {
    "sum": "weighted sum of the changes, exact; negative weights subtract",
    "ties": "trim small elements, elect signs, average the agreeing elements (TIES)",
    "dare": "drop random elements, rescale, sum (DARE)",
    "iso-c": "sum with equal singular values (Iso-C)",
    "outside": "the part of the first change outside the spans of the others",
    "peft_linear": "PEFT's sum of the factors, which is not the sum of the changes",
}
_SHOWN = 8
"""Number of parents printed; the receipt names all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "adapter", nargs="+", metavar="ADAPTER", help="adapters with weights: a:0.5 b:0.5, or a:0.5,b:0.5"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the new adapter")
    parser.add_argument("--name", metavar="NAME", help="name of the new adapter (default: the name of its folder)")
    parser.add_argument(
        "--op",
        choices=tuple(_OPERATIONS),
        default="sum",
        help="; ".join(f"{name}: {text}" for name, text in _OPERATIONS.items()),
    )
    parser.add_argument("--base", metavar="MODEL", help="base model (default: the one named in the adapter folders)")
    parser.add_argument("--rank", type=at_least(1), metavar="R", help="truncate to this rank (default: exact)")
    parser.add_argument(
        "--energy", type=float, metavar="X", help="truncate to the lowest rank per site that keeps this fraction"
    )
    parser.add_argument(
        "--form",
        choices=("auto", "lora", "dora"),
        default="auto",
        help="method of the result (default: auto, DoRA if a parent of a sum is DoRA)",
    )
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="scale the result by X (default: 1)")
    parser.add_argument(
        "--density", type=float, default=0.2, metavar="X", help="ties: fraction of elements to keep (default: 0.2)"
    )
    parser.add_argument("--drop", type=float, default=0.9, metavar="P", help="dare: drop probability (default: 0.9)")
    parser.add_argument(
        "--side", choices=("both", "out", "in"), default="both", help="outside: sides to project (default: both)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="dare: random seed (default: 0)")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="held-out examples: print the losses of the parents, their average and the result",
    )
    parser.add_argument("--search", action="store_true", help="sum: search the weights with the lowest loss on --data")
    parser.add_argument(
        "--budget", type=at_least(1), default=40, metavar="N", help="evaluations that --search may use (default: 40)"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="use only the first N examples of --data")
    add_device(parser, "device on which --data is evaluated")
    add_force(parser)
    add_sites(parser, "least accurate")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compose the adapters, write the result and report its error."""
    if args.search and (not args.data or args.op != "sum"):
        raise ConfigError("--search finds the weights of a sum; it needs --data FILE and --op sum")
    from veneer.checkpoints import write_adapter
    from veneer.checkpoints.model_folder import check_free
    from veneer.compose.combine import combine
    from veneer.compose.ops import OperationSettings
    from veneer.deltas.parents import Parent, base_name, read_parents

    check_free(args.out)
    parents = read_parents(parse_mix(args.adapter), force=args.force)
    if args.search and any(parent.weight != 1 for parent in parents):
        raise ConfigError("--search finds the weights; give the adapters without weights")
    weights = _weights(args, parents)
    evaluator = _MixEvaluator(args, base_of(parents, args.base), parents) if args.data else None
    searched = status("searching weights")(evaluator.search)(args.budget) if evaluator and args.search else None
    if searched is not None:
        parents = [Parent(p.adapter, w) for p, w in zip(parents, searched["weights"], strict=True) if w]
        if not parents:
            raise ComposeError(
                f"no mix has a lower loss on these examples than the base ({searched['loss']:.4f}); nothing was written"
            )
    composition = status("composing")(combine)(
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
    losses = status("evaluating")(evaluator.losses)(composition) if evaluator else {}
    write_adapter(
        composition.adapter,
        args.out,
        base_name=args.base or base_name(p.adapter for p in parents),
        task_type=_task_type(parents),
        receipt=composition.receipt(),
        template=composition.template,
    )
    report = {**composition.as_dict(), "out": str(args.out), "losses": losses, "search": searched}
    if args.json:
        print(as_json(report))
    else:
        print_lines(_lines(composition, report, args.sites))
    return 0


def _weights(args: argparse.Namespace, parents: Sequence[Parent]) -> Weights | None:
    """Return the base weights, checked against the parents, or None if no base is needed."""
    if args.base is None and not needs_base_weights(parents) and args.form != "dora":
        return None
    return checked_base(parents, args.base, args.force)[1].weight_2d


def _task_type(parents: Sequence[Parent]) -> str | None:
    tasks = {(parent.adapter.meta.get("settings") or {}).get("task_type") for parent in parents}
    task = tasks.pop() if len(tasks) == 1 else None
    return task if isinstance(task, str) else None


class _MixEvaluator:
    """Computes held-out losses of mixes. Each mix is a route, so it need not be composed first."""

    def __init__(self, args: argparse.Namespace, base: str, parents: Sequence[Parent]) -> None:
        from veneer.adapters import attach
        from veneer.data.chat.render import Renderer, RenderOptions
        from veneer.data.dataset import load_examples
        from veneer.deltas.parents import copy_as
        from veneer.models.flat import FlatRunner
        from veneer.models.load import load_base

        # In bfloat16, rounding is as large as the differences between mixes.
        loaded = load_base(base, dtype="float32", device=args.device)
        renderer = Renderer(loaded.tokenizer, RenderOptions())
        self.examples = load_examples([args.data], renderer, truncate="end")[0][: args.limit]
        self.bank, self.runner = attach(loaded.model), FlatRunner(loaded.model)
        self.parents = list(parents)
        self.names = [f"parent-{number}" for number in range(len(parents))]
        for name, parent in zip(self.names, parents, strict=True):
            self.bank.insert(copy_as(parent.adapter, name))

    def loss(self, route: Any) -> float:
        """Return the mean held-out loss under a route."""
        from veneer.evaluate.losses import example_losses

        return example_losses(self.runner, self.examples, bank=self.bank, route=route).mean

    def search(self, budget: int) -> dict[str, Any]:
        """Return the weights with the lowest loss, and all mixes that were evaluated."""
        from veneer.compose.search import search_weights

        found = search_weights(lambda weights: self.loss(self._mix(weights)), len(self.names), budget=budget)
        tried = [{"weights": list(weights), "loss": loss} for weights, loss in found.tried]
        return {"weights": list(found.weights), "loss": found.score, "tried": tried}

    def losses(self, composition: Composition) -> dict[str, float]:
        """Return the losses of the base, each parent, their average and the result."""
        from veneer.deltas.parents import copy_as

        self.bank.insert(copy_as(composition.adapter, "result"))
        found = {"base": self.loss(None)}
        for number, (name, parent) in enumerate(zip(self.names, self.parents, strict=True), 1):
            label = parent.adapter.name
            found[f"{label} ({number})" if label in (*found, "average", "result") else label] = self.loss(name)
        found["average"] = self.loss(self._mix([1 / len(self.names)] * len(self.names)))
        found["result"] = self.loss("result")
        return found

    def _mix(self, weights: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.names, weights, strict=True))


def _lines(composition: Composition, report: dict[str, Any], count: int) -> list[str]:
    each = [f"{p['name']} x {p['weight']:g}" for p in composition.origin["parents"]]
    parents = listed(each, _SHOWN, " + ")
    adapter = composition.adapter
    lines = []
    if report["search"] is not None:
        lines.append(f"evaluated {len(report['search']['tried'])} mixes; lowest loss {report['search']['loss']:.4f}")
    ranks = sorted({site.rank for site in composition.sites})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines.append(
        f"{composition.operation} of {parents}: a {adapter.method.label} adapter of rank {span} at "
        f"{len(composition.sites)} sites, {adapter.num_parameters():,} parameters, in {report['out']}"
    )
    lines.append(f"it {difference_from('the exact change', composition.error)}")
    if composition.error > 1e-5:
        rows = [
            [s.site, str(s.rank), f"{s.norm:.3g}", percent(s.error)]
            for s in nlargest(count, composition.sites, key=lambda site: site.error)
        ]
        lines += ["", *table(["least accurate sites", "rank", "norm of the change", "error"], rows), ""]
    if report["losses"]:
        lines += table(["held-out loss", ""], [[name, f"{loss:.4f}"] for name, loss in report["losses"].items()])
    return [*lines, *composition.notes, f"try it with: veneer chat {report['out']}"]
