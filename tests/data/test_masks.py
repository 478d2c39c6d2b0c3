"""Masks over ten template styles: what is trained is the assistant's turn and its end token, to the token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from typing import Any

import pytest
from tests.data.families import FAMILIES, Family, Message, conversation, tokenizer_of

from veneer.data.chat.render import Rendered, Renderer, RenderOptions
from veneer.data.rows.row import BadRow, Row

PER_FAMILY = 500

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@cache
def renderer_of(name: str) -> Renderer:
    return Renderer(tokenizer_of(name))


def rendered(family: Family, conversations: list[list[Message]]) -> Iterator[tuple[list[Message], list[Rendered]]]:
    rows = (Row.chat(f"rows.jsonl:{number}", messages) for number, messages in enumerate(conversations, 1))
    for messages, (_, found) in zip(conversations, renderer_of(family.name).render_many(rows), strict=True):
        assert not isinstance(found, BadRow), found
        yield messages, found


def trained_stretches(tokenizer: Any, piece: Rendered) -> list[str]:
    """The trained tokens decoded, stretch by stretch, as they read behind the token before them."""
    texts = []
    for trained, group in groupby(range(len(piece.ids)), key=lambda k: piece.weights[k] > 0.0):
        if trained:
            where = list(group)
            before = tokenizer.decode(piece.ids[where[0] - 1 : where[0]])
            behind = tokenizer.decode(piece.ids[where[0] - 1 : where[-1] + 1])
            texts.append(behind[len(before) :])
    return texts


def as_kept(family: Family, text: str) -> str:
    """A text as this family's tokenizer gives it back: normalised, and with the spaces that older ones add left out."""
    backend = tokenizer_of(family.name).backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return text.replace("\u2581", " ").replace(" ", "") if family.name == "mistral" else text


@families
def test_trained_text_is_the_rendered_turn_and_its_end_token(family: Family) -> None:
    """Over random conversations with typed control strings, every assistant's turn is trained once, and nothing else."""
    rng = random.Random(f"masks {family.name}")
    tokenizer = tokenizer_of(family.name)
    conversations = [conversation(rng, family) for _ in range(PER_FAMILY)]
    for messages, pieces in rendered(family, conversations):
        expected = [family.turn(message) for message in messages if message["role"] == "assistant"]
        found = [text for piece in pieces for text in trained_stretches(tokenizer, piece)]
        assert [as_kept(family, text) for text in found] == [as_kept(family, text) for text in expected]


@families
def test_clean_rows_have_the_ids_of_the_tokenizer_itself(family: Family) -> None:
    """Where nobody typed a control string, the ids are those of apply_chat_template, for the whole conversation."""
    rng = random.Random(f"clean {family.name}")
    tokenizer = tokenizer_of(family.name)
    conversations = [conversation(rng, family, typed=False) for _ in range(100)]
    compared = 0
    for messages, pieces in rendered(family, conversations):
        theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        soft = any(text in message["content"] for text in family.softs for message in messages)
        if len(pieces) == 1 and not {"boundary_cut", "behind_prompt"} & set(pieces[0].notes) and not soft:
            assert list(pieces[0].ids) == theirs
            compared += 1
    assert compared >= 20


@families
def test_each_control_token_typed_by_a_user_stays_text(family: Family) -> None:
    """Typed anywhere in a user's or system's words, no control token comes of it, and the words read as typed."""
    tokenizer = tokenizer_of(family.name)
    controls = {tokenizer.convert_tokens_to_ids(text): text for text in (*family.specials, *family.softs)}
    for typed in (*family.specials, *family.softs):
        for form in ("{}", "a{}b", " {} \n{}", "x{}{}", "<{}>", "{0}" * 5):
            pieces = []
            for said in (typed, "word"):
                messages = [
                    {"role": "user", "content": form.format(said, said)},
                    {"role": "assistant", "content": "yes"},
                ]
                ((_, (piece,)),) = rendered(family, [messages])
                pieces.append(piece)
            piece, clean = pieces
            assert [i for i in piece.ids if i in controls] == [i for i in clean.ids if i in controls]
            assert set(piece.typed) == {typed}
            asked = form.format(typed, typed).strip()
            assert as_kept(family, asked) in as_kept(family, tokenizer.decode(piece.ids))


@families
def test_each_special_token_typed_by_an_assistant_stays_text(family: Family) -> None:
    """An answer that speaks of a control string is trained to its own end, with that string as text."""
    tokenizer = tokenizer_of(family.name)
    for typed in family.specials:
        messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": f"a {typed} b"}]
        ((_, (piece,)),) = rendered(family, [messages])
        end = tokenizer.convert_tokens_to_ids(family.end)
        trained = [token for token, weight in zip(piece.ids, piece.weights, strict=True) if weight > 0.0]
        assert trained[-1] == end and trained.count(end) == 1
        assert tokenizer.convert_tokens_to_ids(typed) not in trained[:-1]


@families
def test_last_and_all(family: Family) -> None:
    """``last`` trains the last turn of the assistant only, ``all`` every token but the first."""
    rng = random.Random(f"last {family.name}")
    conversations = [conversation(rng, family, typed=False) for _ in range(20)]
    last = Renderer(tokenizer_of(family.name), RenderOptions(train_on="last"))
    every = Renderer(tokenizer_of(family.name), RenderOptions(train_on="all"))
    for messages in conversations:
        (piece,) = last.render(Row.chat("rows.jsonl:1", messages))
        (found,) = trained_stretches(tokenizer_of(family.name), piece)
        assert as_kept(family, found) == as_kept(family, family.turn(messages[-1]))
        (piece,) = every.render(Row.chat("rows.jsonl:1", messages))
        assert piece.trained == len(piece.ids) - 1


def test_a_turn_with_weight_zero_is_context() -> None:
    """A message's weight of 0 leaves its turn in the text and out of the loss."""
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "TWO"},
    ]
    row = Row("chat", "rows.jsonl:1", tuple(messages), (1.0, 0.0, 1.0, 1.0))
    (piece,) = renderer_of("chatml").render(row)
    assert trained_stretches(tokenizer_of("chatml"), piece) == ["TWO<|im_end|>"]
    assert "ONE" in piece.text


def test_earlier_reasoning_splits_the_conversation() -> None:
    """Qwen3 drops earlier reasoning, so each turn is trained in its own text, in the form in which it is written."""
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE", "reasoning_content": "hm"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "TWO", "reasoning_content": "ha"},
    ]
    first, second = renderer_of("qwen3").render(Row.chat("rows.jsonl:1", messages))
    assert "split" in first.notes and "split" in second.notes
    assert trained_stretches(tokenizer_of("qwen3"), first) == ["<think>\nhm\n</think>\n\nONE<|im_end|>"]
    assert trained_stretches(tokenizer_of("qwen3"), second) == ["<think>\nha\n</think>\n\nTWO<|im_end|>"]
    assert "hm" not in second.text and second.text.startswith("<|im_start|>user\none<|im_end|>")


def test_a_system_prompt_that_moves_stays_in_the_prompt() -> None:
    """Mistral shows the system prompt only while the question is last; the answer is trained behind that prompt."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE"},
    ]
    (piece,) = renderer_of("mistral").render(Row.chat("rows.jsonl:1", messages))
    assert piece.text == "<s>[INST] Be brief.\n\none [/INST] ONE</s>"
    assert piece.text[slice(*piece.turns[0][1:])] == " ONE</s>" and "behind_prompt" in piece.notes


def test_prompt_and_answer_never_share_a_token() -> None:
    """An answer that begins with a line end is encoded apart from the line end of its opening, as at inference."""
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "\n\n\nONE"}]
    (piece,) = renderer_of("chatml").render(Row.chat("rows.jsonl:1", messages))
    assert trained_stretches(tokenizer_of("chatml"), piece) == ["\n\n\nONE<|im_end|>"]
    assert "boundary_cut" in piece.notes
    prompt = tokenizer_of("chatml").apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert list(piece.ids[: len(prompt)]) == prompt
