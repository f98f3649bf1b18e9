"""The published recipes of classifiers trained on augmented images, each with its source and departures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass
from evalsuite.probing.heads import HeadProtocol

__all__ = ["recipes"]


# --- recipes ----------------------------------------------------------------------------------------------------


def recipes(kind: Literal["imagenet", "small"]) -> tuple[HeadProtocol, ...]:
    """The published recipes for ImageNet and data like it, or for CIFAR and data like it."""
    if kind == "imagenet":
        published = (_linear_moco(), _linear_pixpro(), _linear_swav(), _linear_simsiam(), _linear_simclr())
        return (
            *published,
            _rotnet_linear(),
            _rotnet_nonlinear(),
            *_finetune("auto"),
            _finetune_simclr(),
            _smoke("auto"),
        )
    linear = (_linear_moco_small(), _linear_simclr_small(), _online())
    return (*linear, _rotnet_conv(), _rotnet_nonlinear_small(), *_finetune("squash"), _smoke("squash"))


def _linear_moco() -> HeadProtocol:
    """MoCo v1 and v2 (facebookresearch/moco, main_lincls.py, README): learning rate 30.

    Departs: the last weights are judged; the code reports the best test accuracy of all epochs.
    """
    return HeadProtocol(id="linear-moco", version=2, lrs=(30.0,), milestones=(60, 80))


def _linear_pixpro() -> HeadProtocol:
    """PixPro (zdaxie/PixPro, main_linear.py, its defaults): MoCo's rate on a cosine, after five epochs of warm-up.

    The code puts the whole network into training mode, so features are normalised by the batch and running
    statistics move; that is kept. Departs: one process has one batch norm over its share of the 256 images, and the
    last weights are judged.
    """
    return HeadProtocol(
        id="linear-pixpro", version=2, lrs=(30.0,), backbone_norm="train", schedule="cosine", per="step",
        warmup_epochs=5, warmup_factor=0.01, final_factor=1e-6 / 30,
    )  # fmt: skip


def _linear_swav() -> HeadProtocol:
    """SwAV (facebookresearch/swav, eval_linear.py, its defaults).

    Departs: images are normalised as the backbone says; the code has 0.228 for 0.229 as the deviation of red, in
    pre-training too. The last weights are judged.
    """
    return HeadProtocol(id="linear-swav", version=2, lrs=(0.3,), weight_decay=1e-6, schedule="cosine")


def _linear_simsiam() -> HeadProtocol:
    """SimSiam (facebookresearch/simsiam, main_lincls.py --lars, README): batch 4,096, learning rate 0.1 B / 256.

    LARS is apex's LARC, trust 0.001, not clipped, on weight and bias. Departs: the last weights are judged.
    """
    return HeadProtocol(
        id="linear-simsiam", version=2, lrs=(1.6,), optimizer="lars", batch_size=4096, epochs=90, schedule="cosine"
    )


def _linear_simclr() -> HeadProtocol:
    """SimCLR (google-research/simclr, README): batch 4,096, learning rate 0.1 B / 256, no warm-up, logits from zero.

    Departs: crops are drawn as torchvision does, not TensorFlow.
    """
    return HeadProtocol(
        id="linear-simclr", version=2, lrs=(1.6,), nesterov=True, weight_decay=1e-6, batch_size=4096, epochs=90,
        schedule="cosine", per="step", init="zero", interpolation="bicubic",
    )  # fmt: skip


def _linear_moco_small() -> HeadProtocol:
    """The linear evaluation of MoCo's kind on CIFAR, STL-10 and Tiny ImageNet, of the code of the Hallucinator.

    Learning rate 10, batch 512. Departs: the last weights are judged, the code reports the best of all epochs.
    """
    return HeadProtocol(id="linear-moco", version=2, lrs=(10.0,), batch_size=512, milestones=(60, 80), rule="squash")


def _linear_simclr_small() -> HeadProtocol:
    """SimCLR on CIFAR-10 (google-research/simclr, README): batch 512, learning rate 0.1 B / 256, no weight decay."""
    return HeadProtocol(
        id="linear-simclr", version=2, lrs=(0.2,), nesterov=True, batch_size=512, schedule="cosine", per="step",
        init="zero", interpolation="bicubic", rule="squash",
    )  # fmt: skip


def _online() -> HeadProtocol:
    """AdaInf's classifier (PKU-ML/adainf, solo-learn), on the finished backbone.

    There it is a linear layer on detached features, trained alongside pre-training for 100,000 steps of 512 images
    with the pre-training's own views, optimiser (LARS, trust 0.02, clipped, bias left out) and cosine, at 0.05 B / 256
    without decay; its test accuracy at the end is the published number. Here its input does not move while it learns.
    So it departs: the backbone is the last one from the beginning, in evaluation mode; one view an image, of the
    baseline's strength; 100 epochs, not a thousand. The paper's numbers are not reproduced by any evaluation
    afterwards, as its authors say.
    """
    return HeadProtocol(
        id="online", version=2, lrs=(0.1,), optimizer="lars", trust=0.02, trust_clip=True, unscaled="vectors",
        batch_size=512, schedule="cosine", per="step", warmup_epochs=1, warmup_factor=3e-4, init="torch",
        jitter=(0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5, interpolation="bicubic", rule="squash",
    )  # fmt: skip


def _rotnet_linear() -> HeadProtocol:
    """RotNet's linear classifiers on every layer (gidariss/FeatureLearningRotNet, ImageNet_LinearClassifiers_*).

    On its AlexNet conv1 to conv5; on another network the map of every stride. All layers learn at once; which one is
    scored is chosen on held-out training images, where the paper tells all of them on the test set.
    """
    grids = (12, 7, 5, 6, 6)
    return HeadProtocol(
        id="rotnet-linear", version=2, outputs=("maps/max",), width=9216, norm="plain", init="fan-out",
        layers=tuple(f"layer:conv{i}/max{grid}" for i, grid in enumerate(grids, 1)), view="cut", lrs=(0.01,),
        nesterov=True, weight_decay=5e-4, batch_size=192, epochs=35, milestones=(5, 15, 25), gamma=0.2,
    )  # fmt: skip


def _rotnet_nonlinear() -> HeadProtocol:
    """RotNet's non-linear classifiers on conv4 and conv5 (ImageNet_NonLinearClassifiers_*), or strides 16 and 32.

    As ``rotnet-linear`` but for the head, AlexNet from there on, and 40 epochs.
    """
    return HeadProtocol(
        id="rotnet-nonlinear", version=2, outputs=("map16", "map32"), layers=("layer:conv4", "layer:conv5"),
        head="alexnet", init="fan-out", view="cut", lrs=(0.01,), nesterov=True, weight_decay=5e-4, batch_size=192,
        epochs=40, milestones=(10, 20, 30), gamma=0.2,
    )  # fmt: skip


def _rotnet_conv() -> HeadProtocol:
    """RotNet's convolutional classifier on CIFAR-10 (CIFAR10_ConvClassifier_*), on each block of its network.

    On another network the map of every stride. Which block is scored is chosen on held-out training images; the
    published configuration has the second, whose accuracy the paper tells on the test set beside the others.
    """
    return HeadProtocol(
        id="rotnet-conv", version=2, outputs=("maps",), layers=tuple(f"layer:conv{i}" for i in range(1, 5)),
        head="conv", init="fan-out", view="padded", lrs=(0.1,), nesterov=True, weight_decay=5e-4, batch_size=128,
        milestones=(35, 70, 85), gamma=0.2, rule="squash",
    )  # fmt: skip


def _rotnet_nonlinear_small() -> HeadProtocol:
    """RotNet's multi-layer classifier on CIFAR-10 (CIFAR10_MultLayerClassifier_*), published for the second block.

    Maps are averaged to 8 x 8 places (the second block's own size), on another network to about 12,288 numbers. The
    last rate of its table, from epoch 45 on, holds to the end at 100.
    """
    return HeadProtocol(
        id="rotnet-nonlinear", version=2, outputs=("maps/avg",), width=12288,
        layers=tuple(f"layer:conv{i}/avg8" for i in range(1, 5)), head="mlp", init="fan-out", view="padded",
        lrs=(0.1,), nesterov=True, weight_decay=5e-4, batch_size=128, milestones=(20, 40, 45), gamma=0.2,
        rule="squash",
    )  # fmt: skip


def _finetune(rule: Literal["auto", "squash"]) -> tuple[HeadProtocol, ...]:
    """SwAV's fine-tuning of everything on 1 % and 10 % of the labels (facebookresearch/swav, eval_semisup.py, README).

    Departs: images are normalised as the backbone says, and the last weights are judged. ``finetune`` is ours: the
    recipe of 10 % on all labels.
    """

    def tuned(name: str, fraction: float, lr: float, backbone_lr: float) -> HeadProtocol:
        return HeadProtocol(
            id=name, version=2, fraction=fraction, tune=True, backbone_norm="train", lrs=(lr,), backbone_lr=backbone_lr,
            epochs=20, milestones=(12, 16), gamma=0.2, rule=rule, init="torch",
        )  # fmt: skip

    return (
        tuned("finetune-1", 0.01, 5.0, 0.02),
        tuned("finetune-10", 0.1, 0.2, 0.01),
        tuned("finetune", 1.0, 0.2, 0.01),
    )


def _finetune_simclr() -> HeadProtocol:
    """SimCLR's fine-tuning on 1 % of the labels (google-research/simclr, README): LARS, 0.005 sqrt(B), batch 1,024.

    Departs: the command keeps the first layer of SimCLR v2's projection head, which a backbone does not carry; momentum
    is gathered before the learning rate, not after; crops are drawn as torchvision does.
    """
    return HeadProtocol(
        id="finetune-1-simclr", version=2, fraction=0.01, tune=True, backbone_norm="train", lrs=(0.16,),
        backbone_lr=0.16, optimizer="lars", trust_ratio="decayed", unscaled="vectors and head", batch_size=1024,
        epochs=60, schedule="cosine", per="step", init="zero", interpolation="bicubic",
    )  # fmt: skip


def _smoke(rule: Literal["auto", "squash"]) -> HeadProtocol:
    """Ours: three learning rates at 64 pixels for a few epochs, to see that everything works."""
    return HeadProtocol(
        id="smoke", version=2, ranked=False, size=64, lrs=(0.03, 0.3, 3.0), epochs=5, batch_size=32, rule=rule
    )
