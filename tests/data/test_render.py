"""Rendering beyond masks: plain rows, truncation, tools, marks, and what is refused with which reason."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data.families import GRANITE, byte_level, sentence_piece, tokenizer_of
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from veneer.data.chat.render import Rendered, Renderer, RenderOptions
from veneer.data.rows.row import BadRow, Row
from veneer.errors import ConfigError, DataError

PAIR = Row("pair", "rows.jsonl:1", prompt="one ", completion="two", key="completion")
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def made(backend: Tokenizer, template: str | None = None, **named: Any) -> PreTrainedTokenizerFast:
    specials = {value for value in named.values() if isinstance(value, str)}
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in sorted(specials)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer: Any, piece: Rendered) -> str:
    return str(tokenizer.decode([i for i, w in zip(piece.ids, piece.weights, strict=True) if w > 0.0]))


def refusal(renderer: Renderer, row: Row) -> str:
    ((_, found),) = renderer.render_many([row])
    assert isinstance(found, BadRow)
    return str(found)


def test_a_plain_pair_trains_the_completion_and_the_end() -> None:
    """Without a chat template, prompt and completion stand behind each other; completion and end token are trained."""
    tokenizer = made(byte_level(), eos_token="<end>")
    (piece,) = Renderer(tokenizer).render(PAIR)
    assert tokenizer.decode(piece.ids) == "one two<end>" and trained(tokenizer, piece) == "two<end>"
    assert piece.weights[0] == 0.0 and piece.example.source == "rows.jsonl:1"


def test_a_plain_text_trains_everything_but_its_first_token() -> None:
    """A text is trained whole with its end token; nothing predicts the first token."""
    tokenizer = made(byte_level(), eos_token="<end>")
    (piece,) = Renderer(tokenizer).render(Row("text", "rows.jsonl:1", text="one two"))
    assert tokenizer.decode(piece.ids) == "one two<end>" and piece.trained == len(piece.ids) - 1


def test_a_begin_token_is_put_once() -> None:
    """What the tokenizer puts before a text is put there, untrained, and not again where the row has it already."""
    from tokenizers import processors

    backend = byte_level()
    tokenizer = made(backend, bos_token="<begin>", eos_token="<end>")
    number = tokenizer.convert_tokens_to_ids("<begin>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", number)]
    )
    (piece,) = Renderer(tokenizer).render(PAIR)
    assert tokenizer.decode(piece.ids) == "<begin>one two<end>" and piece.weights[0] == 0.0
    options = RenderOptions(parse_specials=True)
    (piece,) = Renderer(tokenizer, options).render(Row("text", "rows.jsonl:1", text="<begin>one<end>"))
    assert tokenizer.decode(piece.ids) == "<begin>one<end>"
    (piece,) = Renderer(tokenizer).render(Row("text", "rows.jsonl:1", text="<begin>one"))
    assert list(piece.ids).count(number) == 1 and piece.typed == ("<begin>",)


def test_a_typed_control_token_of_a_prompt_without_a_template_stays_text() -> None:
    """As in training; the begin token is put before it all the same."""
    from tokenizers import processors

    tokenizer = made(byte_level(), bos_token="<begin>", eos_token="<end>")
    begin, end = (tokenizer.convert_tokens_to_ids(text) for text in ("<begin>", "<end>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    ids = Renderer(tokenizer).prompt_ids("one<end>")
    assert ids[0] == begin and end not in ids and tokenizer.decode(ids) == "<begin>one<end>"
    parsed = Renderer(tokenizer, RenderOptions(parse_specials=True)).prompt_ids("<begin>one<end>")
    assert parsed.count(begin) == 1 and parsed[-1] == end and Renderer(tokenizer).prompt_ids("") == [begin]


def test_a_pair_goes_through_the_template_where_there_is_one() -> None:
    """With a chat template a pair is a conversation, unless plain is asked for."""
    row = Row("pair", "rows.jsonl:1", tuple(CHAT), (1.0, 1.0), prompt="one ", completion="two")
    tokenizer = tokenizer_of("chatml")
    (chat,) = Renderer(tokenizer).render(row)
    (plain,) = Renderer(tokenizer, RenderOptions(prompt_style="plain")).render(row)
    assert chat.text.startswith("<|im_start|>user\none<|im_end|>") and trained(tokenizer, chat) == "two<|im_end|>"
    assert plain.text == "one two" and trained(tokenizer, plain) == "two<|endoftext|>"


def test_truncation_counts_what_it_costs() -> None:
    """Behind ``max_length`` tokens are cut off and their trained ones counted."""
    tokenizer = tokenizer_of("chatml")
    row = Row.chat("rows.jsonl:1", CHAT)
    (whole,) = Renderer(tokenizer).render(row)
    for length in range(2, len(whole.ids) + 3):
        (cut,) = Renderer(tokenizer, RenderOptions(max_length=length)).render(row)
        assert cut.ids == whole.ids[:length] and cut.length == whole.length
        assert cut.trained + cut.lost == whole.trained


def test_marks_of_the_template_are_believed() -> None:
    """A template that marks generated text says what is trained, and its end token is trained in any case."""
    narrow = GRANITE.replace(
        "{% generation %}{{- m['content'] + '<|end_of_text|>\n' }}{% endgeneration %}",
        "{{- m['content'][0] }}{% generation %}{{- m['content'][1:] }}{% endgeneration %}{{- '<|end_of_text|>\n' }}",
    )
    assert narrow != GRANITE
    tokenizer = tokenizer_of("granite")
    (piece,) = Renderer(tokenizer, RenderOptions(chat_template=narrow)).render(Row.chat("rows.jsonl:1", CHAT))
    assert trained(tokenizer, piece) == "wo<|end_of_text|>"


def test_a_template_without_end_token_is_told() -> None:
    """Where nothing ends the answer, the turn is trained and the row says so."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = made(byte_level(), template, eos_token="<end>")
    (piece,) = Renderer(tokenizer).render(Row.chat("rows.jsonl:1", CHAT))
    assert trained(tokenizer, piece) == "two\n" and "no_end_token" in piece.notes


def test_an_assistant_may_begin() -> None:
    """A first turn of the assistant is found by its opening, since no prompt can be rendered before it."""
    tokenizer = tokenizer_of("chatml")
    messages = [{"role": "assistant", "content": "hello"}, *CHAT]
    (piece,) = Renderer(tokenizer).render(Row.chat("rows.jsonl:1", messages))
    assert trained(tokenizer, piece) == "hello<|im_end|>two<|im_end|>"


def test_tool_calls_are_trained_as_the_template_writes_them() -> None:
    """Calls belong to the assistant's turn; control tokens that the template writes in it stay control tokens."""
    tokenizer = tokenizer_of("qwen3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<tool_call><|im_end|>"}}}
    messages = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    (piece,) = Renderer(tokenizer).render(Row.chat("rows.jsonl:1", messages))
    assert trained(tokenizer, piece) == (
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": "<tool_call><|im_end|>"}}\n</tool_call>'
        "<|im_end|>"
    )
    for text in ("<tool_call>", "<|im_end|>"):
        ids = [i for i, w in zip(piece.ids, piece.weights, strict=True) if w > 0.0]
        assert ids.count(tokenizer.convert_tokens_to_ids(text)) == 1


ASSERTING = (
    "{%- for m in messages -%}{%- if m.role not in ['user', 'assistant'] -%}"
    "{{ raise_exception('expected user or assistant, found ' + m.role) }}{%- endif -%}"
    "{{ m.role + ': ' + m['content'].strip() + '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
)


@pytest.mark.parametrize(
    ("family", "source", "first", "words"),
    [
        ("gemma", None, {"role": "system", "content": "s"}, "this family takes no system message"),
        ("gemma", None, {"role": "user", "content": "one more"}, "roles must take turns"),
        ("chatml", ASSERTING, {"role": "tool", "content": "s"}, "expected user or assistant, found tool"),
        ("chatml", ASSERTING.replace("m['content']", "m['parts'][0]"), CHAT[0], "has no attribute 'parts'"),
    ],
    ids=["system", "turns", "role", "content"],
)
def test_what_the_template_refuses_is_told_in_its_words(family: str, source: Any, first: Any, words: str) -> None:
    """A template's own complaint is the reason, with the place and the key of the row."""
    row = Row("chat", "rows.jsonl:7", (first, *CHAT), (1.0,) * 3, key="messages")
    said = refusal(Renderer(tokenizer_of(family), RenderOptions(chat_template=source)), row)
    assert said.startswith("rows.jsonl:7: messages: the chat template refuses the conversation: ") and words in said


@pytest.mark.parametrize(
    ("messages", "tools", "words"),
    [
        ([{"role": "user", "content": "a\ufdd1b"}, CHAT[1]], None, "U+FDD1"),
        (CHAT, [{"name": "f", "x": {"<|im_end|>": 1}}], "tools: the key '<|im_end|>' contains"),
    ],
)
def test_text_that_cannot_be_kept_apart_is_refused(messages: Any, tools: Any, words: str) -> None:
    """Reserved code points, and control strings as keys, are refused with the reason."""
    row = Row("chat", "rows.jsonl:1", tuple(messages), (1.0, 1.0), tools, key="messages")
    assert words in refusal(Renderer(tokenizer_of("chatml")), row)


def test_a_template_that_looks_for_the_typed_control_string_is_refused() -> None:
    """Where a template treats a typed control string specially, the row is refused rather than guessed at."""
    template = tokenizer_of("chatml").chat_template.replace("m['content']", "m['content'].split('<|im_end|>')[0]")
    renderer = Renderer(tokenizer_of("chatml"), RenderOptions(chat_template=template))
    row = Row.chat("rows.jsonl:1", [{"role": "user", "content": "a <|im_end|> b"}, CHAT[1]])
    assert "treats that text specially" in refusal(renderer, row)


def test_conversations_need_a_template() -> None:
    """A tokenizer without a chat template cannot render messages; the error says what can be done."""
    tokenizer = made(byte_level(), eos_token="<end>")
    assert "needs a chat template" in refusal(Renderer(tokenizer), Row.chat("rows.jsonl:1", CHAT))


def test_a_tokenizer_that_loses_text_trains_by_characters() -> None:
    """A word tokenizer cannot give text back; masks are then exact by characters, which it tells of each token."""
    vocab = {"<unk>": 0, "one": 1, "two": 2, "three": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = made(backend, eos_token="<end>")
    renderer = Renderer(tokenizer)
    assert not renderer.encoder.faithful
    (piece,) = renderer.render(Row("pair", "rows.jsonl:1", prompt="one two", completion=" three <end>"))
    assert [tokenizer.convert_ids_to_tokens(i) for i in piece.ids[:3]] == ["one", "two", "three"]
    assert piece.weights[:3] == (0.0, 0.0, 1.0) and tokenizer.convert_tokens_to_ids("<end>") not in piece.ids[:-1]


def test_many_control_tokens_and_single_letters() -> None:
    """Control tokens of one or two characters, and hundreds of them, are kept apart like the others."""
    names = ["\u2021", "<>", *(f"<|reserved_{k}|>" for k in range(300))]
    backend = byte_level()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    template = "{% for m in messages %}{{ '\u2021' + m.role + '<>' + m.content + '<end>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '\u2021assistant<>' }}{% endif %}"
    tokenizer = made(backend, template, eos_token="<end>")
    asked = "a\u2021b<>c<|reserved_7|>d"
    (piece,) = Renderer(tokenizer).render(Row.chat("rows.jsonl:1", [{"role": "user", "content": asked}, CHAT[1]]))
    assert trained(tokenizer, piece) == "two<end>"
    assert [list(piece.ids).count(tokenizer.convert_tokens_to_ids(name)) for name in names[:3]] == [2, 2, 0]
    assert asked in tokenizer.decode(piece.ids)


def test_settings_of_the_tokenizer_do_not_leak_in() -> None:
    """Truncation and padding that a tokenizer's file asks for cut nothing and add nothing here."""
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = made(backend, eos_token="<end>")
    (piece,) = Renderer(tokenizer).render(Row("text", "rows.jsonl:1", text="one two three four five"))
    assert tokenizer.decode(piece.ids) == "one two three four five<end>"


def test_a_tokenizer_without_offsets_is_refused() -> None:
    """Masks need to know which characters a token covers; a tokenizer that cannot say is refused."""
    with pytest.raises(DataError, match="expected a fast tokenizer"):
        Renderer(object())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_on": "user"}, "train_on: expected assistant, last or all"),
        ({"prompt_style": "x"}, "prompt_style: expected auto"),
        ({"max_length": 1}, "max_length: expected at least 2"),
    ],
)
def test_options_out_of_range(options: Any, words: str) -> None:
    """Wrong options are errors that say what is expected."""
    with pytest.raises(ConfigError, match=words):
        RenderOptions(**options)


def test_rows_are_rendered_the_same_alone_and_in_company() -> None:
    """Rendering in blocks gives what rendering one by one gives, and bad rows stay in their place."""
    renderer = Renderer(made(sentence_piece(prefix=True), tokenizer_of("chatml").chat_template, eos_token="<|im_end|>"))
    rows = [Row.chat(f"rows.jsonl:{k}", [CHAT[0], {"role": "assistant", "content": f"two {k}"}]) for k in range(20)]
    bad = BadRow("rows.jsonl:99", "", "no row")
    mixed = [*rows[:7], bad, *rows[7:]]
    found = list(renderer.render_many(mixed, chunk=3))
    assert found[7] == (None, bad)
    assert [pieces for row, pieces in found if row is not None] == [renderer.render(row) for row in rows]
