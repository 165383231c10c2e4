"""The commands around a run: what they show, and that they answer at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import plugin  # type: ignore[import-not-found]
