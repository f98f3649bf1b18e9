"""Pictures of what an evaluation saw and said."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from evalsuite.data.detection import DetectionSet
from evalsuite.data.segmentation import IGNORE, SegmentationSet
from evalsuite.files import atomic
from evalsuite.metrics.detection import Detections

__all__ = [
    "colour",
    "columns_sheet",
    "detections_sheet",
    "iou_chart",
    "painted",
    "segmentation_rows",
    "segmentation_sheet",
]

TILE = 320  # pixels of a picture's longer side
MARGIN = 6
HEADER = 18
RIGHT, WRONG, HATCH = (236, 240, 236), (214, 39, 40), (130, 130, 130)
LEGEND = 24  # classes a legend names at most, the largest first


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


def segmentation_rows(data: SegmentationSet, rows: int = 4) -> list[int]:
    """The places of a few images, evenly spaced: those :func:`segmentation_sheet` is given predictions of."""
    places: list[int] = np.linspace(0, len(data) - 1, min(rows, len(data))).round().astype(int).tolist()
    return places


def segmentation_sheet(data: SegmentationSet, predictions: Mapping[int, npt.NDArray[np.integer]], path: Path) -> None:
    """A PNG with a row an image: the image, the truth and the prediction in the set's colours, and the errors.

    ``predictions`` are (H, W) classes by place in the set. Pixels without a class are hatched, errors are red on the
    faded image. A legend names the classes that are seen, the largest first.
    """
    rows, seen = [], np.zeros(256, np.int64)
    palette = np.full((256, 3), 255, np.uint8)
    palette[: len(data.classes)] = data.palette
    for place in sorted(predictions):
        image = _sized(data.image(place), Image.Resampling.LANCZOS)
        labels = (data.mask(place), np.asarray(predictions[place]).astype(np.uint8))
        truth, said = (_sized(side, Image.Resampling.NEAREST) for side in labels)
        seen += np.bincount(truth.ravel(), minlength=256) + np.bincount(said.ravel(), minlength=256)
        errors = (0.4 * image.mean(axis=2, keepdims=True) + 0.6 * np.array(RIGHT)).astype(np.uint8)
        errors[said != truth] = WRONG
        panels = [image, palette[truth], palette[said], errors]
        for panel in (panels[1], panels[3]):
            panel[truth == IGNORE] = 255
            panel[(truth == IGNORE) & _hatching(truth.shape)] = HATCH
        rows.append([torch.from_numpy(panel).permute(2, 0, 1) for panel in panels])
    sheet = _sheet(rows, ("image", "truth (hatched: no class)", "prediction", "errors"))
    with atomic(path) as partial:
        _legend(sheet, data, seen).save(partial, "PNG")


def _sized(picture: npt.NDArray[np.uint8], how: Image.Resampling) -> npt.NDArray[np.uint8]:
    """A picture (h, w, 3), or labels (h, w), the longer side TILE."""
    scale = TILE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return np.array(Image.fromarray(picture).resize(size, how))


def _hatching(shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    down, across = np.indices(shape[:2])
    return np.asarray((down + across) % 7 == 0)


def _legend(sheet: Image.Image, data: SegmentationSet, seen: npt.NDArray[np.int64]) -> Image.Image:
    """The sheet with the names of its classes below, in columns."""
    font = ImageFont.load_default(12)
    order = [int(label) for label in np.argsort(-seen[: len(data.classes)], kind="stable") if seen[label]]
    entries = [(data.classes[label], tuple(data.palette[label].tolist())) for label in order[:LEGEND]]
    if len(order) > LEGEND:
        entries.append((f"and {len(order) - LEGEND} more", (255, 255, 255)))
    cell = 28 + round(max((font.getlength(name) for name, _ in entries), default=0.0)) + 2 * MARGIN
    columns = max(1, (sheet.width - MARGIN) // cell)
    whole = Image.new("RGB", (sheet.width, sheet.height + MARGIN + 20 * -(-len(entries) // columns)), "white")
    whole.paste(sheet)
    pen = ImageDraw.Draw(whole)
    for number, (name, shade) in enumerate(entries):
        left, top = MARGIN + number % columns * cell, sheet.height + number // columns * 20
        edge = "white" if shade == (255, 255, 255) else (90, 90, 90)
        pen.rectangle((left, top, left + 20, top + 14), fill=shade, outline=edge)
        pen.text((left + 26, top), name, fill="black", font=font)
    return whole


def painted(masks: Tensor) -> Tensor:
    """Masks (R, S, h, w) that share each place, as pictures (R, 3, h, w) in [0, 1]: each mask in a colour, mixed."""
    palette = torch.tensor([colour(place) for place in range(masks.shape[1])], dtype=masks.dtype) / 255
    mixed: Tensor = torch.einsum("rshw,sc->rchw", masks.cpu(), palette)
    return mixed


def columns_sheet(columns: Mapping[str, Tensor], path: Path) -> None:
    """A PNG with a row an image and a column a title: pictures (R, 3, h, w) in [0, 1], of any size, R in each."""
    tiles = []
    for pictures in columns.values():
        size = [round(side * TILE / max(pictures.shape[2:])) for side in pictures.shape[2:]]
        tiles.append(F.interpolate(pictures.cpu().float().clamp(0, 1), size, mode="nearest").mul(255).round().byte())
    with atomic(path) as partial:
        _sheet(list(zip(*tiles, strict=True)), tuple(columns)).save(partial, "PNG")


def iou_chart(data: SegmentationSet, iou: Mapping[str, float | None], path: Path) -> None:
    """A PNG of the classes' IoU as bars in their colours, the best first, and their mean; undefined ones have none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shades = dict(zip(data.classes, (data.palette / 255).tolist(), strict=True))
    bars = sorted(((name, value) for name, value in iou.items() if value is not None), key=lambda bar: bar[1])
    figure = Figure(figsize=(7, 1.3 + 0.24 * max(1, len(bars))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names, values = [name for name, _ in bars], [value for _, value in bars]
    axes.barh(names, values, color=[shades[name] for name in names], edgecolor="0.35", linewidth=0.6)
    for row, value in enumerate(values):
        axes.text(value + 0.01, row, f"{value:.3f}", va="center", fontsize=8)
    if values:
        mean = float(np.mean(values))
        axes.axvline(mean, color="0.2", linestyle="--", linewidth=1)
        axes.set_title(f"{data.name} {data.split}: mean of {len(values)} classes {mean:.3f}", fontsize=10)
    axes.set_xlim(0, 1.08)
    axes.set_ylim(-0.6, max(1, len(bars)) - 0.4)
    axes.set_xlabel("intersection over union")
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


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
