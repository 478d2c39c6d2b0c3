"""Stop tokens: the tokens that training teaches as ends of turns, for all styles of templates."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data.families import FAMILIES, Family, byte_level, tokenizer_of
from tests.tiny import tiny_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from veneer.data.chat.render import Rendered, Renderer, RenderOptions
from veneer.data.chat.stops import other_ends, stop_ids, taught_stops
from veneer.data.rows.row import Row

ASKED = {"role": "user", "content": "What is it?"}
ANSWERED = {"role": "assistant", "content": "A dog."}

# A turn is one or several messages; all end with <|end|> except the last, which ends with <|return|>, or <|call|> for a tool.
HARMONY = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{%- if m.tool_calls %}{%- set call = m.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|message|>' + (call.arguments | tojson) + '<|call|>' }}
{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{%- endif %}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""


def tokenizer_with(specials: list[str], template: str, *, eos: str, softs: tuple[str, ...] = ()) -> Any:
    """A byte-level tokenizer with control tokens; ``softs`` are added without being special."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    backend.add_tokens([AddedToken(text, normalized=False) for text in softs])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=template)


def harmony() -> Any:
    specials = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"]
    return tokenizer_with(specials, HARMONY, eos="<|endoftext|>")


def rendered(tokenizer: Any, *messages: dict[str, Any], **options: Any) -> tuple[Renderer, list[Rendered]]:
    renderer = Renderer(tokenizer, RenderOptions(**options))
    return renderer, renderer.render(Row.chat("rows:1", list(messages)))


def texts(tokenizer: Any, ids: Any) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(token) for token in ids]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_stops_are_the_taught_ends(family: Family) -> None:
    """In every style the token recorded for each turn is the family's end token, the template alone shows the same, and the base's
    own end token stays a stop."""
    tokenizer = tokenizer_of(family.name)
    renderer, parts = rendered(tokenizer, ASKED, ANSWERED, ASKED, ANSWERED)
    taught = [token for part in parts for token in part.stops]
    assert (
        texts(tokenizer, taught)
        == [family.end] * 2
        == [
            tokenizer.convert_ids_to_tokens(part.ids[i])
            for part in parts
            for i in range(len(part.ids))
            if part.weights[i] and (i + 1 == len(part.ids) or not part.weights[i + 1])
        ]
    )
    own = tokenizer.eos_token
    expected = [family.end] if own == family.end else [family.end, own]
    assert texts(tokenizer, stop_ids(renderer)) == expected
    record = taught_stops(renderer, {taught[0]: 2})
    assert record == {family.end: taught[0]} and texts(tokenizer, stop_ids(renderer, (), [record])) == expected
    said = other_ends(tokenizer, record, [])
    assert (said is None) == (own == family.end)
    assert other_ends(tokenizer, record, [taught[0]]) is None  # the base's generation config knows it


def test_a_turn_of_several_messages_ends_with_its_last() -> None:
    """A turn whose reasoning ends like other messages is trained as a whole, and generation does not stop inside it."""
    tokenizer = harmony()
    thought = {**ANSWERED, "thinking": "An animal."}
    renderer, parts = rendered(tokenizer, ASKED, thought)
    text = "".join(tokenizer.decode([t]) for t, w in zip(parts[0].ids, parts[0].weights, strict=True) if w)
    assert (
        text
        == "<|channel|>analysis<|message|>An animal.<|end|><|start|>assistant<|channel|>final<|message|>A dog.<|return|>"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "dog"}}}
    _, called = rendered(
        tokenizer, ASKED, {"role": "assistant", "content": "", "thinking": "Look.", "tool_calls": [call]}
    )
    assert texts(tokenizer, [*parts[0].stops, *called[0].stops]) == ["<|return|>", "<|call|>"]
    assert texts(tokenizer, stop_ids(renderer)) == ["<|return|>", "<|endoftext|>"]


def test_an_end_token_that_is_not_special_ends_the_turn() -> None:
    """An end token that was added without being declared special is the end of the turn all the same."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|done|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = tokenizer_with(["<|endoftext|>"], template, eos="<|endoftext|>", softs=("<|done|>",))
    renderer, parts = rendered(tokenizer, ASKED, ANSWERED)
    assert texts(tokenizer, parts[0].stops) == ["<|done|>"] and parts[0].notes == ()
    assert tokenizer.decode([t for t, w in zip(parts[0].ids, parts[0].weights, strict=True) if w]) == "A dog.<|done|>"
    assert texts(tokenizer, stop_ids(renderer)) == ["<|done|>", "<|endoftext|>"]


def test_text_rows_and_pairs_end_with_the_end_of_text() -> None:
    """Rows without a template end with the end-of-text token; a row that is cut teaches no end."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    renderer = Renderer(tokenizer)
    end = tokenizer.eos_token_id
    for row in (Row("text", "r:1", text="One two."), Row("pair", "r:2", prompt="One", completion=" two.")):
        assert renderer.render(row)[0].stops == (end,)
    cut = Renderer(tokenizer, RenderOptions(max_length=4)).render(Row("text", "r:1", text="One two three four five."))
    assert cut[0].stops == () and stop_ids(renderer) == (end,)


def test_a_template_without_an_end_teaches_none() -> None:
    """Where nothing ends a turn, no stop is recorded and the note says so; the base's own end token is what remains."""
    tokenizer = tokenizer_with(
        ["<|endoftext|>"], "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", eos="<|endoftext|>"
    )
    renderer, parts = rendered(tokenizer, ASKED, ANSWERED)
    assert parts[0].stops == () and "no_end_token" in parts[0].notes
    assert taught_stops(renderer, {}) == {} and texts(tokenizer, stop_ids(renderer)) == ["<|endoftext|>"]


def test_records_of_another_tokenizer_are_passed_over() -> None:
    """A recorded token that means something else in this tokenizer is not a stop; the template's end stands in."""
    tokenizer = tokenizer_of("chatml")
    renderer = Renderer(tokenizer)
    for record in ({"<|im_end|>": 5}, {"<|eot_id|>": 10**9}, {"x": -1}, {}):
        assert texts(tokenizer, stop_ids(renderer, (), [record])) == ["<|im_end|>", "<|endoftext|>"]


def test_training_on_everything_takes_the_end_of_the_template() -> None:
    """With ``train_on`` all no turn is located, so the template's end token is recorded."""
    tokenizer = tokenizer_of("gemma")
    renderer, parts = rendered(tokenizer, ASKED, ANSWERED, train_on="all")
    assert parts[0].stops == () and list(taught_stops(renderer, {})) == ["<end_of_turn>"]
