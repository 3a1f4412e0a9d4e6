"""Do importance maps mean anything? Deletion of the most important cells first, and localisation in objects' boxes.

Both compare the importance with Grad-CAM (where captum is installed) and with the strength of edges.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lip_resnet import seeding
from lip_resnet.insight.pixels import SiteWeights, edge_strength, grad_cam, has_captum, pixel_importance, site_weights

GRID = 8
"""Deletion removes cells of an even grid of GRID x GRID."""
STEPS = 8
"""... in this many steps, until nothing is left."""


def deletion_curves(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    indices: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, NDArray[np.float64]]:
    """The probability of the class predicted for the whole image, as its most important cells are removed first.

    Removed cells get the mean colour, 0 after normalisation. Cells, and not pixels, so that every order removes areas
    of one shape: single pixels removed at random are noise, which hurts a network more than what is missing.

    Args:
        model: in evaluation mode: images (B, 3, H, W) -> logits (B, classes).
        images: (B, 3, H, W) uint8, on the model's device.
        labels: unused: the predicted class counts.
        indices: (B,), of the images in their set: seeds of the random order.
        mean, std: (3,), of pixels in [0, 1].

    Returns:
        Method -> (B, STEPS + 1), in [0, 1]; ``random`` is an order drawn for each image. Equal cells come in it too.

    Source: deletion of Petsiuk et al., "RISE", BMVC 2018, with the regions of Samek et al., "Evaluating the
    visualization of what a deep neural network has learned", IEEE TNNLS 28 (2017).
    """
    inputs = _normalize(images, mean, std)
    with torch.no_grad():
        classes = model(inputs).argmax(1)
    maps = _methods(model, images, inputs, classes, site_weights(model, images, mean, std))
    random = np.stack([np.random.default_rng(seeding.derive("deletion", each)).random(GRID * GRID) for each in indices])
    maps["random"] = np.zeros(maps["importance"].shape, dtype=np.float32)
    return {name: _curve(model, inputs, classes, _ranks(each, random)) for name, each in maps.items()}


def _ranks(maps: NDArray[np.float32], random: NDArray[np.float64]) -> Tensor:
    """Maps (B, H, W) -> (B, GRID, GRID): a cell's place in the order of removal, 0 first; ties in the random order.

    Values that differ by less than 1e-5 of the largest are ties.
    """
    cells = F.adaptive_avg_pool2d(torch.from_numpy(maps), GRID).flatten(1).numpy()
    rounded = (cells / cells.max(1, keepdims=True).clip(min=1e-30)).round(5)
    order = np.lexsort((random, -rounded), axis=1)
    return torch.from_numpy(np.argsort(order, axis=1)).view(-1, GRID, GRID)


@torch.no_grad()
def _curve(model: nn.Module, inputs: Tensor, classes: Tensor, ranks: Tensor) -> NDArray[np.float64]:
    ranks = F.interpolate(ranks[:, None].float(), inputs.shape[-2:], mode="nearest").to(inputs.device)
    points = []
    for step in range(STEPS + 1):
        kept = ranks >= step * GRID * GRID / STEPS
        logits = model(inputs * kept).double()
        points.append(logits.softmax(1).gather(1, classes[:, None])[:, 0].cpu())
    return torch.stack(points, 1).numpy()


def localisation_scores(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: NDArray[np.bool_],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, NDArray[np.float64]]:
    """Whether a map's largest value is inside the box, and the share of the map inside it.

    Args:
        model: in evaluation mode: images (B, 3, H, W) -> logits (B, classes).
        images: (B, 3, H, W) uint8, on the model's device.
        labels: (B,) int64: the classes of Grad-CAM.
        masks: (B, H, W): the pixels of the box.
        mean, std: (3,), of pixels in [0, 1].

    Returns:
        Method -> (B, 2), in [0, 1]: hit and energy. ``chance`` is the box's share of the pixels, what a map that knows
        nothing has on average; ``mirrored`` is the importance, left and right exchanged: it keeps what comes from
        photographers centring their objects. ``site NAME`` is the importance of one site alone.

    Source: the pointing game of Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, without
    its tolerance, and the energy of Wang et al., "Score-CAM", CVPR Workshops 2020.
    """
    inputs = _normalize(images, mean, std)
    sites = site_weights(model, images, mean, std)
    maps = _methods(model, images, inputs, labels.to(inputs.device), sites)
    maps["mirrored"] = maps["importance"][..., ::-1]
    for site in sites:
        maps[f"site {site.name}"] = pixel_importance([site], images.shape[-2:])
    scores = {name: localise(each, masks) for name, each in maps.items()}
    return scores | {"chance": np.repeat(masks.mean((1, 2))[:, None], 2, axis=1)}


def localise(maps: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Maps (B, H, W), at least 0, and masks -> (B, 2): hit and energy.

    Of equally large values each counts as its share of them; the energy of a map without any is the mask's area.
    """
    values = maps.astype(np.float64).reshape(len(maps), -1)
    inside = masks.reshape(len(maps), -1)
    largest = values == values.max(1, keepdims=True)
    values = np.where(values.sum(1, keepdims=True) > 0, values, 1.0)
    energy = (values * inside).sum(1) / values.sum(1)
    return np.stack([(largest & inside).sum(1) / largest.sum(1), energy], axis=1)


def _methods(
    model: nn.Module, images: Tensor, inputs: Tensor, classes: Tensor, sites: Sequence[SiteWeights]
) -> dict[str, NDArray[np.float32]]:
    """Method -> maps (B, H, W)."""
    maps = {"importance": pixel_importance(sites, images.shape[-2:]), "edges": edge_strength(images)}
    if has_captum():
        maps["Grad-CAM"] = grad_cam(model, inputs, classes)
    return maps


def _normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    shift, scale = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - shift) / scale
