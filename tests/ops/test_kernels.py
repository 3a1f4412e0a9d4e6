"""The fused kernels against the slow loops and the reference form, in every layout, dtype and mode of PyTorch."""

import copy
import itertools
import multiprocessing
import os
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from helpers import OLD_EXPORT
from helpers.forks import fork
from helpers.lip_oracle import relative_error, slow_lip2d
from helpers.operator_cases import LAYOUTS, TOLERANCES, WINDOWS, make
from torch._dynamo.backends.common import aot_autograd

from lip_resnet import lip2d
from lip_resnet.layers.downsampling import make_layer
from lip_resnet.layers.logits import BottleneckLogits, Gate, InstanceNorm2d, SimplifiedLogits
from lip_resnet.layers.pooling import logit_parameters
from lip_resnet.ops import cpu, dispatch, reference

OP = torch.ops.lip_resnet.lip2d.default


def test_the_cpu_kernel_is_available():
    """Test machines have a compiler; without the kernel many tests would compare the reference form with itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.available("cpu") == (os.environ.get("LIP_KERNELS", "auto") == "auto")


def gradients(function, x, logits, dy):
    y = function(x, logits)
    return y, *torch.autograd.grad(y, (x, logits), dy)


@pytest.mark.parametrize("window", [(2, 1, 1), (3, 2, 1), (4, 1, 2)])
def test_one_position_in_a_view_with_gaps(window):
    """PyTorch calls such a tensor contiguous in every layout; the output may be larger than the input."""
    x, logits = (torch.randn(2, 10, 1, 1)[:, :5] for _ in range(2))
    y = lip2d(x, logits, *window)
    assert relative_error(y, reference.stable(x.double(), logits.double(), window)) < 1e-6
    assert relative_error(lip2d(x.contiguous(), logits.contiguous(), *window), y) < 1e-6


@pytest.mark.parametrize("channels", [37, 48])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_many_channels_and_rows(dtype, layouts, channels):
    """Whole vectors, remainders, several batches of rows, chunks for every thread, mixed layouts: against the
    reference form in float64, which another test compares with the slow loops."""
    x, logits = make((2, channels, 23, 41), dtype, layouts[0])
    logits = logits.detach().contiguous(memory_format=LAYOUTS[layouts[1]]).requires_grad_()
    dy = torch.randn(2, channels, 12, 21, dtype=torch.float64).to(dtype).contiguous(memory_format=LAYOUTS[layouts[1]])
    results = gradients(lambda a, b: OP(a, b, 3, 2, 1)[0], x, logits, dy)
    inputs = [t.detach().double().requires_grad_() for t in (x, logits)]
    truths = gradients(lambda a, b: reference.stable(a, b, (3, 2, 1)), *inputs, dy.double())
    for value, truth in zip(results, truths, strict=True):
        assert value.dtype == dtype
        assert value.is_contiguous(memory_format=LAYOUTS[layouts[0]])
        assert relative_error(value, truth) < (1e-12 if dtype == torch.float64 else TOLERANCES[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "dtype"), [(40, torch.float32), (48, torch.float32), (48, torch.bfloat16)])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 1, 0), (5, 3, 2)])
def test_logits_of_all_magnitudes_in_one_tensor(window, channels, dtype, layout):
    """Rows whose exponentials fit float32 and rows whose do not, in a tensor too large for the caches."""
    x, logits = (t.detach() for t in make((1, channels, 83, 79), dtype, layout, low=0, high=12))
    logits[:, :, 20:24] += 70
    logits[:, :, 24:27] -= 90
    logits[:, 3, 40, 5] = -2e4
    logits[:, 7, 60, 9] = 100
    x.requires_grad_(), logits.requires_grad_()
    y = lip2d(x, logits, *window)
    dy = torch.randn_like(y)
    inputs = [t.detach().double().requires_grad_() for t in (x, logits)]
    truths = gradients(lambda a, b: reference.stable(a, b, window), *inputs, dy.double())
    for value, truth in zip((y, *torch.autograd.grad(y, (x, logits), dy)), truths, strict=True):
        for rows, expected in zip(value.chunk(9, 2), truth.chunk(9, 2), strict=True):
            assert relative_error(rows, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_the_gradients_of_its_windows(layout):
    """A NaN logit makes the gradients in its windows NaN and no others, with large logits in its row or not."""
    for large in (1, 200):
        x, logits = make((1, 16, 21, 23), torch.float32, layout)
        dy = torch.randn(1, 16, 11, 12)
        with torch.no_grad():
            logits[0, 5, 10, 3] = large
        expected = gradients(lip2d, x, logits, dy)
        with torch.no_grad():
            logits[0, 5, 10, 11] = torch.nan
        affected = torch.zeros(1, 16, 21, 23, dtype=torch.bool)
        affected[0, 5, 9:12, 9:14] = True  # the windows around rows 10 and columns 10 and 12
        for value, clean in zip(gradients(lip2d, x, logits, dy)[1:], expected[1:], strict=True):
            assert value[affected].isnan().all()
            torch.testing.assert_close(value[~affected], clean[~affected])


@pytest.mark.parametrize("window", [(3, 2, 1), (2, 3, 1)])
@pytest.mark.parametrize("form", [lambda *inputs: OP(*inputs)[0], lambda a, b, *window: reference.pool(a, b, window)])
def test_first_and_second_derivatives(form, window):
    inputs = make((1, 2, 4, 5), low=-2, high=2)
    assert torch.autograd.gradcheck(lambda a, b: form(a, b, *window), inputs, eps=1e-6, atol=1e-8, rtol=1e-5)
    assert torch.autograd.gradgradcheck(lambda a, b: form(a, b, *window), inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_number_of_threads(threads, layout):
    x, logits = make((3, 20, 31, 17), torch.float32, layout)
    dy = torch.randn(3, 20, 16, 9)
    before = torch.get_num_threads()
    expected = gradients(lip2d, x, logits, dy)
    try:
        torch.set_num_threads(threads)
        results = gradients(lip2d, x, logits, dy)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


@pytest.mark.parametrize(
    "form", [lambda x, logits, window: OP(x, logits, *window)[0], reference.pool, reference.stable]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kernel_size", "stride", "padding", "height", "width"), WINDOWS)
def test_float64_against_the_slow_loops(form, layout, kernel_size, stride, padding, height, width):
    """The kernel, which ``lip2d`` does not use in float64, and the reference forms."""
    window = (kernel_size, stride, padding)
    x, logits = make((2, 3, height, width), layout=layout)
    y = form(x, logits, window)
    dy = torch.randn_like(y)
    for value, truth in zip(
        (y, *torch.autograd.grad(y, (x, logits), dy)), slow_lip2d(x, logits, dy, *window), strict=True
    ):
        torch.testing.assert_close(value, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("low", "high"), [(-80, 80), (100, 300), (-300, -100)])
def test_reference_form_is_exact_where_the_textbook_form_fails(low, high):
    """Logits whose exponentials overflow, underflow, or differ in a window by more than float32 can represent."""
    x, logits = make((2, 3, 9, 8), torch.float32, low=low, high=high)
    y = reference.pool(x, logits, (3, 2, 1))
    dy = torch.randn_like(y)
    for value, truth in zip(
        (y, *torch.autograd.grad(y, (x, logits), dy)), slow_lip2d(x, logits, dy, 3, 2, 1), strict=True
    ):
        assert relative_error(value, truth) < TOLERANCES[torch.float32]


def test_window_larger_than_the_kernels_support():
    x, logits = make((1, 2, 12, 11))
    assert not dispatch.supports(x, logits, 9)
    torch.testing.assert_close(lip2d(x, logits, 9, 2, 4), slow_lip2d(x, logits, None, 9, 2, 4)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(layout, dtype):
    """PyTorch's own checks of an operator: schema, autograd registration, fake tensors, dynamic shapes."""
    torch.library.opcheck(OP, (*make((2, 5, 9, 8), dtype, layout), 3, 2, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_for_backward(layout):
    """x, logits, y and one float32 per window, nothing more."""
    x, logits = make((2, 8, 16, 16), torch.float32, layout)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lip2d(x, logits)
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in saved}
    assert sum(sizes.values()) <= 4 * (2 * x.numel() + 2 * y.numel())


class Pool(torch.nn.Module):
    """``lip2d`` with logits of an instance norm and gate."""

    def __init__(self):
        super().__init__()
        self.norm, self.gate = InstanceNorm2d(3), Gate()

    def forward(self, x, logits):
        return lip2d(x, self.norm(logits, self.gate))


def test_compile():
    """One graph without a break, which calls the fused operators, with the results of eager mode."""
    torch.compiler.reset()
    calls = []

    def compiler(graph, inputs):
        calls.append({str(node.target) for node in graph.graph.nodes if str(node.target).startswith("lip_resnet.")})
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    x, logits = make((2, 3, 9, 8), torch.float32, "channels_last")
    dy = torch.randn(2, 3, 5, 4)
    module = Pool()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for a, b in zip(gradients(compiled, x, logits, dy), gradients(module, x, logits, dy), strict=True):
        torch.testing.assert_close(a, b)
    forward = {"lip_resnet.instance_norm.default", "lip_resnet.lip2d.default"}
    assert calls == [forward, {name.replace(".default", "_backward.default") for name in forward}]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_graph_has_only_aten_calls(strict):
    x, logits = (t.detach() for t in make((2, 3, 9, 8), torch.float32, "channels_last"))
    shapes = {0: torch.export.Dim("batch"), 2: torch.export.Dim.DYNAMIC}
    module = Pool().eval()
    program = torch.export.export(module, (x, logits), dynamic_shapes=(shapes, shapes), strict=strict)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(target.namespace == "aten" for target in calls if isinstance(target, torch._ops.OpOverload))
    x, logits = (t.detach() for t in make((3, 3, 13 if OLD_EXPORT else 14, 8), torch.float32, low=-90, high=90))
    torch.testing.assert_close(program.module()(x, logits), module(x, logits))


def test_function_transforms():
    """vmap and forward-mode derivatives use the reference form."""
    x, logits = make((2, 3, 6, 6))
    each = torch.func.vmap(lambda a, b: lip2d(a[None], b[None])[0])(x, logits)
    torch.testing.assert_close(each, lip2d(x, logits))
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(lambda a: lip2d(a, logits.detach()), (x.detach(),), (direction,))
    torch.testing.assert_close(slope, lip2d(direction, logits))  # linear in x


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The state of a process that has not loaded a kernel yet, with an empty cache."""
    monkeypatch.setenv("LIP_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LIP_KERNELS", "auto")
    monkeypatch.delenv("CXX", raising=False)
    dispatch._available.cache_clear()
    cpu.library.cache_clear()
    yield monkeypatch
    dispatch._available.cache_clear()
    cpu.library.cache_clear()


@pytest.mark.parametrize(("compiler", "reason"), [("none", "no C.. compiler was found"), ("broken", "syntax error")])
def test_reference_form_without_a_compiler(fresh, tmp_path, compiler, reason):
    """The same results and one warning that gives the reason."""
    folder = tmp_path / compiler
    folder.mkdir()
    if compiler == "broken":
        (folder / "c++").write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho syntax error >&2; exit 1\n")
        (folder / "c++").chmod(0o755)
    fresh.setenv("PATH", str(folder))
    x, logits = make((1, 2, 6, 7), torch.float32)
    with pytest.warns(UserWarning, match=f"reference form, slower than the fused kernel: .*{reason}") as caught:
        y = [lip2d(x, logits) for _ in range(3)][-1]
    assert len(caught) == 1
    assert relative_error(y, slow_lip2d(x, logits, None, 3, 2, 1)[0]) < TOLERANCES[torch.float32]


@pytest.mark.filterwarnings("error")
def test_reference_form_by_environment_variable(fresh):
    fresh.setenv("LIP_KERNELS", "plain")
    assert not dispatch.available("cpu")
    dispatch._available.cache_clear()
    fresh.setenv("LIP_KERNELS", "fast")
    with pytest.raises(ValueError, match="LIP_KERNELS is 'fast'; it must be one of auto, plain"):
        dispatch.available("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads: the children use none
def test_processes_that_build_at_once(fresh, tmp_path):
    """Three processes and an empty cache: all get the kernel, and the cache has one library and no temporary files."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=cpu.library) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]
    x, logits = make((1, 2, 6, 7))
    torch.testing.assert_close(OP(x, logits, 3, 2, 1)[0], slow_lip2d(x, logits, None, 3, 2, 1)[0])


def average_gradients(store: Path, rank: int) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for recompute in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), make_layer("lip_simplified", 16))
        torch.nn.init.normal_(model[1].logits.conv.weight, std=0.1)
        model[1].recompute = recompute
        images = torch.randn(6, 3, 12, 11).to(memory_format=torch.channels_last)
        model(images).square().sum().backward()
        whole = [p.grad.clone() / 2 for p in model.parameters()]
        model.zero_grad()
        parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        parallel(images[3 * rank : 3 * rank + 3]).square().sum().backward()
        for p, expected in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    torch.distributed.destroy_process_group()


def test_ddp_averages_gradients(tmp_path):
    """DDP over Gloo, with and without recomputed logits: the mean of two processes' gradients is the whole batch's."""
    ended = fork(*(partial(average_gradients, tmp_path / "store", rank) for rank in (0, 1)))
    assert ended.codes == [0, 0], ended.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_under_autocast(layout):
    """Forward and backward in bfloat16 on the CPU, against the same modules in float64.

    y differs by roundings of 2^-8; gradients also where rounding changes the sign of a ReLU's input.
    """
    for make_logits in (SimplifiedLogits, BottleneckLogits):
        torch.manual_seed(0)
        logits = make_logits(32)
        x = torch.randn(2, 32, 12, 10).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()

        def results(module, x, enabled):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = lip2d(x, module(x).to(x.dtype))
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
            return y, *torch.autograd.grad(y, (x, *module.parameters()), dy)

        values = results(logits, x, True)
        truths = results(copy.deepcopy(logits).double(), x.detach().double().requires_grad_(), False)
        assert values[0].dtype == x.dtype
        assert relative_error(values[0], truths[0]) < 0.02, make_logits
        for value, truth in zip(values[1:], truths[1:], strict=True):
            assert relative_error(value, truth) < 0.1, make_logits


def test_no_layout_change_in_a_channels_last_step():
    """The fused operators run and no operator copies features, which stay channels-last, also under autocast."""
    model = timm.create_model("lip_resnet18", num_classes=10).to(memory_format=torch.channels_last)
    for parameters in logit_parameters(model):
        torch.nn.init.normal_(parameters, std=0.1)
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.randn(3, 3, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(images)
            logits.square().mean().backward()
        names = {event.name for event in profile.events()}
        assert {"lip_resnet::lip2d_backward", "lip_resnet::instance_norm_backward"} <= names
        assert "aten::native_group_norm" not in names
        copies = [
            (event.name, event.input_shapes[0])
            for event in profile.events()
            if event.name in ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy")
            and len(event.input_shapes[0]) == 4
            and event.input_shapes[0][0] == len(images)
            and event.input_shapes[0][1] < model.num_features  # autocast pools the last features in float32
        ]
        assert not copies
