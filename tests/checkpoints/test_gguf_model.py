"""Merged models as GGUF files: the base's file with the merged weights in it, in the format that was asked for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import pytest
import torch
from tests.compose.made import trained
from tests.tiny import tiny

from veneer.adapters import Adapter, DoRA, LoRA, attach
from veneer.checkpoints.foreign.gguf import GgufLayout, layout_of, merged_weights
from veneer.checkpoints.foreign.gguf_model import write_gguf_model
from veneer.cli import main as cli
from veneer.errors import ExportError

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def base_file(path: Path) -> tuple[torch.nn.Module, GgufLayout]:
    """A tiny Llama as llama.cpp's converter writes it, with a field of each kind."""
    model = tiny("llama", tie_word_embeddings=False, **SIZES)
    layout = layout_of(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, tied=False)  # type: ignore[union-attr, operator]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, parameter in model.named_parameters():
        stored = layout.name(name.removesuffix(".weight"))
        assert stored is not None
        writer.add_tensor(stored, layout.rows(stored, parameter.detach()).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, layout


def values(file: Path) -> dict[str, numpy.ndarray]:
    """The tensors of a file in fp32."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def mix_on(model: torch.nn.Module) -> list[tuple[Adapter, float]]:
    """A LoRA and a DoRA adapter with weights."""
    dora = trained(model, DoRA(r=3, target_modules=("q_proj", "down_proj")), name="b")
    return [(trained(model, LoRA(r=2)), 0.7), (dora, -0.5)]


@pytest.mark.parametrize(("form", "tolerance"), [("f32", 1e-6), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1e-2)])
def test_merged_weights_are_in_the_file(tmp_path: Path, form: str, tolerance: float) -> None:
    """Every changed matrix is the base's plus the weighted deltas in the file's order of rows; all else is the base's own."""
    model, layout = base_file(tmp_path / "base.gguf")
    mix = mix_on(model)
    changed = merged_weights(mix, layout, lambda site: model.get_submodule(site).weight)
    size, error = write_gguf_model(tmp_path / "base.gguf", tmp_path / "out.gguf", changed, form=form)
    before, after = values(tmp_path / "base.gguf"), values(tmp_path / "out.gguf")
    bank = attach(model)
    for adapter, _ in mix:
        bank.insert(adapter)
    merged = bank.merged_state_dict({adapter.name: weight for adapter, weight in mix})
    bank.detach()
    assert list(after) == list(before) and size == (tmp_path / "out.gguf").stat().st_size
    for site in (name for name, _ in model.named_parameters()):
        name = layout.name(site.removesuffix(".weight"))
        assert name is not None
        wanted = layout.rows(name, merged[site]).numpy()
        distance = numpy.linalg.norm(after[name] - wanted) / numpy.linalg.norm(wanted)
        assert distance <= (tolerance if wanted.ndim > 1 else 0), site
        assert (name in changed) == (not numpy.array_equal(before[name], wanted)), site
    assert error <= tolerance and (error > 0) == (form != "f32")
    old, new = (gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in ("base", "out"))
    same = set(old) - {"general.file_type"}
    assert {name: old[name].contents() for name in same} == {name: new[name].contents() for name in same}


def test_other_formats_come_from_llama_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q4_k_m is made by llama.cpp's program from an fp16 file; without it, or if it fails, nothing is left."""
    model, layout = base_file(tmp_path / "base.gguf")
    changed = merged_weights(mix_on(model), layout, lambda site: model.get_submodule(site).weight)
    out = tmp_path / "out.gguf"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ExportError, match="llama-quantize, which is not on the PATH"):
        write_gguf_model(tmp_path / "base.gguf", out, changed, form="q4_k_m")
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && /bin/cp "$1" "$2"\n', encoding="utf-8")
    program.chmod(0o700)
    write_gguf_model(tmp_path / "base.gguf", out, changed, form="q4_k_m")
    assert {t.tensor_type.name for t in gguf.GGUFReader(out).tensors} == {"F16", "F32"}
    out.unlink()
    program.write_text("#!/bin/sh\necho broken >&2\nexit 3\n", encoding="utf-8")
    with pytest.raises(ExportError, match="llama-quantize failed with status 3: broken"):
        write_gguf_model(tmp_path / "base.gguf", out, changed, form="q4_k_m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "bin"]


def test_what_cannot_be_merged_into_the_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Embeddings, tensors that the base's file does not have, and options that do not go together."""
    model, layout = base_file(tmp_path / "base.gguf")
    embedding = [(trained(model, LoRA(r=2, target_modules=("embed_tokens",))), 1.0)]
    with pytest.raises(ExportError, match="embed_tokens"):
        merged_weights(embedding, layout, lambda site: model.get_submodule(site).weight)
    with pytest.raises(ExportError, match=r"has no tensor blk\.9\.attn_q\.weight"):
        write_gguf_model(
            tmp_path / "base.gguf", tmp_path / "x", {"blk.9.attn_q.weight": lambda: torch.zeros(2)}, form="f32"
        )
    assert not (tmp_path / "x").exists()
    for words, message in (
        (["--to", "peft", "--merged"], "--merged goes with --to gguf"),
        (["--to", "gguf", "--quantize", "q8_0"], "--quantize needs --merged"),
    ):
        assert cli.main(["export", "none", "--out", str(tmp_path / "x"), *words]) == 2
        assert message in capsys.readouterr().err
