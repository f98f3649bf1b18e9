"""RotNet: by how many quarter turns was the image rotated?"""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.method("rotnet", "evalsuite_rotnet.method:RotNet", "tells which of four turns an image was given")
    registry.backbone(
        "rotnet", "evalsuite_rotnet.method:build", "RotNet's networks: alexnet, and nin4 for small images"
    )
    registry.checkpoint("rotnet", "evalsuite_rotnet.method:layout", "RotNet's published AlexNet and Network in Network")
