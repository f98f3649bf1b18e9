"""What a frozen encoder knows of the objects in an image: whose pixels are whose, what each object is, and where."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt, label
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn

from evalsuite.backbone import Backbone, BackboneSpec, Features
from evalsuite.features.poolings import ObservationEncoder
from evalsuite.metrics.objects import adjusted_rand, foreground_adjusted_rand, owners
from evalsuite.pictures import columns_sheet, painted
from evalsuite.statistics import REPLICATES, bootstrap_mean, weight_blocks
from evalsuite.task import Metric, Outcome, Protocol, Setup, Task
from evalsuite.training import Fit, cosine, fit, launched, mix_seed
from evalsuite.worlds import COLOURS, SCALES, SHAPES, VERSION, Rules, World, rules
from evalsuite.worlds.objects import RGB

__all__ = ["DiscoveryProtocol", "ObjectDiscovery"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WORLD = "random-objects"
SIZE = 64
ROWS = 6  # images of the picture
KINDS = (len(COLOURS), len(SHAPES), len(SCALES))
NAMES = ("colour", "shape", "scale")
PURE = 24  # a pixel whose channels differ from a colour's by no more in sum is of that colour
SPECK = 4  # pixels; fewer are no part


@dataclass(frozen=True, kw_only=True)
class DiscoveryProtocol(Protocol):
    """What is asked of frozen features of single frames of ``random-objects``, in one of its variants.

    ``masks``: whose pixels are whose is asked, too. Properties are told by an MLP of three layers of ``hidden`` on
    each of the encoder's ``"tokens"`` or on its ``"pooled"`` vector (``reads``; ``"auto"``: tokens where it gives
    them), fitted on ``train_images`` by Adam over ``epochs`` and asked on ``test_images``. ``encode_size`` is the side
    in pixels of what the encoder sees (None: its own image size).
    """

    masks: bool
    reads: Literal["auto", "tokens", "pooled"] = "auto"
    encode_size: int | None = None
    variant: str = "default"
    train_images: int = 4000
    test_images: int = 1000
    hidden: int = 256
    epochs: int = 40
    batch_size: int = 64
    lr: float = 1e-3


MASKS = (Metric("fg_ari", low=-1.0), Metric("ari", low=-1.0))
PROPERTIES = (*(Metric(name) for name in ("properties", *NAMES)), Metric("position", low=-math.inf))
DISCOVERY = DiscoveryProtocol(id="discovery", version=1, masks=True)


class ObjectDiscovery(Task[DiscoveryProtocol]):
    """Are slots objects? Frames of ``random-objects`` are shown to a frozen encoder, no agent.

    ``fg_ari`` and ``ari`` hold the encoder's masks (:attr:`evalsuite.Features.masks`, the largest at each pixel)
    against whose pixels are whose: the adjusted Rand index of an image, of the pixels of objects or of all, averaged
    over images. An encoder without masks is asked by ``properties`` alone.

    Then a small head says of each vector which object it tells of: ``colour``, ``shape`` and ``scale`` are the shares
    of objects of which that is right, ``properties`` of which all three are, and ``position`` is 1 - SSE / SST of x
    and y. Vectors and objects are matched at the least summed loss (Hungarian algorithm), in the test, too, so that of
    more vectors than objects the best are taken. A single vector tells of one object more than there may be. Objects
    that no vector is left for count as wrong, and their position as the mean one.

    The head is that of jsikyoon/OCRL, utils/property_predictor.py at 01d0bd56. What departs: its cross-entropy takes
    probabilities for logits (a softmax of a softmax), ours does not; what it calls R^2 is the explained part,
    SSR / SST; its rate is 1e-4. ``details`` have what needs no encoder: FG-ARI of k-means on colours, with as many
    clusters as there are masks, and of the connected components of one colour.
    """

    name = "object-discovery"
    metrics = (*MASKS, *PROPERTIES)
    primary = "fg_ari"
    needs = frozenset[str]()
    shows = frozenset({"image", "state"})
    protocols = (
        DISCOVERY,
        replace(DISCOVERY, id="properties", masks=False),
        replace(DISCOVERY, id="smoke", ranked=False, train_images=96, test_images=32, epochs=4),
    )

    def promises(self, protocol: DiscoveryProtocol) -> tuple[Metric, ...]:
        return self.metrics if protocol.masks else PROPERTIES

    def leading(self, protocol: DiscoveryProtocol) -> str:
        return self.primary if protocol.masks else "properties"

    def requires(self, protocol: DiscoveryProtocol) -> frozenset[str]:
        reads = {"tokens", "pooled"} & {protocol.reads}
        return frozenset(reads | ({"masks"} if protocol.masks else set()))

    def oracle(self) -> Backbone:
        return _Connected()

    def fingerprint(self, setup: Setup[DiscoveryProtocol]) -> str:
        """The rules are the data."""
        return hashlib.sha256(f"{VERSION} {asdict(_rules(setup))}".encode()).hexdigest()[:32]

    def run(self, backbone: Backbone, setup: Setup[DiscoveryProtocol]) -> Outcome:
        protocol, found = setup.protocol, _rules(setup)
        encoder = ObservationEncoder(
            backbone, setup.device, reads=protocol.reads, size=protocol.encode_size, precision=setup.precision
        )
        began = monotonic()
        train, test = (
            n if setup.limit is None else min(n, setup.limit) for n in (protocol.train_images, protocol.test_images)
        )
        # all seeds are tested on the same frames; each learns from its own
        seen = _encode(found, train, mix_seed(setup.seed, 0), encoder)
        kept = _Kept() if protocol.masks else None
        asked = _encode(found, test, mix_seed(0, 1), encoder, kept)
        encoded = monotonic()
        head = _fit_head(_Head(encoder, found, protocol.hidden), seen, backbone, setup, protocol)
        told = _told(head, asked, seen.places[seen.there].mean(dim=0))
        masked = None if kept is None else _hold(kept, setup)
        samples = {**({} if masked is None else masked.samples), **told.samples}
        scores = {name: float(values.mean()) for name, values in samples.items()}
        replicates = {name: bootstrap_mean(values, REPLICATES) for name, values in samples.items()}
        return Outcome(
            scores={**scores, "position": told.position},
            replicates={**replicates, "position": told.replicates},
            samples=samples,
            ids=[f"frame-{place}" for place in range(test)],
            data={"fingerprint": self.fingerprint(setup), "worlds": WORLD, "train_images": train, "test_images": test},
            figures={} if masked is None else masked.figures,
            timings={"encode": encoded - began, "fit": monotonic() - encoded},
            details={"vectors": [encoder.tokens, encoder.width], **({} if masked is None else masked.details)},
        )


def _rules(setup: Setup[DiscoveryProtocol]) -> Rules:
    found = rules(WORLD, setup.protocol.variant)
    assert isinstance(found, Rules)
    return found


# --- frames -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What an encoder makes of frames, ``vectors`` (B, N, D); and the rows of their states, ``kinds`` (B, rows, 3),
    ``places`` (B, rows, 2), and whether each is ``there`` (B, rows), that is seen at some pixel."""

    vectors: Tensor
    kinds: Tensor
    places: Tensor
    there: Tensor


@dataclass
class _Kept:
    """Frames (B, 64, 64, 3), whose pixels are whose, there and by the encoder's masks; and the masks themselves."""

    images: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    segments: list[Ints] = field(default_factory=list)
    owner: list[Ints] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)


def _encode(found: Rules, count: int, seed: int, encoder: ObservationEncoder, kept: _Kept | None = None) -> _Seen:
    states, vectors, there = [], [], []
    for images, state, segments in _frames(found, count, seed):
        features = encoder.features(state if encoder.observation == "state" else images)
        vectors.append(encoder.vectors(features).cpu())
        states.append(torch.from_numpy(state))
        there.append(torch.from_numpy((segments.reshape(len(segments), -1, 1) == np.arange(found.rows)).any(axis=1)))
        if kept is not None:
            assert features.masks is not None
            kept.images.append(images)
            kept.segments.append(segments)
            kept.owner.append(owners(features.masks, (SIZE, SIZE)))
            kept.masks.append(features.masks.float().cpu())
    rows = torch.cat(states)
    return _Seen(torch.cat(vectors), rows[:, :, :3].long(), rows[:, :, 3:], torch.cat(there))


def _frames(
    found: Rules, count: int, seed: int
) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], Ints]]:
    """Images (B, 64, 64, 3), states (B, rows, 5) and whose each pixel is (B, 64, 64), 64 frames at a time."""
    rng, world = np.random.default_rng(seed), World(found, SIZE)
    for start in range(0, count, 64):
        size = min(64, count - start)
        images = np.empty((size, SIZE, SIZE, 3), np.uint8)
        states = np.empty((size, found.rows, 5), np.float32)
        segments = np.empty((size, SIZE, SIZE), np.int64)
        for place in range(size):
            world.reset(rng)
            world.image(images[place])
            world.state(states[place])
            segments[place] = world.segments()
        yield images, states, segments


# --- masks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    samples: Mapping[str, Floats]
    details: Mapping[str, Any]
    figures: Mapping[str, Path]


def _hold(kept: _Kept, setup: Setup[DiscoveryProtocol]) -> _Held:
    """The masks against the truth, what needs no encoder, and a picture of a few."""
    images, truth, owner = np.concatenate(kept.images), np.concatenate(kept.segments), np.concatenate(kept.owner)
    count = kept.masks[0].shape[1]
    clusters = np.stack([_clusters(image, count) for image in images])
    colours = _rules(setup).colours
    connected = np.stack([_connected(image, colours) for image in images])
    shown = {
        "image": torch.from_numpy(images[:ROWS]).permute(0, 3, 1, 2) / 255,
        "truth": painted(_one_hot(truth[:ROWS] + 1)),
        "masks": painted(kept.masks[0][:ROWS]),
        "k-means on colours": painted(_one_hot(clusters[:ROWS])),
    }
    path = setup.work / "masks.png"
    columns_sheet(shown, path)
    baselines = {"k-means on colours": clusters, "parts of one colour": connected}
    return _Held(
        {"fg_ari": foreground_adjusted_rand(truth, owner), "ari": adjusted_rand(truth, owner)},
        {"masks": count,
         "fg_ari_without_encoder": {n: float(foreground_adjusted_rand(truth, found).mean())
                                    for n, found in baselines.items()}},
        {"masks": path},
    )  # fmt: skip


def _one_hot(labels: Ints) -> Tensor:
    found: Tensor = F.one_hot(torch.from_numpy(labels)).permute(0, 3, 1, 2).float()
    return found


def _clusters(image: npt.NDArray[np.uint8], count: int) -> Ints:
    """k-means of the pixels' colours: labels (H, W)."""
    colours = image.reshape(-1, 3).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an image of fewer colours has fewer clusters
        found: Ints = KMeans(count, n_init=1, random_state=0).fit_predict(colours).astype(np.int64)
    return found.reshape(image.shape[:2])


def _connected(image: npt.NDArray[np.uint8], colours: tuple[str, ...]) -> Ints:
    """Connected components of one colour, labels (H, W), the ground 0. Pixels of mixed colour, at the edges of
    objects, and specks go to the nearest part."""
    parts = np.zeros(image.shape[:2], dtype=np.int64)
    for name in colours:
        pure = np.abs(image.astype(np.int64) - RGB[name]).sum(axis=2) <= PURE
        found, count = label(pure)
        sizes = np.bincount(found.ravel(), minlength=count + 1)
        for place in np.flatnonzero(sizes >= SPECK):
            if place:
                parts[found == place] = parts.max() + 1
    if not parts.any():
        return parts
    down, across = distance_transform_edt(parts == 0, return_distances=False, return_indices=True)
    nearest: Ints = np.where(image.sum(axis=2) > PURE, parts[down, across], 0)
    return nearest


# --- properties -------------------------------------------------------------------------------------------------


class _Head(nn.Module):
    """Each vector (B, N, D), or the only one, to sets of logits of an object's kinds, and x and y: (B, S, 23)."""

    def __init__(self, encoder: ObservationEncoder, found: Rules, hidden: int) -> None:
        super().__init__()
        self.sets = 1 if encoder.reads == "tokens" else found.objects[1] + 1
        layers: list[nn.Module] = []
        for width in (encoder.width, hidden, hidden):
            layers += [nn.Linear(width, hidden), nn.LeakyReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, self.sets * (sum(KINDS) + 2)))

    def forward(self, batch: list[tuple[Tensor, ...]]) -> Mapping[str, Tensor]:
        vectors, kinds, places, there = (torch.stack(part).to(self.device) for part in zip(*batch, strict=True))
        costs = _costs(self.told(vectors), kinds, places)
        each = [cost[pairs].sum() for cost, pairs in zip(costs, _matched(costs, there), strict=True)]
        return {"properties": torch.stack(each).mean()}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def told(self, vectors: Tensor) -> Tensor:
        found: Tensor = self.net(vectors).unflatten(2, (self.sets, -1)).flatten(1, 2)
        return found


def _costs(told: Tensor, kinds: Tensor, places: Tensor) -> Tensor:
    """The loss (B, rows, S) of each object by each set: cross-entropies of its kinds, and the squared error of x and y,
    averaged over the two."""
    *logits, found = told.split((*KINDS, 2), dim=2)
    costs: Tensor = (found.unsqueeze(1) - places.unsqueeze(2)).square().mean(dim=3)
    for place, part in enumerate(logits):
        surprise = -part.log_softmax(dim=2).transpose(1, 2)
        costs = costs + surprise.gather(1, kinds[:, :, place].unsqueeze(2).expand(-1, -1, surprise.shape[2]))
    return costs


def _matched(costs: Tensor, there: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each image the objects that are there and the sets they are told by, at the least sum of costs."""
    found = []
    for cost, seen in zip(costs.detach().double().cpu().numpy(), there.cpu().numpy(), strict=True):
        rows, sets = linear_sum_assignment(cost[seen])
        found.append((torch.from_numpy(np.flatnonzero(seen)[rows]), torch.from_numpy(sets)))
    return found


def _fit_head(
    head: _Head, seen: _Seen, backbone: Backbone, setup: Setup[DiscoveryProtocol], protocol: DiscoveryProtocol
) -> _Head:
    count = len(seen.vectors)
    steps = math.ceil(count / protocol.batch_size) * protocol.epochs

    def sample(index: int, seed: int) -> tuple[Tensor, ...]:
        return seen.vectors[index], seen.kinds[index], seen.places[index], seen.there[index]

    run = Fit(
        model=head, optimizer=torch.optim.Adam(head.parameters(), protocol.lr), lr_factor=partial(cosine, steps=steps),
        iterations=steps, sample=sample, length=count, batch_size=protocol.batch_size, seed=setup.seed,
        key=f"{backbone.identity} {protocol.hash} {count} {setup.seed}", state=setup.work / "state.pt",
        saves=setup.save_every,
    )  # fmt: skip
    fit(run, launched(setup.device), setup.progress)
    return head.to(setup.device)


@dataclass(frozen=True)
class _Told:
    samples: Mapping[str, Floats]
    position: float
    replicates: Floats


@torch.inference_mode()
def _told(head: _Head, seen: _Seen, mean: Tensor) -> _Told:
    """What the head says of frames: the share of an image's objects it is right about; and 1 - SSE / SST of places.
    An object that no vector is left for is at ``mean``, and of no kind."""
    head.eval()
    right = torch.zeros(*seen.there.shape, len(KINDS), dtype=torch.bool)
    errors = (mean - seen.places).square().sum(dim=2)
    for start in range(0, len(right), 256):
        part = slice(start, start + 256)
        told = head.told(seen.vectors[part].to(head.device)).cpu()
        *logits, places = told.split((*KINDS, 2), dim=2)
        kinds = torch.stack([logit.argmax(dim=2) for logit in logits], dim=2)
        pairs = _matched(_costs(told, seen.kinds[part], seen.places[part]), seen.there[part])
        for image, (rows, sets) in enumerate(pairs, start):
            right[image, rows] = kinds[image - start, sets] == seen.kinds[image, rows]
            errors[image, rows] = (places[image - start, sets] - seen.places[image, rows]).square().sum(dim=1)
    there = seen.there.double()
    shares = [(right[:, :, place] * there).sum(dim=1) / there.sum(dim=1) for place in range(len(KINDS))]
    every = (right.all(dim=2) * there).sum(dim=1) / there.sum(dim=1)
    centre = seen.places[seen.there].mean(dim=0)
    spread = ((seen.places - centre).square().sum(dim=2) * there).sum(dim=1).numpy()
    missed = (errors * there).sum(dim=1).numpy()
    again = [1 - (block @ missed) / (block @ spread) for block in weight_blocks(len(missed), REPLICATES, 0)]
    samples = {name: share.numpy() for name, share in zip(NAMES, shares, strict=True)}
    return _Told(
        {"properties": every.numpy(), **samples}, float(1 - missed.sum() / spread.sum()), np.concatenate(again)
    )


# --- what sees, for checks ----------------------------------------------------------------------------------------


class _Connected(Backbone):
    """Splits an image into connected components of one colour, and measures each."""

    PARTS = 8

    def __init__(self) -> None:
        spec = BackboneSpec(
            "testing:connected", 9, {}, frozenset({"tokens", "masks"}), image_size=(SIZE, SIZE), mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )  # fmt: skip
        super().__init__(nn.Identity(), spec)

    def look(self, normalised: Tensor) -> Features:
        images = (normalised * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        parts = np.stack([_connected(image, rules(WORLD).colours) for image in images]).clip(max=self.PARTS - 1)
        masks = F.one_hot(torch.from_numpy(parts), self.PARTS).permute(0, 3, 1, 2).to(normalised)
        area = masks.sum(dim=(2, 3)).clamp_min(1)
        down, across = (torch.linspace(0, 1, n).to(normalised) for n in masks.shape[2:])
        x, y = (torch.einsum(f"bshw,{way}->bs", masks, line) / area for way, line in (("w", across), ("h", down)))
        colours = torch.einsum("bshw,bchw->bsc", masks, normalised) / area.unsqueeze(2)
        wide, high = masks.amax(dim=2).mean(dim=2), masks.amax(dim=3).mean(dim=2)
        share = area / masks[0, 0].numel()
        numbers = torch.stack([x, y, wide, high, share / (wide * high).clamp_min(1e-6), share], dim=2)
        return Features(tokens=torch.cat([colours, numbers], dim=2), masks=masks)
