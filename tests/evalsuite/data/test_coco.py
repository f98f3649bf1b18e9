"""COCO JSON as it is, and as strangers write it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalsuite.data import as_fault
from evalsuite.data.coco import Coco, read
from evalsuite.data.detection import check
from evalsuite.errors import DataError

Tree = Callable[..., Path]
Document = dict[str, Any]


def test_a_good_tree(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(train2017=coco_document, val2017=coco_document)
    assert Coco().locate(path.parent) == path
    assert Coco().locate(path) == path
    assert Coco().splits(path) == ("train2017", "val2017")
    found = Coco().load(path, "train2017")
    assert found.classes == ("bicycle", "toothbrush")  # by id, as COCO's own tools do
    assert found.category_ids == (2, 90)
    assert [r.image_id for r in found.records] == [7, 3]
    crowd, plain = found.records
    assert crowd.crowd.tolist() == [True]
    assert plain.labels.tolist() == [1, 0]
    assert plain.boxes.tolist() == [[4.5, 5, 14.5, 17], [20, 10, 25, 15]]
    assert plain.area.tolist() == [60.0, 25.0]
    assert not plain.difficult.any()
    assert found.has_masks
    masks = found.masks(plain)
    assert masks.shape == (2, 30, 40)
    assert masks[1].sum() == 25
    assert found.masks(crowd)[0, :, 0].all()
    assert found.masks(crowd).sum() == 30
    assert found.decode(plain).shape == (3, 30, 40)
    assert Coco().verify(path).counts["train2017"]["classes"] == {"bicycle": 2, "toothbrush": 1}


def test_images_may_lie_under_images(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(val2017=coco_document)
    (path / "images").mkdir()
    (path / "val2017").rename(path / "images" / "val2017")
    assert len(Coco().load(path, "val2017")) == 2


def test_images_without_annotations_work(coco_tree: Tree, coco_document: Document) -> None:
    coco_document["annotations"] = []
    record = Coco().load(coco_tree(val2017=coco_document), "val2017").records[0]
    assert len(record) == 0
    assert record.boxes.shape == (0, 4)


def test_a_byte_order_mark_is_no_fault(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(val2017="\ufeff" + json.dumps(coco_document))
    for name in ("a.jpg", "b.jpg"):
        (path / "val2017" / name).touch()
    assert len(Coco().load(path, "val2017")) == 2


def test_optional_fields_may_lack(coco_tree: Tree, coco_document: Document) -> None:
    for entry in coco_document["annotations"]:
        del entry["iscrowd"], entry["area"], entry["segmentation"], entry["id"]
    found = Coco().load(coco_tree(val2017=coco_document), "val2017")
    assert not found.has_masks
    assert found.notes == ()
    assert found.records[1].area.tolist() == [120.0, 25.0]
    assert not found.records[0].crowd.any()


def test_some_masks_are_no_masks(coco_tree: Tree, coco_document: Document) -> None:
    coco_document["annotations"][0]["segmentation"] = []
    found = Coco().load(coco_tree(val2017=coco_document), "val2017")
    assert not found.has_masks
    assert found.warnings == ("val2017: 1 of 3 annotations have no segmentation: masks are not used",)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-5, 2**40), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(-5, 2**40), min_size=1, max_size=12, unique=True),
    st.randoms(use_true_random=False),
)
def test_ids_with_gaps_find_their_places(tmp_path: Path, images: list[int], categories: list[int], random: Any) -> None:
    annotations = [
        {"image_id": random.choice(images), "category_id": random.choice(categories), "bbox": [i, 0, 1, 1]}
        for i in range(20)
    ]
    (tmp_path / "x.jpg").touch()
    document = {
        "images": [{"id": i, "file_name": "x.jpg", "height": 5, "width": 50} for i in images],
        "categories": [{"id": i, "name": f"c{i}"} for i in categories],
        "annotations": annotations,
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    found = read(tmp_path / "a.json", tmp_path, "a")
    assert [r.image_id for r in found.records] == images
    assert found.category_ids == tuple(sorted(categories))
    back = [
        (r.image_id, found.category_ids[label], box[0])
        for r in found.records
        for label, box in zip(r.labels, r.boxes, strict=True)
    ]
    assert sorted(back) == sorted((a["image_id"], a["category_id"], a["bbox"][0]) for a in annotations)


def set_(*path: Any, to: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


def drop(*path: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


WRONG: list[tuple[Callable[[Document], None], str]] = [
    (drop("images"), "no list 'images'"),
    (drop("annotations"), "no list 'annotations'"),
    (set_("categories", to={}), "no list 'categories'"),
    (set_("categories", to=[]), "it has no categories"),
    (set_("images", to=[]), "it has no images"),
    (set_("images", 0, to=5), "something in 'images' is not an object"),
    (set_("images", 1, "id", to=7), "image id 7 is there twice"),
    (set_("images", 1, "id", to=[3]), "image [3] has 'id' [3], not an integer"),
    (set_("images", 0, "height", to=-4), "image 7 is said to have 40x-4 pixels"),
    (set_("images", 0, "width", to=10**7), "image 7 is said to have 10000000x30 pixels"),
    (set_("images", 0, "width", to="wide"), "image 7 has 'width' 'wide', not an integer"),
    (drop("images", 0, "file_name"), "image 7 has no file_name"),
    (set_("categories", 1, "id", to=90), "category id 90 is there twice"),
    (set_("categories", 1, "name", to="toothbrush"), "category name 'toothbrush' is there twice"),
    (set_("categories", 1, "name", to=None), "category 2 has no name"),
    (set_("annotations", 2, "image_id", to=8), "annotation 4 names image 8, which is not there (1 such)"),
    (set_("annotations", 2, "category_id", to=1), "annotation 4 names category 1, which is not there"),
    (set_("annotations", 2, "category_id", to=2**63), "annotation 4 has 'category_id'"),
    (set_("annotations", 2, "category_id", to=None), "annotation 4 has 'category_id' None, not an integer"),
    (drop("annotations", 1, "bbox"), "annotation 2 has the bbox None"),
    (set_("annotations", 1, "bbox", to=[1, 2, 3]), "annotation 2 has the bbox [1, 2, 3], not four numbers"),
    (set_("annotations", 1, "bbox", to=[1, 2, 3, "four"]), "annotation 2 has the bbox"),
    (set_("annotations", 1, "bbox", to="abcd"), "annotation 2 has the bbox 'abcd'"),
    (set_("annotations", 1, "area", to="big"), "annotation 2 has 'area' 'big', not a number"),
    (set_("annotations", 1, "iscrowd", to="no"), "annotation 2 has 'iscrowd' 'no'"),
]


@pytest.mark.parametrize(("change", "cause"), WRONG, ids=[cause for _, cause in WRONG])
def test_what_is_wrong_is_named(
    coco_tree: Tree, coco_document: Document, change: Callable[[Document], None], cause: str
) -> None:
    path = coco_tree(val2017=coco_document)
    broken = copy.deepcopy(coco_document)
    change(broken)
    file = path / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(DataError) as told:
        Coco().load(path, "val2017")
    assert told.value.code == 3
    assert told.value.problem == f"{file} is not valid COCO JSON"
    assert cause in told.value.cause
    assert len(str(told.value).splitlines()) == 3


NO_MASKS: list[tuple[Callable[[Document], None], str]] = [
    (set_("annotations", 0, "segmentation", to=[[1, 2, 3, 4]]), "annotation 1 has a polygon"),
    (set_("annotations", 0, "segmentation", to=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 1 has a polygon"),
    (set_("annotations", 0, "segmentation", to=[[1, 2, 3, 4, 5, "6"]]), "annotation 1 has a polygon"),
    (set_("annotations", 0, "segmentation", to=[1, 2, 3, 4, 5, 6]), "annotation 1 has a polygon"),
    (set_("annotations", 0, "segmentation", to="x"), "neither polygons nor RLE"),
    (set_("annotations", 1, "segmentation", "counts", to=[1, 2]), "annotation 2 has an RLE"),
    (set_("annotations", 1, "segmentation", "counts", to=[-1, 1201]), "annotation 2 has an RLE"),
    (
        set_("annotations", 1, "segmentation", "size", to=[40, 30]),
        "annotation 2 has an RLE that is not of its image",
    ),
]


@pytest.mark.parametrize(("change", "cause"), NO_MASKS)
def test_a_segmentation_that_is_no_mask_counts_as_none(
    coco_tree: Tree, coco_document: Document, change: Callable[[Document], None], cause: str
) -> None:
    change(coco_document)
    path = coco_tree(train2017=coco_document, val2017=coco_document)
    found = Coco().load(path, "val2017")
    assert not found.has_masks
    assert sum(map(len, found.records)) == 3
    (note,) = found.notes
    assert note.startswith("val2017: 1 of 3 segmentations are no masks (annotation ")
    assert cause in note
    with pytest.raises(DataError, match="train2017 has no masks") as told:
        check(*(Coco().load(path, split) for split in ("train2017", "val2017")), masks=True)
    assert cause in told.value.cause
    assert any(told.value.fix in fault for fault in Coco().verify(path).faults)


def test_a_mask_that_cannot_be_drawn_is_no_fault_of_boxes(coco_tree: Tree, coco_document: Document) -> None:
    coco_document["annotations"][0]["segmentation"] = [[0, 0, 1e9, 0, 1, 1]]
    path = coco_tree(train=coco_document, val=coco_document)
    report = Coco().generic().verify(path)
    assert report.faults == []
    assert sum("cannot be drawn" in note for note in report.notes) == 2


@pytest.mark.parametrize(
    "name",
    ["../a.jpg", "x/../../a.jpg", "/etc/passwd", "..", "C:\\a.jpg", "..\\a.jpg", "C:/a.jpg", "a\0.jpg"],
)
def test_file_names_stay_in_the_folder(coco_tree: Tree, coco_document: Document, name: str) -> None:
    path = coco_tree(val2017=coco_document)
    coco_document["images"][0]["file_name"] = name
    (path / "annotations" / "instances_val2017.json").write_text(json.dumps(coco_document))
    with pytest.raises(DataError, match="leads out of the image folder"):
        Coco().load(path, "val2017")


def test_file_names_may_have_folders_and_dots(coco_tree: Tree, coco_document: Document) -> None:
    coco_document["images"][0]["file_name"] = "deep/er/a..b.jpg"
    found = Coco().load(coco_tree(val2017=coco_document), "val2017")
    assert found.decode(found.records[0]).shape == (3, 30, 40)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "the file is empty"),
        ("\x89PNG", "it is not JSON"),
        ("{", "it is not JSON"),
        ("[" * 200_000, "it is not JSON"),
        ('{"images": NaN}', "it is not JSON: expected value at line 1 column 12"),
        ("[]", "it holds a list"),
        ('[{"image_id": 1, "score": 0.5}]', "it holds a list"),
        ("{}", "it has no list 'images'"),
    ],
)
def test_json_that_is_not_coco(coco_tree: Tree, coco_document: Document, text: str, cause: str) -> None:
    path = coco_tree(val2017=coco_document)
    (path / "annotations" / "instances_val2017.json").write_text(text)
    with pytest.raises(DataError, match=r"instances_val2017\.json") as told:
        Coco().load(path, "val2017")
    assert cause in told.value.cause
    assert any(cause in fault for fault in Coco().verify(path).faults)


def test_a_missing_image_is_named(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(train2017=coco_document, val2017=coco_document)
    (path / "val2017" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"val2017/a\.jpg is missing"):
        Coco().load(path, "val2017")
    report = Coco().verify(path)
    assert [f for f in report.faults if "a.jpg" in f] == [f"val2017: image {path}/val2017/a.jpg is missing"]
    assert report.counts["val2017"]["images"] == 1


def test_a_missing_root_split_or_folder_is_told(tmp_path: Path, coco_tree: Tree, coco_document: Document) -> None:
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="data set 'coco' was not found") as told:
            Coco().locate(root)
        assert "coco/annotations/instances_val2017.json" in told.value.fix
        assert len(str(told.value).splitlines()) == 3
    path = coco_tree(val2017=coco_document)
    with pytest.raises(DataError, match="'train2017' is missing"):
        Coco().load(path, "train2017")
    (path / "val2017").rename(path / "elsewhere")
    with pytest.raises(DataError, match="images of COCO split 'val2017' are missing"):
        Coco().load(path, "val2017")


def test_fingerprint_sees_annotations_and_image_sizes(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(val2017=coco_document)
    first = Coco().load(path, "val2017").fingerprint
    assert Coco().load(path, "val2017").fingerprint == first
    (path / "val2017" / "a.jpg").write_bytes(b"another length")
    second = Coco().load(path, "val2017").fingerprint
    coco_document["annotations"][0]["bbox"][0] += 1
    (path / "annotations" / "instances_val2017.json").write_text(json.dumps(coco_document))
    assert len({first, second, Coco().load(path, "val2017").fingerprint}) == 3


def test_fingerprint_does_not_know_where_the_tree_lies(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(val2017=coco_document)
    first = Coco().load(path, "val2017").fingerprint
    moved = path.rename(path.parent / "moved")
    assert Coco().load(moved, "val2017").fingerprint == first


def test_roles_of_anybodys_data(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(train=coco_document, test_a=coco_document)
    layout = Coco().generic()
    assert layout.roles(path) == {"train": "train", "test": "test_a", "val": "test_a"}
    coco_tree(valid=coco_document)
    assert layout.roles(path) == {"train": "train", "test": "test_a", "val": "valid"}
    coco_tree(train2=coco_document)
    with pytest.raises(DataError, match="is train") as told:
        layout.roles(path)
    assert told.value.cause == "several fit: train, train2"
    assert Coco().roles(path) == {"train": "train2017", "val": "val2017"}


def test_roles_need_both(coco_tree: Tree, coco_document: Document) -> None:
    with pytest.raises(DataError, match="nothing to learn from or nothing to score on"):
        Coco().generic().roles(coco_tree(train=coco_document))


def test_verify_finds_what_reading_cannot(coco_tree: Tree, coco_document: Document) -> None:
    other = copy.deepcopy(coco_document)
    other["annotations"][0]["bbox"] = [35, 5, 10, 12]
    other["annotations"][2]["bbox"] = [5, 5, 0, 3]
    other["annotations"][0]["segmentation"] = [[0, 0, 1e9, 0, 1, 1]]
    path = coco_tree(train2017=coco_document, val2017=other)
    (path / "val2017" / "a.jpg").write_bytes((path / "train2017" / "b.jpg").read_bytes())
    cut = path / "train2017" / "a.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    report = Coco().verify(path, workers=2)
    assert not report.ok
    assert len(report.faults) == 3
    assert any(f.startswith(f"image {cut} cannot be decoded") for f in report.faults)
    assert any("a mask of image" in f and "val2017/b.jpg" in f for f in report.faults)
    assert "the same image is in several splits: train2017/b.jpg, val2017/a.jpg" in report.faults
    assert report.notes == [
        "val2017: b.jpg: a box has no inside and is left out",
        "val2017: b.jpg: a box leaves its image and is cut",
    ]


def test_verify_finds_other_categories_and_missing_splits(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(val2017=coco_document)
    assert any("'train2017' is missing" in fault for fault in Coco().verify(path).faults)
    other = copy.deepcopy(coco_document)
    other["categories"].append({"id": 91, "name": "hat"})
    coco_tree(train2017=other)
    assert any("they differ in hat" in fault for fault in Coco().verify(path).faults)


def test_ids_may_be_floats_that_are_whole(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(val2017=coco_document)
    expected = Coco().load(path, "val2017")
    for entry in coco_document["annotations"]:
        entry |= {"image_id": float(entry["image_id"]), "category_id": float(entry["category_id"]), "area": None}
    coco_document["images"][0] |= {"id": 7.0, "height": 30.0}
    file = path / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(coco_document))
    found = Coco().load(path, "val2017")
    assert [r.image_id for r in found.records] == [7, 3]
    assert [r.labels.tolist() for r in found.records] == [r.labels.tolist() for r in expected.records]
    coco_document["annotations"][0]["image_id"] = 3.5
    file.write_text(json.dumps(coco_document))
    with pytest.raises(DataError) as told:
        Coco().load(path, "val2017")
    assert told.value.cause == "annotation 1 has 'image_id' 3.5, not an integer"
    assert told.value.fix == "write 'image_id' as an integer"


def test_names_written_on_windows(coco_tree: Tree, coco_document: Document) -> None:
    coco_document["images"][0]["file_name"] = "deep/er/a.jpg"
    path = coco_tree(val2017=coco_document)
    coco_document["images"][0]["file_name"] = "deep\\er\\a.jpg"
    (path / "annotations" / "instances_val2017.json").write_text(json.dumps(coco_document))
    found = Coco().load(path, "val2017")
    assert found.decode(found.records[0]).shape == (3, 30, 40)
    assert found.notes == ("val2017: 1 file names are written with \\, and read with /",)


def roboflow(document: Document, root: str = "fruit") -> Document:
    """With a category that groups the others, which no annotation has."""
    grouped = [entry | {"supercategory": root} for entry in document["categories"]]
    return document | {"categories": [{"id": 0, "name": root, "supercategory": "none"}, *grouped]}


@pytest.mark.parametrize("root", ["fruit", "bicycle"])
def test_a_category_that_groups_others_is_no_class(coco_tree: Tree, coco_document: Document, root: str) -> None:
    path = coco_tree(train=roboflow(coco_document, root), val=roboflow(coco_document, root))
    found = Coco().generic().load(path, "train")
    assert found.classes == ("bicycle", "toothbrush")
    assert found.notes == (f"train: category {root!r} (id 0) groups others and has no annotation: left out",)
    assert Coco().generic().verify(path).ok


def test_a_group_that_some_split_annotates_is_a_class_of_all(coco_tree: Tree, coco_document: Document) -> None:
    train, val = (roboflow(copy.deepcopy(coco_document)) for _ in range(2))
    val["annotations"][0]["category_id"] = 0
    path = coco_tree(train=train, val=val)
    for split in ("train", "val"):
        assert Coco().generic().load(path, split).classes == ("fruit", "bicycle", "toothbrush")


def test_the_tree_of_roboflow(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(train=coco_document, valid=coco_document)
    for split in ("train", "valid"):
        (path / "annotations" / f"instances_{split}.json").rename(path / split / "_annotations.coco.json")
    layout = Coco().generic()
    assert layout.locate(path) == path
    assert layout.roles(path) == {"train": "train", "val": "valid"}
    assert len(layout.load(path, "valid")) == 2
    with pytest.raises(DataError):
        Coco().locate(path)  # it is not COCO 2017


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("annotations/instances_default.json", "images"),
        ("annotations/instances_default.json", "images/default"),
        ("annotations/all.json", "images"),
        ("result.json", "images"),
        ("labels.json", "data"),
        ("_annotations.coco.json", ""),
    ],
)
def test_one_file_of_all_images_is_split_by_hash(
    tmp_path: Path, coco_tree: Tree, coco_document: Document, file: str, folder: str
) -> None:
    names = [f"{i}.jpg" for i in range(11)]
    coco_document["images"] = [{"id": i, "file_name": name, "height": 4, "width": 4} for i, name in enumerate(names)]
    coco_document["annotations"] = [
        {"image_id": i, "category_id": 90, "bbox": [0, 0, 2, 2]} for i, _ in enumerate(names)
    ]
    tree = coco_tree(images=coco_document)
    path = tmp_path / "own"
    (path / file).parent.mkdir(parents=True)
    (tree / "annotations" / "instances_images.json").rename(path / file)
    for image in (tree / "images").iterdir():
        (path / folder).mkdir(parents=True, exist_ok=True)
        image.rename(path / folder / image.name)
    layout = Coco().generic()
    assert layout.locate(path) == path
    assert layout.roles(path) == {"train": "train", "test": "test", "val": "test"}
    train, test = (layout.load(path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 3)
    assert sorted(r.path.name for r in (*train.records, *test.records)) == sorted(names)
    assert train.fingerprint != test.fingerprint
    report = layout.verify(path)
    assert report.ok
    assert report.counts["test"]["images"] == 3


@pytest.mark.parametrize(
    ("role", "change", "problem"),
    [
        ("val", set_("annotations", to=[]), "val has no object to score on"),
        ("train", set_("annotations", to=[]), "train has no object to learn from"),
        ("val", lambda d: [a.update(iscrowd=1) for a in d["annotations"]], "val has no object to score on"),
    ],
)
def test_verify_refuses_data_without_objects_as_a_run_does(
    coco_tree: Tree, coco_document: Document, role: str, change: Callable[[Document], None], problem: str
) -> None:
    other = copy.deepcopy(coco_document)
    change(other)
    path = coco_tree(**{"train": coco_document, "val": coco_document, role: other})
    layout = Coco().generic()
    with pytest.raises(DataError, match=problem) as told:
        check(layout.load(path, "train"), layout.load(path, "val"))
    assert as_fault(told.value) in layout.verify(path).faults


@pytest.mark.parametrize(
    ("encoding", "cause", "kind"),
    [
        ("utf-16", "it is UTF-16, not UTF-8", "UTF-16"),
        ("cp1252", "line 1 has the byte 0xe9, which is no UTF-8 but may be Windows' CP1252", "CP1252"),
    ],
)
def test_another_encoding_is_named(
    coco_tree: Tree, coco_document: Document, encoding: str, cause: str, kind: str
) -> None:
    coco_document["categories"][0]["name"] = "café"
    path = coco_tree(val2017=coco_document)
    text = json.dumps(coco_document, ensure_ascii=False)
    (path / "annotations" / "instances_val2017.json").write_bytes(text.encode(encoding))
    with pytest.raises(DataError) as told:
        Coco().load(path, "val2017")
    assert told.value.cause == cause
    assert f"iconv -f {kind} -t UTF-8" in told.value.fix


def test_twins_in_a_split_are_noted(coco_tree: Tree, coco_document: Document) -> None:
    path = coco_tree(train2017=coco_document)
    (path / "train2017" / "a.jpg").write_bytes((path / "train2017" / "b.jpg").read_bytes())
    notes = Coco().verify(path).notes
    assert notes == ["the same image is there under several names: train2017/a.jpg, train2017/b.jpg"]


def test_real_records(realdata: Path) -> None:
    path = Coco().locate(realdata / "det_coco_tiny")
    train, val = (Coco().load(path, split) for split in ("train2017", "val2017"))
    assert (len(train), len(val)) == (32, 6)
    for found, boxes, crowds, classes in ((train, 288, 4, 41), (val, 136, 1, 16)):
        counts = found.counts()
        assert (counts["boxes"], counts["crowd"]) == (boxes, crowds)
        assert sum(n > 0 for n in counts["classes"].values()) == classes
        assert len(found.classes) == 80
        assert found.category_ids[-1] == 90
        assert found.has_masks
        assert found.warnings == ()
    # The official areas are those of the polygons: masks drawn at whole pixels come close.
    for record in train.records:
        drawn = train.masks(record).sum(axis=(1, 2))
        np.testing.assert_allclose(drawn[~record.crowd], record.area[~record.crowd], rtol=0.1, atol=30)
    report = Coco().verify(path)
    assert report.ok
    assert report.notes == []
