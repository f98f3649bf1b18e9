"""Images are resized to the same bytes on every processor, which are Pillow's."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as vision

from evalsuite.resize import resize

SIZES = [((9, 7), (16, 16)), ((33, 21), (16, 16)), ((64, 48), (31, 32)), ((5, 5), (8, 3))]


def image(height: int, width: int, low: int = 0, high: int = 256) -> torch.Tensor:
    pixels = np.random.default_rng(height * width).integers(low, high, (height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def digest() -> str:
    parts = [resize(image(*old), *new, mode) for old, new in SIZES for mode in ("bilinear", "bicubic")]
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize(("mode", "filtered"), [("bilinear", "BILINEAR"), ("bicubic", "BICUBIC")])
def test_it_is_pillows_but_for_a_level(old, new, mode, filtered):
    """Where nothing is cut off between the two passes, which Pillow does at other places."""
    pixels = image(*old, 64, 192)
    found = resize(pixels, *new, mode)
    theirs = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    expected = np.asarray(theirs.resize(new[::-1], Image.Resampling[filtered])).transpose(2, 0, 1)
    assert np.abs(found.numpy().astype(int) - expected).max() <= 1


def test_bytes_are_the_same_whatever_the_processor_can():
    """torchvision's own are a level apart without AVX2."""
    code = "import test_resize; print(test_resize.digest())"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": path}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert told.stdout.strip() == digest(), told.stderr


def test_any_leading_dimensions_and_any_memory():
    batch = torch.stack([image(9, 7), image(9, 7).flip(-1)])
    each = torch.stack([resize(one, 4, 4) for one in batch])
    assert torch.equal(resize(batch, 4, 4), each)
    assert torch.equal(resize(batch[None], 4, 4)[0], each)
    assert torch.equal(resize(batch[0, 0], 4, 4), each[0, 0])
    assert torch.equal(resize(batch[0].contiguous(), 4, 4), each[0])
    wide = image(20, 20)
    assert torch.equal(resize(wide[:, 3:12, 5:12], 4, 4), resize(wide[:, 3:12, 5:12].clone(), 4, 4))
    assert resize(wide, 20, 20) is wide


def test_other_numbers_are_torchvisions():
    floats = image(9, 7).float()
    assert torch.equal(resize(floats, 4, 5), vision.resize(floats, [4, 5], antialias=True))
