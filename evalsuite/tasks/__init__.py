"""One evaluator family a file."""

from evalsuite.hooks import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.task("voc", "evalsuite.tasks.detection:Voc", "PASCAL VOC detection")
    registry.task("coco", "evalsuite.tasks.detection:Coco", "COCO detection and instance segmentation")
    registry.task(
        "detect",
        "evalsuite.tasks.detection:Detect",
        "detection on your own data (--data voc:PATH or coco:PATH)",
    )
