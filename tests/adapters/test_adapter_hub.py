"""Bottleneck adapters beside AdapterHub's own package, which needs another transformers and so an environment of its own.

ADAPTER_HUB_PYTHON names its interpreter:

    python3 -m venv .venv-adapters && .venv-adapters/bin/pip install torch adapters==1.3.0
    ADAPTER_HUB_PYTHON=.venv-adapters/bin/python python -m pytest -m slow tests/adapters/test_adapter_hub.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny

from veneer.adapters import Houlsby, Method, Pfeiffer, attach
from veneer.adapters.layers.roles import FEED_FORWARD_OUTPUT

PYTHON = os.environ.get("ADAPTER_HUB_PYTHON", "")
IDS = torch.arange(3, 21).reshape(2, 9)
THEIRS = """
import json, sys
import adapters, torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

folder, kind, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = BertModel.from_pretrained(folder).eval()
adapters.init(model)
model.add_adapter("a", config=getattr(adapters, kind)(**settings))
model.set_active_adapters("a")
given = load_file(folder + "/given.safetensors")
with torch.no_grad():
    own = {name: value for name, value in model.named_parameters() if ".adapters.a." in name}
    assert set(own) == set(given), (sorted(own), sorted(given))
    for name, value in own.items():
        value.copy_(given[name])
    found = model(input_ids=torch.tensor(json.loads(sys.argv[4]))).last_hidden_state
save_file({"found": found.contiguous()}, folder + "/found.safetensors")
"""
"""Their model with our tensors under their names."""
PLACES = {
    "adapter_down": "adapter_down.0.weight",
    "adapter_down_bias": "adapter_down.0.bias",
    "adapter_up": "adapter_up.weight",
    "adapter_up_bias": "adapter_up.bias",
}


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="ADAPTER_HUB_PYTHON is not set")
@pytest.mark.parametrize(
    ("method", "kind", "settings"),
    [
        (Houlsby(bottleneck_size=4), "DoubleSeqBnConfig", {}),
        (Houlsby(bottleneck_size=4, non_linearity="relu"), "DoubleSeqBnConfig", {"non_linearity": "relu"}),
        # without the setting their adapter reads the normalised sum of the layer's output and the residual
        (Pfeiffer(bottleneck_size=4), "SeqBnConfig", {"original_ln_before": False}),
    ],
)
def test_outputs_are_those_of_adapter_hub(
    method: Method, kind: str, settings: dict[str, object], tmp_path: Path
) -> None:
    """The same tensors give the same hidden states to 1e-5, and other ones than the base's."""
    model = tiny("bert").base_model
    model.save_pretrained(tmp_path)
    bank = attach(model)
    generator = torch.Generator().manual_seed(0)
    adapter = bank.add("a", method)
    given = {}
    with torch.no_grad():
        plain = model(input_ids=IDS).last_hidden_state
        for site, key, value in adapter.named_tensors():
            value.normal_(0, 0.3, generator=generator)
            place = site.removesuffix(".dense")  # the module that holds the layer holds the adapter
            given[f"{place}.adapters.a.{PLACES[key]}"] = value.detach().clone()
        with bank.use("a"):
            ours = model(input_ids=IDS).last_hidden_state
    assert len(given) == 4 * 2 * (1 if method.roles == (FEED_FORWARD_OUTPUT,) else 2)  # type: ignore[attr-defined]
    save_file(given, tmp_path / "given.safetensors")
    settings = {"reduction_factor": 8, **settings}
    words = [PYTHON, "-c", THEIRS, str(tmp_path), kind, json.dumps(settings), json.dumps(IDS.tolist())]
    subprocess.run(words, check=True, timeout=600)
    theirs = load_file(tmp_path / "found.safetensors")["found"]
    assert (ours - theirs).abs().max() < 1e-5 and (ours - plain).abs().max() > 0.1
