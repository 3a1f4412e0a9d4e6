"""Object detection: torchvision's detectors on LIP-ResNets and timm's networks, trained by the engine as a task.

``models.build_detector`` builds the network, ``sources.build_sources`` opens images with boxes (``coco`` COCO's layout,
which ``annotations`` checks), ``loaders`` reads them, ``task.Detection`` is what the engine trains, and
``evaluate.evaluate`` computes COCO's AP. No wing imports this one.
"""
