"""Is it right on a GPU? The operators, training steps and DDP; `python scripts/benchmark_gpu.py right` runs all."""

import argparse

import pytest
import timm
import torch
from bench import step
from bench.contestants import SITES
from helpers import device_operators, device_steps
from helpers.operator_cases import LAYOUTS, WINDOWS

from lip_resnet.ops import dispatch

if not torch.cuda.is_available():
    pytest.skip("tests/gpu needs a CUDA device, and PyTorch sees none", allow_module_level=True)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRECISIONS = ["float32", "bfloat16", "float16"]
REAL = {"model__name": "lip_resnet18", "model__downsampling": {}, "batch": 16, "side": 64}


def require_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


def test_the_fused_operators_are_available():
    assert dispatch.available("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel_size", "stride", "padding", "height", "width"), WINDOWS)
def test_operator_in_every_window(dtype, layout, kernel_size, stride, padding, height, width):
    for channels in (3, 40):
        shape = (2, channels, height, width)
        device_operators.check_operator("cuda", dtype, layout, shape, (kernel_size, stride, padding))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("logits", [(0.0, 12.0), (-80.0, 80.0), (6.0, 6.0)])
def test_operator_at_any_logits(dtype, layout, logits):
    device_operators.check_operator("cuda", dtype, layout, (3, 33, 9, 8), (3, 2, 1), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", device_operators.AFTER)
def test_instance_norm(dtype, layout, activation):
    for shape in ((2, 20, 7, 5), (3, 64, 30, 31), (1, 3, 56, 56)):
        device_operators.check_norm("cuda", dtype, layout, activation, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", SITES)
def test_sites(site, dtype):
    channels, size = SITES[site]
    device_operators.check_site("cuda", dtype, 8, channels, size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_billion_elements(layout):
    require_memory(50)
    device_operators.check_large("cuda", layout, (2700, 64, 112, 112))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(70_000, 3, 3, 3), (2, 70_000, 3, 3)])
def test_more_images_or_channels_than_a_grid_axis(layout, shape):
    device_operators.check_large("cuda", layout, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_again(dtype, layout):
    device_operators.check_repeats("cuda", dtype, layout, (16, 64, 56, 56))


@pytest.mark.parametrize("name", ["lip_resnet18", "lip_resnet50", "lip_densenet121"])
def test_compile_captures_the_operators(name):
    device_operators.check_capture("cuda", timm.create_model(name), 64)


def test_compiled_steps_train_as_eager_ones():
    options = argparse.Namespace(device="cuda", precision="bfloat16", size=64)
    model = timm.create_model("lip_resnet50")
    _, losses = step.make(options, 16, model, step.AS_TRAINED)
    step.prepare(options, 16, model, losses, "torch.compile")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_skipped_step_leaves_everything(precision):
    device_steps.check_skipped_step("cuda", precision, **REAL)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_synchronisation_between_log_steps(precision):
    device_steps.check_no_synchronisation("cuda", precision, **REAL)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_layout_copy(precision):
    device_steps.check_no_layout_copy("cuda", precision, **REAL | {"batch": 48})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_repeat(precision):
    device_steps.check_step_repeats("cuda", precision, **REAL)


def test_prefetch():
    device_steps.check_prefetch("cuda")


@pytest.mark.parametrize("name", ["resnet50", "lip_resnet50"])
def test_gradients_have_the_strides_of_ddp_s_buckets(tmp_path, name):
    device_steps.check_ddp_strides("cuda", tmp_path, **REAL | {"model__name": name})
