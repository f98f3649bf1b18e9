"""AdaInf: more data from a generative model, with real data weighted up and augmentation weakened.

"Do Generated Data Always Help Contrastive Learning?", Wang, Zhang, Wang, ICLR 2024, arXiv 2403.12448; the
facts are those of the official code, ``main_pretrain.py`` and its augmentation files.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

from evalsuite import UsageError, hookimpl
from pretrain import Arrays, Augment, Images, Joined, Look, Modifier, read_npz


class AdaInf(Modifier):
    """Learns from ``copies`` times the real images joined with generated ones, under weaker augmentation.

    The set is real x copies + generated, shuffled evenly like any other. Each row is a sample of its own:
    two copies of one image in a batch are negatives of each other, as in the official code, for a row's
    index is its position. Labels of generated images are never used. Augmentation is weakened to the
    published strengths wherever a view is an :class:`pretrain.Augment`: crops of at least ``crop`` of the
    area, and a colour jitter of at most ``jitter`` with a probability of at most ``jitter_chance``. On the
    baseline's views that gives the official ``symmetric_adainf`` and ``asymmetric_adainf``. Loss, model and
    optimiser stay the method's.

    The paper trains every arm for the same 100 000 steps, whatever the size of the set: compare runs with
    equal ``--steps``, not equal epochs. Published on CIFAR-10 with a million generated images and
    ResNet-18, accuracy of a linear classifier trained alongside: SimCLR 91.56 without, 91.38 with plain
    inflation (``copies=1 weaken=false``), 93.42 with AdaInf; MoCo v2 92.75, 92.51, 94.19; BYOL 92.46,
    92.90, 92.87. An evaluation of frozen features after training does not reproduce these numbers exactly.

    ``generated`` is an ``.npz`` file with uint8 RGB images (N, H, W, 3). The official conversion script
    reads files with OpenCV and so writes BGR; nothing in such a file tells it apart, so look at an image
    before training.
    """

    @dataclass(frozen=True)
    class Options:
        generated: Path | None = None  # the .npz file; without it there is nothing to inflate with
        copies: int = 10  # of every real image; 1 is plain inflation
        weaken: bool = True
        crop: float = 0.2  # smallest share of the area a crop may take
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # of brightness, contrast, saturation, hue
        jitter_chance: float = 0.4

        def __post_init__(self) -> None:
            if self.copies < 1:
                raise ValueError(f"every real image is there at least once, not {self.copies} times")

    options: Options

    @hookimpl(wrapper=True)
    def dataset(self) -> Generator[None, Images, Images]:
        real = yield
        if self.options.generated is None:
            raise UsageError(
                "adainf has no generated images",
                cause="it joins the data with the output of a generative model, and none was named",
                fix="--set adainf.generated=FILE.npz, with uint8 RGB images (N,H,W,3) under the key image",
            )
        archive = read_npz(self.options.generated)
        generated = Arrays(archive.pixels, None, archive.fingerprint)
        return Joined([*[real] * self.options.copies, generated])

    @hookimpl(wrapper=True)
    def views(self) -> Generator[None, tuple[Look, ...], tuple[Look, ...]]:
        looks = yield
        if not self.options.weaken:
            return looks
        return tuple(self.weaker(look) if isinstance(look, Augment) else look for look in looks)

    def weaker(self, look: Augment) -> Augment:
        """The look with nothing stronger than the options allow, and the rest of it unchanged."""
        crop, jitter = look.crop, look.jitter
        if crop is not None:
            crop = (max(crop[0], self.options.crop), max(crop[1], self.options.crop))
        if jitter is not None:
            brightness, contrast, saturation, hue = self.options.jitter
            jitter = replace(
                jitter,
                brightness=min(jitter.brightness, brightness),
                contrast=min(jitter.contrast, contrast),
                saturation=min(jitter.saturation, saturation),
                hue=min(jitter.hue, hue),
                p=min(jitter.p, self.options.jitter_chance),
            )
        return replace(look, crop=crop, jitter=jitter)
