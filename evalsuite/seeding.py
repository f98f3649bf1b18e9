"""Seeds of torch's global generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["manual_seed", "seeded"]


def manual_seed(seed: int) -> None:
    """Seed the generators of the processor and of every GPU that there is, as ``torch.manual_seed`` does.

    That one also notes the seed, with a traceback, for each kind of accelerator that there is not, in case it comes:
    one to four milliseconds a call, more the deeper the stack, which a loop that seeds every step pays every step.
    """
    if torch.xpu.is_available() or torch.backends.mps.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn on the processor inside follows from ``seed``, and the generator is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
