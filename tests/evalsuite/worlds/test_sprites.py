"""The drawing is held to PIL itself: polygons on a canvas ten times too large, reduced by its Lanczos filter."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from evalsuite.worlds.objects import RGB
from evalsuite.worlds.sprites import SHAPES, Painter, Sprite, outline


def drawn_by_pil(sprites: list[Sprite], size: int = 64) -> np.ndarray:
    image = Image.new("RGB", (10 * size, 10 * size))
    draw = ImageDraw.Draw(image)
    for s in sprites:
        corners = 10 * size * (np.array([s.x, s.y]) + s.scale * outline(s.shape))
        draw.polygon([tuple(point) for point in corners], fill=s.rgb)
    return np.flipud(np.array(image.resize((size, size), Image.Resampling.LANCZOS)))


def scattered(rng: np.random.Generator, count: int) -> list[Sprite]:
    colours = list(RGB.values())
    return [
        Sprite(
            *rng.uniform(0.0, 1.0, 2), SHAPES[rng.integers(len(SHAPES))], float(rng.choice([0.15, 0.22])),
            colours[rng.integers(len(colours))],
        )
        for _ in range(count)
    ]  # fmt: skip


def apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.abs(ours.astype(int) - theirs)


@pytest.mark.parametrize("size", [64, 32])
def test_every_pixel_is_within_two_levels_of_pil(size: int):
    rng, out = np.random.default_rng(0), np.zeros((size, size, 3), np.uint8)
    painter = Painter(size)
    differences = []
    for count in (0, 1, 2, 5, 9) * 5:  # many overlap, some hang over the border
        sprites = scattered(rng, count)
        painter.paint(sprites, out)
        differences.append(apart(out, drawn_by_pil(sprites, size)))
    assert np.max(differences) <= 2
    assert np.mean(np.array(differences) > 0) < 1e-3


def test_a_moved_sprite_leaves_nothing_behind():
    rng, out = np.random.default_rng(1), np.zeros((64, 64, 3), np.uint8)
    painter = Painter()
    sprites = scattered(rng, 4)
    painter.paint(sprites, out)
    for _ in range(30):
        after = list(sprites)
        for place in rng.choice(4, 2, replace=False):
            old = after[place]
            x, y = np.clip(np.array([old.x, old.y]) + rng.choice([-0.05, 0.05], 2), 0, 1)
            after[place] = Sprite(float(x), float(y), old.shape, old.scale, old.rgb)
        painter.move(sprites, after, out)
        sprites = after
        assert apart(out, drawn_by_pil(sprites)).max() <= 2


def test_later_sprites_are_on_top_in_picture_and_cover():
    below, above = Sprite(0.5, 0.5, "square", 0.3, (0, 0, 255)), Sprite(0.5, 0.5, "circle", 0.15, (255, 0, 0))
    out = np.zeros((64, 64, 3), np.uint8)
    painter = Painter()
    painter.paint([below, above], out)
    assert out[32, 32].tolist() == [255, 0, 0]
    cover = painter.cover([below, above])
    assert cover[32, 32] == 1
    assert cover[32, 25] == 0
    assert cover[2, 2] == -1
    inside = (cover == 0) & (out[..., 2] > 128)
    assert inside.sum() / (cover == 0).sum() > 0.8


def test_y_points_upwards():
    out = np.zeros((64, 64, 3), np.uint8)
    Painter().paint([Sprite(0.2, 0.9, "square", 0.1, (255, 255, 255))], out)
    rows, columns = np.nonzero(out[..., 0] > 128)
    assert rows.max() < 16
    assert columns.max() < 24


@pytest.mark.parametrize("shape", [s for s in SHAPES if not s.startswith(("star", "spoke"))])
def test_polygons_have_area_one(shape: str):
    x, y = outline(shape).T
    assert abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2 == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.startswith("star")])
def test_the_points_of_a_star_are_twice_as_far_out_as_its_notches(shape: str):
    radii = np.linalg.norm(outline(shape), axis=1)
    assert np.allclose(radii[1::2], 2 * radii[::2])
