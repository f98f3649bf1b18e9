"""Which training code wrote a file, and which of its networks is the one to judge."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from evalsuite.checkpoints.reading import State

__all__ = ["Origin", "choice", "origin", "positions"]


@dataclass(frozen=True)
class Origin:
    """A training framework or method, known by where the tensors lie and by what lies beside them.

    ``where`` matches ``container:prefix`` of the chosen tensors; each of ``beside`` matches one of the names in the
    same dict of tensors, or a key of the file's top level. All must match.
    """

    name: str
    where: str = ""
    beside: tuple[str, ...] = ()

    def matches(self, where: str, names: Iterable[str]) -> bool:
        seen = list(names)
        return bool(re.search(self.where, where)) and all(
            any(re.search(pattern, name) for name in seen) for pattern in self.beside
        )


LIGHTNING = r"^pytorch-lightning_version$"
SOLO = r"^(projector|predictor|prototypes|queue|momentum_backbone|momentum_encoder)\b"
# the first that matches names the layout in the report; loading depends on it only for the padding of
# solo-learn's small stems, which no shape shows
ORIGINS = (
    Origin("vissl", r"classy_state_dict"),
    Origin("transformers", r"", (r"(^|\.)(embeddings\.patch_embeddings?\.|embedder\.embedder\.)",)),
    Origin("clip", r"", (r"(^|\.)transformer\.resblocks\.0\.attn\.in_proj_weight$", r"(^|\.)class_embedding$")),
    Origin("solo-learn", r":(backbone|encoder)\.", (LIGHTNING, r"^classifier\.weight", SOLO)),
    Origin("moco-v3", r"(base|momentum)_encoder\."),
    Origin("interclr", r"backbone\.|encoder_[qk]\.0\.", (r"^(memory_bank|neck\.|encoder_[qk]\.1\.)",)),
    Origin("hallucinator", r"(moco|simclr|simsiam)_state"),
    Origin("moco", r"encoder_[qk]\.", (r"queue|encoder_k\.",)),
    Origin("obow", r"feature_extractor|_feature_blocks\.|^network:", (r"bow_|feature_extractor|^network$",)),
    Origin("pixpro", r"encoder(_k)?\.", (r"value_transform|projector_k\.",)),
    Origin("byol", r"(online|target)_(encoder|network)"),
    Origin("dinov2", r"", (r"(register_tokens|^ibot_head|teacher\.backbone\.mask_token)",)),
    Origin("ibot", r"(teacher|student)", (r"masked_im_modeling|mask_token|patch_out",)),
    Origin("dino", r"(teacher|student)", (r"^(student|teacher|dino_loss|epoch)$|head\.(mlp|last_layer)",)),
    Origin("lightly-dino", r"(teacher|student)_backbone"),
    Origin("mae", r"", (r"decoder_(embed|blocks|pred)|^mask_token$",)),
    Origin("swav", r"", (r"prototypes\.",)),
    Origin("simsiam", r"encoder\.", (r"predictor\.",)),
    Origin("mmselfsup", r"backbone\.", (r"^(head|neck|data_preprocessor|meta$|message_hub$)",)),
    Origin("lightly", r"backbone\.", (r"^(projection_head|prediction_head|backbone_momentum)",)),
    Origin("simclr", r"(convnet|f|encoder|backbone)\.", (r"(projection|projector|^(module\.)?g\.|fc\.\d|linear)",)),
    Origin("lightning", r"", (LIGHTNING,)),
    Origin("detectron2", r"", (r"(^|\.)stem\.conv1\.norm\.|^__author__$",)),
    Origin("timm", r"(state_dict_ema|model_ema)"),
    Origin("timm", r"^(state_dict|model)?:", (r"^arch$",)),
    Origin("torch.compile", r"_orig_mod\."),
    Origin("ddp", r"module\."),
    Origin("safetensors", r"", (r"^__safetensors__$",)),
)

# (pattern over container:prefix, how much it is to be preferred, why); all that match count
CHOICES = (
    (r"(?<!feature_extractor_)teacher", 2, "the teacher, which DINO and iBOT evaluate"),
    (
        r"(state_dict_ema|model_ema|ema_model|\bema\b)",
        2,
        "the moving average of the weights, as timm's loader takes",
    ),
    (r"(^|[.:])(module\.)?encoder_q\.", 1, "the query encoder, as MoCo's transfer protocols take"),
    (r"base_encoder\.", 1, "the base encoder, as MoCo v3's transfer protocols take"),
    (r"online_", 1, "the online network, as BYOL's protocols take"),
    (r"feature_extractor\.", 1, "the student, as OBoW's protocols take"),
    (r"(^|[.:])(module\.)?backbone\.", 1, "the backbone"),
    (
        r"momentum|target_|encoder_k|key_encoder|feature_extractor_teacher",
        -2,
        "a moving copy of the network trained",
    ),
)


def origin(state: State, prefix: str) -> str:
    """The name of what wrote the file, "plain" where nothing tells."""
    tree = state.file.tree
    top = [k for k in tree if isinstance(k, str)] if isinstance(tree, dict) else []
    if state.file.path.suffix == ".safetensors":
        top.append("__safetensors__")
    where = f"{state.container}:{prefix}"
    names = [*state.tensors, *top]
    return next((o.name for o in ORIGINS if o.matches(where, names)), "plain")


def positions(state: State, prefix: str) -> str | None:
    """How the code that wrote a vision transformer brings its positions to other sizes, as timm's zoo calls it
    (:func:`evalsuite.backbones.timm_zoo.build`); None where it does as timm, or where nothing tells.

    Published files of DINO hold a bare network, like many others: there the file's name tells.
    """
    if any(name.endswith(("register_tokens", "reg_token")) for name in state.tensors):
        return None  # DINOv2 with registers does as timm
    hidden = state.tensors.get(f"{prefix}mask_token")  # DINOv2's is (1, width), MAE's (1, 1, its decoder's width)
    second = hidden is not None and hidden.ndim == 2
    name = "dino" if second else origin(state, prefix)
    if name in ("plain", "ddp", "safetensors") and "dino" in state.file.path.stem.lower():
        name = "dino"
    return {"dino": "dino", "ibot": "dino", "dinov2": "dino", "mae": "bicubic"}.get(name)


def choice(container: str, prefix: str) -> tuple[int, str]:
    """How much a place in a file is preferred over others that fit as well, and why."""
    where = f"{container}:{prefix}"
    said = [(rank, why) for pattern, rank, why in CHOICES if re.search(pattern, where)]
    return sum(rank for rank, _ in said), "; ".join(why for rank, why in said if rank > 0)
