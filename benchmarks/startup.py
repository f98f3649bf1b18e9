"""How long ``evalsuite --help`` takes, and that it loads no torch."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

PROBE = """
import sys
sys.argv = ["evalsuite", "--help"]
from evalsuite.cli import main
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules, file=sys.stderr)
"""


def run(repeats: int = 7) -> dict[str, Any]:
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
        took.append(time.perf_counter() - began)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    bare = time.perf_counter() - began
    return {
        "name": "evalsuite --help", "seconds": min(took), "bare_interpreter_s": bare, "goal": "< 0.3 s",
        "torch_loaded": probe.stderr.strip().endswith("True"),
    }  # fmt: skip
