"""Looking inside adapters: figures against slow definitions, overlaps, intruders, pictures and the report."""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.colors import LogNorm
from tests.compose.made import METHODS, saved, trained
from tests.compose.test_ops import dense, weights_of
from tests.tiny import tiny
from torch import Tensor, nn

from veneer.adapters import Adapter, DoRA, LoRA
from veneer.analysis.intruders import find_intruders, reduce_intruders
from veneer.analysis.plots import HEAT_MAPS, figures, write_plots
from veneer.analysis.report import html_report
from veneer.analysis.spectra import adapter_spectra, pearson, position_of
from veneer.analysis.subspace import phi
from veneer.checkpoints import attach, read_adapter, write_adapter
from veneer.cli._spectra import add_spectra_arguments, run_spectra, spectra_requested
from veneer.cli.main import main
from veneer.errors import ComposeError

SITE = "model.layers.1.mlp.up_proj"
FEW = ("q_proj", "up_proj")
"""Modules of adapters whose pictures are drawn: a picture of all modules takes seven times as long."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A tiny base."""
    return tiny("llama")


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64, generator=generator)).Q


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_figures_are_their_definitions(model: nn.Module, method: str) -> None:
    """Singular values, ranks, ratio, amplification, magnitude and direction change are those of the dense matrices."""
    adapter = trained(model, METHODS[method])
    found = adapter_spectra(adapter, weights_of(model))
    site = next(entry for entry in found.sites if entry.site == SITE)
    base, change = weights_of(model)(SITE).double(), dense(adapter, SITE, model)
    u, s, vt = torch.linalg.svd(change, full_matrices=False)
    count = len(site.singular_values)
    assert count == (min(change.shape) if method == "dora" else adapter.rank(SITE))
    assert torch.allclose(torch.tensor(site.singular_values).double(), s[:count], rtol=1e-4)
    assert site.norm == pytest.approx(float(change.norm()), rel=1e-5)
    assert site.stable_rank == pytest.approx(float(change.norm() / s[0]) ** 2, rel=1e-5)
    p = s[:count] / s[:count].sum()
    assert site.effective_rank == pytest.approx(math.exp(float(-(p * p.log()).sum())), rel=1e-4)
    assert site.ratio == pytest.approx(float(change.norm() / base.norm()), rel=1e-5)
    rank = adapter.rank(SITE)
    inside = u[:, :rank].T @ base @ vt[:rank].T
    assert site.amplification == pytest.approx(float(change.norm() / inside.norm()), rel=1e-3)
    after = base + change
    assert site.magnitude_change == pytest.approx(float((after.norm(dim=1) - base.norm(dim=1)).abs().mean()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(after, base, dim=1)
    assert site.direction_change == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
    assert (site.block, site.module) == (1, "mlp.up_proj")


def test_known_spectra() -> None:
    """r equal values have stable and effective rank r; one value has rank one; correlation and names are as defined."""
    from veneer.analysis.spectra import effective_rank, stable_rank

    even, single = torch.ones(5, dtype=torch.float64), torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    assert (stable_rank(even), effective_rank(even)) == (pytest.approx(5), pytest.approx(5))
    assert (stable_rank(single), effective_rank(single)) == (1, 1)
    assert stable_rank(torch.zeros(3)) == effective_rank(torch.zeros(3)) == 0
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1) and pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert pearson([1, 2], [1, 2]) is None and pearson([1, 1, 1], [1, 2, 3]) is None
    assert position_of("transformer.h.11.attn.c_attn") == (11, "attn.c_attn") and position_of("lm_head") == (
        None,
        "lm_head",
    )


def test_phi_is_a_similarity() -> None:
    """phi lies in [0, 1], is 1 for a space and itself and for one inside the other, symmetric, blind to rotations inside a span, and at
    chance level max(i, j) / n for strangers."""
    a, b = orthonormal(200, 12, 0), orthonormal(200, 20, 1)
    same = phi(a, a)
    assert torch.allclose(same.diagonal(), torch.ones(12, dtype=torch.float64)) and torch.allclose(
        same, torch.ones_like(same)
    )
    table = phi(a, b)
    assert table.shape == (12, 20) and bool(((table >= 0) & (table <= 1)).all())
    assert torch.allclose(table, phi(b, a).T)
    turned = a @ orthonormal(12, 12, 2)
    assert float(phi(turned, b)[-1, -1]) == pytest.approx(float(table[-1, -1]))
    assert float(table[-1, -1]) == pytest.approx(20 / 200, rel=0.35)
    for i, j in ((1, 1), (3, 7), (12, 5)):
        slow = float((a[:, :i].T @ b[:, :j]).square().sum()) / min(i, j)
        assert float(table[i - 1, j - 1]) == pytest.approx(slow)


def test_overlaps_of_adapters(model: nn.Module) -> None:
    """An adapter overlaps itself wholly; one with the same A shares what is read and not what is written; strangers are at chance."""
    a = trained(model, name="a")
    shared = trained(model, LoRA(r=4), name="shared", seed=5)
    with torch.no_grad():
        for site, own in shared.tensors.items():
            own["lora_A"].copy_(a.tensors[site]["lora_A"])
    itself = adapter_spectra(a, against=a).subspaces[SITE]
    assert itself.whole_in == itself.whole_out == pytest.approx(1) and itself.cosine == pytest.approx(1)
    assert itself.phi_in[0][0] == pytest.approx(1)
    half = adapter_spectra(a, against=shared).subspaces[SITE]
    assert half.whole_in == pytest.approx(1) and half.whole_out < 0.5
    strangers = [
        adapter_spectra(a, against=trained(model, name="s", seed=seed)).subspaces[SITE] for seed in range(20, 40)
    ]
    mean = sum(pair.whole_out for pair in strangers) / len(strangers)
    assert mean == pytest.approx(strangers[0].chance_out, rel=0.3)
    other = trained(model, METHODS["dora"], name="d")
    mixed = adapter_spectra(a, weights_of(model), against=other).subspaces[SITE]
    one, two = dense(a, SITE, model), dense(other, SITE, model)
    assert mixed.cosine == pytest.approx(float((one * two).sum() / (one.norm() * two.norm())), abs=1e-5)
    assert (len(mixed.phi_in), len(mixed.phi_in[0])) == (4, 3)


def test_the_base_is_compared_with_where_that_is_asked_for(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An overlap of DoRA adapters needs the base's weights and does not decompose them; --base and --spectra do. Adapters of one seed
    are told apart from learnt overlap."""
    saved(tmp_path / "base")
    for name, seed, recorded in (("a", 1, 0), ("b", 2, 0), ("c", 3, 7)):
        adapter = trained(model, METHODS["dora"], name=name, seed=seed)
        adapter.seed = recorded
        write_adapter(adapter, tmp_path / name, base_name=str(tmp_path / "base"))
    command = ["inspect", f"{tmp_path}/a", "--against"]
    for other, more, compared, one_seed in (
        ("b", [], False, True),
        ("c", [], False, False),
        ("b", ["--spectra"], True, True),
        ("c", ["--base", f"{tmp_path}/base"], True, False),
    ):
        assert main([*command, f"{tmp_path}/{other}", *more]) == 0
        shown = capsys.readouterr().out
        assert "phi read" in shown and ("intruders" in shown) == compared
        assert ("initialised from one seed" in shown) == one_seed


def planted(rows: int = 64, columns: int = 48, size: float = 3.0, count: int = 2) -> tuple[Tensor, Tensor]:
    """A base that is strong in some directions, and a change that is strong in others, where the base does little."""
    u, v = orthonormal(rows, columns, 1), orthonormal(columns, columns, 2)
    values = torch.linspace(2.0, 0.1, columns, dtype=torch.float64)
    base = u @ torch.diag(values) @ v.T
    fresh = orthonormal(rows, count, 3) - u @ (u.T @ orthonormal(rows, count, 3))
    return base, size * torch.linalg.qr(fresh).Q @ orthonormal(columns, count, 4).T


def test_planted_intruders_are_found() -> None:
    """Strong directions that the base lacks are found at their places; a base has none against itself, nor after a change along it."""
    base, change = planted()
    found = find_intruders(base, base + change)
    assert found.count == 2 and set(found.indices) == {0, 1}
    assert find_intruders(base, base).count == 0 and find_intruders(base, 1.5 * base).count == 0
    assert min(find_intruders(base, base).cosines) == pytest.approx(1)
    assert find_intruders(base, base + 0.01 * change).count == 0
    assert len(found.cosines) == 10 and find_intruders(base, base + change, top_k=1).count == 1
    assert find_intruders(torch.zeros(4, 3), torch.eye(4, 3)).count == 3


def test_reducing_intruders(model: nn.Module) -> None:
    """Each intruder's singular value falls to the share that is kept, other directions stay; with none there is nothing to do."""
    adapter = trained(model, LoRA(r=2, target_modules=("down_proj",)))
    weights = weights_of(model)
    with torch.no_grad():
        for site, own in adapter.tensors.items():
            u = torch.linalg.svd(weights(site)).U
            own["lora_B"].copy_(4 * (u @ torch.ones(u.shape[1], 2) + 0.1 * own["lora_B"]))
    before = adapter_spectra(adapter, weights, threshold=0.6)
    assert before.intruders
    for site in adapter.tensors:
        tuned = weights(site).double() + dense(adapter, site, model)
        u, s, vt = torch.linalg.svd(tuned, full_matrices=False)
        places = list(find_intruders(weights(site).double(), tuned, threshold=0.6).indices)
        assert places
        wanted = s.clone()
        wanted[places] *= 0.3
        made = reduce_intruders(adapter, weights, keep=0.3, threshold=0.6).adapter
        assert made.rank(site) == 2 + len(places)
        assert torch.allclose(weights(site).double() + dense(made, site, model), u @ torch.diag(wanted) @ vt, atol=1e-5)
    quiet = trained(model, size=1e-4)
    with pytest.raises(ComposeError, match="has no intruder"):
        reduce_intruders(quiet, weights)
    with pytest.raises(ComposeError, match="keep: expected"):
        reduce_intruders(adapter, weights, keep=1.0)
    with pytest.raises(ComposeError, match="threshold: expected"):
        find_intruders(torch.eye(3), torch.eye(3), threshold=0)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag in ("path", "--base"):
        parser.add_argument(flag)
    parser.add_argument("--force", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    add_spectra_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A base and two adapters of it, a LoRA and a DoRA."""
    bank = attach(saved(tmp_path / "base"))
    methods = {"lora": LoRA(r=4, lora_alpha=8, target_modules=FEW), "dora": DoRA(r=3, lora_alpha=6, target_modules=FEW)}
    for seed, (name, method) in enumerate(methods.items()):
        bank.insert(trained(saved(tmp_path / "twin"), method, name=name, seed=seed, size=0.3))
        bank.save(name, tmp_path / name, base_name=str(tmp_path / "base"))
    return tmp_path


def test_from_the_command_line(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables without and with the base, JSON, pictures and the page; a reduced adapter that loads onto the base."""
    assert not spectra_requested(parsed(str(made / "lora")))
    assert run_spectra(parsed(str(made / "lora"), "--spectra")) == 0
    plain = capsys.readouterr().out
    assert "stable rank" in plain and "intruders" not in plain
    words = [str(made / "lora"), "--base", str(made / "base"), "--against", str(made / "dora")]
    assert spectra_requested(parsed(*words)) and run_spectra(parsed(*words, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["against"] == "dora" and len(found["sites"]) == 4 and found["intruders"] >= 0
    assert found["one_seed"] is False and len(found["subspaces"]) == 4
    assert run_spectra(parsed(*words, "--html", f"{made}/r/page.html", "--plots", f"{made}/plots")) == 0
    assert "amplification" in capsys.readouterr().out
    names = {file.stem for file in (made / "plots").glob("*.svg")}
    assert names == {file.stem for file in (made / "plots").glob("*.png")}
    assert names >= {"spectra", "norm", "ratio", "intruders", "overlap", "magnitudes", "stable_rank"}
    assert (made / "plots" / "spectra.png").read_bytes().startswith(b"\x89PNG")
    assert run_spectra(parsed(str(made / "dora"), "--reduce-intruders", f"{made}/less", "--threshold", "0.9")) == 0
    assert "intruder dimensions at" in capsys.readouterr().out
    bank = attach(saved(made / "again"))
    receipt = bank.load(made / "less", name="less").meta["receipt"]
    assert receipt["made_by"]["operation"] == "reduce_intruders" and receipt["parents"][0]["name"] == "dora"


def test_the_page_stands_alone(model: nn.Module) -> None:
    """The report loads nothing, runs nothing, escapes names, and is the same each time."""
    adapter = trained(model, DoRA(r=3, target_modules=FEW), name="a.b")
    other = trained(model, LoRA(r=4, target_modules=FEW), name="other", seed=3)
    spectra = adapter_spectra(adapter, weights_of(model), against=other)
    object.__setattr__(spectra, "name", "<b>&")
    page = html_report(spectra)
    assert page == html_report(spectra)
    assert not re.findall(r"<script|<link|<img|@import|src=|url\((?!#)", page)
    assert "width=device-width" in page and "overflow-x:auto" in page
    assert page.count("<svg") >= 8 and "Against other" in page and page.rstrip().endswith("</html>")
    assert "Correlation of direction and magnitude change" in page
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page


def test_pictures_can_be_read(model: nn.Module) -> None:
    """Axes count from one in whole numbers, every colour bar says what it measures, counts begin at zero even where there is nothing to
    count, one outlier does not make all other sites one colour, and of hundreds of singular values the first are seen."""
    method = DoRA(r=8, lora_alpha=2)
    spectra = adapter_spectra(
        trained(model, method, size=1e-4), weights_of(model), against=trained(model, name="b", seed=3)
    )
    assert spectra.intruders == 0
    made = figures(spectra)
    panels = [axes for axes in made["overlap"].axes if axes.images]
    assert len(panels) == 14
    assert {tuple(axes.images[0].get_extent()) for axes in panels} == {(0.5, 4.5, 0.5, 8.5)}
    assert all(tick == round(tick) for axes in panels for tick in (*axes.get_xticks(), *axes.get_yticks()))
    assert all(made[key].axes[1].get_ylabel() for key in HEAT_MAPS)
    assert made["intruders"].axes[0].images[0].get_clim() == (0, 1)
    assert made["spectra"].axes[0].get_xscale() == "linear"
    first, *others = spectra.sites
    far = replace(spectra, sites=(replace(first, norm=1e3, singular_values=(1.0,) * 200), *others))
    assert isinstance(figures(far)["norm"].axes[0].images[0].norm, LogNorm)
    assert figures(far)["spectra"].axes[0].get_xscale() == "log"


def test_without_matplotlib(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are refused with the way to get them; the page has its tables and says so, and whether two adapters began alike."""
    import builtins

    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    spectra = adapter_spectra(trained(model))
    pair = adapter_spectra(trained(model), against=trained(model, name="other", seed=3))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ComposeError, match=r"pip install 'veneer\[plot\]'"):
        write_plots(spectra, tmp_path)
    page = html_report(spectra)
    assert "There are no plots" in page and "<svg" not in page and page.count("<table") == 2
    assert not pair.one_seed and "initialised from one seed" not in html_report(pair)
    assert "initialised from one seed" in html_report(replace(pair, one_seed=True))


def test_a_folder_is_enough(made: Path) -> None:
    """Without a model a LoRA folder shows its spectra; DoRA asks for its base in one sentence."""
    assert adapter_spectra(read_adapter(made / "lora")).sites
    with pytest.raises(ComposeError, match="depends on the base weights"):
        adapter_spectra(read_adapter(made / "dora"))
    assert isinstance(read_adapter(made / "lora"), Adapter)
