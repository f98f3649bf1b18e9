"""Lists of images as people have them: other names of columns, dialects, encodings, texts that mean nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evalsuite.data
from evalsuite.data import parse
from evalsuite.data.classification import ClassificationSet, Csv
from evalsuite.data.tables import read_columns, read_table
from evalsuite.errors import DataError, UsageError
from evalsuite.hooks import Registry

COUNT = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``img/0.png`` to ``img/3.png``, which differ."""
    (tmp_path / "img").mkdir()
    for i in range(COUNT):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6), dtype=np.uint8)).save(
            tmp_path / "img" / f"{i}.png"
        )
    return tmp_path


def rows(*cells: str, start: int = 0) -> list[str]:
    """A row an image: ``img/N.png`` and these cells."""
    return [f"img/{i}.png,{cell}" for i, cell in enumerate(cells, start)]


def write(folder: Path, *lines: str, encoding: str = "utf-8", end: str = "\n") -> Path:
    path = folder / "list.csv"
    path.write_bytes(end.join([*lines, ""]).encode(encoding))
    return path


def read(path: Path, options: str = "") -> dict[str, ClassificationSet]:
    layout = Csv().configured(options) if options else Csv()
    return {split: layout.load(path, split) for split in layout.splits(path)}


def labelled(path: Path, options: str = "") -> dict[str, str | None]:
    """{image: class} of all splits."""
    found = {}
    for part in read(path, options).values():
        for name, label in zip(part.names.tolist(), part.labels.tolist(), strict=True):
            found[name] = part.classes[label] if label >= 0 else None
    return found


AB = {"img/0.png": "a", "img/1.png": "b", "img/2.png": "a", "img/3.png": "b"}


@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
def test_an_index_column_is_left_out(folder: Path, index: str) -> None:
    path = write(
        folder, f"{index},path,label,split", *(f"{i},{row}" for i, row in enumerate(rows(*["a,train", "b,test"] * 2)))
    )
    assert labelled(path) == AB
    assert all(part.notes == () for part in read(path).values())


@pytest.mark.parametrize("missing", ["nan", "NaN", "NA", "None", "null", "", "N/A", "<NA>"])
def test_what_tools_write_for_nothing_is_a_missing_label(folder: Path, missing: str) -> None:
    path = write(folder, "path,label,split", *rows("a,train", "b,train", "a,test", f"{missing},train"))
    parts = read(path)
    assert parts["train"].classes == ("a", "b")
    assert parts["train"].labels.tolist() == [0, 1, -1]
    assert parts["train"].notes == ((f"1 labels of the list are missing: 1 {missing}",) if missing else ())
    assert Csv().verify(path).counts["train"]["unlabelled"] == 1


@pytest.mark.parametrize("missing", ["nan", "", "None"])
def test_a_row_without_a_group_is_one_of_its_own(folder: Path, missing: str) -> None:
    path = write(
        folder, "path,label,split,group", *rows(f"a,train,{missing}", f"b,train,{missing}", "a,test,p", "b,test,q")
    )
    assert read(path)["train"].groups.tolist() == ["img/0.png", "img/1.png"]
    assert Csv().verify(path).ok


def test_whole_numbers_written_as_fractions_are_whole(folder: Path) -> None:
    path = write(folder, "path,label,split,group", *rows("1.0,train,7.0", "0.0,train,8", ",train,7.0", "10.0,test,9.0"))
    train = read(path)["train"]
    assert train.classes == ("0", "1", "10")
    assert train.labels.tolist() == [1, 0, -1]
    assert train.groups.tolist() == ["7", "8", "7"]
    path = write(folder, "path,label,split", *rows("1.0,train", "v2,train", "1.0,test", "v2,test"))
    assert read(path)["train"].classes == ("1.0", "v2")


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
def test_other_delimiters_and_ends_of_lines(folder: Path, delimiter: str, end: str) -> None:
    lines = [line.replace(",", delimiter) for line in ("path,label,split", *rows(*["a,train", "b,test"] * 2))]
    assert labelled(write(folder, *lines, end=end)) == AB
    assert labelled(write(folder, f"sep={delimiter}", *lines, "", delimiter * 2, end="\r\n")) == AB


def test_quotes_and_delimiters_at_the_end_are_read(folder: Path) -> None:
    lines = [
        '"path","label","split"',
        '"img/0.png","a, the first","train"',
        '"img/1.png","say ""b""",test,',
        "img/2.png,a b,test",
    ]
    assert labelled(write(folder, *lines)) == {
        "img/0.png": "a, the first", "img/1.png": 'say "b"', "img/2.png": "a b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("cp1252", "CP1252"),
        ("latin-1", "CP1252"),
    ],
)
def test_other_encodings_are_named_with_what_to_do(folder: Path, encoding: str, words: str) -> None:
    path = write(folder, "path,label,split", *rows("café,train", "b,test"), encoding=encoding)
    (fault,) = Csv().verify(path).faults
    assert words in fault
    assert "iconv -f" in fault
    assert (
        labelled(write(folder, "path,label,split", *rows("café,train", "b,test"), encoding="utf-8-sig"))["img/0.png"]
        == "café"
    )


def test_names_as_windows_writes_them(folder: Path) -> None:
    path = write(
        folder, "path,label,split", *(row.replace("img/", ".\\img\\") for row in rows(*["a,train", "b,test"] * 2))
    )
    assert labelled(path) == AB
    path = write(folder, "path,label,split", *(f"{folder}/{row}" for row in rows(*["a,train", "b,test"] * 2)))
    assert labelled(path) == AB
    path = write(folder, "path,label", "C:\\data\\img\\0.png,a", *rows("b", start=1))
    (fault,) = Csv().verify(path).faults
    assert "'C:\\\\data\\\\img\\\\0.png' in line 2" in fault
    assert "?root=FOLDER" in fault


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ("path,label,split", None),
        ("Path,Label,Split", "columns: path is 'Path', label is 'Label', split is 'Split'"),
        ("filename,class,subset", "columns: path is 'filename', label is 'class', split is 'subset'"),
        ("image,target,split", "columns: path is 'image', label is 'target', split is 'split'"),
        ("Image Path,category,partition", "columns: path is 'Image Path', label is 'category', split is 'partition'"),
        ("img,y,set", "columns: path is 'img', label is 'y', split is 'set'"),
    ],
)
def test_columns_of_usual_names_are_taken_and_told(folder: Path, columns: str, note: str | None) -> None:
    path = write(folder, columns, *rows(*["a,Training", "b,Test"] * 2))
    assert labelled(path) == AB
    assert read(path)["train"].notes == ((note,) if note else ())
    assert Csv().roles(path) == {"train": "train", "test": "test"}


def test_groups_of_usual_names_are_taken_and_other_columns_are_told(folder: Path) -> None:
    path = write(folder, "file_name,width,diagnosis,class,patient_id,split", *(
        f"img/{i}.png,6,x,{'ab'[i % 2]},p{i % 2},{split}" for i, split in enumerate(["train", "train", "test", "test"])
    ))  # fmt: skip
    report = Csv().verify(path)
    assert "group p0 is in several splits" in report.faults
    assert report.notes == [
        "train: columns: path is 'file_name', label is 'class', group is 'patient_id', split is 'split'",
        "train: columns that are not used: width, diagnosis",
    ]


def test_columns_of_any_names_are_named(folder: Path) -> None:
    path = write(folder, "where is it,what,fold,bird", *rows(*["a,train,p", "b,train,q", "a,check,r", "b,check,s"]))
    options = "path=where%20is%20it&label=what&split=fold&group=bird"
    parts = read(path, options)
    assert labelled(path, options) == AB
    assert parts["check"].groups.tolist() == ["r", "s"]
    assert parts["train"].notes == ()
    layout = Csv().configured(options)
    assert layout.key == Csv().configured(options).key != Csv().key
    with pytest.raises(DataError, match="has the columns") as refused:
        Csv().splits(path)
    assert "csv:PATH?path=COLUMN&label=COLUMN" in refused.value.fix
    marks = write(folder, "path,red,round,split", *rows("1,0,train", "0,1.0,train", "1,True,test", "nan,0,test"))
    found = read(marks, "label=red,round")
    assert found["train"].classes == ("red", "round")
    assert found["test"].labels.tolist() == [[1, 1], [-1, 0]]


def test_the_path_of_data_carries_the_options(folder: Path) -> None:
    shelf = Registry()
    evalsuite.data.evalsuite_register(shelf)
    path = write(folder, "path,what,label,split", *rows(*["a,1,train", "b,2,test"] * 2))
    layout, found = parse(f"csv:{path}?label=what", shelf)
    assert found == path
    assert layout.load(path, "train").classes == ("a", "b")
    for options, words in (
        ("labels=what", "unknown: labels"),
        ("what", "unknown: what"),
        ("label=gone", "no column 'gone'"),
    ):
        with pytest.raises(UsageError) as refused:
            parse(f"csv:{path}?{options}", shelf)[0].splits(path)
        assert words in str(refused.value)
    with pytest.raises(UsageError, match="takes no options"):
        parse(f"folder:{folder}?label=a", shelf)
    odd = folder / "a?b.csv"
    path.rename(odd)
    assert parse(f"csv:{odd}", shelf)[1] == odd


def test_paths_may_count_from_another_folder(folder: Path) -> None:
    path = write(folder, "path,label,split", "0.png,a,train", "1.png,b,test")
    with pytest.raises(DataError, match="is missing") as refused:
        Csv().load(path, "train")
    assert refused.value.fix == f"say where paths count from: --data 'csv:{path}?root=img'"
    assert labelled(path, "root=img") == {"0.png": "a", "1.png": "b"}
    assert labelled(path, f"root={folder / 'img'}") == {"0.png": "a", "1.png": "b"}
    with pytest.raises(UsageError, match="is no folder"):
        read(path, "root=gone")


def test_images_may_be_named_without_their_suffix(folder: Path) -> None:
    path = write(folder, "id,label,split", "img/0,a,train", "img/1.0,b,train", "img/2.png,a,test", "img/gone,b,test")
    assert labelled(path) == {"img/0.png": "a", "img/1.png": "b", "img/2.png": "a", "img/gone": "b"}


def test_rows_without_a_split_and_measures_are_told(folder: Path) -> None:
    path = write(folder, "path,label,split", *rows("a,train", "b,train", "a,test", "b,nan"))
    parts = read(path)
    assert (len(parts["train"]), len(parts["test"])) == (2, 1)
    assert parts["train"].notes == ("1 rows name no split and are left out",)
    path = write(folder, "path,label", *(f"img/0.png,{i / 7:.4f}" for i in range(1, 30)))
    with pytest.raises(DataError, match="holds measures, not classes"):
        Csv().splits(path)


def test_tables_of_known_layouts_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a;b;c\n1;"x;y";3\n')
    assert read_columns(tmp_path / "t.csv", ("b", "c")) == {"b": ["x;y"], "c": ["3"]}
    assert read_table(tmp_path / "t.csv").lines == [2]
    with pytest.raises(DataError, match="no table as wanted"):
        read_columns(tmp_path / "t.csv", ("d",))
    (tmp_path / "odd.csv").write_text("a,b\n1,2,3\n")
    with pytest.raises(DataError) as refused:
        read_table(tmp_path / "odd.csv")
    assert refused.value.cause == "line 2 has 3 cells, the first one 2"
