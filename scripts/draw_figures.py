"""Draw the figures of docs/gallery.md and README.md from results/:  python scripts/draw_figures.py

Each file holds the digest of what it was made of, and only figures that are not up to date are drawn. ``--maps
RUN_OR_FILE`` first computes the maps in results/importance/ again, with these weights.
"""

import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench.tables import read
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

import lip_resnet  # noqa: F401 (registers the LIP networks with timm)
from lip_resnet import checkpoint, cli
from lip_resnet.config import InputError
from lip_resnet.files import to_json, write_atomically
from lip_resnet.insight.importance import importance_maps
from lip_resnet.insight.pixels import pixel_importance, site_weights
from lip_resnet.models.registry import build_model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "figures"
RESULTS = ROOT / "results"
STYLE = ROOT / "lip_resnet" / "figures.mplstyle"
SIDE = 160
"""Pixels of the photograph's side as the network reads it."""
SITES = {"pool": "stem", "layer2.0.pool": "stage 2", "layer3.0.pool": "stage 3"}
"""Sites that are shown -> what they are called."""


class Drawing(NamedTuple):
    """A figure of the docs."""

    file: str
    alt: str
    """For who cannot see it: what is shown, and what follows from it."""
    inputs: tuple[Path, ...]
    paint: Callable[[], bytes]
    """The file's content: SVG or PNG."""

    @property
    def path(self) -> Path:
        return FOLDER / self.file

    def digest(self) -> str:
        """Of the inputs, the style and this script."""
        total = hashlib.sha256()
        for path in (*self.inputs, STYLE, Path(__file__)):
            total.update(path.read_bytes().replace(b"\r\n", b"\n"))
        return total.hexdigest()

    def is_current(self) -> bool:
        """Whether the file exists and was made of what is there now."""
        return self.path.is_file() and self.digest().encode() in self.path.read_bytes()

    def draw(self) -> None:
        """Write the file, with its alternative text and digest."""
        content, digest = self.paint(), self.digest()
        if self.file.endswith(".svg"):
            text = content.decode()
            opening = f'<svg role="img" aria-label="{self.alt}" data-source="{digest}" '
            content = text[text.index("<svg ") :].replace("<svg ", opening, 1).encode()
        else:
            content = shrink(content, {"Description": self.alt, "Source": digest})
        write_atomically(self.path, lambda file: file.write(content))


def shrink(png: bytes, texts: dict[str, str]) -> bytes:
    """A PNG with 255 colours and a transparent background, with texts."""
    image = Image.open(io.BytesIO(png)).quantize(255, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=info, optimize=True)
    return buffer.getvalue()


# ---- a photograph and its maps ----


def compute_maps(weights: str, photograph: Path) -> None:
    """Write the maps of a photograph beside it, as FILE.npz: ``SITES``, ``all sites``, and what they were made of."""
    payload = checkpoint.load(checkpoint.resolve(weights))
    config = checkpoint.read_recipe(payload, weights)
    if config is None:
        raise InputError(f"{weights}: weights without a recipe; --maps needs a checkpoint of train.py")
    model = build_model(config.model.model_copy(update={"weights": None}))
    model.load_state_dict(payload["model"])
    pixels = np.asarray(Image.open(photograph).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    scaling = {"mean": config.data.mean, "std": config.data.std}
    arrays = {
        each.name: each.relative_weight[0, 0] for each in importance_maps(model, images, sites=list(SITES), **scaling)
    }
    arrays["all sites"] = pixel_importance(site_weights(model, images, **scaling), (SIDE, SIDE))[0]
    about = {"model": config.model.name, "step": payload.get("step"), "recipe": config.model_dump(mode="json")}
    buffer = io.BytesIO()
    halves = {name: values.astype(np.float16) for name, values in arrays.items()}
    np.savez_compressed(buffer, about=np.array(to_json(about)), **halves)
    write_atomically(photograph.with_suffix(".npz"), lambda file: file.write(buffer.getvalue()))


PHOTOGRAPHS = tuple(RESULTS / "importance" / f"{name}.jpg" for name in ("chelsea", "coffee"))


def importance() -> bytes:
    """Photographs, the maps of single sites over them, and that of all sites together; one scale."""
    from matplotlib.figure import Figure

    from lip_resnet.insight import figures

    with figures.style():
        figure = Figure(figsize=(8.3, 4.25), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.015, hspace=0)
        axes = figure.subplots(len(PHOTOGRAPHS), 2 + len(SITES))
        for row, path in zip(axes, PHOTOGRAPHS, strict=True):
            photograph = np.asarray(Image.open(path).convert("RGB"))
            maps = np.load(path.with_suffix(".npz"))
            grey = figures.to_grey(photograph)
            extent = (0, photograph.shape[1], photograph.shape[0], 0)
            row[0].imshow(photograph, extent=extent)
            for each, name in zip(row[1:], [*SITES, "all sites"], strict=True):
                figures.paint_map(each, grey, maps[name].astype(np.float32), extent)
        for each in axes.flat:
            each.set_axis_off()
        for each, title in zip(axes[0], ["photograph", *SITES.values(), "all sites together"], strict=True):
            each.set_title(title, fontsize="medium", pad=4)
        figures.draw_scale(figure, axes.flat, "")
        figure.supxlabel("weight in LIP's windows, as a multiple of that in average pooling", fontsize="small")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight", pad_inches=0.04)
    return buffer.getvalue()


# ---- do maps mean anything ----


def deletion() -> bytes:
    """The probability of the predicted class as cells are removed in the order of each method."""
    from lip_resnet.study import figures

    methods = json.loads((RESULTS / "probes" / "deletion.json").read_text(encoding="utf-8"))["deletion"]

    def paint(axes: Any) -> None:
        for name, colour in {"Grad-CAM": "C2", "edges": "C4", "importance": "C1", "random": "0.6"}.items():
            curve, area = methods[name]["curve"], methods[name]["auc"]
            share = np.linspace(0, 100, len(curve))
            axes.plot(share, curve, "o-", ms=3.5, color=colour, label=f"{name}: area {area:.1f}%")
        axes.set_xlabel("share of the cells of the photograph that are removed (%)")
        axes.set_ylabel("probability of the class (%)")
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right", title="order of removal", alignment="left")

    return figures.draw_file(paint, "svg", 8.0, 3.4)


# ---- a run that was killed ----


def resumed() -> tuple[NDArray[np.float64], NDArray[np.float64], list[NDArray[np.float64]]]:
    """(n, 2) step and training loss: of the undisturbed run, of the killed one, and what each killed start wrote."""

    def losses(name: str) -> NDArray[np.float64]:
        text = (RESULTS / "resume" / f"{name}.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        return np.array([[line["step"], line["train/loss"]] for line in lines if "train/loss" in line])

    starts = sorted((RESULTS / "resume").glob("start*.jsonl"))
    return losses("undisturbed"), losses("killed"), [losses(path.stem) for path in starts]


def resume() -> bytes:
    """Two curves, one on the other."""
    from lip_resnet.study import figures

    whole, killed, starts = resumed()
    equal = np.array_equal(whole, killed)

    def paint(axes: Any) -> None:
        axes.plot(*whole.T, lw=6, alpha=0.5, color="C0", solid_capstyle="round", label="never stopped")
        axes.plot(*killed.T, lw=1.4, color="C1", label=f"killed {len(starts)} times, resumed")
        last = np.array([start[-1] for start in starts])
        axes.plot(*last.T, "x", ms=7, mew=1.8, color="C5", label="last line before SIGKILL")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("training loss")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")
        difference = "0 at every step" if equal else f"up to {np.abs(whole - killed)[:, 1].max():.2g}"
        axes.set_title(f"difference of the two losses: {difference}", loc="left", fontsize="small")

    return figures.draw_file(paint, "svg", 8.0, 3.4)


# ---- speed ----

LABELS = {
    "lip_resnet50, convolution floor": "convolution floor",
    "lip_resnet50": "LIP-ResNet-50",
    "lip_resnet50, textbook": "LIP-ResNet-50, textbook operator",
}


def speed_networks() -> bytes:
    """Time of a step and of a forward pass over ResNet-50's."""
    from lip_resnet.study import figures

    parts = {"training step": "train_cpu", "inference": "model_cpu"}
    rows = {title: {row["model"]: row for row in read(RESULTS / f"{file}.jsonl")[1]} for title, file in parts.items()}

    def paint(axes: Any) -> None:
        for number, (title, of_network) in enumerate(rows.items()):
            values = [of_network[name]["time / resnet50"] for name in LABELS]
            places = np.arange(len(LABELS)) + (number - 0.5) * 0.38
            bars = axes.barh(places, values, height=0.34, color=f"C{number}", label=title)
            axes.bar_label(bars, fmt="%.2f", padding=4, fontsize="small")
        axes.axvline(1, lw=1, ls="--", color="0.5")
        axes.set_yticks(np.arange(len(LABELS)), list(LABELS.values()))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 2.35)
        axes.set_xlabel("time over ResNet-50's, 224 pixels, float32, two CPU cores")
        axes.legend(loc="upper right")

    return figures.draw_file(paint, "svg", 8.0, 2.9)


FORMS = ("lip2d", "plain form", "textbook, torch.compile", "avg_pool2d")


def speed_operator() -> bytes:
    """Speed-up of each form of the operator over the textbook form, at ResNet-50's sites."""
    from lip_resnet.study import figures

    rows = read(RESULTS / "op_cpu.jsonl")[1]
    wanted = {"layout": "channels_last", "direction": "forward + backward"}
    chosen = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    sites = list(dict.fromkeys(row["site"] for row in chosen))
    values = {(row["site"], row["form"]): row["speedup"] for row in chosen if "speedup" in row}

    def paint(axes: Any) -> None:
        for number, form in enumerate(FORMS):
            places = np.arange(len(sites)) + (number - 1.5) * 0.21
            colour = ("C0", "C6", "C4", "0.6")[number]
            axes.bar(places, [values[site, form] for site in sites], width=0.19, color=colour, label=form)
        axes.axhline(1, lw=1, ls="--", color="0.5")
        axes.set_xticks(np.arange(len(sites)), [re.sub("x", " x ", site) for site in sites])
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("times as fast as the textbook form")
        axes.set_xlabel("channels x side of the map; forward and backward, channels-last, two CPU cores")
        axes.legend(loc="upper left", ncols=4)
        axes.set_ylim(0, 7.2)

    return figures.draw_file(paint, "svg", 8.0, 3.4)


DRAWINGS = (
    Drawing(
        "importance.png",
        "Two photographs, of a cat and of a cup of coffee, and over them the weights that LIP gives to positions at "
        "the stem, in stage 2 and in stage 3 of a trained LIP-ResNet-18, and all sites together. The stem weighs the "
        "two sides of an edge differently. All sites together give the eyes and the muzzle of the cat, the handle of "
        "the cup and the spoon, and the lower and right borders two and three times the weight of average pooling.",
        tuple(itertools.chain.from_iterable((path, path.with_suffix(".npz")) for path in PHOTOGRAPHS)),
        importance,
    ),
    Drawing(
        "deletion.svg",
        "Probability of the predicted class over the share of a photograph that is removed, in four orders: by "
        "Grad-CAM, by the strength of edges, by LIP's importance, and at random. The lower a curve, the more its order "
        "counts.",
        (RESULTS / "probes" / "deletion.json",),
        deletion,
    ),
    Drawing(
        "resume.svg",
        "Training loss over optimizer steps of two runs of one recipe. One was never stopped; the other was killed "
        "with SIGKILL many times and resumed. The curves lie on each other: the losses are the same numbers.",
        tuple(sorted((RESULTS / "resume").glob("*.jsonl"))),
        resume,
    ),
    Drawing(
        "speed_networks.svg",
        "Bars of the time of a training step and of inference over ResNet-50's: the convolution floor, LIP-ResNet-50 "
        "with this operator, and with the textbook operator, which is the slowest in both.",
        (RESULTS / "train_cpu.jsonl", RESULTS / "model_cpu.jsonl"),
        speed_networks,
    ),
    Drawing(
        "speed_operator.svg",
        "Bars of the speed of four forms of the operator over the textbook form, at seven sizes of map: lip2d is two "
        "to three and a half times as fast, the plain form 1.3 times, the compiled form about twice, and average "
        "pooling five to six times.",
        (RESULTS / "op_cpu.jsonl",),
        speed_operator,
    ),
)


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--maps", metavar="RUN_OR_FILE", help="compute the maps in results/importance/ with these weights"
    )
    options = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError('figures need the package matplotlib: pip install "lip-resnet[study]"') from error
    if options.maps:
        for photograph in PHOTOGRAPHS:
            compute_maps(options.maps, photograph)
    for drawing in DRAWINGS:
        if drawing.is_current():
            print(f"{drawing.file}: up to date")
            continue
        drawing.draw()
        print(f"{drawing.file}: drawn, {drawing.path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    cli.launch(main)
