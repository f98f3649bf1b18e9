"""AdaInf: more data from a generative model, with real data weighted up and augmentation weakened."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.modifier(
        "adainf", "evalsuite_adainf.modifier:AdaInf", "generated data, real data weighted up, weaker views"
    )
