"""The evaluation loop: a network's exact counts on a set of images, over all processes; the reference's evaluation."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from tqdm import tqdm

from lip_resnet import distributed, memory
from lip_resnet.config import InputError
from lip_resnet.data import EvalLoader, normalize, to_device
from lip_resnet.evaluation import metrics, testsets
from lip_resnet.evaluation.classes import note_on_names
from lip_resnet.evaluation.compatibility import check_set, recorded_classes
from lip_resnet.evaluation.metrics import AccuracyCounts, cross_entropy
from lip_resnet.evaluation.nonfinite import FirstNonFinite
from lip_resnet.evaluation.predictions import PredictionLog
from lip_resnet.evaluation.protocol import EvalConfig, adapt

_DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to ``precision``; disabled for float32 and tf32."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=_DTYPES[precision] != torch.float32)


def progress_bar(images: int) -> tqdm:
    """A bar of so many evaluated images, on rank 0 where stderr is a terminal; it disappears at the end."""
    disable = None if distributed.is_main() else True  # None: tqdm asks whether it is a terminal
    return tqdm(total=images, desc="evaluation", unit=" images", leave=False, dynamic_ncols=True, disable=disable)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    *,
    precision: str,
    channels_last: bool,
    mean: Sequence[float],
    std: Sequence[float],
    predictions: PredictionLog | None = None,
    start: int = 0,
) -> dict[str, float]:
    """Top-1, top-5 (percent) and mean cross entropy over every image once; the same counts on any number of processes.

    Runs on the device of the model's parameters, with rank 0's batch norm buffers, and restores the training mode.

    Args:
        model: images (B, 3, H, W) -> logits (B, classes); not wrapped in DDP.
        precision: of the autocast forward: float32, tf32, bfloat16 or float16.
        channels_last: memory format of the images, on MPS always contiguous.
        mean, std: (3,), of pixels in [0, 1].
        predictions: collects the predictions of every image; its index in the set is the loader's less ``start``.

    Returns:
        The keys of ``AccuracyCounts.reduce``.

    Raises:
        FloatingPointError: on every process, if logits of an image are not finite; says of how many images, and names
            the first module whose output is not.
        OutOfMemory: a batch does not fit; says how many images do.
    """
    if distributed.world_size() > 1:
        distribute_bn(model, distributed.world_size(), reduce=False)
    device = next(model.parameters()).device
    pixel_mean, pixel_std = (torch.tensor(values, device=device) for values in (mean, std))
    was_training = model.training
    model.eval()
    counts, nonfinite = AccuracyCounts(device), torch.zeros(len(loader), dtype=torch.int64, device=device)

    def forward(images: Tensor) -> Tensor:
        images = normalize(to_device(images, device, channels_last), pixel_mean, pixel_std)
        with autocast(device, precision):
            return model(images).float()

    with progress_bar(loader.samples) as bar:
        for batch, (indices, (images, labels)) in enumerate(zip(loader.batches, loader, strict=True)):
            with memory.explained(functools.partial(explain_memory, forward, (images,), device)):
                logits = forward(images)
            labels = to_device(labels, device)
            nonfinite[batch] = (~logits.isfinite().all(dim=1)).sum()
            # In float64 where there is one, as logits that differ by more than float32's range have a finite loss too.
            counts.add(logits, labels, cross_entropy(logits.to(counts.sums.dtype), labels))
            if predictions is not None:
                predictions.add(range(indices.start - start, indices.stop - start), logits, labels)
            bar.update(min(len(labels) * distributed.world_size(), loader.samples - bar.n))
    result = counts.reduce()
    bad = int(distributed.all_reduce_sum(nonfinite.sum()))
    if bad:
        own = nonfinite.nonzero()[:1].flatten().tolist()
        causes = distributed.gather_objects(_first_nonfinite(model, loader, own[0], forward) if own else None)
        cause = next((cause for cause in causes if cause is not None), "nothing, when the batch was run again")
    model.train(was_training)
    if bad:
        raise FloatingPointError(
            f"the logits of {bad} of {int(result['images'])} images are not finite, in {precision}; "
            f"the first that is not finite: {cause}"
        )
    if result["images"] != loader.samples:
        raise RuntimeError(f"evaluated {result['images']} images of {loader.samples}")
    return result


def _first_nonfinite(
    model: nn.Module, loader: EvalLoader, number: int, forward: Callable[[Tensor], Tensor]
) -> str | None:
    """Run a process's batch ``number`` again: the first output that is not finite, or None."""
    batches = list(loader.batches)
    loader.batches[:] = [batches[number]]
    with FirstNonFinite(model) as first:
        for images, _ in loader:
            forward(images)
    loader.batches[:] = batches
    return first.name


def explain_memory(forward: Callable[..., Any], batch: Sequence[Any], device: torch.device) -> str:
    """The line for a batch whose forward did not fit: the largest part of it that does.

    Args:
        batch: the arguments of ``forward``, of as many images each.
    """
    used, images = memory.describe_peak(device), len(batch[0])
    count = memory.largest_that_fits(images // 2, lambda count: forward(*(each[:count] for each in batch)))
    advice = f"{count} fit: data.eval_batch_size={count} (eval.py --batch-size {count})" if count else "not even 1 fits"
    return f"out of memory on {device.type} in evaluation with {images} images a batch, {used}; {advice}"


def evaluate_set(
    model: nn.Module,
    data: testsets.EvalSet,
    loader: EvalLoader,
    config: EvalConfig,
    start: int = 0,
    predictions: PredictionLog | None = None,
) -> dict[str, Any]:
    """Evaluate a test set without TF32; each part separately, with a line printed by rank 0 where there are several.

    Args:
        loader: reads a source that holds the set's images from index ``start`` on.
        predictions: collects the predictions of every image.

    Returns:
        The keys of ``AccuracyCounts.reduce``, and for ImageNet-C those of ``corruption_errors``.

    Raises:
        FloatingPointError: see ``evaluate``.
    """
    # TF32 rounds to 10 bits: counts would not be the float32 counts.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
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
            predictions=predictions,
            start=start,
        )
        if len(data.parts) > 1 and distributed.is_main():
            print(f"{data.name} {part}: Acc@1 {result['top1']:.3f} Acc@5 {result['top5']:.3f}", flush=True)
    return results[""] if "" in results else metrics.corruption_errors(results, testsets.corruptions()[0])


def evaluate_reference(
    model: nn.Module,
    config: EvalConfig,
    data: str,
    workers: int,
    images: int | None = None,
    kind: str | None = None,
    payload: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Exact counts by the reference's protocol, on any number of processes.

    Args:
        config: ``protocol.reference_protocol``'s.
        data, kind: as for ``protocol.adapt``.
        workers: loader processes of each process.
        images: the number of images that the set must have; None for any.
        payload: the checkpoint of the weights, whose classes the set must have where it names them.

    Raises:
        InputError: the classes do not fit the network, or the number of images differs.
    """
    config, split = adapt(config, None, data, kind=kind, workers=workers)
    classes = recorded_classes(payload or {})
    val = testsets.open_set(None, config.data, split, config.model.num_classes, classes=classes)
    check_set(payload or {}, val, "the checkpoint")
    if images is not None and len(val.source) != images:
        raise InputError(f"--data {data} has {len(val.source)} images; the published counts are of {images}")
    model.to(distributed.device())
    return evaluate_set(model, val, EvalLoader(val.source, config.data), config)


def print_notes(
    configs: list[EvalConfig], sets: list[testsets.EvalSet], trained: Any, named: bool, scaled: bool
) -> None:
    """What follows from the command line and the set without being asked for, a line each on stderr.

    Args:
        trained: the recipe of the training; None where it is unknown.
        named: whether ``sets`` are test sets, and not the recipe's validation set.
        scaled: whether another size of the crop was asked for, and not of the resized image.
    """
    resizes = [config.data.eval_resize for config, data in zip(configs, sets, strict=True) if data.name != "imagenet-c"]
    if resizes and scaled:
        line = f"--size {configs[0].data.eval_size} keeps the crop's share of the image: --resize {resizes[0]}"
        print(f"note: {line}", file=sys.stderr)
    if named or configs[0].model.num_classes != len(testsets.wnids()):
        return
    note = note_on_names(sets[0].source.classes, testsets.wnids())
    if note and (trained is None or sets[0].classes):
        print(f"note: {note}", file=sys.stderr)


def print_result(data: testsets.EvalSet, result: dict[str, Any], with_name: bool) -> None:
    """Print ``* Acc@1 78.186 Acc@5 93.964``; ``with_name`` adds the set's name and a note if images are missing."""
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
