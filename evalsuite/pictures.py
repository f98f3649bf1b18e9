"""Pictures of what an evaluation saw and said."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from evalsuite.data.detection import DetectionSet
from evalsuite.files import atomic
from evalsuite.metrics.detection import Detections

__all__ = ["colour", "detections_sheet"]

TILE = 320  # pixels of a picture's longer side
MARGIN = 6
HEADER = 18


def colour(label: int) -> tuple[int, int, int]:
    """A colour a class, far from its neighbours' (golden-ratio steps around the hue circle)."""
    r, g, b = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.75, 0.95)
    return round(r * 255), round(g * 255), round(b * 255)


def detections_sheet(
    data: DetectionSet, found: Sequence[Detections], path: Path, rows: int = 4, threshold: float = 0.3
) -> None:
    """A PNG of a few images that have objects: the truth on the left, detections scored above ``threshold`` right.

    Where an image has none above it, its best three are drawn, so that a weak detector can be judged too.
    """
    by_id = {d.image_id: d for d in found}
    shown = [r for r in data.records if len(r.boxes)][:: max(1, len(data.records) // rows)][:rows]
    tiles = []
    for record in shown:
        image = data.decode(record)
        hit = by_id[record.image_id]
        order = np.argsort(-hit.scores, kind="stable")
        keep = order[: max(3, int((hit.scores > threshold).sum()))][:30]
        scores = [f"{data.classes[hit.labels[i]]} {hit.scores[i]:.2f}" for i in keep]
        truth = _tile(image, record.boxes, record.labels, [data.classes[c] for c in record.labels])
        tiles.append((truth, _tile(image, hit.boxes[keep], hit.labels[keep], scores)))
    with atomic(path) as partial:
        _sheet(tiles, ("truth", "prediction")).save(partial, "PNG")


def _tile(image: Tensor, boxes: np.ndarray, labels: np.ndarray, names: list[str]) -> Tensor:
    scale = TILE / max(image.shape[1:])
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
    if not len(boxes):
        return small
    sized = torch.as_tensor(boxes * scale, dtype=torch.float32).reshape(-1, 4)
    sized[:, 2:] = torch.maximum(sized[:, 2:], sized[:, :2])
    colours = [colour(int(label)) for label in labels]
    drawn: Tensor = draw_bounding_boxes(small, sized, names, colours, width=2, label_colors="black", fill_labels=True)
    return drawn


def _sheet(rows: Sequence[Sequence[Tensor]], titles: Sequence[str]) -> Image.Image:
    heights = [max((t.shape[1] for t in row), default=0) for row in rows]
    width = len(titles) * (TILE + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, HEADER + MARGIN + sum(h + MARGIN for h in heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((MARGIN + column * (TILE + MARGIN), 4), title, fill="black", font=ImageFont.load_default())
    top = HEADER + MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            picture = Image.fromarray(tile.permute(1, 2, 0).numpy())
            sheet.paste(picture, (MARGIN + column * (TILE + MARGIN), top))
        top += height + MARGIN
    return sheet
