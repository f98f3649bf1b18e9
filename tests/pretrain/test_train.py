"""The way from names to a file: resumed to the same numbers, refused before any work, and watched."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evalsuite import DataError, PluginError, TrainingError, UsageError, hookimpl, load_backbone
from evalsuite.backbone import read_header
from evalsuite.errors import ResourceError
from evalsuite.files import is_aside
from evalsuite.hooks import Registry, load
from evalsuite.progress import Progress
from pretrain import Corpus, Images, Method, Pairs, View
from pretrain.blocks import mlp_head, nt_xent
from pretrain.data import parse
from pretrain.hooks import Recipe
from pretrain.methods.moco import MoCo
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.plugin import Training
from pretrain.testing import losses, tiny_backbone, tiny_corpus, tiny_train
from pretrain.train import Plan, Trained, compose, run
from pretrain.train import train as run_recipe

FORK = multiprocessing.get_context("fork")
TINY = {"simclr.size": "16", "simclr.width": "8", "simclr.warmup": "0"}
NAMES = {
    "arch": "small:resnet10", "arch_options": {"width": 4}, "settings": TINY, "device": "cpu", "workers": 0,
    "batch_size": 8, "log_every": 1,
}  # fmt: skip


def simclr() -> SimCLR:
    return SimCLR(SimCLR.Options(size=16, width=8, warmup=0.0))


def moco() -> MoCo:
    return MoCo(MoCo.Options(size=16, width=8, queue=32, groups=2))


@pytest.fixture(scope="module")
def methods() -> Registry:
    return load(["pretrain.methods"], environ={"EVALSUITE_PLUGINS": ""}).registry


def train(methods: Registry, out: Path, **changes: Any) -> Trained:
    return run("simclr", registry=methods, out=out, **({"data": "demo:32", "epochs": 1} | NAMES | changes))


# The whole way


def test_the_file_goes_straight_into_the_suite(methods, tmp_path):
    trained = train(methods, tmp_path, epochs=2, knn_every=1)
    loaded = load_backbone(tmp_path / "backbone.safetensors", methods)
    assert loaded.backbone.identity == trained.backbone.identity
    assert loaded.backbone.spec.image_size == (16, 16)
    assert loaded.backbone.spec.options["width"] == 4
    pixels = torch.rand(2, 3, 16, 16)
    ours, theirs = (b.eval()(pixels).pooled for b in (trained.backbone, loaded.backbone))
    assert torch.equal(ours, theirs)


def test_the_header_says_where_it_comes_from(methods, tmp_path):
    train(methods, tmp_path, seed=5)
    told = load_backbone(tmp_path / "backbone.safetensors", methods).provenance
    told = told.get("provenance", told)
    assert (told["recipe"], told["seed"], told["steps"], told["batch_size"]) == ("simclr", 5, 4, 8)
    assert told["options"]["simclr"]["temperature"] == 0.1
    assert told["data_fingerprint"] == parse("demo:32").train.fingerprint
    assert told["versions"]["torch"]
    assert (told["data"], told["arch"]) == ("demo:32", "small:resnet10")


def test_the_folder_holds_curves_and_a_line_for_each_logged_step(methods, tmp_path):
    trained = train(methods, tmp_path, epochs=2, knn_every=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == trained.log
    assert [e["step"] for e in lines if "nt_xent" in e] == list(range(1, 9))
    assert [(e["step"], e["epoch"]) for e in lines if "knn" in e] == [(4, 1), (8, 2)]
    assert all(0 <= e["knn"] <= 1 for e in lines if "knn" in e)
    assert {"nt_xent", "lr", "images_s", "wait", "spread", "effective_rank"} < set(lines[0])
    with Image.open(tmp_path / "metrics.png") as image:
        assert image.format == "PNG"
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content["step"] == 8


def test_progress_shows_the_loss_the_rate_and_the_wait(methods, tmp_path, capsys):
    train(methods, tmp_path, progress=Progress())
    told = capsys.readouterr().err
    for word in ("simclr: 0/4", "loss", "lr", "images_s", "wait", "backbone "):
        assert word in told


def test_presets_give_epochs_batch_and_options(methods):
    recipe, preset = compose("simclr", registry=methods, preset="cifar", settings={"simclr.width": "16"})
    assert (preset.epochs, preset.batch_size) == (1000, 512)
    o = recipe.method.options
    assert (o.size, o.temperature, o.lr, o.scaling, o.width) == (32, 0.5, 1.0, "linear", 16)


def written(folder: Path, side: int) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (16, side, side, 3), dtype=np.uint8)
    np.savez(folder / f"{side}.npz", image=pixels)
    return f"npz:{folder / f'{side}.npz'}"


@pytest.mark.parametrize(
    ("side", "network", "preset", "settings", "learnt"),
    [
        (16, 32, None, {}, 16),  # as large as they are
        (48, 32, None, {}, 32),  # no larger than the network's own
        (48, 224, None, {}, 48),
        (300, 256, None, {"simclr.size": "24"}, 24),  # as they are said to be
        (16, 32, "cifar", {}, 32),
    ],
)
def test_images_are_as_large_as_somebody_says_or_as_they_are(
    methods, tmp_path, side, network, preset, settings, learnt
):
    trained = train(
        methods, tmp_path / "out", data=written(tmp_path, side), preset=preset, steps=1,
        arch_options={"width": 4, "image_size": network}, settings={"simclr.width": "8", **settings},
    )  # fmt: skip
    assert trained.backbone.spec.image_size == (learnt, learnt)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["simclr"]["size"] == learnt


def test_a_method_that_says_its_own_size_keeps_it_and_small_crops_shrink_along(registry):
    swav, byol, simclr = (registry.get("method", name).Options for name in ("swav", "byol", "simclr"))
    assert (swav().sized(32).size, swav().sized(32).small) == (32, 14)
    assert byol.says_size()
    assert not simclr.says_size()


def test_training_goes_on_from_a_file(methods, tmp_path):
    first = train(methods, tmp_path / "a")
    second = train(methods, tmp_path / "b", arch=str(first.path), arch_options={}, seed=1)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["start"] == first.backbone.identity
    assert second.backbone.identity != first.backbone.identity


def test_two_steps_and_two_more_equal_four_with_any_number_of_workers(methods, tmp_path):
    assert losses(train(methods, tmp_path / "0")) == losses(train(methods, tmp_path / "2", workers=2))


def test_an_even_seed_of_the_recipe_matters(methods, tmp_path):
    assert losses(train(methods, tmp_path / "0")) != losses(train(methods, tmp_path / "1", seed=1))


# Interrupted


class Trap(Images):
    """Images that signal their own process when row ``at`` is read for the ``time``-th time."""

    def __init__(self, data: Images, number: int, after: int) -> None:
        self.data, self.number, self.left = data, number, after
        self.labels, self.fingerprint = data.labels, data.fingerprint

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return self.data[row]


def doomed(out: Path, number: int) -> None:
    """In the middle of the second epoch of three, at the third batch of four."""
    corpus = Corpus(Trap(tiny_corpus().train, number, 32 + 20))
    tiny_train(moco, steps=12, epochs=3, out=out, corpus=corpus, save_every=0.0)


def test_a_run_killed_in_mid_epoch_ends_in_the_same_bits(tmp_path):
    whole = tiny_train(moco, steps=12, epochs=3, out=tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(target=doomed, args=(tmp_path / "cut", signal.SIGKILL))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 6
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "half a li')
    resumed = tiny_train(moco, steps=12, epochs=3, out=tmp_path / "cut")
    assert losses(resumed) == losses(whole)
    assert resumed.backbone.identity == whole.backbone.identity
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_leaves_with_its_code(tmp_path, number, code):
    with pytest.raises(SystemExit) as leave:
        doomed(tmp_path / "cut", number)
    assert leave.value.code == code
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 7
    resumed = tiny_train(moco, steps=12, epochs=3, out=tmp_path / "cut")
    assert losses(resumed) == losses(tiny_train(moco, steps=12, epochs=3))


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = tiny_train(simclr, out=tmp_path)
    again = tiny_train(simclr, out=tmp_path, corpus=Corpus(Trap(tiny_corpus().train, signal.SIGKILL, 1)))
    assert again.backbone.identity == first.backbone.identity


def heard(out: Path, **plan: Any) -> str:
    stream = io.StringIO()
    recipe = Recipe(simclr())
    recipe.parts["defaults"].options = Training(size=16)
    numbers = {"epochs": 1, "batch_size": 8, "steps": 4, "device": "cpu", "workers": 0, "log_every": 1}
    run_recipe(recipe, tiny_backbone(), tiny_corpus(), Plan(out=out, **(numbers | plan)), Progress(stream=stream))
    return stream.getvalue()


def aside(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if is_aside(p)}


def test_a_state_that_is_cut_is_set_aside_with_what_belongs_to_it(tmp_path):
    first = tiny_train(simclr, out=tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in ("state.pt", "metrics.jsonl", "backbone.safetensors")}
    old["state.pt"] = old["state.pt"][:1000]
    (tmp_path / "state.pt").write_bytes(old["state.pt"])
    said = heard(tmp_path)
    assert aside(tmp_path) == {f"{name}.aside-1": content for name, content in old.items()}
    assert said.count("warning: ") == 3
    assert read_header(tmp_path / "backbone.safetensors")
    assert losses(tiny_train(simclr, out=tmp_path)) == losses(first)
    assert "warning" not in heard(tmp_path)


@pytest.mark.parametrize("content", [b'{"recipe": "sim', b"[]", b"\xff\xfe"])
def test_a_note_that_is_not_whole_is_set_aside_and_the_state_is_gone_on_from(tmp_path, content):
    first = tiny_train(simclr, out=tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    said = heard(tmp_path)
    assert said.count("warning: ") == 1
    assert aside(tmp_path) == {"run.json.aside-1": content}
    assert json.loads((tmp_path / "run.json").read_text())["recipe"] == "simclr"
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert log == first.log


def test_the_state_of_other_settings_is_set_aside_where_nothing_else_says_whose_it_is(tmp_path):
    tiny_train(simclr, out=tmp_path, seed=1)
    old = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "run.json").unlink()
    assert "was saved by a run of other settings or data" in heard(tmp_path)
    assert aside(tmp_path)["state.pt.aside-1"] == old
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_lines_that_are_none_are_told_and_kept_aside(tmp_path):
    tiny_train(simclr, out=tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('7\n{"step": 5, "half a li')
    old = (tmp_path / "metrics.jsonl").read_bytes()
    assert "has 2 lines that are none" in heard(tmp_path)
    assert aside(tmp_path) == {"metrics.jsonl.aside-1": old}
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_second_process_in_the_same_folder_is_refused_and_changes_nothing(tmp_path, methods):
    inside, go_on = FORK.Event(), FORK.Event()

    class Slow(SimCLR):
        @hookimpl
        def epoch_ended(self) -> None:
            inside.set()
            assert go_on.wait(60)

    process = FORK.Process(target=tiny_train, args=(lambda: Slow(simclr().options),), kwargs={"out": tmp_path})
    process.start()
    assert inside.wait(60)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    for second in (lambda: tiny_train(simclr, out=tmp_path, resume=False), lambda: train(methods, tmp_path)):
        with pytest.raises(ResourceError, match=f"pretraining in {tmp_path} is being done") as refusal:
            second()
        assert refusal.value.code == 7
        assert f"process {process.pid} on " in refusal.value.cause
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    go_on.set()
    process.join()
    assert process.exitcode == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert not (tmp_path / "run.lock").exists()


def test_the_next_run_says_that_one_was_killed(tmp_path):
    process = FORK.Process(target=doomed, args=(tmp_path, signal.SIGKILL))
    process.start()
    process.join()
    assert f"process {process.pid} on " in heard(tmp_path, resume=False)
    assert "killed" not in heard(tmp_path)


def test_a_killed_data_worker_is_told(tmp_path):
    corpus = Corpus(Trap(tiny_corpus().train, signal.SIGKILL, 20))
    with pytest.raises(ResourceError, match="a process that reads images was killed"):
        tiny_train(simclr, out=tmp_path, corpus=corpus, workers=1)
    assert losses(tiny_train(simclr, out=tmp_path)) == losses(tiny_train(simclr))


def test_the_folder_of_another_run_is_refused_and_replaced_only_if_told_to(tmp_path):
    tiny_train(simclr, out=tmp_path)
    with pytest.raises(UsageError, match="holds another run") as refusal:
        tiny_train(simclr, out=tmp_path, seed=1)
    assert refusal.value.cause == "not the same: seed"
    replaced = tiny_train(simclr, out=tmp_path, seed=1, resume=False)
    assert losses(replaced) == losses(tiny_train(simclr, seed=1))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    class Breaks(SimCLR):
        calls = 0

        @hookimpl
        def losses(self, pairs: list[Pairs]) -> dict[str, torch.Tensor]:
            self.calls += 1
            return {"broken": pairs[0].query.sum() * (float("nan") if self.calls == 3 else 1.0)}

    with pytest.raises(TrainingError, match="not finite at step 3 of 4") as refusal:
        tiny_train(lambda: Breaks(simclr().options), out=tmp_path, save_every=0.0)
    assert "broken nan" in refusal.value.cause
    assert refusal.value.code == 1
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content["step"] == 2
    assert all(torch.isfinite(v.float()).all() for v in content["model"].values())


def cramped(out: Path) -> None:
    """The kernel refuses what goes beyond half of the state that is there, as a full disk would."""
    half = (out / "state.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
    with pytest.raises(ResourceError, match=r"state\.pt cannot be written") as refusal:
        tiny_train(simclr, out=out)
    os._exit(refusal.value.code)


def test_a_full_disk_leaves_the_previous_state_to_go_on_from(tmp_path):
    corpus = Corpus(Trap(tiny_corpus().train, signal.SIGTERM, 10))
    with pytest.raises(SystemExit):
        tiny_train(simclr, out=tmp_path, corpus=corpus)
    process = multiprocessing.get_context("fork").Process(target=cramped, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 2
    assert losses(tiny_train(simclr, out=tmp_path)) == losses(tiny_train(simclr))


@pytest.mark.parametrize("make", [simclr, moco])
def test_a_run_of_years_is_refused_before_its_first_step(tmp_path, make):
    with pytest.raises(ResourceError, match="would take about") as refusal:
        tiny_train(make, steps=10**10, epochs=10**9, out=tmp_path)
    assert refusal.value.code == 7
    assert "--epochs" in refusal.value.fix
    assert not (tmp_path / "state.pt").exists()
    corpus = Corpus(Trap(tiny_corpus().train, signal.SIGTERM, 10))
    with pytest.raises(SystemExit):
        tiny_train(make, steps=10**10, epochs=10**9, out=tmp_path, patient=True, corpus=corpus)


# Batches


def test_accumulated_parts_are_averaged_and_heard_of_as_one_batch():
    heard = []

    class Hears(Method):
        @hookimpl
        def prepared(self, run):
            self.head = mlp_head(run.dim, 4, norm=False)

        @hookimpl
        def pairs(self, batch, features):
            return [Pairs(self.head(features[0].pooled), self.head(features[1].pooled), batch.index)]

        @hookimpl
        def losses(self, pairs):
            return {"apart": (pairs[0].query - pairs[0].key).square().mean()}

        @hookimpl
        def stepped(self, batch, pairs):
            heard.append((batch.index.tolist(), pairs[0].source.tolist(), len(batch.views[0].data)))

        @property
        def norm_groups(self):
            return 2

    def once(parts: int, groups: int) -> Trained:
        kind = type("Hears", (Hears,), {"norm_groups": groups})
        return tiny_train(kind, steps=2, accumulate=parts)

    parts, whole = once(2, 1), once(1, 1)
    assert [rows for rows, _, _ in heard[:2]] == [rows for rows, _, _ in heard[2:]]
    assert all(rows == sources and count == 8 for rows, sources, count in heard)
    assert losses(parts)[0] != losses(whole)[0]  # batch normalisation sees a part at a time


def test_gradients_are_clipped(tmp_path):
    plain, clipped = (tiny_train(simclr, steps=2, clip_gradient=c) for c in (None, 1e-9))
    assert losses(plain)[0] == losses(clipped)[0]
    assert losses(plain)[1] != losses(clipped)[1]


def test_a_recipe_clips_as_it_says_and_the_user_is_stronger():
    def run(norm, clip, **plan):
        options = SimCLR.Options(size=16, width=8, warmup=0.0, clip=clip, clip_norm=norm)
        return losses(tiny_train(lambda: SimCLR(options), steps=3, **plan))

    plain, length, largest = run("l2", None), run("l2", 1e-3), run("max", 1e-3)
    assert plain[0] == length[0] == largest[0]
    assert plain[2] != length[2] != largest[2] != plain[2]
    assert run("l2", 5.0, clip_gradient=1e-3) == length
    assert run("max", None, clip_gradient=1e-3) == largest


def test_half_precision_trains(tmp_path):
    log = losses(tiny_train(simclr, precision="bf16-mixed"))
    exact = losses(tiny_train(simclr))
    assert log != exact
    assert log[0]["nt_xent"] == pytest.approx(exact[0]["nt_xent"], rel=0.02)


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ({"batch_size": 64}, "a batch of 64 is larger than the data set"),
        ({"batch_size": 9, "accumulate": 2}, "a batch of 9 cannot be shared out"),
        ({"epochs": 0}, "one epoch at least"),
        ({"steps": 0}, "one epoch at least"),
        ({"precision": "16-mixed"}, "would not survive a resume"),
        ({"device": "tpu"}, "no training on 'tpu'"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused_before_any_work(tmp_path, plan, why):
    with pytest.raises(UsageError) as refusal:
        tiny_train(simclr, out=tmp_path / "run", **plan)
    assert why in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_a_queue_the_batch_does_not_divide_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match="a queue of 36 cannot be filled 8 keys"):
        tiny_train(lambda: MoCo(MoCo.Options(size=16, queue=36, groups=2)), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batches_that_do_not_fill_an_epoch_are_a_plugins_fault():
    class Short(SimCLR):
        @hookimpl
        def batches(self, run):
            return [torch.arange(run.batch_size)]

    with pytest.raises(PluginError, match="does not fill an epoch of 4 batches of 8"):
        tiny_train(lambda: Short(simclr().options))


def test_a_look_may_be_any_callable_and_resumes(tmp_path):
    class Odd(SimCLR):
        @hookimpl
        def views(self):
            def look(sample, rng):
                noise = torch.randn(3, 16, 16, generator=rng)
                return View((sample["image"] / 255 + 0.1 * noise).float())

            return look, look

    def odd() -> SimCLR:
        return Odd(simclr().options)

    with pytest.raises(SystemExit):
        tiny_train(odd, out=tmp_path, corpus=Corpus(Trap(tiny_corpus().train, signal.SIGTERM, 10)))
    assert losses(tiny_train(odd, out=tmp_path)) == losses(tiny_train(odd))


def test_a_method_decides_which_rows_go_together():
    seen = []

    class Ordered(SimCLR):
        @hookimpl
        def batches(self, run, data, epoch):
            return torch.arange(len(data)).roll(epoch).view(-1, run.batch_size)

        @hookimpl
        def stepped(self, batch):
            seen.append(batch.index.tolist())

    tiny_train(lambda: Ordered(simclr().options), steps=5, epochs=2)
    assert seen[0] == list(range(8))
    assert seen[4] == [31, *range(7)]


def test_an_epoch_shows_every_row_once_and_epochs_differ():
    seen: list[list[int]] = []

    class Hears(SimCLR):
        @hookimpl
        def stepped(self, batch):
            seen.append(batch.index.tolist())

    tiny_train(lambda: Hears(simclr().options), steps=8, epochs=2)
    first, second = list(chain(*seen[:4])), list(chain(*seen[4:]))
    assert sorted(first) == sorted(second) == list(range(32))
    assert first != second


# Data


def images(root: Path, bad: int) -> Path:
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(root / f"{i:02d}.png")
    for i in range(bad):
        (root / f"{3 * i:02d}.png").write_bytes(b"not an image")
    return root


def test_unreadable_images_are_skipped_with_a_count(methods, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    data = f"folder:{images(tmp_path / 'data', 2)}"
    trained = train(methods, tmp_path / "run", data=data, progress=Progress(), workers=1)
    assert trained.unreadable == (0, 3)
    assert "2 images could not be read" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_refused_if_strict(methods, tmp_path, workers):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"0[03]\.png cannot be decoded"):
        train(methods, tmp_path / "run", data=f"folder:{images(tmp_path / 'data', 2)}", strict=True, workers=workers)


class Broken(Trap):
    """Images of which row 3 cannot be read."""

    def __getitem__(self, row: int) -> Any:
        found = super().__getitem__(row)
        if row == 3:
            raise DataError("broken", cause="it is", fix="mend it")
        return found


def test_unreadable_images_are_counted_on_after_a_resume_and_told_in_the_file(tmp_path):
    data = Broken(tiny_corpus().train, signal.SIGTERM, 32 + 10)
    with pytest.raises(SystemExit):
        tiny_train(simclr, epochs=2, steps=8, out=tmp_path, corpus=Corpus(data))
    mended = tiny_train(simclr, epochs=2, steps=8, out=tmp_path)
    assert mended.unreadable == (3,)
    header = read_header(mended.path)
    assert header is not None
    assert header["provenance"]["unreadable"] == 1


def test_a_folder_of_nothing_but_broken_images_is_refused(methods, tmp_path):
    (tmp_path / "data").mkdir()
    images(tmp_path / "data", 0)
    for path in (tmp_path / "data").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(DataError, match="16 images in a row cannot be read"):
        train(methods, tmp_path / "run", data=f"folder:{tmp_path / 'data'}")


def test_held_out_images_without_labels_are_measured_but_not_classified(methods, tmp_path, monkeypatch):
    counted = hookimpl(lambda self, data: {"held_out": float(len(data))})
    monkeypatch.setattr(SimCLR, "measures", counted, raising=False)
    trained = train(methods, tmp_path, data="worlds:random-objects:32", knn_every=1)
    told = [e for e in trained.log if "epoch" in e]
    assert [(e["step"], e["held_out"]) for e in told] == [(4, 320.0)]
    assert not any("knn" in e for e in trained.log)


def test_a_method_trains_its_own_architecture_where_none_is_named(methods, tmp_path, monkeypatch):
    monkeypatch.setattr(SimCLR, "arch", "small:resnet10")
    assert train(methods, tmp_path, arch=None).backbone.spec.arch == "small:resnet10"


def test_knn_without_labels_is_refused(methods, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match="nothing to ask k-NN about"):
        train(methods, tmp_path / "run", data=f"folder:{images(tmp_path / 'data', 0)}", knn_every=1)
    with pytest.raises(UsageError, match="nothing to ask k-NN about"):  # held-out images without labels
        train(methods, tmp_path / "run", data="worlds:random-objects:32", knn_every=1)


# Names


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"settings": {"simclr.temprature": "1"}}, "simclr has no setting 'temprature'"),
        ({"settings": {"temprature": "1"}}, "simclr has no setting 'temprature'"),
        ({"settings": {"moco.queue": "1"}}, "names no part of the recipe"),
        ({"settings": {"defaults.lr": "1"}}, "simclr does not follow the defaults"),
        ({"preset": "mnist"}, "SimCLR has no preset 'mnist'"),
        ({"data": "mnist:x"}, "no dataset named"),
    ],
)
def test_names_that_do_not_fit_are_refused(methods, tmp_path, changes, why):
    with pytest.raises(UsageError, match=why):
        train(methods, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_is_refused_with_the_nearest(methods, tmp_path):
    with pytest.raises(UsageError, match="no method named 'simcrl'") as refusal:
        run("simcrl", registry=methods, out=tmp_path, data="demo", **(NAMES | {"settings": {}}))
    assert refusal.value.fix == "did you mean 'simclr'?"


def test_a_name_bound_to_something_else_is_a_plugins_fault(tmp_path):
    registry = Registry()
    registry.method("odd", "pretrain.data:Arrays")
    with pytest.raises(PluginError, match="method 'odd' is no Method"):
        compose("odd", registry=registry)


class Third(Method):
    """A stranger's method that knows nothing of optimisers, views or sizes."""

    @hookimpl
    def prepared(self, run):
        self.head = mlp_head(run.dim, 8)

    @hookimpl
    def losses(self, batch, features):
        left, right = (self.head(f.pooled) for f in features)
        return {"third": nt_xent(left, right, batch.index)}


def test_defaults_train_a_method_that_says_nothing(tmp_path):
    registry = load(["pretrain.methods"], environ={"EVALSUITE_PLUGINS": ""}).registry
    registry._bind("method", "third", f"{__name__}:Third", "")
    recipe, preset = compose("simclr", registry=registry)
    assert (preset.epochs, recipe.parts["defaults"].options.size) == (100, 224)
    trained = tiny_train(Third)
    assert len(losses(trained)) == 4


# Collapse


def test_collapse_is_told(tmp_path):
    class Constant(SimSiam):
        @hookimpl
        def pairs(self, batch, features):
            z = features[0].pooled.mean(0, keepdim=True).expand(len(batch), -1) + 1
            return [Pairs(z, z.detach(), batch.index)]

    options = SimSiam.Options(size=16, width=16, bottleneck=4)
    trained = tiny_train(lambda: Constant(options), out=tmp_path)
    assert trained.collapse.startswith("step 4: all images look alike")
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["spread"] < 0.02


@pytest.mark.parametrize("predictor", [True, False])
def test_simsiam_collapses_without_its_predictor_and_that_is_told(predictor):
    """At the learning rate it has by default with a batch of 512."""
    options = SimSiam.Options(
        size=16, width=16, bottleneck=4, predictor=predictor, lr=0.1, scaling="none", schedule="constant"
    )
    plan = {"steps": 96, "epochs": 40, "batch_size": 32, "corpus": tiny_corpus(128), "log_every": 8}
    trained = tiny_train(lambda: SimSiam(options), **plan)
    assert bool(trained.collapse) != predictor
    assert (trained.log[-1]["spread"] > 0.8) == predictor


def test_the_first_step_is_measured_whatever_the_interval():
    log = tiny_train(simclr, steps=4, log_every=4).log
    assert [e["step"] for e in log] == [1, 4]
    assert log[0]["spread"] > 0


def test_a_healthy_run_raises_no_alarm():
    assert tiny_train(simclr, steps=8, epochs=2).collapse == ""
