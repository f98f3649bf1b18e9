"""``python tests/golden`` tells what moved. With ``--write`` it writes the losses of every recipe down anew, with
``--growth`` it tells how far a disturbance of 1e-7 of the backbone's weights has grown after the written steps.

Write only with an entry in the changelog that says why the numbers moved.
"""

from __future__ import annotations

import sys

import torch
from recipes import RECIPES, TOLERANCE, distance, first_losses, read, write


def main(arguments: list[str]) -> int:
    """1 if the losses of a recipe are not those written down, or a disturbance grows too much, else 0."""
    if arguments not in ([], ["--write"], ["--growth"]):
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    if arguments == ["--write"]:
        write()
        return 0
    disturbed, most = (1e-7, 2e-3) if arguments else (0.0, TOLERANCE)
    worst, before = 0.0, read()
    for name in RECIPES:
        moved = distance(first_losses(name, disturbed=disturbed), before[name])
        worst = max(worst, moved)
        print(f"{name}: largest relative difference {moved:.2g}", flush=True)
    print(f"the largest of all {worst:.2g}, and {most:g} is allowed")
    return int(worst > most)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
