"""Compiled, exported and low-precision forms of the networks, each against eager float32.

Exported files use only PyTorch's own operators: they are run by a process that cannot import this package.
"""

import subprocess
import sys

import numpy
import onnx
import pytest
import timm
import torch
from helpers import OLD_EXPORT
from torch import Tensor, nn

from lip_resnet.layers.downsampling import DOWNSAMPLING, make_layer
from lip_resnet.layers.pooling import logit_parameters
from lip_resnet.models.resnet import LIPResNet

SIZES = [(2, 3, 64, 64), (1, 3, 96, 32) if OLD_EXPORT else (1, 3, 97, 66)]
BATCH = torch.export.Dim("batch", min=1, max=64)
DYNAMIC = {"x": {0: BATCH, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}

RUN_EXPORTED = """
import sys
sys.modules["lip_resnet"] = None  # importing it fails
import numpy, onnxruntime, torch
inputs = [torch.from_numpy(x) for x in numpy.load("in.npz").values()]
network = torch.export.load("network.pt2").module()
numpy.savez("network.pt2.npz", *[network(x).detach().numpy() for x in inputs])
session = onnxruntime.InferenceSession("network.onnx", providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
numpy.savez("network.onnx.npz", *[session.run(None, {name: x.numpy()})[0] for x in inputs])
"""


def randomized(model: nn.Module) -> nn.Module:
    """Random logit weights and nonzero BN weights, as after some training, so that every layer counts; eval mode."""
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
    return randomized(model)


def images(size: tuple[int, ...]) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def check(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest error, in standard deviations of the logits."""
    assert want.std() > 0
    assert ((got - want).abs().max() / want.std()).item() <= tolerance


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    """Whose operators an exported network calls."""
    return {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


def test_compile_has_no_graph_break():
    """Outputs and gradients in float32, by the same kernels: only rounding differs."""
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


class OtherLayers(nn.Module):
    """Every downsampling layer but LIP, side by side on the same features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8))
        names = [name for name in DOWNSAMPLING if not name.startswith("lip")]
        self.layers = nn.ModuleDict({name: make_layer(name, 8) for name in names})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.stem(x)
        return {name: layer(features) for name, layer in self.layers.items()}


def test_every_other_layer_compiles_and_exports():
    torch.compiler.reset()
    module, x = randomized(OtherLayers()), images((2, 3, 31, 22))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH, 2: DYNAMIC["x"][2], 3: DYNAMIC["x"][3]},))
    other = images((1, 3, 39, 18) if OLD_EXPORT else (1, 3, 40, 17))
    for outputs, wanted in ((compiled, module(x)), (program.module()(other), module(other))):
        assert outputs.keys() == wanted.keys() == module.layers.keys()
        for name, want in wanted.items():
            assert want.std() > 0, name
            assert (outputs[name] - want).abs().max() <= 1e-5 * want.std(), name


@pytest.mark.parametrize("sizes", ["dynamic", pytest.param("fixed", marks=pytest.mark.slow)])
def test_exported_files(tmp_path, sizes):
    """torch.export and ONNX, with dynamic batch and image size or with fixed ones, run without this package.

    Tolerance 1e-5 for PyTorch's kernels, 1e-4 for onnxruntime's.
    """
    model, sample = small(), images(SIZES[0])
    with torch.no_grad():
        program = torch.export.export(model, (sample,), dynamic_shapes=DYNAMIC if sizes == "dynamic" else None)
        assert namespaces(program) == {"aten"}
        torch.export.save(program, tmp_path / "network.pt2")
        torch.onnx.export(program, (), tmp_path / "network.onnx", verbose=False, optimize=False)
        inputs = [images(size) for size in SIZES[: 2 if sizes == "dynamic" else 1]]
        want = [model(x) for x in inputs]
    onnx.checker.check_model(onnx.load(tmp_path / "network.onnx"))

    numpy.savez(tmp_path / "in.npz", *[x.numpy() for x in inputs])
    subprocess.run([sys.executable, "-c", RUN_EXPORTED], check=True, cwd=tmp_path)
    for file, tolerance in (("network.pt2", 1e-5), ("network.onnx", 1e-4)):
        outputs = list(numpy.load(tmp_path / f"{file}.npz").values())
        for got, expected in zip(outputs, want, strict=True):
            check(torch.from_numpy(got), expected, tolerance)


def test_export_of_one_size():
    model, x = small(), images(SIZES[0])
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        check(program.module()(x), model(x), 1e-5)
    assert namespaces(program) == {"aten"}


def test_densenet_exports():
    """torch.export with dynamic batch and image size."""
    model = randomized(timm.create_model("lip_densenet121", block_config=(1, 1)))
    with torch.no_grad():
        program = torch.export.export(model, (images(SIZES[0]),), dynamic_shapes=DYNAMIC)
        check(program.module()(images(SIZES[1])), model(images(SIZES[1])), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("name", ["lip_resnet50", "lip_densenet121"])
def test_low_precision_inference(name, dtype, tolerance):
    """half() and bfloat16() against float32 in networks of full depth (rounding errors of 2^-11 and 2^-8)."""
    torch.manual_seed(0)
    model, x = randomized(timm.create_model(name)), images((2, 3, 64, 64))
    with torch.no_grad():
        want = model(x)
        got = model.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    check(got.float(), want, tolerance)
