"""``python tests/golden --write`` writes the losses of every recipe down anew; without it, it tells what moved.

Write only with an entry in the changelog that says why the numbers moved.
"""

from __future__ import annotations

import sys

import torch
from recipes import RECIPES, first_losses, read, write


def main(arguments: list[str]) -> int:
    """1 if the losses of a recipe are not those written down, else 0."""
    if arguments not in ([], ["--write"]):
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    if arguments:
        write()
        return 0
    moved, before = False, read()
    for name in RECIPES:
        worst = max(abs(a - b) / abs(b) for a, b in zip(first_losses(name), before[name], strict=True))
        moved |= worst > 1e-4
        print(f"{name}: largest relative difference {worst:.2g}")
    return int(moved)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
