"""What medical demo worlds are made of: radiographs drawn from a seed, with findings, and files to hold them."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evalsuite.data.dicom import pydicom

__all__ = ["FINDINGS", "chest", "limb", "write_dicom", "write_table"]

Grey = NDArray[np.uint8]
Floats = NDArray[np.float64]

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Fracture", "Pleural Effusion", "Pneumonia",
    "Pneumothorax",
)  # fmt: skip


def chest(
    rng: np.random.Generator, findings: Collection[str] = (), height: int = 72, width: int = 88, lateral: bool = False
) -> Grey:
    """(height, width) uint8: bright body, dark lungs with ribs, a heart, and what each of :data:`FINDINGS` does."""
    y, x = _grid(height, width)
    x = x + rng.uniform(-0.06, 0.06)
    body = 0.7 * _disc(x, y, 0, 0.1, 0.95, 1.15)
    sides = ((0.0, 0.55),) if lateral else ((-0.42, 0.3), (0.42, 0.3))
    lungs = np.zeros_like(x)
    for at, wide in sides:
        lungs = np.maximum(lungs, _disc(x, y, at + rng.uniform(-0.02, 0.02), -0.05, wide, 0.62))
    side = rng.choice([-0.42, 0.42]) if not lateral else 0.0
    air = 0.2 + 0.05 * np.sin(26 * y + 3 * np.abs(x) + rng.uniform(0, 6))
    if "Edema" in findings:
        air = air + 0.28 * rng.uniform(0.8, 1.2)
    if "Pneumonia" in findings:
        air = air + 0.6 * _blob(x, y, side + rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.2), 0.17)
    if "Consolidation" in findings:
        air = air + 0.6 * _disc(x, y, side, -0.35, 0.28, 0.2)
    if "Pleural Effusion" in findings:
        air = np.where(y > rng.uniform(0.1, 0.2), 0.75, air)
    if "Atelectasis" in findings:
        air = np.where(np.abs(y - 0.15 - 0.15 * x) < 0.05, 0.9, air)
    if "Pneumothorax" in findings:
        air = np.where(x * np.sign(side or 1) > 0.42, 0.0, air)
    image = body * (1 - lungs) + lungs * air
    heart = rng.uniform(0.46, 0.54) if "Cardiomegaly" in findings else rng.uniform(0.2, 0.26)
    shown = _disc(x, y, 0.1, 0.35, heart, 0.75 * heart)
    image = image * (1 - shown) + 0.72 * shown
    if "Fracture" in findings:
        image = np.where((np.abs(y + 0.75 - 0.5 * x) < 0.04) & (np.abs(x) < 0.7), 0.0, image)
    return _exposed(rng, image)


def limb(rng: np.random.Generator, broken: bool, height: int = 80, width: int = 64) -> Grey:
    """(height, width) uint8: two bones in soft tissue; a broken one has a gap and a bright plate beside it."""
    y, x = _grid(height, width)
    image = np.where(np.abs(x) < 0.8, 0.25, 0.0)
    for at in (-0.3, 0.3):
        shaft = np.abs(x - at - 0.1 * y + rng.uniform(-0.03, 0.03)) < rng.uniform(0.12, 0.16)
        image = np.where(shaft, 0.65, image)
    if broken:
        at = rng.uniform(-0.4, 0.4)
        image = np.where((np.abs(y - at - 0.4 * x) < 0.1) & (x < 0), 0.1, image)
        image = np.where((np.abs(y - at) < 0.35) & (np.abs(x + 0.62) < 0.08), 1.0, image)
    return _exposed(rng, image)


def write_dicom(path: Path, pixels: NDArray[np.uint8], inverted: bool = False) -> None:
    """A secondary-capture DICOM file of (H, W) grey values; ``inverted``: stored as MONOCHROME1, to look the same."""
    library = pydicom()
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    stored = 255 - pixels if inverted else pixels
    meta = library.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.stem])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = library.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PatientID = "CR", path.stem
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path, enforce_file_format=True)


def write_table(file: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A CSV file."""
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows(rows)


def _grid(height: int, width: int) -> tuple[Floats, Floats]:
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return y, x


def _disc(x: Floats, y: Floats, at: float, down: float, wide: float, high: float) -> Floats:
    """1 inside an ellipse, 0 outside, with a soft edge."""
    distance = np.hypot((x - at) / wide, (y - down) / high)
    return np.asarray(1 / (1 + np.exp(np.minimum(20 * (distance - 1), 50))))


def _blob(x: Floats, y: Floats, at: float, down: float, size: float) -> Floats:
    return np.asarray(np.exp(-((x - at) ** 2 + (y - down) ** 2) / (2 * size**2)))


def _exposed(rng: np.random.Generator, image: Floats) -> Grey:
    """Noise, and an exposure that differs from image to image."""
    noisy = rng.uniform(0.85, 1.0) * image + rng.normal(0, 0.02, image.shape)
    return (255 * noisy.clip(0, 1)).round().astype(np.uint8)
