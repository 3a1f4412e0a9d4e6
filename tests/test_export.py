"""Ways out of Python: compiled, exported and low-precision forms of the networks, each against eager float32.

Exported files hold PyTorch's own operators alone: a process that cannot import this package runs them.
"""

import subprocess
import sys

import pytest
import timm
import torch
from torch import Tensor, nn

from lip_resnet.pooling import LAYERS, logit_parameters, make_layer
from lip_resnet.resnet import LIPResNet

SIZES = [(2, 3, 64, 64), (1, 3, 97, 66)]
BATCH = torch.export.Dim("batch", min=1, max=64)
DYNAMIC = {"x": {0: BATCH, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}

ELSEWHERE = """
import sys
sys.modules["lip_resnet"] = None  # importing it fails
import numpy, torch
kind, path, values, results = sys.argv[1:]
inputs = [torch.from_numpy(x) for x in numpy.load(values).values()]
if kind == "pt2":
    network = torch.export.load(path).module()
    outputs = [network(x).detach().numpy() for x in inputs]
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] for x in inputs]
numpy.savez(results, *outputs)
"""


def awake(model: nn.Module) -> nn.Module:
    """With logits that are not constant and no block cut off, as after some training; in eval mode."""
    torch.manual_seed(1)
    for parameter in logit_parameters(model):
        nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def small() -> nn.Module:
    """Every kind of module of LIP-ResNet: the stem, two stages, the classifier."""
    torch.manual_seed(0)
    model = LIPResNet((1, 1, 1, 1))
    model.prune_intermediate_layers([2])
    model.reset_classifier(10, "avg")
    return awake(model)


def images(size: tuple[int, ...]) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def check(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest error, in standard deviations of the logits."""
    assert want.std() > 0
    assert ((got - want).abs().max() / want.std()).item() <= tolerance


def run_elsewhere(tmp_path, kind: str, path, inputs: list[Tensor]) -> list[Tensor]:
    """What the file yields in a process of its own that has no lip_resnet."""
    import numpy

    numpy.savez(tmp_path / "in.npz", *[x.numpy() for x in inputs])
    command = [sys.executable, "-c", ELSEWHERE, kind, str(path), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, cwd=tmp_path)
    return [torch.from_numpy(y) for y in numpy.load(tmp_path / "out.npz").values()]


def test_compile_has_no_graph_break():
    """Loss and gradients in float32 against float32, the same kernels: rounding alone."""
    torch.compiler.reset()
    model, x = small(), images(SIZES[0])
    want = model(x)
    want.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    got.square().sum().backward()
    check(got, want, 1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if not layer.startswith("lip")])
def test_every_other_layer_compiles_and_exports(layer):
    torch.compiler.reset()
    module = awake(nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8), make_layer(layer, 8)))
    x = images((2, 3, 31, 22))
    check(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x), 1e-5)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH, 2: DYNAMIC["x"][2], 3: DYNAMIC["x"][3]},))
    other = images((1, 3, 40, 17))
    check(program.module()(other), module(other), 1e-5)


@pytest.mark.parametrize("name", ["resnet", "densenet"])
def test_exported_program(name, tmp_path):
    """torch.export, any batch and image size: plain ATen, run by a process without this package."""
    model = small() if name == "resnet" else awake(timm.create_model("lip_densenet121", block_config=(1, 1)))
    with torch.no_grad():
        program = torch.export.export(model, (images(SIZES[0]),), dynamic_shapes=DYNAMIC)
    operators = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert operators
    assert {op.namespace for op in operators} == {"aten"}
    torch.export.save(program, tmp_path / "model.pt2")
    outputs = run_elsewhere(tmp_path, "pt2", tmp_path / "model.pt2", [images(size) for size in SIZES])
    for size, got in zip(SIZES, outputs, strict=True):
        check(got, model(images(size)), 1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(dynamic, tmp_path):
    """ONNX of fixed or any size, run by onnxruntime in a process without this package: 1e-4 for its own kernels."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, sizes = small(), SIZES if dynamic else SIZES[:1]
    with torch.no_grad():
        program = torch.export.export(model, (images(SIZES[0]),), dynamic_shapes=DYNAMIC if dynamic else None)
        torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False, optimize=False)
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph)
    outputs = run_elsewhere(tmp_path, "onnx", tmp_path / "model.onnx", [images(size) for size in sizes])
    for size, got in zip(sizes, outputs, strict=True):
        check(got, model(images(size)), 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("name", ["lip_resnet50", "lip_densenet121"])
def test_low_precision_inference(name, dtype, tolerance):
    """half() and bfloat16() against float32, over the depth of a real network (2^-11 and 2^-8 a rounding)."""
    torch.manual_seed(0)
    model, x = awake(timm.create_model(name)), images((2, 3, 64, 64))
    with torch.no_grad():
        want = model(x)
        got = model.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    check(got.float(), want, tolerance)
