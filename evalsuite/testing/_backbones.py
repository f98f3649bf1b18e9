"""What a backbone owes to tasks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from evalsuite.backbone import Backbone, Features
from evalsuite.checkpoints import natural_images, sanity
from evalsuite.hooks import Registry, load
from evalsuite.testing._faults import Faults, plain

__all__ = ["check_backbone"]

BATCH = 4
NEAR = 1e-3  # relative to the largest feature: sums of floats in another order differ by less
KNOWN = {"pooled", "maps", "tokens", "masks", "joint"}

Make = Callable[[], Backbone]


def check_backbone(make: Make, *, registry: Registry | None = None) -> None:
    """Check what every backbone owes.

    The features have the shapes, the types and the strides of the spec; each image's are the same in any batch and
    each time; a forward pass changes neither weights, nor buffers, nor the images; they move with the module to another
    device and to double precision, and are finite under bfloat16; gradients reach the weights; two images have
    different features; and a saved file loads as the same backbone, by ``registry`` (default: all that is installed).

    ``make`` gives a fresh backbone. Raises AssertionError with a line for each fault.
    """
    faults = Faults()
    with faults.during("building it"):
        backbone = make()
        if faults.unless(isinstance(backbone, Backbone), f"its builder gives {type(backbone).__name__}, no Backbone"):
            images = natural_images(BATCH, backbone.spec.image_size)
            _check_spec(backbone, faults)
            with faults.during("a forward pass"), torch.no_grad():
                _check_shapes(backbone, backbone.eval()(images), images, faults)
                _check_pure(backbone, images, faults)
                _check_batches(backbone, images, faults)
            if not faults.lines:
                _check_elsewhere(make, images, faults)
                _check_gradient(make, images, faults)
                _check_worth(make, registry or load().registry, images, faults)
    faults.settle()


def outputs(features: Features) -> Iterator[tuple[str, Tensor]]:
    """What there is of features, by name."""
    for name in ("pooled", "tokens", "masks", "joint"):
        value = getattr(features, name)
        if value is not None:
            yield name, value
    for stride, level in features.maps.items():
        yield f"the map of stride {stride}", level


def _check_spec(backbone: Backbone, faults: Faults) -> None:
    spec = backbone.spec
    for line in plain(spec.to_json(), "spec"):
        faults.unless(False, line)
    faults.unless(spec.gives <= KNOWN, f"spec.gives names {sorted(spec.gives - KNOWN)}, of which there is nothing")
    faults.unless(bool(spec.gives), "spec.gives is empty: no task can use it")


def _check_shapes(backbone: Backbone, features: Features, images: Tensor, faults: Faults) -> None:
    spec, (height, width) = backbone.spec, images.shape[-2:]
    given = {n for n in ("pooled", "tokens", "masks", "joint") if getattr(features, n) is not None}
    given |= {"maps"} if features.maps else set()
    for name in sorted(spec.gives ^ given):
        promised = f"spec.gives promises {name}, and it is not given"
        faults.unless(False, promised if name in spec.gives else f"it gives {name}, which spec.gives does not name")
    if features.pooled is not None:
        shape = tuple(features.pooled.shape)
        faults.unless(shape == (BATCH, spec.dim), f"pooled is {shape} for {BATCH} images, and spec.dim is {spec.dim}")
    for name, dims in (("tokens", 3), ("masks", 4), ("joint", 2)):
        value = getattr(features, name)
        fits = value is None or (value.ndim == dims and len(value) == BATCH)
        faults.unless(fits, f"{name} has the shape {None if value is None else tuple(value.shape)}")
    _check_masks(features, faults)
    strides = dict(spec.strides) if "maps" in spec.gives else {}
    faults.unless(
        {*features.maps} == {*strides}, f"maps have the strides {sorted(features.maps)}, and spec {sorted(strides)}"
    )
    for stride, level in ((s, m) for s, m in features.maps.items() if s in strides):
        wanted = [(BATCH, strides[stride], h, w) for h in _cells(height, stride) for w in _cells(width, stride)]
        faults.unless(
            tuple(level.shape) in wanted, f"the map of stride {stride} is {tuple(level.shape)}, not {wanted[0]}"
        )
    for name, value in outputs(features):
        faults.unless(value.dtype == torch.float32, f"{name} is {value.dtype} of float32 images")
        faults.unless(bool(torch.isfinite(value).all()), f"{name} is not finite")


def _check_masks(features: Features, faults: Faults) -> None:
    masks, tokens = features.masks, features.tokens
    if masks is None or masks.ndim != 4:
        return
    of = None if tokens is None else tokens.shape[1]
    faults.unless(masks.shape[1] == of, f"there are {masks.shape[1]} masks an image, and {of or 'no'} tokens")
    shared = bool((masks >= 0).all()) and _near(masks.sum(dim=1), torch.ones_like(masks[:, 0]))
    faults.unless(shared, "masks are no shares of each place: they are not above zero, or do not sum to one")


def _cells(side: int, stride: int) -> set[int]:
    return {side // stride, -(-side // stride)}


def _check_pure(backbone: Backbone, images: Tensor, faults: Faults) -> None:
    kept = images.clone()
    before = {name: value.clone() for name, value in (*backbone.named_parameters(), *backbone.named_buffers())}
    first, second = backbone.eval()(images), backbone.eval()(images)
    after = dict((*backbone.named_parameters(), *backbone.named_buffers()))
    for name, value in before.items():
        faults.unless(torch.equal(value, after[name]), f"in evaluation mode a forward pass changes {name}")
    faults.unless(torch.equal(kept, images), "a forward pass writes into the images")
    for (name, one), (_, other) in zip(outputs(first), outputs(second), strict=True):
        faults.unless(torch.equal(one, other), f"{name} of the same images differs from one call to the next")


def _check_batches(backbone: Backbone, images: Tensor, faults: Faults) -> None:
    together = dict(outputs(backbone.eval()(images)))
    alone = [dict(outputs(backbone(image[None]))) for image in images]
    for name, value in together.items():
        fault = f"{name} of an image depends on what else is in its batch"
        faults.unless(_near(value, torch.cat([one[name] for one in alone])), fault)


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= NEAR * max(1.0, float(one.abs().max()))


def _check_elsewhere(make: Make, images: Tensor, faults: Faults) -> None:
    """The meta device holds no numbers, but mixing it with another fails as a GPU's would, on any machine."""
    devices = ["meta", "cuda"] if torch.cuda.is_available() else ["meta"]
    with torch.no_grad():
        for device in devices:
            hint = " (a tensor of it is neither parameter nor buffer)" if device == "meta" else ""
            with faults.during(f"a forward pass on another device, {device}{hint},"):
                try:
                    features = make().eval().to(device)(images.to(device))
                except NotImplementedError:
                    continue  # an operation that meta lacks is no fault of the backbone
                for name, value in outputs(features):
                    faults.unless(value.device.type == device, f"moved to {device}, it gives {name} on {value.device}")
        with faults.during("a forward pass in double precision"):
            for name, value in outputs(make().eval().double()(images.double())):
                faults.unless(value.dtype == torch.float64, f"{name} is {value.dtype} in double precision")
        with faults.during("a forward pass under bfloat16"), torch.autocast("cpu", torch.bfloat16):
            for name, value in outputs(make().eval()(images)):
                faults.unless(bool(torch.isfinite(value).all()), f"{name} is not finite under bfloat16")


def _check_gradient(make: Make, images: Tensor, faults: Faults) -> None:
    with faults.during("a backward pass"):
        backbone = make().train()
        weights = [p for p in backbone.parameters() if p.requires_grad]
        faults.unless(bool(weights), "no weight of it requires a gradient: it cannot be trained")
        for name, value in outputs(backbone(images)) if weights else ():
            reached = value.requires_grad and any(
                g is not None for g in torch.autograd.grad(value.sum(), weights, retain_graph=True, allow_unused=True)
            )
            faults.unless(reached, f"no gradient of {name} reaches a weight: it cannot be trained")


def _check_worth(make: Make, registry: Registry, images: Tensor, faults: Faults) -> None:
    backbone = make().eval()
    with faults.during("looking at images"):
        for fault in sanity(backbone, count=16).faults:
            faults.unless(False, fault)
    with faults.during("copying it"):
        faults.unless(copy.deepcopy(backbone).identity == backbone.identity, "a copy of it has other weights")
    with faults.during("saving it and loading the file"), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        backbone.save(Path(folder) / "backbone.safetensors")
        again = Backbone.load(Path(folder) / "backbone.safetensors", registry).eval()
        faults.unless(again.spec.to_json() == backbone.spec.to_json(), "loaded from its file, its spec is another")
        for (name, one), (_, other) in zip(outputs(backbone(images)), outputs(again(images)), strict=True):
            faults.unless(_near(one, other), f"loaded from its file, {name} is another")
