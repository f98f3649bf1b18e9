"""OBoW: crops predict the bag of visual words that a slow copy of the network sees in the whole image."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.method("obow", "evalsuite_obow.method:OBoW", "crops predict the visual words of the whole image")
