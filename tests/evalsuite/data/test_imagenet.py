"""The official lists of 1 % and 10 % of ImageNet's training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evalsuite.data.imagenet import ImageNet
from evalsuite.errors import DataError


@pytest.fixture
def tree(tmp_path) -> Path:
    for split, count in (("train", 20), ("val", 2)):
        for wnid in ("n01440764", "n01443537"):
            folder = tmp_path / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 4)).save(folder / f"{wnid}_{i}.JPEG")
    return tmp_path / "imagenet"


@pytest.mark.parametrize(
    "place", ["imagenet/imagenet_subsets/10percent.txt", "imagenet_subsets/10percent.txt", "imagenet_10percent.txt"]
)
def test_the_official_list_is_found(tree, place):
    listed = ["n01443537_7.JPEG", "n01440764_3.JPEG", "n01440764_19.JPEG"]
    file = tree.parent / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(listed) + "\n")
    source = ImageNet()
    whole = source.load(tree, "train")
    part = source.official(tree, whole, 0.1)
    assert part is not None
    assert sorted(Path(name).name for name in part.names) == sorted(listed)
    assert np.bincount(part.labels).tolist() == [2, 1]
    assert part.subset == f"the official list {file.name}"
    assert part.digest != whole.digest
    assert source.official(tree, whole, 0.01) is None
    assert source.official(tree, whole, 0.5) is None


def test_a_list_of_other_images_is_refused(tree):
    (tree / "imagenet_1percent.txt").write_text("n01440764_3.JPEG\nn09999999_1.JPEG\n")
    with pytest.raises(DataError, match="does not list images of imagenet train") as told:
        ImageNet().official(tree, ImageNet().load(tree, "train"), 0.01)
    assert told.value.cause == "1 of 2 are not there, first n09999999_1.JPEG"
