"""Options and commands of other programs are answered with the name here, or with the reason why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer._options.synonyms import COMMANDS as COMMAND_SYNONYMS
from veneer._options.synonyms import NAMES
from veneer.cli.main import COMMANDS, main, parser_of
from veneer.config import TrainOptions, near_miss
from veneer.errors import ConfigError

RENAMED = {
    "axolotl": "base_model:base sequence_len:max_length lora_r:r val_set_size:valid_fraction wandb_project:track",
    "llama-factory": "cutoff_len:max_length lora_rank:r lora_target:target_modules finetuning_type:method eval_steps:eval_every",
    "mlx-lm": "num_layers:layers_to_transform mask_prompt:train_on iters:steps steps_per_eval:eval_every adapter_path:out",
    "trl": "model_name_or_path:base dataset_name:data per_device_train_batch_size:batch_size max_grad_norm:clip optim:optimizer",
    "transformers": "num_train_epochs:epochs warmup_ratio:warmup_steps save_steps:save_every report_to:track lr_scheduler_type:schedule",
    "unsloth": "max_seq_length:max_length use_gradient_checkpointing:activation_checkpointing random_state:seed",
    "openai": "n_epochs:epochs learning_rate_multiplier:learning_rate training_file:data validation_file:valid suffix:name",
}
ANSWERED = {
    "packing": "always on",
    "sample_packing": "always on",
    "flash_attention": "always on",
    "logging_steps": "always on",
    "gradient_accumulation_steps": "batch_size counts the examples",
    "micro_batch_size": "batch_size counts the examples",
    "load_in_4bit": "with quantize: nf4, fp4 or int8",
    "bf16": "choose the data type of the base with dtype",
    "fp16": "choose the data type of the base with dtype",
    "trust_remote_code": "runs no code from model repositories",
    "deepspeed": "shard",
    "push_to_hub": "veneer push RUN OWNER/NAME",
}


@pytest.mark.parametrize("program", RENAMED)
def test_names_of_other_programs_are_translated(program: str) -> None:
    """As a YAML key and as a flag, each name is answered with the one here."""
    fields = list(TrainOptions.model_fields)
    for pair in RENAMED[program].split():
        theirs, ours = pair.split(":")
        assert near_miss(theirs, fields) == f"; did you mean {ours}?"
        with pytest.raises(ConfigError, match=f"unknown option; did you mean {ours}"):
            TrainOptions(**{theirs: 1})  # type: ignore[arg-type]
        parser, _ = parser_of("train")
        with pytest.raises(ConfigError, match=f"did you mean --{ours.replace('_', '-')}"):
            parser.parse_args([f"--{theirs.replace('_', '-')}", "1"])


@pytest.mark.parametrize("name", ANSWERED)
def test_what_does_not_exist_here_is_explained(name: str) -> None:
    """An option that is always on, not needed or not supported is answered with a sentence."""
    assert ANSWERED[name] in near_miss(name, TrainOptions.model_fields)


def test_every_translation_exists() -> None:
    """Each name in the table is an option of some command, so that no answer sends a user to a name that is not there."""
    known: set[str] = set()
    for command in COMMANDS:
        known |= {option.strip("-").replace("-", "_") for option in parser_of(command)[0]._option_string_actions}
    names = {
        name
        for answer in NAMES.values()
        if " " not in answer and answer != "not supported"
        for name in answer.split("|")
    }
    assert names <= known
    assert {answer for answer in COMMAND_SYNONYMS.values() if " " not in answer or answer in COMMANDS} <= set(COMMANDS)
    assert not NAMES.keys() & set(TrainOptions.model_fields) and not COMMAND_SYNONYMS.keys() & set(COMMANDS)


def test_all_unknown_keys_of_a_file_are_answered_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration of another program is one list, a line for each key."""
    file = tmp_path / "axolotl.yaml"
    file.write_text("base_model: x\nmicro_batch_size: 2\nload_in_4bit: true\n")
    assert main(["train", str(file)]) == 2
    err = capsys.readouterr().err
    assert "3 problems" in err and "line 1: base_model: unknown option; did you mean base?" in err
    assert "line 3: load_in_4bit: unknown option; not an option: choose the format" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("fuse runs/a", "unknown command 'fuse'; did you mean veneer merge?"),
        ("finetune rows.jsonl", "did you mean veneer train?"),
        ("data validate x.jsonl", "did you mean veneer data check?"),
        ("infer runs/a hi", "did you mean veneer generate?"),
        ("deploy runs/a", "did you mean veneer serve?"),
        ("generate runs/a hi --max-new-tokens 9", "unknown option --max-new-tokens; did you mean --max-tokens?"),
        (
            "generate --model base --prompt hi",
            "2 unknown options\n  - --model; did you mean --base?\n  - --prompt; not an option: give",
        ),
        ("merge runs/a --adapter-path x", "unknown option --adapter-path; did you mean --out?"),
        ("train x.jsonl --set num_layers=4", "did you mean layers_to_transform?"),
    ],
)
def test_commands_and_flags_of_other_programs(capsys: pytest.CaptureFixture[str], words: str, says: str) -> None:
    """Commands and flags are answered in one go, before anything that is missing is reported."""
    assert main(words.split()) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "data check", "runs"])
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """``veneer help COMMAND`` prints what ``veneer COMMAND --help`` prints."""
    assert main(["help", *command.split()]) == 0
    shown = capsys.readouterr().out
    assert main([*command.split(), "--help"]) == 0
    assert shown == capsys.readouterr().out and shown.startswith(f"usage: veneer {command}")
