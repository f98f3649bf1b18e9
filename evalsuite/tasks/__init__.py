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
    room = "evalsuite.tasks.classification"
    registry.task("cifar10", f"{room}:Cifar10", "CIFAR-10, heads on frozen features")
    registry.task("cifar100", f"{room}:Cifar100", "CIFAR-100, heads on frozen features")
    registry.task("imagenet", f"{room}:ImageNet", "ImageNet-1k, heads on frozen features")
    registry.task("medmnist", f"{room}:MedMnist", "a MedMNIST data set, heads on frozen features")
    registry.task("stl10", f"{room}:Stl10", "STL-10, heads on frozen features")
    registry.task("tiny-imagenet", f"{room}:TinyImageNet", "Tiny ImageNet, heads on frozen features")
    registry.task(
        "classify", f"{room}:Classify", "one class an image, your own data (--data folder:PATH, csv:PATH, npz:PATH)"
    )
    registry.task(
        "classify-multilabel",
        f"{room}:ClassifyMultilabel",
        "several labels an image, your own data (--data csv:PATH or npz:PATH)",
    )
