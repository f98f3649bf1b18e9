"""Which training code wrote a file, and which of its networks is the one to judge."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from evalsuite.checkpoints.reading import File, State

__all__ = ["Origin", "choice", "origin", "positions"]


@dataclass(frozen=True)
class Origin:
    """A training framework or method, known by where the tensors lie and by what lies beside them.

    ``where`` matches ``container:prefix`` of the chosen tensors; each of ``beside`` matches one of the names in the
    same dict of tensors, or of the keys of the file's two upper levels. All must match, and none of ``without``. A name
    that several codes could have written is no mark: what is not certain has no name.
    """

    name: str
    where: str = ""
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def matches(self, where: str, names: Iterable[str]) -> bool:
        seen = list(names)

        def among(pattern: str) -> bool:
            return any(re.search(pattern, name) for name in seen)

        return bool(re.search(self.where, where)) and all(map(among, self.beside)) and not any(map(among, self.without))


LIGHTNING = r"^pytorch-lightning_version$"
SOLO = r"^(projector|predictor|prototypes|queue|momentum_backbone|momentum_encoder)\b"
TARGET = r"(^|\.)target_encoder(\.|$)"
# the first that matches names the layout in the report. What follows from it beyond that: the padding of solo-learn's
# small stems and the heads of a ViT, which no shape shows
ORIGINS = (
    Origin("vissl", r"classy_state_dict"),
    Origin("transformers", r"", (r"(^|\.)(embeddings\.patch_embeddings?\.|embedder\.embedder\.)",)),
    Origin("clip", r"", (r"(^|\.)transformer\.resblocks\.0\.attn\.in_proj_weight$", r"(^|\.)class_embedding$")),
    Origin("solo-learn", r":(backbone|encoder)\.", (LIGHTNING, r"^classifier\.weight", SOLO)),
    Origin("moco-v3", r"(base|momentum)_encoder\.", (r"base_encoder\.",)),
    Origin("interclr", r"backbone\.|encoder_[qk]\.0\.", (r"^memory_bank",)),
    Origin("hallucinator", r"(moco|simclr|simsiam)_state"),
    Origin("moco", r"encoder_[qk]\.", (r"queue|encoder_k\.",)),
    Origin("obow", r"feature_extractor|_feature_blocks\.|^network:", (r"bow_|feature_extractor",)),
    Origin("pixpro", r"encoder(_k)?\.", (r"value_transform|projector_k\.",)),
    Origin("ijepa", r"(^|[.:])(target_)?encoder[.:]", (TARGET, r"predictor\.(module\.)?(predictor_embed|mask_token)")),
    Origin("msn", r"(^|[.:])(target_)?encoder[.:]", (TARGET, r"^prototypes$")),
    Origin("byol", r"(online|target)_(encoder|network)", (r"online_",)),
    Origin("ibot", r"(teacher|student)", (r"^ibot_loss$",)),
    Origin("dinov2", r"", (r"(register_tokens|^ibot_head|teacher\.backbone\.mask_token|dino_head\.mlp)",)),
    Origin("dinov2", r"", (r"(^|\.)mask_token$", r"blocks\.\d+\.(\d+\.)?ls1\.gamma")),
    Origin("ibot", r"(teacher|student)", (r"masked_im_modeling|mask_token|masked_embed|patch_out",)),
    Origin("dino", r"(teacher|student)", (r"^dino_loss$|head\.(mlp|last_layer)",)),
    Origin("lightly-dino", r"(teacher|student)_backbone", (r"(teacher|student)_head\.",)),
    Origin("mae", r"", (r"decoder_(embed|pred)\.",)),
    Origin("swav", r"", (r"(^|\.)prototypes\.", r"projection_head\.")),
    Origin("simsiam", r"(^|[.:])(module\.)?encoder\.", (r"encoder\.fc\.\d", r"(^|\.)predictor\.\d")),
    Origin("mmselfsup", r"(^|[.:])backbone\.", (r"^(head|neck|data_preprocessor)\b|^message_hub$", r"^meta$")),
    Origin("lightly", r"backbone\.", (r"^(projection_head|prediction_head)\.layers\.",)),
    Origin("simclr", r"convnet\.|(^|[.:])(module\.)?f\.", (r"^(module\.)?(projection|g)\.",)),
    Origin("simclr", r"(^|[.:])(module\.)?backbone\.", (r"^(module\.)?backbone\.fc\.\d",), (LIGHTNING,)),
    Origin("lightning", r"", (LIGHTNING,)),
    Origin("detectron2", r"", (r"(^|\.)stem\.conv1\.norm\.|^__author__$",)),
    Origin("timm", r"(state_dict_ema|model_ema)"),
    Origin("timm", r"^(state_dict|model)?:", (r"^arch$", r"^(version|metric)$")),
    Origin("FSDP", r"", (r"^__FSDP__$",)),
    Origin("torch.compile", r"_orig_mod\."),
    Origin("torch.compile", r"", (r"^__torch\.compile__$",)),
    Origin("lightning", r"", (r"^__Lightning Fabric__$",)),
    Origin("ddp", r"module\."),
    Origin("safetensors", r"", (r"^__safetensors__$",)),
)


@dataclass(frozen=True)
class Choice:
    """A rule of which of several networks in a file is judged.

    One whose ``container:prefix`` matches ``where`` is preferred by ``rank``. The rule holds where one of the file's
    names matches ``beside``, and none ``without``.
    """

    where: str
    rank: int
    why: str
    beside: str = ""
    without: str = ""


START = r"(^|[.:])(module\.)?"
# all that match count
CHOICES = (
    Choice(r"(?<!feature_extractor_)teacher", 2, "the teacher, which DINO and iBOT evaluate"),
    Choice(
        r"(?<![a-z])(ema|swa|polyak|averaged?)(?![a-z])|averaged_model", 2,
        "the moving average of the weights, as timm's loader takes",
    ),
    Choice(
        START + r"target_encoder[.:]", 3, "the target encoder, which I-JEPA, V-JEPA and MSN evaluate",
        beside=r"(^|\.)encoder(\.|$)", without=r"online_|(^|\.)predictor\.(net\.|layers\.)?\d",
    ),
    Choice(START + r"encoder_q\.", 1, "the query encoder, as MoCo's transfer protocols take"),
    Choice(r"base_encoder\.", 1, "the base encoder, as MoCo v3's transfer protocols take"),
    Choice(r"online_", 1, "the online network, as BYOL's protocols take"),
    Choice(r"(?<!\w)feature_extractor\.", 1, "the student, as OBoW's protocols take"),
    Choice(START + r"backbone\.", 1, "the backbone"),
    Choice(
        r"momentum|target_|encoder_k|key_encoder|feature_extractor_teacher", -2, "a moving copy of the network trained"
    ),
    Choice(r"discriminator|decoder|generator|\bD\b|netD", -2, "a network beside the encoder"),
)  # fmt: skip


def origin(state: State, prefix: str) -> str:
    """The name of what wrote the file, "plain" where nothing is certain."""
    where = f"{state.container}:{prefix}"
    marks = [f"__{wrapper}__" for wrapper in state.wrappers]
    if state.file.path.suffix == ".safetensors":
        marks.append("__safetensors__")
    names = [*state.tensors, *_keys(state.file), *marks]
    return next((o.name for o in ORIGINS if o.matches(where, names)), "plain")


def positions(state: State, prefix: str) -> str | None:
    """How the code that wrote a vision transformer brings its positions to other sizes, as timm's zoo calls it
    (:func:`evalsuite.backbones.timm_zoo.build`); None where it does as timm, or where nothing shows it.

    Published files of DINO hold a bare network, like many others: there the file's name decides.
    """
    if any(name.endswith(("register_tokens", "reg_token")) for name in state.tensors):
        return None  # DINOv2 with registers does as timm
    hidden = state.tensors.get(f"{prefix}mask_token")  # DINOv2's is (1, width), MAE's (1, 1, its decoder's width)
    second = hidden is not None and hidden.ndim == 2
    name = "dino" if second else origin(state, prefix)
    if name in ("plain", "ddp", "safetensors") and "dino" in state.file.path.stem.lower():
        name = "dino"
    return {"dino": "dino", "ibot": "dino", "dinov2": "dino", "mae": "bicubic"}.get(name)


def _keys(file: File) -> list[str]:
    """The keys of a file's two upper levels, the second with the first before it."""
    tree = file.tree if isinstance(file.tree, Mapping) else {}
    top = {k: v for k, v in tree.items() if isinstance(k, str)}
    inner = {k: itertools.islice(v, 5000) for k, v in top.items() if isinstance(v, Mapping)}
    return [*top, *(f"{k}.{name}" for k, names in inner.items() for name in names if isinstance(name, str))]


def choice(state: State, prefix: str) -> tuple[int, str]:
    """How much a network of a file is preferred over others that fit as well, and why; or why it is not."""
    where = f"{state.container}:{prefix}"
    names = [*_keys(state.file), *state.tensors]

    def among(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    rules = [
        rule
        for rule in CHOICES
        if re.search(rule.where, where)
        and (not rule.beside or among(rule.beside))
        and not (rule.without and among(rule.without))
    ]
    rank = sum(rule.rank for rule in rules)
    return rank, "; ".join(rule.why for rule in rules if (rule.rank > 0) == (rank >= 0))
