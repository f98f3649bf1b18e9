"""Hallucinator: extra positives, imagined in feature space away from the key."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.modifier(
        "hallucinator", "evalsuite_hallucinator.modifier:Hallucinator", "extra positives imagined in feature space"
    )
