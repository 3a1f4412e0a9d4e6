"""Randomness as a function: every random choice is drawn from numbers that name it, never from what came before."""

import random
import zlib

import numpy as np
import torch


def derive(purpose: str, *numbers: int) -> int:
    """A 63-bit seed from what names a choice, such as ("augment", seed, epoch, index); well mixed, stable for ever."""
    # Purpose and count keep apart what SeedSequence, which pads with zeros, would give the same seed.
    entropy = (zlib.crc32(purpose.encode()), len(numbers), *numbers)
    low, high = np.random.SeedSequence(entropy).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


def reseed(seed: int) -> None:
    """Set the CPU generators of torch, numpy and Python, all three of which augmentations draw from.

    ``torch.manual_seed`` would also visit every accelerator, at fifty times the cost.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def reseed_device(device: torch.device, seed: int) -> None:
    """Set the generators that a step on ``device`` draws from (drop path, dropout), without a synchronisation."""
    reseed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
