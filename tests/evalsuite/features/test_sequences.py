"""Sequences: groups of rows, what may be asked of them, and what is refused; texts through the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.errors import BackboneError, DataError, UsageError
from evalsuite.features import Cache, Encoded, Sequences, Texts

IDS = ["a.mp4#0", "a.mp4#0.5", "b#walk#1.25", "b#walk#2", "b#walk#3.5"]


def encoded(ids=IDS):
    return Encoded({"pooled": np.arange(2.0 * len(ids)).reshape(-1, 2)}, ids, None, 0)


def test_frames_are_grouped_by_their_video():
    videos = Sequences.of(encoded())
    assert list(videos.names) == ["a.mp4", "b#walk"]
    assert len(videos) == 2
    assert videos.lengths.tolist() == [2, 3]
    assert videos.index.tolist() == [0, 0, 1, 1, 1]
    assert videos.times.tolist() == [0, 0.5, 1.25, 2, 3.5]
    assert [part.tolist() for part in videos] == [[[0, 1], [2, 3]], [[4, 5], [6, 7], [8, 9]]]
    assert videos[-1].tolist() == [[4, 5], [6, 7], [8, 9]]
    assert videos.between(1, 1.25, 3.5).tolist() == [[4, 5], [6, 7]]
    assert [part.tolist() for part in videos.aligned(np.arange(5))] == [[0, 1], [2, 3, 4]]
    assert videos.spread(np.array([7, 9])).tolist() == [7, 7, 9, 9, 9]
    assert videos.mean().tolist() == [[1, 2], [6, 7]]
    assert np.shares_memory(videos[0], videos.rows)


def test_fewer_sequences():
    walks = Sequences(np.arange(6), [1, 3, 6], ["x", "y", "z"], np.array([0, 0, 1, 0, 1, 2]))
    later = walks[1:]
    assert (list(later.names), later.ends.tolist(), later.times.tolist()) == (["y", "z"], [2, 5], [0, 1, 0, 1, 2])
    assert [part.tolist() for part in later] == [[1, 2], [3, 4, 5]]
    for empty in (slice(3, 3), slice(None, None, 2), slice(None, None, -1)):
        with pytest.raises(UsageError, match="do not lie one after the other"):
            walks[empty]
    with pytest.raises(IndexError):
        walks[3]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ends": [2, 2, 5]}, "ends 2, 2, 5 for 5 rows"), ({"ends": [2]}, "ends 2 for 5 rows"),
        ({"ends": []}, "ends of shape"), ({"ends": [2.0, 5.0]}, "type float64"), ({"ends": [-1, 5]}, "ends -1, 5"),
        ({"ends": [6, 5]}, "ends 6, 5"), ({"names": ["a"]}, "1 names for 2"), ({"names": ["a", "a"]}, "2 names for 2"),
        ({"times": [0, 1, 2]}, "times of shape"), ({"times": [0, 1, 2, 2, 3]}, "times 2, 2, 3"),
        ({"times": [0, 1, 2, float("nan"), 3]}, "times of shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, match):
    with pytest.raises(UsageError, match=match):
        Sequences(**{"rows": np.zeros((5, 2)), "ends": [2, 5], **changes})


def test_values_of_another_number_are_refused():
    videos = Sequences(np.zeros(5), [2, 5])
    for ask in (lambda: videos.aligned(np.zeros(4)), lambda: videos.spread(np.zeros(5))):
        with pytest.raises(UsageError, match="values for"):
            ask()
    with pytest.raises(UsageError, match="without times"):
        videos.between(0, 0, 1)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (["a"], "names no frame"), (["#1"], "names no frame"), (["a#soon"], "names no frame"),
        (["a#-1"], "names no frame"), (["a#nan"], "names no frame"), (["a#0", "b#0", "a#1"], "do not stand together"),
        (["a#1", "a#0"], "not in their order"), (["a#1", "a#1.0"], "not in their order"),
    ],
)  # fmt: skip
def test_ids_that_are_no_frames_are_refused(ids, match):
    with pytest.raises(DataError, match=match):
        Sequences.of(encoded(ids))


# --- texts


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 4)
        self.read: list[str] = []

    def forward(self, texts: list[str]) -> Features:
        self.read += texts
        return Features(pooled=torch.stack([self.table(torch.tensor(list(t.encode()))).mean(0) for t in texts]))


def towers(net: Words, texts: list[str]) -> Tensor:
    return net(texts).pooled


def reader(takes="text"):
    torch.manual_seed(0)
    gives = frozenset({"pooled"} if takes == "text" else {"pooled", "joint"})
    spec = BackboneSpec("words", 4, {}, gives, image_size=(8, 8), takes=takes)
    return Backbone(Words(), spec, towers={} if takes == "text" else {"text": towers})


@pytest.mark.parametrize(("takes", "output"), [("text", "pooled"), ("image", "joint")])
def test_texts_are_encoded_once(tmp_path, takes, output):
    backbone, texts = reader(takes), Texts(["one", "two", "drei"], np.array([0, 1, 1]))
    first = Cache(tmp_path).features(backbone, texts, (output,), batch_size=2)
    assert (backbone.net.read, first.encoded) == (["one", "two", "drei"], 3)
    with torch.no_grad():
        np.testing.assert_allclose(first.arrays[output], backbone.encode_text(list(texts.rows)).numpy(), atol=1e-6)
    again = Cache(tmp_path).features(
        backbone, Texts(["one", "two", "drei"]), (output,)
    )  # labels are no part of the key
    assert again.encoded == 0
    other = Cache(tmp_path).features(backbone, Texts(["one", "two", "three"]), (output,))
    assert other.encoded == 3
    assert Cache(tmp_path).ls()[0].key["kind"] == "text"


def test_rows_of_texts_are_checked(tmp_path):
    assert Texts(["a", "b"]).fingerprint != Texts(["ab", ""]).fingerprint
    assert Texts(["a", "1:b"]).fingerprint != Texts(["a1:b"]).fingerprint
    assert Texts(["\ud800"]).fingerprint  # a lone surrogate is a text, too
    assert Texts(["a"], np.array([0])).digest != Texts(["a"], np.array([1])).digest
    for rows in ("abc", ["a", 3]):
        with pytest.raises(DataError, match="no row of texts"):
            Texts(rows)
    with pytest.raises(DataError, match="2 labels for 1 texts"):
        Texts(["a"], np.array([0, 1]))
    spec = BackboneSpec("eye", 3, {}, frozenset({"pooled"}), image_size=(8, 8))
    with pytest.raises(BackboneError, match="eye does not take text"):
        Cache(tmp_path).features(Backbone(nn.Identity(), spec), Texts(["a"]))
