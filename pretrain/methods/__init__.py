"""The methods that others build on."""

from __future__ import annotations

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.method("simclr", "pretrain.methods.simclr:SimCLR", "two views against all others in the batch")
    registry.method("moco", "pretrain.methods.moco:MoCo", "MoCo v2: views against a queue of a slow copy's keys")
    registry.method("moco-v1", "pretrain.methods.moco:MoCo1", "MoCo as first published")
    registry.method("simsiam", "pretrain.methods.simsiam:SimSiam", "one view predicts the other, no negatives")
    registry.method("byol", "pretrain.methods.byol:BYOL", "one view predicts a slow copy's other view")
