"""Encoders of objects, and the ground-truth state that none of them can surpass."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.backbone(
        "objects", "evalsuite_objects.zoo:build", "encoders of objects; objects:state is the ground truth"
    )
