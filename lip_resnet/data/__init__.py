"""Files to batches of uint8 images: the same code for ImageNet folders, the embedded digits and synthetic noise."""

from lip_resnet.data.fingerprint import describe_source
from lip_resnet.data.loaders import Batch, EvalLoader, TrainLoader
from lip_resnet.data.prefetch import prefetch
from lip_resnet.data.sources import build_sources
from lip_resnet.data.transforms import normalize, to_device

__all__ = [
    "Batch",
    "EvalLoader",
    "TrainLoader",
    "build_sources",
    "describe_source",
    "normalize",
    "prefetch",
    "to_device",
]
