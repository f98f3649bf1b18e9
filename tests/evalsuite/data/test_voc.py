"""VOC XML as it is, and as strangers write it."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evalsuite.data.voc import CLASSES, Voc
from evalsuite.errors import DataError

Year = Callable[..., Path]
Xml = Callable[..., str]

DOG = ("dog", (1, 1, 40, 30), 0)
CAT = ("cat", (5, 6, 10, 12), 1)


def test_a_good_year(voc_year: Year, xml: Xml) -> None:
    year = voc_year({"a": xml([DOG, CAT]), "b": xml([])}, train=["b", "a"], val=["a"])
    path = Voc().locate(year.parent.parent)
    assert path == year.parent
    assert Voc().splits(path) == ("2012:train", "2012:val")
    found = Voc().load(path, "2012:train")
    assert found.classes == CLASSES
    assert found.category_ids == tuple(range(1, 21))
    assert [(r.image_id, r.path.name) for r in found.records] == [(1, "b.jpg"), (2, "a.jpg")]
    empty, full = found.records
    assert len(empty) == 0
    assert full.boxes.tolist() == [[0, 0, 40, 30], [4, 5, 10, 12]]
    assert [CLASSES[i] for i in full.labels] == ["dog", "cat"]
    assert full.difficult.tolist() == [False, True]
    assert not full.crowd.any()
    assert full.area.tolist() == [1200, 42]
    assert not found.has_masks
    assert found.decode(full).shape == (3, 30, 40)


def test_folders_that_are_accepted(voc_year: Year, xml: Xml, tmp_path: Path) -> None:
    year = voc_year({"a": xml([DOG])}, folder="x/BCCD", train=["a"])
    for root in (year, year.parent):
        assert Voc().locate(root) == year
    assert Voc().splits(year) == ("train",)
    voc_year({"a": xml([DOG])}, folder="y/VOC2007", train=["a"])
    assert Voc().locate(tmp_path / "y") == tmp_path / "y"
    assert Voc().load(tmp_path / "y", "train").records[0].path.name == "a.jpg"
    assert len(Voc().load(tmp_path / "y" / "VOC2007", "2007:train")) == 1
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="data set 'voc' was not found") as told:
            Voc().locate(root)
        assert "VOCdevkit/VOC2007/JPEGImages/*.jpg" in told.value.fix
        assert len(str(told.value).splitlines()) == 3


def test_union_of_years(voc_year: Year, xml: Xml) -> None:
    voc_year({"a": xml([DOG]), "b": xml([])}, folder="VOCdevkit/VOC2007", trainval=["a", "b"], test=["b"])
    year = voc_year({"a": xml([CAT])}, trainval=["a"])
    path = year.parent
    both = Voc().load(path, "2007:trainval+2012:trainval")
    assert [r.image_id for r in both.records] == [1, 2, 3]
    assert [r.path.parent.parent.name for r in both.records] == ["VOC2007", "VOC2007", "VOC2012"]
    assert both.fingerprint != Voc().load(path, "2012:trainval+2007:trainval").fingerprint
    assert Voc().roles(path) == {
        "train": "2007:trainval+2012:trainval",
        "val": "2007:test",
        "test": "2007:test",
    }
    with pytest.raises(DataError, match="VOC split 'trainval' is missing"):
        Voc().load(path, "trainval")


def test_classes_of_anybodys_data_are_the_same_in_every_split(voc_year: Year, xml: Xml) -> None:
    objects = [("zebra", (1, 1, 5, 5), 0)], [("ant", (1, 1, 5, 5), 0)]
    path = voc_year({"a": xml(objects[0]), "b": xml(objects[1])}, folder="own", train=["a"], test=["b"])
    layout = Voc().generic()
    train, test = layout.load(path, "train"), layout.load(path, "test")
    assert train.classes == test.classes == ("ant", "zebra")
    assert train.records[0].labels.tolist() == [1]
    assert layout.roles(path) == {"train": "train", "val": "test", "test": "test"}
    with pytest.raises(DataError, match=r"a\.xml has an object of an unknown class") as told:
        Voc().load(path, "train")
    assert "'zebra'" in told.value.cause
    assert "detect" in told.value.fix


def test_splits_without_annotations_have_no_role(voc_year: Year, xml: Xml) -> None:
    texts = dict.fromkeys("abc", xml([DOG]))
    path = voc_year(texts, folder="own", train=["a"], val=["b"], test=["c"])
    (path / "Annotations" / "c.xml").unlink()
    assert Voc().roles(path) == {"train": "train", "val": "val"}
    report = Voc().verify(path)
    assert report.ok
    assert report.notes == ["test has no annotations"]
    (path / "JPEGImages" / "c.jpg").unlink()  # then it is a list of nothing, not a test split that is withheld
    assert Voc().roles(path)["test"] == "test"
    assert any("c.jpg is missing" in fault for fault in Voc().verify(path).faults)


def test_roles_need_both(voc_year: Year, xml: Xml) -> None:
    with pytest.raises(DataError, match="nothing to learn from"):
        Voc().roles(voc_year({"a": xml([DOG])}, folder="own", train=["a"]))


def test_what_tools_write_differently(voc_year: Year, xml: Xml) -> None:
    texts = {
        "floats": xml([("dog", (1.5, 2, 10.25, 9), 0)]),
        "nosize": xml([DOG], width=None),
        "zerosize": xml([DOG], width=0, height=0),
        "plain": xml([DOG]).replace("<difficult>0</difficult>", ""),
        "part": xml([DOG]).replace(
            "</object>",
            "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>",
        ),
        "bom": "\ufeff" + xml([DOG]),
        "declared": '<?xml version="1.0" encoding="utf-8"?>\n' + xml([DOG]),
    }
    path = voc_year(texts, train=list(texts)).parent
    found = {r.path.stem: r for r in Voc().load(path, "2012:train").records}
    assert found["floats"].boxes.tolist() == [[0.5, 1, 10.25, 9]]
    for name in texts.keys() - {"floats"}:
        assert found[name].boxes.tolist() == [[0, 0, 40, 30]]
        assert (found[name].height, found[name].width) == (30, 40)


def test_names_in_other_encodings(voc_year: Year, xml: Xml) -> None:
    path = voc_year({"a": "", "b": ""}, folder="own", train=["a"], val=["b"])
    text = xml([("hérisson", (1, 1, 5, 5), 0)])
    latin = f'<?xml version="1.0" encoding="ISO-8859-1"?>{text}'.encode("latin-1")
    (path / "Annotations" / "a.xml").write_bytes(latin)
    (path / "Annotations" / "b.xml").write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))
    assert Voc().generic().load(path, "train").classes == ("hérisson",)


def test_other_suffixes(voc_year: Year, xml: Xml) -> None:
    path = voc_year({"a": xml([DOG])}, train=["a"])
    from PIL import Image

    image = path / "JPEGImages" / "a.jpg"
    Image.open(image).save(image.with_suffix(".png"))
    image.unlink()
    assert Voc().load(path, "train").records[0].path.name == "a.png"


BOMB = (
    '<!DOCTYPE annotation [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    "<annotation><folder>&b;</folder></annotation>"
)
WRONG = [
    ("", "it is empty"),
    ("<annotation>", "no element found"),
    ("not xml", "syntax error"),
    ("<annotation>&undefined;</annotation>", "undefined entity"),
    ("<html></html>", "its root is <html>, not <annotation>"),
    (BOMB, "declares a document type"),
    ('<!DOCTYPE annotation SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
    ('<?xml version="1.0" encoding="no-such-code"?><annotation/>', "unknown encoding"),
    ('<?xml version="1.0" encoding="rot13"?><annotation/>', "not a text encoding"),
    ("<annotation><object><bndbox/></object></annotation>", "an <object> has no <name>"),
    ("<annotation><object><name>dog</name></object></annotation>", "<bndbox><xmin> of <object> is missing"),
    ("<annotation><size><width>4</width></size></annotation>", "<size><height> of <annotation> is missing"),
    ("<annotation><size><width>-4</width><height>1</height></size></annotation>", "its size is"),
]


@pytest.mark.parametrize(("text", "cause"), WRONG, ids=[cause for _, cause in WRONG])
def test_what_is_wrong_is_named(voc_year: Year, xml: Xml, text: str, cause: str) -> None:
    texts = {"good": xml([DOG]), "bad": text, "other": xml([DOG])}
    path = voc_year(texts, train=["good", "bad"], val=["other"]).parent
    with pytest.raises(DataError, match=r"bad\.xml cannot be read") as told:
        Voc().load(path, "2012:train")
    assert told.value.code == 3
    assert cause in told.value.cause
    assert len(str(told.value).splitlines()) == 3
    report = Voc().verify(path)
    assert len(report.faults) == 1
    assert "bad.xml" in report.faults[0]
    assert report.counts["2012:train"]["images"] == 1


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("<xmin>1<", "<xmin>one<", "<bndbox><xmin> of <object> is 'one', not a number"),
        ("<xmin>1<", "<xmin>nan<", "is 'nan', not a number"),
        ("<xmin>1<", "<xmin>1e300<", "is '1e300', not a number"),
        ("<difficult>0<", "<difficult>maybe<", "<difficult> is 'maybe', not 0 or 1"),
    ],
)
def test_values_that_are_none(voc_year: Year, xml: Xml, old: str, new: str, cause: str) -> None:
    path = voc_year({"a": xml([DOG]).replace(old, new)}, train=["a"])
    with pytest.raises(DataError) as told:
        Voc().load(path, "train")
    assert cause in told.value.cause


@pytest.mark.parametrize("encoding", ["utf-16", "utf-7", "cp037"])
def test_document_types_do_not_hide_in_encodings(voc_year: Year, encoding: str) -> None:
    path = voc_year({"a": ""}, train=["a"])
    declaration = f'<?xml version="1.0" encoding="{encoding}"?>'
    data = BOMB.encode(encoding) if encoding == "utf-16" else declaration.encode() + BOMB.encode(encoding)
    (path / "Annotations" / "a.xml").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.xml cannot be read"):
        Voc().load(path, "train")


def test_a_huge_annotation_is_not_read(voc_year: Year) -> None:
    path = voc_year({"a": "<annotation>" + " " * 2**24 + "</annotation>"}, train=["a"])
    with pytest.raises(DataError) as told:
        Voc().load(path, "train")
    assert told.value.cause == "it is larger than 16 MiB"


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", "..\\a"])
def test_names_stay_in_the_folder(voc_year: Year, xml: Xml, name: str) -> None:
    path = voc_year({"a": xml([DOG])}, train=[name])
    with pytest.raises(DataError, match=r"train\.txt cannot be read") as told:
        Voc().load(path, "train")
    assert "leads out of the image folder" in told.value.cause


def test_missing_files_are_named(voc_year: Year, xml: Xml) -> None:
    path = voc_year({"a": xml([DOG]), "b": xml([DOG]), "c": xml([DOG])}, train=["a", "b", "c"], val=[])
    (path / "Annotations" / "b.xml").unlink()
    (path / "JPEGImages" / "c.jpg").unlink()
    with pytest.raises(DataError, match=r"annotation .*b\.xml is missing"):
        Voc().load(path, "train")
    with pytest.raises(DataError, match=r"val\.txt cannot be read"):
        Voc().load(path, "val")
    with pytest.raises(DataError, match="VOC split 'test' is missing") as told:
        Voc().load(path, "test")
    assert "found: train, val" in told.value.cause
    with pytest.raises(DataError, match=r"VOC split '2007:train' is missing"):
        Voc().load(path, "2007:train")
    with pytest.raises(DataError, match="is missing"):
        Voc().load(path, "../../train")
    faults = Voc().verify(path).faults
    assert [any(name in f for f in faults) for name in ("b.xml", "c.jpg", "val.txt")] == [True] * 3
    assert len(faults) == 3


def test_the_size_told_must_be_the_images(voc_year: Year, xml: Xml) -> None:
    path = voc_year({"a": xml([DOG], width=41)}, train=["a"])
    found = Voc().load(path, "train")
    with pytest.raises(DataError, match=r"a\.jpg does not fit its annotation"):
        found.decode(found.records[0])
    assert any("a.jpg does not fit" in fault for fault in Voc().verify(path).faults)


def test_slips_and_overhang(voc_year: Year, xml: Xml) -> None:
    boxes = [(5, 5, 5, 5), (9, 5, 3, 8), (5, 5, 6, 6), (30, 20, 60, 25)]
    path = voc_year({"a": xml([("dog", box, 0) for box in boxes]), "b": xml([DOG])}, train=["a"], val=["b"])
    found = Voc().load(path, "train")
    assert found.records[0].boxes.tolist() == [[2, 4, 9, 8], [4, 4, 6, 6], [29, 19, 40, 25]]
    assert found.degenerate == ("a.jpg",)
    assert found.clipped == ("a.jpg",)
    report = Voc().verify(path)
    assert report.ok
    assert report.counts["train"]["degenerate"] == 1


def test_leaks_between_splits(voc_year: Year, xml: Xml) -> None:
    names = ("a", "b", "c", "d")
    texts = {name: xml([DOG]) for name in names}
    year = voc_year(texts, train=["a"], val=["b"], trainval=["a", "b"], test=["c", "d"])
    assert Voc().verify(year).ok
    copied = year / "JPEGImages" / "c.jpg"
    copied.write_bytes((year / "JPEGImages" / "a.jpg").read_bytes())
    faults = Voc().verify(year).faults
    assert faults == ["the same image is in several splits: train/a.jpg, trainval/a.jpg, test/c.jpg"]
    voc_year({}, test=["d", "d", "b"])
    faults = Voc().verify(year).faults
    assert "test lists d.jpg twice" in faults
    assert "the same image is in several splits: val/b.jpg, trainval/b.jpg, test/b.jpg" in faults


def test_fingerprint_sees_annotations_names_and_sizes(voc_year: Year, xml: Xml) -> None:
    path = voc_year({"a": xml([DOG]), "b": xml([DOG])}, train=["a"], val=["b"])
    prints = [Voc().load(path, "train").fingerprint]
    assert Voc().load(path, "train").fingerprint == prints[0]
    (path / "JPEGImages" / "a.jpg").write_bytes(b"another length")
    prints.append(Voc().load(path, "train").fingerprint)
    (path / "Annotations" / "a.xml").write_text(xml([CAT]))
    prints.append(Voc().load(path, "train").fingerprint)
    (path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    prints.append(Voc().load(path, "train").fingerprint)
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("text", "difficult"), [("Unspecified", False), ("", False), ("true", True), ("False", False), ("1", True)]
)
def test_difficult_as_tools_write_it(voc_year: Year, xml: Xml, text: str, difficult: bool) -> None:
    path = voc_year({"a": xml([DOG]).replace("<difficult>0<", f"<difficult>{text}<")}, train=["a"])
    assert Voc().load(path, "train").records[0].difficult.tolist() == [difficult]


def test_a_cause_that_all_files_have_is_told(voc_year: Year, xml: Xml) -> None:
    broken = xml([DOG]).replace("<difficult>0<", "<difficult>perhaps<")
    report = Voc().generic().verify(voc_year({"a": broken, "b": broken}, train=["a"], val=["b"]))
    assert any("<difficult> is 'perhaps', not 0 or 1" in fault for fault in report.faults)


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("a b", False),
        ("a b.jpg", True),
        ("JPEGImages/a b.JPG", True),
        ("JPEGImages\\a b.jpg", True),
        ("a b.xml", True),
        ("a b  1", True),
        ("a b -1", True),
    ],
)
def test_how_lists_name_images(voc_year: Year, xml: Xml, line: str, note: bool) -> None:
    path = voc_year({"a b": xml([DOG]), "c": xml([CAT])}, train=[line], val=["c"])
    found = Voc().load(path, "train")
    assert found.records[0].path.name == "a b.jpg"
    assert bool(found.notes) == note
    assert any(found.notes) == any("train.txt" in n for n in Voc().verify(path).notes)


@pytest.mark.parametrize(("images", "annotations"), [("images", "annotations"), ("JPEGImages", "Annotations")])
def test_images_and_annotations_without_lists_are_split_by_hash(
    voc_year: Year, xml: Xml, images: str, annotations: str
) -> None:
    names = [f"{i}" for i in range(7)]
    path = voc_year({name: xml([DOG]) for name in [*names, "lone"]}, folder="own")
    (path / "ImageSets" / "Main").rmdir()
    (path / "Annotations" / "lone.xml").unlink()
    (path / "Annotations").rename(path / annotations)
    (path / "JPEGImages").rename(path / images)
    layout = Voc().generic()
    assert layout.locate(path) == path
    assert layout.roles(path) == {"train": "train", "val": "test", "test": "test"}
    train, test = (layout.load(path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (5, 2)
    assert sorted(r.path.stem for r in (*train.records, *test.records)) == names
    assert "train: 1 images or annotations without the other are left out" in train.warnings
    assert layout.verify(path).ok
    with pytest.raises(DataError):
        Voc().locate(path)


def test_lists_by_other_names(voc_year: Year, xml: Xml) -> None:
    path = voc_year({"a": xml([DOG]), "b": xml([DOG])}, folder="own", Train=["a"], valid=["b"])
    layout = Voc().generic()
    assert layout.roles(path) == {"train": "train", "val": "val"}
    assert layout.verify(path).ok


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Training", "Valid")])
def test_folders_of_splits_without_lists(
    voc_year: Year, xml: Xml, noise: Callable[..., None], train: str, val: str
) -> None:
    path = voc_year({}, folder="own")
    (path / "ImageSets" / "Main").rmdir()
    for seed, (split, name) in enumerate(((train, "a"), (train, "b"), (val, "c"))):
        for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
            (path / part / split).mkdir(exist_ok=True)
            file = path / part / split / f"{name}.{suffix}"
            file.write_text(xml([DOG])) if suffix == "xml" else noise(file, seed=seed)
    layout = Voc().generic()
    assert layout.splits(path) == ("train", "val")
    assert len(layout.load(path, "train")) == 2
    assert layout.verify(path).ok


def test_one_list_of_another_name_is_of_all_images(voc_year: Year, xml: Xml) -> None:
    path = voc_year({str(i): xml([DOG]) for i in range(6)}, folder="own", default=list("01234"))
    layout = Voc().generic()
    assert [len(layout.load(path, split)) for split in layout.splits(path)] == [4, 1]


def test_verify_refuses_data_without_objects_as_a_run_does(voc_year: Year, xml: Xml) -> None:
    path = voc_year({"a": xml([DOG]), "b": xml([CAT])}, folder="own", train=["a"], val=["b"])  # a cat that is difficult
    faults = Voc().generic().verify(path).faults
    assert len(faults) == 1
    assert faults[0].startswith("val has no object to score on")
    alone = voc_year({"a": xml([DOG])}, folder="alone", train=["a"])
    assert any("nothing to score on" in fault for fault in Voc().generic().verify(alone).faults)


def test_text_that_is_no_utf8_is_named(voc_year: Year, xml: Xml) -> None:
    path = voc_year({"a": ""}, train=["a"])
    (path / "Annotations" / "a.xml").write_bytes(xml([("hérisson", (1, 1, 5, 5), 0)]).encode("cp1252"))
    with pytest.raises(DataError) as told:
        Voc().load(path, "train")
    assert "line 1 has the byte 0xe9" in told.value.cause
    (path / "ImageSets" / "Main" / "train.txt").write_text("a\n", encoding="utf-16")
    with pytest.raises(DataError) as told:
        Voc().load(path, "train")
    assert told.value.cause == "it is UTF-16, not UTF-8"


def test_real_voc(realdata: Path) -> None:
    path = Voc().locate(realdata / "det_voc2012_100")
    counts: dict[str, Any] = Voc().load(path, "2012:trainval").counts()
    assert (counts["images"], counts["boxes"], counts["difficult"]) == (100, 273, 38)
    assert all(counts["classes"].values())
    assert len(Voc().load(path, "2012:train")) == 80
    report = Voc().verify(path)
    assert report.ok
    assert report.notes == []


def test_real_cells(realdata: Path) -> None:
    layout = Voc().generic()
    path = layout.locate(realdata / "det_bccd")
    assert path == layout.locate(realdata / "det_bccd" / "BCCD")
    sets = {split: layout.load(path, split) for split in ("train", "val", "test")}
    assert [len(found) for found in sets.values()] == [205, 87, 72]
    names = sets["train"].classes
    assert names == ("Platelets", "RBC", "WBC")
    kept = {n: sum(found.counts()["classes"][n] for found in sets.values()) for n in names}
    # The two degenerate boxes are red cells that were counted among the 4155.
    assert sum(len(found.degenerate) for found in sets.values()) == 2
    assert sum(kept.values()) == 4155 + 372 + 361 - 2
    assert (kept["WBC"], kept["Platelets"]) in {(372, 361), (371, 361), (372, 360), (370, 361), (371, 360)}
    assert layout.roles(path) == {"train": "train", "val": "val", "test": "test"}
    report = layout.verify(path)
    assert report.ok
    assert {note.split(": ")[1] for note in report.notes} == {"BloodImage_00338.jpg", "BloodImage_00343.jpg"}
