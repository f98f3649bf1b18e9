"""Published weights where there is no network: an answer at once, near names, and the cache of the libraries."""

from __future__ import annotations

import socket
import time

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from evalsuite.checkpoints import hubs, load_backbone
from evalsuite.errors import BackboneError

NAME = "timm:test_resnet.r160_in1k"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No host answers, and the caches are empty."""
    monkeypatch.setattr(hubs, "reachable", lambda url: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


@pytest.mark.parametrize("name", [NAME, "timm:vit_large_patch14_dinov2.lvd142m", "torchvision:resnet50"])
def test_weights_that_are_not_here_are_refused_at_once(offline, registry, name):
    began = time.monotonic()
    with pytest.raises(BackboneError, match="does not answer") as refusal:
        load_backbone(name, registry)
    assert time.monotonic() - began < 5  # nothing was built, nothing asked again
    assert name in refusal.value.fix


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm:resnet5o", "resnet50"),
        ("random:timm:resnett50", "resnet50"),
        ("timm:resnet50.a1_in1", "resnet50.a1_in1k"),
        ("timm:resnet50.nosuch", "resnet50.a1_in1k"),
        ("torchvision:resnet5", "resnet50"),
        ("random:torchvision:alexnett", "alexnet"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_near_ones_and_no_network(monkeypatch, registry, name, near):
    monkeypatch.setattr(hubs, "reachable", lambda url: pytest.fail("it was asked for"))
    with pytest.raises(BackboneError, match=rf"did you mean .*{near}"):
        load_backbone(name, registry)


def test_what_the_cache_holds_is_loaded_without_the_network(offline, registry):
    repository = timm.get_pretrained_cfg(NAME.partition(":")[2]).hf_hub_id
    folder = offline / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    torch.manual_seed(7)
    net = timm.create_model("test_resnet")
    save_file(net.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    loaded = load_backbone(NAME, registry).backbone.net.state_dict()
    first, weight = next(iter(net.state_dict().items()))
    assert torch.equal(loaded[first], weight)
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(hubs.urllib.request, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_host_that_answers_is_reached_and_one_that_refuses_is_not(host, monkeypatch):
    assert hubs.reachable(f"{host}/weights.pth")
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
    assert not hubs.reachable(f"http://127.0.0.1:{closed}/")
    monkeypatch.setattr(hubs.urllib.request, "getproxies", lambda: {"http": host.removeprefix("http://")})
    assert hubs.reachable("http://nowhere.invalid/")  # behind a proxy, which is what has to answer


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hubs, "WAIT", 0.1)
    monkeypatch.setattr(hubs.urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", lambda *_: time.sleep(20))
    began = time.monotonic()
    assert not hubs.reachable("https://huggingface.co")
    assert time.monotonic() - began < 10
