"""The feature cache: keys, one pass, killed and shared encodings, damage, housekeeping."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as image_ops

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.errors import BackboneError, DataError, ResourceError, UsageError
from evalsuite.features import Cache, Encoder, Output, Preprocess, encoder
from evalsuite.features import cache as module
from evalsuite.progress import Progress


class Net(nn.Module):
    """Two convolutions; tokens are the places of the last map. Counts the images it saw."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)
        self.norm = nn.BatchNorm2d(6)
        self.seen, self.sizes = 0, []

    def forward(self, x):
        self.seen += len(x)
        self.sizes.append(len(x))
        one = torch.relu(self.first(x))
        two = self.norm(self.second(one))
        return Features(pooled=two.mean((2, 3)), maps={2: one, 4: two}, tokens=two.flatten(2).mT)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    spec = BackboneSpec(
        arch="test:net",
        dim=6,
        strides={2: 4, 4: 6},
        gives=frozenset({"pooled", "maps", "tokens"}),
        image_size=(8, 8),
    )
    return Backbone(Net(), dataclasses.replace(spec, **changes))


@dataclasses.dataclass
class Images:
    """Random images by number, read one at a time; ``reads`` counts."""

    count: int = 10
    fingerprint: str = "f0"
    split: str = "train"
    reads: int = 0

    @property
    def ids(self):
        return [f"im{i}" for i in range(self.count)]

    @property
    def labels(self):
        return np.arange(self.count) % 3

    def __getitem__(self, index):
        self.reads += 1
        return np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)


PLAIN = Preprocess((8, 8), "none")


def pixels(images):
    return torch.stack([torch.from_numpy(images[i]).permute(2, 0, 1) for i in range(images.count)]).float() / 255


@dataclasses.dataclass
class Photographs(Images):
    """Of several sizes, smooth as photographs are."""

    def __getitem__(self, index):
        height, width = 12 + 3 * (index % 4), 30 - 5 * (index % 3)
        image = torch.from_numpy(super().__getitem__(index)).permute(2, 0, 1)
        return image_ops.resize(image, [height, width], antialias=True).permute(1, 2, 0).numpy()


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)


def test_all_outputs_come_from_one_pass_and_later_from_none(tmp_path, small_shards):
    backbone, images, cache = make(), Images(), Cache(tmp_path)
    what = ("pooled", "tokens/avg", "tokens/max", "map2", "map4/max2", "layer:first", "layer:second/avg2")
    backbone.train()
    encoded = cache.features(backbone, images, what, preprocess=PLAIN, batch_size=3)
    assert backbone.net.seen == encoded.encoded == images.reads == 10
    assert backbone.training
    assert backbone.net.norm.training
    assert backbone.net.norm.num_batches_tracked == 0  # statistics did not move
    backbone.eval()
    with torch.no_grad():
        x = backbone.normalise(pixels(images))
        features, first = backbone.look(x), backbone.net.first(x)
    expected = {
        "pooled": features.pooled,
        "tokens/avg": features.tokens.mean(1),
        "tokens/max": features.tokens.amax(1),
        "map2": features.maps[2].mean((2, 3)),
        "map4/max2": features.maps[4].flatten(1),
        "layer:first": first.mean((2, 3)),
        "layer:second/avg2": backbone.net.second(torch.relu(first)).flatten(1).detach(),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(encoded.arrays[name], values.numpy(), atol=1e-5)
        assert isinstance(encoded.arrays[name], np.memmap)
    assert list(encoded.ids) == images.ids
    assert (encoded.labels == images.labels).all()
    seen = backbone.net.seen
    again = cache.features(backbone, images, what, preprocess=PLAIN)
    assert (backbone.net.seen, again.encoded) == (seen, 0)
    assert all((again.arrays[name] == encoded.arrays[name]).all() for name in what)
    with pytest.raises(ValueError, match="read-only"):
        again.arrays["pooled"][0] = 0


def test_only_the_outputs_that_are_missing_are_written(tmp_path):
    backbone, cache = make(), Cache(tmp_path)
    cache.features(backbone, Images(), ("pooled",), preprocess=PLAIN)
    file = next(tmp_path.rglob("features.npy"))
    before = file.stat().st_mtime_ns
    cache.features(backbone, Images(), ("pooled", "map4"), preprocess=PLAIN)
    assert len(cache.ls()) == 2
    assert file.stat().st_mtime_ns == before


def test_batches_do_not_cross_shards_and_change_nothing_else(tmp_path, small_shards):
    backbone = make()
    cache = Cache(tmp_path)
    cache.features(backbone, Images(), preprocess=PLAIN, batch_size=3)
    assert backbone.net.sizes == [3, 1, 3, 1, 2]


def change_weight(backbone):
    with torch.no_grad():
        backbone.net.second.weight[0, 0, 0, 0] += 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"weights": change_weight},
        {"spec": {"mean": (0.5, 0.5, 0.5)}},
        {"spec": {"std": (0.5, 0.5, 0.5)}},
        {"spec": {"options": {"stride": 1}}},
        {"images": {"fingerprint": "f1"}},
        {"images": {"split": "test"}},
        {"images": {"count": 9}},
        {"preprocess": Preprocess((8, 8), "squash")},
        {"precision": "bf16-mixed"},
        {"dtype": "float16"},
        {"what": ("map2",)},
    ],
    ids=lambda change: str({k: getattr(v, "__name__", v) for k, v in change.items()}),
)
def test_whatever_can_change_a_feature_is_in_the_key(tmp_path, change):
    cache = Cache(tmp_path)
    cache.features(make(), Images(), preprocess=PLAIN)
    backbone = make(**change.get("spec", {}))
    change.get("weights", lambda b: None)(backbone)
    images = Images(**change.get("images", {}))
    rest = {k: v for k, v in change.items() if k in ("precision", "dtype", "what")}
    found = cache.features(backbone, images, preprocess=change.get("preprocess", PLAIN), **rest)
    assert found.encoded == images.count
    assert len(cache.ls()) == 2


@pytest.mark.parametrize("same", [{"batch_size": 2}, {"workers": 1}, {"device": torch.device("cpu")}], ids=str)
def test_what_cannot_change_a_feature_is_not_in_the_key(tmp_path, same):
    cache = Cache(tmp_path)
    cache.features(make(), Images(), preprocess=PLAIN)
    assert cache.features(make(), Images(), preprocess=PLAIN, **same).encoded == 0


def test_changed_source_code_is_another_key(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    source = tmp_path / "look.py"
    look = "def look(net, x):\n    features = net(x)\n    return type(features)(pooled={factor} * features.pooled)\n"
    found = []
    for factor in (1, 2):
        source.write_text(look.format(factor=factor))
        os.utime(source, ns=(factor, factor))
        plugin = type(sys)("look_plugin")
        plugin.__file__ = str(source)
        monkeypatch.setitem(sys.modules, "look_plugin", plugin)
        exec(compile(source.read_text(), source, "exec"), plugin.__dict__)
        backbone = make()
        found.append(cache.features(Backbone(backbone.net, backbone.spec, plugin.look), Images(), preprocess=PLAIN))
    assert found[1].encoded == 10
    np.testing.assert_allclose(found[1].arrays["pooled"], 2 * found[0].arrays["pooled"], rtol=1e-6)


def test_precision_and_storage(tmp_path):
    cache = Cache(tmp_path)
    exact = cache.features(make(), Images(), preprocess=PLAIN).arrays["pooled"]
    half = cache.features(make(), Images(), preprocess=PLAIN, dtype="float16").arrays["pooled"]
    mixed = cache.features(make(), Images(), preprocess=PLAIN, precision="bf16-mixed").arrays["pooled"]
    last = cache.features(make(1), Images(), preprocess=PLAIN, channels_last=True)
    assert (half == exact.astype(np.float16)).all()
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, exact, atol=0.05)
    assert not (mixed == exact).all()
    np.testing.assert_allclose(
        last.arrays["pooled"], Cache(tmp_path / "b").features(make(1), Images(), preprocess=PLAIN).arrays["pooled"],
        atol=1e-5,
    )  # fmt: skip


# --- killed and shared


WHAT = ("pooled", "map2")


def wait_for(path, seconds=20):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


OTHER = """
import importlib.util, sys
from pathlib import Path
name, path, root, gate = sys.argv[1:]  # under the same name, which is part of the key
spec = importlib.util.spec_from_file_location(name, path)
world = importlib.util.module_from_spec(spec)
sys.modules[name] = world
spec.loader.exec_module(world)
world.slow_encode(Path(root), Path(gate))
"""


def slow_encode(root, gate):
    """Encode, but stay in the middle of the network until ``gate`` is there."""
    torch.set_num_threads(1)
    backbone = make()

    def stop(*_):
        (gate.parent / "inside").touch()
        wait_for(gate)

    backbone.net.register_forward_pre_hook(stop)
    Cache(root).features(backbone, Images(), preprocess=PLAIN)


def test_two_processes_share_one_encoding(tmp_path):
    root, gate = tmp_path / "cache", tmp_path / "gate"
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, __name__, __file__, str(root), str(gate)],
        env=os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[2])},
    )
    try:
        wait_for(tmp_path / "inside", 60)
        assert Cache(root).gc(0) == []  # what is being encoded is left alone
        digest = next(path.name for path in root.glob("??/*"))
        with pytest.raises(ResourceError, match="is in use"):
            Cache(root).rm([digest])

        class Told(module.Progress):
            def say(self, line):
                assert "waiting for another process" in line
                gate.touch()  # only now may the other go on

        backbone = make()
        found = Cache(root).features(backbone, Images(), preprocess=PLAIN, progress=Told(quiet=True))
    finally:
        gate.touch()
        code = other.wait(60)
    assert code == 0
    assert found.encoded == backbone.net.seen == 0
    assert Cache(root).features(make(), Images(), preprocess=PLAIN).encoded == 0


# --- memory


class Narrow(Net):
    """Fits ``most`` images."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error = most, error

    def forward(self, x):
        if len(x) > self.most:
            raise self.error
        return super().forward(x)


OUT = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
]


@pytest.mark.parametrize("error", OUT, ids=lambda e: type(e).__name__)
def test_a_batch_that_does_not_fit_is_halved(tmp_path, error, capsys):
    backbone = make()
    torch.manual_seed(0)
    narrow = Backbone(Narrow(3, error), backbone.spec)
    progress = module.Progress(stream=sys.stderr)
    found = Cache(tmp_path).features(narrow, Images(), preprocess=PLAIN, batch_size=10, progress=progress)
    assert narrow.net.sizes == [2, 2, 2, 2, 2]
    assert "out of memory at 10 images; going on with 5 at a time" in capsys.readouterr().err
    plain = Cache(tmp_path / "b").features(backbone, Images(), preprocess=PLAIN)
    np.testing.assert_allclose(found.arrays["pooled"], plain.arrays["pooled"], atol=1e-6)


def test_an_image_that_does_not_fit_is_refused_and_other_errors_pass(tmp_path):
    spec = make().spec
    with pytest.raises(ResourceError, match="one image of"):
        Cache(tmp_path).features(Backbone(Narrow(0, MemoryError()), spec), Images(), preprocess=PLAIN)
    with pytest.raises(RuntimeError, match="shapes"):
        Cache(tmp_path).features(Backbone(Narrow(0, RuntimeError("shapes")), spec), Images(), preprocess=PLAIN)


def test_a_full_disk_is_told_of(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        Cache(tmp_path).features(make(), Images(), preprocess=PLAIN)
    monkeypatch.undo()
    assert Cache(tmp_path).features(make(), Images(), preprocess=PLAIN).encoded == 10


def test_features_that_are_not_finite_are_refused(tmp_path):
    backbone = make()
    with torch.no_grad():
        backbone.net.norm.weight.fill_(1e6)
    with pytest.raises(BackboneError, match="do not fit into float16"):
        Cache(tmp_path).features(backbone, Images(), preprocess=PLAIN, dtype="float16")
    with torch.no_grad():
        backbone.net.norm.weight.fill_(float("nan"))
    with pytest.raises(BackboneError, match="are not finite"):
        Cache(tmp_path).features(backbone, Images(), preprocess=PLAIN)
    assert not any(entry.complete for entry in Cache(tmp_path).ls())


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features_and_leaves_the_layout_as_it_was(tmp_path):
    here = Cache(tmp_path / "cpu").features(make(), Images(), WHAT, preprocess=PLAIN)
    backbone = make()
    there = Cache(tmp_path / "gpu").features(backbone, Images(), WHAT, preprocess=PLAIN, device="cuda")
    for name in WHAT:
        np.testing.assert_allclose(there.arrays[name], here.arrays[name], atol=2e-2)  # convolutions may be in TF32
    assert backbone.net.second.weight.is_contiguous()


# --- damage and housekeeping


def test_damage_is_found_and_a_cut_file_is_refused(tmp_path, small_shards):
    cache = Cache(tmp_path)
    cache.features(make(), Images(), ("pooled", "map2"), preprocess=PLAIN)
    assert cache.verify() == {}
    file = next(tmp_path.rglob("features.npy"))
    digest = file.parent.name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cache.verify() == {digest: "shard 2 is not what was written"}
    assert cache.verify([digest[:10]]) == {digest: "shard 2 is not what was written"}
    file.write_bytes(content[:-5])
    assert list(cache.verify()) == [digest]
    with pytest.raises(DataError, match=f"cache entry {digest[:12]} is damaged"):
        cache.features(make(), Images(), ("pooled", "map2"), preprocess=PLAIN)
    assert [entry.digest for entry in cache.rm([digest[:12]])] == [digest]
    assert cache.features(make(), Images(), ("pooled", "map2"), preprocess=PLAIN).encoded == 10
    assert cache.verify() == {}


def test_a_manifest_of_nonsense_is_damage(tmp_path):
    cache = Cache(tmp_path)
    cache.features(make(), Images(), preprocess=PLAIN)
    manifest = next(tmp_path.rglob("manifest.json"))
    manifest.write_text("{")
    assert list(cache.verify()) == [manifest.parent.name]
    assert not cache.ls()[0].complete
    with pytest.raises(DataError, match="is damaged"):
        cache.features(make(), Images(), preprocess=PLAIN)
    cache.rm([manifest.parent.name])
    assert cache.ls() == []


def test_a_cut_file_of_an_unfinished_encoding_is_begun_anew(tmp_path, small_shards):
    cache = Cache(tmp_path)
    cache.features(make(), Images(), preprocess=PLAIN)
    folder = next(tmp_path.rglob("manifest.json")).parent
    (folder / "manifest.json").unlink()
    (folder / "shard-00000").write_text("0" * 64)
    os.truncate(folder / "features.npy", 200)
    assert cache.features(make(), Images(), preprocess=PLAIN).encoded == 10
    assert cache.verify() == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_an_encoding_in_order_and_whole_shards_are_kept(tmp_path, small_shards, number, code):
    class Told(Images):
        def __getitem__(self, index):
            if index == 4:
                os.kill(os.getpid(), number)
            return super().__getitem__(index)

    cache = Cache(tmp_path)
    with pytest.raises(SystemExit) as leave:
        cache.features(make(), Told(), preprocess=PLAIN, batch_size=2)
    assert leave.value.code == code
    assert cache.features(make(), Images(), preprocess=PLAIN).encoded == 10 - 4


def test_entries_are_listed_by_use_and_the_oldest_go_first(tmp_path):
    cache = Cache(tmp_path)
    for split in ("a", "b", "c"):
        cache.features(make(), Images(split=split), preprocess=PLAIN)
    for entry in cache.ls():
        at = {"a": 30, "b": 10, "c": 20}[entry.key["split"]]
        os.utime(tmp_path / entry.digest[:2] / entry.digest / "used", (at, at))
    entries = cache.ls()
    assert [entry.key["split"] for entry in entries] == ["a", "c", "b"]
    assert all((entry.rows, entry.width, entry.complete) == (10, 6, True) for entry in entries)
    size = sum(entry.size for entry in entries)
    assert cache.gc(size) == []
    assert [entry.key["split"] for entry in cache.gc(size - 1)] == ["b"]
    cache.features(make(), Images(split="c"), preprocess=PLAIN)  # used now
    assert [entry.key["split"] for entry in cache.gc(entries[0].size)] == ["a"]
    assert [entry.key["split"] for entry in cache.ls()] == ["c"]


def test_names_that_say_nothing_are_refused(tmp_path):
    cache = Cache(tmp_path)
    for name in ("feet", "pooled/avg", "tokens/max2", "map0", "map2/avg0", "layer:", "map2/raw"):
        with pytest.raises(UsageError, match="names no output"):
            Output.parse(name)
    for name in ("map8", "layer:third"):
        with pytest.raises(BackboneError, match="has no output"):
            cache.features(make(), Images(), (name,), preprocess=PLAIN)
    with pytest.raises(BackboneError, match="has no output 'tokens/avg'"):
        cache.features(make(gives=frozenset({"pooled"})), Images(), ("tokens/avg",), preprocess=PLAIN)
    for options in ({"precision": "8"}, {"dtype": "float8"}, {"batch_size": 0}):
        with pytest.raises(UsageError):
            cache.features(make(), Images(), preprocess=PLAIN, **options)
    with pytest.raises(DataError, match="is empty"):
        cache.features(make(), Images(0), preprocess=PLAIN)
    for names in ([""], ["ff"]):
        with pytest.raises(UsageError, match="no cache entries begin with"):
            cache.rm(names)
    assert cache.rm([]) == []


def test_the_root_is_told_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EVALSUITE_CACHE", str(tmp_path))
    assert Cache().root == tmp_path / "features"
    monkeypatch.delenv("EVALSUITE_CACHE")
    monkeypatch.setenv("HOME", "/nowhere")
    assert Cache().root == Path("/nowhere/.cache/evalsuite/features")


# --- preprocessing


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (33, 97), (20, 20)])
def test_crop_is_torchvisions_resize_and_centre_crop(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = Preprocess((28, 28))(image)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    expected = image_ops.center_crop(image_ops.resize(pixels, [32], antialias=True), [28, 28])
    assert torch.equal(found, expected)


def test_squash_pad_and_none():
    image = np.full((10, 20, 3), 200, dtype=np.uint8)
    assert Preprocess((8, 8), "squash")(image).shape == (3, 8, 8)
    padded = Preprocess((8, 8), "pad")(image)
    assert padded[:, 2:6].eq(200).all()
    assert padded[:, :2].eq(0).all()
    assert padded[:, 6:].eq(0).all()
    assert torch.equal(Preprocess((10, 20), "none")(image), torch.full((3, 10, 20), 200, dtype=torch.uint8))
    with pytest.raises(DataError, match="20x10 pixels, not 8x8"):
        Preprocess((8, 8), "none")(image)
    wide = Preprocess((8, 32), "crop", ratio=1.0)(image)
    assert wide.shape == (3, 8, 32)


SHOWN = {
    "CIFAR at a network for CIFAR": ((32, 32), [(32, 32)], 1.0),
    "Tiny ImageNet at its size": ((64, 64), [(64, 64)], 1.0),
    "CIFAR at a network for ImageNet": ((224, 224), [(32, 32)], 1.0),
    "MedMNIST of 28 pixels at 32": ((32, 32), [(28, 28)], 1.0),
    "STL-10 at a network for ImageNet": ((224, 224), [(96, 96)], 1.0),
    "photographs at a small network": ((32, 32), [(375, 500), (500, 333)], 1.0),
    "photographs": ((224, 224), [(375, 500), (500, 333)], 0.875),
    "images of 128 pixels at 224": ((224, 224), [(128, 128)], 0.875),
    "photographs cut to the network's size": ((224, 224), [(224, 224)], 1.0),
    "one that is not": ((224, 224), [(224, 224)] * 9 + [(224, 225)], 0.875),
    "mostly small": ((224, 224), [(40, 90)] * 6 + [(400, 400)] * 5, 1.0),
    "mostly large": ((224, 224), [(40, 90)] * 5 + [(400, 400)] * 6, 0.875),
    "a flat input of the images' size": ((128, 256), [(128, 256)], 1.0),
    "a flat input, turned images": ((128, 256), [(256, 128)], 0.875),
    "long, thin images": ((224, 224), [(60, 900)], 1.0),
}


@pytest.mark.parametrize(("size", "images", "ratio"), SHOWN.values(), ids=SHOWN)
def test_the_margin_follows_the_images_and_the_network(size, images, ratio):
    auto = Preprocess(size, "auto", interpolation="bicubic")
    found = auto.resolved(lambda index: (*images[index], 3), len(images))
    assert found == Preprocess(size, "crop", ratio, "bicubic")
    assert found.resolved(lambda _: pytest.fail("it is decided"), 1) == found


def test_an_image_of_the_networks_size_is_shown_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = Preprocess((32, 32), "auto").resolved(lambda _: image.shape, 1)
    assert torch.equal(whole(image), torch.from_numpy(image).permute(2, 0, 1))
    with pytest.raises(UsageError, match="an image alone does not say"):
        Preprocess((32, 32), "auto")(image)


def test_the_margin_is_decided_on_images_all_over_the_set_that_can_be_read():
    asked = []

    def shape(index):
        asked.append(index)
        if index % 2:
            raise DataError("it is broken", cause="of course", fix="none")
        return (40, 40, 3) if index < 900 else (500, 500, 3)

    assert Preprocess((224, 224), "auto").resolved(shape, 1000).ratio == 1.0
    assert (len(asked), asked[0], asked[-1]) == (64, 0, 999)

    def unreadable(index):
        raise DataError("it is broken", cause="of course", fix="none")

    assert Preprocess((224, 224), "auto").resolved(unreadable, 3).ratio == 0.875


def test_by_default_what_was_done_is_in_the_key(tmp_path):
    backbone, images, cache = make(), Images(), module.Cache(tmp_path)  # both of 8 pixels
    cache.features(backbone, images)
    (entry,) = cache.ls()
    assert (entry.key["preprocess"]["rule"], entry.key["preprocess"]["ratio"]) == ("crop", 1.0)
    assert cache.features(backbone, images, preprocess=Preprocess((8, 8), "crop", 1.0)).encoded == 0


def test_workers_are_chosen_by_measurement(monkeypatch):
    reader = encoder._Reader(Images(100), PLAIN)
    assert encoder._measured_workers(reader, 100) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert encoder._measured_workers(reader, 100, patience=0.0) == 7


@pytest.mark.parametrize("rule", ["crop", "squash", "pad"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_resized_on_the_device_give_the_same_features_to_a_rounding(tmp_path, small_shards, rule, workers):
    backbone, images, cache = make(), Photographs(), Cache(tmp_path)
    here, there = (
        cache.features(
            backbone, images, preprocess=Preprocess((8, 8), rule, resize=where), batch_size=3, workers=workers
        )
        for where in ("workers", "device")
    )
    assert here.encoded == there.encoded == 10  # each has an entry of its own
    np.testing.assert_allclose(there.arrays["pooled"], here.arrays["pooled"], atol=0.02)
    scattered = np.std(here.arrays["pooled"], axis=0).max()
    assert np.abs(there.arrays["pooled"] - here.arrays["pooled"]).max() < 0.1 * scattered


def test_an_encoder_gives_what_is_pooled_from_and_goes_on_after_running_out_of_memory(monkeypatch):
    backbone, told = make().eval(), list[str]()
    outputs = [Output.parse("map4"), Output.parse("layer:first")]
    whole = backbone(torch.full((5, 3, 8, 8), 60 / 255)).maps[4].detach()
    forward = backbone.net.forward

    def small(x):
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return forward(x)

    monkeypatch.setattr(backbone.net, "forward", small)
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "say", told.append)
    encoder = Encoder(backbone, outputs, PLAIN, torch.device("cpu"), most=5, progress=progress, whole=True)
    with encoder:
        maps, layer = encoder(torch.full((5, 3, 8, 8), 60, dtype=torch.uint8))
        again, _ = encoder(torch.full((5, 3, 8, 8), 60, dtype=torch.uint8))
    torch.testing.assert_close(maps, whole)
    assert torch.equal(maps, again)
    assert layer.shape == (5, 4, 4, 4)
    assert len(told) == 1
    assert "going on with 2" in told[0]


# --- outputs that keep their shape, other kinds of input, many rows at once


def test_tokens_maps_and_layers_are_kept_whole(tmp_path, small_shards):
    backbone, what = make(), ("tokens/whole", "map2/whole", "layer:second/whole")
    encoded = Cache(tmp_path).features(backbone, Images(), what, preprocess=PLAIN, batch_size=3)
    with torch.no_grad():
        features = backbone.eval()(pixels(Images()))
    assert [encoded.arrays[name].shape for name in what] == [(10, 4, 6), (10, 4, 4, 4), (10, 6, 2, 2)]
    np.testing.assert_allclose(encoded.arrays["tokens/whole"], features.tokens.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoded.arrays["map2/whole"], features.maps[2].numpy(), atol=1e-5)
    assert Cache(tmp_path).verify() == {}
    assert sorted(entry.shape for entry in Cache(tmp_path).ls()) == [(4, 4, 4), (4, 6), (6, 2, 2)]
    again = Cache(tmp_path).features(backbone, Images(), what, preprocess=PLAIN)
    assert (again.encoded, again.arrays["tokens/whole"].shape) == (0, (10, 4, 6))


def test_a_killed_encoding_of_whole_tokens_goes_on(tmp_path, small_shards):
    @dataclasses.dataclass
    class Broken(Images):
        def __getitem__(self, index):
            if index == 7:
                raise DataError("im7 is broken", cause="it is", fix="mend it")
            return super().__getitem__(index)

    backbone = make()
    with pytest.raises(DataError, match="im7"):
        Cache(tmp_path).features(backbone, Broken(), ("tokens/whole",), preprocess=PLAIN, batch_size=2)
    encoded = Cache(tmp_path).features(backbone, Images(), ("tokens/whole",), preprocess=PLAIN, batch_size=2)
    assert (encoded.encoded, encoded.arrays["tokens/whole"].shape) == (6, (10, 4, 6))


def test_bare_tokens_are_refused_with_what_to_say():
    with pytest.raises(UsageError, match="does not say whether they are pooled") as told:
        Output.parse("tokens")
    assert "tokens/avg" in told.value.fix
    assert "tokens/whole" in told.value.fix
    for name in ("tokens/full", "tokens/whole2", "map4/whole2", "pooled/whole", "joint/avg", "map4/full2", "whole"):
        with pytest.raises(UsageError, match="names no output"):
            Output.parse(name)


@pytest.mark.parametrize(
    ("name", "source", "pool", "grid", "needs"),
    [
        ("pooled", "pooled", "avg", 1, {"pooled"}), ("tokens/whole", "tokens", "whole", 1, {"tokens"}),
        ("map16", "map16", "avg", 1, {"maps"}), ("map16/avg12", "map16", "avg", 12, {"maps"}),
        ("map4/whole", "map4", "whole", 1, {"maps"}), ("layer:a.b/max6", "layer:a.b", "max", 6, set()),
        ("layer:a/full", "layer:a", "full", 1, set()), ("joint", "joint", "avg", 1, {"joint"}),
    ],
)  # fmt: skip
def test_what_a_name_says(name, source, pool, grid, needs):
    output = Output.parse(name)
    assert (output.source, output.pool, output.grid, output.needs) == (source, pool, grid, needs)
    assert output.vector is not name.endswith("/whole")


class Windows(nn.Module):
    """A layer that gives two rows an image, as attention in windows does."""

    def __init__(self):
        super().__init__()
        self.cut = nn.Identity()

    def forward(self, x):
        return Features(pooled=self.cut(x.flatten(1).reshape(2 * len(x), -1)).reshape(len(x), -1))


def test_rows_of_another_number_or_shape_are_refused_by_name(tmp_path):
    spec = BackboneSpec("test:windows", 192, {}, frozenset({"pooled"}), image_size=(8, 8))
    with pytest.raises(BackboneError, match=r"'layer:cut' is \(6, 96\) for 3 rows"):
        Cache(tmp_path).features(Backbone(Windows(), spec), Images(3), ("layer:cut",), preprocess=PLAIN)


@pytest.mark.parametrize("rule", ["crop", "squash", "pad"])
@pytest.mark.parametrize("resize", ["workers", "device"])
def test_a_stack_of_frames_is_sized_as_each_of_them(rule, resize):
    preprocess = Preprocess((8, 6), rule, resize=resize)
    frames = np.random.default_rng(0).integers(0, 256, (3, 13, 17, 3), dtype=np.uint8)
    sized = preprocess(frames)
    assert sized.shape == (3, 3, 8, 6)
    assert torch.equal(sized, torch.stack([preprocess(frame) for frame in frames]))
    assert torch.equal(preprocess(frames[0, ..., :1]), sized[0, :1])  # a map of one channel
    assert preprocess.sized(torch.zeros(13, 17, dtype=torch.uint8)).shape == (8, 6)


def test_frames_that_do_not_fit_are_refused_by_their_size():
    with pytest.raises(DataError, match="17x13 pixels, not 6x8"):
        Preprocess((8, 6), "none")(np.zeros((2, 13, 17, 3), np.uint8))
    auto = Preprocess((224, 224), "auto")
    assert auto.resolved(lambda _: (8, 300, 400, 3), 2).ratio == auto.ratio  # eight frames are not eight pixels
    assert auto.resolved(lambda _: (300, 64), 2).ratio == 1.0


@dataclasses.dataclass
class Clips(Images):
    """Clips of two frames."""

    kind: str = "clip"

    def __getitem__(self, index):
        return np.stack([super(Clips, self).__getitem__(index + i) for i in (0, 1)])


class Frames(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(3, 4, 3)

    def forward(self, clips):
        return Features(pooled=self.net(clips.flatten(0, 1)).mean((2, 3)).unflatten(0, clips.shape[:2]).flatten(1))


@pytest.mark.parametrize("resize", ["workers", "device"])
def test_clips_go_through_the_same_cache(tmp_path, resize):
    spec = BackboneSpec("test:frames", 8, {}, frozenset({"pooled"}), image_size=(8, 8), takes="clip")
    backbone, clips = Backbone(Frames(), spec), Clips(5)
    shown = dataclasses.replace(PLAIN, resize=resize)
    encoded = Cache(tmp_path).features(backbone, clips, preprocess=shown, batch_size=2, channels_last=True)
    seen = torch.stack([torch.from_numpy(clips[i]) for i in range(5)]).movedim(-1, -3).float() / 255
    with torch.no_grad():
        np.testing.assert_allclose(encoded.arrays["pooled"], backbone(seen).pooled.numpy(), atol=1e-5)
    with pytest.raises(BackboneError, match="test:frames does not take image"):
        Cache(tmp_path).features(backbone, Images(5), preprocess=PLAIN)
    with pytest.raises(BackboneError, match="test:net does not take clip"):
        Cache(tmp_path).features(make(), clips, preprocess=PLAIN)


@dataclasses.dataclass
class Decoder(Images):
    """Gives many rows at once; ``calls`` are what it was asked for."""

    calls: list = dataclasses.field(default_factory=list)
    short: bool = False

    def __getitems__(self, rows):
        self.calls.append(list(rows))
        return [super(Decoder, self).__getitem__(row) for row in rows[self.short :]]


def test_the_rows_of_a_batch_are_read_by_one_call(tmp_path):
    data = Decoder(7)
    encoded = Cache(tmp_path / "a").features(make(), data, preprocess=PLAIN, batch_size=3)
    assert data.calls == [[0, 1, 2], [3, 4, 5], [6]]
    alone = Cache(tmp_path / "b").features(make(), Images(7), preprocess=PLAIN, batch_size=3)
    assert (encoded.arrays["pooled"] == alone.arrays["pooled"]).all()
    with pytest.raises(DataError, match="gave 2 rows where 3 were asked for"):
        Cache(tmp_path / "c").features(make(), Decoder(7, short=True), preprocess=PLAIN, batch_size=3)
