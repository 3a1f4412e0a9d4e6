"""Regenerate the generated parts of README.md and docs/:  python scripts/make_docs.py

A generated part is between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

import json
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import draw_operator
import torch
from bench import tables
from reproduce_paper import count_networks

from lip_resnet import cli
from lip_resnet.config import Config, DetectionConfig, DetectorConfig, Effect, InputError
from lip_resnet.config.recipe import effects_of
from lip_resnet.evaluation.baselines import load_baselines
from lip_resnet.evaluation.cost import count_parameters, macs_of_map
from lip_resnet.evaluation.paper import load_paper, render_table
from lip_resnet.evaluation.render import render
from lip_resnet.files import write_text
from lip_resnet.layers.downsampling import DOWNSAMPLING, make_layer
from lip_resnet.study import summary

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
FIGURE = FIGURES / "operator.svg"
STUDIES = ROOT / "results" / "studies"
ORDER = ("tiny_imagenet_100", "digit_scenes", "bccd", "cifar10", "digits")
"""Studies that docs/results.md and the README show first."""

SITES_OF_RESNET50 = {"stem": [(64, 112)], "main": [(128, 56), (256, 28), (512, 14)]}
"""Channels and height = width of the maps that layers after ResNet-50's strided convolutions read, at 224 pixels."""


def layers() -> str:
    """The downsampling layers that a recipe can choose, one line each."""
    rows = [[f"`{name}`", layer.summary, layer.source] for name, layer in DOWNSAMPLING.items()]
    return render(["layer", "what it does", "source"], rows)


def criteria() -> str:
    """The paper's questions to every layer, answered by its Jacobian on two random maps in float64.

    A position counts if a change of it changes the result; a layer weighs by content if its Jacobians differ.
    """
    rows = []
    for name in DOWNSAMPLING:
        torch.manual_seed(0)
        layer = make_layer(name, 4).double().eval()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        maps = torch.randn(2, 1, 4, 9, 9, dtype=torch.float64)
        jacobians = [torch.autograd.functional.jacobian(layer, each) for each in maps]
        dropped = any(not jacobian.abs().sum((0, 1, 2, 3)).all() for jacobian in jacobians)
        by_content = not torch.allclose(*jacobians, rtol=0, atol=1e-9)
        learnt = any(True for _ in layer.parameters())
        rows.append([f"`{name}`", *("yes" if answer else "no" for answer in (not dropped, by_content, learnt))])
    return render(["layer", "every position counts", "weighs by content", "learnt"], rows)


def layer_costs() -> str:
    """Parameters and multiply-adds of every layer at ResNet-50's sites, with what was published and the pitfalls."""
    rows = []
    for name, layer in DOWNSAMPLING.items():
        cells = []
        for site in SITES_OF_RESNET50.values():
            built = [(make_layer(name, channels, device="meta").eval(), channels, side) for channels, side in site]
            parameters = sum(count_parameters(module) for module, _, _ in built)
            macs = sum(macs_of_map(module, channels, side) for module, channels, side in built)
            cells += [f"{parameters:,}", f"{macs / 1e6:,.1f}"]
        rows.append([f"`{name}`", *cells, layer.published, layer.pitfalls])
    header = ["layer", "stem: parameters", "MACs (M)", "main, 3 stages: parameters", "MACs (M)"]
    return render([*header, "published (top-1 on ImageNet, %)", "pitfalls"], rows)


def paper() -> str:
    """The paper's networks: parameters and multiply-adds counted by this code, beside the published figures."""
    figures = load_paper()
    return render_table(figures, count_networks(figures), [])


def networks() -> str:
    """The paper's networks with their sizes and published accuracies."""
    header = ["`model.name`", "params (M)", "MACs (G)", "top-1 / top-5 (%)"]
    lines = []
    for row in load_paper().rows:
        if row.published is None or row.published.top5 is None:
            continue
        published = f"{row.published.top1:.2f} / {row.published.top5:.2f}"
        counts = f"{row.params.value / 1e6:.2f}", f"{row.macs.value:.2f}"
        lines.append([f"`{row.model}`", *counts, published])
    return render(header, lines)


def baselines() -> str:
    """What is known of the accuracy of the shipped recipes without LIP."""
    lines = ["| recipe | healthy top-1 (%) | images | figures |", "|---|---|--:|---|"]
    for name, baseline in load_baselines().items():
        low, high = baseline.range
        figures = "; ".join(f"{figure.top1:.2f} {figure.source} ({figure.kind})" for figure in baseline.figures)
        lines.append(f"| `{name}` | {low:.2f} to {high:.2f} | {baseline.images:,} | {figures} |")
    return "\n".join(lines)


def bad_images() -> str:
    """The outcome for each kind of broken or unusual image."""
    text = (ROOT / "results" / "bad_images.jsonl").read_text(encoding="utf-8")
    rows = [list(json.loads(line).values()) for line in text.splitlines()]
    return render(["a file named .JPEG that is", "training, `exact`", "training, `fast`", "validation"], rows)


def faults() -> str:
    """The faults injected by ``make faults`` and what became of the runs and files."""
    record = json.loads((ROOT / "results" / "faults.json").read_text(encoding="utf-8"))
    environment, reference, rows = record["environment"], record["reference"], record["faults"]
    runs, files = [], []
    for fault, row in rows.items():
        counts = ", ".join(f"{name} {count}" for name, count in (row.get("phases") or row["became"]).items())
        holds = "yes" if row["holds"] else "**no**"
        if "times" in row:
            recomputed = f"{row['recomputed']['median']:g}, {row['recomputed']['most']}"
            equal = f"{row['equal']} of {row['times']}"
            runs.append([fault, f"{row['times']}", counts, recomputed, f"{row['lost']}", equal, holds])
        else:
            memory = f"+{row['memory_mb']} MB"
            files.append([fault, f"{row['cases']}", counts, f"{row['failed']}", memory, holds])
    header = ["fault", "times", "when it hit", "steps recomputed: median, most", "files lost", "same end (sha256)"]
    return (
        f"{environment['hardware']}, torch {environment['torch']}, Python {environment['python']}; "
        f"commit {environment['git_commit'][:12]}. The uninterrupted run ends in `{reference['plain'][:16]}`, with a "
        f"log line every 4 steps in `{reference['sparse'][:16]}`, of two processes in `{reference['pair'][:16]}`.\n\n"
        + render([*header, "holds"], runs)
        + "\n"
        + render(["file", "cases", "what became of them", "tracebacks or wrong loads", "most memory", "holds"], files)
    )


def map_probes() -> str:
    """What the probes deletion and localisation have measured of one network, with 95% intervals over the images."""
    folder = ROOT / "results" / "probes"
    rows = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("deletion", "localisation")
    }
    deletion, localisation = rows["deletion"]["deletion"], rows["localisation"]["localisation"]

    def cell(measured: dict[str, Any], key: str, interval: str) -> str:
        if key not in measured:
            return "-"
        low, high = measured[interval]
        return f"{measured[key]:.1f} ({low:.1f} to {high:.1f})"

    header = ["map", "deletion: area (%)", "energy in the box (%)", "pointing game (%)"]
    lines = []
    for name in ("importance", "mirrored", "edges", "Grad-CAM", "random", "chance"):
        inside = localisation.get(name, {})
        cells = (cell(inside, key, f"{key}_interval") for key in ("energy", "pointing"))
        lines.append([name, cell(deletion.get(name, {}), "auc", "interval"), *cells])
    for name, inside in localisation.items():
        if name.startswith("site "):
            cells = (cell(inside, key, f"{key}_interval") for key in ("energy", "pointing"))
            lines.append([f"`{name.removeprefix('site ')}` alone", "-", *cells])
    row, less = rows["localisation"], rows["localisation"]["importance_less"]
    counts = f"{rows['deletion']['images']:,} images for deletion, {row['images']:,} for localisation"
    paired = [f"{name} {cell(less[name], 'energy', 'energy_interval')}" for name in ("chance", "mirrored")]
    machine = (
        f"{row['environment']['hardware']}, torch {row['environment']['torch']}, {row['environment']['date'][:10]}"
    )
    commands = "; ".join(f"`{shlex.join(each['environment']['command'])}`" for each in rows.values())
    return (
        f"{render(header, lines)}\n{row['model']}, step {row['step']}, seed {row['seed']}; {counts}. Energy of the "
        f"importance less that of: {', '.join(paired)}, paired by image. {machine}; {commands}"
    )


def recipe_keys() -> str:
    """Every key of a recipe of classification: its type, default, docstring and effect."""
    effects = "\n".join(f"- *{effect.name.lower()}*: {effect.value}" for effect in Effect)
    parts = [f"The last column says what another value changes.\n\n{effects}"]
    return "\n\n".join(parts + [_keys(name, field.annotation) for name, field in Config.model_fields.items()])


def detection_keys() -> str:
    """The keys of a recipe of detection that one of classification does not have."""
    fields = DetectionConfig.model_fields
    backbone = _keys("model.backbone", DetectorConfig.model_fields["backbone"].annotation)
    return "\n\n".join([_keys("model", fields["model"].annotation), backbone, _keys("data", fields["data"].annotation)])


def _keys(section: str, model: Any) -> str:
    """The table of a section's keys, without those of sections in it."""
    schema, effects = model.model_json_schema()["properties"], effects_of(model)
    header = ["key", "values", "default", "meaning", "changes"]
    lines = []
    for key, about in model.model_fields.items():
        if key in effects:
            default = "required" if about.is_required() else f"`{_yaml(about.get_default(call_default_factory=True))}`"
            meaning = " ".join(about.description.split())
            cells = [f"`{section}.{key}`", _values(schema[key]), default, meaning, effects[key].name.lower()]
            lines.append([cell.replace("|", "&#124;") for cell in cells])
    table = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines]]
    return "\n".join([f"### {section}", "", model.__doc__, "", *table])


def _yaml(value: Any) -> str:
    """A default value as YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, bool) or value is None or value == {}:
        return {True: "true", False: "false", None: "null"}.get(value if value != {} else "", "{}")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _values(schema: dict[str, Any]) -> str:
    """The allowed values of a key, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(_values(option) for option in schema["anyOf"])
    if "type" not in schema and "enum" not in schema:
        return "text or mapping"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    kind |= {"object": "mapping", "array": "list"}
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:,}".removesuffix(".0") for key, sign in limits.items() if key in schema]
    return " ".join([kind[schema["type"]], ", ".join(bounds)]).strip()


def exported() -> list[Path]:
    """The exported studies, the shipped ones in this order."""
    folders = {path.parent.name: path.parent for path in STUDIES.glob("*/cells.jsonl")}
    first = [folders.pop(name) for name in ORDER if name in folders]
    return [*first, *(folders[name] for name in sorted(folders))]


def study_results() -> str:
    """Every exported study, and the shipped ones without results but ``own_images``, which is for the reader's."""
    paths = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
    names = {path.stem: path for path in paths if path.stem != "own_images"}
    order = [*ORDER, *(name for name in names if name not in ORDER)]
    return summary.results_page(exported(), [names[name] for name in order], "figures/studies")


def first_study() -> str:
    """The first exported study in short."""
    folders = exported()
    return summary.small_table(folders[0]) if folders else "No study is finished."


def study_figures() -> dict[Path, str]:
    """Path -> SVG, of every exported study."""
    return {FIGURES / "studies" / name: svg for path in exported() for name, svg in summary.draw_figures(path).items()}


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"networks": networks, "study": first_study},
    "docs/results.md": {"results": study_results, "map-probes": map_probes},
    "docs/recipes.md": {"recipe-keys": recipe_keys, "baselines": baselines},
    "docs/detection.md": {"detection-keys": detection_keys},
    "docs/layers.md": {"zoo": layers},
    "docs/downsampling.md": {"criteria": criteria, "costs": layer_costs},
    "docs/paper.md": {"paper-report": paper},
    "docs/performance.md": {"performance": tables.performance},
    "docs/data.md": {"data": tables.loaders, "bad-images": bad_images},
    "docs/faults.md": {"faults": faults},
}


def refresh(text: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """``text`` with every generated part replaced by its generator's output.

    Raises:
        InputError: a part's markers are missing.
    """
    for name, generate in sections.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"the page needs the markers <!-- {name}:begin --> and <!-- {name}:end -->")
        body = generate().rstrip()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> None:
    cli.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, sections in PAGES.items():
        path = ROOT / name
        text = refresh(path.read_text(encoding="utf-8"), sections)
        write_text(path, text)
    write_text(FIGURE, draw_operator.draw())
    drawn = study_figures()
    (FIGURES / "studies").mkdir(exist_ok=True)
    for path in set((FIGURES / "studies").glob("*.svg")) - drawn.keys():
        path.unlink()
    for path, svg in drawn.items():
        write_text(path, svg)


if __name__ == "__main__":
    cli.launch(main)
