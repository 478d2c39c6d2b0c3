"""Problems and notes found while a folder is read.

A refusal may carry the name of its check. If ``force`` names the check, the refusal becomes a note, so that what was overridden stays on
record. All refusals of a file are raised as one error.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from veneer import errors
from veneer.errors import CheckpointError, Problems

CHECKS: dict[str, str] = {
    "base": "load although the base's weights are not those that the adapter was trained on",
    "receipt": "load although the receipt does not agree with the tensors or the settings",
    "config": "load although the settings disagree with the tensors, or hold what is not known",
    "scale": "load although the change is scaled beyond what training yields",
    "embeddings": "take full embedding or head weights that the settings do not declare as the adapter's own",
}


class Findings:
    """Gathers refusals and notes about one folder."""

    def __init__(self, force: str | Iterable[str] = ()) -> None:
        self.force = frozenset([force] if isinstance(force, str) else force)
        self.problems = Problems()
        self.notes: list[str] = []
        unknown = sorted(map(str, self.force - set(CHECKS)))
        if unknown:
            known = "; ".join(f'"{name}": {text}' for name, text in CHECKS.items())
            raise CheckpointError(f"force names what is not known: {', '.join(unknown)}; it can name {known}")

    def refuse(self, text: str, check: str | None = None) -> None:
        """Note a reason not to load; a ``check`` that ``force`` names makes it a note instead."""
        if check is None:
            self.problems.add(text)
        elif check in self.force:
            self.note(f'overridden by force="{check}": {text}')
        else:
            self.problems.add(f'{text} (force="{check}", or --force {check}, overrides this)')

    def note(self, text: str) -> None:
        """Something to know that is not a reason to refuse; said once."""
        if text not in self.notes:
            self.notes.append(text)

    def raise_if_any(self, headline: str) -> None:
        """Raise all refusals so far as one CheckpointError."""
        self.problems.raise_if_any(CheckpointError, headline)


def shown(text: object, limit: int = 120) -> str:
    """Text from a file as it can stand in a message: control, bidirectional and other unprintable characters escaped, cut in length."""
    raw = str(text)
    cut = raw[:limit]
    safe = "".join(c if c.isprintable() and unicodedata.category(c) != "Cf" else ascii(c)[1:-1] for c in cut)
    return safe + ("..." if len(raw) > limit else "")


def listed(names: Iterable[object], limit: int = 4) -> str:
    """A few names and the count of the rest."""
    return errors.listed(map(shown, names), limit)
