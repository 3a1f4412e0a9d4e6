"""Regenerate the generated parts of README.md and docs/:  python scripts/make_docs.py

A generated part is between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import draw_operator
from bench import tables
from reproduce_paper import count_networks

from lip_resnet import cli
from lip_resnet.config import EFFECTS, Config, Effect, InputError
from lip_resnet.evaluation.paper import load_paper, render_table
from lip_resnet.evaluation.render import render
from lip_resnet.files import write_text
from lip_resnet.layers.downsampling import DOWNSAMPLING

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "figures" / "operator.svg"


def layers() -> str:
    """The downsampling layers that a recipe can choose, one line each."""
    rows = [[f"`{name}`", layer.summary, layer.source] for name, layer in DOWNSAMPLING.items()]
    return render(["layer", "what it does", "source"], rows)


def paper() -> str:
    """The paper's networks: parameters and multiply-adds counted by this code, beside the published figures."""
    figures = load_paper()
    return render_table(figures, count_networks(figures), [])


def networks() -> str:
    """The paper's networks with their sizes and published accuracies."""
    header = ["network", "`model.name`", "parameters (M)", "MACs (G)", "published top-1 / top-5 (%)"]
    lines = []
    for row in load_paper().rows:
        if row.published is None or row.published.top5 is None:
            continue
        published = f"{row.published.top1:.2f} / {row.published.top5:.2f}"
        counts = f"{row.params.value / 1e6:.2f}", f"{row.macs.value:.2f}"
        lines.append([row.label, f"`{row.model}`", *counts, published])
    return render(header, lines)


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


def recipe_keys() -> str:
    """Every key of a recipe: its type, default, docstring and effect."""
    effects = "\n".join(f"- *{effect.name.lower()}*: {effect.value}" for effect in Effect)
    parts = [f"The last column says what another value changes.\n\n{effects}"]
    for section, field in Config.model_fields.items():
        model = field.annotation
        schema = model.model_json_schema()["properties"]
        header = ["key", "values", "default", "meaning", "changes"]
        lines = []
        for key, about in model.model_fields.items():
            default = "required" if about.is_required() else f"`{_yaml(about.get_default(call_default_factory=True))}`"
            meaning, effect = " ".join(about.description.split()), EFFECTS[f"{section}.{key}"]
            cells = [f"`{section}.{key}`", _values(schema[key]), default, meaning, effect.name.lower()]
            lines.append([cell.replace("|", "&#124;") for cell in cells])
        table = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines]]
        parts.append("\n".join([f"### {section}", "", model.__doc__, "", *table]))
    return "\n\n".join(parts)


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
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    kind |= {"object": "mapping", "array": "list"}
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:,}".removesuffix(".0") for key, sign in limits.items() if key in schema]
    return " ".join([kind[schema["type"]], ", ".join(bounds)]).strip()


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"networks": networks},
    "docs/recipes.md": {"recipe-keys": recipe_keys},
    "docs/layers.md": {"zoo": layers},
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


if __name__ == "__main__":
    cli.launch(main)
