"""Imports that are put off."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, sys
from pathlib import Path
from rdd_bench.lazy import imported_on_use

folder = sys.argv[1]
sys.path.insert(0, folder)
for name in ("first", "second", "third"):
    Path(folder, f"{name}.py").write_text("import torch\\ndef one(): return torch.ones(1)\\n")

def loaded():
    return "torch.nn" in sys.modules

with imported_on_use("torch"):
    import first, second
    assert not loaded(), "importing it loaded it"
assert "torch" not in sys.modules, "the stand-in stayed behind"

assert first.one().item() == 1, "using it does not give the real one"
assert loaded()
import torch
assert type(torch).__name__ == "module", type(torch)
assert second.one().item() == 1, "the second stand-in does not become the real one"
assert first.torch.Tensor is torch.Tensor

with imported_on_use("torch"):
    import third
    assert third.torch is torch, "what is loaded already is used as it is"
assert sys.modules["torch"] is torch

with imported_on_use("no_such_module"):
    import no_such_module
try:
    no_such_module.anything
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("a missing module must be missed when it is used")
"""

# The standard library serves where only the moment matters: it costs nothing to load.
USED_INSIDE = """
import sys
from rdd_bench.lazy import imported_on_use

try:
    with imported_on_use("wave"):
        import wave
        assert wave.open
        assert type(sys.modules["wave"]).__name__ == "module", "use inside does not load it"
        raise KeyError
except KeyError:
    pass
assert type(sys.modules["wave"]).__name__ == "module", "the real one was thrown away"

try:
    with imported_on_use("colorsys"):
        raise KeyError
except KeyError:
    pass
assert "colorsys" not in sys.modules, "an exception left the stand-in behind"
"""


def test_a_module_is_loaded_when_it_is_used_and_not_before(tmp_path):
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True, timeout=120)


def test_use_inside_the_context_and_exceptions_leave_the_real_module():
    subprocess.run([sys.executable, "-c", USED_INSIDE], check=True, timeout=60)
