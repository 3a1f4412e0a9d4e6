"""Stateless randomness: the seed of every random choice is derived from the numbers that identify it."""

import random
import zlib

import numpy as np
import torch


def derive(purpose: str, *numbers: int) -> int:
    """A 63-bit seed from what identifies a choice, such as ("augment", seed, epoch, index); it never changes."""
    # SeedSequence pads with zeros: purpose and count distinguish (1,) from (1, 0).
    entropy = (zlib.crc32(purpose.encode()), len(numbers), *numbers)
    low, high = np.random.SeedSequence(entropy).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


def reseed(seed: int) -> None:
    """Seed the CPU generators of torch, numpy and Python: augmentations use all three.

    ``torch.manual_seed`` would also seed every accelerator, at fifty times the cost.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def reseed_device(device: torch.device, seed: int) -> None:
    """Seed the generators that a step on ``device`` uses (stochastic depth, dropout), without a synchronisation."""
    reseed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
