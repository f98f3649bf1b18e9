"""``python -m tests.golden --write`` writes the losses of every recipe down anew; without it, it tells what moved.

Write only with an entry in the changelog that says why the numbers moved.
"""

from __future__ import annotations

import sys

import torch

from tests.golden.recipes import FOLDER, RECIPES, lines, read


def main(arguments: list[str]) -> int:
    """The number of recipes whose losses differ from those written down (0 after writing)."""
    if arguments not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    moved = 0
    for name in RECIPES:
        found = lines(name)
        if arguments:
            text = "".join(f"{step} {loss:.7g}\n" for step, loss in found)
            (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")
            continue
        before = read(name)
        worst = max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(found, before, strict=True))
        moved += worst > 1e-4
        print(f"{name}: largest relative difference {worst:.2g}")
    return min(moved, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
