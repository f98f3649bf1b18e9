"""Several processes do what one does with the whole batch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from evalsuite_objects.discovery import SlotDiscovery
from evalsuite_objects.iodine import IODINE
from evalsuite_objects.mae import MAE
from evalsuite_objects.setprediction import SlotSet
from evalsuite_objects.slate_method import SlateMethod
from evalsuite_objects.vae import VAE
from evalsuite_objects.zoo import build
from evalsuite_obow.method import OBoW
from evalsuite_pixpro.method import PixPro
from evalsuite_rotnet.method import RotNet
from evalsuite_swav.method import SwAV

from evalsuite import Backbone, DataError, hookimpl, hooks
from evalsuite.training import processes
from evalsuite.training.fit import _Clock
from pretrain import Corpus, Images, Method, Pairs
from pretrain.blocks import gather
from pretrain.data import parse
from pretrain.hooks import Recipe
from pretrain.methods.byol import BYOL
from pretrain.methods.moco import MoCo
from pretrain.methods.simclr import SimCLR
from pretrain.methods.simsiam import SimSiam
from pretrain.testing import losses, small_backbone, small_options, tiny_backbone, tiny_corpus, tiny_train
from pretrain.train import Plan, prepare

BATCH = 64


def simclr() -> SimCLR:
    return SimCLR(SimCLR.Options(size=16, width=8, warmup=0.0))


def moco() -> MoCo:
    return MoCo(MoCo.Options(size=16, width=8, queue=128, groups=2))


def moco_without_norms() -> MoCo:
    return MoCo(MoCo.Options(size=16, width=8, queue=128, groups=1))


def simsiam() -> SimSiam:
    return SimSiam(SimSiam.Options(size=16, width=16, bottleneck=4))


def byol() -> BYOL:
    return BYOL(BYOL.Options(size=16, width=8, hidden=16))


def pixpro() -> PixPro:
    return PixPro(PixPro.Options(size=16, width=8, hidden=16, instance=1.0))


def rotnet() -> RotNet:
    return RotNet(RotNet.Options(size=16))


def swav() -> SwAV:
    """The second step has a queue."""
    crops = {"size": 16, "small": 8, "crops": (2, 2)}
    return SwAV(SwAV.Options(**crops, width=8, hidden=16, prototypes=12, queue=64, queue_start=0, frozen=0, warmup=0.0))


def obow() -> OBoW:
    crops = {"size": 16, "crop": 12, "patch": 8, "source": 16, "shift": 2, "patches": 3}
    return OBoW(OBoW.Options(**crops, words=128, margin=0, warmup=0.0))


def slate() -> SlateMethod:
    return SlateMethod(small_options(SlateMethod))


def slate_encoder() -> Backbone:
    """Without dropout, whose masks are each process's own."""
    torch.manual_seed(0)
    return build("slate", dropout=0.0, **(SlateMethod.small_arch or {}))


def vae() -> VAE:
    return VAE(small_options(VAE))


def mae() -> MAE:
    return MAE(small_options(MAE))


def iodine() -> IODINE:
    return IODINE(small_options(IODINE))


def slot_attention() -> SlotDiscovery:
    return SlotDiscovery(small_options(SlotDiscovery))


def slot_set() -> SlotSet:
    return SlotSet(small_options(SlotSet))


def own(kind: type[Method]) -> Backbone:
    return small_backbone(kind, hooks.load(environ={"EVALSUITE_PLUGINS": ""}).registry)


ENCODERS: dict[Any, Callable[[], Backbone]] = {  # of methods that have their own
    slate: slate_encoder, vae: partial(own, VAE), mae: partial(own, MAE), iodine: partial(own, IODINE),
    slot_attention: partial(own, SlotDiscovery), slot_set: partial(own, SlotSet),
}  # fmt: skip
CORPORA: dict[Any, Callable[[], Corpus]] = {slot_set: lambda: parse(f"worlds:random-objects:{2 * BATCH}")}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _enter(target: Callable[..., None], rank: int, world: int, port: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    target(*args)
    if dist.is_initialized():
        dist.destroy_process_group()


def together(target: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Run a function in so many processes, as torchrun would."""
    assert codes(target, *args, world=world) == [0] * world


def codes(target: Callable[..., None], *args: Any, world: int = 2) -> list[int | None]:
    """The exit codes of a function in so many processes."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [context.Process(target=_enter, args=(target, r, world, port, args)) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def gradients(make: Callable[[], Any], out: Path) -> dict[str, Any]:
    """Two steps of one batch of 64, in as many processes as there are: losses, gradients, buffers."""
    plan = Plan(out=out, epochs=4, batch_size=BATCH, device="cpu", workers=0, precision="64-true")
    backbone = ENCODERS.get(make, tiny_backbone)()
    corpus = CORPORA[make]() if make in CORPORA else tiny_corpus(2 * BATCH)
    state = prepare(Recipe(make()), backbone.double(), corpus, plan)
    state.objective.double()
    world = dist.get_world_size() if dist.is_initialized() else 1
    found: dict[str, Any] = {"loss": []}
    for _, draw in zip(range(2), state.draws(plan), strict=False):
        state.objective.zero_grad()
        total = torch.stack(list(state.objective(draw).values())).sum()
        total.backward()
        state.recipe.stepped(state.run, *state.objective.take())
        mean = total.detach().clone()
        for value in (mean, *(p.grad for p in state.objective.parameters() if p.grad is not None)):
            if world > 1:
                dist.all_reduce(value)
                value /= world
        found["loss"].append(mean)
    found["gradients"] = {n: p.grad for n, p in state.objective.named_parameters() if p.grad is not None}
    found["buffers"] = {n: b.clone() for n, b in state.objective.named_buffers() if "running" in n}
    if hasattr(state.recipe.method, "queue"):
        found["queue"] = state.recipe.method.queue.rows
    return found


def shared(make: Callable[[], Any], out: Path) -> None:
    dist.init_process_group("gloo")
    found = gradients(make, out)
    if dist.get_rank() == 0:
        torch.save(found, out / "found.pt")


MAKERS = (
    simclr, moco, moco_without_norms, simsiam, byol, pixpro, rotnet, swav, obow, slate, vae, mae, iodine,
    slot_attention, slot_set,
)  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_two_processes_of_32_equal_one_of_64(tmp_path, make):
    whole = gradients(make, tmp_path)
    together(shared, make, tmp_path)
    parts = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.allclose(torch.stack(parts["loss"]), torch.stack(whole["loss"]), atol=1e-9)
    assert parts["gradients"].keys() == whole["gradients"].keys()
    for name, gradient in whole["gradients"].items():
        assert torch.allclose(parts["gradients"][name], gradient, rtol=1e-5, atol=1e-9), name
    assert max(g.abs().max() for g in whole["gradients"].values()) > 1e-3
    if "queue" in whole:  # its keys lie in rank order
        theirs, ours = parts["queue"], whole["queue"]
        similarity = theirs @ ours.T
        assert torch.allclose(similarity.max(1).values, torch.ones(128, dtype=similarity.dtype), atol=1e-6)
    if make is not moco:  # grouped statistics: each process has its own, their mean is that of one process
        for name, buffer in whole["buffers"].items():
            if (
                "generators" in name and "var" in name
            ):  # of words, which all processes have: n / (n - 1) of twice as many
                continue
            assert torch.allclose(parts["buffers"][name], buffer, rtol=1e-5, atol=1e-9), name


class Stops(Images):
    """Images that end a process, as a crash would, once so many were read."""

    def __init__(self, data: Images, after: int) -> None:
        self.data, self.left = data, after
        self.labels, self.fingerprint = data.labels, data.fingerprint

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        if self.left == 0:
            os._exit(0)
        self.left -= 1
        return self.data[row]


def trained(out: Path, reads: int) -> None:
    """Eight steps of four images a process, saved after each; ended by a crash after so many reads."""
    _Clock.AGREE = 1
    corpus = Corpus(Stops(tiny_corpus(16).train, reads))
    found = tiny_train(moco, steps=8, epochs=4, devices=2, out=out, corpus=corpus, save_every=0.0)
    if dist.get_rank() == 0:
        torch.save({"identity": found.backbone.identity, "losses": losses(found)}, out / "result.pt")


def logged(make: Callable[[], Any], out: Path) -> None:
    found = tiny_train(make, steps=3, epochs=3, devices=2, out=out)
    torch.save(losses(found), out / f"log-{dist.get_rank()}.pt")


def test_the_log_tells_the_loss_of_all_processes(tmp_path):
    whole = losses(tiny_train(simsiam, steps=3, epochs=3))
    together(logged, simsiam, tmp_path)
    for rank in range(2):
        parts = torch.load(tmp_path / f"log-{rank}.pt", weights_only=True)
        assert [terms["cosine"] for terms in parts] == pytest.approx([t["cosine"] for t in whole], rel=1e-4)


def test_a_run_in_two_processes_resumes_to_the_same_numbers(tmp_path):
    """Statistics and so the evaluation differ between processes: each must find its own again."""
    together(trained, tmp_path / "whole", 1000)
    together(trained, tmp_path / "cut", 3 * 4)
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 3
    assert not (tmp_path / "cut" / "result.pt").exists()
    together(trained, tmp_path / "cut", 1000)
    whole, cut = (torch.load(tmp_path / n / "result.pt", weights_only=True) for n in ("whole", "cut"))
    assert whole == cut
    content = torch.load(tmp_path / "whole" / "state.pt", weights_only=True)
    assert len(content["apart"]) == 2
    assert not content["apart"][0]
    assert any("running_mean" in name for name in content["apart"][1])
    assert not any("queue" in name for name in content["apart"][1])


def summed(out: Path) -> None:
    dist.init_process_group("gloo")
    x = torch.full((2, 1), float(dist.get_rank() + 1), requires_grad=True)
    rows = gather(x)
    (rows * torch.arange(4.0)[:, None]).sum().backward()
    torch.save([rows.detach(), x.grad], out / f"{dist.get_rank()}.pt")


def test_gathered_rows_come_in_rank_order_with_the_gradients_of_all(tmp_path):
    together(summed, tmp_path)
    for rank in range(2):
        rows, gradient = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert rows.flatten().tolist() == [1, 1, 2, 2]
        assert gradient.flatten().tolist() == [2 * (2 * rank), 2 * (2 * rank + 1)]


def failing(out: Path, how: str) -> None:
    """The second process alone meets a loss that is not finite, or data that are refused, at its third step."""

    class Breaks(SimCLR):
        calls = 0

        @hookimpl
        def losses(self, pairs: list[Pairs]) -> dict[str, torch.Tensor]:
            self.calls += 1
            if dist.get_rank() == 1 and self.calls == 3:
                if how == "nan":
                    return {"broken": pairs[0].query.sum() * float("nan")}
                if how == "refusal":
                    raise DataError("a disk is gone", cause="it was pulled", fix="put it back")
                raise KeyError("oops")
            return {"broken": pairs[0].query.square().sum()}

    _Clock.AGREE, processes.GRACE = 1, 1.0
    try:
        tiny_train(lambda: Breaks(simclr().options), steps=4, out=out, devices=2, save_every=0.0)
    except Exception as error:
        print(f"process {dist.get_rank()}: {error!r}", file=sys.stderr, flush=True)
        os._exit(getattr(error, "code", 1))


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("nan", 1, {"process 0: TrainingError('the loss is not finite at step 3 of 4 in process 1', 'broken nan'"}),
        ("refusal", 3, {"error: process 1 has failed, and this one stops with it\ncause: a disk is gone"}),
        ("crash", 1, {"error: process 1 has failed, and this one stops with it\ncause: KeyError: 'oops'"}),
    ],
)
def test_where_one_process_fails_all_stop_and_the_last_good_state_stays(tmp_path, capfd, how, code, told):
    assert codes(failing, tmp_path, how) == [code, code]
    heard = capfd.readouterr().err
    assert all(line in heard for line in told)
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content["step"] == 2
    assert all(torch.isfinite(v.float()).all() for v in content["model"].values())


def watched(out: Path) -> None:
    trained = tiny_train(simclr, steps=3, epochs=3, devices=2, out=out, batch_size=16)
    torch.save([(e["spread"], e["effective_rank"]) for e in trained.log], out / f"{dist.get_rank()}.pt")


def test_the_signs_of_collapse_are_those_of_all_processes(tmp_path):
    whole = tiny_train(simclr, steps=3, epochs=3, batch_size=16)
    together(watched, tmp_path)
    ours = torch.tensor([(e["spread"], e["effective_rank"]) for e in whole.log])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(torch.tensor(found), ours, rtol=1e-3)


def passing_over(out: Path) -> None:
    trained = tiny_train(simclr, steps=4, epochs=1, devices=2, out=out, corpus=Corpus(Broken(tiny_corpus().train)))
    assert trained.unreadable == (3, 4, 20)


class Broken(Images):
    def __init__(self, data: Images) -> None:
        self.data, self.labels, self.fingerprint = data, data.labels, data.fingerprint

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        if row in (3, 4, 20):
            raise DataError("broken", cause="it is", fix="mend it")
        return self.data[row]


def test_unreadable_images_of_all_processes_are_counted(tmp_path):
    together(passing_over, tmp_path)
