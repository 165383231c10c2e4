"""Per-image outcomes as bitmaps: one bit an image, small enough to keep for ever.

They make the worst case over any set of attacks exact and methods comparable image by image.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Outcomes = NDArray[np.bool_]


def pack(outcomes: Sequence[bool] | Outcomes) -> str:
    """Return outcomes as base64 of their bits, first image first, padded with zeros."""
    return base64.b64encode(np.packbits(np.asarray(outcomes, dtype=bool)).tobytes()).decode()


def unpack(text: str, count: int) -> Outcomes:
    """Return ``count`` outcomes from what ``pack`` made.

    Raises:
        ValueError: If the text is not base64, has another length, or a bit is set in the padding.
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8))
    if len(bits) != -(-count // 8) * 8:
        raise ValueError(f"a bitmap of {len(bits)} bits for {count} images")
    if bits[count:].any():
        raise ValueError(f"a bitmap with bits set after its {count} images")
    return bits[:count].astype(bool)
