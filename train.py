"""Train a recipe:  torchrun --nproc_per_node=8 train.py --config configs/imagenet/NAME.yaml data.root=DIR

The same with one process: python train.py ... . Every recipe key can be overridden as section.key=value.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from lip_resnet import checkpoint, distributed, models, replace_downsampling, runlog
from lip_resnet.config import Config, InputError, TrainConfig
from lip_resnet.data import EvalLoader, TrainLoader, build_sources, describe_source
from lip_resnet.engine import TrainState, build_state, evaluate, train_one_epoch
from lip_resnet.interrupts import SAVE, STOP, Interrupts
from lip_resnet.pooling import logit_parameters
from lip_resnet.recipe import load_config, parse_config


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
    model = models.build_model(config.model, replace_downsampling, **regularisers(config.train))
    models.check_size(model, min(*config.data.sizes, config.data.eval_size))
    state = build_state(model, config, device)

    opened = distributed.on_main(lambda: runlog.open_run(folder, config, options.resume))
    processes = [distributed.world_size()]
    if opened.source is not None:
        processes = restore(state, config, opened.source)
    total = min(config.train.epochs * len(loader), config.train.max_steps or config.train.epochs * len(loader))
    loader.skipped_to = folder / "skipped.txt"
    datasets = {"train": describe_source(train_source), "val": describe_source(val_source)}
    environment = {**runlog.describe_environment(), "datasets": datasets}
    log = runlog.RunLog(folder, config, environment, state.step, total)
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", config.train.keep)
    try:
        if len(processes) > 1:
            opened.notes.append(f"warning: trained by {processes} processes in turn; batch norm saw other batches")
        for note in opened.notes:
            log.say(note)
        if state.step >= total:
            log.say(f"{folder}: already trained to step {state.step}")
        else:
            Run(config, state, loader, val_loader, checkpoints, log, total, processes).fit()
    finally:
        log.close()


def regularisers(train: TrainConfig) -> dict[str, float]:
    """The model's keywords that belong to the protocol; a model without them takes no zero either."""
    rates = {"drop_path_rate": train.drop_path, "drop_rate": train.drop}
    return {name: rate for name, rate in rates.items() if rate}


def restore(state: TrainState, config: Config, source: Path) -> list[int]:
    """Continue from a training checkpoint of the same recipe; returns the numbers of processes, ours included."""
    payload = checkpoint.load(source)
    if "config" in payload:
        runlog.check_same_recipe(config, parse_config(payload["config"], str(source)), str(source))
    state.load_state_dict(payload, str(source))
    before, now = payload["processes"], distributed.world_size()
    return before if before[-1] == now else [*before, now]


@dataclass
class Run:
    """The parts of a run, and the order in which they work."""

    config: Config
    state: TrainState
    loader: TrainLoader
    val_loader: EvalLoader
    checkpoints: checkpoint.Checkpoints
    log: runlog.RunLog
    total: int
    """Optimizer steps of the whole run."""
    processes: list[int]
    """The numbers of processes that have trained it so far, in order."""

    def fit(self) -> None:
        """Epoch by epoch: train, evaluate, log, save. Asked to stop, save and leave after the step under way."""
        train, state = self.config.train, self.state
        watched = list(logit_parameters(state.model))
        folder = self.checkpoints.folder.parent
        with (
            profiler(train, folder) as trace,
            Interrupts(train.checkpoint_steps, train.checkpoint_minutes) as interrupts,
        ):
            stop = False

            def on_step() -> bool:
                nonlocal stop
                self.log.advance()
                if trace is not None:
                    trace.step()
                action = interrupts.after_step(state.step)
                stop = action == STOP
                # At an epoch's end the evaluation comes first: a run that is continued from there would never do it.
                if action == SAVE and state.step % len(self.loader) and state.step < self.total:
                    self.save()
                return stop

            while state.step < self.total:
                epoch = state.step // len(self.loader)

                def on_log(values: dict[str, float], epoch: int = epoch) -> None:
                    self.log.log(state.step, epoch, values)

                train_one_epoch(state, self.loader, self.config, watched=watched, on_step=on_step, on_log=on_log)
                ended = state.step % len(self.loader) == 0 or state.step >= self.total
                if ended and ((epoch + 1) % train.eval_every == 0 or state.step >= self.total):
                    values = self.validate()
                    self.log.log(state.step, epoch, values)
                    top1 = values["val_ema/top1" if train.rules == "ema" else "val/top1"]
                    improved, state.best = top1 > state.best, max(state.best, top1)
                    if state.step >= self.total:
                        prefix = "val_ema" if train.rules == "ema" else "val"
                        self.log.finish(self.config, {name: values[f"{prefix}/{name}"] for name in ("top1", "top5")})
                    self.save(best=improved)
                elif ended or stop:
                    self.save()
                if stop and state.step < self.total:
                    distributed.on_main(self.checkpoints.wait)
                    if distributed.is_main():
                        (folder / "requeue").touch()
                    reason = interrupts.received or "a signal to another process"
                    raise distributed.Stopped(f"{reason} at step {state.step}; continue with --resume auto")
            distributed.on_main(self.checkpoints.wait)  # still deaf to signals: the end must be on the disk

    def save(self, best: bool = False) -> None:
        """Start to write a checkpoint, from rank 0; a failed write is told at the next, and stops the run or not."""
        payload = {
            **self.state.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "processes": self.processes,
        }

        def write() -> None:
            try:
                self.checkpoints.wait()
            except InputError as error:
                if self.config.train.on_write_error == "stop":
                    raise
                self.log.say(f"warning: {error}; the run goes on, the older checkpoints stay")
            self.checkpoints.save(payload, best)

        distributed.on_main(write)

    def validate(self) -> dict[str, float]:
        """The val/ numbers, and the val_ema/ numbers where there is an average."""
        networks = {"val": self.state.model}
        if self.state.ema is not None:
            networks["val_ema"] = self.state.ema.module
        values = {}
        for prefix, network in networks.items():
            result = evaluate(network, self.val_loader, self.config)
            values |= {f"{prefix}/{name}": result[name] for name in ("loss", "top1", "top5")}
        return values


def profiler(train: TrainConfig, folder: Path) -> contextlib.AbstractContextManager:
    """torch.profiler over a few steps of rank 0, for TensorBoard; nothing where the recipe asks for none."""
    if not train.profile or not distributed.is_main():
        return contextlib.nullcontext()
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=train.profile, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder / "tensorboard")),
    )


if __name__ == "__main__":
    distributed.launch(main)
