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
    room = "evalsuite.tasks.segmentation"
    registry.task("cityscapes", f"{room}:Cityscapes", "Cityscapes semantic segmentation")
    registry.task("voc-seg", f"{room}:VocSegmentation", "PASCAL VOC 2012 semantic segmentation")
    registry.task("ade20k", f"{room}:Ade20k", "ADE20K semantic segmentation, 150 classes")
    registry.task("camvid", f"{room}:CamVid", "CamVid semantic segmentation")
    registry.task("segment", f"{room}:Segment", "semantic segmentation of your own data (--data pairs:PATH)")
    room = "evalsuite.tasks.objects"
    registry.task("object-goal", f"{room}:ObjectGoal", "an agent goes to one object of four")
    registry.task("object-interaction", f"{room}:ObjectInteraction", "an agent pushes one object of three to a place")
    registry.task("object-comparison", f"{room}:ObjectComparison", "an agent finds the one object that differs")
    registry.task(
        "property-comparison", f"{room}:PropertyComparison", "an agent finds the one object with a property of its own"
    )
    registry.task("object-reaching", f"{room}:ObjectReaching", "a robot's finger touches one cube of four")
    registry.task("ocrl", f"{room}:ObjectCentric", "the object-centric benchmark: all five tasks, several agents each")
    registry.task(
        "object-discovery", "evalsuite.tasks.discovery:ObjectDiscovery", "whose pixels are whose, and what objects are"
    )
    room = "evalsuite.tasks.classification"
    registry.task("cifar10", f"{room}:Cifar10", "CIFAR-10, heads on frozen features")
    registry.task("cifar100", f"{room}:Cifar100", "CIFAR-100, heads on frozen features")
    registry.task("imagenet", f"{room}:ImageNet", "ImageNet-1k, heads on frozen features")
    registry.task("medmnist", f"{room}:MedMnist", "a MedMNIST data set, heads on frozen features")
    registry.task("places", f"{room}:Places205", "Places205, heads on frozen features")
    registry.task("places365", f"{room}:Places365", "Places365-Standard, heads on frozen features")
    registry.task("stl10", f"{room}:Stl10", "STL-10, heads on frozen features")
    registry.task("tiny-imagenet", f"{room}:TinyImageNet", "Tiny ImageNet, heads on frozen features")
    registry.task("voc07-cls", f"{room}:Voc07Classification", "PASCAL VOC 2007 classification, one SVM a class")
    medical = "evalsuite.tasks.medical"
    registry.task("chexpert", f"{medical}:Chexpert", "CheXpert, five findings of frontal radiographs")
    registry.task("covidx", f"{medical}:Covidx", "COVIDx 9A: normal, pneumonia, COVID-19")
    registry.task("mura", f"{medical}:Mura", "MURA, abnormal studies of upper limbs")
    registry.task("rsna", f"{medical}:Rsna", "RSNA pneumonia or not, from DICOM files")
    registry.task(
        "chexpert-retrieval",
        "evalsuite.tasks.retrieval:ChexpertRetrieval",
        "CheXpert 8x200: radiographs of a finding, asked for by image or by sentence",
    )
    registry.task(
        "classify", f"{room}:Classify", "one class an image, your own data (--data folder:PATH, csv:PATH, npz:PATH)"
    )
    registry.task(
        "classify-multilabel",
        f"{room}:ClassifyMultilabel",
        "several labels an image, your own data (--data csv:PATH or npz:PATH)",
    )
