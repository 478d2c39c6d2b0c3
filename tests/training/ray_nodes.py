"""A Ray cluster of several nodes on this machine, in namespaces of its own.

    python -m tests.training.ray_nodes NODES COMMAND...     run a command beside such a cluster, in what `inside` makes; exits with its code

Ray replaces 127.0.0.1 by the machine's own address where there is one, and then listens to the network; in a network namespace with the
loopback device only it cannot. In a process namespace every process of the cluster ends with the first one, however that ends, and
other clusters of the machine are left alone. Each node has one CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

ADDRESS = "127.0.0.1:6390"
_STORE = 80_000_000
_NAMESPACES = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def inside(words: Sequence[str], nodes: int = 2, **environment: str) -> list[str]:
    """The command line that runs ``words`` beside a cluster, in namespaces of its own; all ends when the process is killed."""
    return apart([sys.executable, "-m", "tests.training.ray_nodes", str(nodes), *words])


def apart(words: Sequence[str]) -> list[str]:
    """The command line that runs ``words`` in such namespaces, without a cluster."""
    return [*_NAMESPACES, "sh", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "sh", *words]


def possible() -> bool:
    """True if this machine has Ray and lets a user make the namespaces."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    try:
        import ray  # noqa: F401
    except ImportError:
        return False
    return subprocess.run([*_NAMESPACES, "true"], capture_output=True, check=False).returncode == 0


def start(number: int, place: str) -> None:
    """Start one node; the first is the head."""
    role = ["--head", "--port", "6390", "--include-dashboard", "false", "--temp-dir", place]
    role = role if number == 0 else ["--address", ADDRESS]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--num-cpus", "1"]
    command += ["--node-ip-address", "127.0.0.1", "--object-store-memory", str(_STORE), "--num-gpus", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise SystemExit(f"node {number} did not start: {done.stdout}{done.stderr}")


def main() -> int:
    """Start the nodes and run the command; the nodes end with this process, the first of its namespace."""
    if os.getpid() != 1:
        raise SystemExit("a cluster needs namespaces of its own; take the command line of `inside`")
    nodes, words = int(sys.argv[1]), sys.argv[2:]
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_MEMORY_MONITOR": "1",
        "RAY_worker_niceness": "0",  # else workers get little of a busy processor, and start after minutes
        "RAY_memory_monitor_refresh_ms": "0",
    }
    place = tempfile.mkdtemp(prefix="ray")
    before = time.monotonic()
    try:
        for number in range(nodes):
            start(number, place)
        print(f"{nodes} nodes in {time.monotonic() - before:.1f} s", flush=True)
        return subprocess.run(words, check=False).returncode
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
