"""How long ``evalsuite --help`` takes, and ``evalsuite list``, which loads every plugin; and what torch alone would."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

PROBE = """
import sys
sys.argv = ["evalsuite", *{words!r}]
from evalsuite.cli import main
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules, file=sys.stderr)
"""


def run(repeats: int = 7) -> Iterator[dict[str, Any]]:
    bare, torch = _fastest("pass", repeats), _fastest("import torch", repeats)
    for words, goal in ((["--help"], "< 0.3 s"), (["list"], "a fifth of torch's import")):
        took = _fastest(PROBE.format(words=words), repeats)
        yield {
            "name": f"evalsuite {' '.join(words)}", "seconds": took[0], "cpu_s": took[1], "bare_interpreter_s": bare[0],
            "import_torch_cpu_s": torch[1], "of_torch": took[1] / torch[1], "goal": goal, "torch_loaded": took[2],
        }  # fmt: skip


def _fastest(code: str, repeats: int) -> tuple[float, float, bool]:
    """The least seconds and seconds of the processor that a new interpreter takes, and whether it says True."""
    took = []
    for _ in range(repeats):
        began, before = time.perf_counter(), _children()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        took.append((time.perf_counter() - began, _children() - before))
    return min(t for t, _ in took), min(t for _, t in took), done.stderr.strip().endswith("True")


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
