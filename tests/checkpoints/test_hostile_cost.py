"""What refusing large hostile files costs, by the process's own memory and time: the header costs nothing, whatever the file's size, and
what only the numbers show costs one pass over them, of which nothing is kept."""

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
from tests.checkpoints.helpers import config, make_folder, tensor_bytes
from veneer.errors import CheckpointError
from tests.tiny import tiny

torch.set_num_threads(1)
place, making = Path(sys.argv[1]), sys.argv[2] == "make"
WIDE = 768
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


WHOLE = tensor_bytes(tensors()) if making else b""


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


def million():
    empty = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    return ("{" + ", ".join(f'"{number}": {empty}' for number in range(1_000_000)) + "}").encode()


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
CLAIMS = {Q0: {"dtype": "F32", "shape": [1024, 1 << 28], "data_offsets": [0, 1 << 40]}}
STRAY = {"base_model.model.model.norm.weight": torch.ones(WIDE)}
AT_ONCE = {
    "a header of 100 MB": lambda name: sparse(name, b" " * (100 << 20), 0),
    "a million empty tensors": lambda name: sparse(name, million(), 0),
    "a terabyte that its header claims": lambda name: sparse(name, json.dumps(CLAIMS).encode(), 1 << 40),
    "one wrong shape in 38 MB": lambda name: put(name, narrow()),
    "a byte too many behind 38 MB": lambda name: put(name, WHOLE + b"x"),
    "38 MB for another rank": lambda name: put(name, WHOLE, rank_pattern={"q_proj": 4}),
    "38 MB of a part of the base": lambda name: put(name, WHOLE, init_lora_weights="pissa"),
    "38 MB with a stray tensor": lambda name: put(name, tensor_bytes({**tensors(), **STRAY})),
}
IN_ONE_PASS = {
    "a last number that is NaN": lambda name: put(name, last(float("nan"))),
    "the same in bf16": lambda name: put(name, last(float("nan"), torch.bfloat16)),
    "a change without proportion": lambda name: put(name, last(1e30)),
    "the receipt of another base": lambda name: elsewhere(name),
}


def model():
    return tiny("llama", hidden_size=WIDE, num_attention_heads=8, num_key_value_heads=8, intermediate_size=64)


def elsewhere(name):
    other = model()
    for parameter in other.parameters():
        parameter.data.mul_(1.3)
    theirs = veneer.attach(other)
    theirs.add("a", veneer.LoRA(r=WIDE, target_modules=NAMES))
    for parameter in theirs.parameters("a"):
        parameter.data.fill_(1e-3)
    theirs.save("a", place / name)


if making:
    for name, make in (AT_ONCE | IN_ONE_PASS).items():
        make(name)
    raise SystemExit


def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def bits():
    total = hashlib.sha256()
    for name, value in base.state_dict().items():
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def refused(name):
    start = time.process_time()
    try:
        bank.load(place / name, name="x")
        said = ""
    except CheckpointError as error:
        said = str(error)
    return time.process_time() - start, said


def plainly(path):
    # Reads a file through a small buffer and asks for the largest number; says how much of the processor that took.
    start = time.process_time()
    buffer = bytearray(1 << 20)
    numbers = torch.frombuffer(buffer, dtype=torch.bfloat16 if "bf16" in str(path) else torch.float32)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            numbers.amax()
    return time.process_time() - start


base = model()
bank = veneer.attach(base)
before = bits()
put("warm", tensor_bytes({Q0: torch.ones(1, 1)}))
refused("warm")
found = {}
for name in (AT_ONCE | IN_ONE_PASS):
    path = place / name / "adapter_model.safetensors"
    open("/proc/self/clear_refs", "w").write("5")
    held = status("VmRSS")
    seconds, said = refused(name)
    memory = status("VmHWM") - held
    plain = None
    if name in IN_ONE_PASS:  # in turn, so that both see the same machine
        times = [(refused(name)[0], plainly(path)) for _ in range(7)]
        seconds, plain = (min(column) for column in zip(*times))
    found[name] = [path.stat().st_size, memory, seconds, plain, said[-300:]]
assert bits() == before and bank.names == []
print(json.dumps(found))
"""


def test_large_hostile_files_cost_little(tmp_path: Path) -> None:
    """Every refusal takes under 50 ms and 16 MB, whatever the file's size; for its numbers little more than reading them once."""
    for mode in ("make", "measure"):  # in two processes, so that what making them took cannot be used again
        command = [sys.executable, "-c", WORK, str(tmp_path), mode]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, (size, memory, seconds, plain, said) in found.items():
        beside = "" if plain is None else f", read plainly {1000 * plain:.1f} ms"
        print(f"{name}: {size / 1e6:,.0f} MB, {memory / 1e6:.1f} MB more, {1000 * seconds:.1f} ms{beside}: {said[:80]}")
        assert said, name
        assert memory < 16 << 20, name
        # A second pass over the numbers is beyond the allowance, and fresh memory to keep them in far beyond it.
        assert seconds < (0.05 if plain is None else (2.5 * plain + 0.001)), name
