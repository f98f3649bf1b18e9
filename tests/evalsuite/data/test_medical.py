"""Medical layouts: what each file's traps become, what verification finds, and what hostile lists cannot reach."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evalsuite.data.chexpert import BLANK, COMPETITION, LABELS, UNCERTAIN, Chexpert, Chexpert8x200, resolved
from evalsuite.data.classification import ClassificationSource, Folder
from evalsuite.data.covidx import Covidx
from evalsuite.data.images import read_rgb
from evalsuite.data.mura import Mura, study_of
from evalsuite.data.radiographs import chest, write_dicom, write_table
from evalsuite.data.rsna import DETAILS, IMAGES, Rsna, divided
from evalsuite.data.rsna import LABELS as BOXES
from evalsuite.errors import DataError, ImageError, UsageError

pytest.importorskip("pydicom", reason="needs the medical extra")

LAYOUTS = (Rsna(), Chexpert(), Covidx(), Mura(), Chexpert8x200())
NAMES = [layout.name for layout in LAYOUTS]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("worlds")
    return {layout.name: layout.demo(root, seed=3, images=40) for layout in LAYOUTS}


@pytest.fixture
def world(worlds, tmp_path) -> Callable[[str], Path]:
    """A copy of a demo world, to be broken."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(worlds[name], tmp_path / worlds[name].name))

    return copy


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(DataError) as told:
        call()
    assert told.value.code == 3
    assert len(str(told.value).splitlines()) == 3
    for word in words:
        assert word in str(told.value)


def rows(file: Path) -> list[list[str]]:
    with file.open(newline="") as handle:
        return list(csv.reader(handle))


def rewrite(file: Path, change: Callable[[list[list[str]]], list[list[str]]]) -> None:
    first, *others = rows(file)
    write_table(file, first, change(others))


# --- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_demo_is_found_sound_and_the_same_by_seed(layout: ClassificationSource, worlds, tmp_path):
    path = worlds[layout.name]
    assert layout.locate(path.parent) == layout.locate(path) == path
    report = layout.verify(path)
    assert report.faults == []
    assert [note for note in report.notes if "several splits" not in note] == []
    parts = [layout.load(path, split) for split in layout.splits(path)]
    assert all(len(part) >= 8 and part.known.all() for part in parts)
    assert all(len(np.unique(part.labels)) > 1 for part in parts)
    again = layout.demo(tmp_path, seed=3, images=40)
    files = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((path / f).read_bytes() == (again / f).read_bytes() for f in files)
    assert [layout.load(again, s).digest for s in layout.splits(again)] == [part.digest for part in parts]


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_what_is_not_there_is_told_with_the_tree(layout: ClassificationSource, worlds, tmp_path):
    with pytest.raises(DataError) as told:
        layout.locate(tmp_path)
    assert layout.tree.split()[0] in told.value.fix
    refused(lambda: layout.load(worlds[layout.name], "odd"), "odd")


LISTS = {
    "rsna": (BOXES, "patientId"),
    "chexpert": ("valid.csv", "Path"),
    "chexpert-retrieval": ("image-retrieval/candidate.csv", "Path"),
}


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.name in LISTS], ids=list(LISTS))
def test_a_table_with_other_columns_is_refused(layout: ClassificationSource, world):
    path = world(layout.name)
    name, column = LISTS[layout.name]
    first, *others = rows(path / name)
    write_table(path / name, [f"{c}x" if c == column else c for c in first], others)
    refused(lambda: [layout.load(path, split) for split in layout.splits(path)], f"no column {column}", name)
    write_table(path / name, first, [])
    refused(lambda: [layout.load(path, split) for split in layout.splits(path)], "no other")
    write_table(path / name, first, [[*others[0], "more"]])
    refused(lambda: [layout.load(path, split) for split in layout.splits(path)], "cells")
    report = layout.verify(path)
    assert not report.ok


def _hostile(name: str, path: Path, stray: str) -> None:
    """Put a path that leads out of the data set into its list."""
    if name == "rsna":
        rewrite(path / BOXES, lambda old: [[stray, *row[1:]] for row in old[:1]] + old[1:])
    elif name == "covidx":
        file = path / "train_COVIDx9A.txt"
        file.write_text(file.read_text() + f"p1 {stray}.png normal cohen\n")
    elif name == "mura":
        file = path / "train_image_paths.csv"
        file.write_text(file.read_text() + f"MURA-v1.1/train/XR_HAND/patient00001/study1_positive/{stray}\n")
    else:
        file = path / ("train.csv" if name == "chexpert" else "image-retrieval/query.csv")
        hostile = f"CheXpert-v1.0-small/train/patient00001/{stray}"
        column = rows(file)[0].index("Path")
        rewrite(file, lambda old: [[*old[0][:column], hostile, *old[0][column + 1 :]], *old[1:]])


@pytest.mark.parametrize("stray", ["../../../../etc/passwd", "/etc/passwd"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_a_list_cannot_name_files_elsewhere(layout: ClassificationSource, stray: str, world):
    path = world(layout.name)
    _hostile(layout.name, path, stray)

    if stray.startswith("/") and layout.name.startswith("chexpert"):  # it stays below, and is no file there
        split = layout.splits(path)[0] if layout.name == "chexpert" else "queries"
        place = layout.load(path, split).pixels.path(0)
        assert place.resolve().is_relative_to(path.resolve())
        assert not place.exists()
    else:
        refused(lambda: [layout.load(path, split) for split in layout.splits(path)], "passwd")


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_verify_finds_broken_missing_and_leaking_images(layout: ClassificationSource, world):
    path = world(layout.name)
    first, *_, last = layout.splits(path)
    one, other = layout.load(path, first), layout.load(path, last)
    broken, gone, copied = (one.pixels.path(int(one.places[i])) for i in (0, 1, 2))
    broken.write_bytes(broken.read_bytes()[:200])
    gone.unlink()
    copied.write_bytes(other.pixels.path(int(other.places[0])).read_bytes())
    report = layout.verify(path)
    told = "\n".join(report.faults)
    assert str(broken) in told
    assert f"{gone} is missing" in told
    assert "the same image is in several splits" in told
    assert len(report.faults) == 3


@pytest.mark.parametrize("layout", [Chexpert(), Covidx(), Mura()], ids=["chexpert", "covidx", "mura"])
def test_verify_finds_patients_in_two_splits(layout: ClassificationSource, world):
    path = world(layout.name)
    if layout.name == "chexpert":
        place = path / "valid" / "patient00001" / "study1" / "view1_frontal.jpg"
        rewrite(
            path / "valid.csv",
            lambda old: [["CheXpert-v1.0-small/valid/patient00001/study1/view1_frontal.jpg", *old[0][1:]], *old],
        )
    elif layout.name == "covidx":
        place = path / "test" / "new.png"
        (path / "test_COVIDx9A.txt").write_text((path / "test_COVIDx9A.txt").read_text() + "p0 new.png normal cohen\n")
    else:
        study = "valid/XR_HAND/patient00001/study9_negative"
        place = path / study / "image1.png"
        with (path / "valid_image_paths.csv").open("a") as file:
            file.write(f"MURA-v1.1/{study}/image1.png\n")
        with (path / "valid_labeled_studies.csv").open("a") as file:
            file.write(f"MURA-v1.1/{study}/,0\n")
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(chest(np.random.default_rng(99))).save(place)
    (fault,) = layout.verify(path).faults
    assert fault.startswith("group ")
    assert fault.endswith("is in several splits")


# --- RSNA -------------------------------------------------------------------------------------------------------


def test_rsna_is_divided_as_the_peers_do():
    patients = [f"{i:03d}" for i in range(101)]
    found = divided(patients[::-1])
    # What scikit-learn does, by its documented parts: a permutation, of which the first ceil(share) are held out.
    first = np.random.RandomState(0).permutation(101)
    rest = [patients[i] for i in first[:31]]
    second = np.random.RandomState(0).permutation(31)
    assert found["train"] == [patients[i] for i in first[31:]]
    assert found["val"] == [rest[i] for i in second[:16]]
    assert found["test"] == [rest[i] for i in second[16:]]
    assert set(found["train"]) | set(found["val"]) | set(found["test"]) == set(patients)


def test_rsna_joins_boxes_to_patients_and_reads_both_photometric_senses(worlds):
    path = worlds["rsna"]
    table = rows(path / BOXES)[1:]
    targets = {patient: max(int(r[5]) for r in table if r[0] == patient) for patient in {r[0] for r in table}}
    assert len(table) > len(targets)  # several boxes
    parts = [Rsna().load(path, split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(targets) == len(list((path / IMAGES).iterdir()))
    for part in parts:
        assert part.labels.tolist() == [targets[p] for p in part.groups.tolist()]
        assert set(part.tags[part.labels == 1].tolist()) <= {"Lung Opacity"}
    pydicom = pytest.importorskip("pydicom")
    senses = {}
    for file in sorted((path / IMAGES).iterdir()):
        dataset = pydicom.dcmread(file)
        senses.setdefault(dataset.PhotometricInterpretation, []).append(file)
    assert set(senses) == {"MONOCHROME1", "MONOCHROME2"}
    train = parts[0]
    for row in range(len(train)):  # air beside the body is dark, whatever the sense
        assert train[row][0, :4].mean() < train[row][30:40, 40:48].mean()
    report = Rsna().verify(path)
    assert sum(count["boxes"] for count in report.counts.values()) == sum(r[5] == "1" for r in table)
    assert sum(count["detailed"]["Lung Opacity"] for count in report.counts.values()) == sum(targets.values())


def test_rsna_tells_of_rows_that_disagree_and_counts_missing_targets(world):
    path = world("rsna")
    patients = Rsna().load(path, "train").groups.tolist()
    rewrite(path / BOXES, lambda old: [
        *([row[0], *row[1:5], ""] if row[0] == patients[0] else row for row in old),
        [patients[1], "", "", "", "", "0"], [patients[1], "1", "1", "5", "5", "1"],
    ])  # fmt: skip
    part = Rsna().load(path, "train")
    assert (part.labels[0], part.labels[1]) == (-1, 1)
    assert part.known.sum() == len(part) - 1
    assert part.notes == ("1 patients have rows with and without pneumonia; one with counts",)
    rewrite(path / DETAILS, lambda old: [*(row for row in old if row[0] != patients[2]), [patients[3], "Other"]])
    told = Rsna().verify(path).faults
    assert f"train: 1 patients are not in {DETAILS}" in told
    assert f"train: {patients[3]} has several classes in {DETAILS}" in told
    rewrite(path / BOXES, lambda old: [[*old[0][:5], "maybe"], *old[1:]])
    refused(lambda: Rsna().load(path, "train"), "'maybe'", "row 2")
    (path / DETAILS).unlink()
    rewrite(path / BOXES, lambda old: [["one", "", "", "", "", "0"]])
    refused(lambda: Rsna().load(path, "train"), "lists 1 patients")


def test_a_corrupt_dicom_is_named(world):
    path = world("rsna")
    part = Rsna().load(path, "test")
    part.pixels.path(0).write_bytes(b"DICM" * 50)
    with pytest.raises(ImageError, match=r"\.dcm cannot be decoded"):
        part[0]


# --- CheXpert ---------------------------------------------------------------------------------------------------


def test_chexpert_keeps_the_marks_of_its_files(worlds):
    path = worlds["chexpert"]
    train, valid = (Chexpert().load(path, split) for split in ("train", "valid"))
    assert train.classes == valid.classes == LABELS
    first, *others = rows(path / "train.csv")
    for row, cells in enumerate(others):
        told = dict(zip(first, cells, strict=True))
        marks = {"1.0": 1, "0.0": 0, "-1.0": UNCERTAIN, "": BLANK}
        assert train.labels[row].tolist() == [marks[told[name]] for name in LABELS]
        assert train.names[row] == told["Path"].removeprefix("CheXpert-v1.0-small/")
        assert train.groups[row] in told["Path"]
        assert train.tags[row] == told["Frontal/Lateral"]
    assert {UNCERTAIN, BLANK, 0, 1} == set(np.unique(train.labels).tolist())
    assert {0, 1} == set(np.unique(valid.labels).tolist())
    assert len(set(train.groups.tolist())) < len(train)
    report = Chexpert().verify(path)
    assert report.counts["train"]["uncertain"] == (train.labels == UNCERTAIN).sum() > 0
    assert report.counts["train"]["blank"] == (train.labels == BLANK).sum() > 0
    assert report.counts["train"]["views"] == {
        "Frontal": (train.tags == "Frontal").sum(),
        "Lateral": (train.tags == "Lateral").sum(),
    }
    assert Chexpert().roles(path) == {"train": "train", "test": "valid"}


def test_uncertain_and_blank_marks_become_what_the_policy_says():
    marks = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [-1, -1, -1, -1, -1], [-2, -2, -2, -2, -2]])
    # seeds: Atelectasis, Edema and Pleural Effusion 1, Cardiomegaly and Consolidation 0.
    assert COMPETITION == ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
    expected = {"peers": [1, 0, 0, 1, 1], "zeros": [0] * 5, "ones": [1] * 5, "ignore": [-1] * 5}
    for policy, row in expected.items():
        for blank, mark in (("zero", 0), ("ignore", -1)):
            found = resolved(marks, COMPETITION, policy, blank)  # type: ignore[arg-type]
            assert found.tolist() == [[1] * 5, [0] * 5, row, [mark] * 5]
    with pytest.raises(UsageError, match="no rule for an uncertain Fracture"):
        resolved(marks[:, :1], ["Fracture"])


def test_chexpert_refuses_other_marks_and_finds_rows_listed_twice(world):
    path = world("chexpert")
    rewrite(path / "train.csv", lambda old: [*old, old[0]])
    name = Chexpert().load(path, "train").names[0]
    report = Chexpert().verify(path)
    assert report.faults == [f"train lists {name} twice"]
    column = rows(path / "train.csv")[0].index("Edema")
    rewrite(path / "train.csv", lambda old: [[*old[0][:column], "2.0", *old[0][column + 1 :]], *old[1:]])
    refused(lambda: Chexpert().load(path, "train"), "'2.0' for Edema in row 2")
    rewrite(path / "valid.csv", lambda old: [["nowhere.jpg", *old[0][1:]], *old[1:]])
    refused(lambda: Chexpert().load(path, "valid"), "'nowhere.jpg' in row 2")


def test_chexpert_is_found_under_its_full_name_too(worlds, tmp_path):
    (tmp_path / "CheXpert-v1.0").symlink_to(worlds["chexpert"])
    found = Chexpert().locate(tmp_path)
    assert found == tmp_path / "CheXpert-v1.0"
    assert Chexpert().load(found, "valid")[0].shape[2] == 3  # whatever the lists call the folder


# --- COVIDx -----------------------------------------------------------------------------------------------------


def write_covidx(root: Path, version: str, **splits: list[tuple[str, str]]) -> Path:
    """Lists of (line, file); the files are written."""
    for split, lines in splits.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        for i, (_, file) in enumerate(lines):
            Image.fromarray(chest(np.random.default_rng([len(version), len(split), i]))).save(root / split / file)
        (root / f"{split}_COVIDx{version}.txt").write_text("".join(f"{line}\n" for line, _ in lines))
    return root


def test_covidx_reads_the_lines_of_all_versions(tmp_path):
    lines = [
        ("47c7 47c7.png normal", "47c7.png"),  # versions 1 and 2, and test lists of 3 to 5
        ("3 SARS-10.1148rg-day0.jpeg pneumonia cohen", "SARS-10.1148rg-day0.jpeg"),
        ("COVID 70 COVID(70).png COVID-19 sirm", "COVID(70).png"),  # versions 7 and 8: a space in the patient
        ("COVID 71 COVID(71).png COVID-19 sirm", "COVID(71).png"),
        ("COVID-19(106) COVID-19 (106).png COVID-19 sirm", "COVID-19 (106).png"),  # and one in a file's name
        ("3 other.png normal rsna", "other.png"),
    ]
    root = write_covidx(tmp_path / "covidx", "7A", train=lines, test=lines[:3])
    part = Covidx().load(root, "train 7A")
    assert part.names.tolist() == [file for _, file in lines]
    assert part.classes == ("normal", "pneumonia", "COVID-19")
    assert part.labels.tolist() == [0, 1, 2, 2, 2, 0]
    assert part.groups.tolist() == [
        "/47c7", "cohen/3", "sirm/COVID 70", "sirm/COVID 71", "sirm/COVID-19(106)", "rsna/3",
    ]  # fmt: skip
    assert part.tags.tolist() == ["", "cohen", "sirm", "sirm", "sirm", "rsna"]
    assert all(part[row].shape == (72, 88, 3) for row in range(len(part)))
    assert Covidx().roles(root)["test"] == "test 7A"


def test_versions_live_side_by_side(tmp_path):
    one, two, three, four = (
        (f"p{i} {i}.png {label} rsna", f"{i}.png")
        for i, label in enumerate(["normal", "COVID-19", "normal", "pneumonia"])
    )
    binary = [(one[0].replace("normal", "negative"), one[1]), (two[0].replace("COVID-19", "positive"), two[1])]
    root = write_covidx(tmp_path, "5", train=[one, two], test=[three])
    write_covidx(tmp_path, "9A", train=[one, two, four], test=[three])
    write_covidx(tmp_path, "8B", train=binary, test=binary[:1])
    assert Covidx().splits(root) == ("train 5", "test 5", "train 8B", "test 8B", "train 9A", "test 9A")
    assert Covidx().load(root, "train 8B").classes == ("negative", "positive")
    assert "train" not in Covidx().roles(root)
    report = Covidx().verify(root)
    # Only 8B leaks; that its train images are those of 9A is no fault.
    assert sorted(report.faults)[0] == "group rsna/p0 is in several splits"
    assert all("8B" in fault for fault in report.faults if "image" in fault)
    refused(lambda: Covidx().load(root, "train 3"), "train 5", "--set 'train_split=train 5'")


@pytest.mark.parametrize(
    "line", ["p1 1.png fever rsna", "1.png normal rsna", "p1 ../1.png normal", "p1 a/1.png normal x"]
)
def test_covidx_refuses_lines_it_cannot_read(line, tmp_path):
    root = write_covidx(
        tmp_path, "9A", train=[("p0 0.png normal rsna", "0.png")], test=[("p2 2.png normal rsna", "2.png")]
    )
    (root / "train_COVIDx9A.txt").write_text(f"p0 0.png normal rsna\n{line}\n")
    refused(lambda: Covidx().load(root, "train 9A"), "train_COVIDx9A.txt", line)


# --- MURA -------------------------------------------------------------------------------------------------------


def test_mura_takes_the_label_of_a_study_from_its_folder(worlds):
    path = worlds["mura"]
    part = Mura().load(path, "valid")
    assert all((label == 1) == ("_positive/" in name) for name, label in zip(part.names, part.labels, strict=True))
    assert all(
        group in name and f"XR_{tag}/" in name
        for name, group, tag in zip(part.names, part.groups, part.tags, strict=True)
    )
    studies = {study_of(name) for name in part.names.tolist()}
    assert len(studies) < len(part)
    assert len(set(part.groups.tolist())) < len(studies)
    assert Mura().verify(path).counts["valid"]["studies"] == len(studies)


def test_mura_tells_of_labels_that_disagree(world):
    path = world("mura")
    file = path / "train_labeled_studies.csv"
    first, second, *others = file.read_text().splitlines()
    study, _, label = first.rpartition(",")
    file.write_text("\n".join([f"{study},{1 - int(label)}", *others]) + "\n")
    told = Mura().verify(path).faults
    assert len(told) == 2
    assert told[0].endswith(f"has the label {label} by its folder, {file.name} says {1 - int(label)}")
    assert told[1].endswith("does not list it")
    assert second.partition("/")[2].rpartition("/")[0] in told[1]
    with (path / "valid_image_paths.csv").open("a") as handle:
        handle.write("MURA-v1.1/valid/image1.png\n")
    refused(lambda: Mura().load(path, "valid"), "'MURA-v1.1/valid/image1.png'")


# --- CheXpert 8x200 ---------------------------------------------------------------------------------------------


def test_retrieval_lists_name_findings_and_images(worlds):
    path = worlds["chexpert-retrieval"]
    layout = Chexpert8x200()
    candidates, queries = (layout.load(path, split) for split in layout.splits(path))
    assert candidates.labels.shape == (40, 8)
    assert (candidates.labels.sum(axis=1) == 1).all()
    assert queries.labels.tolist() == [i % 8 for i in range(16)]
    findings, sentences = layout.sentences(path)
    assert sentences[findings.tolist().index(3)] == "There is fracture in view 0."
    assert [n for n in layout.verify(path).notes if "several splits" in n] == [
        f"group patient900{i} is in several splits" for i in (16, 17, 18)
    ]


def test_retrieval_images_may_lie_beside_the_lists(world, tmp_path):
    path = world("chexpert-retrieval")
    (path / "CheXpert-v1.0-small").rename(tmp_path / "CheXpert-v1.0-small")
    assert Chexpert8x200().locate(tmp_path) == path
    assert Chexpert8x200().load(path, "queries")[0].shape[2] == 3
    shutil.rmtree(tmp_path / "CheXpert-v1.0-small")
    refused(lambda: Chexpert8x200().load(path, "queries"), "neither in", "nor beside it")
    rewrite(path / "text-retrieval" / "query.csv", lambda old: [["Scurvy", "Is it?"], *old])
    refused(lambda: Chexpert8x200().sentences(path), "'Scurvy'")


def test_the_official_queries_are_read(realdata):
    path = realdata / "med_chexpert8x200_queries"
    layout = Chexpert8x200()
    assert layout.locate(path) == path
    findings, sentences = layout.sentences(path)
    images, names = layout.queries(path)
    assert (len(sentences), len(names)) == (40, 80)  # SOURCE.md
    assert np.bincount(findings).tolist() == [5] * 8
    assert np.bincount(images).tolist() == [10] * 8
    assert sentences[0] == "An apical pneumothorax is present."
    assert layout_class(findings[0]) == "Pneumothorax"
    assert len(set(names)) == 80
    refused(lambda: layout.load(path, "queries"), "images of")  # which are under another agreement


def layout_class(finding: int) -> str:
    from evalsuite.data.chexpert import RETRIEVED

    return RETRIEVED[finding]


# --- images of all kinds ----------------------------------------------------------------------------------------


def test_images_of_all_modes_are_read_or_refused_by_name(tmp_path):
    grey = chest(np.random.default_rng(0))
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    made: dict[str, tuple[Image.Image, int]] = {
        "l.png": (Image.fromarray(grey), 0),
        "la.png": (Image.fromarray(grey).convert("LA"), 0),
        "rgba.png": (Image.fromarray(rgb).convert("RGBA"), 0),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 257), 0),
        "cmyk.tif": (Image.fromarray(rgb).convert("CMYK"), 1),
        "palette.png": (Image.fromarray(grey).convert("P"), 0),
    }
    for name, (image, most) in made.items():
        image.save(tmp_path / name)
        found = read_rgb(tmp_path / name)
        assert found.shape == rgb.shape
        assert np.abs(found.astype(int) - rgb).max() <= most, name
    Image.fromarray(grey > 100).save(tmp_path / "one.png")
    assert set(np.unique(read_rgb(tmp_path / "one.png"))) == {0, 255}
    write_dicom(tmp_path / "l.dcm", grey)
    np.testing.assert_array_equal(read_rgb(tmp_path / "l.dcm"), rgb)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match=r"float\.tif cannot be read"):
        read_rgb(tmp_path / "float.tif")


def test_a_folder_may_hold_dicoms(tmp_path):
    for label in ("healthy", "ill"):
        (tmp_path / label).mkdir()
        for i in range(6):
            write_dicom(
                tmp_path / label / f"{i}.DCM", chest(np.random.default_rng([len(label), i])), inverted=i % 2 == 0
            )
    found = Folder().load(tmp_path, "train")
    assert found.notes == ()
    assert {Path(name).suffix for name in found.ids} == {".DCM"}
    assert all(found[row].shape == (72, 88, 3) for row in range(len(found)))
