"""InterCLR: positives among other images of the same online pseudo-class, negatives that are semi-hard."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.modifier(
        "interclr", "evalsuite_interclr.modifier:InterCLR", "an inter-image branch beside the method's own loss"
    )
