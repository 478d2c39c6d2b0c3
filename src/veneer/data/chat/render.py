"""Rendering of rows: token ids with an exact loss weight for each.

In a conversation the assistant's turns are trained, each with its end token, as the chat template renders them
(``turns.py`` finds the characters, ``encode.py`` the tokens). In a pair rendered without a chat template the completion
and the end-of-text token are trained; in a text row everything is.

Every trained span is verified: its tokens begin and end at its characters, cover them without a gap, and decode to them.
A row that fails is refused with its source, never trained approximately. If one token would cover the end of a prompt
and the beginning of an answer, the two are encoded separately, as at inference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from veneer.data.chat.coverage import Coverage
from veneer.data.chat.rendered import Rendered, RenderOptions
from veneer.data.chat.template import Conversation, Template, TemplateError, reserved_error, template_source
from veneer.data.chat.turns import Draft, TurnFinder
from veneer.data.encode import Encoded, Encoder, GuardedText
from veneer.data.rows.row import BadRow, Row
from veneer.errors import DataError

__all__ = ["RenderOptions", "Rendered", "Renderer"]

_BLOCK_CHARACTERS = 1 << 18  # characters of rows that are rendered together


class Renderer:
    """Renders rows with one tokenizer.

    Attributes:
        template: the chat template in use, None where there is none.
        encoder: encodes text with the tokenizer.
    """

    def __init__(self, tokenizer: Any, options: RenderOptions | None = None) -> None:
        self.options = options or RenderOptions()
        self.tokenizer = tokenizer
        source = template_source(tokenizer, template=self.options.chat_template)
        self.encoder = Encoder(tokenizer, source or "")
        self.template = Template(tokenizer, source, self.options.template_options) if source is not None else None
        self._turns: dict[str, TurnFinder] = {}
        self._coverage: dict[str, Coverage] = {}
        self._before, self._eos = frame(tokenizer, self.encoder)

    @property
    def stops(self) -> tuple[int, ...]:
        """The token that ends a conversation's last turn by the template; without a template, the end-of-text token."""
        if self.template is None:
            return () if self._eos is None else (self._eos,)
        ends = self._turn_finder(self.template.source).end_tokens[:1]
        return tuple(int(self.tokenizer.convert_tokens_to_ids(text)) for text in ends)

    @property
    def opening(self) -> str:
        """The template's generation prompt; "" where there is none."""
        return "" if self.template is None else self._turn_finder(self.template.source).opening

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a prompt: a conversation, or a text (a user's turn where the base chats, else the plain text).

        Control strings in it stay text, as in training.

        Raises:
            DataError: messages are given and the base has no chat template, or the text has characters that cannot be encoded.
        """
        if self.template is None:
            if not isinstance(prompt, str):
                raise DataError("the base has no chat template, so it takes plain text and no conversation")
            ids = self.encoder.encode([self._plain(prompt)])[0].ids if prompt else []
            return [*self._before_of(ids), *ids]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(one) for one in prompt]
        guarded = Conversation(self.template, self.encoder, messages).text(prompt=True)
        return self.encoder.encode([guarded])[0].ids

    def notices(self, format: str) -> list[str]:
        """Describe how rows of a format are rendered, one line each; empty if it goes without saying."""
        if format not in ("prompt", "alpaca", "preference", "unpaired"):
            return []
        way = "as a conversation through the chat template" if self._pairs_chat() else "as plain text"
        what = "prompt and answer, where they are texts," if format == "preference" else "prompt and completion"
        return [f"{what} are rendered {way}"]

    def render(self, row: Row) -> list[Rendered]:
        """Render one row: one part, or several if the template cannot render all turns in one text.

        Raises:
            DataError: the row cannot be rendered with an exact mask; names its source and the reason.
        """
        ((_, result),) = self.render_many([row])
        if isinstance(result, BadRow):
            raise DataError(str(result))
        return result

    def render_many(
        self, rows: Iterable[Row | BadRow], *, chunk: int = 256
    ) -> Iterator[tuple[Row, list[Rendered]] | tuple[Row | None, BadRow]]:
        """Render rows in order, in batches: yields each row with its parts, or with the reason why it is refused.

        Rows that are bad already pass through, with None for the row.
        """
        for block in _blocks(rows, chunk):
            yield from self._render_block(block)

    def _render_block(self, rows: list[Row | BadRow]) -> list[tuple[Row, list[Rendered]] | tuple[Row | None, BadRow]]:
        drafts_of: list[list[Draft] | BadRow] = []
        for row in rows:
            try:
                drafts_of.append(row if isinstance(row, BadRow) else self._plan(row))
            except DataError as error:
                drafts_of.append(_refused(row, error))
        texts = [draft.text for drafts in drafts_of if isinstance(drafts, list) for draft in drafts]
        encoded = iter(self._encode(texts))
        results: list[tuple[Row, list[Rendered]] | tuple[Row | None, BadRow]] = []
        for row, drafts in zip(rows, drafts_of, strict=True):
            if isinstance(row, BadRow):
                results.append((None, row))
                continue
            if isinstance(drafts, BadRow):
                results.append((row, drafts))
                continue
            ready = [(draft, next(encoded)) for draft in drafts]
            try:
                results.append((row, [self._finish(row, draft, tokens) for draft, tokens in ready]))
            except DataError as error:
                results.append((row, _refused(row, error)))
        return results

    def _encode(self, texts: list[GuardedText]) -> list[Encoded | DataError]:
        try:
            return list(self.encoder.encode(texts))
        except DataError:
            return [self._encode_one(text) for text in texts]  # find the text at fault

    def _encode_one(self, text: GuardedText) -> Encoded | DataError:
        try:
            return self.encoder.encode([text])[0]
        except DataError as error:
            return error

    def _plan(self, row: Row) -> list[Draft]:
        if row.rejected is not None:
            return self._plan_answers({"chosen": replace(row, rejected=None), "rejected": row.rejected})
        if row.desirable is not None:
            return self._plan_answers({"desirable" if row.desirable else "undesirable": replace(row, desirable=None)})
        if self._as_chat(row):
            return self._plan_chat(row)
        plain = self._plain(row.prompt + row.completion if row.kind == "pair" else row.text)
        first, last = len(row.prompt) if row.kind == "pair" and self.options.train_on != "all" else 0, len(plain.text)
        return [Draft(plain, ((first, last),) if first < last else ())]

    def _plain(self, text: str) -> GuardedText:
        """A text without a template. Raises DataError for characters that the encoder needs itself."""
        if (found := self.encoder.reserved.search(text)) is not None:
            raise reserved_error(found.group())
        if self.options.parse_specials:
            return GuardedText(text, ())
        return GuardedText(text, tuple(match.span() for match in self.encoder.control_pattern.finditer(text)))

    def _plan_answers(self, rows: Mapping[str, Row]) -> list[Draft]:
        """One draft for each answer of a preference, by its name."""
        drafts = []
        for answer, one in rows.items():
            found = self._plan(one)
            if len(found) > 1:
                raise DataError(
                    f"the chat template renders the turns of the {answer} answer in {len(found)} texts, and answers are compared as one; "
                    "write a row for each turn, or choose another template with --chat-template"
                )
            drafts.append(replace(found[0], answer=answer))
        return drafts

    def _as_chat(self, row: Row) -> bool:
        """True for rows that go through the chat template."""
        return row.kind == "chat" or (row.kind == "pair" and bool(row.messages) and self._pairs_chat())

    def _pairs_chat(self) -> bool:
        if self.options.prompt_style == "auto":
            return self.template is not None
        return self.options.prompt_style == "chat"

    def _plan_chat(self, row: Row) -> list[Draft]:
        turns = self._turns_for(row)
        conversation = Conversation(turns.template, self.encoder, row.messages, row.tools)
        if self.options.train_on == "all":
            whole = conversation.text()
            return self._checked(conversation, [Draft(whole, ((0, len(whole.text)),))])
        weights = row.weights or (1.0,) * len(row.messages)
        answers = [i for i, message in enumerate(row.messages) if message.get("role") == "assistant"]
        if self.options.train_on == "last":
            answers = answers[-1:]
        return self._checked(conversation, turns.drafts(conversation, [i for i in answers if weights[i] > 0.0]))

    def _checked(self, conversation: Conversation, drafts: list[Draft]) -> list[Draft]:
        """Refuse a row if the template leaves out a message or a tool call; note other parts that it leaves out."""
        coverage = self._coverage.setdefault(conversation.template.source, Coverage())
        missing = coverage.left_out(conversation, "".join(draft.text.text for draft in drafts))
        remedy = "choose a template that renders it with --chat-template, such as chatml-tools"
        if "tool_calls" in missing:
            raise TemplateError(
                f"the chat template leaves out the tool calls of message {missing['tool_calls']}; {remedy}"
            )
        if "content" in missing:
            i = missing["content"]
            role = conversation.messages[i].get("role")
            raise TemplateError(f"the chat template leaves out the text of message {i} (role {role}); {remedy}")
        notes = tuple(f"{kind}_left_out" for kind in ("tools", "names") if kind in missing)
        return [replace(draft, notes=(*draft.notes, *notes)) for draft in drafts] if notes else drafts

    def _turns_for(self, row: Row) -> TurnFinder:
        if self.template is None:
            raise DataError(
                "a conversation needs a chat template and the tokenizer has none; use an instruct model, give a chat "
                "template, or write the rows as prompt and completion"
            )
        source = self.template.source
        if row.tools:  # some tokenizers have a separate template for rows with tools
            source = template_source(self.tokenizer, row.tools, self.options.chat_template) or source
        return self._turn_finder(source)

    def _turn_finder(self, source: str) -> TurnFinder:
        found = self._turns.get(source)
        if found is None:
            found = TurnFinder(Template(self.tokenizer, source, self.options.template_options), self.encoder)
            self._turns[source] = found
        return found

    def _finish(self, row: Row, draft: Draft, encoded: Encoded | DataError) -> Rendered:
        if isinstance(encoded, DataError):
            raise encoded
        notes = list(draft.notes)
        text = draft.text.text
        edges = {edge for span in draft.spans for edge in span}
        if any(self.encoder.straddled(text, encoded, edge) for edge in edges):
            encoded = self.encoder.encode_cut(draft.text, edges - {0, len(text)})
            notes.append("boundary_cut")
        weights = [0.0] * len(encoded.ids)
        for a, b in draft.spans:
            i, j = self._verified(text, encoded, a, b)
            weights[i:j] = [1.0] * (j - i)
        ids, starts, ends = encoded.ids, encoded.starts, encoded.ends
        last = [] if "no_end_token" in notes else [encoded.token_range(0, turn.end)[1] - 1 for turn in draft.turns]
        if not draft.turns and not self._as_chat(row):
            ids, weights, starts, ends = self._framed(text, ids, weights, starts, ends, notes)
            last = [] if self._eos is None else [len(ids) - 1]
        if not ids:
            raise DataError("the row has no tokens")
        if self.options.vocab_size is not None and max(ids) >= self.options.vocab_size:
            raise DataError(self._beyond_embedding(max(ids)))
        weights[0] = 0.0  # nothing predicts the first token
        keep = self.options.max_length or len(ids)
        return Rendered(
            source=row.source,
            text=text,
            ids=tuple(ids[:keep]),
            weights=tuple(weights[:keep]),
            starts=tuple(starts[:keep]),
            ends=tuple(ends[:keep]),
            turns=tuple((turn.message, turn.start, turn.end) for turn in draft.turns),
            notes=tuple(notes),
            length=len(ids),
            lost=len(weights[keep:]) - weights[keep:].count(0.0),
            stops=tuple(ids[i] for i in last if i < keep),
            typed=tuple(text[a:b] for a, b in draft.text.guards),
            answer=draft.answer,
        )

    def _beyond_embedding(self, token: int) -> str:
        return (
            f"token {token} ({self.tokenizer.convert_ids_to_tokens(token)!r}) is beyond the base's embedding of "
            f"{self.options.vocab_size} tokens; resize the embedding (model.resize_token_embeddings) and save the base, or use the "
            "tokenizer that it was trained with"
        )

    def _verified(self, text: str, encoded: Encoded, a: int, b: int) -> tuple[int, int]:
        """Return the tokens [i, j) of the characters [a, b) after verifying that they are exactly these."""
        i, j = encoded.token_range(a, b)
        if i < j and self.encoder.faithful:
            before = encoded.ids[i - 1] if i else None
            found = self.encoder.decode_after(before, encoded.ids[i:j])
            exact = encoded.starts[i] == a and self.encoder.ends_at(text, encoded, j - 1, b)
            exact = exact and self.encoder.same_text(found, text[a:b])
        else:
            found = "".join(text[s:e] for s, e in zip(encoded.starts[i:j], encoded.ends[i:j], strict=True))
            exact = i < j and "".join(found.split()) == "".join(text[a:b].split())
        if not exact:
            raise DataError(
                f"the trained tokens decode to {_short(found)}, but the trained text is {_short(text[a:b])}; the tokenizer "
                "changes the text, so the row cannot be trained exactly"
            )
        return i, j

    def _before_of(self, ids: list[int]) -> list[int]:
        """The tokens that the tokenizer puts before a text; none if it begins with them."""
        return [] if self._before and ids[: len(self._before)] == self._before else self._before

    def _framed(
        self, text: str, ids: list[int], weights: list[float], starts: list[int], ends: list[int], notes: list[str]
    ) -> tuple[list[int], list[float], list[int], list[int]]:
        """Add the tokens that the tokenizer puts before a text, and the end-of-text token."""
        before = self._before_of(ids)
        behind = [] if self._eos is None or ids[-1:] == [self._eos] else [self._eos]
        if self._eos is None:
            notes.append("no_end_token")
        n = len(before)
        return (
            [*before, *ids, *behind],
            [*[0.0] * n, *weights, *[1.0] * len(behind)],
            [*[0] * n, *starts, *[len(text)] * len(behind)],
            [*[0] * n, *ends, *[len(text)] * len(behind)],
        )


def _blocks(rows: Iterable[Row | BadRow], most: int) -> Iterator[list[Row | BadRow]]:
    """Group rows in order, at most ``most`` together and fewer if they are long: encoding takes about 100 bytes per token."""
    block: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        block.append(row)
        if isinstance(row, Row):
            content = sum(len(str(message.get("content") or "")) for message in row.messages)
            characters += len(row.text) + len(row.prompt) + len(row.completion) + content
        if len(block) >= most or characters >= _BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def frame(tokenizer: Any, encoder: Encoder) -> tuple[list[int], int | None]:
    """The tokens that the tokenizer puts before a text (usually one begin token), and its end-of-text token."""
    plain = encoder.plain_ids("a")
    full = list(tokenizer("a", verbose=False)["input_ids"])
    before: list[int] = []
    for k in range(len(full) - len(plain) + 1):
        if full[k : k + len(plain)] == plain:
            before = full[:k]
            break
    return before, tokenizer.eos_token_id


def _refused(row: Row | BadRow, error: DataError) -> BadRow:
    return BadRow(row.source, getattr(error, "key", "") or row.key, str(error))


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}")
