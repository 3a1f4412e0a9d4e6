"""``train.py``: builds what a recipe names, opens or continues the run folder, trains to the end, closes the log."""

from argparse import Namespace
from pathlib import Path

import torch

from lip_resnet import distributed
from lip_resnet.commands import classification
from lip_resnet.config import Config, DetectionConfig, Recipe
from lip_resnet.environment import describe_environment
from lip_resnet.errors import InputError, OutOfMemory, Stopped
from lip_resnet.layers.pooling import logit_parameters
from lip_resnet.recipe import find_recipe, load_recipe
from lip_resnet.training import run_folder, runlog
from lip_resnet.training.checkpoints import Checkpoints
from lip_resnet.training.dry_run import describe_run
from lip_resnet.training.engine import build_state
from lip_resnet.training.interrupts import Interrupts
from lip_resnet.training.messages import describe_setup, describe_start
from lip_resnet.training.run import Built, Run, restore


def main(options: Namespace) -> None:
    """Train a recipe; ``options`` are parsed by ``lip_commands.train_parser``. Raises what ``cli.launch`` maps."""
    recipe = find_recipe(options.config)
    config = load_recipe(recipe, options.overrides)
    folder = Path(options.output or Path("runs") / recipe.resolve().parent.name / recipe.stem)
    if options.dry_run and options.resume != "none":
        raise InputError(f"--dry-run starts a recipe afresh and continues no run: leave out --resume {options.resume}")
    interrupts = Interrupts(config.train.checkpoint_steps, config.train.checkpoint_minutes)
    try:
        with interrupts:
            train(config, folder, options.resume, interrupts, options.dry_run)
    except (InputError, FloatingPointError, OutOfMemory):
        raise
    except Exception as error:  # before training, a signal can also show as a lost connection to another process
        if not options.dry_run and distributed.is_main() and (interrupts.received or isinstance(error, Stopped)):
            run_folder.request_requeue(folder)
        raise


def train(config: Recipe, folder: Path, resume: str, interrupts: Interrupts, dry_run: bool = False) -> None:
    """Build data and network, then open or continue the run in ``folder`` and train; or only describe the run."""
    device = distributed.choose_device(config.train.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.train.precision == "tf32"
    torch.manual_seed(config.train.seed)
    built = build(config, device, folder, resume)
    loader, provenance = built.loader, built.provenance
    if dry_run:
        distributed.on_main(lambda: run_folder.check_vacant(folder))
        lines = describe_run(config, built, device)
        if distributed.is_main():
            print("\n".join(lines), flush=True)
        return
    state = build_state(built.model, config, device, built.task)

    opened = distributed.on_main(lambda: run_folder.open_run(folder, config, resume))
    provenance.datasets = built.describe_datasets()
    if opened.source is not None:
        restore(state, config, opened.source, provenance)
    assert opened.source or provenance.initial_weights or not built.weights
    all_epochs = config.train.epochs * len(loader)
    total = min(all_epochs, config.train.max_steps or all_epochs)
    loader.skipped_to = folder / "skipped.txt"
    sources = {"datasets": provenance.datasets, "initial_weights": provenance.initial_weights}
    environment = describe_environment() | sources
    log = runlog.RunLog(folder, config, environment, state.step, state.evaluated, total, built.task)
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep)
    try:
        for note in opened.notes:
            log.say(note)
        log.say(describe_start(folder, opened.source, state.step))
        for line in describe_setup(config, state.model, device, provenance.datasets, total, len(loader)):
            log.say(line)
        if len(provenance.processes) > 1:
            log.say(
                f"warning: trained by {provenance.processes} processes in turn: batch norm's batch size has changed"
            )
        norm_excludes = list(logit_parameters(state.model))
        run = Run(config, state, loader, checkpoints, log, total, provenance, norm_excludes, built.observe)
        if run.finished:
            log.say(f"{folder}: already trained to step {state.step}")
        else:
            run.fit(interrupts)
    finally:
        log.close()


def build(config: Recipe, device: torch.device, folder: Path, resume: str) -> Built:
    """Data, network and task of a recipe, by the module of its task."""
    if isinstance(config, DetectionConfig):
        from lip_resnet.commands import detection  # needs torchvision's operators, which a classification does not

        return detection.build(config, device, folder, resume)
    assert isinstance(config, Config)
    return classification.build(config, device, folder, resume)
