"""Addresses and seeds: hashes of what decides a result, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def derive(*parts: Any) -> int:
    """Return a seed in [0, 2**63) that depends on every part and on nothing else."""
    return int(digest(parts)[:16], 16) >> 1
