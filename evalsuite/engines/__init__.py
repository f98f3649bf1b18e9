"""Who trains a dense head or an agent: the seams are in :mod:`evalsuite.protocols`."""

from evalsuite.hooks import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.engine(
        "torchvision", "evalsuite.engines.torchvision_rcnn:TorchvisionRCNN", "detection; nothing to compile"
    )
    registry.engine("detectron2", "evalsuite.engines.detectron2_rcnn:Detectron2RCNN", "detection by the real library")
    registry.engine("native", "evalsuite.engines.native:Native", "segmentation; nothing to compile")
    registry.engine("mmseg", "evalsuite.engines.mmseg:Mmseg", "segmentation by the real mmsegmentation")
    registry.engine("sb3", "evalsuite.engines.sb3:StableBaselines3", "agents by stable-baselines3's PPO")
