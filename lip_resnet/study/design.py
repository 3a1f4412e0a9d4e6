"""The design of a study: its variants, seeds and declared comparisons, checked before anything is trained.

A study's folder holds ``study.yaml`` (the design that was run), ``<variant>/recipe.yaml``, and for each seed
``<variant>/seed<k>/`` (a run folder with eval.json, and predictions.csv, or matches.npz of a detector),
``seed<k>.log`` and ``seed<k>.json``.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, JsonValue

from lip_resnet.config import DetectionConfig, Effect, InputError, Recipe, Section, effects_of
from lip_resnet.config.fields import Positive
from lip_resnet.files import write_text
from lip_resnet.recipe import apply_override, find_recipe, parse_recipe, parse_section, read_tree

CONFIRMATORY_SEEDS = 5
"""With fewer seeds every verdict is exploratory."""
SAME_IMAGES = (
    *("data.name", "data.root", "data.train", "data.val", "data.classes", "data.label_column", "data.images"),
    *("model.num_classes", "data.val_split", "data.val_annotations", "data.max_size"),
    *("data.eval_size", "data.eval_resize", "data.crop_mode", "data.interpolation", "data.mean", "data.std"),
)
"""Keys in which no two variants may differ: their predictions would be of other images or classes, or of images that
are evaluated in another way, which a report does not compare."""
EXPORTED_CELLS = "cells.jsonl"
"""In an exported study: one line a finished or failed cell, with its row and learning curve."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,60}")
_FILES = ("figures", "study.yaml", "costs.json", "report.md", "report.html", "report.csv", EXPORTED_CELLS)
"""Names in a study's folder that are no variant's."""

Fragment = dict[str, dict[str, JsonValue]]
"""Part of a recipe: section -> key -> value."""


class Study(Section):
    """A study file: one recipe, the variants of it, and what is compared."""

    question: str = ""
    """What the study asks, in one sentence; reports show it."""
    base: str
    """The recipe of every variant: a YAML file, or a shipped recipe by name."""
    recipe: Fragment = Field(default_factory=dict)
    """Keys of the base recipe that this study changes for every variant."""
    variants: dict[str, Fragment]
    """Name -> the keys in which this variant differs from the others, such as {model: {name: lip_resnet18}}."""
    baseline: str
    """The variant that all others are compared with."""
    primary: str
    """The variant whose difference to the baseline is the study's one declared question; the others are a family."""
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(strict=False, min_length=1, examples=[[0, 1, 2, 3, 4]])
    ]
    """Seeds of every variant; runs of one seed are compared in pairs."""
    may_differ: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Keys outside `model` in which variants may differ, such as train.epochs."""
    processes: Positive = 1
    """Processes of each run; torchrun starts them if there are several."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    variant: str
    seed: int
    folder: Path
    """Its run folder."""
    detection: bool = False
    """Whether it is a detector."""

    def __str__(self) -> str:
        return f"{self.variant}/seed{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether it is trained and evaluated."""
        return self.row.is_file() and self.predictions.is_file()

    @property
    def row(self) -> Path:
        """The row of its evaluation."""
        return self.folder / "eval.json"

    @property
    def predictions(self) -> Path:
        """Its predictions of every validation image, or the matches of a detector."""
        return self.folder / ("matches.npz" if self.detection else "predictions.csv")

    @property
    def record(self) -> Path:
        """Its status, seconds and last message, as JSON."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log(self) -> Path:
        """What its commands have printed."""
        return self.folder.with_name(f"{self.folder.name}.log")


@dataclass(frozen=True)
class Design:
    """A checked study."""

    study: Study
    recipes: dict[str, Recipe]
    """Variant -> its recipe; ``train.seed`` is the cell's."""
    folder: Path

    @property
    def detection(self) -> bool:
        """Whether its networks are detectors, which are compared by AP."""
        return isinstance(self.recipes[self.study.baseline], DetectionConfig)

    @property
    def exported(self) -> bool:
        """Whether the folder is the compact record of a study, as ``export`` writes it, and not its run folders."""
        return (self.folder / EXPORTED_CELLS).is_file()

    @property
    def compared(self) -> list[str]:
        """The variants but the baseline, the primary one first."""
        others = [name for name in self.recipes if name not in (self.study.baseline, self.study.primary)]
        return [self.study.primary, *others]

    def cells(self) -> list[Cell]:
        """All cells, seed by seed: a study that is cut short has whole pairs."""
        return [
            Cell(variant, seed, self.folder / variant / f"seed{seed}", self.detection)
            for seed in self.study.seeds
            for variant in self.recipes
        ]

    def dump(self) -> dict[str, Any]:
        """``study.yaml``: the study, with the recipe of every variant written out."""
        recipes = {name: recipe.model_dump(mode="json") for name, recipe in self.recipes.items()}
        return {**self.study.model_dump(mode="json"), "recipes": recipes}


def find_study(path: str | Path) -> Path:
    """The file or folder that ``path`` names, as ``find_recipe``; or the shipped study of that name, such as digits."""
    named, shipped = find_recipe(path), find_recipe(f"studies/{path}")
    return named if named.exists() or not shipped.is_file() else shipped


def default_folder(path: str | Path) -> Path:
    """The folder of a study file, runs/studies/<its name>; or ``path``, if it is a folder and no shipped study."""
    study = find_study(path)
    return Path(path) if study.is_dir() else Path("runs/studies") / study.stem


def load_design(path: str | Path, overrides: Sequence[str] = (), output: str | Path | None = None) -> Design:
    """Read and check a study file.

    Args:
        path: the study file, or a shipped study by name.
        overrides: ``section.key=value`` for the recipe of every variant, ``study.key=value`` for the study itself.
        output: the study's folder; by default ``default_folder``.

    Raises:
        InputError: one line: an unknown key, variants that may not be compared, a seed twice, a baseline that is no
            variant.
    """
    if not find_study(path).exists():
        shipped = ", ".join(sorted(each.stem for each in find_recipe("studies/digits").parent.glob("*.yaml")))
        raise InputError(f"{path}: no such study file; shipped studies: {shipped}")
    tree, source = read_tree(find_study(path))
    root = {"study": tree}
    for override in overrides:
        if override.startswith("study."):
            apply_override(root, override)
    study = parse_section(tree, source, Study)
    of_recipes = [override for override in overrides if not override.startswith("study.")]
    recipes = {name: _resolve(study, name, of_recipes, source) for name in study.variants}
    of_seeds = [study.recipe, *study.variants.values()]
    if any("seed" in part.get("train", {}) for part in of_seeds) or any(
        override.partition("=")[0] == "train.seed" for override in overrides
    ):
        raise InputError(f"{source}: train.seed is given; a study's seeds are the list under seeds (study.seeds=[0,1])")
    _check(study, recipes, source)
    return Design(study, recipes, Path(output) if output else default_folder(path))


def _resolve(study: Study, variant: str, overrides: Sequence[str], source: str) -> Recipe:
    """The recipe of a variant: the base, then the study's ``recipe``, the command line's overrides, its own keys."""
    if not _NAME.fullmatch(variant) or variant.lower() in _FILES:
        allowed = "letters, digits and _ . + - are allowed (at most 61, the first a letter or digit)"
        raise InputError(f"{source}: variants: {variant!r} names a folder: {allowed}, but not {', '.join(_FILES)}")
    tree, base = read_tree(study.base)
    _update(tree, study.recipe)
    for override in overrides:
        apply_override(tree, override)
    _update(tree, study.variants[variant])
    return parse_recipe(tree, f"{source}: variant {variant} of {base}")


def _update(tree: dict[str, Any], fragment: Fragment) -> None:
    for section, keys in fragment.items():
        before = tree.get(section, {})
        if isinstance(before, dict):  # else it is refused with the whole recipe
            tree[section] = {**before, **keys}
            ours, theirs = before.get("backbone"), keys.get("backbone")
            if isinstance(ours, dict) and isinstance(theirs, dict):  # a section of a detector's model
                tree[section]["backbone"] = {**ours, **theirs}


def _check(study: Study, recipes: Mapping[str, Recipe], source: str) -> None:
    """Refuse a study whose comparisons would not be fair or not be possible."""
    for key in ("baseline", "primary"):
        name = getattr(study, key)
        if name not in recipes:
            near = difflib.get_close_matches(name, recipes, n=1)
            hint = f"did you mean {near[0]}?" if near else f"variants: {', '.join(recipes)}"
            raise InputError(f"{source}: {key} {name!r} is not a variant; {hint}")
    if study.baseline == study.primary:
        raise InputError(f"{source}: baseline and primary are both {study.baseline!r}; they must be two variants")
    if twice := sorted({seed for seed in study.seeds if study.seeds.count(seed) > 1}):
        raise InputError(f"{source}: seeds {list(study.seeds)}: {twice[0]} is there twice; give each seed once")
    baseline = recipes[study.baseline]
    keys, network = list(effects_of(type(baseline))), "model."
    same = set(SAME_IMAGES)
    if isinstance(baseline, DetectionConfig):
        network, same = "model.backbone.", {*SAME_IMAGES, "data.size"}
    for key in study.may_differ:
        if key not in keys or key in same or key == "train.seed":
            near = difflib.get_close_matches(key, keys, n=1)
            why = "is not a key of a recipe" if key not in keys else "is the same in every variant of a study"
            raise InputError(f"{source}: may_differ: {key!r} {why}; nearest key: {near[0] if near else 'none'}")
    trees = {name: _flatten(recipe) for name, recipe in recipes.items()}
    ours = trees[study.baseline]
    for name, theirs in trees.items():
        for key, value in theirs.items():
            allowed = key in study.may_differ or (key.startswith(network) and key not in same)
            if value == ours[key] or allowed:
                continue
            what = f"{source}: variant {name} differs from {study.baseline} in {key}: {value} against {ours[key]}"
            raise InputError(
                f"{what}; all variants have the same images, classes and evaluation"
                if key in same
                else f"{what}; only {network[:-1]} may differ, and the keys that the study names under may_differ"
            )
    names = list(trees)
    for index, name in enumerate(names):
        for other in names[:index]:
            if trees[name] == trees[other]:
                raise InputError(f"{source}: variants {other} and {name} have the same recipe; give each once")


def _flatten(recipe: Recipe) -> dict[str, JsonValue]:
    """``section.key`` -> value, of every key but the seed."""
    values = {key: value for effect in Effect for key, value in recipe.values(effect).items()}
    return {key: values[key] for key in effects_of(type(recipe)) if key != "train.seed"}


def write_design(design: Design) -> None:
    """Write ``study.yaml`` and the variants' recipes; the folder may hold an earlier, smaller form of this study.

    Variants and seeds may be added, and none taken away. What decides a verdict is declared once: the baseline, the
    primary comparison and the recipes.

    Raises:
        InputError: the folder holds another study, or other files, or cannot be written.
    """
    folder, path = design.folder, design.folder / "study.yaml"
    # Looked at first: another shard may write study.yaml meanwhile, by way of a hidden file.
    occupied = folder.exists() and not (folder.is_dir() and all(each.name.startswith(".") for each in folder.iterdir()))
    if design.exported:
        raise InputError(f"--output {folder} is an exported study, which has no run folders; choose another")
    if path.is_file():
        earlier = load_record(folder)
        try:
            check_same(design, earlier, f"--output {folder}")
        except InputError as error:
            if any(cell.folder.exists() for cell in earlier.cells()):
                raise
            raise InputError(f"{error}, or remove it: none of its cells has begun") from error
        lacking = [f"variant {name}" for name in earlier.recipes if name not in design.recipes]
        lacking += [f"seed {seed}" for seed in earlier.study.seeds if seed not in design.study.seeds]
        if lacking:
            line = f"--output {folder} holds this study with {lacking[0]}, which is not here"
            raise InputError(f"{line}; a study may grow, not shrink: put it back, or choose another folder")
    elif occupied:
        raise InputError(f"--output {folder} exists and is not a study; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First: a folder without it is not a study, to the same command after a kill and to other shards.
        write_text(path, yaml.safe_dump(design.dump(), sort_keys=False))
        for name, recipe in design.recipes.items():
            (folder / name).mkdir(exist_ok=True)
            write_text(folder / name / "recipe.yaml", recipe.dump())
    except OSError as error:
        raise InputError(f"--output {folder}: cannot write there: {error.strerror}") from error


def load_record(folder: Path) -> Design:
    """The design that was run in a study's folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = folder / "study.yaml"
    if not path.is_file():
        raise InputError(f"{folder} holds no study; start it with: python scripts/study.py run STUDY.yaml")
    tree, source = read_tree(path)
    return parse_record(tree, source, folder)


def parse_record(tree: dict[str, Any], source: str, folder: Path) -> Design:
    """A design from what ``Design.dump`` has returned.

    Raises:
        InputError: it is something else.
    """
    trees = tree.pop("recipes", None)
    study = parse_section(tree, source, Study)
    if not isinstance(trees, dict) or not trees.keys() >= study.variants.keys():
        raise InputError(
            f"{source} is not the record of a study that was run: it lacks recipes; choose another --output"
        )
    return Design(study, {name: parse_recipe(trees[name], source) for name in study.variants}, folder)


def check_same(design: Design, other: Design, folder: str) -> None:
    """Refuse to go on with a study in the folder of another one.

    Args:
        folder: of ``other``, as a message names it.

    Raises:
        InputError: a baseline, primary comparison or recipe is not the same.
    """
    where = f"{folder} holds another study"
    for key in ("baseline", "primary", "processes"):
        ours, theirs = getattr(design.study, key), getattr(other.study, key)
        if ours != theirs:
            raise InputError(f"{where}: its {key} is {theirs}, here {ours}; choose another folder")
    for name in design.recipes.keys() & other.recipes.keys():
        for effect in (Effect.WEIGHTS, Effect.EVALUATION):
            ours, theirs = design.recipes[name].values(effect), other.recipes[name].values(effect)
            for key in ours:
                if ours[key] != theirs[key] and key != "train.seed":
                    raise InputError(
                        f"{where}: {name} has {key}={theirs[key]} there, {ours[key]} here; choose another folder"
                    )
