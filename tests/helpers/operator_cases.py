"""Inputs, windows and tolerances of the operator's tests."""

import torch

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


# kernel, stride, padding, height, width: the published windows, sizes that the stride does not divide, single
# positions, and windows that do not overlap, leave gaps, or end inside the border
WINDOWS = [
    (3, 2, 1, 8, 8),
    (3, 2, 1, 7, 9),
    (2, 2, 0, 6, 7),
    (3, 1, 1, 5, 4),
    (5, 3, 2, 11, 8),
    (2, 3, 1, 8, 7),
    (4, 1, 0, 6, 5),
    (1, 1, 0, 3, 2),
    (3, 2, 1, 1, 1),
    (7, 4, 3, 9, 1),
    (1, 2, 0, 4, 3),
]


TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(shape, dtype=torch.float64, layout="contiguous", low=0.0, high=12.0, seed=0):
    """x, standard normal, and logits, uniform in [low, high), both of ``shape`` and with ``requires_grad``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    x, logits = (t.to(dtype).to(memory_format=LAYOUTS[layout]).requires_grad_() for t in (x, logits))
    return x, logits
