"""Whether a run is healthy: the published figures of baselines.yaml, the recipes that quote them, and the verdict."""

import json
import re

import make_table
import pytest
from helpers import small_config
from helpers.commands import call
from helpers.training import run_train

from lip_resnet.config import Config
from lip_resnet.evaluation.baselines import Baseline, Figure, judge, load_baselines, row_of
from lip_resnet.evaluation.protocol import EvalConfig, describe_protocol, describe_training
from lip_resnet.recipe import load_config, load_recipe, shipped_recipes
from lip_resnet.training import classification

RECIPES = shipped_recipes()
CLASSIFIERS = [name for name, path in RECIPES.items() if isinstance(load_recipe(path), Config)]
BASELINES = {
    name: load_config(path)
    for name, path in RECIPES.items()
    if not name.startswith(("zoo/", "finetune/"))
    and not name.rpartition("/")[2].startswith("lip_")
    and name in CLASSIFIERS
}


def head_of(name: str) -> str:
    lines = [line for line in RECIPES[name].read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return " ".join(line.lstrip("# ") for line in lines)


def test_every_baseline_has_figures():
    """Another recipe that needs none must be named here."""
    assert load_baselines().keys() == BASELINES.keys()
    for name, baseline in load_baselines().items():
        low, high = baseline.range
        assert 0 < low < high < 100, name
        assert baseline.images == {"imagenet": 50000, "digits": 355}.get(name.partition("/")[0], baseline.images)


@pytest.mark.parametrize("name", RECIPES)
def test_heads_say_what_is_known(name):
    """A figure of the baseline with its source, and hours at a stated rate; each published, measured or predicted."""
    head = head_of(name)
    expected, cost = re.search(r"Expected: (.*) Cost: +(.*)$", head).groups()
    assert not re.search(r"not (yet )?(measured|trained|known)|measured yet", head)
    for part in (expected, cost):
        assert re.search(r"published|measured|predicted", part)
    if name not in CLASSIFIERS:
        return
    if not name.startswith("finetune/"):
        folder, stem = name.split("/")[0], name.rpartition("/")[2].removeprefix("lip_")
        own = load_baselines()["imagenet/resnet50_step90" if "/ablation/" in name or "zoo/" in name or "width" in stem
                               else f"{folder}/{stem}"]  # fmt: skip
        values = [figure.top1 for figure in own.figures]
        range_ = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
        assert re.search(rf"baseline (Res|Dense)Net-\d+ {re.escape(range_)}", expected), range_
    images = re.match(r"([\d.,]+)(M?) (?:images|photographs): ", cost)
    if images is None:
        assert re.match(r"one to two minutes on two CPU cores \(measured\)", cost)
        return
    hours, unit, rate = re.search(r"([\d.]+) (hours|minutes) on .* at ([\d,]+) images/s", cost).groups()
    config = load_config(RECIPES[name])
    count = float(images[1].replace(",", "")) * (1e6 if images[2] else 1)
    if name.startswith("imagenet/"):
        assert count == pytest.approx(config.train.epochs * 1281167, abs=5e5)
        count = config.train.epochs * 1281167
    elif name.startswith("finetune/"):
        count *= config.train.epochs
    seconds = float(hours) * (3600 if unit == "hours" else 60)
    assert seconds == pytest.approx(count / float(rate.replace(",", "")), rel=0.08), "hours = images / rate"


def row(name: str, top1: float, processes: int = 8, **changes: object) -> dict:
    """A row of eval.py of a recipe, through JSON."""
    config = load_config(
        RECIPES[name], [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    )
    training = describe_training(config, [processes])
    network = {"model": config.model.name, "args": config.model.args, "downsampling": config.model.downsampling}
    facts = {
        "images": 50000,
        "top1": top1,
        "top5": 93.0,
        "loss": 1.0,
        "params": 1,
        "macs": 1,
        "seed": config.train.seed,
    }
    facts |= {"weights": config.train.rules, "selected_on_val": False}
    return json.loads(
        json.dumps({**network, **facts, "protocol": describe_protocol(EvalConfig.from_recipe(config), training)})
    )


def test_verdicts_by_hand():
    """76.13 to 76.55, with 0.2 on both sides."""
    for top1, place in ((75.92, "below"), (75.93, "within"), (76.75, "within"), (76.76, "above")):
        line = judge(row("imagenet/resnet50_step90", top1))
        assert line.startswith(f"baseline imagenet/resnet50_step90: top-1 {top1:.2f} lies {place} 75.93 to 76.75, the ")
        assert "the published figures +- 0.2 (" in line
        assert "76.13 torchvision" in line
        assert ("docs/recipes.md" in line) == (place != "within")
        assert "\n" not in line
    figures = [Figure(top1=70.0, kind="predicted", source="x"), Figure(top1=72.5, kind="published", source="y")]
    assert Baseline(images=1, margin=0.5, figures=figures).range == (69.5, 73.0)


def test_what_is_judged():
    """Every baseline; on any number of processes, in any precision, from any source; nothing else."""
    step90 = "imagenet/resnet50_step90"
    for name, config in BASELINES.items():
        images = load_baselines()[name].images
        assert judge(row_of(config, images, 50.0)).startswith(f"baseline {name}: "), name
        assert judge(row_of(config, images + 1, 50.0)) is None
    same = [{"train__precision": "bfloat16", "train__compile": True}, {"data__decode": "fast"}, {"train__seed": 7}]
    for changes in (*same, {"data__name": "shards", "data__workers": 0}, {"optim__accumulate": 1}):
        assert judge(row(step90, 76.2, **changes)), changes
    assert judge(row(step90, 76.2, processes=1))
    others = [{"optim__lr": 0.2}, {"train__epochs": 91}, {"train__max_steps": 5}, {"data__eval_size": 192}]
    others += [{"model__downsampling": {"stem": "blur"}}, {"model__args": {"aa_layer": "blurpc"}}, {"data__size": 192}]
    for changes in (*others, {"model__weights": "x.pth"}, {"model__num_classes": 100}, {"train__ema_decay": 0.9}):
        assert judge(row(step90, 76.2, **changes)) is None, changes
    for name in ("imagenet/lip_resnet50_step90", "zoo/resnet50_blur"):
        assert judge(row(name, 76.2)) is None
    assert judge(row(step90, 76.2) | {"selected_on_val": True}) is None
    unknown = row(step90, 76.2)
    unknown["protocol"]["training"] = None
    assert judge(unknown) is None


def test_tables_say_it_once_for_all_seeds(capsys, monkeypatch, tmp_path):
    files = []
    for seed, top1 in enumerate((76.1, 76.3)):
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps(row("imagenet/resnet50_step90", top1, train__seed=seed) | {"seed": seed}))
    files.append(tmp_path / "lip.json")
    files[-1].write_text(json.dumps(row("imagenet/lip_resnet50_step90", 78.2)))
    _, out, _ = call(capsys, monkeypatch, make_table, *files)
    assert [line for line in out.splitlines() if line.startswith("baseline ")] == [
        judge(row("imagenet/resnet50_step90", 76.2))
    ]


def test_a_run_says_it_at_its_end(capsys, monkeypatch, tmp_path):
    """With its own validation and the number of its images; the small recipe here is no shipped one."""
    recipe = tmp_path / "small.yaml"
    config = small_config(train__epochs=1, data__name="synthetic", data__images=60, data__batch_size=30)
    recipe.write_text(config.dump())
    monkeypatch.setattr(classification, "judge", lambda row: f"judged {row['model']} {row['images']} {row['top1']:.3f}")
    run_train(monkeypatch, "--config", recipe, "--output", tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"judged test_resnet 6 {last['val/top1']:.3f}" in capsys.readouterr().err
