"""benchmark.py: every subcommand on tiny settings, its refusals, and the tables made from stored rows."""

import json
import sys
from types import SimpleNamespace

import benchmark
import pytest
import timm
import torch
from bench import contestants, network, quantities, step, tables
from bench.timing import LAYOUTS, WrongResult
from helpers.commands import refuse

from lip_resnet.evaluation.metrics import AccuracyCounts
from lip_resnet.training import engine
from lip_resnet.training.nonfinite import NonFiniteGuard

TINY = {
    "op": ["--sites", "1024x14", "--batch", "1", "--contestants", "textbook", "lip2d", "plain form", "avg_pool2d"],
    "model": ["--size", "64", "--batch", "1", "2", "--contestants", "resnet50", "lip_resnet50"],
    "train": ["--size", "64", "--batch", "2", "--contestants", "lip_resnet50", contestants.FLOOR],
    "step": ["--size", "64", "--batch", "2", "--contestants", step.BARE, step.AS_TRAINED, "with EMA"],
    "memory": ["--size", "64", "--batch", "2", "--contestants", "resnet50", "lip_resnet50", contestants.REFERENCE],
    "kernels": ["--size", "64", "--batch", "1", "--contestants", "resnet50"],
}
TIMES = {"ms", "ms_q1", "ms_q3"}
NETWORK = TIMES | {"model", "layout", "compile", "images_per_second", "time / resnet50", "time / floor"}
COLUMNS = {
    "op": TIMES | {"layout", "site", "form", "direction", "speedup", "share_of_copy_bound", "relative_error"},
    "model": NETWORK | {"ms_p90", "ms_p99"},
    "train": NETWORK,
    "step": TIMES | {"step", "network", "images_per_second", "time / bare"},
    "memory": {"model", "layout", "kept_mib", "kept / resnet50"},
    "kernels": {"model", "layout", "kernel", "ms", "share", "calls"},
}


def run(monkeypatch, tmp_path, *arguments: str) -> list[dict]:
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--device", "cpu", "--output", str(output)])
    benchmark.main()
    environment, rows = tables.read(output)
    assert environment["torch"] == torch.__version__
    assert environment["fused_kernel"] in (True, False)
    return rows


@pytest.mark.parametrize("what", TINY)
def test_rows(monkeypatch, tmp_path, capsys, what):
    if what == "kernels":  # a small network: the profiler is slow
        monkeypatch.setitem(
            contestants.NETWORKS, "resnet50", lambda: timm.create_model("test_resnet", num_classes=1000)
        )
    if what == "step":  # builds a network for each contestant
        monkeypatch.setitem(contestants.NETWORKS, "lip_resnet50", lambda: timm.create_model("lip_resnet18"))
    rounds = [] if what in ("memory", "kernels") else ["--rounds", "2"]
    rows = run(monkeypatch, tmp_path, what, *TINY[what], *rounds)
    count = {"op": 2 * 4, "model": 2 * 2, "train": 2, "step": 3, "memory": 3, "kernels": 21}[what]
    assert len(rows) == count
    for row in rows:
        assert set(row) == COLUMNS[what] | {"precision", "batch"} | (set() if what == "op" else {"size"})
        assert all(value > 0 for key, value in row.items() if key.startswith(("ms", "kept", "images")))
    assert capsys.readouterr().out.count("\n| ") == count + 2  # and the header with its rule
    if what == "kernels":
        assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.01)
        assert [row["ms"] for row in rows[:-1]] == sorted((row["ms"] for row in rows[:-1]), reverse=True)
    if what == "memory":  # the fused network keeps less than the textbook's
        assert rows[1]["kept_mib"] < rows[2]["kept_mib"]


def test_failures_are_rows_and_rows_are_kept(monkeypatch, tmp_path):
    """A wrong result, any exception at the first call or in a later round; what was measured before is in the file."""

    class CompilationError(Exception):
        pass

    def broken(x, logits):
        raise CompilationError("at 3:1\nand more")

    def exhausted(x, logits, calls=[]):  # noqa: B006 (counts)
        calls.append(1)
        if len(calls) > 3:
            raise CompilationError("out of resource: shared memory")
        return contestants.textbook(x, logits)

    monkeypatch.setitem(contestants.FORMS, "lip2d", lambda x, logits: 1.001 * contestants.textbook(x, logits))
    monkeypatch.setitem(contestants.FORMS, "plain form", broken)
    monkeypatch.setitem(contestants.FORMS, "avg_pool2d", exhausted)
    rows = run(monkeypatch, tmp_path, "op", *TINY["op"], "--rounds", "2")
    assert {(row["form"], row.get("direction")): row["failed"] for row in rows if "failed" in row} == {
        ("lip2d", None): "WrongResult: relative error 1.0e-03",
        ("plain form", None): "CompilationError: at 3:1",
        ("avg_pool2d", "forward"): "CompilationError: out of resource: shared memory",
        ("avg_pool2d", "forward + backward"): "CompilationError: out of resource: shared memory",
    }
    assert [row["form"] for row in rows if "ms" in row] == ["textbook"] * 2

    def interrupted(options):
        yield {"form": "textbook", "ms": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmark.ROWS, "op", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, "op", "--force")
    assert tables.read(tmp_path / "rows.jsonl")[1] == [{"form": "textbook", "ms": 1.0}]


def test_the_engine_s_step_is_what_is_timed(monkeypatch, tmp_path):
    """The guard, the gradient norm and the counts of ``train.py`` run in ``train`` and in ``as train.py``, not in the
    bare step; with EMA and clipping, those."""
    calls = []

    def count(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: [calls.append(name), function(*args, **options)][1])

    count(engine.TrainStep, "__call__")
    count(NonFiniteGuard, "is_bad")
    count(engine, "_norm")
    count(AccuracyCounts, "add")
    count(engine, "update_average")
    count(engine.nn.utils, "clip_grads_with_norm_")
    every = {"__call__", "is_bad", "_norm", "add"}
    options = SimpleNamespace(size=64, precision="float32")
    model = timm.create_model("lip_resnet18")
    for name, expected in (
        (step.BARE, set()),
        (step.AS_TRAINED, every),
        ("with EMA", every | {"update_average"}),
        ("with clipping", every | {"clip_grads_with_norm_"}),
    ):
        config = network.build_config(options, 2, "channels_last", step.VARIANTS.get(name, ()))
        calls.clear()
        step.make_variant(name, model, config, torch.device("cpu"))[0]()
        assert set(calls) == expected, name
    calls.clear()
    network.make_step(model, config, torch.device("cpu"))()
    assert every <= set(calls)


def test_a_step_that_trains_differently_fails(monkeypatch, tmp_path):
    """A variant with a different update: its second loss differs."""
    monkeypatch.setitem(contestants.NETWORKS, "lip_resnet50", lambda: timm.create_model("lip_resnet18"))
    monkeypatch.setitem(step.VARIANTS, "contiguous", ("train.channels_last=false", "optim.lr=0.02"))
    rows = run(
        monkeypatch, tmp_path, "step", *TINY["step"][:4], "--contestants", "contiguous", step.BARE, "--rounds", "2"
    )
    assert {row["step"]: row["failed"].split(":")[0] for row in rows if "failed" in row} == {
        "contiguous": "WrongResult"
    }


def test_wrong_networks_are_refused(monkeypatch):
    """Other numbers than the textbook network's, or other operations."""

    def coarse():
        model = contestants.floor_network("lip_resnet50")
        model.conv1.stride = (4, 4)
        return model

    monkeypatch.setitem(contestants.NETWORKS, contestants.FLOOR, coarse)
    gate = timm.create_model("lip_resnet50", gate_coefficient=11.9)
    monkeypatch.setitem(contestants.NETWORKS, "lip_resnet50", lambda: gate)
    for name in ("lip_resnet50", contestants.FLOOR):
        with pytest.raises(WrongResult, match="relative error"):
            contestants.build_network(name, "cpu", torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_floor_s_logits_get_gradients_as_lip_s_do(layout):
    """At all seven sites the logits' gradient is nowhere all zero and in the network's layout, and it is the pooling's
    own gradient; so every convolution of the branch has one."""
    model = contestants.build_network(contestants.FLOOR, "cpu", LAYOUTS[layout]).train()
    gradients = {}
    for name, module in model.named_modules():
        if isinstance(module, contestants.FloorLIP):
            module.logits.register_forward_hook(
                lambda _, inputs, logits, name=name: (
                    logits.register_hook(lambda g: gradients.update({name: g})) and None
                )
            )
    images = torch.randn(2, 3, 96, 96).contiguous(memory_format=LAYOUTS[layout])
    model(images).square().mean().backward()
    assert len(gradients) == 7
    for name, gradient in gradients.items():
        assert gradient.is_contiguous(memory_format=LAYOUTS[layout]), name
        assert (gradient != 0).any(dim=1).all(), name
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name

    x, logits, y = (torch.randn(2, 4, 9, 9, requires_grad=True) for _ in range(3))
    pooled = contestants.floor_pool(x, logits, *contestants.WINDOW)
    dy = torch.randn_like(pooled)
    dx, dlogits = torch.autograd.grad(pooled, (x, logits), dy)
    (expected,) = torch.autograd.grad(torch.nn.functional.avg_pool2d(y, *contestants.WINDOW), y, dy)
    assert dx.equal(expected)
    assert dlogits.equal(expected)


def test_refusals(monkeypatch, capsys, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("mine")

    def line(*arguments: object) -> str:
        return refuse(capsys, monkeypatch, benchmark, *arguments)

    assert "op|model|train|step|kernels|memory|data" in line()
    assert "invalid choice: 'speed'" in line("speed")
    assert "invalid choice: '3x3'" in line("op", "--sites", "3x3")
    assert "--rounds 1; it must be at least 2" in line("op", "--rounds", 1)
    assert "--batch 0; it must be at least 1" in line("train", "--batch", 0)
    assert "--size 32; it must be at least 33" in line("model", "--size", 32)
    assert "--images 8; it must be at least the batch, 64" in line("data", "--images", 8)
    assert "--workers 0; it must be at least 1" in line("data", "--workers", 0)
    assert f"no images below {tmp_path / 'none'}" in line("data", "--data", tmp_path / "none")
    assert "end in .jsonl" in line("memory", "--output", tmp_path / "rows.txt")
    assert "no folder" in line("memory", "--output", tmp_path / "none" / "rows.jsonl")
    assert "mine.jsonl exists" in line("op", "--output", mine)
    assert mine.read_text() == "mine"
    if not torch.cuda.is_available():
        assert "PyTorch sees no GPU" in line("op", "--device", "cuda")


def test_the_page_of_measurements(tmp_path):
    """Measured rows with their command; failed ones are marked; and the table of GPUs."""
    environment = dict.fromkeys(("torch", "threads", "load", "hardware"), "x") | {"date": "2020-01-02T03:04:05"}
    environment |= {"lip_kernels": "plain", "command": ["python", "a b"]}
    common = {"layout": "channels_last", "precision": "float32", "batch": 8}
    rows = [
        common | {"site": "64x112", "form": "lip2d", "failed": "RuntimeError: no"},
        common | {"site": "64x112", "direction": "forward + backward", "form": "textbook", "ms": 35.04999},
    ]

    def write(name: str) -> None:
        lines = [{"environment": environment}, *(tables.shorten(row) for row in rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("op_cpu")
    page = tables.performance(tmp_path)
    cells = [cell.strip() for cell in next(line for line in page.splitlines() if "64x112" in line).split("|")]
    assert cells[1:7] == ["64x112", "channels_last", "35", "failed", "failed", "-"]
    assert "batch 8, precision float32, layout channels_last, x, torch x" in page
    assert "`LIP_KERNELS=plain python 'a b'`" in page
    assert page.count("**On GPUs**") == 1


def test_the_table_of_gpus(tmp_path):
    """Every cell is a figure: a measured one, of its own GPU, or one that is marked as a model's."""
    page = tables.gpus(tmp_path)
    lines = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == len(quantities.QUANTITIES)
    assert all(line.count("(model)") == 2 for line in lines)

    environment = {"hardware": "NVIDIA H200", "torch": "2.11", "threads": 8, "date": "2026-01-01T", "command": ["fast"]}
    environment |= {"stage": "fast", "quick": False}
    rows = [{"part": "train", "model": "lip_resnet50", "ms": 51.234, "time / resnet50": 1.25}]
    for name, changes in (("fast", {}), ("tried", {"quick": True, "hardware": "NVIDIA H100"})):
        content = [{"environment": environment | changes}, *rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    page = tables.gpus(tmp_path)
    (ratio,) = (line for line in page.splitlines() if "eager: lip_resnet50 / resnet50" in line)
    assert [cell.strip() for cell in ratio.split("|")][2:5] == ["at most 1.28", "1.32 (model)", "1.25"]
    assert page.count("(model)") == 2 * len(quantities.QUANTITIES) - 2 + 1  # the caption has one
    assert "NVIDIA H200, torch 2.11" in page
