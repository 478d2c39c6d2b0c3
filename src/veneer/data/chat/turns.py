"""Positions of the assistant's turns in a rendered conversation, to the character.

The turn of message i is the text that a model must generate for message i: everything that the template renders after
the prompt for it, up to and including the end token.

    prompt   = template(messages[:i], with the generation prompt)
    finished = template(messages[:i+1])
    turn     = finished[len(prompt):]          if finished starts with prompt; ends after the end token

If the template marks generated text itself (``{% generation %}``), only the marked text inside the turn is trained.
Three kinds of templates need more:

* An earlier turn is rendered differently once later turns follow (Qwen3 drops the reasoning of earlier turns). One text
  cannot hold all turns as generated, so the conversation becomes several texts, as few as possible.
* The generation prompt opens the turn with more than the finished turn begins with (DeepSeek-R1 opens with
  ``<think>``). The turn then begins after the header that both share.
* Text before the answer is rendered differently once the answer follows (Mistral's system prompt). The turn is then
  placed after its prompt, which is the text that the model sees at inference.

This module works on characters. ``render.py`` verifies that tokens respect the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.data.chat.template import Conversation, Template, TemplateError
from veneer.data.encode import Encoder, GuardedText

__all__ = ["Draft", "Turn", "TurnFinder"]

_PROBE = "Veneerprobe"


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant's turn in a text.

    Attributes:
        message: index of the message in the conversation.
        text: the text that contains the turn.
        start, end: its characters, from after the generation prompt to after the end token.
        spans: the trained characters, usually all.
        notes: keys of ``rendered.NOTES``.
        alone: True if the text before the turn is its prompt, which starts no other text.
    """

    message: int
    text: GuardedText
    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Draft:
    """A text to be encoded, with the characters to train."""

    text: GuardedText
    spans: tuple[tuple[int, int], ...]
    turns: tuple[Turn, ...] = ()
    notes: tuple[str, ...] = ()
    answer: str = ""


class TurnFinder:
    """Finds turns with one template and one tokenizer.

    Attributes:
        opening: the template's generation prompt, "" if it has none.
        end_tokens: the control tokens right after a plain answer: that of the last message, then that of earlier messages if it
            differs. Empty if the template writes none.
    """

    def __init__(self, template: Template, encoder: Encoder) -> None:
        self.template = template
        self.encoder = encoder
        self.opening = ""
        self.end_tokens: tuple[str, ...] = ()
        self._header = ""  # what the generation prompt and a finished turn both begin with
        self._learn()

    def drafts(self, conversation: Conversation, trained: Sequence[int]) -> list[Draft]:
        """Render the texts that train the given messages; one text if the template allows it.

        Raises:
            TemplateError: the template refuses the conversation, or a turn cannot be found exactly.
        """
        whole = conversation.text()
        if not trained:
            return [Draft(whole, ())]
        turns = [self._turn(conversation, i, whole) for i in trained]
        return _grouped(whole, turns)

    def _turn(self, conversation: Conversation, i: int, whole: GuardedText) -> Turn:
        finished = whole if i == len(conversation.messages) - 1 else conversation.text(i + 1)
        try:
            prompt = conversation.text(i, prompt=True)
        except TemplateError as error:
            return self._turn_from(conversation, i, finished, self._behind_opening(finished, i, error))
        if finished.text.startswith(prompt.text):
            return self._turn_from(conversation, i, finished, len(prompt.text))
        closed = conversation.text(i)
        if finished.text.startswith(closed.text):
            start = len(closed.text) + len(self._header)
            if not (self._header and finished.text.startswith(self._header, len(closed.text))):
                shared = _common_prefix(finished.text, prompt.text)
                start = self._last_control(finished, len(closed.text), shared)
            return self._turn_from(conversation, i, finished, start, "opening_differs")
        return self._behind_prompt(conversation, i, finished, prompt)

    def _turn_from(self, conversation: Conversation, i: int, finished: GuardedText, start: int, *notes: str) -> Turn:
        end, end_token = self._end(finished, start)
        if not end_token:
            notes = (*notes, "no_end_token")
        spans: tuple[tuple[int, int], ...] = ((start, end),)
        if self.template.marks:
            marked = [(max(a, start), min(b, end)) for a, b in conversation.generated(i + 1) if b > start and a < end]
            if marked:
                spans = _up_to_end(finished.text, marked, end, end_token)
            else:
                notes = (*notes, "unmarked")
        return Turn(i, finished, start, end, spans, notes)

    def _behind_opening(self, finished: GuardedText, i: int, error: TemplateError) -> int:
        """The start of a turn whose prompt the template cannot render, such as that of a first message."""
        if not self.opening or finished.text.count(self.opening) != 1:
            raise TemplateError(
                f"the chat template cannot render the prompt of the assistant's turn (message {i}: {error}), so the "
                "beginning of the turn is unknown; start the conversation with a user message, or set the turn's weight "
                "to 0"
            ) from error
        return finished.text.index(self.opening) + len(self.opening)

    def _behind_prompt(self, conversation: Conversation, i: int, finished: GuardedText, prompt: GuardedText) -> Turn:
        """Place the turn after its prompt, for templates that render earlier text differently in finished conversations."""
        anchor = prompt.text[self._last_control(prompt, 0, len(prompt.text), begin=True) :]
        at = finished.text.rfind(anchor) if len(anchor) < len(prompt.text) else -1
        while at >= 0 and _guarded(finished, at):
            at = finished.text.rfind(anchor, 0, at)
        if at < 0:
            raise TemplateError(
                f"the chat template renders the text before the assistant's turn (message {i}) differently in the prompt "
                "and in the finished conversation, so the turn cannot be located exactly; set its weight to 0, or use "
                "another chat template"
            )
        turn = self._turn_from(conversation, i, finished, at + len(anchor))
        shift = len(prompt.text) - turn.start
        behind = tuple((a + shift, b + shift) for a, b in finished.guards if a >= turn.start)
        text = GuardedText(prompt.text + finished.text[turn.start :], (*prompt.guards, *behind))
        spans = tuple((a + shift, b + shift) for a, b in turn.spans)
        return Turn(i, text, turn.start + shift, turn.end + shift, spans, (*turn.notes, "behind_prompt"), alone=True)

    def _end(self, finished: GuardedText, start: int) -> tuple[int, str]:
        """The end of the turn that begins at ``start``, the last in its text, and the control token that marks it ("": none)."""
        known = self.encoder.specials.union(self.end_tokens)
        ends = [
            (m.group(), m.end())
            for m in self.encoder.control_pattern.finditer(finished.text, start)
            if m.group() in known and not _guarded(finished, m.start())
        ]
        for token in self.end_tokens:
            place = next((end for found, end in reversed(ends) if found == token), None)
            # A turn may hold messages that end alike, and close with another token, such as that of a tool call.
            if place is not None and not self.encoder.control_pattern.sub("", finished.text[place:]).strip():
                return place, token
        return (ends[-1][1], ends[-1][0]) if ends else (len(finished.text), "")

    def _last_control(self, text: GuardedText, a: int, b: int, *, begin: bool = False) -> int:
        """The end (or begin) of the template's last control token in [a, b); ``a`` if there is none."""
        found = a
        for match in self.encoder.control_pattern.finditer(text.text, a, b):
            if not _guarded(text, match.start()):
                found = match.start() if begin else match.end()
        return found

    def _learn(self) -> None:
        """Find the generation prompt and the end token with a small conversation, unless the template refuses it."""
        probe = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            closed = self.template.render(probe[:1])
            opened = self.template.render(probe[:1], prompt=True)
            whole = self.template.render([*probe, *probe])
        except TemplateError:
            return
        if opened.startswith(closed):
            self.opening = opened[len(closed) :]
            answered = self.template.render(probe)
            if answered.startswith(closed):
                self._header = self.opening[: _common_prefix(self.opening, answered[len(closed) :])]
        places = [whole.find(_PROBE)]
        while places[-1] >= 0:
            places.append(whole.find(_PROBE, places[-1] + 1))
        if len(places) != 5:
            return
        after = (whole[places[3] + len(_PROBE) :], whole[places[1] + len(_PROBE) : places[2]])
        found = [(text, self.encoder.control_pattern.search(text)) for text in after]
        tokens = [match.group() for text, match in found if match is not None and not text[: match.start()].strip()]
        self.end_tokens = tuple(dict.fromkeys(tokens))


def _grouped(whole: GuardedText, turns: list[Turn]) -> list[Draft]:
    """Group turns by text, with as few texts as possible: the whole conversation first, then the longest others."""
    if len(turns) == 1 and not turns[0].alone:  # as most rows are
        only = turns[0]
        text = whole if whole.text.startswith(only.text.text[: only.end]) else only.text
        return [Draft(text, only.spans, (only,), only.notes)]
    left = [turn for turn in turns if not turn.alone]
    groups = [[turn] for turn in turns if turn.alone]
    texts = {id(group[0]): group[0].text for group in groups}
    for text in (whole, *(turn.text for turn in reversed(turns))):
        inside = [turn for turn in left if text.text.startswith(turn.text.text[: turn.end])]
        if inside:
            groups.append(inside)
            texts[id(inside[0])] = text
            left = [turn for turn in left if turn not in inside]
    groups.sort(key=lambda group: group[0].message)
    split = ("split",) if len(groups) > 1 else ()
    drafts = []
    for group in groups:
        spans = tuple(span for turn in group for span in turn.spans)
        notes = tuple(dict.fromkeys([*split, *(note for turn in group for note in turn.notes)]))
        drafts.append(Draft(texts[id(group[0])], spans, tuple(group), notes))
    return drafts


def _up_to_end(text: str, marked: list[tuple[int, int]], end: int, end_token: str) -> tuple[tuple[int, int], ...]:
    """Add the end token to the marked spans; some templates write it after the mark."""
    a, b = marked[-1]
    if b == end:
        return tuple(marked)
    behind = text[b:end]
    if end_token and behind.endswith(end_token) and behind[: -len(end_token)].strip():
        return (*marked, (end - len(end_token), end))
    return (*marked[:-1], (a, end))


def _common_prefix(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    for k, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return k
    return min(len(one), len(other))


def _guarded(text: GuardedText, at: int) -> bool:
    return any(a <= at < b for a, b in text.guards)
