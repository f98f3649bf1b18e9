"""From a path to the weights it means: a file, the folder of a hub's model, or a set of shards.

What lies beside the weights (``config.json``) is read as text: of bounded size, plain JSON, and nothing it names is
imported, fetched or opened. :mod:`configs` says what is believed of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evalsuite.checkpoints import reading
from evalsuite.checkpoints.reading import BROKEN, ENDINGS, File
from evalsuite.errors import BackboneError

__all__ = ["OWN", "hub_named", "read", "title"]

OWN = "backbone.safetensors"
# the names a hub's library gives to weights, the first that is there is taken
STEMS = ("model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
NAMES = (
    OWN,
    *(f"{s}{e}" for s in STEMS for e in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")),
)
BESIDE = ("config.json", "preprocessor_config.json", "open_clip_config.json", "args.json")
YAML = ("args.yaml", "config.yaml", "hparams.yaml")  # timm's, DINOv2's and Lightning's; the last two a level up as well
# what training programs keep beside the weights under endings of checkpoints
STATES = re.compile(r"^(optim|sched|scaler|rng_|random_states|training_args|trainer_state)|optim_states\.pt$")
LARGEST_YAML = 64 << 10  # bytes; a parser of it is slow
LARGEST = 8 << 20  # bytes of such a text; the names of 21,000 classes fill one


def read(path: str | Path, *, trust: bool = False) -> File:
    """Read what ``path`` means: a checkpoint, a folder that holds one, the index or one part of a sharded one.

    A folder may be one that this suite wrote, a snapshot of a hub, or a model's folder in the Hugging Face cache
    (``models--ORG--NAME``, of which the main revision is taken). ``File.beside`` then holds ``config.json`` and its
    like, from the folder named, not from the target of a link.

    Raises :class:`BackboneError` for a folder that holds no weights or several files to choose from, for shards that
    are not whole, and for whatever :func:`reading.read` refuses.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    index = _index_of(path)
    file = reading.read(path, trust=trust) if index is None else _read_shards(index, trust)
    beside, notes = _texts(path.parent)
    return replace(file, beside=beside, notes=(*file.notes, *notes))


def hub_named(path: Path) -> bool:
    """Whether a file bears the name under which a hub keeps a model's weights, so that what lies beside it is of it."""
    return path.name in NAMES or _index_of(path) is not None


def title(path: Path) -> str:
    """What to call the weights at ``path``: the file, or the folder's name where a file is called as all are."""
    if not hub_named(path):
        return path.name
    folder = path.absolute().parent
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "-")
    return folder.resolve().name


def _weights_in(folder: Path) -> Path:
    if (folder / "snapshots").is_dir():
        return _weights_in(_revision(folder))
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
        if (folder / name).is_symlink():
            raise _without(folder, f"{name} is a link to a file that is not there: the download did not end")
    if (latest := _latest(folder)) is not None:
        return _weights_in(latest)
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if any(p.suffix == ".distcp" for p in files):
        raise BackboneError(
            f"{folder} is a checkpoint that many processes wrote",
            cause="its .distcp files hold parts of tensors",
            fix=f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth",
        )
    here = [p for p in files if p.suffix in ENDINGS and not STATES.search(p.name)]
    if len(here) == 1:
        return here[0]
    if not here:
        raise _without(
            folder, "no file in it is named as weights are: " + ", ".join((OWN, "model.safetensors", "*.pth"))
        )
    more = f" and {len(here) - 5} more" if len(here) > 5 else ""
    raise BackboneError(
        f"{folder} is a directory of {len(here)} checkpoints",
        cause=f"a checkpoint is one file; it holds {', '.join(p.name for p in here[:5])}{more}",
        fix=f"name the one to judge, for example {here[-1]}",
    )


def _latest(folder: Path) -> Path | None:
    """The step that DeepSpeed's file ``latest`` names, a folder in this one."""
    file = folder / "latest"
    if not file.is_file() or file.stat().st_size > 200:
        return None
    name = file.read_text(errors="replace").strip()
    plain = Path(name).name == name and name not in ("", ".", "..")
    return folder / name if plain and (folder / name).is_dir() else None


def _without(folder: Path, why: str) -> BackboneError:
    return BackboneError(
        f"{folder} is a directory without weights",
        cause=f"a checkpoint is one file, or the folder of one; {why}",
        fix="name the file itself, or download the model again",
    )


def _revision(folder: Path) -> Path:
    """The snapshot of a model in the Hugging Face cache: that of ``refs/main``, or the only one."""
    snapshots = sorted(p for p in (folder / "snapshots").iterdir() if p.is_dir())
    main = folder / "refs" / "main"
    revision = main.read_text(errors="replace").strip() if main.is_file() and main.stat().st_size < 200 else ""
    chosen = [p for p in snapshots if p.name == revision] or (snapshots if len(snapshots) == 1 else [])
    if chosen:
        return chosen[0]
    if not snapshots:
        raise _without(folder, "its snapshots are empty: the download did not end")
    raise BackboneError(
        f"{folder} holds {len(snapshots)} revisions",
        cause="refs/main names none of them",
        fix=f"name one, for example {snapshots[-1]}",
    )


# ------------------------------------------------------------------------------------------------------------ shards


def _index_of(path: Path) -> Path | None:
    """The index of the shards that ``path`` is, or is one of."""
    if path.name.endswith(".index.json"):
        return path
    for stem in STEMS:
        if path.match(f"{stem}-[0-9]*-of-[0-9]*{path.suffix}"):
            index = path.with_name(f"{stem}{path.suffix}.index.json")
            return index if index.is_file() else None
    return None


def _read_shards(index: Path, trust: bool) -> File:
    """All tensors of the files an index names. Its sha256 is that of the shards' own, in the order of their names."""
    content, _ = _text(index)
    table = content.get("weight_map") if content is not None else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise BackboneError(f"{index} is no index of shards", cause="it holds no weight_map of names", fix=BROKEN)
    names = sorted(set(table.values()))
    odd = [n for n in names if Path(n).name != n or n in ("", ".", "..")]
    if odd:
        raise BackboneError(
            f"{index} names a file outside of its folder",
            cause=f"a shard lies beside its index; it names {odd[0]!r}",
            fix="download the model again, or name the file of weights itself",
        )
    gone = [n for n in names if not index.with_name(n).is_file()]
    if gone:
        raise BackboneError(
            f"{index.parent} lacks {len(gone)} of {len(names)} shards",
            cause=f"the index names {', '.join(gone[:3])}, and no such file is there",
            fix="download the missing files into the same folder",
        )
    shards = {n: reading.read(index.with_name(n), trust=trust) for n in names}
    tree = {
        k: shards[n].tree[k] for k, n in table.items() if isinstance(shards[n].tree, Mapping) and k in shards[n].tree
    }
    if len(tree) < len(table):
        lacking = next(k for k in table if k not in tree)
        raise BackboneError(
            f"the shards of {index} are not whole",
            cause=f"{len(table) - len(tree)} tensors are missing, first {lacking} of {table[lacking]}",
            fix=BROKEN,
        )
    digest = hashlib.sha256("".join(f"{s.sha256}\n" for s in shards.values()).encode()).hexdigest()
    notes = tuple(dict.fromkeys(note for s in shards.values() for note in s.notes))
    trusted = any(s.trusted for s in shards.values())
    return File(index, tree, digest, {}, trusted, (f"read from {len(names)} shards", *notes))


# ------------------------------------------------------------------------------------------------- texts beside them


def _texts(folder: Path) -> tuple[dict[str, Mapping[str, Any]], tuple[str, ...]]:
    """The JSON objects beside the weights, by file name, and a note for each that is none."""
    read = {name: _text(folder / name) for name in BESIDE if (folder / name).is_file()}
    above = [folder.absolute().parent] if folder.absolute().name == "checkpoints" else []
    for name in YAML:
        if (file := next((p / name for p in (folder, *above) if (p / name).is_file()), None)) is not None:
            read[name] = _yaml(file)
    notes = (f"{name} beside it is passed over: {fault}" for name, (_, fault) in read.items() if fault)
    return {name: content for name, (content, _) in read.items() if content is not None}, tuple(notes)


def _text(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A JSON object, or None and what is wrong with it."""
    try:
        if path.stat().st_size > LARGEST:
            return None, f"it has more than {LARGEST >> 20} MiB"
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return (content, "") if isinstance(content, dict) else (None, "it is no JSON object")


def _yaml(path: Path) -> tuple[dict[str, Any] | None, str]:
    """A mapping of YAML's plain values, or None and what is wrong with it."""
    try:
        if path.stat().st_size > LARGEST_YAML:
            return None, f"it has more than {LARGEST_YAML >> 10} KiB"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return (content, "") if isinstance(content, dict) else (None, "it is no mapping")
