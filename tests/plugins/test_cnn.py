"""Convolutional encoders that an agent's reward teaches."""

from __future__ import annotations

import pytest
import torch
from evalsuite_objects.zoo import build

from evalsuite.engines.sb3 import StableBaselines3
from evalsuite.progress import Progress
from evalsuite.protocols import PPOProtocol
from evalsuite.task import Setup
from evalsuite.testing import check_backbone
from evalsuite.worlds import ObjectsVector

CONVOLUTIONS = (3 * 64 + 1) * 32 + (32 * 16 + 1) * 64 + (64 * 9 + 1) * 64  # Mnih et al. 2015, of RGB
ENCODERS = {
    "cnn": (CONVOLUTIONS + 1025 * 512, (None, None, 512)),
    "cnn-map": (CONVOLUTIONS, (16, 64, 64)),
    "multi-cnn": (5 * (CONVOLUTIONS + 1025 * 512), (5, 512, 512)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_every_backbone_owes(name, registry):
    check_backbone(lambda: build(name), registry=registry)


@pytest.mark.parametrize("name", ENCODERS)
def test_sizes_are_those_of_the_benchmark(name):
    backbone = build(name).eval()
    parameters, (tokens, width, dim) = ENCODERS[name]
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    features = backbone(torch.rand(2, 3, 64, 64))
    assert features.pooled.shape == (2, dim)
    assert features.tokens is None if tokens is None else features.tokens.shape == (2, tokens, width)
    assert backbone.spec.mean == (0.0, 0.0, 0.0)


def test_tokens_of_the_map_lie_row_by_row():
    features = build("cnn-map")(torch.rand(1, 3, 64, 64))
    (found,) = features.maps.values()
    assert found.shape == (1, 64, 4, 4)
    assert torch.equal(features.tokens[0, 4 * 2 + 1], found[0, :, 2, 1])


def test_the_networks_share_nothing():
    backbone, images = build("multi-cnn").eval(), torch.rand(1, 3, 64, 64)
    before = backbone(images).tokens
    with torch.no_grad():
        for parameter in backbone.net.cnns[3].parameters():
            parameter.mul_(1.5)
    changed = (backbone(images).tokens != before).any(dim=2)[0]
    assert changed.tolist() == [False, False, False, True, False]


def test_weights_begin_as_in_a_policy():
    weight = build("cnn").net.linear[0].weight
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(512), atol=1e-4, rtol=0)


class Arena:
    def make(self, count: int, variant: str, observation: str) -> ObjectsVector:
        return ObjectsVector(count, "object-goal", variant, observation, steps=10, time_limit_is_terminal=True)


@pytest.mark.parametrize(("name", "pooling"), [("cnn", "identity"), ("cnn-map", "transformer"), ("multi-cnn", "mlp")])
def test_an_agent_trains_them_along(name, pooling, registry, tmp_path):
    protocol = PPOProtocol(
        id="tiny", version=1, steps=32, environments=2, rollout=16, batch_size=16, epochs=1, pooling=pooling,
        fine_tune=True, variant="objects-1", test_every=32, curve_episodes=1, test_episodes=1,
    )  # fmt: skip
    backbone = build(name, **({"width": 16} if name != "cnn-map" else {})).eval()
    setup = Setup(protocol=protocol, work=tmp_path, registry=registry, progress=Progress(quiet=True))
    StableBaselines3().play(backbone, protocol, Arena(), setup)
    state = torch.load(tmp_path / "agent.pt", weights_only=True)["policy"]
    for part, before in backbone.net.state_dict().items():
        after = state[f"features_extractor.trained.net.{part}"]
        assert 0 < (after - before).abs().max() < 0.05, part
