"""scripts/scaling.py: closed forms of the model, DDP's real buckets, the large-batch recipes' optimizers."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from lip_resnet import distributed
from lip_resnet.config import InputError
from lip_resnet.data import TrainLoader, build_sources
from lip_resnet.engine import build_state, train_one_epoch
from lip_resnet.models.registry import initialize
from lip_resnet.optim import build_optimizer
from lip_resnet.recipe import load_config

sys.path.insert(0, str(ROOT / "scripts"))
import ddp_measure
import scaling
import update_readme
from ddp_model import Bucket, Cluster, Traffic, smallest_batch, step, traffic

RING = Cluster(node=1, inside=1.0, between=1e9, latency_inside=0.0, latency_between=0.0)
LOAD = Traffic((Bucket(10_000_000, 0.25), Bucket(30_000_000, 1.0)), 0)


# ---- the links ----


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_ring_takes_what_its_chunks_take(processes):
    """The ring, chunk by chunk: 2 (n-1) rounds, in each a process sends 1/n of the bytes; 3 bytes/s, 5 s a hop."""
    size, bandwidth, latency = 1200.0, 3.0, 5.0
    seconds = sum(latency + (size / processes) / bandwidth for _ in range(2 * (processes - 1)))
    for cluster in (
        Cluster(1, 1.0, bandwidth, 0.0, latency),  # one GPU a node
        Cluster(processes, bandwidth, 1.0, latency, 0.0),  # all in one node
    ):
        assert cluster.all_reduce(size, processes) == pytest.approx(seconds, rel=1e-12)


def test_two_levels_take_their_three_phases():
    """4 nodes of 8: reduce-scatter inside, a ring over 4 with an eighth on an eighth of the link, all-gather inside."""
    size, inside, between = 8e6, 200.0, 10.0
    cluster = Cluster(8, inside, between, 0.0, 0.0)
    scatter = gather = 7 / 8 * size / inside
    ring = 2 * 3 / 4 * (size / 8) / (between / 8)
    assert cluster.all_reduce(size, 32) == pytest.approx(scatter + ring + gather, rel=1e-12)


def test_one_gpu_sends_nothing():
    assert Cluster(8, 1.0, 1.0).all_reduce(1e9, 1) == 0
    alone = step(LOAD, 0.1, RING, 1, accumulate=3)
    assert (alone.total, alone.sent, alone.exposed, alone.efficiency) == (pytest.approx(0.3), 0, 0, 1)


def test_infinite_bandwidth_costs_nothing():
    links = Cluster(8, math.inf, math.inf, 0.0, 0.0)
    assert step(LOAD, 0.1, links, 64).efficiency == 1


def test_bytes_and_bandwidth_are_proportional():
    double = Traffic(tuple(Bucket(2 * bucket.bytes, bucket.ready) for bucket in LOAD.buckets), 0)
    base = step(LOAD, 1e-9, RING, 16)
    assert step(double, 1e-9, RING, 16).sent == pytest.approx(2 * base.sent, rel=1e-12)
    assert step(double, 1e-9, RING, 16, shrink=0.5).sent == pytest.approx(base.sent, rel=1e-12)
    assert step(LOAD, 1e-9, Cluster(1, 1.0, 5e8, 0.0, 0.0), 16).sent == pytest.approx(2 * base.sent, rel=1e-12)
    assert base.sent == pytest.approx(2 * 15 / 16 * 40e6 / 1e9, rel=1e-12)


# ---- overlap ----


def test_overlap_by_hand():
    """Two processes, 1 GB/s: sums of 10 and 30 ms. Backward of 100 ms: ready at 25 and at 100 ms; only 30 ms wait."""
    found = step(LOAD, 0.2, RING, 2, backward=0.5)
    assert (found.sent, found.exposed) == (pytest.approx(0.040), pytest.approx(0.030))
    assert found.total == pytest.approx(0.230)
    # Backward of 10 ms: the first, ready at 2.5 ms, is sent until 12.5 ms, the second until 42.5 ms.
    assert step(LOAD, 0.02, RING, 2, backward=0.5).exposed == pytest.approx(0.0325)
    # All ready at the end: nothing overlaps; all ready at once before a long backward: everything does.
    late = Traffic((Bucket(10_000_000, 1.0), Bucket(30_000_000, 1.0)), 0)
    early = Traffic((Bucket(10_000_000, 0.0), Bucket(30_000_000, 0.0)), 0)
    assert step(late, 0.2, RING, 2).exposed == pytest.approx(0.040)
    assert step(early, 0.2, RING, 2).exposed == 0


def test_accumulation_sends_once():
    one, four = (step(LOAD, 0.2, RING, 16, accumulate=parts) for parts in (1, 4))
    assert (four.sent, four.exposed) == (one.sent, one.exposed)
    assert four.compute == pytest.approx(4 * one.compute)
    assert one.efficiency < four.efficiency < 1


def test_smallest_batch_is_the_first_that_suffices():
    batch = smallest_batch(LOAD, 1e-3, RING, 64, 0.9)
    assert step(LOAD, batch * 1e-3, RING, 64).efficiency >= 0.9
    assert step(LOAD, (batch - 1) * 1e-3, RING, 64).efficiency < 0.9


# ---- what a network sends ----


@pytest.mark.parametrize("name", ["resnet50", "lip_resnet50", "lip_resnet101"])
def test_gradient_bytes_are_the_parameters(name):
    model = scaling.build(name)
    load = traffic(model)
    assert load.gradients == 4 * sum(parameter.numel() for parameter in model.parameters())
    ready = [bucket.ready for bucket in load.buckets]
    assert ready == sorted(ready)
    assert ready[-1] == 1  # the stem's gradients are the last


def test_frozen_parameters_are_not_sent():
    model = scaling.build("test_resnet")
    whole = traffic(model).gradients
    model.get_classifier().requires_grad_(False)
    assert traffic(model).gradients == whole - 4 * sum(p.numel() for p in model.get_classifier().parameters())


def test_ready_times_by_hand():
    """Three layers of 1, 2 and 5 of 8 multiply-adds: backward ends the last after 5/8, then 7/8, then all."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 6, 1, bias=False), nn.Conv2d(6, 10, 1, bias=False)
    )  # 12, 24 and 60 multiply-adds a pixel
    with torch.device("meta"):
        load = traffic(model.to("meta"), size=8)
    assert [bucket.bytes for bucket in load.buckets] == [4 * 96]  # one small bucket
    ends = [60 / 96, 84 / 96, 1.0]
    for layer, end in zip(reversed(model), ends, strict=True):
        for other in model:
            other.requires_grad_(other is layer)
        assert traffic(model, size=8).buckets[0].ready == pytest.approx(end, rel=1e-12)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["resnet50", "lip_resnet50"])
def test_buckets_are_those_of_a_real_ddp(one_process, name):
    torch.manual_seed(0)
    model = timm.create_model(name)
    wrapped = DistributedDataParallel(model)
    sizes: list[int] = []

    def hook(group, bucket):
        sizes.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, hook)
    for _ in range(2):  # after the first backward pass, DDP orders its buckets by what was ready when
        sizes.clear()
        wrapped(torch.randn(2, 3, 64, 64)).sum().backward()
    assert [bucket.bytes for bucket in traffic(model, 64).buckets] == sizes


# ---- the command ----


def test_fit_returns_what_made_the_times():
    latency, bandwidth, processes = 3e-5, 2e9, 4
    cluster = Cluster(processes, bandwidth, 1.0, latency, 0.0)
    times = tuple(cluster.all_reduce(size, processes) for size in ddp_measure.PROBES)
    assert ddp_measure.fit(times, processes) == (pytest.approx(latency), pytest.approx(bandwidth))


def run(capsys, monkeypatch, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        distributed.launch(scaling.main)
    printed = capsys.readouterr()
    return left.value.code, printed.out, printed.err


def test_tables_are_printed_and_kept(capsys, monkeypatch, tmp_path):
    output = tmp_path / "tables.md"
    given = ("--model", "test_resnet", "--step-ms", 10, "--batch", 64, "--gpus", 1, 16, "--bandwidth", 10)
    code, printed, _ = run(capsys, monkeypatch, *given, "--output", output)
    assert code == 0
    assert output.read_text() == printed
    assert "10 ms (assumed, batch 64)" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| test_resnet | 10 ms"))
    waited, efficiency, rate = re.search(r"\+([\d.]+) ms, ([\d.]+)%, ([\d.]+)k/s \|$", line).groups()
    seconds = 0.010 + float(waited) / 1e3
    assert float(efficiency) / 100 == pytest.approx(0.010 / seconds, abs=6e-3)
    assert float(rate) * 1e3 == pytest.approx(16 * 64 / seconds, rel=6e-3)
    assert run(capsys, monkeypatch, *given, "--output", output)[0] == 2  # never overwritten


def test_measured_steps_win(capsys, monkeypatch, tmp_path):
    rows = [{"model": "test_resnet", "ms": 7.5, "batch": 32}, {"model": "resnet18", "failed": "out of memory"}]
    (tmp_path / "train.json").write_text(json.dumps({"environment": {}, "rows": rows}))
    both = ("--model", "test_resnet", "resnet18", "--step-from", tmp_path / "train.json")
    code, printed, _ = run(capsys, monkeypatch, *both, "--step-ms", 10, 20)
    assert code == 0
    assert "7.5 ms (measured, batch 32)" in printed
    assert "20 ms (assumed, batch 256)" in printed
    code, printed, error = run(capsys, monkeypatch, *both)
    assert (code, printed) == (2, "")
    assert "no measured row of resnet18" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --step-ms or --step-from"),
        (["--step-ms", "1", "2"], "2 numbers for 1 models"),
        (["--step-ms", "0"], "each must be above 0"),
        (["--step-ms", "nan"], "each must be above 0"),
        (["--step-ms", "1", "--gpus", "0"], "each must be above 0"),
        (["--step-ms", "1", "--gpus", "12"], "a multiple of --node 8"),
        (["--step-ms", "1", "--backward", "1"], "below 1"),
        (["--step-ms", "1", "--model", "resnet5O"], "near names: resnet50"),
        (["--step-ms", "1", "--compression", "int8"], "invalid choice"),
        (["--step-from", "/nonexistent.json"], "No such file"),
        (["--step-from", str(ROOT / "benchmarks" / "data_cpu.json")], "not a file that benchmark.py train wrote"),
        (["--measure", "--model", "resnet18", "resnet50"], "takes one model"),
        (["--measure"], "start it with torchrun"),
    ],
)
def test_refusals(capsys, monkeypatch, arguments, words):
    code, printed, error = run(capsys, monkeypatch, *arguments)
    assert (code, printed, len(error.splitlines())) == (2, "", 1)
    assert words in error


def test_measures_under_torchrun(tmp_path):
    output = tmp_path / "measured.json"
    command = "-m torch.distributed.run --standalone --nproc_per_node=2 scripts/scaling.py --measure --rounds 1"
    result = subprocess.run(
        [sys.executable, *command.split(), "--model", "test_resnet", "--batch", "2", "--output", output],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert found["gradient_bytes"] == traffic(scaling.build("test_resnet"), 64).gradients
    assert {len(values) for values in found["seconds"].values()} == {1}
    assert min(value for values in found["seconds"].values() for value in values) > 0
    assert found["bandwidth"] > 0
    assert found["predicted"]["together"] <= found["predicted"]["together_without_overlap"] * (1 + 1e-9)
    assert scaling.measured(found).strip() == result.stdout.strip()


def test_the_page_is_current():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    sections = scaling.sections()
    assert update_readme.refresh(page, sections) == page
    stale = page.replace("95.5", "94.5")
    assert stale != page
    assert update_readme.refresh(stale, sections) == page
    with pytest.raises(InputError, match="scaling-networks:begin"):
        update_readme.refresh("nothing", sections)


def test_the_pages_name_what_exists():
    for page in ("scaling.md", "clusters.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name in set(re.findall(r"configs/[\w/*]+\.yaml", text)):
            assert list(ROOT.glob(name)), name
        for name in set(re.findall(r"(?<![\w/.])(?:scripts/launch/)?\w+\.(?:sbatch|sh|py)\b", text)):
            assert list(ROOT.rglob(name)) or name == "lars_util.py", name


# ---- the recipes of 32,768 images a step ----

LARGE = sorted((ROOT / "configs" / "imagenet").glob("*32k.yaml"))


def test_every_large_recipe_is_here():
    names = {f"{model}_{name}32k" for model in ("resnet50", "lip_resnet50") for name in ("lamb", "lars")}
    assert {path.stem for path in LARGE} == names


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_large_recipe_takes_its_optimizer_s_steps(path):
    """Three steps of the recipe's optimizer, two parts each, on noise: what moves, and by how much.

    In the first step, LAMB moves a weight tensor by lr |w|, whatever its gradient; LARS by at most 0.001 lr |w|, and by
    nearly that where decay is small beside the gradient. Norms and biases take Adam's or SGD's own step.
    """
    small = ["data.name=synthetic", "data.batch_size=8", "data.images=24", "data.workers=0", "data.size=32"]
    small += ["data.eval_size=32", "data.eval_resize=32", "train.precision=float32", "train.log_every=1"]
    config = load_config(path, [*small, "model.num_classes=1000", "optim.warmup_epochs=1"])
    torch.manual_seed(0)
    model = timm.create_model(config.model.name)
    initialize(model)
    state = build_state(model, config, torch.device("cpu"))
    source, _ = build_sources(config.data, config.model.num_classes)
    loader = TrainLoader(source, config.data, config.optim.accumulate, 0)
    assert len(loader) == 3
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved: list[dict[str, float]] = []
    losses = []

    def on_step() -> bool:
        if not moved:
            moved.append({name: (p.detach() - before[name]).norm().item() for name, p in model.named_parameters()})
        return False

    train_one_epoch(state, loader, config, on_step=on_step, on_log=lambda values: losses.append(values["train/loss"]))
    assert len(losses) == 3
    assert all(0 < loss < 2 * math.log(1000) for loss in losses)
    assert all(parameter.isfinite().all() for parameter in model.parameters())

    rate = config.optim.lr / 3  # of the first of three steps of warm-up
    weights = {name: value.norm().item() for name, value in before.items() if value.dim() >= 2}
    shares = [moved[0][name] / (rate * norm) for name, norm in weights.items() if norm]
    if config.optim.name == "lamb":
        assert shares == pytest.approx([1.0] * len(shares), rel=1e-3)
        for name, value in before.items():
            if value.dim() < 2:  # Adam's first step: the rate in every element whose gradient is not tiny
                assert moved[0][name] <= rate * math.sqrt(value.numel()) * 1.001
    else:
        assert max(shares) <= 0.001 * 1.001
        assert max(shares) >= 0.001 * 0.9
    decaying = [group for group in state.optimizer.param_groups if group["weight_decay"]]
    assert {p.dim() >= 2 for group in decaying for p in group["params"]} == {True}
    assert sum(len(group["params"]) for group in decaying) == len(weights)


def test_lars_step_by_hand():
    """timm's LARS as the recipe asks for it: v = ratio (g + decay w), w -= lr v; a bias takes plain momentum."""
    config = load_config(ROOT / "configs" / "imagenet" / "resnet50_lars32k.yaml").optim
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.bias.fill_(2.0)
    optimizer = build_optimizer(layer, config)
    w, b, v, u = torch.tensor([[3.0, 4.0]], dtype=torch.float64), 2.0, 0.0, 0.0
    for gradient, bias in ((torch.tensor([[0.6, 0.8]], dtype=torch.float64), 0.5), (torch.tensor([[1.0, 0.0]]), -0.25)):
        layer.weight.grad, layer.bias.grad = gradient.float(), torch.tensor([bias])
        optimizer.step()
        ratio = 0.001 * w.norm() / (gradient.norm() + 1e-4 * w.norm())
        v = 0.9 * v + ratio * (gradient + 1e-4 * w)
        w = w - 29 * v
        u = 0.9 * u + bias
        b -= 29 * u
        torch.testing.assert_close(layer.weight.detach().double(), w.double(), rtol=1e-5, atol=0)
        assert layer.bias.item() == pytest.approx(b, rel=1e-5)
