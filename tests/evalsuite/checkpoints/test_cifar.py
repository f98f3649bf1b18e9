"""ResNets made for CIFAR, of several people's code: recognised without a flag, features equal to a plain reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evalsuite import checkpoints
from evalsuite.backbone import Backbone, build
from evalsuite.checkpoints import Loaded, load_backbone
from evalsuite.errors import BackboneError
from evalsuite.hooks import Registry
from evalsuite.probes import NearestNeighbours, Train, evaluate

State = dict[str, Tensor]
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


# ------------------------------------------------------------------------------------ files as others write them


class Writer:
    """A state dict written tensor by tensor, every number drawn."""

    def __init__(self, seed: int = 0) -> None:
        self.state: State = {}
        self.rng = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def conv(self, name: str, inside: int, out: int, kernel: int = 3, bias: bool = False) -> None:
        self.state[f"{name}.weight"] = self.draw(out, inside, kernel, kernel) * (inside * kernel**2) ** -0.5
        if bias:
            self.state[f"{name}.bias"] = self.draw(out) * 0.1

    def norm(self, name: str, channels: int) -> None:
        self.state[f"{name}.weight"] = self.draw(channels) * 0.1 + 1
        self.state[f"{name}.bias"] = self.draw(channels) * 0.1
        self.state[f"{name}.running_mean"] = self.draw(channels) * 0.1
        self.state[f"{name}.running_var"] = self.draw(channels).abs() + 0.5
        self.state[f"{name}.num_batches_tracked"] = torch.tensor(9)

    def linear(self, name: str, inside: int, out: int = 10) -> None:
        self.state[f"{name}.weight"], self.state[f"{name}.bias"] = self.draw(out, inside), self.draw(out)


def post(
    layers: tuple[int, ...], shortcut: str, *, width: int = 16, bottleneck: bool = False, names: str = "{}"
) -> State:
    """Blocks of convolution and norm, a shortcut under the name ``shortcut`` ("": option A has no tensors)."""
    out = Writer()
    out.conv("conv1", 3, width)
    out.norm("bn1", width)
    inside = width
    for stage, blocks in enumerate(layers, 1):
        inner = width * 2 ** (stage - 1)
        for i in range(blocks):
            name, end = f"layer{stage}.{i}", inner * (4 if bottleneck else 1)
            steps = [(inside, inner, 1), (inner, inner, 3), (inner, end, 1)] if bottleneck else [(inside, inner, 3)]
            steps += [] if bottleneck else [(inner, inner, 3)]
            for j, (a, b, kernel) in enumerate(steps, 1):
                out.conv(f"{name}.conv{j}", a, b, kernel)
                out.norm(f"{name}.bn{j}", b)
            if shortcut and inside != end:
                out.conv(f"{name}.{shortcut}.0", inside, end, 1)
                out.norm(f"{name}.{shortcut}.1", end)
            inside = end
    out.linear("linear", inside)
    return out.state


def pre(
    layers: tuple[int, ...],
    shortcut: str,
    *,
    width: int = 16,
    widen: int = 1,
    end: str = "",
    bias: bool = False,
) -> State:
    """Norms before convolutions, shortcuts without norms, a norm ``end`` after the last block."""
    out = Writer()
    out.conv("conv1", 3, width, bias=bias)
    inside = width
    for stage, blocks in enumerate(layers, 1):
        inner = width * widen * 2 ** (stage - 1)
        for i in range(blocks):
            for j, a in ((1, inside), (2, inner)):
                out.norm(f"layer{stage}.{i}.bn{j}", a)
                out.conv(f"layer{stage}.{i}.conv{j}", a, inner, bias=bias)
            if inside != inner:
                out.conv(f"layer{stage}.{i}.{shortcut}", inside, inner, 1, bias)
            inside = inner
    if end:
        out.norm(end, inside)
    out.linear("linear", inside)
    return out.state


# ------------------------------------------------------------------------------------------- a plain reference


class Reference:
    """The forward pass over such a state dict, written out once for all forms."""

    def __init__(self, state: State, **how: object) -> None:
        self.state, self.how = state, how

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        values = (self.state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values)

    def blocks(self) -> list[str]:
        names = {m[0] for k in self.state if (m := re.match(r"layer\d\.\d+", k))}
        return sorted(names, key=lambda n: [int(v) for v in re.findall(r"\d+", n)])

    def post(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x, "conv1"), "bn1").relu()
        for block in self.blocks():
            stride = 2 if block.endswith(".0") and block[5] != "1" else 1
            deep = f"{block}.conv3.weight" in self.state
            y = self.norm(self.conv(x, f"{block}.conv1", 1 if deep else stride), f"{block}.bn1").relu()
            y = self.norm(self.conv(y, f"{block}.conv2", stride if deep else 1), f"{block}.bn2")
            if deep:
                y = self.norm(self.conv(y.relu(), f"{block}.conv3"), f"{block}.bn3")
            x = (y + self.short(x, block, stride, y.shape[1])).relu()
        return x.mean((2, 3))

    def short(self, x: Tensor, block: str, stride: int, out: int) -> Tensor:
        for name in ("shortcut", "downsample"):
            if f"{block}.{name}.0.weight" in self.state:
                return self.norm(self.conv(x, f"{block}.{name}.0", stride), f"{block}.{name}.1")
        if x.shape[1] == out:
            return x
        x, zeros = x[:, :, ::stride, ::stride], torch.zeros(1, dtype=x.dtype)
        missing = zeros.expand(len(x), out - x.shape[1], *x.shape[2:])
        half = missing.shape[1] // 2
        if self.how.get("zeros") == "end":
            return torch.cat([x, missing], 1)
        return torch.cat([missing[:, :half], x, missing[:, half:]], 1)

    def pre(self, x: Tensor) -> Tensor:
        x = self.conv(x, "conv1")
        first, second = (1, 2) if self.how.get("late") else (2, 1)  # strides of the two convolutions
        for block in self.blocks():
            down = block.endswith(".0") and block[5] != "1"
            before = self.norm(x, f"{block}.bn1").relu()
            y = self.conv(before, f"{block}.conv1", first if down else 1)
            y = self.conv(self.norm(y, f"{block}.bn2").relu(), f"{block}.conv2", second if down else 1)
            name = f"{block}.{self.how['shortcut']}"
            if f"{name}.weight" in self.state:
                seen = x if self.how.get("sees") == "input" else before
                x = y + self.conv(seen, name, 2 if down else 1)
            else:
                x = y + x
        end = self.how.get("end")
        return (self.norm(x, str(end)).relu() if end else x).mean((2, 3))


# ------------------------------------------------------------------------------------------------ the layouts


def renamed(state: State, *rules: tuple[str, str]) -> State:
    out = {}
    for key, value in state.items():
        for old, new in rules:
            key = re.sub(old, new, key)
        out[key] = value
    return out


CIFAR100 = [
    (r"^conv1\.", "conv1.0."), (r"^bn1\.", "conv1.1."), (r"^layer1", "conv2_x"), (r"^layer2", "conv3_x"),
    (r"^layer3", "conv4_x"), (r"^layer4", "conv5_x"), (r"\.conv1\.", ".residual_function.0."),
    (r"\.bn1\.", ".residual_function.1."), (r"\.conv2\.", ".residual_function.3."),
    (r"\.bn2\.", ".residual_function.4."), ("^linear", "fc"),
]  # fmt: skip
STAGED = [
    (r"^conv1\.", "conv_1_3x3."), (r"^bn1\.", "bn_1."), (r"^layer", "stage_"), (r"\.conv1\.", ".conv_a."),
    (r"\.bn1\.", ".bn_a."), (r"\.conv2\.", ".conv_b."), (r"\.bn2\.", ".bn_b."), ("^linear", "classifier"),
]  # fmt: skip
WIDE = [(r"^layer(\d)\.", r"block\1.layer."), ("^linear", "fc")]
Case = tuple[State, State, Callable[[Reference], Callable[[Tensor], Tensor]], dict[str, object], str, dict[str, object]]


def case(state: State, arch: str, options: dict[str, object], *rules: tuple[str, str], **how: object) -> Case:
    """The state a reference runs on, the one in the file, which forward, and what is to be told of it."""
    run = (lambda r: r.pre) if "shortcut" in how else (lambda r: r.post)
    return state, renamed(state, *rules), run, how, arch, options


A: dict[str, object] = {"shortcut": "A"}
B: dict[str, object] = {"shortcut": "B"}
CASES: dict[str, Callable[[], Case]] = {
    "akamaster, option A": lambda: case(post((3, 3, 3), ""), "small:resnet20", A),
    "akamaster, option B": lambda: case(post((1, 1, 1), "shortcut"), "small:resnet8", B),
    "110 layers": lambda: case(post((18, 18, 18), "", width=4), "small:resnet110", A | {"width": 4}),
    "chenyaofo": lambda: case(post((3, 3, 3), "downsample"), "small:resnet20", B, ("^linear", "fc")),
    "wider": lambda: case(post((1, 1, 1), "", width=24), "small:resnet8", A | {"width": 24}),
    "uneven": lambda: case(post((1, 2, 1), ""), "small:resnet", A | {"layers": [1, 2, 1]}),
    "50 layers of basic blocks": lambda: case(post((8, 8, 8), ""), "small:resnet", A | {"layers": [8, 8, 8]}),
    "four stages of nobody": lambda: case(
        post((1, 1, 1, 2), "shortcut", width=8), "small:resnet", B | {"layers": [1, 1, 1, 2], "width": 8}
    ),
    "bearpaw, bottlenecks": lambda: case(
        post((1, 1, 1), "downsample", bottleneck=True), "small:resnet", B | {"layers": [1, 1, 1], "bottleneck": True}
    ),
    "kuangliu, ResNet-18": lambda: case(post((2, 2, 2, 2), "shortcut", width=8), "small:resnet18", {"width": 8}),
    "weiaicunzai": lambda: case(post((2, 2, 2, 2), "shortcut", width=8), "small:resnet18", {"width": 8}, *CIFAR100),
    "D-X-Y, zeros at the end": lambda: case(
        post((1, 1, 1), ""), "small:resnet8", A | {"zeros": "end"}, *STAGED, zeros="end"
    ),
    "bearpaw, pre-activated": lambda: case(
        pre((1, 1, 1), "downsample.0", end="bn"),
        "small:preresnet8", B | {"shortcut_from": "input"},
        sees="input", shortcut="downsample.0", end="bn",
    ),
    "kuangliu, pre-activated": lambda: case(
        pre((2, 2, 2, 2), "shortcut.0", width=8),
        "small:preresnet", B | {"layers": [2, 2, 2, 2], "width": 8, "shortcut_from": "activated", "final_norm": False},
        shortcut="shortcut.0",
    ),
    "xternalz, wide": lambda: case(
        pre((1, 1, 1), "convShortcut", widen=2, end="bn1"),
        "small:wrn10_2", B | {"shortcut_from": "activated"},
        *WIDE, shortcut="convShortcut", end="bn1",
    ),
    "meliketoy, wide with biases": lambda: case(
        pre((2, 2, 2), "shortcut.0", widen=2, end="bn1", bias=True),
        "small:wrn16_2", B | {"shortcut_from": "input", "bias": True, "stride_in": 2},
        shortcut="shortcut.0", end="bn1", sees="input", late=True,
    ),
}  # fmt: skip


def load(state: State, path: Path, registry: Registry, **options: object) -> Loaded:
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path / "net.th")
    return load_backbone(path / "net.th", registry, options=options)


@pytest.mark.parametrize("name", CASES)
def test_a_resnet_for_cifar_is_recognised_and_gives_the_features_of_a_plain_reference(name, tmp_path, registry):
    state, written, run, how, arch, options = CASES[name]()
    loaded = load(written, tmp_path, registry)
    spec, report = loaded.backbone.spec, loaded.report
    given = {k: v for k, v in spec.options.items() if k not in ("image_size", "stem_padding")}
    assert (spec.arch, given) == (arch, options)
    assert (report.matched, report.buffers, report.missing, report.leftover) == (1, 1, (), ())
    assert all(re.search(r"\.(linear|fc|classifier)\.(weight|bias)$", k) for k in report.unexpected)
    net = loaded.backbone.double()
    with torch.no_grad():
        wanted = run(Reference(state, **how))(net.normalise(PIXELS))
        torch.testing.assert_close(net(PIXELS).pooled, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "option", "other"),
    [
        ("akamaster, option A", "zeros", "end"),
        ("bearpaw, pre-activated", "shortcut_from", "activated"),
        ("kuangliu, pre-activated", "shortcut_from", "input"),
    ],
)
def test_what_no_shape_shows_is_said_and_can_be_given(name, option, other, tmp_path, registry):
    state, written, run, how, *_ = CASES[name]()
    loaded = load(written, tmp_path, registry, **{option: other})
    assert f"(option {option})" in " ".join(load(written, tmp_path, registry).report.reason)
    net = loaded.backbone.double()
    changed = how | {"zeros": other, "sees": other}
    with torch.no_grad():
        wanted = run(Reference(state, **changed))(net.normalise(PIXELS))
        torch.testing.assert_close(net(PIXELS).pooled, wanted, rtol=1e-5, atol=1e-5)


def test_names_stand_for_the_published_networks(registry):
    """Parameters without the classifier, from He et al.'s table 6 (0.27 M to 1.7 M) and Zagoruyko's (36.5 M)."""
    sizes = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7}
    sizes |= {"wrn28_10": 36.5, "wrn40_2": 2.2}
    for name, millions in sizes.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in build(f"small:{name}", registry).parameters())
        assert round(count / 1e6, 1 if millions > 1 else 2) == millions, name


def test_wide_and_pre_activated_networks_of_full_size_are_told_by_their_names(registry):
    """kuangliu's pre-activated ResNet-18 is 64 wide and WRN-28-10 has 36 million parameters: shapes only."""
    for arch, keep in (("small:preresnet18", 64), ("small:wrn28_10", 16)):
        with torch.device("meta"):
            net = build(arch, registry).net
        state = {k: v for k, v in net.state_dict().items() if not k.startswith("norm") or keep == 16}
        state = {k.replace("norm.", "bn1."): v for k, v in state.items()}
        file = checkpoints.File(Path("x.pth"), state, "")
        (read,) = registry.get("checkpoint", "resnet")(checkpoints.State(state, "", file))
        assert read.arch == arch


def without(state: State, part: str) -> State:
    return {k: v for k, v in state.items() if part not in k}


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (lambda: without(post((3, 3, 3), ""), "layer2.1.conv2"), "missing, first layer2.1.conv2"),
        (lambda: without(post((1, 1, 1), "shortcut"), "shortcut.1"), "missing, first layer2.0.downsample.1"),
        (lambda: without(post((1, 1, 1), ""), "running"), "running statistics"),
        (lambda: post((1, 1, 1), "") | {"layer2.0.se.weight": torch.ones(4)}, "layer2.0.se.weight"),
    ],
)
def test_what_does_not_fill_the_network_is_refused(state, told, tmp_path, registry):
    with pytest.raises(BackboneError) as refused:
        load(state(), tmp_path, registry)
    assert told in f"{refused.value.problem} {refused.value.cause}"


def test_such_a_network_comes_back_from_its_own_file(tmp_path, registry):
    _, written, *_ = CASES["meliketoy, wide with biases"]()
    loaded = load(written, tmp_path, registry)
    loaded.backbone.save(tmp_path / "backbone.safetensors")
    again = load_backbone(tmp_path, registry).backbone
    assert (again.identity, again.spec) == (loaded.backbone.identity, loaded.backbone.spec)


# ------------------------------------------------------------------------------------------------- a real file


def pixels(folder: Path) -> tuple[Tensor, np.ndarray]:
    from PIL import Image

    arrays, labels = [], []
    for label, inner in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        for file in sorted(inner.iterdir()):
            with Image.open(file) as image:
                arrays.append(np.asarray(image.convert("RGB")))
            labels.append(label)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255, np.array(labels)


@torch.no_grad()
def encoded(backbone: Backbone, images: Tensor) -> Tensor:
    return torch.cat([backbone(chunk).pooled for chunk in images.split(250)])


def test_a_real_cifar_resnet_of_a_stranger_reaches_its_known_accuracies(realdata, registry):
    """SOURCE.md beside the file: 804 of 1,000 by its own classifier, 83.2 % by 20 nearest neighbours."""
    path = realdata / "ckpt_cifar_resnet" / "resnet20-12fca82f.th"
    loaded = load_backbone(path, registry)
    assert loaded.backbone.spec.arch == "small:resnet20"
    assert set(loaded.report.unexpected) == {"module.linear.weight", "module.linear.bias"}
    images, labels = pixels(realdata / "cls_cifar10_jpeg" / "test")
    rows = encoded(loaded.backbone, images)
    head = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    guesses = (rows @ head["module.linear.weight"].T + head["module.linear.bias"]).argmax(1).numpy()
    assert float((guesses == labels).mean()) == pytest.approx(0.8040, abs=0.003)
    bank, known = pixels(realdata / "cls_cifar10_jpeg" / "train")
    train = Train({"pooled": encoded(loaded.backbone, bank).numpy()}, known)
    probed = evaluate(NearestNeighbours(ks=(20,)), train, {"pooled": rows.numpy()})
    assert float((probed.scores.argmax(1) == labels).mean()) == pytest.approx(0.8320, abs=0.003)
