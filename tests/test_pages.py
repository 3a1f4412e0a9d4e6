"""README and pages: files and keys they name exist, Python blocks run, links have targets, generated parts match."""

import re
import subprocess

import draw_operator
import make_docs
import pytest
import timm
import torch
import yaml
from helpers import ROOT

import lip_resnet.data
from lip_resnet.config import Config, DetectionConfig, InputError
from lip_resnet.recipe import load_recipe
from lip_resnet.study.design import load_design

NAMES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md")
PAGES = [ROOT / name for name in NAMES] + sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
ALL = "\n".join(TEXTS.values())


def test_readme_is_short_and_leaves_nothing_open():
    text = TEXTS["README.md"]
    assert len(text.encode()) <= 9216
    assert not re.search(r"not (yet )?measured|means nothing|not yet", text)


def test_generated_parts_are_current():
    """All but docs/paper.md, which counts every network: scripts/test_reproduce_paper.py::test_report compares it."""
    for name in make_docs.PAGES.keys() - {"docs/paper.md"}:
        assert make_docs.refresh(TEXTS[name], make_docs.PAGES[name]) == TEXTS[name], name
    assert make_docs.FIGURE.read_text(encoding="utf-8") == draw_operator.draw()


def test_figures_of_studies_are_current():
    """Their texts: the lines themselves differ between versions of matplotlib."""
    drawn = make_docs.study_figures()
    assert set((make_docs.FIGURES / "studies").glob("*.svg")) == drawn.keys()
    for path, svg in drawn.items():
        written, now = (re.findall(r"<text[^>]*>([^<]*)<", text) for text in (path.read_text(encoding="utf-8"), svg))
        assert written == now, path.name


def test_picture_agrees_with_the_formula():
    values = re.findall(r'class="middle bold">([\d.]+)</text>', draw_operator.draw())
    features = [x for row in draw_operator.FEATURES for x in row]
    weights = [2.718281828**z for row in draw_operator.LOGITS for z in row]
    lip = sum(w * x for w, x in zip(weights, features, strict=True)) / sum(weights)
    assert values == [f"{sum(features) / 9:.1f}", f"{max(features):.1f}", f"{lip:.1f}"]


def test_a_stale_part_is_refreshed():
    page = TEXTS["docs/layers.md"]
    stale = page.replace("| `softpool` ", "| `hardpool` ")
    assert stale != page
    assert make_docs.refresh(stale, make_docs.PAGES["docs/layers.md"]) == page
    with pytest.raises(InputError, match="zoo:begin"):
        make_docs.refresh("nothing", make_docs.PAGES["docs/layers.md"])


def test_python_blocks_run():
    (block,) = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)
    values: dict = {}
    exec(compile(block, "README.md", "exec"), values)
    assert values["logits"].shape == (2, 10)
    assert values["y"].shape == values["pool"](values["x"]).shape == (2, 64, 28, 28)
    torch.testing.assert_close(values["y"], lip_resnet.make_layer("softpool", 64)(values["x"]))
    blocks = re.findall(r"```python\n(.*?)```", TEXTS["docs/layers.md"], re.DOTALL)
    values = {}
    for block in blocks:
        exec(compile(block, "docs/layers.md", "exec"), values)
    assert values["report"].swapped
    assert values["y"].shape == values["pool"](values["x"]).shape == (2, 256, 7, 7)
    (block,) = re.findall(r"```python\n(.*?)```", TEXTS["docs/insight.md"], re.DOTALL)
    values = {}
    exec(compile(block, "docs/insight.md", "exec"), values)
    assert values["maps"].relative_weight.shape == (2, 1, 4, 6)
    (block,) = re.findall(r"```python\n(.*?)```", TEXTS["docs/api.md"], re.DOTALL)
    values = {}
    exec(compile(block.replace('"digits"', '"synthetic", images=64'), "docs/api.md", "exec"), values)
    assert values["x"].shape == (64, 3, 32, 32)
    assert values["x"].dtype == torch.float32


def test_links_have_targets():
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
            target = target[0] or target[1]
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            page = (ROOT / name).parent / path if path else ROOT / name
            assert page.exists(), f"{name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{name}: {target}"


def test_every_page_is_in_the_site_and_in_the_readme():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name in text
        assert path.name == "index.md" or f"docs/{path.name}" in TEXTS["README.md"], path.name


def test_recipes_scripts_and_targets_exist():
    for name in set(re.findall(r"configs/[\w/]+\.yaml", ALL)) - {"configs/zoo/resnet50_NAME.yaml"}:
        (load_design if "/studies/" in name else load_recipe)(ROOT / name)
    for name in set(re.findall(r"scripts/\w+\.(?:py|sh|sbatch|yaml)\b", ALL)):
        assert (ROOT / name).is_file(), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = set(re.findall(r"^    make ([a-z-]+)|`make ([a-z-]+)`", ALL, re.MULTILINE))
    assert {first or second for first, second in commands} - {"train-lip_resnet50", "val-lip_resnet50"} <= targets


def test_the_tree_names_every_module():
    tree = TEXTS["docs/architecture.md"].partition("## The tree")[2].partition("\n## ")[0]
    parts = re.split(r"^ {4,}(\w+)/\s", tree, flags=re.MULTILINE)
    named = dict(zip(parts[1::2], parts[2::2], strict=True))
    folders = [ROOT / "scripts", *(path.parent for path in (ROOT / "lip_resnet").glob("**/__init__.py"))]
    for folder in folders:
        if folder.name in named:  # all but folders in folders, such as data/sources
            modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
            assert modules <= set(re.findall(r"\w+", named[folder.name])), folder


def test_commands_give_what_their_script_needs():
    """Flags and positional arguments of commands in the pages, by the source of the script itself."""
    helpers = {"benchmark": "bench/*.py", "benchmark_gpu": "bench/stages.py"}
    for script, arguments in re.findall(
        r"^ {4}python scripts/(\w+)\.py( .*)?$", ALL.replace("\\\n", " "), re.MULTILINE
    ):
        paths = [ROOT / "scripts" / f"{script}.py", *(ROOT / "scripts").glob(helpers.get(script, "no"))]
        code = "\n".join(path.read_text(encoding="utf-8") for path in paths)
        given = arguments.partition(" # ")[0].replace("[", " ").replace("]", " ").split()
        assert all(f'"{flag}"' in code for flag in given if flag.startswith("--")), (script, given)
        if re.search(r'(\.add_argument|(?<![.\w])add)\(\s*"\w', code):
            assert given, f"{script}.py needs an argument"
            assert not given[0].startswith("--"), f"{script}.py: give its argument before the flags"


def test_flags_in_commands_exist():
    folders = ("scripts", "lip_resnet", "tests/faults")
    sources = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    commands = re.findall(r"\b\w+\.py( .*)$", ALL.replace("\\\n", " "), re.MULTILINE)
    flags = {flag for command in commands for flag in re.findall(r"(?<=\s)--[a-z-]+", command.partition("`")[0])}
    assert {"--config", "--checkpoint", "--wide", "--archives"} <= flags
    assert not {flag for flag in flags - {"--help"} if f'"{flag}"' not in code}


def test_every_protocol_has_a_line():
    for text in (TEXTS["configs/README.md"], TEXTS["docs/recipes.md"]):
        for folder in (path.name for path in (ROOT / "configs").iterdir() if path.is_dir()):
            assert f"{folder}/" in text
        for path in (ROOT / "configs" / "imagenet").glob("*.yaml"):
            assert path.stem.rpartition("_")[2].rstrip("0123456789k")[:4] in text, path.name


def test_recipe_keys_and_models_named_exist():
    schemas = [Config.model_fields, DetectionConfig.model_fields]
    sections = {
        name: {key for schema in schemas for key in schema[name].annotation.model_fields}
        for name in ("model", "data", "optim", "train")
    }
    for section, key in set(re.findall(r"[\s`](model|data|optim|train)\.(?!py\b)([a-z]\w*)[=`:]", ALL)):
        if (section, key) != ("model", "safetensors"):
            assert key in sections[section] or hasattr(lip_resnet.data, key), f"{section}.{key}"
    for name in set(re.findall(r"\blip_(?:resnet|densenet)\d+\b", ALL)):
        assert timm.is_model(name), name
    assert all(hasattr(lip_resnet, name) for name in re.findall(r"\blip_resnet\.(make_\w+|lip2d|load_\w+)\(", ALL))


def test_make_help_lists_every_target():
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert [line.split()[0] for line in shown.splitlines()] == phony


def test_workflows_run_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        runs = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
        named = {name for run in runs for name in re.findall(r"^make ([a-z-]+)$", run)}
        for job in jobs.values():
            named |= set(job.get("strategy", {}).get("matrix", {}).get("target", []))
        assert named
        assert named <= targets, path.name


def test_scaling_is_short():
    assert (ROOT / "docs" / "scaling.md").stat().st_size <= 4096
