"""From what a user wrote after ``--backbone`` to a backbone whose weights are known to be loaded."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
import torchvision
from torch import nn

from evalsuite.backbone import (
    HEADER,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SPARE,
    Backbone,
    build,
    input_fault,
    outline,
    parse_header,
    published,
    rebuild,
    refuse_arch,
    restore,
)
from evalsuite.checkpoints import configs, folders, hubs, origins, reading
from evalsuite.checkpoints.cifar import SMALL
from evalsuite.checkpoints.configs import Described
from evalsuite.checkpoints.layouts import Candidate
from evalsuite.checkpoints.matching import LoadReport, Match, heads_of, match, prefixes, weights
from evalsuite.checkpoints.wrappers import flattened
from evalsuite.errors import BackboneError, PluginError, Refusal, UsageError
from evalsuite.options import NAME, OptionError
from evalsuite.seeding import seeded

if TYPE_CHECKING:
    from evalsuite.hooks import Entry, Registry

__all__ = ["Loaded", "load_backbone"]

INPUTS = ("mean", "std", "image_size")
ZOOS = ("timm", "torchvision")
OURS = "evalsuite.checkpoints."
LONGEST = 10_000  # characters of a number in a header
PART = 16  # an architecture inferred from shapes may be that many times larger than what a file has of it


@dataclass(frozen=True)
class Loaded:
    """A backbone, the report of how it was loaded, a name fit for a file, and where it comes from."""

    backbone: Backbone
    report: LoadReport
    name: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


def load_backbone(
    spec: str | Path,
    registry: Registry,
    *,
    arch: str | None = None,
    allow_partial: bool = False,
    trust: bool = False,
    options: Mapping[str, Any] | None = None,
    network: str | None = None,
    seed: int = 0,
) -> Loaded:
    """The backbone that ``spec`` names, with its weights loaded.

    ``spec`` is a path to a checkpoint of any known layout or to a directory with one (:func:`folders.read`);
    ``timm:NAME`` or ``torchvision:NAME`` for published weights; ``random:ARCH`` for fresh ones drawn from ``seed``; or
    a plugin's backbone. ``arch`` says the architecture where shapes do not show it. ``options`` are ``mean``, ``std``,
    ``image_size`` and options of the architecture's builder. ``network`` chooses among several networks of a file by a
    part of their path in it (``encoder``, ``student``). Parameters that no feature depends on (classifiers) are
    set to zero, so equal features have an equal identity.

    Raises :class:`BackboneError` for a file that is missing, broken or unsafe, and, unless ``allow_partial``, for one
    that fills less than 98 % of the parameters or holds parts the architecture lacks.
    """
    overrides = dict(options or {})
    inputs: dict[str, Any] = {k: _input(k, overrides.pop(k)) for k in INPUTS if k in overrides}
    text = str(spec)
    scheme, _, rest = text.partition(":")
    if scheme == "random" and rest:
        return _zoo(
            text,
            _seeded(_arch(rest, registry), registry, overrides, seed),
            inputs,
            "fresh weights",
            seed=seed,
        )
    if scheme in registry.names("backbone"):
        return _zoo(text, _published(text, registry, overrides, seed), inputs, "published weights")
    path = Path(spec)
    if not path.exists() and not rest and path.suffix not in reading.ENDINGS and path.name == text:
        raise _neither(text, registry)
    file = folders.read(path, trust=trust)
    if HEADER in file.header:
        return _own(file.path, file, registry, inputs, arch, overrides)
    best = _find(file, registry, arch, overrides, seed, network)
    return _finish(file, best, inputs, overrides, allow_partial, seed)


def _neither(text: str, registry: Registry) -> BackboneError:
    return BackboneError(
        f"{text!r} is neither a file nor a backbone",
        cause=f"no such file; registered schemes and names: {', '.join(registry.names('backbone')) or 'none'}",
        fix=f"published weights: timm:{text}; fresh weights: random:timm:{text}; or a path",
    )


# ------------------------------------------------------------------------------------------ backbones by name


def _seeded(arch: str, registry: Registry, options: Mapping[str, Any], seed: int) -> Backbone:
    with seeded(seed):
        return build(arch, registry, **options).eval()


def _published(text: str, registry: Registry, options: Mapping[str, Any], seed: int) -> Backbone:
    scheme = text.partition(":")[0]
    if scheme == "small":
        raise BackboneError(
            f"{text} has no published weights",
            cause="it is an architecture only",
            fix=f"fresh weights: random:{text}",
        )
    if scheme not in ZOOS:
        return _seeded(text, registry, options, seed)
    with hubs.at_once(scheme, text.partition(":")[2]):
        try:
            return published(text, registry, **options).eval()
        except Exception as error:  # hubs raise their own, urllib's and the operating system's errors
            _seeded(text, registry, options, seed)  # an unknown name or option is refused as such
            root = error.__cause__ or error
            raise BackboneError(
                f"the weights of {text} cannot be fetched",
                cause=f"{type(root).__name__}: {' '.join(str(root).split())[:200]}",
                fix=f"connect to the network, or download the file elsewhere and give its path with --arch {text}",
            ) from error


def _zoo(text: str, backbone: Backbone, inputs: Mapping[str, Any], how: str, **provenance: Any) -> Loaded:
    backbone.respec(**inputs)
    heads = heads_of(backbone)
    _blank(backbone, heads)
    if "seed" in provenance:
        backbone.drawn(provenance["seed"])
    report = LoadReport(
        source=text,
        layout=how if text.partition(":")[0] in (*ZOOS, "random") else "plugin",
        arch=backbone.spec.arch,
        options=backbone.spec.options,
        parameters=sum(p.numel() for p in weights(backbone, heads).values()),
        input=_input_report(backbone, "given" if inputs else "the architecture's own"),
        identity=backbone.identity,
    )
    return Loaded(backbone, report, _slug(text), {"source": text, **provenance})


def _own(
    path: Path,
    file: reading.File,
    registry: Registry,
    inputs: Mapping[str, Any],
    arch: str | None,
    options: Mapping[str, Any],
) -> Loaded:
    header = parse_header(file.header[HEADER], path)
    backbone = restore(path, header, file.tree, registry, options).eval()
    if arch is not None and _arch(arch, registry) != backbone.spec.arch:
        raise BackboneError(
            f"{path} is {backbone.spec.arch}, not {arch}", cause="its header says so", fix="leave --arch out"
        )
    backbone.respec(**inputs)
    report = LoadReport(
        source=str(path),
        layout="evalsuite",
        arch=backbone.spec.arch,
        options=backbone.spec.options,
        parameters=sum(p.numel() for p in weights(backbone, heads_of(backbone)).values()),
        input=_input_report(backbone, "given" if inputs else "the file's header"),
        sha256=file.sha256,
        identity=backbone.identity,
    )
    # where a file lies and what it holds is measured; the rest is its own word
    provenance = {**header["provenance"], "source": str(path), "sha256": file.sha256, "trusted": file.trusted}
    return Loaded(backbone, report, _name(path), provenance)


# --------------------------------------------------------------------------------------------- strangers' files


class Read(NamedTuple):
    """A candidate, the layout that gave it, whether that is a third party's, and what it was read from."""

    candidate: Candidate
    naming: str
    theirs: bool
    state: reading.State


@dataclass(frozen=True)
class _MatchedCandidate:
    """A candidate matched against its architecture."""

    candidate: Candidate
    naming: str
    theirs: bool
    state: reading.State
    backbone: Backbone
    heads: frozenset[str]
    match: Match
    rank: int = 0
    reason: tuple[str, ...] = ()
    rival: str = ""
    described: Described | None = None
    others: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[Any, ...]:
        """Best last: whole networks, then third parties' layouts, then the preferred path, then those described in
        words, then coverage."""
        in_words = self.described is not None
        return self.match.whole, self.theirs, self.rank, in_words, self.match.matched, -len(self.match.leftover)

    @property
    def network(self) -> tuple[str, str]:
        return self.state.container, self.candidate.prefix


class _Builder:
    """Builds each architecture once for all candidates that want it.

    ``options`` and ``named`` are what the user says of options and architecture; all else is by the word of the file,
    or of its shapes.
    """

    def __init__(
        self, registry: Registry, options: Mapping[str, Any], seed: int, file: reading.File, named: str | None = None
    ) -> None:
        self.registry, self.options, self.seed, self.named = registry, options, seed, named
        self.source = str(file.path)
        stored = sum(t.numel() for state in reading.states(file) for t in state.tensors.values())
        self.largest = PART * stored + 4 * SPARE
        self._built: dict[str, tuple[Backbone, frozenset[str]]] = {}

    def without_options(self) -> _Builder:
        """One that knows nothing of the user's options."""
        if not self.options:
            return self
        other = copy.copy(self)
        other.options, other._built = {}, {}
        return other

    def outline(self, arch: str, options: Mapping[str, Any]) -> nn.Module | None:
        """The network without room for its numbers; None for what cannot be built so."""
        try:
            return outline(arch, self.registry, options, self.options)
        except (OptionError, Refusal):
            return None

    def affords(self, arch: str) -> bool:
        """Whether a network that the file only mentions is of a size that it may have built."""
        net = self.outline(arch, {})
        return net is None or sum(p.numel() for p in net.parameters()) <= self.largest

    def __call__(self, arch: str, options: Mapping[str, Any], theirs: bool = False) -> tuple[Backbone, frozenset[str]]:
        """``theirs``: the options are computed by a plugin's layout, whose code is trusted with its own builder."""
        wanted = {**options, **self.options}
        key = f"{arch} {json.dumps(wanted, sort_keys=True, default=str)}"
        if key not in self._built:
            backbone = self._seeded(arch, options, wanted, theirs)
            self._built[key] = backbone, heads_of(backbone)
        return self._built[key]

    def _seeded(self, arch: str, options: Mapping[str, Any], wanted: Mapping[str, Any], theirs: bool) -> Backbone:
        if theirs:
            return _seeded(arch, self.registry, wanted, self.seed)
        largest = None if arch == self.named else self.largest
        with seeded(self.seed):
            return rebuild(arch, self.registry, options, self.options, largest=largest, source=self.source).eval()


def _find(
    file: reading.File,
    registry: Registry,
    arch: str | None,
    options: Mapping[str, Any],
    seed: int,
    network: str | None,
) -> _MatchedCandidate:
    """The best reading of a file. Raises BackboneError where there is none, UsageError where it has no ``network``."""
    states = reading.states(file)
    if not states:
        raise _empty(file)
    named = None if arch is None else _arch(arch, registry)
    builder = _Builder(registry, options, seed, file, named)
    read = _candidates(states, registry)
    said = arch or file.header.get("arch")
    if said is not None and named is None:
        refuse_arch(_arch(said, registry), file.path, registry)
    if said is not None:
        why = "given as --arch" if arch else f"the file's header says {said!r}"
        measured = list(_forced(states, read, _arch(said, registry), builder, why))
    else:
        measured = list(_measure(read, builder))
    notes: list[str] = []
    for words in () if said is not None else configs.described(file):
        fitting = _as_described(states, read, words, builder)
        measured += fitting
        if not fitting:
            notes.append(f"{words.by} names {words.arch}, which these tensors are not")
    hinted = file.hint("arch", "model", "model_name", "backbone")
    hinted = hinted if hinted and re.fullmatch(NAME, hinted) else None
    name = _known(hinted) if hinted and said is None and not any(m.match.whole for m in measured) else None
    if name and builder.affords(name):
        measured += _forced(states, read, name, builder, f"the file says {hinted!r}")
    if network is not None:
        measured = _of_network(measured, network, file)
    best = max(measured, key=lambda m: m.order, default=None)
    if (best is None or not best.match.whole) and (flat := next(filter(None, map(_flat, states)), None)):
        raise _joined(file, flat)
    if said is not None and (best is None or not best.match.whole):
        return _unfit(best, states, read, _arch(said, registry), builder)
    if best is None and all(not t.numel() for state in states for t in state.tensors.values()):
        raise _hollow(file)
    if best is None:
        raise _unknown(file, states, read)
    taken = f"{', '.join(best.state.wrappers)} taken off" if best.state.wrappers else ""
    chosen = f"given as --network {network}" if network is not None else ""
    reason = tuple(r for r in (chosen, *best.reason, *notes, taken) if r)
    others = list(_others(best, measured))
    return replace(
        best,
        reason=reason,
        others=tuple(map(_other, others)),
        tied=tuple(t for t, rank, _ in others if rank == best.rank),
    )


def _empty(file: reading.File) -> BackboneError:
    lone = reading.unnamed(file.tree)
    if lone:
        return BackboneError(
            f"{file.path} holds {lone} tensors in a list, without names",
            cause="only its name shows where a tensor belongs",
            fix="save the network's dict where it came from: torch.save(model.state_dict(), 'weights.pth')",
        )
    tree = file.tree
    keys = ", ".join(map(str, tree))[:120] if isinstance(tree, Mapping) else type(tree).__name__
    return BackboneError(
        f"{file.path} holds no tensors",
        cause=f"it holds {keys or 'nothing'}",
        fix="name a file with a model's weights",
    )


def _hollow(file: reading.File) -> BackboneError:
    return BackboneError(
        f"{file.path} has names and no numbers",
        cause="all its tensors are of size 0, as DeepSpeed leaves them where ZeRO shares parameters among processes",
        fix=f"python zero_to_fp32.py {file.path.parent.parent} weights: the script lies beside DeepSpeed's steps",
    )


def _flat(state: reading.State) -> str | None:
    name = flattened(state.tensors)
    return None if name is None else state.names.get(name, name)


def _joined(file: reading.File, name: str) -> BackboneError:
    return BackboneError(
        f"{file.path} is one process's part of a network under FSDP",
        cause=f"{name} is many tensors joined end to end, and nothing in the file shows where each begins",
        fix="save it whole where it was trained: FullStateDictConfig (torch), or a full checkpoint of your framework",
    )


def _of_network(measured: list[_MatchedCandidate], network: str, file: reading.File) -> list[_MatchedCandidate]:
    """Those in the network of that name: a part of the path in the file, or the whole of it."""

    def named(matched: _MatchedCandidate) -> bool:
        container, prefix = matched.network
        parts = {*re.split(r"[.\[\]]", container), *prefix.split("."), container, prefix, _title(matched)}
        return network in parts - {""}

    chosen = [matched for matched in measured if named(matched)]
    if chosen:
        return chosen
    known = sorted(
        {_title(matched) for matched in measured if matched.match.whole} or {_title(matched) for matched in measured}
    )
    raise UsageError(
        f"{file.path} has no network {network!r}",
        cause=f"it has {', '.join(known[:8]) or 'none that is known'}",
        fix=f"--network {known[0]}" if known else "leave --network out",
    )


def _title(matched: _MatchedCandidate) -> str:
    """A network's path in its file, as one word: ``teacher.backbone``."""
    container, prefix = matched.network
    return ".".join(p for p in (container, prefix.removesuffix(".")) if p) or "top-level"


def _other(other: tuple[str, int, str]) -> str:
    title, rank, why = other
    return f"{title} ({why})" if why and rank < 0 else title


def _others(best: _MatchedCandidate, measured: Iterable[_MatchedCandidate]) -> Iterator[tuple[str, int, str]]:
    """The other networks of a file that are whole too, how much they are preferred and why; no copies of the same."""
    seen = {best.network}
    for other in measured:
        if not other.match.whole or other.network in seen:
            continue
        seen.add(other.network)
        if _same(best.match.used, other.match.used):
            continue
        yield _title(other), *origins.choice(other.state, other.candidate.prefix)


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def _as_described(
    states: list[reading.State], read: Iterable[Read], words: Described, builder: _Builder
) -> list[_MatchedCandidate]:
    """Whole readings of a file as the architecture that somebody's words name."""
    largest = max(sum(t.numel() for t in state.tensors.values()) for state in states)
    net = builder.outline(words.arch, words.options)
    if net is None or sum(p.numel() for p in net.parameters()) > 1.1 * largest:
        return []
    options = dict(words.options)
    if words.pool and getattr(net, "global_pool", words.pool) != words.pool:
        options.setdefault("global_pool", words.pool)
    if options != words.options and builder.outline(words.arch, options) is None:
        return []
    why = f"{words.arch.partition(':')[2]} by the word of {words.by}"
    matched = _forced(states, read, words.arch, builder, why, options)
    return [replace(f, described=words) for f in matched if f.match.whole]


def _unfit(
    best: _MatchedCandidate | None, states: list[reading.State], read: list[Read], arch: str, builder: _Builder
) -> _MatchedCandidate:
    """A reading as an architecture that was named and does not fit, with what the file looks like."""
    rival = _rival(read, builder.without_options())
    if best is None:
        backbone, heads = builder(arch, {})
        best = _MatchedCandidate(Candidate({}, arch), "", False, states[0], backbone, heads, match(backbone, heads, {}))
    return replace(best, rival=rival)


def _candidates(states: list[reading.State], registry: Registry) -> list[Read]:
    """What every layout on the shelf makes of the dicts of tensors, third parties' first."""
    entries = sorted(registry.entries("checkpoint"), key=lambda e: e.target.startswith(OURS))
    return [read for state in states for entry in entries for read in _read_as(entry, state, registry)]


def _read_as(entry: Entry, state: reading.State, registry: Registry) -> list[Read]:
    layout, theirs = registry.get("checkpoint", entry.name), not entry.target.startswith(OURS)
    read: list[Read] = []
    try:
        for candidate in layout(state):
            read.append(Read(candidate, entry.name, theirs, state))
    except Refusal:
        raise
    except Exception as error:  # a third party's code may raise anything, and so may ours over a stranger's shapes
        if theirs:
            raise PluginError(
                f"checkpoint layout {entry.name!r} failed",
                cause=f"{entry.target} of {entry.owner}: {type(error).__name__}: {error}",
                fix=f"mend it or leave it out: -p no:{entry.owner}",
            ) from error
        note = f"names of the layout {entry.name}, but of tensors of other shapes ({type(error).__name__}: {error})"
        read.append(Read(Candidate({}, None, note=note), entry.name, theirs, state))
    return read


def _measure(read: Iterable[Read], builder: _Builder) -> Iterator[_MatchedCandidate]:
    for candidate, naming, theirs, state in read:
        if candidate.arch is None:
            continue
        extra = dict(candidate.options)
        padded = resampled = ""
        if candidate.arch.removeprefix("small:") in SMALL.values():
            by_two = origins.origin(state, candidate.prefix) == "solo-learn"  # its base.py, for CIFAR
            extra.setdefault("stem_padding", 2 if by_two else 1)
            padded = f"stem taken as padded by {extra['stem_padding']}, which shapes do not show (options stem_padding)"
        if not theirs and _plain_vit(candidate.arch) and (own := origins.positions(state, candidate.prefix)):
            extra.setdefault("positions", own)
            resampled = f"positions brought to other sizes as its own code does (option positions={own})"
        backbone, heads = builder(candidate.arch, extra, theirs)
        rank, why = origins.choice(state, candidate.prefix)
        reason = tuple(r for r in (why, candidate.note, padded, resampled) if r)
        yield _MatchedCandidate(
            candidate,
            naming,
            theirs,
            state,
            backbone,
            heads,
            match(backbone, heads, candidate.tensors),
            rank,
            reason,
        )


def _plain_vit(arch: str) -> bool:
    scheme, _, name = arch.partition(":")
    return scheme == "timm" and timm.models.is_model_in_modules(name.split(".")[0], ["vision_transformer"])


def _forced(
    states: list[reading.State],
    read: Iterable[Read],
    arch: str,
    builder: _Builder,
    why: str,
    words: Mapping[str, Any] | None = None,
) -> Iterator[_MatchedCandidate]:
    """Readings of a file as one given architecture: as layouts read it, and behind whatever prefix fits.

    ``words`` are options by somebody's word; the size of a table of positions is the tensors' own.
    """
    words = words or {}
    for candidate, naming, theirs, state in read:
        family = arch.partition("_")[0]
        shown = dict(candidate.options) if (candidate.arch or "").startswith(f"{family}_") else {}
        if candidate.arch != arch:
            shown = {k: v for k, v in shown.items() if k == "img_size"}
        open_still = {k: v for k, v in candidate.guesses.items() if k in shown and k not in words}
        given = replace(candidate, arch=arch, options={**shown, **words}, guesses=open_still)
        for matched in _measure([Read(given, naming, theirs, state)], builder):
            yield replace(matched, reason=(why, *matched.reason))
    yield from _behind_prefixes(states, arch, words, *builder(arch, words), why)


def _behind_prefixes(
    states: list[reading.State],
    arch: str,
    options: Mapping[str, Any],
    backbone: Backbone,
    heads: frozenset[str],
    why: str,
) -> Iterator[_MatchedCandidate]:
    for state in states:
        for prefix in prefixes(backbone, heads, state.tensors):
            tensors = {k[len(prefix) :]: v for k, v in state.tensors.items() if k.startswith(prefix)}
            rank, chosen = origins.choice(state, prefix)
            reason = tuple(r for r in (why, chosen) if r)
            fit = match(backbone, heads, tensors)
            yield _MatchedCandidate(
                Candidate(tensors, arch, options, prefix),
                "the architecture's",
                False,
                state,
                backbone,
                heads,
                fit,
                rank,
                reason,
            )


def _rival(read: Iterable[Read], builder: _Builder) -> str:
    """The architecture a file fits as a whole by its shapes, for the refusal of another; "" if there is none."""
    try:
        inferred = max(_measure(read, builder), key=lambda f: f.order, default=None)
    except BackboneError:
        return ""
    return inferred.backbone.spec.arch if inferred is not None and inferred.match.whole else ""


def _unknown(file: reading.File, states: list[reading.State], read: list[Read]) -> BackboneError:
    by_size = sorted(read, key=lambda r: -len(r.candidate.tensors))
    notes = [r.candidate.note for r in by_size if r.candidate.note]
    largest = max(states, key=lambda s: len(s.tensors))
    first = ", ".join(f"{k} {tuple(v.shape)}" for k, v in list(largest.tensors.items())[:3])
    cause = f"it looks like {notes[0]}" if notes else f"no layout knows its {len(largest.tensors)} tensors: {first}"
    return BackboneError(
        f"the architecture of {file.path} cannot be inferred from its tensors",
        cause=cause,
        fix="name it with --arch SCHEME:NAME, or add a layout (docs/hooks.md, shelf checkpoint)",
    )


def _finish(
    file: reading.File,
    best: _MatchedCandidate,
    inputs: Mapping[str, Any],
    overrides: Mapping[str, Any],
    allow_partial: bool,
    seed: int,
) -> Loaded:
    """Refuse, or load the weights and report how."""
    fit, backbone = best.match, best.backbone
    if not fit.whole and not allow_partial:
        raise _refusal(file, best)
    if not fit.used:
        raise _refusal(file, best)
    every = backbone.net.state_dict()
    backbone.net.load_state_dict({k: v.to(every[k].dtype) for k, v in fit.used.items()}, strict=False)
    _blank(backbone, best.heads)
    if fit.missing:
        backbone.drawn(seed, file.sha256)
    values, said_by = _normalisation(file, best, inputs)
    backbone.respec(**values)
    candidate = best.candidate
    sources = (candidate.sources.get(k, k) for k in fit.used)
    used = {name for source in sources for name in ((source,) if isinstance(source, str) else source)}
    inside = {k[len(candidate.prefix) :] if k.startswith(candidate.prefix) else k: k for k in best.state.tensors}
    report = LoadReport(
        source=str(file.path),
        layout=best.naming if best.theirs else origins.origin(best.state, candidate.prefix),
        arch=backbone.spec.arch,
        options=backbone.spec.options,
        container=best.state.container,
        prefix=candidate.prefix,
        naming=best.naming,
        matched=fit.matched,
        buffers=fit.buffers,
        parameters=fit.parameters,
        missing=fit.missing,
        unexpected=tuple(best.state.names.get(full, full) for name, full in inside.items() if name not in used),
        leftover=fit.leftover,
        mismatched=fit.mismatched,
        input=_input_report(backbone, said_by),
        reason=(*best.reason, *file.notes),
        others=best.others,
        guesses=tuple(_guesses(best, overrides)),
        sha256=file.sha256,
        trusted=file.trusted,
        identity=backbone.identity,
    )
    provenance = {
        "source": str(file.path),
        "sha256": file.sha256,
        "layout": report.layout,
        "trusted": file.trusted,
    }
    return Loaded(backbone, report, _name(file.path), provenance)


def _guesses(best: _MatchedCandidate, overrides: Mapping[str, Any]) -> Iterator[str]:
    """What features depend on and nothing says, and how to say it."""
    for option, (value, why) in best.candidate.guesses.items():
        if option not in overrides:
            yield (
                f"{option}={value} is a guess ({why}), which no tensor shows and nothing says; "
                f"if it is another: --backbone-arg {option}=..."
            )
    if best.tied:
        yield (
            f"the network {_title(best)} is a guess, the first of those that fit; "
            f"for another: --network {' or --network '.join(best.tied)}"
        )


def _refusal(file: reading.File, best: _MatchedCandidate) -> BackboneError:
    fit, arch = best.match, best.backbone.spec.arch
    whole = [k for k, given, wanted in fit.mismatched if given == wanted]
    if whole:
        kind = str(best.candidate.tensors[whole[0]].dtype).removeprefix("torch.")
        return BackboneError(
            f"{file.path} holds quantised weights",
            cause=f"{len(whole)} are {kind}, first {whole[0]}; backbones are of floating point",
            fix="save the network before it is quantised, or its dequantised weights",
        )
    wrong = []
    if fit.mismatched:
        name, given, wanted = fit.mismatched[0]
        wrong.append(f"{len(fit.mismatched)} of another shape, first {name}: {given} in the file, {wanted} wanted")
    if fit.missing:
        wrong.append(f"{len(fit.missing)} missing, first {fit.missing[0]}")
    if fit.leftover:
        wrong.append(f"{len(fit.leftover)} inside the network that it does not know, first {fit.leftover[0]}")
    looks = f"; the file looks like {best.rival}" if best.rival else ""
    short = f"{fit.matched:.1%} of parameters matched (needs 98%)"
    if fit.matched >= 0.98:
        short = f"{fit.matched:.1%} of parameters matched, but it is another network"
    if fit.buffers < 0.98 <= fit.matched:
        short = f"{fit.buffers:.1%} of running statistics matched (needs 98%)"
    fix = f"--arch {best.rival}, or leave --arch out" if best.rival else "name the right one with --arch SCHEME:NAME"
    return BackboneError(
        f"{file.path} as {arch}: {short}",
        cause="; ".join(wrong) + looks,
        fix=f"{fix}; to load it anyway: --allow-partial",
    )


def _blank(backbone: Backbone, heads: frozenset[str]) -> None:
    """Zero what no feature depends on: a file without it and one with it then give the same tensors."""
    with torch.no_grad():
        for name, parameter in backbone.net.named_parameters():
            if name in heads:
                parameter.zero_()


# ------------------------------------------------------------------------------------------- names and numbers


def _known(name: str) -> str | None:
    """``scheme:name`` of an architecture that torchvision or timm has under that bare name."""
    if name in torchvision.models.list_models(torchvision.models):
        return f"torchvision:{name}"
    return f"timm:{name}" if timm.is_model(name) else None


def _arch(text: str, registry: Registry) -> str:
    """What a person wrote for an architecture as ``scheme:name``: a blank for the colon or no scheme will do."""
    text = re.sub(r"^(\w+) (\S+)$", r"\1:\2", text.strip())
    if ":" in text or text in registry.names("backbone"):
        return text
    return _known(text) or text


def _normalisation(
    file: reading.File, best: _MatchedCandidate, inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """mean, std and image size, and whose word it is: the user's, the layout's, the header's, or the custom."""
    spec, candidate = best.backbone.spec, best.candidate
    scheme, _, name = spec.arch.partition(":")
    values: dict[str, Any] = {"mean": spec.mean, "std": spec.std, "image_size": spec.image_size}
    said_by = "the architecture's own"
    if scheme in (*ZOOS, "small") and "." not in name:
        values |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        said_by = "ImageNet's, as nothing says otherwise"
    written, where = configs.input_of(best.state.tensors)
    if not written:
        written, where = configs.described_input(file, best.described is not None)
    if hasattr(best.backbone.net, "patch_embed") or scheme == "small":
        written.pop("image_size", None)  # a table of positions is of one size, and small networks are of small images
    whose = {"mean": said_by, "std": said_by, "image_size": "the architecture's own"}
    for overrides, who in (
        (written, where),
        (_noted(file.header), "the file's header"),
        (_of_layout(candidate), "the layout"),
        (inputs, "given"),
    ):
        values |= overrides
        whose |= dict.fromkeys(overrides, who)
    return values, _whose(whose)


def _whose(whose: Mapping[str, str]) -> str:
    """By whose word pixels are normalised; by whose word the size is, where mean or std are by somebody's too."""
    if whose["mean"] == whose["std"]:
        same = whose["mean"]
        return (
            same
            if whose["image_size"] in (same, "the architecture's own")
            else f"{same}; image_size: {whose['image_size']}"
        )
    return "; ".join(f"{name}: {who}" for name, who in whose.items())


def _of_layout(candidate: Candidate) -> dict[str, Any]:
    values = {"mean": candidate.mean, "std": candidate.std, "image_size": candidate.image_size}
    return {k: v for k, v in values.items() if v is not None}


def _noted(header: Mapping[str, str]) -> dict[str, Any]:
    """mean, std and image_size from a safetensors header: JSON under these names, or a note in words.

    A note reads like ``RGB in [0,1], mean (123/255, 117/255, 104/255), std (1/255, 1/255, 1/255), 227x227``.
    """
    values = {k: _input(k, _json(header[k])) for k in INPUTS if k in header}
    for note in header.values():
        if not re.search(r"RGB in \[0, ?1\]", note):
            continue
        for name in ("mean", "std"):
            if name not in values and (numbers := re.search(rf"{name} \(([\d./, ]{{1,200}})\)", note)):
                values[name] = _input(name, [_fraction(part) for part in numbers[1].split(",")])
        if "image_size" not in values and (size := re.search(r"\b(\d{1,6})x(\d{1,6})\b", note)):
            values["image_size"] = _input("image_size", [int(size[1]), int(size[2])])
    return values


def _json(text: str) -> Any:
    """A value of JSON; what is none is left as text, which is no number."""
    try:
        return json.loads(text[:LONGEST])
    except (ValueError, RecursionError):
        return text


def _fraction(text: str) -> Any:
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError, OverflowError):
        return text


def _input(name: str, value: Any) -> tuple[Any, ...]:
    """mean or std as three numbers, image_size as (height, width), of a user's or a file's word."""
    values = value if isinstance(value, list | tuple) else (value,) * (2 if name == "image_size" else 3)
    if fault := input_fault(name, values):
        text = str(value)
        raise BackboneError(
            f"{name} {text if len(text) <= 80 else text[:77] + '...'} makes no sense",
            cause=f"{fault}; mean and std are of RGB in [0,1], image_size is height and width in pixels",
            fix="for example mean=[0.485,0.456,0.406] or image_size=224",
        )
    return tuple((int if name == "image_size" else float)(v) for v in values)


def _input_report(backbone: Backbone, said_by: str) -> dict[str, Any]:
    spec = backbone.spec
    numbers = {"mean": [round(v, 6) for v in spec.mean], "std": [round(v, 6) for v in spec.std]}
    return {**numbers, "image_size": list(spec.image_size), "source": said_by}


def _name(path: Path) -> str:
    """A file's name without its endings; the directory's for a name that all files bear."""
    stem = folders.title(path)
    while Path(stem).suffix in reading.ENDINGS:
        stem = Path(stem).stem
    return _slug(stem)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "backbone"
