"""Parts of rows that a chat template leaves out: refused or reported, never trained without a word."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from tests.data.families import tokenizer_of
from transformers import PreTrainedTokenizerFast

from veneer.data.chat.render import Rendered, Renderer, RenderOptions
from veneer.data.chat.template import read_template
from veneer.data.check import CheckReport, check_files, report_lines
from veneer.data.rows.row import Row
from veneer.errors import DataError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = [
    {"role": "user", "content": "weather in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]
OPEN, END = "<|im_start|>", "<|im_end|>"


def template(message: str, before: str = "") -> str:
    """A ChatML template with another rendering of a message (a Jinja expression)."""
    return (
        before
        + "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + ("
        + message
        + ") + '<|im_end|>\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )


CONTENT = "(m.content or '')"
CALLS = "((m.tool_calls | tojson) if m.tool_calls else '')"


def renderer_of(source: str | None = None, name: str = "chatml", **options: Any) -> Renderer:
    return Renderer(tokenizer_of(name), RenderOptions(chat_template=source, **options))


def render(source: str | None, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> list[Rendered]:
    return renderer_of(source, **options).render(Row.chat("rows.jsonl:1", messages, tools))


def refusal(source: str | None, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        render(source, messages, tools, **options)
    return str(caught.value)


def report_of(folder: Path, source: str | None, *rows: Any, **options: Any) -> CheckReport:
    path = folder / "rows.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return check_files([path], renderer_of(source, **options))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (template(CONTENT), "the tool calls of message 1"),
        (
            template(CONTENT + " + (m.tool_calls[0].function.name if m.tool_calls else '')"),
            "the tool calls of message 1",
        ),
        (template("(m.content or '') if m.role != 'tool' else ''"), "the tool calls of message 1"),
        (template(f"{CALLS} + (m.content or '' if m.role != 'tool' else 'result')"), "message 2 (role tool)"),
    ],
)
def test_a_call_or_its_result_that_is_left_out_refuses_the_row(source: str, found: str) -> None:
    """A template without tool calls, with their names only, or without results; "Rome" in the question is not proof."""
    assert found in refusal(source, CALLING, TOOLS)


def test_the_same_holds_for_calls_of_sharegpt_rows(tmp_path: Path) -> None:
    """The row is unusable in the check, with its source and the remedy."""
    turns = [
        {"from": "human", "value": "weather in Rome?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    report = report_of(tmp_path, template(CONTENT), {"conversations": turns})
    assert not report.usable
    assert "rows.jsonl:1: conversations: the chat template leaves out the tool calls" in report_lines(report)[5]
    assert "chatml-tools" in str(report.load.bad[0])


@pytest.mark.parametrize(
    ("source", "messages", "index"),
    [
        (
            template("'' if m.role == 'system' else m.content"),
            [{"role": "system", "content": "user"}, *CALLING[::3]],
            0,
        ),
        (template("m.content.split('\\n')[0]"), [{"role": "user", "content": "one\ntwo"}, CALLING[3]], 0),
        (template("m.content if loop.index0 % 2 == 0 or loop.last else '...'"), [*CALLING[::3]] * 2, 1),
    ],
)
def test_text_of_a_message_that_is_left_out_refuses_the_row(
    source: str, messages: list[dict[str, Any]], index: int
) -> None:
    """A system message that is dropped, text behind a line end, an earlier answer: each is named by its message."""
    assert f"leaves out the text of message {index} " in refusal(source, messages)


def test_a_second_row_of_the_same_structure_is_compared_too() -> None:
    """After a complete row, a row whose text the template drops by its value is still refused."""
    renderer = renderer_of(template("'' if 'secret' in m.content else m.content"))
    renderer.render(Row.chat("rows.jsonl:1", CALLING[::3]))
    with pytest.raises(DataError, match="leaves out the text of message 0"):
        renderer.render(Row.chat("rows.jsonl:2", [{"role": "user", "content": "a secret"}, CALLING[3]]))


def test_tools_and_names_that_are_left_out_are_reported_with_counts(tmp_path: Path) -> None:
    """Rows stay usable; the check counts them once per kind, and the renderer notes them."""
    rows = [{"messages": CALLING[::3], "tools": TOOLS}] * 2
    rows.append({"messages": [{**CALLING[0], "name": "ann"}, CALLING[3]]})
    report = report_of(tmp_path, template(CONTENT), *rows)
    assert report.usable
    assert {name: report.findings[name].count for name in ("tools_left_out", "names_left_out")} == {
        "tools_left_out": 2,
        "names_left_out": 1,
    }
    text = "\n".join(report_lines(report))
    assert text.count("does not render the tools") == 1
    (part,) = render(template(CONTENT), CALLING[::3], TOOLS)
    assert part.notes == ("tools_left_out",)


@pytest.mark.parametrize(
    ("source", "notes"),
    [
        (template("m.content + " + CALLS, "{{ 'T ' + (tools | tojson) if tools else '' }}"), ()),
        (
            template("m.content + " + CALLS, "{%- for t in tools or [] -%}{{ t.function.name }}{%- endfor -%}"),
            ("tools_left_out",),
        ),
        (template("m.content + " + CALLS + " | upper", "{{ 'T ' + (tools | tojson | upper) if tools else '' }}"), ()),
    ],
)
def test_what_is_rendered_in_another_form_counts(source: str, notes: tuple[str, ...]) -> None:
    """Tools as JSON, only by their names, and in capitals."""
    assert all(part.notes == notes for part in render(source, CALLING, TOOLS))


def test_a_template_that_takes_known_values_only_is_compared_as_it_is() -> None:
    """Where the template refuses the changed row, the row's own text decides."""
    strict = "{{ raise_exception('unknown') if m.tool_calls and m.tool_calls[0].function.name != 'weather' else '' }}"
    source = template("m.content + " + CALLS).replace(
        "{{ '<|im_start|>' + m.role", strict + "{{ '<|im_start|>' + m.role", 1
    )
    assert render(source, CALLING)
    without = source.replace(CALLS, "''")
    assert "tool calls of message 1" in refusal(without, [{**CALLING[0], "content": "weather?"}, *CALLING[1:]])


# --- templates by name ------------------------------------------------------------------------------------------------


def test_chatml_tools_renders_everything() -> None:
    """Tools, calls, results, reasoning and system text are in the text, and the calls are trained with their end."""
    messages = [
        {"role": "system", "content": "be brief"},
        CALLING[0],
        {**CALLING[1], "reasoning_content": "look it up"},
        *CALLING[2:],
    ]
    (part,) = render(read_template("chatml-tools"), messages, TOOLS)
    assert part.notes in ((), ("boundary_cut",))
    trained = ["".join(part.text[a:b]) for _, a, b in part.turns]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert trained == [f"<think>\nlook it up\n</think>\n\n{call}{END}", f"It is sunny.{END}"]
    assert f"{OPEN}system\nbe brief\n\n# Tools" in part.text and '"description": "of a city"' in part.text
    assert f"{OPEN}user\n<tool_response>\nsunny\n</tool_response>{END}\n" in part.text


@pytest.mark.parametrize("name", ["chatml", "chatml-tools"])
def test_a_named_template_agrees_with_a_chatml_base(name: str) -> None:
    """Without tools both render what a ChatML base renders itself."""
    messages = [{"role": "system", "content": "s"}, *CALLING[::3]]
    (named,) = render(read_template(name), messages)
    (own,) = render(None, messages)
    assert (named.text, named.ids, named.weights) == (own.text, own.ids, own.weights)


def test_two_results_stand_in_one_turn() -> None:
    """Results of one turn follow each other in one user turn, with the names of the functions where given."""
    results = [{"role": "tool", "content": "a", "name": "f"}, {"role": "tool", "content": "b"}]
    messages = [CALLING[0], {**CALLING[1], "tool_calls": [CALL, CALL]}, *results, CALLING[3]]
    (part,) = render(read_template("chatml-tools"), messages)
    assert "<tool_response>\nf: a\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>" in part.text
    assert part.text.count("</tool_call>\n<tool_call>") == 1


def test_templates_of_the_tokenizer_are_chosen_by_name() -> None:
    """Several named templates: rows with tools take the one for tools; without a default the names are offered."""
    plain, tool_use = (
        template(CONTENT),
        template("m.content + " + CALLS, "{{ 'T ' + (tools | tojson) if tools else '' }}"),
    )
    tokenizer = copy.deepcopy(tokenizer_of("chatml"))
    tokenizer.chat_template = {"default": plain, "tool_use": tool_use}
    (part,) = Renderer(tokenizer).render(Row.chat("rows.jsonl:1", CALLING, TOOLS))
    assert part.text.startswith("T [")
    tokenizer.chat_template = {"rag": plain, "tool_use": tool_use}
    with pytest.raises(DataError, match=r"several chat templates \(rag, tool_use\) and no default.*--chat-template"):
        Renderer(tokenizer)
    assert read_template("rag", tokenizer) == plain
    with pytest.raises(DataError, match="the names are chatml, chatml-tools, rag, tool_use"):
        read_template("rga", tokenizer)


@pytest.mark.parametrize("form", ["list in the settings", "folder of templates", "older files"])
def test_named_templates_are_read_in_every_form_of_file(form: str, tmp_path: Path) -> None:
    """Several templates in tokenizer_config.json, and in files of their own, with a default and without one."""
    plain = template(CONTENT)
    tool_use = template("m.content + " + CALLS, "{{ 'T ' + (tools | tojson) if tools else '' }}")
    tokenizer_of("chatml").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for default in (True, False):
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        names = {"default" if default else "rag": plain, "tool_use": tool_use}
        if form == "folder of templates":
            (tmp_path / "additional_chat_templates").mkdir(exist_ok=True)
            (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
            for name, source in names.items():
                where = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
                (tmp_path / f"{where}.jinja").write_text(source)
        elif form == "older files":
            settings["chat_template"] = names if default else [{"name": k, "template": v} for k, v in names.items()]
        else:
            settings["chat_template"] = [{"name": key, "template": value} for key, value in names.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        if default:
            (part,) = Renderer(tokenizer).render(Row.chat("rows.jsonl:1", CALLING, TOOLS))
            (other,) = Renderer(tokenizer).render(Row.chat("rows.jsonl:1", CALLING[::3]))
            assert part.text.startswith("T [") and other.text.startswith(OPEN)
        else:
            with pytest.raises(DataError, match=r"several chat templates \(rag, tool_use\) and no default"):
                Renderer(tokenizer)


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is called like a template is read."""
    monkeypatch.chdir(tmp_path)
    Path("chatml").write_text("own", encoding="utf-8")
    assert read_template("chatml") == "own"


# --- reasoning that the prompt opens ----------------------------------------------------------------------------------

KEEPS = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- set r = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' -%}"
    "{{ HEAD + '<think>\\n' + r + '\\n</think>\\n\\n' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
    "{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ HEAD + '<think>\\n' }}{%- endif -%}"
)
DROPS = KEEPS.replace("'<think>\\n' + r + '\\n</think>\\n\\n' + ", "")
HEADS = ["'<|im_start|>assistant\\n'", "'<|im_start|>the assistant says:\\n\\n'", "'assistant: '"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("content", ["<think>\ntwo and two\n</think>\n\n4", "two and two\n</think>\n\n4"])
def test_reasoning_that_the_prompt_opens_is_trained(tmp_path: Path, head: str, content: str) -> None:
    """Both ways of writing it, with any header: no false alarm."""
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": content}]}
    report = report_of(tmp_path, KEEPS.replace("HEAD", head), row)
    assert report.usable and "thinking_dropped" not in report.findings
    (part,) = render(KEEPS.replace("HEAD", head), row["messages"])
    assert [part.text[a:b] for _, a, b in part.turns] == [f"two and two\n</think>\n\n4{END}"]


@pytest.mark.parametrize("head", HEADS)
def test_where_the_template_drops_it_no_header_is_trained(tmp_path: Path, head: str) -> None:
    """The trained text is the answer alone, and the loss of the reasoning is reported."""
    messages = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "<think>\ntwo\n</think>\n\n<4>"}]
    (part,) = render(DROPS.replace("HEAD", head), messages)
    assert [part.text[a:b] for _, a, b in part.turns] == [f"<4>{END}"] and "opening_differs" in part.notes
    assert "thinking_dropped" in report_of(tmp_path, DROPS.replace("HEAD", head), {"messages": messages}).findings


# --- tokens beyond the embedding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["messages", "text", "pair"])
def test_tokens_beyond_the_embedding_refuse_the_row(shape: str) -> None:
    """A token that was added to the tokenizer and not to the base is named, in every shape of row."""
    tokenizer = copy.deepcopy(tokenizer_of("chatml"))
    size = len(tokenizer)
    tokenizer.add_tokens(["[ROW]"])
    renderer = Renderer(tokenizer, RenderOptions(vocab_size=size, prompt_style="plain"))
    row = {
        "messages": Row.chat("a:1", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "[ROW] a"}]),
        "text": Row("text", "a:1", text="a [ROW]"),
        "pair": Row("pair", "a:1", prompt="[ROW]", completion="b"),
    }[shape]
    with pytest.raises(
        DataError, match=rf"a:1: token {size} \('\[ROW\]'\) is beyond the base's embedding of {size} tokens"
    ):
        renderer.render(row)
    assert Renderer(tokenizer, RenderOptions(vocab_size=size + 1, prompt_style="plain")).render(row)
