"""Chat templates by name, for bases whose own template is missing or cannot render tools.

    chatml          <|im_start|>role ... <|im_end|>, as Qwen and SmolLM2 write it; without tools
    chatml-tools    the same with tools, tool calls and tool results as JSON in XML tags, as Hermes and Qwen 2.5 write them

Tool calls are ``<tool_call>`` blocks in the assistant's turn, results ``<tool_response>`` blocks in a user turn. Reasoning is a
``<think>`` block before the answer. ``<|im_end|>`` ends a turn only if it is a special token of the tokenizer.
"""

from __future__ import annotations

__all__ = ["NAMED_TEMPLATES"]

_END = "{{ '<|im_end|>\\n' }}"
_THINK = (
    "{%- set thought = message.reasoning_content or message.thinking or message.reasoning -%}"
    "{%- if thought -%}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif -%}"
)
_PROMPT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"

_CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\\n' }}"
    + _THINK
    + "{{ message.content or '' }}"
    + _END
    + "{%- endfor -%}"
    + _PROMPT
)
_CHATML_TOOLS = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
    "{%- if tools -%}"
    "{{ '<|im_start|>system\\n' + (system + '\\n\\n' if system else '') + '# Tools\\n\\nYou may call one or more functions to"
    " assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{%- for tool in tools -%}{{ '\\n' + (tool | tojson) }}{%- endfor -%}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within"
    ' <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n'
    "</tool_call><|im_end|>\\n' }}"
    "{%- elif system -%}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role in ('tool', 'function', 'ipython') -%}"
    "{%- if loop.first or messages[loop.index0 - 1].role not in ('tool', 'function', 'ipython') -%}{{ '<|im_start|>user' }}{%- endif -%}"
    "{{ '\\n<tool_response>\\n' + ((message.name + ': ') if message.name else '') + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role not in ('tool', 'function', 'ipython') -%}{{ '<|im_end|>\\n' }}{%- endif -%}"
    "{%- elif not (loop.first and message.role == 'system') -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}" + _THINK + "{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{ ('' if loop.first and not message.content else '\\n') + '<tool_call>\\n' + ({'name': call.function.name, 'arguments':"
    " call.function.arguments} | tojson) + '\\n</tool_call>' }}"
    "{%- endfor -%}" + _END + "{%- endif -%}{%- endfor -%}" + _PROMPT
)

NAMED_TEMPLATES = {"chatml": _CHATML, "chatml-tools": _CHATML_TOOLS}
"""Jinja text by name."""
