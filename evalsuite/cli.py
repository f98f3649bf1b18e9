"""The command line: parse, call one function, print. What is heavy is imported inside."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, cast

import typer

from evalsuite.errors import Refusal, UsageError, printable
from evalsuite.files import writable, writable_file
from evalsuite.progress import Progress

if TYPE_CHECKING:
    from evalsuite.data import Source
    from evalsuite.features import Entry
    from evalsuite.hooks import Loaded
    from evalsuite.results import Result

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="What a visual backbone is worth on real downstream work.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
plugins_app = typer.Typer(no_args_is_help=True, help="What plugins there are, and what is wrong with them.")
data_app = typer.Typer(no_args_is_help=True, help="Data sets: which there are, where they lie, whether they are whole.")
cache_app = typer.Typer(no_args_is_help=True, help="Encoded features: list, verify, remove.")
submit_app = typer.Typer(no_args_is_help=True, help="Results for a leaderboard: whether they can be taken.")
app.add_typer(plugins_app, name="plugins")
app.add_typer(submit_app, name="submit")
board_app = typer.Typer(no_args_is_help=True, help="A static site of ranked results, and a check against a baseline.")
app.add_typer(board_app, name="leaderboard")
app.add_typer(cache_app, name="cache")
app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def _data_root(given: Path | None) -> Path | None:
    """``~`` in a variable is expanded by no shell."""
    from evalsuite.environment import expanded

    return None if given is None else expanded(given, "--data-root or EVALSUITE_DATA")


Root = Annotated[
    Path | None,
    typer.Option(
        "--data-root", envvar="EVALSUITE_DATA", help="Where the data sets lie.", show_default=False, callback=_data_root
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Begin even what would take days on this device.")]
BackboneArgs = Annotated[
    list[str] | None,
    typer.Option("--backbone-arg", help="An option of the backbone: mean=[0.5,0.5,0.5], num_heads=12. Repeatable."),
]
Network = Annotated[
    str | None,
    typer.Option(help="Which of several networks in the file, by a part of its place: student, encoder_k."),
]
Digests = Annotated[list[str] | None, typer.Argument(help="Beginnings of digests; all where none is given.")]
_requests: list[str] = []


@app.callback()
def options(
    plugin: Annotated[
        list[str] | None,
        typer.Option("-p", "--plugin", help="Load a plugin or module besides, or leave one out: no:NAME. Repeatable."),
    ] = None,
) -> None:
    _requests[:] = plugin or []


@app.command()
def run(
    backbone: Annotated[
        list[str],
        typer.Option(
            "-b",
            "--backbone",
            help="A checkpoint file, timm:NAME, torchvision:NAME, random:ARCH, or a plugin's name.",
        ),
    ],
    task: Annotated[list[str], typer.Option("-t", "--task", help="Tasks, repeated or separated by commas.")],
    protocol: Annotated[str | None, typer.Option(help="The recipe; each task has a default one.")] = None,
    engine: Annotated[str | None, typer.Option(help="Who trains the head; each task has a default one.")] = None,
    seeds: Annotated[str, typer.Option(help="A number of seeds (0, 1, ...) or a list: 3, or 0,7, or 1234,")] = "1",
    data_root: Root = None,
    data: Annotated[
        str | None, typer.Option(help="Data of a generic task: coco:PATH, voc:PATH, folder:PATH, ...")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Use a generated world; marked, never ranked.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, 32-true, bf16-mixed, 16-mixed.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode images; default by device.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Override a field of the protocol: iterations=500. The result is marked. Repeatable.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use that many images of each split; marked, never ranked.")] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse data with unreadable images or missing labels; else those are left out and counted.",
        ),
    ] = False,
    verify_data: Annotated[
        bool,
        typer.Option("--verify-data", help="Read and digest every file of the data again, whatever is remembered."),
    ] = False,
    arch: Annotated[str | None, typer.Option(help="The architecture, where the file leaves it open.")] = None,
    network: Network = None,
    backbone_arg: BackboneArgs = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Take a checkpoint that fills less than 98 %; marked.")
    ] = False,
    trust_checkpoint: Annotated[
        bool,
        typer.Option("--trust-checkpoint", help="Unpickle code from the file. Only for files of your own; marked."),
    ] = False,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between two saves of the training state.")] = 60.0,
    yes: Yes = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of results.")] = Path("runs/evalsuite"),
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Evaluate backbones on tasks. The same command again does only what is missing."""
    progress = Progress(quiet=quiet or _silent())
    with progress.doing("loading the suite"):
        from evalsuite import runner
        from evalsuite.settings import assignments

        registry = _load().registry
        request = runner.Request(
            backbones=backbone, tasks=[t.strip() for value in task for t in value.split(",") if t.strip()],
            protocol=protocol, engine=engine,
            seeds=_seeds(seeds), data_root=data_root, data=data, demo=demo, device=device, devices=devices,
            precision=precision, workers=workers, settings=assignments(setting or [], "--set"), limit=limit, arch=arch,
            save_every=save_every, strict=strict, verify_data=verify_data, patient=yes,
            backbone_options=_options(backbone_arg, "--backbone-arg"), network=network,
            allow_partial=allow_partial, trust=trust_checkpoint, out=out, command=_command(),
            plugins=tuple(_requests),
        )  # fmt: skip
    cells = runner.execute(request, registry, progress)
    if quiet and not _silent():
        for _, result in cells:
            if result.status == "failed":
                _say(f"{_cell_name(result)}: failed\n{result.error}", err=True)
    if as_json and not _silent():
        _print_json([result.model_dump(mode="json") | {"path": str(path)} for path, result in cells])
    elif not _silent():
        _table(cells)
    failed = {result.error_code for _, result in cells if result.status == "failed"}
    if failed:
        raise typer.Exit(failed.pop() if len(failed) == 1 else 1)


@app.command()
def pretrain(
    method: Annotated[str, typer.Option("-m", "--method", help="What to learn by; see: evalsuite list method.")],
    data: Annotated[
        str, typer.Option(help="folder:PATH, csv:PATH, coco:PATH, ... (evalsuite data list), demo or worlds:TASK.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of this run.")],
    modifier: Annotated[
        list[str] | None, typer.Option("--with", help="A modifier; see: evalsuite list modifier. Repeatable.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="An architecture, or a checkpoint to go on from; by default the method's own.")
    ] = None,
    arch_option: Annotated[list[str] | None, typer.Option(help="An option of it: width=16. Repeatable.")] = None,
    preset: Annotated[str | None, typer.Option(help="A published setting of the method: imagenet, cifar.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of a part: temperature=0.2, or simclr.temperature=0.2. Repeatable."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="The preset's, where none is given.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Over all processes; the preset's by default.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts a batch is taken in.")] = 1,
    clip_gradient: Annotated[float | None, typer.Option(help="The largest norm of a gradient.")] = None,
    knn_every: Annotated[int, typer.Option(min=0, help="Epochs between two scores on held-out images (0: none).")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse data with unreadable images.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Stop after that many steps.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", " /--restart", help="Go on from a state that is there.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, 32-true, bf16-mixed, 64-true.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that decode and augment.")] = None,
    save_every: Annotated[float, typer.Option(min=0.0, help="Seconds between two saves of the training state.")] = 60.0,
    yes: Yes = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> None:
    """Train a backbone by a method and modifiers. The same command goes on where a killed run was."""
    progress = Progress(quiet=quiet or _silent())
    with progress.doing("loading the suite"):
        from evalsuite.settings import assignments
        from pretrain import train

        registry = _load().registry
    trained = train.run(
        method, modifier or [], data=data, out=out, registry=registry, arch=arch,
        arch_options=_options(arch_option, "--arch-option"), preset=preset,
        settings=assignments(setting or [], "--set"),
        epochs=epochs, batch_size=batch_size, seed=seed, progress=progress,
        accumulate=accumulate, clip_gradient=clip_gradient, knn_every=knn_every, strict=strict, steps=steps,
        resume=resume, device=device, devices=devices,
        precision=precision, workers=workers, save_every=save_every, patient=yes,
    )  # fmt: skip
    if _silent():
        return
    if trained.unreadable:
        _say(f"unreadable images passed over: {len(trained.unreadable)}")
    if trained.collapse:
        _say(f"warning: {trained.collapse}", err=True)
    _say(f"backbone: {os.path.relpath(trained.path)}")
    _say(f"identity: {trained.backbone.identity}")


@app.command("list")
def list_names(
    shelf: Annotated[
        str | None, typer.Argument(help="task, method, modifier, backbone, engine, dataset, checkpoint.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What can be named: tasks, methods, backbones, engines, data sets, and who brings them."""
    with Progress().doing("loading plugins"):
        loaded = _load()
    entries = loaded.registry.entries(shelf)
    if as_json:
        _print_json([entry._asdict() for entry in entries])
        return
    brought = {p.name: f"{p.distribution} {p.version}".strip() or p.module for p in loaded.plugins}
    _columns([(e.shelf, e.name, e.summary, brought.get(e.owner, e.owner)) for e in entries])


@plugins_app.command("list")
def plugins_list(as_json: Json = False) -> None:
    """Plugins in use, left out and broken."""
    with Progress().doing("loading plugins"):
        loaded = _load(warn=False)
    registry = loaded.registry
    found = [(p, "loaded", "") for p in loaded.plugins] + [(p, "blocked", "") for p in loaded.blocked]
    found += [(fault.plugin, "broken", fault.reason) for fault in loaded.faults]
    rows: list[dict[str, Any]] = [
        {
            **{key: getattr(plugin, key) for key in ("name", "distribution", "version", "module")},
            "registers": [f"{e.shelf} {e.name}" for e in registry.entries() if e.owner == plugin.name],
            "status": status,
            "reason": reason,
        }
        for plugin, status, reason in found
    ]
    if as_json:
        _print_json(rows)
        return
    _columns(
        [
            (
                r["name"],
                r["status"],
                f"{r['distribution']} {r['version']}".strip(),
                r["reason"] or ", ".join(r["registers"]),
            )
            for r in rows
        ]
    )


@plugins_app.command("new")
def plugins_new(
    name: Annotated[str, typer.Argument(help="Lower-case words joined by hyphens: my-method.")],
    kind: Annotated[str, typer.Option(help="method, modifier, task, backbone, checkpoint, engine.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write evalsuite-NAME into.")] = Path(),
) -> None:
    """Write a package of one plugin: a working example with its tests, CI and README. Nothing is overwritten."""
    writable(out)
    with Progress().doing("loading plugins"):
        from evalsuite import scaffold

        written = scaffold.write(name, kind, out, _load(warn=False).registry)
    _say(f"{written.path}: {', '.join(sorted(written.files))}")
    _say(f"next: pip install -e {shlex.quote(str(written.path))} && evalsuite plugins check {name}")


@plugins_app.command("check")
def plugins_check(
    name: Annotated[str, typer.Argument(help="A plugin as in plugins list, or its module: -p MODULE before.")],
    as_json: Json = False,
) -> None:
    """Hold everything a plugin registers to what its kind owes. Exit 5 with a line for each fault."""
    findings = []
    with Progress().doing(f"checking {name}"):
        from evalsuite import conformance

        for finding in conformance.check_plugin(name, _load(warn=False)):
            findings.append(finding)
            if not as_json:
                _say(str(finding))
    if as_json:
        _print_json([vars(finding) for finding in findings])
    conformance.refuse_faults(name, findings)


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """The data sets the suite can read."""
    with Progress().doing("loading plugins"):
        registry = _load().registry
    entries = registry.entries("dataset")
    if as_json:
        _print_json([entry._asdict() for entry in entries])
    else:
        _columns([(e.name, e.summary) for e in entries])


@data_app.command("where")
def data_where(name: Annotated[str | None, typer.Argument()] = None, data_root: Root = None) -> None:
    """Where a data set lies, or what tree is expected where it does not. Exit 3 if one that was named is missing.

    Of a layout for data of one's own (folder, csv, pairs, ...), or a task that takes such (classify, detect, segment):
    the tree, and what to give to evalsuite run. Of what is generated (demo, worlds), what to give.
    """
    with Progress().doing("looking for data sets"):
        from evalsuite.data import source
        from evalsuite.errors import DataError

        registry = _load().registry
        layouts = [source(registry, each) for each in registry.names("dataset")]
        yours = [layout for layout in layouts if name in layout.serves]
        if name and not yours:
            layouts = [source(registry, name)]
            yours = [layout for layout in layouts if layout.layout_only or layout.generated]
        for layout in yours:
            _say(_own(layout))
        for layout in [] if yours else layouts:
            try:
                own = f"data of your own, --data {layout.name}:PATH" if layout.layout_only else ""
                made = f"generated, --data {layout.name}:{layout.generated}" if layout.generated else ""
                _say(f"{layout.name}: {own or made or layout.locate(data_root)}")
            except DataError as missing:
                if name:
                    raise
                _say(f"{layout.name}: not found ({missing.cause})")


@data_app.command("verify")
def data_verify(
    name: Annotated[str, typer.Argument(help="A data set's name, or scheme:PATH for your own.")],
    data_root: Root = None,
    as_json: Json = False,
) -> None:
    """Decode every image, check every box, look for images that are in two splits. Exit 3 if anything is wrong."""
    from dataclasses import asdict

    from evalsuite.errors import DataError

    progress = Progress()
    with progress.doing(f"verifying {name}"):
        from evalsuite.data import parse, source

        registry = _load().registry
        if ":" in name or source(registry, name).generated:
            layout, path = parse(name, registry)
        else:
            layout = source(registry, name)
            path = layout.locate(data_root)
        report = layout.verify(path, progress=progress)
    found = asdict(report) | {"path": str(report.path)}
    if as_json:
        _print_json(found)
    else:
        _say(_nested(found))
    if report.faults:
        raise typer.Exit(DataError.code)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="What --backbone would take.")],
    arch: Annotated[str | None, typer.Option(help="The architecture, where the file leaves it open.")] = None,
    network: Network = None,
    backbone_arg: BackboneArgs = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial")] = False,
    trust_checkpoint: Annotated[bool, typer.Option("--trust-checkpoint")] = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint is: layout, architecture, what matched, parameters, FLOPs, and whether its features live.

    Exit 4 if it does not load or its features are unusable.
    """
    from evalsuite.errors import BackboneError

    with Progress().doing(f"inspecting {checkpoint}"):
        from evalsuite import checkpoints

        registry = _load().registry
        loaded = checkpoints.load_backbone(
            checkpoint, registry, arch=arch, allow_partial=allow_partial, trust=trust_checkpoint,
            network=network, options=_options(backbone_arg, "--backbone-arg"),
        )  # fmt: skip
        description = checkpoints.describe(loaded, registry)
    if as_json:
        _print_json(description)
    else:
        _say(f"{loaded.report}\n{_nested({k: v for k, v in description.items() if k not in ('report', 'provenance')})}")
    if description["sanity"]["faults"]:
        raise typer.Exit(BackboneError.code)


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="What --backbone would take.")],
    out: Annotated[Path, typer.Argument(help="The file to write; it must not be there yet.")],
    to: Annotated[str, typer.Option(help="Whose names: torchvision, timm (.safetensors), detectron2 (.pkl or .pth).")],
    arch: Annotated[str | None, typer.Option(help="The architecture, where the file leaves it open.")] = None,
    network: Network = None,
    backbone_arg: BackboneArgs = None,
    as_json: Json = False,
) -> None:
    """Write a backbone under the names of torchvision, timm or detectron2, and say what they need to be told."""
    writable_file(out, "OUT")
    with Progress().doing(f"converting {checkpoint}"):
        from evalsuite import checkpoints

        registry = _load().registry
        loaded = checkpoints.load_backbone(
            checkpoint, registry, arch=arch, network=network, options=_options(backbone_arg, "--backbone-arg")
        )
        done = checkpoints.convert(loaded.backbone, to, out, registry)
    told = {"file": str(done.path), "for": done.arch, "read_back_as": loaded.report.arch, "identity": done.identity}
    if as_json:
        _print_json(told | {"use": dict(done.use)})
    else:
        _say(_nested(told | {"use": {k: str(v) for k, v in done.use.items()}}))


@app.command()
def doctor(data_root: Root = None, as_json: Json = False) -> None:
    """What this machine has: python, torch, devices, extras, engines, data sets, plugin faults."""
    with Progress().doing("looking at this machine"):
        from evalsuite.doctor import examine

        findings = examine(_load(warn=False), data_root)
    if as_json:
        _print_json(findings)
    else:
        _say(_nested(findings))


@app.command()
def compare(
    results: Annotated[list[str], typer.Argument(help="Folders of results or result files, the baseline first.")],
    fail_if_worse: Annotated[
        list[str] | None,
        typer.Option(help="TASK:DELTA: exit 6 if one scores worse than the first by more. Repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Which backbone is better, and whether that can be told: paired tests from result files. Prints Markdown."""
    with Progress().doing("comparing results"):
        from evalsuite import compare as comparing

        limits = _limits(fail_if_worse)
        report = comparing.compare(results)
    if as_json:
        _print_json(report.to_json())
    else:
        _say(report.markdown(), nl=False)
    comparing.refuse_worse(report, limits)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A folder of results: the --out of evalsuite run.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Not report.html in that folder, but this.")] = None,
) -> None:
    """One self-contained HTML page of all results in a folder: scores, plots, pictures, and how to reproduce them."""
    if out is not None or results.is_dir():
        writable_file(out or results / "report.html")
    with Progress().doing(f"reading {results}"):
        from evalsuite.board.report import report as write

        page = write(results, out)
    _say(page)


@submit_app.command("check")
def submit_check(
    folder: Annotated[Path, typer.Argument(help="A folder with submission.json and results/.")], as_json: Json = False
) -> None:
    """Whether a submission can be taken: one line a fault, exit 8 where there is one. Nothing in it is trusted."""
    with Progress().doing(f"checking {folder}"):
        from evalsuite.board import submissions

        faults = submissions.check(folder, _load(warn=False).registry)
    if as_json:
        _print_json([vars(fault) for fault in faults])
    else:
        for fault in faults:
            _say(str(fault))
    submissions.refuse_faults(faults, folder)
    if not as_json:
        _say(f"{folder}: no fault")


Results = Annotated[list[Path], typer.Argument(help="Folders of results.")]


@board_app.command("build")
def board_build(
    results: Results,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the site goes.")] = Path("site"),
    title: Annotated[str, typer.Option(help="What the first page is called.")] = "Leaderboard",
    as_json: Json = False,
) -> None:
    """Rank results: pages, leaderboard.json, leaderboard.csv. Demo, limited and modified ones are not ranked."""
    writable(out)
    with Progress().doing("ranking results"):
        from evalsuite.board.references import published
        from evalsuite.board.site import build
        from evalsuite.board.table import collect

        board = collect(results, published())
        index = build(board, out, title)
    if as_json:
        _print_json(board.to_json())
        return
    _say(f"{len(board.contenders)} backbones, {len(board.columns)} columns: {index}")
    for line in board.unranked:
        _say(f"not ranked: {line}", err=True)


@board_app.command("serve")
def board_serve(
    site: Annotated[Path, typer.Argument(help="A site that was built.")] = Path("site"),
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8000,
) -> None:
    """Show a site in the browser of this machine, until interrupted."""
    from evalsuite.board.site import serve

    with serve(site, port) as server:
        _say(f"http://127.0.0.1:{server.server_address[1]}/")
        server.serve_forever()


@board_app.command("check")
def board_check(
    results: Results,
    baseline: Annotated[Path, typer.Option(help="Results to hold these against.")],
    fail_if_worse: Annotated[
        list[str] | None, typer.Option(help="TASK:DELTA: exit 6 if a score is lower by more. Repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare results with a baseline, for continuous integration: Markdown, and exit 6 where one is worse."""
    compare([str(baseline), *map(str, results)], fail_if_worse, as_json)


@cache_app.command("ls")
def cache_ls(as_json: Json = False) -> None:
    """Entries, the most recently used first."""
    from datetime import datetime

    with Progress().doing("reading the cache"):
        from evalsuite.features import Cache

        entries = Cache().ls()
    if as_json:
        _print_json([vars(entry) for entry in entries])
        return
    _columns(
        [
            (
                e.digest[:12], f"{e.size / 2**20:.1f} MB", f"{e.rows} x {e.width}" if e.complete else "incomplete",
                datetime.fromtimestamp(e.used).isoformat(" ", "minutes"), str(e.key.get("spec", {}).get("arch", "")),
                f"{e.key.get('output', '')} {e.key.get('split', '')}".strip(),
            )
            for e in entries
        ]
    )  # fmt: skip


@cache_app.command("verify")
def cache_verify(digests: Digests = None, as_json: Json = False) -> None:
    """Read entries again and check their hashes. Exit 3 if one is damaged."""
    progress = Progress()
    with progress.doing("reading the cache"):
        from evalsuite.errors import DataError
        from evalsuite.features import Cache

        faults = Cache().verify(digests or (), progress)
    if as_json:
        _print_json(faults)
    else:
        _columns([(digest[:12], fault) for digest, fault in faults.items()] or [("all entries are whole",)])
    if faults:
        raise typer.Exit(DataError.code)


@cache_app.command("gc")
def cache_gc(
    max_size: Annotated[str, typer.Option(help="What may stay: 10GB, 500MB, 0.")], as_json: Json = False
) -> None:
    """Remove entries, the least recently used first, until the rest fits."""
    size = _size(max_size)
    with Progress().doing("removing entries"):
        from evalsuite.features import Cache

        removed = Cache().gc(size)
    _removed(removed, as_json)


@cache_app.command("rm")
def cache_rm(
    digests: Annotated[list[str], typer.Argument(help="Beginnings of digests, as ls shows them.")],
    as_json: Json = False,
) -> None:
    """Remove entries."""
    with Progress().doing("removing entries"):
        from evalsuite.features import Cache

        removed = Cache().rm(digests)
    _removed(removed, as_json)


class _ReaderGone(BaseException):
    """Whoever read our output has left, as in ``evalsuite list | true``."""


class _Output:
    """Standard output whose broken pipe is ours to handle: click and rich would each end with code 1."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            raise _ReaderGone from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            raise _ReaderGone from None


def main() -> NoReturn:
    """The entry point: a refusal is three lines on standard error and its exit code."""
    stdout, sys.stdout = sys.stdout, cast(TextIO, _Output(sys.stdout))
    try:
        code = app(standalone_mode=False) or 0  # without standalone mode, the code of typer.Exit is returned
        sys.stdout.flush()
    except Refusal as refusal:
        _say(str(refusal), err=True)
        code = refusal.code
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except _ReaderGone:  # as other programs end there, whom SIGPIPE ends: 128 and its number
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of click's own, which is a wrong flag
            raise
        _say(str(_usage(error)), err=True)
        code = UsageError.code
    finally:
        sys.stdout = stdout
    sys.exit(code)


def _say(text: object, err: bool = False, nl: bool = True) -> None:
    """Print lines, whoever wrote the words in them."""
    typer.echo(printable(text, keep="\n\t"), err=err, nl=nl)


def _usage(error: Any) -> UsageError:
    """A wrong flag in three lines, like any other refusal."""
    context = getattr(error, "ctx", None)
    place = context.command_path if context else "evalsuite"
    return UsageError(
        error.format_message().strip(), cause=f"the request was: {_command()}", fix=f"see: {place} --help"
    )


def _load(warn: bool = True) -> Loaded:
    from evalsuite.hooks import load

    loaded = load(_requests)
    if not loaded.registry.entries():
        raise UsageError(
            "no plugin is installed, not even the suite's own",
            cause="the package's metadata are missing: a checkout that was not installed",
            fix="pip install -e .",
        )
    if warn:
        for fault in loaded.faults:
            _say(f"warning: {fault}", err=True)
    return loaded


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
        if min(numbers) < 0 or (len(numbers) == 1 and "," not in text and numbers[0] < 1):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--seeds {text} makes no sense",
            cause="it is a count or a list",
            fix="--seeds 3 for three of them, --seeds 0,7 for these two, --seeds 7, for this one",
        ) from None
    return numbers if "," in text else list(range(numbers[0]))


def _limits(items: list[str] | None) -> dict[str, float]:
    limits = {}
    for item in items or []:
        task, _, delta = item.rpartition(":")
        try:
            limits[task] = float(delta)
            if not (task and limits[task] >= 0):
                raise ValueError
        except ValueError:
            raise UsageError(
                f"--fail-if-worse {item} is no limit",
                cause="it is a task and how much less is allowed, 0 or more",
                fix="--fail-if-worse cifar10:0.01",
            ) from None
    return limits


def _size(text: str) -> int:
    """``10GB`` in bytes; a bare number is bytes."""
    number = text.strip().upper().removesuffix("B").rstrip()
    unit = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(number[-1:], 1)
    try:
        size = int(float(number if unit == 1 else number[:-1]) * unit)
        if size < 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise UsageError(
            f"--max-size {text} is no size", cause="it is a number and a unit", fix="--max-size 10GB"
        ) from None
    return size


def _removed(entries: list[Entry], as_json: bool) -> None:
    if as_json:
        _print_json([vars(entry) for entry in entries])
    else:
        _say(f"removed {len(entries)} entries, {sum(e.size for e in entries) / 2**20:.1f} MB")


def _options(items: list[str] | None, flag: str) -> dict[str, Any]:
    from evalsuite.settings import assignments, untyped

    return {key: untyped(text) for key, text in assignments(items or [], flag).items()}


def _silent() -> bool:
    """Whether this is one of several processes of a run, and not the one that speaks."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0"


def _own(layout: Source[Any]) -> str:
    """How to give data of one's own in a layout, or to name what is generated."""
    from evalsuite.docs import prose

    if layout.generated:
        path, first = f"{layout.name}:{layout.generated}", [f"{layout.name}: generated, no file is needed"]
    else:
        tree = (layout.own_tree or layout.tree).split()
        path = f"{layout.name}:PATH{'/' + tree[0] if layout.layout_only and layout.file else ''}"
        first = [f"{layout.name}: data of your own", *(f"    PATH/{line}" for line in tree)]
    flags = [f"    evalsuite run --task {task} --data {path}" for task in layout.serves]
    flags += [f"    evalsuite pretrain --method simclr --data {path}", f"    evalsuite data verify {path}"]
    return "\n".join([*first, "give it by", *flags, "", prose(type(layout)), ""])


def _command() -> str:
    return shlex.join(["evalsuite", *sys.argv[1:]])


def _print_json(value: Any) -> None:
    _say(json.dumps(value, indent=2, sort_keys=True))


def _columns(rows: list[tuple[str, ...]]) -> None:
    if not rows:
        _say("nothing")
        return
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        _say("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip())


def _nested(value: Any, indent: int = 0) -> str:
    """A nested value as indented lines for people."""
    pad = "  " * indent
    if not isinstance(value, dict):
        return f"{pad}{printable(value)}"
    lines = []
    for name, item in value.items():
        key = printable(name)
        if isinstance(item, dict) and item:
            lines += [f"{pad}{key}:", _nested(item, indent + 1)]
        elif (
            isinstance(item, (list, tuple))
            and item
            and any(isinstance(i, (dict, str)) and len(str(i)) > 20 for i in item)
        ):
            lines += [f"{pad}{key}:", *(f"{pad}  - {printable(i)}" for i in item)]
        elif isinstance(item, (list, tuple)):
            lines.append(f"{pad}{key}: {', '.join(map(printable, item)) or 'none'}")
        else:
            lines.append(f"{pad}{key}: {printable(item)}")
    return "\n".join(lines)


def _table(cells: list[tuple[Path, Result]]) -> None:
    """Scores with their intervals, and where the results lie."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for path, result in cells:
        if result.status == "failed":
            console.print(printable(f"{_cell_name(result)}: failed"), markup=False, highlight=False)
            continue
        _say(_cell_name(result))
        table = Table("metric", "score", "95 % interval")
        for name, score in result.scores.items():
            if score.value is not None:
                spread = (
                    f"[{score.low:.4f}, {score.high:.4f}]" if score.low is not None and score.high is not None else ""
                )
                mark = " *" if name == result.primary else ""
                table.add_row(printable(name) + mark, f"{score.value:.4f}", spread)
        console.print(table, markup=False)
        for warning in result.warnings:
            console.print(printable(f"note: {warning}"), markup=False, highlight=False)
        marks = _marks(result)
        if marks:
            console.print(printable(f"not for ranking: {', '.join(marks)}"), markup=False, highlight=False)
        _say(f"result: {os.path.relpath(path)}")
        for name, file in sorted(result.files.items()):
            if file.endswith(".png"):
                _say(f"picture of {name}: {os.path.relpath(path.with_name(file))}")


def _cell_name(result: Result) -> str:
    recipe = f"{result.task}@{result.protocol.id}-{result.protocol.version}"
    return f"{result.backbone.name} on {recipe}, seed {result.seed}"


def _marks(result: Result) -> list[str]:
    marks = [name for name in ("demo", "trusted", "partial") if getattr(result, name)]
    if result.limited is not None:
        marks.append(f"limited to {result.limited} images")
    if result.protocol.modified:
        marks.append(f"modified protocol ({', '.join(result.protocol.modified)})")
    return marks
