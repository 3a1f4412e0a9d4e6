"""Train a recipe:  torchrun --nproc_per_node=8 train.py --config configs/imagenet/NAME.yaml data.root=DIR

The same with one process: python train.py ... . Every recipe key can be overridden as section.key=value.
"""

from pathlib import Path

import torch

from lip_resnet import checkpoint, distributed, run_folder, runlog
from lip_resnet.config import Config, InputError, TrainConfig
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, describe_source
from lip_resnet.engine import build_state
from lip_resnet.interrupts import Interrupts
from lip_resnet.layers.pooling import logit_parameters
from lip_resnet.models import registry
from lip_resnet.recipe import load_config
from lip_resnet.run import Run, restore


def main() -> None:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="the recipe, a YAML file")
    parser.add_argument("--output", help="the run folder (default: runs/<folder of the recipe>/<its name>)")
    parser.add_argument("--resume", default="none", metavar="auto|none|PATH", help="continue a run (default: none)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    recipe = Path(options.config)
    folder = Path(options.output or Path("runs") / recipe.resolve().parent.name / recipe.stem)
    interrupts = Interrupts(config.train.checkpoint_steps, config.train.checkpoint_minutes)
    try:
        with interrupts:
            train(config, folder, options.resume, interrupts)
    except (InputError, FloatingPointError):
        raise
    except Exception as error:  # a signal can also cost a process its peers, if it comes before they all have begun
        if distributed.is_main() and (interrupts.received or isinstance(error, distributed.Stopped)):
            run_folder.request_requeue(folder)
        raise


def train(config: Config, folder: Path, resume: str, interrupts: Interrupts) -> None:
    """Build everything, open or continue the run in ``folder``, and train to the end."""
    device = distributed.device()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.train.precision == "tf32"
    torch.manual_seed(config.train.seed)
    train_source, val_source = build_sources(config.data, config.model.num_classes)
    loader = TrainLoader(train_source, config.data, config.optim.accumulate, config.train.seed)
    val_loader = EvalLoader(val_source, config.data)
    model = registry.build_model(config.model, **regularisers(config.train))
    registry.check_size(model, min(*config.data.sizes, config.data.eval_size))
    state = build_state(model, config, device)

    opened = distributed.on_main(lambda: run_folder.open_run(folder, config, resume))
    processes = [distributed.world_size()]
    sources = {"train": train_source, "val": val_source}
    datasets = distributed.on_main(lambda: {split: describe_source(source) for split, source in sources.items()})
    if opened.source is not None:
        processes = restore(state, config, opened.source, datasets)
    total = min(config.train.epochs * len(loader), config.train.max_steps or config.train.epochs * len(loader))
    loader.skipped_to = folder / "skipped.txt"
    environment = {**runlog.describe_environment(), "datasets": datasets}
    log = runlog.RunLog(folder, config, environment, state.step, state.evaluated, total)
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", config.train.keep)
    try:
        if len(processes) > 1:
            opened.notes.append(f"warning: trained by {processes} processes in turn; batch norm saw other batches")
        for note in opened.notes:
            log.say(note)
        watched = list(logit_parameters(state.model))
        run = Run(config, state, loader, val_loader, checkpoints, log, total, processes, datasets, watched)
        if run.finished:
            log.say(f"{folder}: already trained to step {state.step}")
        else:
            run.fit(interrupts)
    finally:
        log.close()


def regularisers(train: TrainConfig) -> dict[str, float]:
    """The model's keywords that belong to the protocol; a model without them takes no zero either."""
    rates = {"drop_path_rate": train.drop_path, "drop_rate": train.drop}
    return {name: rate for name, rate in rates.items() if rate}


if __name__ == "__main__":
    distributed.launch(main)
