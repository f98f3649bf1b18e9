"""What a task sees of a network: pixels in, Features out; and the one file a backbone lives in."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from evalsuite.errors import BackboneError, Refusal
from evalsuite.files import atomic
from evalsuite.options import NAME, OptionError, Side, by_content, check, file_digest, offline, sayable
from evalsuite.results import Json

if TYPE_CHECKING:
    from evalsuite.hooks import Registry

__all__ = [
    "IMAGENET_MEAN", "IMAGENET_STD", "KINDS", "PIXELS", "Backbone", "BackboneSpec", "Features", "Tower", "build",
    "identity_of", "input_fault", "outline", "parse_header", "published", "read_header", "rebuild", "refuse_arch",
    "restore",
]  # fmt: skip

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEADER = "evalsuite"  # the key of our entry in a safetensors header
FORMAT = 1
LONGEST = 1 << 20  # characters of our entry in a header
SPARE = 1 << 24  # numbers that a network may have besides a tenth more than its file: masks, positions, indices


@dataclass(frozen=True)
class Features:
    """What a backbone says of a batch of images, or of whatever else it takes.

    ``pooled`` is one vector an image (B,D); ``maps`` is feature maps by stride, {stride: (B,C,H,W)}; ``tokens``
    is a set of vectors an image (B,N,D), patches or slots, without class or register tokens. ``masks`` (B,N,h,w) say,
    where tokens are slots, how much of each place is whose: they sum to one over N. ``joint`` is one vector an image
    (B,E) in the space that a text tower's vectors are in (:meth:`Backbone.encode_text`).
    What a backbone does not give is None (``maps``: empty).
    """

    pooled: Tensor | None = None
    maps: Mapping[int, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    masks: Tensor | None = None
    joint: Tensor | None = None


@dataclass(frozen=True)
class BackboneSpec:
    """Everything but the weights: enough to build the network again and to feed it rightly.

    ``arch`` is ``scheme:name``; ``options`` go to its builder. ``image_size`` is (height, width) in pixels of the
    published recipe; other sizes work where the network allows. ``mean`` and ``std`` are per RGB channel for pixels
    in [0,1]. ``dim`` is the width of ``pooled``; ``strides`` maps each stride to its number of channels. ``takes`` is
    what the network is shown, one of :data:`KINDS`, and ``gives`` what of :class:`Features` it answers.
    Raises ValueError for numbers by which no image can be normalised, sizes above 4,096 pixels, and an unknown kind.
    """

    arch: str
    dim: int
    strides: Mapping[int, int]
    gives: frozenset[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    takes: str = "image"

    def __post_init__(self) -> None:
        if "state" in self.gives:  # how it was said before there was ``takes``
            object.__setattr__(self, "takes", "state")
            object.__setattr__(self, "gives", frozenset(self.gives - {"state"}))
        if self.takes not in KINDS:
            raise ValueError(f"a backbone takes one of {', '.join(sorted(KINDS))}, not {self.takes!r}")
        for name in ("mean", "std", "image_size"):
            if fault := input_fault(name, getattr(self, name)):
                raise ValueError(fault)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {
            "gives": sorted(self.gives),
            "strides": {str(s): c for s, c in sorted(self.strides.items())},
            "options": dict(self.options),
        }


def input_fault(name: str, value: Any) -> str:
    """What is wrong with a ``mean``, ``std`` or ``image_size``; "" if nothing is."""
    whole = name == "image_size"
    kinds, count = (int, 2) if whole else (int | float, 3)
    if not isinstance(value, list | tuple) or len(value) != count:
        return f"{name} is {count} numbers"
    if any(isinstance(v, bool) or not isinstance(v, kinds) for v in value):
        return f"{name} is of {'whole numbers of pixels' if whole else 'numbers'}"
    low, high = {"mean": (-LARGEST, LARGEST), "std": (1 / LARGEST, LARGEST), "image_size": (1, SIDE)}[name]
    if not all(low <= v <= high for v in value):  # which no NaN is
        return f"each number of {name} is from {low:g} to {high:g}"
    return ""


# What a backbone can be shown: images (B,3,H,W) and clips (B,T,3,H,W) of pixels in [0,1], sound, a list of B texts,
# states of a world.
Kind = Literal["image", "clip", "sound", "text", "state"]
KINDS: frozenset[str] = frozenset(get_args(Kind))
PIXELS = frozenset({"image", "clip"})

LARGEST = 1e6  # of a mean or a deviation; its inverse is the smallest deviation
SIDE = 4096  # pixels

Look = Callable[[nn.Module, Tensor], Features]
Split = Callable[[nn.Module], tuple[nn.Module, nn.Module]]
Dilate = Callable[[int], "Backbone"]
Tower = Callable[[nn.Module, Any], Features | Tensor]


class Backbone(nn.Module):
    """A network with its spec: ``backbone(pixels)`` takes RGB in [0,1] (B,3,H,W) and returns :class:`Features`.

    Where ``spec.takes`` is another kind, it takes that. Pixels are normalised inside. ``net`` is the unmodified module,
    so its state dict keeps the published names; ``look(net, normalised)`` reads Features off it (default: the module
    returns Features itself). ``split(net)``, where the architecture allows it, gives the network up to its last stage
    and that stage, for detectors that run the last stage on regions (Faster R-CNN C4). ``dilate(output_stride)``, where
    it allows that, builds the same architecture with dilation in place of its last strides. ``towers`` are what the
    network does with inputs of other kinds, {kind: function of (net, batch)}: each gives Features, or (B,E) vectors in
    the space of ``Features.joint``. A generator's decoder is a tower of a kind of its own, such as ``"latent"``.
    ``read`` is the older name of the tower of texts. ``heads`` are the names of parameters on which nothing depends
    that the backbone or one of its towers gives, for a network whose gradients do not tell them (None: they tell, see
    :func:`evalsuite.checkpoints.matching.heads_of`).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        spec: BackboneSpec,
        look: Look | None = None,
        split: Split | None = None,
        dilate: Dilate | None = None,
        read: Tower | None = None,
        heads: frozenset[str] | None = None,
        towers: Mapping[str, Tower] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.heads = heads
        self.towers = {**({"text": read} if read is not None else {}), **(towers or {})}
        self._look, self._split, self._dilate = look, split, dilate
        self._drawn: tuple[str, str] | None = None  # the digest of fresh weights, and their identity
        self._normaliser(spec)

    def _normaliser(self, spec: BackboneSpec) -> None:
        device = next((p.device for p in self.net.parameters()), torch.device("cpu"))
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Any) -> Features:
        return self.look(self.normalise(pixels) if self.spec.takes in PIXELS else pixels)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0,1] to what the network was trained on."""
        return (pixels - self.mean.to(pixels.dtype)) / self.std.to(pixels.dtype)

    def look(self, normalised: Any) -> Features:
        """The features of images that are normalised already (detectors pad with zeros after normalising)."""
        if self._look is not None:
            return self._look(self.net, normalised)
        features = self.net(normalised)
        assert isinstance(features, Features)
        return features

    @property
    def gives(self) -> frozenset[str]:
        """What of :class:`Features` there is, and ``"stages"`` where the network can be cut by :meth:`split`."""
        return self.spec.gives | ({"stages"} if self._split is not None else set())

    @property
    def takes(self) -> frozenset[str]:
        """The kinds of input that it can be shown: ``spec.takes``, and those of its towers."""
        return frozenset({self.spec.takes, *self.towers})

    def encode(self, kind: str, batch: Any) -> Features:
        """The features of B inputs of a kind: a tensor (B, ...), of texts a sequence.

        Raises :class:`BackboneError` for a kind that it does not take.
        """
        if kind == self.spec.takes:
            features: Features = self(batch)
            return features
        self.check_takes(kind)
        answer = self.towers[kind](self.net, batch)
        return answer if isinstance(answer, Features) else Features(joint=answer)

    def check_takes(self, kind: str) -> None:
        """Raise :class:`BackboneError` for a kind of input that it does not take."""
        if kind not in self.takes:
            raise BackboneError(
                f"{self.spec.arch} does not take {kind}",
                cause=f"it takes {', '.join(sorted(self.takes))}",
                fix=f"choose a backbone that takes {kind}, or a task or protocol that shows something else",
            )

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B,E) vectors of texts: in the space of ``joint`` of images, where they are, to be compared by their cosine.

        Raises :class:`BackboneError` where the network takes no text, or gives no vector of one.
        """
        features = self.encode("text", texts)
        vectors = features.joint if features.joint is not None else features.pooled
        if vectors is None:
            raise BackboneError(
                f"{self.spec.arch} gives no vector of a text",
                cause="neither joint nor pooled is there",
                fix="correct its tower of texts",
            )
        return vectors

    def split(self) -> tuple[nn.Module, nn.Module]:
        """The network up to its last stage, and that stage: ``tail(trunk(normalised))`` is the coarsest map.

        Raises :class:`BackboneError` where the architecture has no such cut.
        """
        if self._split is None:
            raise BackboneError(
                f"{self.spec.arch} has no last stage to run on regions",
                cause="a C4 detector cuts a ResNet before layer4; this architecture is not one",
                fix="choose a pyramid protocol, for example --protocol fpn",
            )
        return self._split(self.net)

    def dilates(self, output_stride: int) -> bool:
        """Whether :meth:`dilated` gives a network of that output stride, or one below."""
        return max(self.spec.strides) <= output_stride or (self._dilate is not None and output_stride in (8, 16))

    def dilated(self, output_stride: int) -> Backbone:
        """A copy whose coarsest map has the stride ``output_stride``: the last strides are replaced by dilation.

        It has the same weights; of a ResNet, the dilated map at every second (fourth) row and column is the plain
        one, for the first convolution of a stage keeps the dilation of the stage before it (but not where
        shortcuts average, as in timm's "d" variants). A network whose coarsest stride is not larger gives a plain
        copy. Raises :class:`BackboneError` where the architecture
        cannot be dilated so.
        """
        if not self.dilates(output_stride):
            able = "8 and 16" if self._dilate is not None else "none: its strides cannot be replaced by dilation"
            raise BackboneError(
                f"{self.spec.arch} cannot be dilated to an output stride of {output_stride}",
                cause=f"its coarsest map has stride {max(self.spec.strides)}; it can be dilated to {able}",
                fix="--set output_stride=null, or a protocol on a pyramid: --protocol upernet",
            )
        if self._dilate is None or max(self.spec.strides) <= output_stride:
            return copy.deepcopy(self)
        other = self._dilate(output_stride)
        other.net.load_state_dict(self.net.state_dict())
        other.to(self.mean.device).train(self.training)
        return other.respec(image_size=self.spec.image_size, mean=self.spec.mean, std=self.spec.std)

    def respec(self, **changes: Any) -> Backbone:
        """This backbone with fields of its spec replaced (mean, std, image_size), in place."""
        self.spec = replace(self.spec, **changes)
        self._normaliser(self.spec)
        return self

    @property
    def digest(self) -> str:
        """sha256 over the names, types, shapes and bytes of all tensors."""
        return identity_of(self.net.state_dict())

    @property
    def identity(self) -> str:
        """What tells these weights from others, a sha256: of the tensors (:attr:`digest`), or, while they are what
        :meth:`drawn` saw, of how they were drawn. The same weights, the same identity; files that options name are
        part of it, by content."""
        digest = self.digest
        if self._drawn is not None and self._drawn[0] == digest:
            return self._drawn[1]
        options = dict(self.spec.options)
        held = by_content(options)
        named = {name: held[name] for name, value in options.items() if held[name] != _plain(value)}
        return hashlib.sha256(json.dumps([digest, named], sort_keys=True).encode()).hexdigest() if named else digest

    def drawn(self, seed: int, file: str = "") -> Backbone:
        """Note, in place, that the weights are fresh ones drawn from ``seed``, but for those of a file, by its sha256.

        Initialisers do not give the same last digits on every processor (a normal distribution is drawn in another
        order with AVX2 than without), so fresh weights are known by what decides them: architecture, options, seed,
        and the code that draws.
        """
        recipe = {
            "arch": self.spec.arch, "options": by_content(self.spec.to_json()["options"]), "seed": seed,
            "file": file,
            "tensors": {k: f"{v.dtype} {tuple(v.shape)}" for k, v in self.net.state_dict().items()},
            "code": _initialisers(self.net),
        }  # fmt: skip
        self._drawn = self.digest, hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
        return self

    def flops(self) -> int | None:
        """Floating-point operations of one image of the spec's size, a multiply-add counted as two.

        As torch's own counter sees them: convolutions, matrix products and attention. None for a backbone that is
        shown something else than images.
        """
        if self.spec.takes != "image":
            return None
        device = self.mean.device
        counter = FlopCounterMode(display=False)
        was_training = self.training
        with torch.no_grad(), counter:
            self.eval()(torch.zeros(1, 3, *self.spec.image_size, device=device))
        self.train(was_training)
        return int(counter.get_total_flops())

    def save(self, path: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Write one safetensors file: the tensors, and in its header the spec and where they come from."""
        header = {"format": FORMAT, "spec": self.spec.to_json(), "provenance": dict(provenance or {})}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.net.state_dict().items()}
        with atomic(path) as partial:
            safetensors.torch.save_file(tensors, partial, {HEADER: json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, registry: Registry) -> Backbone:
        """Read a file that :meth:`save` wrote.

        Raises :class:`BackboneError` for anything else; foreign files go through
        :func:`evalsuite.checkpoints.load_backbone`.
        """
        header = read_header(path)
        if header is None:
            raise BackboneError(
                f"{path} is not a backbone of this suite",
                cause="its header carries no spec",
                fix="evalsuite inspect FILE tells what it is; evalsuite run takes it as it is",
            )
        return restore(path, header, safetensors.torch.load_file(path), registry)


def restore(
    path: str | Path,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    registry: Registry,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """The backbone of a file whose header (:func:`parse_header`) and tensors are read.

    ``options`` are what a user says of the builder's options, in place of the header's. Raises :class:`BackboneError`
    where the header asks for what no file may set, or for a network that the tensors are not.
    """
    spec = header["spec"]
    refuse_arch(spec["arch"], path, registry)
    largest = int(1.1 * sum(t.numel() for t in tensors.values())) + SPARE
    backbone = rebuild(spec["arch"], registry, spec["options"], options or {}, largest=largest, source=str(path))
    try:
        backbone.net.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise BackboneError(
            f"{path} does not fit its own architecture",
            cause=" ".join(str(error).split())[:300],
            fix="load it with the version that wrote it, or write it again",
        ) from error
    return backbone.respec(image_size=tuple(spec["image_size"]), mean=tuple(spec["mean"]), std=tuple(spec["std"]))


def refuse_arch(arch: str, path: str | Path, registry: Registry) -> None:
    """Refuse what no file may call an architecture: unknown schemes, addresses, paths."""
    scheme = arch.partition(":")[0]
    if not re.fullmatch(f"{NAME}(:{NAME})?", arch) or scheme not in registry.names("backbone"):
        raise BackboneError(
            f"{path} names the architecture {arch[:80]!r}, which is none here",
            cause=f"a file names SCHEME:NAME of a scheme that is registered: {', '.join(registry.names('backbone'))}",
            fix="install the plugin that brings it, or name another with --arch SCHEME:NAME",
        )


class _Spec(BaseModel):
    """What is read of a spec in a header."""

    model_config = ConfigDict(strict=True)
    arch: Annotated[str, Field(pattern=f"^{NAME}(:{NAME})?$")]
    options: Json
    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    mean: list[float]
    std: list[float]
    takes: Kind = "image"


class _Header(BaseModel):
    model_config = ConfigDict(strict=True)
    format: Literal[1]
    spec: _Spec
    provenance: Json = Field(default_factory=dict)


def read_header(path: str | Path) -> dict[str, Any] | None:
    """The spec and provenance in a safetensors header, or None where there is none.

    Raises :class:`BackboneError` for a file that is no safetensors file, of a later format, or whose header is not what
    this suite writes.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
    except (safetensors.SafetensorError, OSError) as error:
        raise _unreadable(path, f"not a safetensors file: {error}") from error
    return parse_header(text, path) if text else None


def parse_header(text: str, path: str | Path) -> dict[str, Any]:
    """The text of our entry in a safetensors header as ``format``, ``spec`` and ``provenance``.

    Every value is a stranger's: typed and bounded. Raises :class:`BackboneError`, which names ``path``.
    """
    if len(text) > LONGEST:
        raise _unreadable(path, f"its header has {len(text)} characters; {LONGEST} are read")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(
            path, f"its header is no JSON: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if isinstance(header, dict) and isinstance(header.get("format"), int) and header["format"] != FORMAT:
        raise BackboneError(
            f"{path} is of format {str(header['format'])[:20]}",
            cause=f"this version reads format {FORMAT}",
            fix="pip install -U evalsuite",
        )
    try:
        spec = _Header.model_validate(header).spec
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise _unreadable(path, f"its header is not one of this suite: {where}: {first['msg']}") from error
    fault = input_fault("mean", spec.mean) or input_fault("std", spec.std)
    if fault:
        raise _unreadable(path, f"by its header no image can be normalised: {fault}")
    checked: dict[str, Any] = header
    return checked | {"provenance": checked.get("provenance", {})}


def _unreadable(path: str | Path, cause: str) -> BackboneError:
    return BackboneError(f"{path} cannot be read", cause=cause[:400], fix="check the path or copy it again")


def identity_of(state: Mapping[str, Tensor]) -> str:
    """sha256 of a state dict, independent of the order and the device of its tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _initialisers(net: nn.Module) -> dict[str, str]:
    """What draws the weights of a network: versions of the libraries, and a digest of all other source."""
    names = {type(module).__module__ for module in net.modules()}
    tops = {name: name.partition(".")[0] for name in names}
    versions = {top: metadata.version(top).partition("+")[0] for top in {"torch", *tops.values()} & _LIBRARIES}
    return versions | {"other": source_digest(name for name, top in tops.items() if top not in _LIBRARIES)}


_LIBRARIES = {"torch", "torchvision", "timm"}


def source_digest(modules: Iterable[str]) -> str:
    """sha256 over the names and source files of modules that are loaded."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        path = getattr(sys.modules.get(name), "__file__", None)
        digest.update(f"{name} {file_digest(path) if path else ''}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A value as :func:`by_content` gives one that names no file."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def build(arch: str, registry: Registry, **options: Any) -> Backbone:
    """The architecture ``scheme:name`` (or a plugin's bare name) with fresh weights, by options of a user's.

    Raises :class:`UsageError` for an unknown scheme and :class:`BackboneError` for an unknown name or option, and for
    an option outside its bounds.
    """
    return _built(arch, registry, lambda builder, name: check(builder, name, options), options)


def published(arch: str, registry: Registry, **options: Any) -> Backbone:
    """As :func:`build`, with the weights that are published by that name; for schemes that have such."""
    return _built(arch, registry, lambda builder, name: check(builder, name, options), {**options, "pretrained": True})


def rebuild(
    arch: str,
    registry: Registry,
    said: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    largest: int | None,
    source: str,
) -> Backbone:
    """The architecture that a file wants, with fresh weights.

    ``said`` are options by the word of the file, ``options`` those of the user's, which count more. A file may set what
    the builder declares, within bounds (:mod:`evalsuite.options`), and has no network fetched; nor may it have one made
    of more than ``largest`` numbers, buffers among them (None: of as many as it likes). Raises
    :class:`BackboneError`, which names ``source``.
    """
    said = {k: v for k, v in said.items() if k not in options}

    def allow(builder: Callable[..., Any], name: str) -> None:
        sayable(builder, name, said)
        check(builder, name, options)

    def built() -> Backbone:
        with offline():
            return _built(arch, registry, allow, {**said, **options})

    try:
        if largest is None:
            return built()
        if not said:  # the size is then the architecture's own: it is counted as it is built, which costs nothing
            state = torch.get_rng_state()
            try:
                with _room(largest):
                    return built()
            except _Full:  # perhaps of parts that the builder takes away again
                torch.set_rng_state(state)
        numbers = sum(t.numel() for t in _tensors(outline(arch, registry, said, options)))
        if numbers > largest:
            raise OptionError(f"a network of {numbers:,} numbers, of which the file does not hold the weights")
        return built()
    except OptionError as error:
        raise BackboneError(
            f"{source} asks for {arch} as no file may have it built",
            cause=str(error)[:400],
            fix="if you know that it is right, say it yourself: --backbone-arg OPTION=VALUE",
        ) from error


def outline(arch: str, registry: Registry, said: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """A network without room for its numbers, on the meta device.

    Raises :class:`OptionError` for ``said`` that no file may say, and for what cannot be built there.
    """
    builder, name = _builder(arch, registry)
    sayable(builder, name, said)
    try:
        with shapes_only(), offline():
            made = builder(*([name] if name else []), **{**said, **options})
    except Exception as error:  # of a stranger's options a library raises anything
        told = " ".join(str(error).split())
        raise OptionError(
            f"it cannot be built on the meta device to see its size: {type(error).__name__}: {told}"
        ) from error
    if not isinstance(made, Backbone):
        raise OptionError(f"its builder returned {type(made).__name__}, which is no Backbone")
    return made.net


@contextmanager
def shapes_only() -> Iterator[None]:
    """Networks that are built within the block have tensors on the meta device, and no initial weights are drawn for
    them: on that device drawing takes most of the time, and gives nothing."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Passes over what fills a tensor on the meta device in place."""

    FILLS = frozenset({"add_", "clamp_", "copy_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        fills = getattr(func, "__name__", "") in self.FILLS and isinstance(args[0] if args else None, Tensor)
        return args[0] if fills and args[0].is_meta else func(*args, **(kwargs or {}))


def _tensors(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    yield from net.buffers()


class _Full(BaseException):
    """More numbers are registered than there is room for; no ``except Exception`` of a builder keeps it."""


_rooms = threading.local()


@contextmanager
def _room(numbers: int) -> Iterator[None]:
    """Within the block, modules that this thread makes register no more numbers than that; at the next, :class:`_Full`.

    Modules register tensors before they draw them, so that what is too large is not in memory yet.
    """
    _count_registered()
    _rooms.left = numbers
    try:
        yield
    finally:
        _rooms.left = None


@lru_cache(maxsize=1)
def _count_registered() -> None:
    register_module_parameter_registration_hook(_registered)
    register_module_buffer_registration_hook(_registered)


def _registered(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    left = getattr(_rooms, "left", None)
    if left is None or tensor is None or is_lazy(tensor):
        return
    _rooms.left = left - tensor.numel()
    if _rooms.left < 0:
        raise _Full


def _builder(arch: str, registry: Registry) -> tuple[Callable[..., Any], str]:
    scheme, _, name = arch.partition(":")
    return registry.get("backbone", scheme), name


def _built(
    arch: str, registry: Registry, allow: Callable[[Callable[..., Any], str], None], options: Mapping[str, Any]
) -> Backbone:
    builder, name = _builder(arch, registry)
    try:
        allow(builder, name)
        backbone = builder(*([name] if name else []), **options)
    except Refusal:
        raise
    except Exception as error:  # of a wrong option a library raises anything
        kind = "" if isinstance(error, TypeError | ValueError | RuntimeError) else f"{type(error).__name__}: "
        raise BackboneError(
            f"{arch} cannot be built",
            cause=f"{kind}{error}" + (f" (options: {str(dict(options))[:300]})" if options else ""),
            fix="evalsuite list backbone shows the schemes; check the name and the options",
        ) from error
    if not isinstance(backbone, Backbone):
        raise BackboneError(
            f"{arch} is not a backbone",
            cause=f"its builder returned {type(backbone).__name__}",
            fix="return a Backbone",
        )
    return backbone
