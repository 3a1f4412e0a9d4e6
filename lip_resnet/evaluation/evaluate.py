"""The evaluation loop: a network's exact counts on a set of images, over all processes."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import nn

from lip_resnet import distributed
from lip_resnet.data import EvalLoader, normalize, to_device
from lip_resnet.evaluation import metrics, testsets
from lip_resnet.evaluation.metrics import AccuracyCounts, cross_entropy
from lip_resnet.evaluation.protocol import EvalConfig

_DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward's context: autocast to ``precision``, or nothing at float32 and tf32."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=_DTYPES[precision] != torch.float32)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    *,
    precision: str,
    channels_last: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, float]:
    """Top-1, top-5 (percent) and mean cross entropy over every image once; the same counts on any number of processes.

    Runs the plain module on its parameters' device, with rank 0's BN buffers, and leaves it in the mode it was in.

    Args:
        precision: float32, tf32, bfloat16 or float16, of the autocast forward.
        channels_last: layout of the images.
        mean, std: (3,), of the pixels in [0, 1].

    Returns:
        What ``AccuracyCounts.reduce`` gives.
    """
    if distributed.world_size() > 1:
        distribute_bn(model, distributed.world_size(), reduce=False)
    device = next(model.parameters()).device
    mean, std = (torch.tensor(values, device=device) for values in (mean, std))
    was_training = model.training
    model.eval()
    counts = AccuracyCounts(device)
    for images, labels in loader:
        images = normalize(to_device(images, device, channels_last), mean, std)
        labels = labels.to(device, non_blocking=True)
        with autocast(device, precision):
            logits = model(images).float()
        counts.add(logits, labels, cross_entropy(logits, labels))
    model.train(was_training)
    result = counts.reduce()
    if result["images"] != loader.samples:
        raise RuntimeError(f"evaluated {result['images']} images of {loader.samples}")
    return result


def evaluate_set(
    model: nn.Module, data: testsets.EvalSet, loader: EvalLoader, config: EvalConfig, start: int = 0
) -> dict[str, Any]:
    """A test set's figures; each of its parts is evaluated by itself, and rank 0 prints a line for each of several.

    Args:
        loader: of a source that holds the set's images from index ``start`` on.

    Returns:
        What ``AccuracyCounts.reduce`` gives, and for ImageNet-C what ``corruption_errors`` adds.
    """
    if data.classes is not None:
        model = metrics.ClassLogits(model, data.classes)
    results = {}
    for part, images in data.parts.items():
        loader.choose(range(start + images.start, start + images.stop))
        result = results[part] = evaluate(
            model,
            loader,
            precision=config.precision,
            channels_last=config.channels_last,
            mean=config.data.mean,
            std=config.data.std,
        )
        if len(data.parts) > 1 and distributed.is_main():
            print(f"{data.name} {part}: Acc@1 {result['top1']:.3f} Acc@5 {result['top5']:.3f}", flush=True)
    return results[""] if "" in results else metrics.corruption_errors(results, testsets.corruptions()[0])


def print_result(data: testsets.EvalSet, result: dict[str, Any], with_name: bool) -> None:
    """Print a set's line, ``* Acc@1 78.186 Acc@5 93.964``; ``with_name`` adds the set and notes what is not whole."""
    line = f"* Acc@1 {result['top1']:.3f} Acc@5 {result['top5']:.3f}" + (f" {data.name}" if with_name else "")
    if "mean_error" in result:
        missing = f"no mCE: {len(data.protocol.get('lacks', ()))} folders (corruption/severity) are missing"
        line += f", mean error {result['mean_error']:.3f}, "
        line += f"mCE {result['mce']:.3f}" if "mce" in result else missing
    print(line, flush=True)
    if with_name and not data.whole:
        each = " each" if len(data.parts) > 1 else ""
        images = len(next(iter(data.parts.values())))
        released = f"{testsets.IMAGES[data.name]:,}"
        print(f"note: {images:,} images{each}; the released {data.name} has {released}{each}", file=sys.stderr)
