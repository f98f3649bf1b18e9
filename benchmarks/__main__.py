"""Run benchmarks and print one line each: ``python -m benchmarks [name ...] [--json FILE]``."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
from pathlib import Path
from typing import Any

import torch

import benchmarks


def main() -> None:
    names = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which to run (default: all of {', '.join(names)})")
    parser.add_argument("--json", type=Path, help="also append the lines to this file, one JSON object each")
    chosen = parser.parse_args()
    odd = set(chosen.names) - set(names)
    if odd:
        parser.error(f"no benchmark named {', '.join(sorted(odd))}; there are {', '.join(names)}")
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in chosen.names or names:
        measured = importlib.import_module(f"benchmarks.{name}").run()
        for row in [measured] if isinstance(measured, dict) else measured:
            print("  ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
            if chosen.json:
                with chosen.json.open("a") as file:
                    file.write(json.dumps({**row, **machine}) + "\n")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
