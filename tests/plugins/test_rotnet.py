"""RotNet: four turns of one crop, the networks of the paper, and their published checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evalsuite_adainf.modifier import AdaInf
from evalsuite_gsimclr.modifier import GSimCLR
from evalsuite_hallucinator.modifier import Hallucinator
from evalsuite_interclr.modifier import InterCLR
from evalsuite_rotnet.method import PaddedCrop, RotNet, build
from torch import nn

from evalsuite import DataError, UsageError, load_backbone
from evalsuite.backbone import build as build_by_name
from evalsuite.checkpoints.matching import look_meta
from evalsuite.features import Output
from pretrain import Arrays, Augment, Corpus, Recipe
from pretrain.testing import check_method, check_modifier, losses, tiny_train


def rotnet(**options):
    return RotNet(RotNet.Options(**{"size": 16} | options))


@pytest.mark.parametrize("options", [{}, {"pad": 2}], ids=str)
def test_what_every_method_owes(options):
    check_method(lambda: rotnet(**options))


@pytest.mark.parametrize("name", ["adainf", "gsimclr"])
def test_it_composes_with_what_changes_data_views_and_batches(name, tmp_path):
    np.savez(tmp_path / "a.npz", image=np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8))
    made = {
        "adainf": lambda: AdaInf(AdaInf.Options(tmp_path / "a.npz", copies=1)),
        "gsimclr": lambda: GSimCLR(GSimCLR.Options(side=8, channels=(4,), epochs=1)),
    }
    check_modifier(made[name], rotnet)


@pytest.mark.parametrize("modifier", [Hallucinator, InterCLR])
def test_it_has_no_pairs_and_refuses_who_needs_them(modifier):
    with pytest.raises(UsageError, match=f"{modifier.__name__} wraps 'pairs', which RotNet does not offer") as refused:
        Recipe(rotnet(), modifier())
    assert "losses" in refused.value.cause


def test_the_network_sees_four_turns_of_the_same_crop_at_once(bench):
    table = bench(rotnet())
    seen = []
    table.run.backbone.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = table.batch(torch.arange(16))
    features = table.recipe.features(table.run, batch)
    assert [f.pooled.shape for f in features] == [(16, 12)] * 4
    (pixels,) = seen
    crops = table.run.backbone.normalise(batch.views[0].data)
    for turn, part in enumerate(pixels.chunk(4)):
        assert torch.equal(part, torch.rot90(crops, turn, (2, 3)))


def test_the_loss_is_the_mean_cross_entropy_over_all_turns(bench):
    table = bench(rotnet())
    batch = table.batch(torch.arange(16))
    features = table.recipe.features(table.run, batch)
    (loss,) = table.recipe.losses(table.run, batch, features, []).values()
    classifier = table.recipe.method.classifier
    each = [F.cross_entropy(classifier(f.pooled), torch.full((16,), turn)) for turn, f in enumerate(features)]
    torch.testing.assert_close(loss, torch.stack(each).mean())


# Views -------------------------------------------------------------------------------------------------------


def test_views_are_plain_crops_or_crops_of_the_padded_image():
    assert RotNet().views() == (Augment(224, crop=(0.08, 1.0), jitter=None, gray=0.0),)
    assert RotNet(RotNet.Options(**RotNet.preset("cifar").options)).views() == (PaddedCrop(32, 4),)


def test_a_padded_crop_shows_the_image_shifted_with_black_around_it():
    image = torch.arange(1, 3 * 8 * 8 + 1, dtype=torch.uint8).view(3, 8, 8)
    padded = F.pad(image, [2] * 4)
    windows = {(y, x, flip) for y in range(5) for x in range(5) for flip in (False, True)}
    seen = set()
    for seed in range(400):
        view = PaddedCrop(8, 2)({"image": image}, torch.Generator().manual_seed(seed)).data
        assert view.shape == (3, 8, 8)
        for y, x, flip in windows:
            window = padded[:, y : y + 8, x : x + 8]
            if torch.equal(view, window.flip(2) if flip else window):
                seen.add((y, x, flip))
    assert seen == windows


def test_an_image_too_small_for_its_crops_is_refused_in_words():
    with pytest.raises(DataError, match="20 x 20 pixels is too small") as refused:
        PaddedCrop(32, 4)({"image": torch.zeros(3, 20, 20, dtype=torch.uint8)}, torch.Generator())
    assert "rotnet.pad=0" in refused.value.fix


# Held-out images ---------------------------------------------------------------------------------------------


def test_it_learns_and_the_log_has_the_share_of_turns_told_rightly_on_held_out_images():
    """Of images that say where up is: dark above, bright below."""
    ramp = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8)[None, :, None, None], (64, 16, 16, 3))
    ramps = Arrays(np.array(ramp), np.arange(64) % 2)
    corpus = Corpus(ramps, (ramps, ramps))
    learned = tiny_train(lambda: rotnet(lr=0.1), corpus=corpus, steps=48, epochs=6, knn_every=6)
    terms = losses(learned)
    assert terms[0]["rotation"] == pytest.approx(math.log(4), abs=0.4)
    assert terms[-1]["rotation"] < 0.5
    assert measured(learned) > 0.9
    idle = tiny_train(lambda: rotnet(lr=1e-9), corpus=corpus, steps=8, knn_every=1)
    assert measured(idle) < 0.7


def measured(trained):
    """The last share in the log; losses are logged apart from it."""
    (last,) = [entry["rotation_accuracy"] for entry in trained.log if "knn" in entry]
    assert all("rotation_accuracy" not in terms for terms in losses(trained))
    return last


def test_measuring_changes_nothing():
    runs = [tiny_train(rotnet, steps=8, epochs=2, knn_every=every) for every in (0, 1)]
    assert runs[0].backbone.identity == runs[1].backbone.identity
    assert losses(runs[0]) == losses(runs[1])


# Networks ----------------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """``BasicBlock`` of ``architectures/NetworkInNetwork.py``, for its names."""

    def __init__(self, channels, out, kernel):
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("Conv", nn.Conv2d(channels, out, kernel, 1, (kernel - 1) // 2, bias=False))
        self.layers.add_module("BatchNorm", nn.BatchNorm2d(out))
        self.layers.add_module("ReLU", nn.ReLU())

    def forward(self, x):
        return self.layers(x)


class Official(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self._feature_blocks = nn.ModuleList(blocks)

    def forward(self, x):
        found = [x]
        for block in self._feature_blocks:
            found.append(block(found[-1]))
        return found[1:]


def official_nin():
    """Four blocks with ``use_avg_on_conv3`` off, and the classifier of four turns."""
    pools = {1: nn.MaxPool2d(3, 2, 1), 2: nn.AvgPool2d(3, 2, 1)}
    widths = {1: (3, 192, 160, 96), 2: (96, 192, 192, 192)}
    blocks = []
    for number in (1, 2, 3, 4):
        block, sizes = nn.Sequential(), widths.get(number, (192,) * 4)
        for place in (1, 2, 3):
            kernel = {1: 5 if number < 3 else 3}.get(place, 1)
            block.add_module(f"Block{number}_ConvB{place}", Unit(sizes[place - 1], sizes[place], kernel))
        if number in pools:
            block.add_module(f"Block{number}_Pool", pools[number])
        blocks.append(block)
    last = nn.Sequential()
    last.add_module("GlobalAveragePooling", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    last.add_module("Classifier", nn.Linear(192, 4))
    return Official([*blocks, last])


def official_alexnet():
    def unit(channels, out, kernel, **options):
        return nn.Sequential(nn.Conv2d(channels, out, kernel, **options), nn.BatchNorm2d(out), nn.ReLU())

    dense = [(nn.Linear(width, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU()) for width in (9216, 4096)]
    return Official([
        unit(3, 64, 11, stride=4, padding=2), nn.MaxPool2d(3, 2), unit(64, 192, 5, padding=2), nn.MaxPool2d(3, 2),
        unit(192, 384, 3, padding=1), unit(384, 256, 3, padding=1), unit(256, 256, 3, padding=1), nn.MaxPool2d(3, 2),
        nn.Sequential(nn.Flatten(), *(layer for layers in dense for layer in layers)),
        nn.Sequential(nn.Linear(4096, 4)),
    ])  # fmt: skip


def varied(net):
    """Running statistics as after some training."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize(
    ("make", "arch", "size", "maps", "legacy"),
    [
        (official_nin, "nin4", 32, {2: 0, 4: 3}, True),
        (official_alexnet, "alexnet", 224, {4: 0, 8: 2, 16: 6, 32: 7}, False),
    ],
    ids=["nin4", "alexnet"],
)
def test_a_published_checkpoint_loads_without_a_flag_and_says_what_its_source_says(
    make, arch, size, maps, legacy, tmp_path, registry
):
    """``model_net_epoch200`` as ``Algorithm.save_network`` writes it; the released ones are of torch's old format."""
    net, path = varied(make()), tmp_path / "model_net_epoch200"
    torch.save({"epoch": 200, "network": net.state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    loaded = load_backbone(path, registry)
    backbone, report = loaded.backbone, loaded.report
    assert (report.arch, report.layout, report.matched) == (f"rotnet:{arch}", "rotnet", 1.0)
    assert report.container == "network"
    assert not report.leftover
    classifier = {"nin4": "_feature_blocks.4.Classifier", "alexnet": "_feature_blocks.9.0"}[arch]
    assert set(report.unexpected) >= {f"{classifier}.weight", f"{classifier}.bias"}
    assert all(name.startswith(classifier) for name in report.unexpected)
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features, expected = backbone(pixels), net(backbone.normalise(pixels))
    pooled = expected[3].mean((2, 3)) if arch == "nin4" else expected[8]
    torch.testing.assert_close(features.pooled, pooled, rtol=1e-5, atol=1e-6)
    for stride, place in maps.items():
        torch.testing.assert_close(features.maps[stride], expected[place], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["nin4", "alexnet"])
def test_a_network_gives_what_its_spec_says(name):
    backbone = build(name)
    features, _ = look_meta(backbone)
    assert features.pooled.shape == (1, backbone.spec.dim)
    assert {s: m.shape[1] for s, m in features.maps.items()} == backbone.spec.strides
    side = backbone.spec.image_size[0]
    sizes = {s: m.shape[-1] for s, m in features.maps.items()}
    assert sizes == ({2: 16, 4: 8} if name == "nin4" else {4: 55, 8: 27, 16: 13, 32: 6})
    assert side == {"nin4": 32, "alexnet": 224}[name]


def test_the_normalisation_of_cifar_is_the_official_one():
    assert build("nin4").spec.mean == pytest.approx([v / 255 for v in (125.3, 123.0, 113.9)])
    assert build("nin4").spec.std == pytest.approx([v / 255 for v in (63.0, 62.1, 66.7)])


@pytest.mark.parametrize(("name", "layers"), [("nin4", 4), ("alexnet", 5)])
def test_every_layer_of_the_paper_can_be_named_as_an_output(name, layers, registry):
    backbone = build_by_name(f"rotnet:{name}", registry)
    for number in range(1, layers + 1):
        Output.parse(f"layer:conv{number}").check(backbone)


def test_an_unknown_network_is_refused(registry):
    with pytest.raises(Exception, match="there are alexnet and nin4"):
        build_by_name("rotnet:vgg", registry)


def test_presets_are_of_its_options_and_say_where_they_are_from():
    assert {"imagenet", "cifar"} <= set(RotNet.presets)
    for preset in RotNet.presets.values():
        RotNet(RotNet.Options(**preset.options))
        assert preset.source
    with pytest.raises(ValueError, match="nesterov is for SGD"):
        RotNet.Options(momentum=0.0)
