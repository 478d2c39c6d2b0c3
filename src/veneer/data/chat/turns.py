"""Where the assistant's turns stand in a rendered conversation, to the character.

The turn of message i is what a model has to write when it is asked for message i: everything that the template renders
behind the prompt for it, up to and including the end token.

    before = template(messages[:i], with the opening of the assistant's turn)
    here   = template(messages[:i+1])
    turn   = here[len(before):]          because before is a prefix of here; cut behind the end token

A template that marks generated text itself (``{% generation %}``) is believed, inside the turn so found. Templates
differ in what breaks this:

* An earlier turn reads otherwise once later turns stand behind it (Qwen3 drops the reasoning of earlier turns). Then
  one text cannot hold all turns as the model will have to write them, and the conversation becomes several texts, as
  few as possible, each training the turns that it holds in that form.
* The opening holds more than the finished turn begins with (DeepSeek-R1 opens with ``<think>``). The turn then begins
  where both part, behind the last control token that they share.
* Earlier text reads otherwise once the answer stands there (Mistral's system prompt). The turn is then put behind the
  text that the model will see, its prompt.

Boundary: characters only. Whether tokens respect these places is ``render.py``'s work, which refuses what does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer.data.chat.template import Conversation, Template, TemplateFault
from veneer.data.encode import Encoder, Guarded

__all__ = ["Draft", "Turn", "Turns"]

_SAID = "Veneerprobe"


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant's turn in a text.

    Attributes:
        message: its index in the conversation.
        text: the text in which it stands.
        start, end: its characters, from behind the opening to behind the end token.
        stretches: what is trained of it, usually all.
        notes: what is remarkable about it, as keys of ``notes.NOTES``.
    """

    message: int
    text: Guarded
    start: int
    end: int
    stretches: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = ()
    alone: bool = False  # the text before it is its prompt, which no other text begins with


@dataclass(frozen=True, slots=True)
class Draft:
    """A text to be encoded, with the characters to be trained."""

    text: Guarded
    stretches: tuple[tuple[int, int], ...]
    turns: tuple[Turn, ...] = ()
    notes: tuple[str, ...] = ()


class Turns:
    """Finds turns with one template and one tokenizer.

    Attributes:
        opening: what the template writes to open an assistant's turn, "" if nothing.
        end_token: the control token right behind a plain answer, None if the template writes none there.
    """

    def __init__(self, template: Template, encoder: Encoder) -> None:
        self.template = template
        self.encoder = encoder
        self.opening = ""
        self.end_token: str | None = None
        self._learn()

    def drafts(self, conversation: Conversation, wanted: Sequence[int]) -> list[Draft]:
        """The texts that train the wanted messages, one where the template allows it.

        Raises:
            TemplateFault: the template refuses the conversation, or a turn cannot be found exactly.
        """
        whole = conversation.text()
        if not wanted:
            return [Draft(whole, ())]
        turns = [self._turn(conversation, i, whole) for i in wanted]
        return _gathered(whole, turns)

    def _turn(self, conversation: Conversation, i: int, whole: Guarded) -> Turn:
        here = whole if i == len(conversation.messages) - 1 else conversation.text(i + 1)
        try:
            before = conversation.text(i, prompt=True)
        except TemplateFault as fault:
            return self._finished(conversation, i, here, self._behind_opening(here, i, fault))
        if here.text.startswith(before.text):
            return self._finished(conversation, i, here, len(before.text))
        closed = conversation.text(i)
        if here.text.startswith(closed.text):
            shared = _shared(here.text, before.text)
            start = self._last_control(here, len(closed.text), shared)
            return self._finished(conversation, i, here, start, "opening_differs")
        return self._behind_prompt(conversation, i, here, before)

    def _finished(self, conversation: Conversation, i: int, here: Guarded, start: int, *notes: str) -> Turn:
        end, found = self._end(here, start)
        if not found:
            notes = (*notes, "no_end_token")
        stretches: tuple[tuple[int, int], ...] = ((start, end),)
        if self.template.marks:
            marked = [(max(a, start), min(b, end)) for a, b in conversation.generated(i + 1) if b > start and a < end]
            if marked:
                stretches = _up_to_end(here.text, marked, end, self.end_token)
            else:
                notes = (*notes, "unmarked")
        return Turn(i, here, start, end, stretches, notes)

    def _behind_opening(self, here: Guarded, i: int, fault: TemplateFault) -> int:
        """The start of a turn before which the template can render nothing, such as a first message's."""
        if not self.opening or here.text.count(self.opening) != 1:
            raise TemplateFault(
                f"what stands before the assistant's turn (message {i}) cannot be rendered on its own ({fault}), so "
                "the turn's beginning is not known exactly; begin the conversation with a user's message, or give the "
                "turn weight 0"
            ) from fault
        return here.text.index(self.opening) + len(self.opening)

    def _behind_prompt(self, conversation: Conversation, i: int, here: Guarded, before: Guarded) -> Turn:
        """The turn cut out of its text and put behind its prompt, where the two disagree about what is earlier."""
        anchor = before.text[self._last_control(before, 0, len(before.text), begin=True) :]
        at = here.text.rfind(anchor) if len(anchor) < len(before.text) else -1
        while at >= 0 and _guarded(here, at):
            at = here.text.rfind(anchor, 0, at)
        if at < 0:
            raise TemplateFault(
                f"the chat template renders what stands before the assistant's turn (message {i}) in one way when it "
                "asks for the turn and in another when it shows it, so the turn cannot be found exactly; give the turn "
                "weight 0, or use another chat template"
            )
        turn = self._finished(conversation, i, here, at + len(anchor))
        shift = len(before.text) - turn.start
        behind = tuple((a + shift, b + shift) for a, b in here.guards if a >= turn.start)
        text = Guarded(before.text + here.text[turn.start :], (*before.guards, *behind))
        stretches = tuple((a + shift, b + shift) for a, b in turn.stretches)
        return Turn(
            i, text, turn.start + shift, turn.end + shift, stretches, (*turn.notes, "behind_prompt"), alone=True
        )

    def _end(self, here: Guarded, start: int) -> tuple[int, bool]:
        """Behind the end token of the turn that begins at ``start``, the last in its text; whether there is one."""
        ends = [m for m in self.encoder.special_pattern.finditer(here.text, start) if not _guarded(here, m.start())]
        own = [m.end() for m in ends if m.group() == self.end_token]
        if own or ends:
            return (own or [m.end() for m in ends])[-1], True
        return len(here.text), False

    def _last_control(self, text: Guarded, a: int, b: int, *, begin: bool = False) -> int:
        """Behind (or at the begin of) the last control token of the template in [a, b); ``a`` if there is none."""
        found = a
        for match in self.encoder.control_pattern.finditer(text.text, a, b):
            if not _guarded(text, match.start()):
                found = match.start() if begin else match.end()
        return found

    def _learn(self) -> None:
        """Learn the opening and the end token from a small conversation; a template that refuses it teaches nothing."""
        said = [{"role": "user", "content": _SAID}, {"role": "assistant", "content": _SAID}]
        try:
            closed = self.template.render(said[:1])
            opened = self.template.render(said[:1], prompt=True)
            whole = self.template.render([*said, *said])
        except TemplateFault:
            return
        if opened.startswith(closed):
            self.opening = opened[len(closed) :]
        places = [whole.find(_SAID)]
        while places[-1] >= 0:
            places.append(whole.find(_SAID, places[-1] + 1))
        if len(places) != 5:
            return
        between = whole[places[1] + len(_SAID) : places[2]]
        match = self.encoder.special_pattern.search(between)
        if match is not None and not between[: match.start()].strip():
            self.end_token = match.group()


def _gathered(whole: Guarded, turns: list[Turn]) -> list[Draft]:
    """As few texts as hold all turns: the whole conversation first, then the longest of the others."""
    if len(turns) == 1 and not turns[0].alone:  # as most rows are
        only = turns[0]
        text = whole if whole.text.startswith(only.text.text[: only.end]) else only.text
        return [Draft(text, only.stretches, (only,), only.notes)]
    left = [turn for turn in turns if not turn.alone]
    groups = [[turn] for turn in turns if turn.alone]
    texts = {id(group[0]): group[0].text for group in groups}
    for text in (whole, *(turn.text for turn in reversed(turns))):
        mine = [turn for turn in left if text.text.startswith(turn.text.text[: turn.end])]
        if mine:
            groups.append(mine)
            texts[id(mine[0])] = text
            left = [turn for turn in left if turn not in mine]
    groups.sort(key=lambda group: group[0].message)
    split = ("split",) if len(groups) > 1 else ()
    drafts = []
    for group in groups:
        stretches = tuple(stretch for turn in group for stretch in turn.stretches)
        notes = tuple(dict.fromkeys([*split, *(note for turn in group for note in turn.notes)]))
        drafts.append(Draft(texts[id(group[0])], stretches, tuple(group), notes))
    return drafts


def _up_to_end(
    text: str, marked: list[tuple[int, int]], end: int, end_token: str | None
) -> tuple[tuple[int, int], ...]:
    """Marked stretches with the end token, which some templates write behind the mark."""
    a, b = marked[-1]
    if b == end:
        return tuple(marked)
    behind = text[b:end]
    if end_token is not None and behind.endswith(end_token) and behind[: -len(end_token)].strip():
        return (*marked, (end - len(end_token), end))
    return (*marked[:-1], (a, end))


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    for k, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return k
    return min(len(one), len(other))


def _guarded(text: Guarded, at: int) -> bool:
    return any(a <= at < b for a, b in text.guards)
