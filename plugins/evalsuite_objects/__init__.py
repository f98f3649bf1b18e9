"""Encoders of objects, and the ground-truth state that none of them can surpass."""

from evalsuite import Registry, hookimpl


@hookimpl
def evalsuite_register(registry: Registry) -> None:
    registry.backbone(
        "objects", "evalsuite_objects.zoo:build", "encoders of objects; objects:state is the ground truth"
    )
    registry.method("vae", "evalsuite_objects.vae:VAE", "rebuilds images from a noisy vector")
    registry.method(
        "mae", "evalsuite_objects.mae:MAE", "a vision transformer sees a quarter of an image, the rest is drawn"
    )
    registry.method("iodine", "evalsuite_objects.iodine:IODINE", "slots refined by the gradient of what they explain")
    registry.method("slate", "evalsuite_objects.slate_method:SlateMethod", "slots that explain a discrete VAE's words")
    registry.checkpoint("slate", "evalsuite_objects.layouts:slate", "SLATE's published files")
    registry.checkpoint("ocrl", "evalsuite_objects.layouts:ocrl", "SLATE and Slot Attention of the benchmark OCRL")
    registry.checkpoint("ocrl-encoders", "evalsuite_objects.layouts:ocrl_encoders", "OCRL's VAE, MAE and IODINE")
    registry.method(
        "slot-attention", "evalsuite_objects.discovery:SlotDiscovery", "rebuilds the image from slots, each drawn alone"
    )
    registry.method(
        "slot-set", "evalsuite_objects.setprediction:SlotSet", "supervised: predicts the objects of an image from slots"
    )
