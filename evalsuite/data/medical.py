"""Medical images: MedMNIST."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evalsuite.data.classification import Npz
from evalsuite.data.demo import labelled, once
from evalsuite.errors import DataError

__all__ = ["MedMnist"]


class MedMnist(Npz):
    """MedMNIST v2: an official ``.npz`` file, alone in ``medmnist`` below the data root."""

    name = "medmnist"
    serves = ("medmnist",)
    tree = "medmnist/pneumoniamnist.npz"
    homepage = "https://medmnist.com/"
    licence = "CC BY 4.0, DermaMNIST CC BY-NC 4.0"
    citation = "Yang et al., MedMNIST v2, Scientific Data 2023"
    file = True

    def locate(self, root: Path | None) -> Path:
        if root is not None and root.is_file():
            return root
        for folder in () if root is None else (root / "medmnist", root):
            files = sorted(folder.glob("*mnist*.npz"))
            if len(files) > 1:
                raise DataError(
                    f"{folder} holds several data sets",
                    cause=", ".join(f.name for f in files),
                    fix=f"name one: --data npz:{files[0]}",
                )
            if files:
                return files[0]
        raise self.missing(root)

    def demo(self, root: Path, seed: int = 0, images: int = 64) -> Path:
        def fill(folder: Path) -> None:
            arrays: dict[str, Any] = {}
            for number, (split, count) in enumerate((("train", images), ("test", max(6, images // 2)))):
                arrays[f"{split}_images"], labels = labelled(seed, number, count, 28)
                arrays[f"{split}_labels"] = labels[:, None]
            np.savez(folder / "demomnist.npz", **arrays)

        return self.locate(once(root / "medmnist", seed, images, fill))
