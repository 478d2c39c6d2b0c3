"""What refusing large hostile files costs, by the process's own memory: nothing is read before the header is known to fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process's memory is told by Linux only"
)

WORK = r"""
import hashlib, json, sys, time
from pathlib import Path
import torch
import veneer
from tests.checkpoints.helpers import config, file_bytes, make_folder, tensor_bytes
from veneer.errors import CheckpointError
from veneer.models.tiny import tiny

torch.set_num_threads(1)
place, making = Path(sys.argv[1]), sys.argv[2] == "make"
WIDE = 1024
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def tensors(dtype=torch.float32):
    made = {}
    for layer in range(2):
        for name in NAMES:
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            made[f"{path}.lora_A.weight"] = torch.full((WIDE, WIDE), 1e-3, dtype=dtype)
            made[f"{path}.lora_B.weight"] = torch.full((WIDE, WIDE), 1e-3, dtype=dtype)
    return made


def put(name, data, **settings):
    make_folder(place / name, data, config(r=WIDE, lora_alpha=8, target_modules=list(NAMES), **settings))


def last(value, dtype=torch.float32):
    made = tensors(dtype)
    made[list(made)[-1]][-1, -1] = value
    return tensor_bytes(made)


def narrow():
    made = tensors()
    made[list(made)[-1]] = made[list(made)[-1]][:, :-1].contiguous()
    return tensor_bytes(made)


def sparse(name, header, size):
    put(name, b"")
    with (place / name / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CLAIMS = {Q0: {"dtype": "F32", "shape": [1024, 1 << 28], "data_offsets": [0, 1 << 40]}}
STRAY = {"base_model.model.model.norm.weight": torch.ones(WIDE)}
AT_ONCE = {
    "a header of 100 MB": lambda name: sparse(name, b" " * (100 << 20), 0),
    "a million empty tensors": lambda name: put(name, file_bytes({str(i): EMPTY for i in range(1_000_000)})),
    "a terabyte that its header claims": lambda name: sparse(name, json.dumps(CLAIMS).encode(), 1 << 40),
    "one wrong shape in 64 MB": lambda name: put(name, narrow()),
    "a byte too many behind 64 MB": lambda name: put(name, tensor_bytes(tensors()) + b"x"),
    "64 MB for another rank": lambda name: put(name, tensor_bytes(tensors()), rank_pattern={"q_proj": 4}),
    "64 MB of a part of the base": lambda name: put(name, tensor_bytes(tensors()), init_lora_weights="pissa"),
    "64 MB with a stray tensor": lambda name: put(name, tensor_bytes({**tensors(), **STRAY})),
}
AFTER_READING = {
    "a last number that is NaN": lambda name: put(name, last(float("nan"))),
    "the same in bf16": lambda name: put(name, last(float("nan"), torch.bfloat16)),
    "a change without proportion": lambda name: put(name, last(1e30)),
}
if making:
    for name, make in (AT_ONCE | AFTER_READING).items():
        make(name)
    raise SystemExit


def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def bits():
    total = hashlib.sha256()
    for name, value in base.state_dict().items():
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


base = tiny("llama", hidden_size=WIDE, num_attention_heads=8, num_key_value_heads=8, intermediate_size=64)
bank = veneer.attach(base)
before = bits()
put("warm", tensor_bytes({Q0: torch.ones(1, 1)}))
try:
    bank.load(place / "warm")
except CheckpointError:
    pass
found = {}
for name in (AT_ONCE | AFTER_READING):
    size = (place / name / "adapter_model.safetensors").stat().st_size
    open("/proc/self/clear_refs", "w").write("5")
    held, start = status("VmRSS"), time.process_time()
    try:
        bank.load(place / name, name="x")
        said = ""
    except CheckpointError as error:
        said = str(error)
    seconds = time.process_time() - start
    found[name] = [name in AT_ONCE, size, status("VmHWM") - held, seconds, said[-300:]]
assert bits() == before and bank.names == []
print(json.dumps(found))
"""


def test_large_hostile_files_cost_little(tmp_path: Path) -> None:
    """Refused on the header: under 50 ms and 10 MB, whatever the file's size. Refused on its numbers: below twice the file."""
    for mode in ("make", "measure"):  # in two processes, so that what making them took cannot be used again
        command = [sys.executable, "-c", WORK, str(tmp_path), mode]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (at_once, size, memory, seconds, said) in found.items():
        print(f"{name}: {size / 1e6:,.0f} MB, {memory / 1e6:.1f} MB more, {1000 * seconds:.1f} ms: {said[:80]}")
        assert said, name
        if at_once:
            assert seconds < 0.05 and memory < 10 << 20, name
        else:
            assert memory < 2 * size, name
