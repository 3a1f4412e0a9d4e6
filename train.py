"""Train a recipe:  torchrun --nproc_per_node=8 train.py --config configs/imagenet/NAME.yaml data.root=DIR

The same with one process: python train.py ... . Every recipe key can be overridden as section.key=value.
"""

import contextlib
from pathlib import Path

import torch

import lip_resnet  # noqa: F401 (registers the LIP networks with timm)
from lip_resnet import checkpoint, distributed, models, runlog
from lip_resnet.config import Config, load_config, parse_config
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, describe_source
from lip_resnet.engine import TrainState, build_state, evaluate, train_one_epoch
from lip_resnet.pooling import logit_parameters


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

    device = distributed.device()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(config.train.seed)
    train_source, val_source = build_sources(config.data, config.model.num_classes)
    loader = TrainLoader(train_source, config.data, config.optim.accumulate, config.train.seed)
    val_loader = EvalLoader(val_source, config.data)
    model = models.build_model(config.model, drop_path=config.train.drop_path, drop=config.train.drop)
    models.check_size(model, min(*config.data.sizes, config.data.eval_size))
    state = build_state(model, config, device)

    start = distributed.on_main(lambda: runlog.open_run(folder, config, options.resume))
    if start is not None:
        restore(state, config, start)
    total = min(config.train.epochs * len(loader), config.train.max_steps or config.train.epochs * len(loader))
    loader.skipped_to = folder / "skipped.txt"
    datasets = {"train": describe_source(train_source), "val": describe_source(val_source)}
    environment = {**runlog.describe_environment(), "datasets": datasets}
    log = runlog.RunLog(folder, config, environment, state.step, total)
    try:
        if state.step >= total:
            log.say(f"{folder}: already trained to step {state.step}")
        else:
            fit(state, config, loader, val_loader, folder, log, total)
    finally:
        log.close()


def restore(state: TrainState, config: Config, source: Path) -> None:
    """Continue from a training checkpoint of the same recipe."""
    payload = checkpoint.load(source)
    if "config" in payload:
        runlog.check_same_recipe(config, parse_config(payload["config"], str(source)), str(source))
    state.load_state_dict(payload, str(source))


def fit(
    state: TrainState,
    config: Config,
    loader: TrainLoader,
    val_loader: EvalLoader,
    folder: Path,
    log: runlog.RunLog,
    total: int,
) -> None:
    """Epoch by epoch: train, evaluate, log, save."""
    watched = list(logit_parameters(state.model))
    while state.step < total:
        epoch = state.step // len(loader)
        with profiler(config, folder) as trace:

            def on_step(trace: torch.profiler.profile | None = trace) -> None:
                log.advance()
                if trace is not None:
                    trace.step()

            train_one_epoch(
                state,
                loader,
                config,
                watched=watched,
                on_step=on_step,
                on_log=lambda values, epoch=epoch: log.log(state.step, epoch, values),
            )
        improved = False
        if (epoch + 1) % config.train.eval_every == 0 or state.step >= total:
            values = validate(state, config, val_loader)
            log.log(state.step, epoch, values)
            top1 = values["val_ema/top1" if config.train.rules == "ema" else "val/top1"]
            improved = top1 > state.best
            state.best = max(state.best, top1)
        if distributed.is_main():
            payload = {
                **state.state_dict(),
                "config": config.model_dump(mode="json"),
                "processes": distributed.world_size(),
            }
            names = ["last.pt", "best.pt"] if improved else ["last.pt"]
            for name in names:
                checkpoint.save(folder / "checkpoints" / name, payload)
    prefix = "val_ema" if config.train.rules == "ema" else "val"
    log.finish(config, {"top1": values[f"{prefix}/top1"], "top5": values[f"{prefix}/top5"]})


def validate(state: TrainState, config: Config, loader: EvalLoader) -> dict[str, float]:
    """The val/ numbers, and the val_ema/ numbers where there is an average."""
    networks = {"val": state.model} | ({"val_ema": state.ema.module} if state.ema is not None else {})
    values = {}
    for prefix, network in networks.items():
        result = evaluate(network, loader, config)
        values |= {f"{prefix}/{name}": result[name] for name in ("loss", "top1", "top5")}
    return values


def profiler(config: Config, folder: Path) -> contextlib.AbstractContextManager:
    """torch.profiler over a few steps of rank 0, for TensorBoard; nothing where the recipe asks for none."""
    if not config.train.profile or not distributed.is_main():
        return contextlib.nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=config.train.profile, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder / "tensorboard")),
    )


if __name__ == "__main__":
    distributed.launch(main)
