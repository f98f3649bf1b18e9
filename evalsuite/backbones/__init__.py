"""The zoos behind one Backbone: timm, torchvision, and small networks for small images."""

from evalsuite.hooks import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.backbone("timm", "evalsuite.backbones.timm_zoo:build", "any timm architecture with feature maps")
    registry.backbone("torchvision", "evalsuite.backbones.torchvision_zoo:build", "torchvision classifiers")
    registry.backbone("small", "evalsuite.backbones.small_zoo:build", "ResNets for small images, CIFAR's among them")
