"""Files to batches of uint8 images, the same code for every kind of data.

``build_sources`` opens what a recipe names; ``TrainLoader`` and ``EvalLoader`` read a source in worker processes.
``prefetch``, ``to_device`` and ``normalize`` take a batch from there to the network's input. ``Source`` is the protocol
of a source.
"""

from lip_resnet.data.fingerprint import class_names, describe_source
from lip_resnet.data.loaders import EvalLoader, TrainLoader
from lip_resnet.data.prefetch import prefetch
from lip_resnet.data.sources import Source, build_sources
from lip_resnet.data.steps import Batch
from lip_resnet.data.transforms import normalize, to_device

__all__ = [
    "Batch",
    "EvalLoader",
    "Source",
    "TrainLoader",
    "build_sources",
    "class_names",
    "describe_source",
    "normalize",
    "prefetch",
    "to_device",
]
