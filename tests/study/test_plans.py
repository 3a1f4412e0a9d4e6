"""What a study will show and cost: the plan, the measurement, and the command around them."""

import pytest
import study as command
from bench import costs
from helpers.commands import call, refuse
from helpers.studies import STUDY, write

from lip_resnet.study import design, plan


def test_a_plan_says_what_the_design_can_show(tmp_path):
    """Of three seeds, whose t has a critical value of 4.303: 3.26 deviations (noncentral t, by table); 2 / 2^3."""
    variants = {**STUDY["variants"], "max": {"model": {"downsampling": {"main": "max"}}}}
    study = design.load_design(write(tmp_path, variants=variants), output=tmp_path / "out")
    text = plan.describe(study, jobs=1, measure=False)
    assert "12 cells" in text
    assert "declared comparison: lip against plain, paired t over 3 seeds" in text
    (shown,) = (line for line in text.splitlines() if "with 80% power" in line)
    assert [float(value) for value in shown.split("|")[2:-1]] == pytest.approx([0.33, 0.65, 1.63, 3.26], abs=0.01)
    assert "sign-flip test with 3 seeds: 0.25; first of 2 others under Holm: 0.5\n" in text
    assert text.endswith("fewer than 5 seeds: every verdict will be marked exploratory")


def test_a_measurement_has_the_batch_of_the_recipe(tmp_path, monkeypatch):
    """64 images on two processes in two parts: steps of 16; the times are of one image."""
    path = write(tmp_path, processes=2, recipe={"optim": {"accumulate": 2}})
    study, batches = design.load_design(path, output=tmp_path / "out"), []

    def compare(names, prepare, options):
        for name in names:
            prepare(name)
        return {name: [0.032, 0.032, 0.032] for name in names}, {}

    monkeypatch.setattr(costs, "compare", compare)
    monkeypatch.setattr(costs, "_prepare", lambda recipe, make, batch, device: batches.append(batch))
    row = costs.measure(study, ["resnet18"], 3, None, "wall")
    assert (row["batch"], set(batches)) == (16, {16})
    assert row["training"]["resnet18"]["ms"] == pytest.approx(2.0)
    assert costs.summarize(study, row)[0].startswith("batches of 16 images on ")
    assert costs.measure(study, [], 3, 8, "wall")["batch"] == 8


def test_the_command(tmp_path, stand_ins, capsys, monkeypatch):
    """A finished study is reported at once; options of other actions are refused."""
    pytest.importorskip("matplotlib")
    path, folder = write(tmp_path, seeds=[0]), tmp_path / "out"
    code, out, _ = call(capsys, monkeypatch, command, "run", path, "--output", folder, "--shard", "0/2")
    assert (code, out) == (0, "")  # not all cells
    code, out, _ = call(capsys, monkeypatch, command, "run", path, "--output", folder)
    assert code == 0
    assert "**lip against plain: too few seeds to say**" in out
    assert str(folder / "report.html") in out
    for arguments, line in (
        (("report", folder, "--jobs", 2), "--jobs is of plan and run, not of report"),
        (("run", path, "--batch", 8), "--batch is of measure, not of run"),
        (("run", path, "--no-measure"), "--no-measure is of plan, not of run"),
        (("measure", path, "--batch", 0), "--batch is 0; it must be at least 1"),
        (("run", path, "--shard", "2/2"), "--shard '2/2'; it must be i/n with i from 0 to n - 1"),
    ):
        assert line in refuse(capsys, monkeypatch, command, *arguments)
