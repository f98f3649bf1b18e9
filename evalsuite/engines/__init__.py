"""Who trains a dense head: the seam is in :mod:`evalsuite.protocols`."""

from evalsuite.hooks import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.engine(
        "torchvision", "evalsuite.engines.torchvision_rcnn:TorchvisionRCNN", "detection; nothing to compile"
    )
    registry.engine("detectron2", "evalsuite.engines.detectron2_rcnn:Detectron2RCNN", "detection by the real library")
