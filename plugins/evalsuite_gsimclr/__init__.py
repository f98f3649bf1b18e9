"""G-SimCLR: batches with one image of each pseudo-class, so that negatives seldom share a meaning."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.modifier("gsimclr", "evalsuite_gsimclr.modifier:GSimCLR", "one image of each pseudo-class in a batch")
