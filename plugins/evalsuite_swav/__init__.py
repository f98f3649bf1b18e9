"""SwAV: every crop predicts which prototypes the other crops of its image were assigned to."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.method("swav", "evalsuite_swav.method:SwAV", "crops predict each other's cluster assignments")
