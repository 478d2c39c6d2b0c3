"""The calculated costs on many GPUs: the simulation is sound, and the page states what it assumes."""

from __future__ import annotations

import pytest
from docs.scripts import scaling

from veneer.training.cluster import driver


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> scaling.BaseModel:
    """The smaller base, on 1 and 8 GPUs."""
    monkeypatch.setattr(scaling, "GPUS", (1, 8))
    monkeypatch.setattr(driver, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(scaling, "BASES", {"Qwen3-1.7B": scaling.BASES["Qwen3-1.7B"]})
    return scaling.bases()[0]


def test_one_job(base: scaling.BaseModel) -> None:
    """A step on eight GPUs takes about an eighth of one on one GPU; a step of few pieces cannot use them."""
    assert base.trained == 17_432_576  # rank 16 at all linear layers of this base
    alone, eight = scaling.one_job(base, 2048)
    assert alone[3:5] == ["0.0 ms", "100%"] and 95 <= int(eight[4].rstrip("%")) <= 100
    assert scaling.one_job(base, 8)[1][5] == "a step has 1 pieces"


def test_many_jobs(base: scaling.BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without losses one worker has no idle time; with many, work is done again and all jobs still end."""
    monkeypatch.setattr(scaling, "RATES", scaling.Rates(lost_every=1e12))
    alone, eight = scaling.many_jobs(base, 16, 500)
    assert (alone[4], alone[5], alone[6]) == ("100%", "0", "0.0%") and 50 <= int(eight[4].rstrip("%")) <= 100
    monkeypatch.setattr(scaling, "RATES", scaling.Rates(lost_every=0.5, checkpoint=60.0))
    alone, eight = scaling.many_jobs(base, 16, 500)
    assert int(alone[5]) > 0 and float(alone[6].rstrip("%")) > 0


def test_the_page_states_the_rates() -> None:
    """The assumptions on the page are those of the script."""
    page, rates = scaling.PAGE.read_text(encoding="utf-8"), scaling.RATES
    for stated in (
        f"{rates.product / 1e12:g} TFLOP/s",
        f"{rates.memory / 1e9:g} GB",
        f"{rates.inside / 1e9:g} GB/s, {rates.between / 1e9:g} GB/s for each GPU; {rates.hop * 1e6:g} us",
        f"{rates.reading / 1e9:g} GB/s for each worker",
        f"{rates.price:g} $",
        f"one in {rates.lost_every:g} GPU-hours",
        f"after {rates.noticing:g} s; a checkpoint every {rates.checkpoint / 60:g} minutes",
    ):
        assert stated in page
    assert page.count("| 1,000 |") == 4
