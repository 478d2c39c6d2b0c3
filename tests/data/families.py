"""Ten chat template styles of real model families, each with a small tokenizer of its kind, written for these tests.

What a family's assistant turn has to read like is written down a second time here, in Python (``Family.turn``), so
that the tests do not ask the code under test for their truth.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog answers: what is the matter with you today?",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # prints 3",
    "Hello! How are you? I am fine, thank you very much. Please tell me about the weather in Paris.",
    "user assistant system model tool think im start end turn role header text content",
    "Ünïcödé 中文字符 emoji 👍🏽 — “quotes” and a\ttab",
] * 4


@dataclass(frozen=True)
class Family:
    """A template style, how to make its tokenizer, and the truth about its turns."""

    name: str
    template: str
    tokenizer: Callable[[], Tokenizer]
    specials: tuple[str, ...]
    end: str
    turn: Callable[[Message], str]
    softs: tuple[str, ...] = ()
    bos: str | None = None
    systems: bool = True  # whether it takes a system message
    thinks: bool = False  # whether messages may have reasoning_content
    added: dict[str, Any] = field(default_factory=dict)  # how its special tokens are added


def words(message: Message) -> str:
    return str(message["content"])


# --- tokenizers -------------------------------------------------------------------------------------------------------


def byte_level(*, digits: bool = False, split: str = "", trim: bool = False, nfc: bool = False) -> Tokenizer:
    """The byte-level BPE of GPT-2 and its descendants."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if split:
        steps += [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentence_piece(*, prefix: bool) -> Tokenizer:
    """A SentencePiece BPE with byte fallback, as Llama 2, Mistral and Gemma have; ``prefix`` as in the older ones."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    mark = "\u2581"
    steps: list[Any] = [normalizers.Prepend(mark)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", mark)])
    fallback = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=fallback, show_progress=False)
    tokenizer.train_from_iterator([line.replace(" ", mark) for line in CORPUS], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = []  # the bytes are ordinary entries of the vocabulary
    made = Tokenizer.from_str(json.dumps(spec))
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return made


def unigram() -> Tokenizer:
    """A Unigram whose vocabulary itself holds the control token ``</s>``, so that plain text could become it."""
    letters = sorted({c for line in CORPUS for c in line.replace(" ", "\u2581")} | set("<>/|_[]\u2581"))
    vocab = [("<unk>", 0.0), ("<s>", -2.0), ("</s>", -2.0), *((c, -8.0) for c in letters)]
    vocab += [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    vocab += [("\u2581the", -4.0), ("ing", -5.0), ("\u2581you", -4.5)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


# --- templates --------------------------------------------------------------------------------------------------------

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role != 'assistant' %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- else %}
{%- set said = m.content %}{%- set thought = '' %}
{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in said %}
{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}
{%- else %}{{- said }}{%- endif %}
{%- for call in m.tool_calls or [] %}{{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('this family takes no system message') }}{% endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim }}
{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for m in rest %}
{%- if m['role'] == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}
{%- else %}{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- endif %}
{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}
{%- endfor %}"""

PHI = """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{%- else %}{{ eos_token }}{%- endif %}"""

CHATML = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

ZEPHYR = """\
{% for m in messages %}
{{- '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
{%- endfor %}"""

SMOLLM = """\
{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

DEEPSEEK = """\
{{ bos_token }}{% for m in messages %}
{%- if m['role'] == 'system' %}{{ m['content'] }}{% endif %}
{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}
{%- if m['role'] == 'assistant' %}{% set said = m['content'] %}
{%- if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + said + '<｜end▁of▁sentence｜>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"""

GRANITE = """\
{%- for m in messages %}
{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' }}
{%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] + '<|end_of_text|>\n' }}{% endgeneration %}
{%- else %}{{- m['content'] + '<|end_of_text|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""


def qwen_turn(message: Message) -> str:
    said, thought = words(message), message.get("reasoning_content")
    if thought is None:
        thought = ""
        if "</think>" in said:
            thought = said.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            said = said.split("</think>")[-1].lstrip("\n")
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + said.lstrip("\n") + "<|im_end|>"


FAMILIES = (
    Family(
        "llama3",
        LLAMA3,
        lambda: byte_level(split=LLAMA_SPLIT),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        lambda m: words(m).strip() + "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    Family(
        "qwen3",
        QWEN3,
        lambda: byte_level(split=LLAMA_SPLIT, nfc=True),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        qwen_turn,
        softs=("<think>", "</think>", "<tool_call>"),
        thinks=True,
    ),
    Family(
        "gemma",
        GEMMA,
        lambda: sentence_piece(prefix=False),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        lambda m: words(m).strip() + "<end_of_turn>",
        bos="<bos>",
        systems=False,
    ),
    Family(
        "mistral",
        MISTRAL,
        lambda: sentence_piece(prefix=True),
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        lambda m: " " + words(m) + "</s>",
        bos="<s>",
    ),
    Family(
        "phi",
        PHI,
        lambda: sentence_piece(prefix=False),
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        lambda m: words(m) + "<|end|>",
        bos="<s>",
        added={"rstrip": True},
    ),
    Family(
        "chatml",
        CHATML,
        lambda: byte_level(trim=True),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        lambda m: words(m) + "<|im_end|>",
    ),
    Family("zephyr", ZEPHYR, unigram, ("<s>", "</s>"), "</s>", lambda m: words(m) + "</s>", bos="<s>"),
    Family(
        "smollm",
        SMOLLM,
        lambda: byte_level(digits=True, trim=True),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"),
        "<|im_end|>",
        lambda m: words(m) + "<|im_end|>",
    ),
    Family(
        "deepseek",
        DEEPSEEK,
        lambda: byte_level(split=LLAMA_SPLIT),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        lambda m: words(m).split("</think>")[-1] + "<｜end▁of▁sentence｜>",
        softs=("<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
    ),
    Family(
        "granite",
        GRANITE,
        lambda: byte_level(),
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        "<|end_of_text|>",
        lambda m: words(m) + "<|end_of_text|>",
    ),
)


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with its template."""
    family = next(f for f in FAMILIES if f.name == name)
    backend = family.tokenizer()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True, **family.added) for t in family.specials])
    backend.add_tokens([AddedToken(t, normalized=False) for t in family.softs])
    eos = "<|endoftext|>" if "<|endoftext|>" in family.specials else family.end
    named = {"bos_token": family.bos} if family.bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, **named)
    tokenizer.chat_template = family.template
    return tokenizer


# --- conversations ----------------------------------------------------------------------------------------------------

PLAIN = (
    "Hello",
    " there",
    " ",
    "  ",
    "What is 12*34?",
    " It's",
    "0",
    "1e-4",
    " fine.",
    "...",
    "im_end",
    "[",
    "/INST",
    "</",
    "think>",
    "<",
    ">",
)
ODD = (
    "\n",
    "\n\n",
    "\t",
    "\u00a0",
    "\u2581",
    "|",
    "<|",
    "|>",
    "\u00e9t\u00e9",
    "e\u0301",
    "\u4e2d\u6587",
    "\U0001f44d\U0001f3fd",
)
BITS = (*PLAIN, *ODD, "def f(x):\n    return x")


def some_text(rng: random.Random, extra: tuple[str, ...], most: int = 9) -> str:
    """Random text that holds at least a letter, and now and then one of ``extra``."""
    bits = [rng.choice(BITS) for _ in range(rng.randint(1, most))]
    if extra and rng.random() < 0.4:
        bits.insert(rng.randrange(len(bits) + 1), rng.choice(extra))
    bits.insert(rng.randrange(len(bits) + 1), rng.choice("abcXYZ"))
    return "".join(bits)


def conversation(rng: random.Random, family: Family, *, typed: bool = True) -> list[Message]:
    """A random conversation that the family's template takes; ``typed`` lets users type control strings."""
    controls = (*family.specials, *family.softs) if typed else ()
    messages: list[Message] = []
    if family.systems and rng.random() < 0.4:
        messages.append({"role": "system", "content": some_text(rng, controls)})
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        messages.append({"role": "user", "content": some_text(rng, controls)})
        answer: Message = {"role": "assistant", "content": some_text(rng, family.specials if typed else ())}
        if family.thinks and rng.random() < 0.3:
            answer["reasoning_content"] = some_text(rng, ())
        elif family.softs and rng.random() < 0.3:
            answer["content"] = "<think>\nhm " + some_text(rng, ()) + "\n</think>\n\n" + answer["content"]
        messages.append(answer)
    return messages
