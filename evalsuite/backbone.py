"""What a task sees of a network: pixels in, Features out; and the one file a backbone lives in."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evalsuite.errors import BackboneError
from evalsuite.files import atomic

if TYPE_CHECKING:
    from evalsuite.hooks import Registry

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Backbone", "BackboneSpec", "Features", "build", "identity_of"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEADER = "evalsuite"  # the key of our entry in a safetensors header
FORMAT = 1


@dataclass(frozen=True)
class Features:
    """What a backbone says of a batch of images.

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
    in [0,1]. ``dim`` is the width of ``pooled``; ``strides`` maps each stride to its number of channels.
    """

    arch: str
    dim: int
    strides: Mapping[int, int]
    gives: frozenset[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {
            "gives": sorted(self.gives),
            "strides": {str(s): c for s, c in sorted(self.strides.items())},
            "options": dict(self.options),
        }


Look = Callable[[nn.Module, Tensor], Features]
Split = Callable[[nn.Module], tuple[nn.Module, nn.Module]]
Dilate = Callable[[int], "Backbone"]
Read = Callable[[nn.Module, Sequence[str]], Tensor]


class Backbone(nn.Module):
    """A network with its spec: ``backbone(pixels)`` takes RGB in [0,1] (B,3,H,W) and returns :class:`Features`.

    Normalisation happens inside. ``net`` is the unmodified module, so its state dict keeps the published names;
    ``look(net, normalised)`` reads Features off it (default: the module returns Features itself). ``split(net)``,
    where the architecture allows it, gives the network up to its last stage and that stage, for detectors that run
    the last stage on regions (Faster R-CNN C4). ``dilate(output_stride)``, where it allows that, builds the same
    architecture with dilation in place of its last strides. ``read(net, texts)``, where the network has a text tower
    too, gives (B,E) vectors of texts in the space of ``Features.joint``. ``heads`` are the names of parameters that no
    feature depends on, for a network whose gradients do not tell them (None: they tell).
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
        read: Read | None = None,
        heads: frozenset[str] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.heads = heads
        self._look, self._split, self._dilate, self._read = look, split, dilate, read
        self._drawn: tuple[str, str] | None = None  # the digest of fresh weights, and their identity
        self._normaliser(spec)

    def _normaliser(self, spec: BackboneSpec) -> None:
        device = next((p.device for p in self.net.parameters()), torch.device("cpu"))
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Features:
        return self.look(self.normalise(pixels))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0,1] to what the network was trained on."""
        return (pixels - self.mean.to(pixels.dtype)) / self.std.to(pixels.dtype)

    def look(self, normalised: Tensor) -> Features:
        """The features of images that are normalised already (detectors pad with zeros after normalising)."""
        if self._look is not None:
            return self._look(self.net, normalised)
        features = self.net(normalised)
        assert isinstance(features, Features)
        return features

    @property
    def gives(self) -> frozenset[str]:
        """What of :class:`Features` there is, ``"stages"`` where the network can be cut by :meth:`split`, and
        ``"text"`` where it reads texts (:meth:`encode_text`)."""
        extra = {"stages"} if self._split is not None else set()
        return self.spec.gives | extra | ({"text"} if self._read is not None else set())

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B,E) vectors of texts, to be compared with ``joint`` of images by their cosine.

        Raises :class:`BackboneError` where the network has no text tower.
        """
        if self._read is None:
            raise BackboneError(
                f"{self.spec.arch} does not read text",
                cause="it is a network of images alone",
                fix="choose a backbone that gives text, or a protocol that asks by image",
            )
        return self._read(self.net, texts)

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
        :meth:`drawn` saw, of how they were drawn. The same weights, the same identity."""
        digest = self.digest
        return self._drawn[1] if self._drawn is not None and self._drawn[0] == digest else digest

    def drawn(self, seed: int, file: str = "") -> Backbone:
        """Note, in place, that the weights are fresh ones drawn from ``seed``, but for those of a file, by its sha256.

        Initialisers do not give the same last digits on every processor (a normal distribution is drawn in another
        order with AVX2 than without), so fresh weights are known by what decides them: architecture, options, seed,
        and the code that draws.
        """
        recipe = {
            "arch": self.spec.arch, "options": self.spec.to_json()["options"], "seed": seed,
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
        if "state" in self.spec.gives:
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
        spec = header["spec"]
        backbone = build(spec["arch"], registry, **spec["options"])
        backbone.net.load_state_dict(safetensors.torch.load_file(path))
        return backbone.respec(image_size=tuple(spec["image_size"]), mean=tuple(spec["mean"]), std=tuple(spec["std"]))


def read_header(path: str | Path) -> dict[str, Any] | None:
    """The spec and provenance in a safetensors header, or None where there is none.

    Raises :class:`BackboneError` for a file that is no safetensors file, or of a later format.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
        header = json.loads(text) if text else None
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise BackboneError(
            f"{path} cannot be read",
            cause=f"not a safetensors file: {error}",
            fix="check the path or copy it again",
        ) from error
    if header is not None and header.get("format") != FORMAT:
        raise BackboneError(
            f"{path} is of format {header.get('format')}",
            cause=f"this version reads format {FORMAT}",
            fix="pip install -U evalsuite",
        )
    return header


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
        digest.update(f"{name} {_file_digest(path, os.stat(path).st_mtime_ns) if path else ''}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _file_digest(path: str, mtime: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(arch: str, registry: Registry, **options: Any) -> Backbone:
    """The architecture ``scheme:name`` (or a plugin's bare name) with fresh weights.

    Raises :class:`UsageError` for an unknown scheme and :class:`BackboneError` for an unknown name or option.
    """
    scheme, _, name = arch.partition(":")
    builder = registry.get("backbone", scheme)
    try:
        backbone = builder(name, **options) if name else builder(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"{arch} cannot be built",
            cause=f"{error}" + (f" (options: {options})" if options else ""),
            fix="evalsuite list backbone shows the schemes; check the name and the options",
        ) from error
    if not isinstance(backbone, Backbone):
        raise BackboneError(
            f"{arch} is not a backbone",
            cause=f"its builder returned {type(backbone).__name__}",
            fix="return a Backbone",
        )
    return backbone
