"""PixPro: pixels of two views that lie at one place of the image agree."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.method("pixpro", "evalsuite_pixpro.method:PixPro", "pixels of two views that lie at one place agree")
