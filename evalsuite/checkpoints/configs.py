"""What is written about a network beside its tensors: typed, bounded, and believed where the tensors allow it.

A stranger's text chooses among the architectures and options that fit the tensors, and says what no shape shows (the
number of attention heads, the normalisation of pixels). It never names code, a file or an address that is followed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import Tensor
from torchvision.models import list_models

from evalsuite.backbone import HEADER, input_fault
from evalsuite.checkpoints.folders import hub_named
from evalsuite.checkpoints.reading import File

__all__ = ["Described", "described", "described_input", "heads", "input_of", "names", "solo_method", "tower"]

CONFIG = "config.json"
# of timm's builders: what shapes, pooling and activations follow from; nothing that fetches, and no classifier
OPTIONS = frozenset({
    "img_size", "patch_size", "embed_dim", "depth", "depths", "dims", "num_heads", "window_size", "mlp_ratio",
    "qkv_bias", "qk_norm", "init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "fc_norm",
    "final_norm", "global_pool", "act_layer", "norm_layer", "norm_eps", "layers", "cardinality", "base_width",
    "stem_width", "stem_type", "avg_down", "conv_mlp", "ls_init_value", "use_grn",
})  # fmt: skip
SAVED = ("args", "opt", "config", "cfg", "hyper_parameters", "hparams", "model_args", "model_config", "model_kwargs")
HEADS = frozenset({"num_heads", "n_heads", "n_head", "num_attention_heads"})
PREPARES = r"prepro|normali[sz]|pretrained_cfg|data_cfg|data_config|transform"  # settings of what prepares pixels
WIDTHS = ("hidden_size", "embed_dim", "embed_dims", "width")
NAMES = frozenset({"arch", "architecture", "model", "model_name", "backbone", "encoder", "name"})
SETTINGS = 20_000  # how many values are followed
LONGEST = 1 << 20  # characters of a configuration that is text
OTHERS = r"decoder|predictor|pred_|text|language|audio|head_cfg"  # networks beside the encoder
LARGEST = 1 << 14  # of a width, a depth, a size: what is above is no network that fits a file


@dataclass(frozen=True)
class Described:
    """An architecture with options of its builder and, where it is said, its pooling; and who says so."""

    arch: str
    options: Mapping[str, Any] = field(default_factory=dict)
    pool: str = ""
    by: str = CONFIG


def described(file: File) -> Iterator[Described]:
    """The architectures that the texts beside a file name."""
    config = file.beside.get(CONFIG, {})
    name = config.get("architecture")
    if isinstance(name, str) and (known := registered(name)):
        pool = str(typed({"global_pool": config.get("global_pool")}).get("global_pool") or "")
        yield Described(known, typed(config.get("model_args")), pool, f"{CONFIG} beside it")
    tried: dict[str, None] = {}
    for where, name, saved in _named(file):
        if name not in list_models() and name not in tried and (known := registered(name)) and len(tried) < 4:
            tried[name] = None
            yield Described(known, typed(saved.get("model_kwargs")), "", f"the file's {where}")


def names(file: File) -> Iterator[tuple[str, str]]:
    """What a file's settings call its network, and where they do."""
    for where, name, _ in _named(file):
        yield name, where


def _named(file: File) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Where a network is named, the name, and the settings it stands in, but for what :data:`CONFIG` says of timm's."""
    for where, saved in settings(file).items():
        if where != f"{CONFIG} beside it":
            for path, value in _all(saved, NAMES):
                if isinstance(value, str) and value and not re.search(OTHERS, path):
                    yield f"{where} ({path})", value, saved


def settings(file: File) -> dict[str, dict[str, Any]]:
    """What a file keeps of the settings it was made with, by where it stands: plain values in plain containers."""
    tree = file.tree if isinstance(file.tree, Mapping) else {}
    sections: dict[str, Any] = {"top level": {k: v for k, v in tree.items() if isinstance(k, str) and _scalar(v)}}
    meta: Any = tree.get("meta")
    for where, value in [*((k, tree.get(k)) for k in SAVED), *((f"{n} beside it", v) for n, v in file.beside.items())]:
        sections[where] = _plain(value)
    for key, text in file.header.items():
        sections[f"header ({key})"] = _plain(_object(text)) if key != HEADER else None
    for key in ("cfg", "config") if isinstance(meta, Mapping) else ():
        sections[f"meta.{key}"] = _of_text(meta[key]) if isinstance(meta.get(key), str) else _plain(meta.get(key))
    return {where: saved for where, saved in sections.items() if isinstance(saved, dict)}


def _object(text: str) -> Any:
    """What a text of a safetensors header is as JSON; None for what is none."""
    try:
        return json.loads(text) if text[:1] == "{" and len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        return None


def _of_text(text: str) -> dict[str, Any]:
    """Of a configuration that OpenMMLab wrote as Python: names of architectures, numbers of heads, how pixels are
    normalised."""
    assigned = re.findall(r"\b(arch|num_heads)\s*=\s*(?:'([\w.-]{1,80})'|(\d{1,4})\b)", text[:LONGEST])
    config: dict[str, Any] = {
        f"{key} {i}": {key: int(number) if number else word} for i, (key, word, number) in enumerate(assigned)
    }
    values = r"\s*=\s*[\[(]([\d., ]{5,80})[\])]"
    swapped = re.search(r"to_rgb\s*=\s*False", text[:LONGEST])  # then numbers are of blue, green and red
    for pattern in () if swapped else (rf"\bmean{values}", rf"\bstd{values}"):
        if given := re.search(pattern, text[:LONGEST]):
            numbers = [part.strip() for part in given[1].strip(" ,").split(",")]
            if all(re.fullmatch(r"\d{1,3}(\.\d{0,9})?", n) for n in numbers):
                config[pattern[2:].partition("\\")[0]] = [float(n) for n in numbers]
    return config


def _plain(value: Any, depth: int = 0, left: list[int] | None = None) -> Any:
    """A setting of any class that was saved as data: namespaces, nodes of OmegaConf, configurations of frameworks."""
    left = [SETTINGS] if left is None else left  # a few containers in each other are many ways
    left[0] -= 1
    if _scalar(value) or depth > 8 or left[0] < 0:
        return value if _scalar(value) else None
    if isinstance(value, list | tuple):
        return [_plain(v, depth + 1, left) for v in value[:64]]
    if isinstance(value, Mapping):
        return {k: _plain(v, depth + 1, left) for k, v in itertools.islice(value.items(), 1000) if isinstance(k, str)}
    held = getattr(value, "__dict__", {})
    inner = next((held[k] for k in ("_content", "_val", "_cfg_dict") if k in held), dict(held))
    return _plain(inner, depth + 1, left)


def _all(
    saved: Mapping[str, Any], names: frozenset[str], path: str = "", width: int | None = None
) -> Iterator[tuple[str, Any]]:
    """Every setting of one of these names, with the keys that lead to it; where a ``width`` is wanted, none of an
    object that says another, which is of another network."""
    others = width is not None and any(_number(saved.get(k)) and saved[k] != width for k in WIDTHS)
    for key, value in saved.items():
        if key in names and not others:
            yield f"{path}{key}", value
        elif isinstance(value, dict):
            yield from _all(value, names, f"{path}{key}.", width)


def tower(file: File, width: int, sizes: str = "hidden_size") -> Mapping[str, Any]:
    """What transformers' ``config.json`` beside a file says of an image network of this width; empty where it says
    nothing. ``sizes`` is the name of its width, or of its stages' widths."""
    config = file.beside.get(CONFIG, {})
    inner = config.get("vision_config")
    nested = isinstance(inner, Mapping)
    said = inner if isinstance(inner, Mapping) else config
    given = said.get(sizes)
    given = given[-1] if isinstance(given, list) and given else given
    if given != width and not (given is None and nested):
        return {}
    # a nested object holds what differs from its class, and all of these have twelve heads
    return {"num_attention_heads": 12, **said} if nested else said or {"": ""}


def heads(file: File, width: int) -> tuple[int, str] | None:
    """The number of attention heads that a file's settings give for an encoder of this width, and where they do.

    What is beside a file for transformers comes first. None where nothing gives one, several are given, or one that
    does not divide the width; settings of another width are of another network.
    """
    beside = tower(file, width).get("num_attention_heads")
    given = {
        number: f"{where}: {path}"
        for where, saved in settings(file).items()
        for path, number in _all(saved, HEADS, width=width)
        if _number(number) and not re.search(OTHERS, path)
    }
    given = {beside: f"{CONFIG} beside it: num_attention_heads"} if _number(beside) else given
    fitting = {n: where for n, where in given.items() if n > 0 and width % n == 0}
    if len(given) != 1 or not fitting:
        return None
    ((number, where),) = fitting.items()
    return number, f"{number} attention heads by the word of the file ({where})"


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def solo_method(file: File) -> str:
    """The method by which solo-learn trained a file, "" where it does not say."""
    for saved in settings(file).values():
        for key in ("pretrain_method", "method"):
            if isinstance(saved.get(key), str):
                return str(saved[key])
    return ""


def registered(name: str) -> str | None:
    """``timm:name`` without the tag of its weights, where timm has such an architecture."""
    bare = name.partition(".")[0]
    return f"timm:{bare}" if re.fullmatch(r"\w{1,80}", bare) and timm.is_model(bare) else None


def typed(options: Any) -> dict[str, Any]:
    """Of a stranger's options those that are known, of plain types and of sizes that a network may have."""
    if not isinstance(options, Mapping):
        return {}
    return {k: v for k, v in options.items() if k in OPTIONS and (_scalar(v) or _scalars(v))}


def _scalar(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[\w.:-]{0,80}", value) is not None
    if isinstance(value, int | float):
        return -LARGEST <= value <= LARGEST  # which no NaN is, and whole numbers of any length are compared
    return value is None


def _scalars(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 8 and all(isinstance(v, int | float) and _scalar(v) for v in value)


def described_input(file: File, fits: bool) -> tuple[dict[str, Any], str]:
    """mean, std and image_size that the texts beside a file give, and which text.

    ``fits`` says whether the tensors fill the architecture that config.json names. Where they do not, the texts are
    believed only if the file bears the name that a hub gives to weights and no architecture of ours is named.
    """
    config = file.beside.get(CONFIG, {})
    named = isinstance(config.get("architecture"), str) and registered(config["architecture"]) is not None
    if fits or (hub_named(file.path) and not named):
        inner = config.get("pretrained_cfg")
        values = _input(inner if isinstance(inner, Mapping) else config)  # before timm 0.9 it was all one object
        if values:
            return values, f"{CONFIG} beside the file"
    if hub_named(file.path) and not named:
        clip = file.beside.get("open_clip_config.json", {}).get("preprocess_cfg")
        for name, given in (
            ("preprocessor_config.json", file.beside.get("preprocessor_config.json")),
            ("open_clip_config.json", clip),
        ):
            if isinstance(given, Mapping) and (values := _input(given)):
                return values, f"{name} beside the file"
    return next(_saved_input(file), ({}, ""))


def _saved_input(file: File) -> Iterator[tuple[dict[str, Any], str]]:
    """mean and std among the settings in a file or beside it: of the run itself or of what prepares its pixels."""
    for where, saved in settings(file).items():
        if where == f"{CONFIG} beside it":
            continue
        for path, inner in [("", saved), *((k, v) for k, v in saved.items() if re.search(PREPARES, k))]:
            if isinstance(inner, dict) and (values := _input(inner)):
                whose = where if where.endswith(" beside it") else f"the file's {where}"
                yield {k: values[k] for k in ("mean", "std")}, whose + (f" ({path})" if path else "")


def input_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    """mean and std where a network subtracts and divides by itself and keeps the numbers among its tensors."""
    for name, mean in tensors.items():
        std = tensors.get(f"{name.removesuffix('mean')}std")
        if re.search(r"(^|\.)(norm\w*|\w*prepro\w*|transform\w*)\.mean$", name) and std is not None:
            values = _input({"mean": mean.flatten().tolist(), "std": std.flatten().tolist()})
            if values:
                return values, f"the file's tensor {name}"
    return {}, ""


def _input(given: Mapping[str, Any]) -> dict[str, Any]:
    """timm's names and transformers'; what makes no sense is left out."""
    values: dict[str, Any] = {}
    statistics: dict[str, Any] = {
        name: next((given[k] for k in (name, f"image_{name}") if k in given), []) for name in ("mean", "std")
    }
    whole = all(_scalars(numbers) and len(numbers) == 3 for numbers in statistics.values())
    if whole and min(statistics["std"]) >= 1 < max(statistics["mean"] + statistics["std"]):  # of 0 to 255
        statistics = {name: [v / 255 for v in numbers] for name, numbers in statistics.items()}
    for name, numbers in statistics.items():
        if _scalars(numbers) and len(numbers) == 3 and all((0 if name == "mean" else 1e-6) <= v <= 1 for v in numbers):
            values[name] = tuple(map(float, numbers))
    if given.get("do_normalize") is False:
        values |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if len(values) < 2:
        return {}  # one without the other is no normalisation
    size = next((s for k in ("input_size", "crop_size", "size") if (s := _size(given.get(k)))), None)
    return values | ({"image_size": size} if size else {})


def _size(given: Any) -> tuple[int, int] | None:
    """(height, width) from [3,H,W], {"height": H, "width": W}, {"shortest_edge": S} or S."""
    if isinstance(given, Mapping):
        edge = given.get("shortest_edge")
        given = [given.get("height", edge), given.get("width", edge)]
    sides = given[-2:] if isinstance(given, list) else [given, given]
    return None if input_fault("image_size", sides) else (sides[0], sides[1])
