"""Recorded outputs of the reference implementation, and the deterministic weights and images that they belong to.

``golden/released_models.json`` was measured by running the reference (repository sebgao/LIP, commit 6724ec6) in
float64 with the weights of ``fill_`` under the reference's own keys. Every tensor is drawn from a generator seeded by
the CRC-32 of its key, so no weights are stored.
"""

import json
import zlib
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lip_resnet

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/released_models.json").read_text())
assert lip_resnet.__all__  # importing the package registers its models with timm


def fill_(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Overwrite every tensor in place, from its key alone, and return the dict.

    Matrices and kernels: normal, scaled by sqrt(2 / fan_in). Running variances: 1 + 0.1 |z|. Other vectors whose key
    ends in ``weight``: 1 + 0.1 z. All other vectors: 0.1 z. Counters: 0.
    """
    for key, tensor in state_dict.items():
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        z = torch.randn(
            tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())), dtype=torch.float64
        )
        if tensor.dim() >= 2:
            z *= (2.0 / tensor[0].numel()) ** 0.5
        elif key.endswith("running_var"):
            z = 1 + 0.1 * z.abs()
        else:
            z = 0.1 * z + (1 if key.endswith("weight") else 0)
        tensor.copy_(z)
    return state_dict


def images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """A deterministic batch (batch, 3, height, width), float32."""
    return torch.randn((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def released_state_dict(golden: str) -> dict[str, Tensor]:
    """The deterministic weights under the released keys, as in a released checkpoint."""
    shapes = GOLDEN[golden]["state_dict"]
    return fill_(
        {
            key: torch.empty(shape, dtype=torch.int64 if key.endswith("num_batches_tracked") else torch.float32)
            for key, shape in shapes.items()
        }
    )


def filled_model(golden: str, **kwargs) -> nn.Module:
    """The registered model with the deterministic weights, loaded strictly through its own key map, in float64."""
    model = timm.create_model(golden.split("_b")[0], **kwargs)
    model.load_state_dict(model.checkpoint_filter_fn(released_state_dict(golden), model), strict=True)
    return model.double()


def check_logits(model: nn.Module, golden: str) -> None:
    """Logits in eval mode at both recorded sizes: errors of at most 1e-9 standard deviations."""
    model.eval()
    for size, want in GOLDEN[golden]["logits"].items():
        height, width = map(int, size.split("x"))
        with torch.no_grad():
            logits = model(images(2, height, width).double())
        std = want["std"]
        assert logits.std().item() == pytest.approx(std, rel=1e-9), size
        for row, first16 in zip(logits.tolist(), want["first16"], strict=True):
            assert row[:16] == pytest.approx(first16, rel=0, abs=1e-9 * std), size
        # The sum of 1000 logits, each with an error of at most 1e-9 standard deviations.
        assert logits.sum(1).tolist() == pytest.approx(want["sum"], rel=0, abs=1e-6 * std), size


def check_gradients(model: nn.Module, golden: str) -> None:
    """Loss in train mode and the norm of every parameter's gradient: relative errors of at most 1e-6."""
    want = GOLDEN[golden]["train_64x64"]
    model.train()
    loss = F.cross_entropy(model(images(4, 64, 64, seed=1).double()), torch.tensor([1, 10, 100, 999]))
    loss.backward()
    assert loss.item() == pytest.approx(want["loss"], rel=1e-6)
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(model.checkpoint_filter_fn(want["grad_norm"], model), rel=1e-6, abs=0)


def check_sgd_steps(model: nn.Module, golden: str, steps: int = 5) -> None:
    """Steps of the reference's SGD: relative errors of at most 1e-6 in every loss, and after five in tensors' norms."""
    want = GOLDEN[golden]["sgd_5_steps_64x64"]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(steps):
        loss = F.cross_entropy(model(images(8, 64, 64, seed=100 + step).double()), torch.arange(8) * 120 + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(want["losses"][:steps], rel=1e-6)
    if steps < 5:
        return
    norms_after = model.checkpoint_filter_fn(want["norm_after"], model)
    state = model.state_dict()
    assert norms_after.keys() <= state.keys()
    norms = {name: state[name].double().norm().item() for name in norms_after}
    assert norms == pytest.approx(norms_after, rel=1e-6, abs=0)


def check_initial_std(model: nn.Module, golden: str) -> None:
    """Each parameter's standard deviation at initialisation, within the sampling error.

    The standard deviation of n normal samples has a relative error of 1 / sqrt(2 n); two samples are compared, at five
    sigma, and the record has four digits. A recorded zero (norms, zeroed weights) must be exactly zero.
    """
    parameters = dict(model.named_parameters())
    recorded = model.checkpoint_filter_fn(GOLDEN[golden]["init_std"], model)
    assert parameters.keys() == recorded.keys()
    for name, want in recorded.items():
        parameter = parameters[name]
        assert parameter.std().item() == pytest.approx(want, rel=5 * parameter.numel() ** -0.5 + 1e-3, abs=0), name
