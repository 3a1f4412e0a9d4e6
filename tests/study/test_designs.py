"""Designs of studies: refusals of unfair ones, and folders that hold another study."""

import pytest
from helpers.studies import STUDY, write

from lip_resnet.config import InputError
from lip_resnet.study import cells, design

REFUSED = {
    "unknown key": ({"seedz": [1]}, r"seedz: unknown key; did you mean seeds"),
    "baseline": ({"baseline": "plane"}, r"baseline 'plane' is not a variant; did you mean plain\?"),
    "itself": ({"primary": "plain"}, r"baseline and primary are both 'plain'"),
    "seed twice": ({"seeds": [0, 1, 0]}, r"seeds \[0, 1, 0\]: 0 is there twice"),
    "other data": (
        {"variants": {**STUDY["variants"], "lip": {"data": {"name": "synthetic"}}}},
        r"variant lip differs from plain in data.name: synthetic against digits; all variants have the same images",
    ),
    "other classes": (
        {"variants": {**STUDY["variants"], "lip": {"model": {"num_classes": 20}}}},
        r"model.num_classes: 20 against 10",
    ),
    "other recipe": (
        {"variants": {**STUDY["variants"], "lip": {"optim": {"lr": 0.1}}}},
        r"variant lip differs from plain in optim.lr: 0.1 against 0.05; only model may differ",
    ),
    "same recipe": ({"variants": {**STUDY["variants"], "lip": {}}}, r"variants plain and lip have the same recipe"),
    "no folder": ({"variants": {**STUDY["variants"], "../lip": {}}}, r"'../lip' names a folder"),
    "spaces": ({"variants": {**STUDY["variants"], "my lip": {}}}, r"'my lip' names a folder: letters, digits and _"),
    "no name": ({"variants": {**STUDY["variants"], "": {}}}, r"'' names a folder"),
    "a file of the study": ({"variants": {**STUDY["variants"], "Figures": {}}}, r"'Figures' .* but not figures, study"),
    "a seed of a variant": (
        {"variants": {**STUDY["variants"], "lip": {"train": {"seed": 3}}}},
        r"train\.seed is given; a study's seeds are the list under seeds",
    ),
    "a seed of all": ({"recipe": {"train": {"seed": 3}}}, r"train\.seed is given"),
    "unknown model key": (
        {"variants": {**STUDY["variants"], "lip": {"model": {"nmae": "x"}}}},
        r"variant lip of .*resnet50.yaml: model.nmae: unknown key",
    ),
    "may_differ": ({"may_differ": ["train.epoch"]}, r"may_differ: 'train.epoch' is not a key.*train.epochs"),
    "may_differ in data": ({"may_differ": ["data.root"]}, r"may_differ: 'data.root' is the same in every variant"),
    "another evaluation": ({"may_differ": ["data.eval_size"]}, r"may_differ: 'data.eval_size' is the same in every"),
    "no seeds": ({"seeds": []}, r"seeds: given \[\]"),
    "a list of variants": ({"variants": ["plain"]}, r"variants: given \['plain'\]"),
}


@pytest.mark.parametrize(("changes", "line"), REFUSED.values(), ids=REFUSED)
def test_unfair_designs_are_refused(tmp_path, changes, line):
    with pytest.raises(InputError, match=line) as refused:
        design.load_design(write(tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_a_design_is_resolved(tmp_path):
    longer = {**STUDY["variants"], "long": {"train": {"epochs": 11}}}
    path = write(tmp_path, variants=longer, may_differ=["train.epochs"], recipe={"train": {"eval_every": 3}})
    study = design.load_design(path, ["optim.lr=0.2", "study.seeds=[4, 5]"], tmp_path / "out")
    with pytest.raises(InputError, match=r"train\.seed is given"):
        design.load_design(path, ["train.seed=3"])
    assert {recipe.optim.lr for recipe in study.recipes.values()} == {0.2}
    assert {recipe.train.eval_every for recipe in study.recipes.values()} == {3}
    assert study.recipes["long"].train.epochs == 11
    assert study.compared == ["lip", "average", "long"]
    assert [str(cell) for cell in study.cells()][:5] == [
        *("plain/seed4", "lip/seed4", "average/seed4", "long/seed4", "plain/seed5"),
    ]


def test_a_study_is_named_by_its_file_or_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies" / "digits").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    assert str(design.default_folder("mine")) == "mine"
    assert str(design.default_folder("own_images")) == "runs/studies/own_images"  # shipped, by its name alone
    assert design.load_design("own_images", ["model.num_classes=2"]).study.primary == "lip_resnet18"
    with pytest.raises(InputError, match=r"own_image: no such study file; shipped studies: .*, digits, .*, own_images"):
        design.load_design("own_image")
    assert str(design.default_folder("studies/digits")) == "runs/studies/digits"  # shipped, whatever lies here
    assert str(design.default_folder("mine.yaml")) == "runs/studies/mine"


def test_another_study_is_not_continued(tmp_path):
    folder = tmp_path / "out"
    design.write_design(design.load_design(write(tmp_path), output=folder))
    design.write_design(design.load_design(write(tmp_path, seeds=[0, 1, 2, 3, 4, 5]), output=folder))  # more seeds
    before = (folder / "study.yaml").read_bytes()
    fewer = {name: STUDY["variants"][name] for name in ("plain", "lip")}
    with pytest.raises(InputError, match="holds this study with seed 3, which is not here; a study may grow, not"):
        design.write_design(design.load_design(write(tmp_path), output=folder))
    with pytest.raises(InputError, match="with variant average, which"):
        design.write_design(design.load_design(write(tmp_path, variants=fewer, seeds=range(6)), output=folder))
    with pytest.raises(
        InputError, match="lip, here average; choose another folder, or remove it: none of its cells has"
    ):
        design.write_design(design.load_design(write(tmp_path, primary="average"), output=folder))
    (folder / "lip" / "seed1").mkdir()
    with pytest.raises(InputError, match=r"optim\.lr=0\.05 there, 0\.2 here; choose another folder$"):
        design.write_design(design.load_design(write(tmp_path), ["optim.lr=0.2"], folder))
    assert (folder / "study.yaml").read_bytes() == before
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.txt").touch()
    with pytest.raises(InputError, match="exists and is not a study"):
        design.write_design(design.load_design(write(tmp_path), output=tmp_path / "files"))


def test_a_study_that_is_killed_while_it_begins_goes_on(tmp_path, monkeypatch):
    study, write_text = design.load_design(write(tmp_path), output=tmp_path / "out"), design.write_text

    def write_one(path, text):
        monkeypatch.setattr(design, "write_text", stop)
        write_text(path, text)

    def stop(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(design, "write_text", write_one)
    with pytest.raises(KeyboardInterrupt):
        design.write_design(study)
    monkeypatch.setattr(design, "write_text", write_text)
    design.write_design(study)
    assert all((study.folder / name / "recipe.yaml").is_file() for name in study.recipes)


def test_a_study_file_in_its_own_output_is_not_overwritten(tmp_path):
    path = write(tmp_path)
    before = path.read_text()
    study = design.load_design(path, output=tmp_path)
    with pytest.raises(InputError, match="is not the record of a study that was run"):
        design.write_design(study)
    assert path.read_text() == before


def test_a_base_without_its_sections(tmp_path):
    (tmp_path / "base.yaml").write_text("model:\n")
    with pytest.raises(InputError, match="data: missing; this key is required"):
        design.load_design(write(tmp_path, base=str(tmp_path / "base.yaml"), recipe={"model": {"num_classes": 10}}))


def test_shipped_studies_are_valid():
    paths = sorted((cells.ROOT / "configs" / "studies").glob("*.yaml"))
    assert len(paths) >= 8
    for path in paths:
        study = design.load_design(path)
        assert len(study.study.seeds) >= (3 if study.detection else design.CONFIRMATORY_SEEDS)
