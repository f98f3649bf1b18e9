"""Trees and files as labelling tools, archives and other systems write them: what is read, and what a run refuses is
a fault of verification too."""

from __future__ import annotations

import itertools
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evalsuite.data
from evalsuite.data import Source, as_fault, parse
from evalsuite.errors import DataError
from evalsuite.hooks import Registry

CATEGORIES = [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
SPLITS = ("train", "val")
seeds = itertools.count()


@pytest.fixture(scope="module")
def registry() -> Registry:
    shelf = Registry()
    evalsuite.data.evalsuite_register(shelf)
    return shelf


def noise(path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(next(seeds)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def folders(root: Path, *places: str, images: int = 2) -> None:
    for place in places:
        for i in range(images):
            noise(root / place / f"{i}.png")


def listed(root: Path, header: str, names: Callable[[str], str], *, folder: str = "images", extra: str = "") -> None:
    rows = [(f"{label}{i}", label) for i in range(6) for label in ("ant", "bee")]
    for name, _ in rows:
        noise(root / folder / f"{name}.png")
    lines = [header, *(f"{names(name)},{label}{extra}" for name, label in rows)]
    (root / "list.csv").write_text("\n".join(lines), encoding="utf-8")


def coco(
    root: Path, file: str, folder: str, *splits: str, name: str = "{0}", edit: Callable[[dict[str, Any], str], Any] = id
) -> None:
    """A document a split, at ``file`` and with images in ``folder``, both formatted with the split's name."""
    for split in splits or SPLITS:
        images, annotations = [], []
        for i in range(6):
            noise(root / folder.format(split) / f"{split}{i}.jpg")
            images.append({"id": i, "file_name": name.format(f"{split}{i}.jpg", split), "width": 16, "height": 12})
            annotations.append({"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [1, 2, 5, 6]})
        document = json.loads(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
        if edit is not id:
            edit(document, split)
        path = root / file.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))


def voc(root: Path, image: str, annotation: str, *splits: str, lists: str = "") -> None:
    """Images and annotations at these places, formatted with the split's name and the image's."""
    for split in splits or SPLITS:
        for i in range(6):
            noise(root / image.format(split, f"{split}{i}"))
            box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>6</xmax><ymax>8</ymax></bndbox>"
            path = root / annotation.format(split, f"{split}{i}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"<annotation><object><name>{'ab'[i % 2]}</name>{box}</object></annotation>")
        if lists:
            path = root / lists.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{split}{i}\n" for i in range(6)))


def masks(root: Path, image: str, mask: str, *splits: str, classes: str = "classes.txt") -> None:
    for split in splits or SPLITS:
        for i in range(6):
            noise(root / image.format(split, f"{split}{i}"))
            path = root / mask.format(split, f"{split}{i}")
            path.parent.mkdir(parents=True, exist_ok=True)
            numbers = np.random.default_rng(i).integers(0, 3, (12, 16), dtype=np.uint8)
            Image.fromarray(numbers).save(path)
    if classes:
        (root / classes).write_text("ground\nant\nbee\n")


def accents(root: Path) -> None:
    for split, form in (("train", "NFC"), ("test", "NFD")):
        folders(root, *(f"{split}/{unicodedata.normalize(form, name)}" for name in ("café", "thé")))  # type: ignore[arg-type]


def withheld(place: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        folders(root, "train/ant", "train/bee", "val/ant", "val/bee", place)

    return write


def accented_list(root: Path) -> None:
    listed(root, "path,label", lambda name: unicodedata.normalize("NFC", f"images/é{name}.png"))
    for file in (root / "images").iterdir():
        file.rename(file.with_name(unicodedata.normalize("NFD", f"é{file.name}")))


def unlabelled_test(root: Path) -> None:
    listed(root, "path,label,split", lambda name: f"images/{name}.png")
    lines = (root / "list.csv").read_text().splitlines()
    told = [f"{line},{('train', 'val')[i % 4 // 2]}" for i, line in enumerate(lines[1:9])]
    blank = [f"{line.partition(',')[0]},,test" for line in lines[9:]]
    (root / "list.csv").write_text("\n".join([lines[0], *told, *blank]))


def texts(form: str) -> Callable[[dict[str, Any], str], None]:
    def edit(document: dict[str, Any], split: str) -> None:
        for entry in (*document["images"], *document["categories"]):
            entry["id"] = form.format(entry["id"])
        for entry in document["annotations"]:
            entry |= {key: form.format(entry[key]) for key in ("image_id", "category_id")}

    return edit


def without_sizes(document: dict[str, Any], split: str) -> None:
    for i, entry in enumerate(document["images"]):
        entry |= {"width": 0, "height": None} if i % 2 else {}
        entry.pop("width") if not i % 2 else None


def no_test(document: dict[str, Any], split: str) -> None:
    if split == "test":
        document["annotations"] = []


def other_case(root: Path) -> None:
    coco(root, "annotations/instances_{0}.json", "{0}")
    for split in SPLITS:
        for file in list((root / split).iterdir()):
            file.rename(file.with_suffix(".JPG"))


def beside(root: Path) -> None:
    masks(root, "{0}/{1}.jpg", "{0}/{1}_mask.png", "train", "valid", classes="")
    for split in ("train", "valid"):
        (root / split / "_classes.csv").write_text("Pixel Value, Class\n0, ground\n1, ant\n2, bee\n")


def coloured(root: Path) -> None:
    masks(root, "images/{0}/{1}.png", "masks/{0}/{1}.png", classes="")
    table = np.array([[0, 0, 0], [200, 0, 0], [0, 0, 200]], np.uint8)
    for file in root.glob("masks/*/*.png"):
        Image.fromarray(table[np.asarray(Image.open(file))]).save(file)
    (root / "class_dict.csv").write_text("name,r,g,b\nground,0,0,0\nant,200,0,0\nbee,0,0,200\n")


def voc_tool(root: Path) -> None:
    masks(root, "JPEGImages/{1}.jpg", "SegmentationClassPNG/{1}.png", "x", classes="class_names.txt")
    (root / "SegmentationClass").mkdir()
    np.save(root / "SegmentationClass" / "x0.npy", np.zeros(3))


def no_masks_of_test(root: Path) -> None:
    masks(root, "images/{0}/{1}.jpg", "masks/{0}/{1}.png")
    noise(root / "images" / "test" / "a.jpg")
    (root / "masks" / "test").mkdir()


INSTANCES = "annotations/instances_{0}.json"
READ: dict[str, tuple[str, Callable[[Path], None]]] = {
    "folder, accents of two systems": ("folder", accents),
    "folder, test images in a folder": ("folder", withheld("test/test")),
    "folder, test images of an unknown class": ("folder", withheld("test/unknown")),
    "list, other letter case": ("csv", lambda r: listed(r, "path,label", lambda n: f"Images/{n.upper()}.PNG")),
    "list, other accents": ("csv", accented_list),
    "list, test rows without labels": ("csv", unlabelled_test),
    "coco, ids as texts": ("coco", lambda r: coco(r, INSTANCES, "{0}", edit=texts("img_{0}"))),
    "coco, ids as digits": ("coco", lambda r: coco(r, INSTANCES, "{0}", edit=texts("{0:012d}"))),
    "coco, no sizes": ("coco", lambda r: coco(r, INSTANCES, "{0}", edit=without_sizes)),
    "coco, other letter case": ("coco", other_case),
    "coco, names with the split": ("coco", lambda r: coco(r, INSTANCES, "{0}", name="{1}/{0}")),
    "coco, test withheld": ("coco", lambda r: coco(r, INSTANCES, "{0}", *SPLITS, "test", edit=no_test)),
    "coco, a file a folder": ("coco", lambda r: coco(r, "{0}/annotations.json", "{0}/images", "train", "valid")),
    "coco, labels and data": ("coco", lambda r: coco(r, "{0}/labels.json", "{0}/data")),
    "coco, files above": ("coco", lambda r: coco(r, "{0}.json", "{0}")),
    "coco, files above one folder": ("coco", lambda r: coco(r, "{0}.json", "images")),
    "voc, beside": ("voc", lambda r: voc(r, "{0}/{1}.jpg", "{0}/{1}.xml", "train", "valid")),
    "voc, beside, capitals": ("voc", lambda r: voc(r, "{0}/{1}.JPG", "{0}/{1}.XML", "Train", "Test")),
    "voc, in each split": ("voc", lambda r: voc(r, "{0}/images/{1}.jpg", "{0}/annotations/{1}.xml")),
    "voc, in each split, as VOC": ("voc", lambda r: voc(r, "{0}/JPEGImages/{1}.jpg", "{0}/Annotations/{1}.xml")),
    "voc, splits of archives": ("voc", lambda r: voc(r, "{0}_zip/{0}/{1}.jpg", "{0}_zip/{0}/{1}.xml")),
    "voc, one folder": ("voc", lambda r: voc(r, "{1}.jpg", "{1}.xml", "x")),
    "voc, xmls": ("voc", lambda r: voc(r, "images/{1}.jpg", "annotations/xmls/{1}.xml", "x")),
    "voc, lists above": ("voc", lambda r: voc(r, "images/{1}.jpg", "Annotations/{1}.xml", lists="ImageSets/{0}.txt")),
    "voc, levels down": (
        "voc",
        lambda r: voc(r / "a" / "b", "JPEGImages/{1}.jpg", "Annotations/{1}.xml", lists="ImageSets/Main/{0}.txt"),
    ),
    "masks, an ending": ("pairs", lambda r: masks(r, "images/{0}/{1}.jpg", "masks/{0}/{1}_L.png")),
    "masks, a beginning": ("pairs", lambda r: masks(r, "images/{0}/{1}.jpg", "masks/{0}/gt-{1}.png")),
    "masks, two suffixes": ("pairs", lambda r: masks(r, "images/{0}/{1}.jpg", "masks/{0}/{1}.jpg.png")),
    "masks, other letter case": ("pairs", lambda r: masks(r, "images/{0}/A{1}.JPG", "masks/{0}/a{1}.png")),
    "masks, img_dir": ("pairs", lambda r: masks(r, "img_dir/{0}/{1}.jpg", "ann_dir/{0}/{1}.png")),
    "masks, image and mask": ("pairs", lambda r: masks(r, "image/{1}.jpg", "mask/{1}.png", "x")),
    "masks, beside folders": ("pairs", lambda r: masks(r, "{0}_images/{1}.jpg", "{0}_masks/{1}.png")),
    "masks, annot": ("pairs", lambda r: masks(r, "{0}/{1}.jpg", "{0}annot/{1}.png")),
    "masks, beside images": ("pairs", beside),
    "masks, one folder": ("pairs", lambda r: masks(r, "{1}.jpg", "{1}_mask.png", "x")),
    "masks, a table of colours": ("pairs", coloured),
    "masks, an empty folder before": ("pairs", voc_tool),
    "masks, none of test": ("pairs", no_masks_of_test),
}  # fmt: skip


def below(root: Path) -> None:
    masks(root / "data" / "data", "images/{0}/{1}.jpg", "masks/{0}/{1}.png")


def unpacked_flat(root: Path) -> None:
    for split, name in itertools.product(("train", "test"), ("ant", "bee")):
        noise(root / f"{split}\\{name}\\0.png")


def shares(document: dict[str, Any], split: str) -> None:
    for entry in document["annotations"]:
        entry["bbox"] = [0.1, 0.2, 0.3, 0.25]


def strangers(document: dict[str, Any], split: str) -> None:
    texts("img_{0}")(document, split)
    document["annotations"][0]["image_id"] = "other"


def of_one_kind(root: Path) -> None:
    folders(root, "train/ant", "train/bee", "test/ant", "test/bee")
    for file in root.glob("*/bee/*.png"):
        file.rename(file.with_suffix(".heic"))


def slips(root: Path) -> None:
    voc(root, "{0}/{1}.jpg", "{0}/{1}.xml")
    for file in root.glob("*/*.xml"):
        text = file.read_text()
        file.write_text(text.replace("<xmax>6", "<xmax>2").replace("<ymax>8", "<ymax>3"))


REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a level too high": ("pairs", below, "--data pairs:"),
    "a zip of Windows": ("folder", unpacked_flat, "made on Windows"),
    "boxes as shares": ("coco", lambda r: coco(r, INSTANCES, "{0}", edit=shares), "shares of the images' sizes"),
    "texts that name nothing": ("coco", lambda r: coco(r, INSTANCES, "{0}", edit=strangers), "names image 'other'"),
    "a class of files that are no images": ("folder", of_one_kind, "2 files are no images: 2 .heic"),
    "classes of another letter case": (
        "folder", lambda r: folders(r, "train/ant", "train/bee", "test/Ant", "test/bee"), "letter case and spaces",
    ),
    "names without suffix and folder": (
        "csv", lambda r: listed(r, "id,label", lambda name: name), "root=images",
    ),
    "boxes without an inside": ("voc", slips, "has no object to learn from"),
    "test alone": ("voc", lambda r: voc(r, "{0}/{1}.jpg", "{0}/{1}.xml", "train", "train"), "nothing to score on"),
}  # fmt: skip


def opened(root: Path, layout: str, registry: Registry) -> tuple[Source[Any], Path]:
    return parse(f"{layout}:{root / 'list.csv' if layout == 'csv' else root}", registry)


@pytest.mark.parametrize("case", READ)
def test_what_tools_and_systems_write_is_read(tmp_path: Path, registry: Registry, case: str) -> None:
    layout, write = READ[case]
    write(tmp_path)
    source, path = opened(tmp_path, layout, registry)
    report = source.verify(path)
    assert report.faults == []
    train, test = source.pair(path)
    assert min(len(train), len(test)) > 0
    assert len(train.classes) == len(set(train.classes)) == (3 if layout == "pairs" else 2)


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_refuses_is_a_fault_in_the_same_words(tmp_path: Path, registry: Registry, case: str) -> None:
    layout, write, words = REFUSED[case]
    write(tmp_path)
    reports = []

    def run() -> None:
        source, path = opened(tmp_path, layout, registry)  # by which verification comes, too
        reports.append(source.verify(path))
        source.pair(path)

    with pytest.raises(DataError) as refused:
        run()
    assert words in as_fault(refused.value)
    assert all(as_fault(refused.value) in report.faults for report in reports)


def test_a_mask_belongs_to_its_image_whatever_it_is_called(tmp_path: Path, registry: Registry) -> None:
    masks(tmp_path / "plain", "images/{0}/{1}.jpg", "masks/{0}/{1}.png")
    for name in ("ending", "case"):
        shutil.copytree(tmp_path / "plain", tmp_path / name)
    for file in (tmp_path / "ending").glob("masks/*/*.png"):
        file.rename(file.with_stem(f"{file.stem}_label"))
    for file in (tmp_path / "case").glob("masks/*/*.png"):
        file.rename(file.with_name(file.name.upper()))
    sets = [parse(f"pairs:{tmp_path / name}", registry) for name in ("plain", "ending", "case")]
    plain, *others = [source.pair(path)[0] for source, path in sets]
    for other in others:
        assert [record.image.name for record in other.records] == [record.image.name for record in plain.records]
        for i in range(len(plain)):
            np.testing.assert_array_equal(other.mask(i), plain.mask(i))


def test_texts_as_ids_mean_the_images_that_they_name(tmp_path: Path, registry: Registry) -> None:
    def numbered(document: dict[str, Any], split: str) -> None:
        for entry in document["annotations"]:
            entry["bbox"][0] = entry["image_id"]

    def named(document: dict[str, Any], split: str) -> None:
        numbered(document, split)
        texts("b{0}")(document, split)
        document["images"].reverse()

    coco(tmp_path, INSTANCES, "{0}", edit=named)
    source, path = parse(f"coco:{tmp_path}", registry)
    train, _ = source.pair(path)
    assert {record.path.stem: record.boxes[0, 0] for record in train.records} == {f"train{i}": i for i in range(6)}
    assert {record.path.stem: int(record.labels[0]) for record in train.records} == {
        f"train{i}": i % 2 for i in range(6)
    }
