"""The machine: its description, threads and memory. Linux only."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PEERS = {"pytorch-metric-learning": "pytorch_metric_learning", "faiss-cpu": "faiss"}  # package: module


def use_threads(threads):
    """Set the number of threads of PyTorch and, if installed, faiss."""
    torch.set_num_threads(threads)
    if installed("faiss-cpu"):
        import faiss

        faiss.omp_set_num_threads(threads)


def installed(package):
    """Return whether a peer is installed."""
    return find_spec(PEERS[package]) is not None


def waiting(device):
    """Return a function that waits until a device has finished all queued work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def described(device, threads):
    """Return the processor, device, threads and versions, by name."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ("torch", "numpy", *PEERS)
    return {
        "processor": model[1] if model else platform.machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    } | {package: _version(package) for package in packages}


def available(device):
    """Return the free memory in bytes."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else _kilobytes("/proc/meminfo", "MemAvailable")


def resident(device):
    """Return the bytes in use by this process; on a GPU, the bytes of its tensors."""
    return torch.cuda.memory_allocated() if device == "cuda" else _kilobytes("/proc/self/status", "VmRSS")


def highest(device):
    """Return the peak memory of this process in bytes.

    This is not `ru_maxrss`, which a child process inherits from its parent.
    """
    return torch.cuda.max_memory_allocated() if device == "cuda" else _kilobytes("/proc/self/status", "VmHWM")


def apart(module, threads, **arguments):
    """Run a module of this package in a fresh process, with arguments as JSON, and return the JSON it prints.

    If the process fails or is killed, for example for lack of memory, return the reason as a string, so that the other
    figures are not lost.
    """
    command = [sys.executable, "-m", module, json.dumps(arguments | {"threads": threads})]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    if done.returncode:
        return (done.stderr.strip() or f"failed with exit code {done.returncode}").splitlines()[-1]
    return json.loads(done.stdout)


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _kilobytes(path, name):
    """Return a kilobyte entry of a /proc file, in bytes."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path(path).read_text())[1]) * 1024
