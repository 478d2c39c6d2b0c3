"""What can be remarkable about a rendered row without making it unusable, in the words that users read."""

from __future__ import annotations

__all__ = ["NOTES"]

NOTES = {
    "split": "the template shows earlier turns in another form than the model writes them, so the conversation became "
    "several examples, each with its turns in the form in which they are written",
    "opening_differs": "the template opens the assistant's turn with more than finished turns begin with (such as "
    "<think>), so the model is trained in a form that this opening does not ask for",
    "behind_prompt": "the template shows what stands before the answer in another form than it asks with; the row is "
    "trained in the form that asks",
    "no_end_token": "nothing marks the end of the answer, so the model does not learn to stop",
    "unmarked": "the template has generation marks, but none in this turn; the whole turn is trained",
    "boundary_cut": "prompt and answer were encoded apart, since one token would have covered parts of both",
}
"""Keys are those of ``Rendered.notes``."""
