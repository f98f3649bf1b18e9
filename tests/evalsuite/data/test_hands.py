"""What hands and tools write otherwise than the formats say, and what is made of it: read, with a note where something
was settled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evalsuite.data
from evalsuite.data import parse
from evalsuite.data.images import decode
from evalsuite.hooks import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    shelf = Registry()
    evalsuite.data.evalsuite_register(shelf)
    return shelf


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)


def verified(where: str, registry: Registry) -> tuple[Any, list[str]]:
    """A split to learn from and one to score on, and the notes of a verification without faults."""
    layout, path = parse(where, registry)
    report = layout.verify(path)
    assert report.faults == []
    pair = layout.pair(path, layout.classes(path)) if hasattr(layout, "classes") else layout.pair(path)
    return pair, report.notes


BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
PLAIN = f"<annotation><object><name>ant</name>{BOX.format(3, 4, 9, 10)}</object></annotation>"
HANDS = {
    "corners from below": PLAIN.replace(BOX.format(3, 4, 9, 10), BOX.format(9, 10, 3, 4)),
    "a namespace": PLAIN.replace("<annotation>", '<annotation xmlns="http://example.org/voc">'),
    "capitals": PLAIN.replace("annotation>", "Annotation>").replace("bndbox", "BndBox").replace("name>", "Name>"),
}


@pytest.mark.parametrize("kind", HANDS)
def test_boxes_of_xml_by_other_hands_are_those_of_the_plain_one(kind, tmp_path, registry):
    found = []
    for name, text in (("plain", PLAIN), ("hand", HANDS[kind])):
        for i in range(6):
            noise(tmp_path / name / "images" / f"{i}.png", i)
            (tmp_path / name / "annotations").mkdir(exist_ok=True)
            (tmp_path / name / "annotations" / f"{i}.xml").write_text(text)
        layout, path = parse(f"voc:{tmp_path / name}", registry)
        found.append([record.boxes.tolist() for record in layout.load(path, "train").records])
    assert found[0] == found[1]
    assert found[0][0] == [[2, 3, 9, 10]]


def test_numbers_that_coco_files_hold_as_texts_are_numbers(tmp_path, registry):
    found = []
    for as_text in (False, True):
        made = str if as_text else (lambda value: value)
        root = tmp_path / str(as_text)
        for split in ("train", "val"):
            images, annotations = [], []
            for i in range(3):
                noise(root / split / f"{split}{i}.png", 3 * (split == "val") + i)
                images.append({"id": i, "file_name": f"{split}{i}.png", "width": made(16), "height": made(12)})
                annotations.append({
                    "id": i, "image_id": i, "category_id": made(1), "bbox": [made(v) for v in (1, 2.5, 5, 6)],
                    "iscrowd": made(0), "area": made(30.0),
                })  # fmt: skip
            document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]}
            (root / split / "_annotations.coco.json").write_text(json.dumps(document))
        layout, path = parse(f"coco:{root}", registry)
        assert layout.verify(path).faults == []
        found.append([record.boxes.tolist() for record in layout.load(path, "train").records])
    assert found[0] == found[1]


def test_dicom_without_suffix_or_photometric_interpretation_is_read(tmp_path, registry):
    pydicom = pytest.importorskip("pydicom")
    from evalsuite.data.radiographs import write_dicom

    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    plain = tmp_path / "a.dcm"
    write_dicom(plain, values)
    whole = decode(plain)
    dataset = pydicom.dcmread(plain)
    del dataset.PhotometricInterpretation
    for name in ("IM000001", "1.2.840.10008.7"):
        dataset.save_as(tmp_path / name)
        found = decode(tmp_path / name)
        assert (found.pixels == whole.pixels).all()
        assert "taken as MONOCHROME2" in " ".join(found.notes)
    for split in ("train", "val"):
        for label in ("ill", "well"):
            for i in range(2):
                seed = len(list(tmp_path.rglob("IM*")))
                path = tmp_path / "data" / split / label / f"IM{i}"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_dicom(path, np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))
            (tmp_path / "data" / split / label / "NOTES").write_text("x" * 200)
    (train, test), _ = verified(f"folder:{tmp_path / 'data'}", registry)
    assert (len(train), len(test)) == (4, 4)


def test_masks_of_one_list_are_split_by_hash(tmp_path, registry):
    names = [f"a{i}" for i in range(10)]
    for i, name in enumerate(names):
        noise(tmp_path / "JPEGImages" / f"{name}.jpg", i)
        masks = tmp_path / "SegmentationClass"
        masks.mkdir(exist_ok=True)
        rgb = np.zeros((12, 16, 3), np.uint8)
        rgb[: 2 + i % 5] = (10, 20, 30)
        Image.fromarray(rgb).save(masks / f"{name}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("\n".join(names))
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\nant:10,20,30::\n")
    (train, test), _ = verified(f"voc-seg:{tmp_path}", registry)
    assert (len(train), len(test)) == (8, 2)


def listed(root: Path, header: str, cells: list[str]) -> str:
    for i in range(len(cells)):
        noise(root / "images" / f"{i}.png", i)
    rows = [header, *(f"images/{i}.png,{cell}" for i, cell in enumerate(cells))]
    (root / "list.csv").write_text("\n".join(rows))
    return f"csv:{root / 'list.csv'}"


def test_one_column_a_class_with_one_1_a_row_is_read_as_classes(tmp_path, registry):
    cells = [",".join(str(int(k == i % 3)) for k in range(3)) for i in range(15)]
    (train, test), notes = verified(listed(tmp_path, "filename,ant,bee,cicada", cells), registry)
    assert train.classes == ("ant", "bee", "cicada")
    assert sorted({*train.labels.tolist(), *test.labels.tolist()}) == [0, 1, 2]
    assert "one 1 a row" in " ".join(notes)


def test_minus_one_beside_other_numbers_is_no_class(tmp_path, registry):
    (tmp_path / "three").mkdir()
    where = listed(tmp_path / "three", "path,label", [str(i % 3 - 1) for i in range(15)])
    (train, _), notes = verified(where, registry)
    assert train.classes == ("0", "1")
    assert "5 -1" in " ".join(notes)
    (tmp_path / "two").mkdir()
    where = listed(tmp_path / "two", "path,label", [str(i % 2 * 2 - 1) for i in range(12)])
    (train, _), _ = verified(where, registry)
    assert train.classes == ("-1", "1")
