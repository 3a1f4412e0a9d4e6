"""``train.py``: builds what a recipe names, opens or continues the run folder, trains to the end, closes the log."""

from argparse import Namespace
from pathlib import Path

import torch

from lip_resnet import distributed
from lip_resnet.commands.initial_weights import load_initial_weights
from lip_resnet.config import Config, TrainConfig
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, class_names
from lip_resnet.data.photographs import sample_images
from lip_resnet.environment import describe_environment
from lip_resnet.errors import InputError, OutOfMemory, Stopped
from lip_resnet.insight.monitor import build_monitor
from lip_resnet.layers.pooling import logit_parameters
from lip_resnet.models import registry
from lip_resnet.recipe import find_recipe, load_config
from lip_resnet.training import run_folder, runlog
from lip_resnet.training.checkpoints import Checkpoints
from lip_resnet.training.engine import build_state
from lip_resnet.training.interrupts import Interrupts
from lip_resnet.training.run import Provenance, Run, describe_datasets, restore


def main(options: Namespace) -> None:
    """Train a recipe; ``options`` are parsed by ``lip_commands.train_parser``. Raises what ``cli.launch`` maps."""
    recipe = find_recipe(options.config)
    config = load_config(recipe, options.overrides)
    folder = Path(options.output or Path("runs") / recipe.resolve().parent.name / recipe.stem)
    interrupts = Interrupts(config.train.checkpoint_steps, config.train.checkpoint_minutes)
    try:
        with interrupts:
            train(config, folder, options.resume, interrupts, check=options.check)
    except (InputError, FloatingPointError, OutOfMemory):
        raise
    except Exception as error:  # before training, a signal can also show as a lost connection to another process
        if distributed.is_main() and (interrupts.received or isinstance(error, Stopped)):
            run_folder.request_requeue(folder)
        raise


def train(config: Config, folder: Path, resume: str, interrupts: Interrupts, check: bool = False) -> None:
    """Build data and network; unless ``check``, open or continue the run in ``folder`` and train."""
    device = distributed.choose_device(config.train.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.train.precision == "tf32"
    torch.manual_seed(config.train.seed)
    selection = None
    if (path := config.data.classes) is not None:
        selection = distributed.on_main(lambda: run_folder.read_selection(path, folder, resume))
    train_source, val_source = build_sources(config.data, config.model.num_classes, ("train", "val"), selection)
    loader = TrainLoader(train_source, config.data, config.optim.accumulate, config.train.seed)
    val_loader = EvalLoader(val_source, config.data)
    model = registry.build_model(config.model, **regularisers(config.train))
    registry.check_size(model, min(*config.data.sizes, config.data.eval_size))
    parts = config.optim.accumulate * (1 if config.train.sync_bn else distributed.world_size())
    registry.check_batch_norm(model, config.data.sizes[0], config.data.batch_size // parts)
    provenance = Provenance([distributed.world_size()], selection=selection)
    provenance.class_names = class_names(train_source, config.data.name)
    if config.model.weights and not distributed.on_main(lambda: run_folder.will_continue(folder, resume)):
        provenance.initial_weights = load_initial_weights(model, config.model, config.data, provenance.class_names)
    observe = None
    if config.train.log_images:
        images = [(each.name, each.pixels) for each in sample_images(val_source, config.data, config.train.log_images)]
        observe = build_monitor(model, images, config.data.mean, config.data.std)
    if check:
        return
    state = build_state(model, config, device)

    opened = distributed.on_main(lambda: run_folder.open_run(folder, config, resume))
    provenance.datasets = describe_datasets(train_source, val_source)
    if opened.source is not None:
        restore(state, config, opened.source, provenance)
    assert opened.source or provenance.initial_weights or not config.model.weights
    all_epochs = config.train.epochs * len(loader)
    total = min(all_epochs, config.train.max_steps or all_epochs)
    loader.skipped_to = folder / "skipped.txt"
    sources = {"datasets": provenance.datasets, "initial_weights": provenance.initial_weights}
    log = runlog.RunLog(folder, config, describe_environment() | sources, state.step, state.evaluated, total)
    checkpoints = Checkpoints(folder / "checkpoints", config.train.keep)
    try:
        for note in opened.notes:
            log.say(note)
        if len(provenance.processes) > 1:
            log.say(
                f"warning: trained by {provenance.processes} processes in turn: batch norm's batch size has changed"
            )
        norm_excludes = list(logit_parameters(state.model))
        run = Run(config, state, loader, val_loader, checkpoints, log, total, provenance, norm_excludes, observe)
        if run.finished:
            log.say(f"{folder}: already trained to step {state.step}")
        else:
            run.fit(interrupts)
    finally:
        log.close()


def regularisers(train: TrainConfig) -> dict[str, float]:
    """The rates that are keyword arguments of the model; none for a rate of 0, since not every model has them."""
    rates = {"drop_path_rate": train.drop_path, "drop_rate": train.drop}
    return {name: rate for name, rate in rates.items() if rate}
