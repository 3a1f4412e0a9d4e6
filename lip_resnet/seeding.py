"""Randomness as a function: every random choice is drawn from numbers that name it, never from what came before."""

import random

import numpy as np
import torch


def derive(*numbers: int) -> int:
    """A 63-bit seed from the numbers that name a choice, such as (seed, epoch, index); well mixed, stable for ever."""
    # The count keeps (1, 2) and (1, 2, 0) apart, which SeedSequence would pad to the same.
    low, high = np.random.SeedSequence((len(numbers), *numbers)).generate_state(2)
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
