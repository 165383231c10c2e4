"""What a result was made with: machine, versions, flags. Never part of an address."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rdd_bench import __version__

PACKAGES = (
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "pyautoattack",
    "autoattack",
    "scikit-learn",
    "pluggy",
    "pydantic",
    "safetensors",
)


def describe_environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Return the facts that a reader of a number needs; JSON values only."""
    return {
        "rdd_bench": __version__,
        "git": _git_state(),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "device": device_name(device),
        "cpu_threads": threads,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "packages": _versions(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": bool(torch.backends.cudnn.allow_tf32) if device.type == "cuda" else None,
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's model and how many cores there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} ({os.cpu_count()} cores)"


@cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


@cache
def _git_state() -> dict[str, Any] | None:
    """Return commit and dirtiness of the source checkout, None for an installed package."""
    here = str(Path(__file__).parent)
    # Without this check an installed copy inside somebody's repository would report that one.
    if _output("git", "-C", here, "ls-files", "--error-unmatch", __file__) is None:
        return None
    commit = _output("git", "-C", here, "rev-parse", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
