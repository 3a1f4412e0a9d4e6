"""For the fault harness: give bad checkpoints to train.py and eval.py, and say what became of each.

One in ten is given to the command as a user types it; for the others this process, which has loaded the libraries,
forks.
"""

import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_files
import sklearn.datasets  # noqa: F401  (a fork has it then; it takes longer to import than all else here takes)
import torch
from fault_runs import RECIPE, ROOT, STATE, hash_value, read_whole

from lip_resnet import checkpoint, distributed
from lip_resnet.recipe import load_config

MAINS = {script: runpy.run_path(str(ROOT / script))["main"] for script in ("train.py", "eval.py")}
SMALL = ["model.args.channels=[8,8,8,8]", "model.args.stem_width=8", "data.workers=0"]
"""A network whose checkpoint has 250 kilobytes."""
WAYS = ("resume", "resume, an older one is whole", "starting weights", "eval")
FOREIGN = ("altered entries", "wrong model or classes", "expanded", "walked for ever")
"""Whole files that are not of this run: these may end it, where a damaged one must be passed over."""
MEMORY_MB = 256
"""What a bad file may take more than a good one."""
SECONDS = 100
"""After which a command counts as hanging, on a busy machine too."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    printed: str
    memory_mb: int
    """Peak resident memory."""


def launch(script: str, arguments: list[str], log: Path, typed: bool) -> Outcome:
    """Run train.py or eval.py to its end, as a process of its own or as a fork of this one."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))  # so that a bomb hurts nobody
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.chdir(ROOT)
            signal.alarm(SECONDS)
            if typed:
                os.execv(sys.executable, [sys.executable, script, *arguments])
            sys.argv = [script, *arguments]
            distributed.launch(MAINS[script])
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    text = log.read_text(encoding="utf-8", errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), text, usage.ru_maxrss >> 10)


class Bench:
    """A good run of the small network, and the commands that read checkpoints.

    Args:
        work: a folder; the good run is made there once.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.log, self.canary = work, work / "log.txt", work / "canary"
        work.mkdir(parents=True, exist_ok=True)
        self.run, self.whole = work / "run", work / "whole"
        self.recipe = work / "small.yaml"
        self.recipe.write_text(load_config(RECIPE, SMALL).dump(), encoding="utf-8")
        if not (self.whole / "done").exists():
            shutil.rmtree(self.whole, ignore_errors=True)
            outcome = launch("train.py", self._train(self.whole, "train.max_steps=10"), self.log, typed=False)
            if outcome.code:
                raise RuntimeError(outcome.printed)
            (self.whole / "done").touch()
        self.bytes = (self.whole / "checkpoints" / "last.pt").read_bytes()
        self.payload = read_whole(self.whole / "checkpoints" / "last.pt")
        self.known = work / "memory.json"
        self.memory: dict[str, int] = json.loads(self.known.read_text("utf-8")) if self.known.is_file() else {}

    def _train(self, folder: Path, *overrides: str) -> list[str]:
        return ["--config", str(self.recipe), "--output", str(folder), "--resume", "auto", *overrides]

    def give(self, way: str, data: bytes | None, typed: bool) -> tuple[Outcome, Path]:
        """Put a file (None: a folder) in a checkpoint's place, and run the command that reads it."""
        shutil.rmtree(self.run, ignore_errors=True)
        folder = self.run / "checkpoints"
        folder.mkdir(parents=True)
        path = folder / "last.pt"
        if data is None:
            path.mkdir()
        else:
            path.write_bytes(data)
        if way == "eval":
            arguments = ["--checkpoint", str(path), "--weights", "model", "--config", str(self.recipe)]
            return launch("eval.py", arguments, self.log, typed), path
        if way == "starting weights":
            arguments = self._train(self.work / "fresh", f"model.weights={path}", "train.max_steps=1")
            outcome = launch("train.py", arguments, self.log, typed)
            shutil.rmtree(self.work / "fresh", ignore_errors=True)
            return outcome, path
        shutil.copy(self.whole / "config.yaml", self.run)
        if way == "resume, an older one is whole":
            os.link(path, folder / "step-00000010.pt") if data is not None else None
            shutil.copy(self.whole / "checkpoints" / "step-00000005.pt", folder)
        return launch("train.py", self._train(self.run, "train.max_steps=5"), self.log, typed), path

    def judge(self, what: str, number: int, way: str, typed: bool) -> dict[str, Any]:
        """A line about one bad file: refused, passed over for the older one, or harmless as nothing of it differs."""
        usual = self.memory.get(f"{way} {typed}")
        if usual is None:
            usual = self.memory[f"{way} {typed}"] = self.give(way, self.bytes, typed)[0].memory_mb
            self.known.write_text(json.dumps(self.memory), "utf-8")
        began = time.time()
        data = None
        if what != "a folder":
            data = hostile_files.make(what, number, self.payload, self.bytes, self.canary)
        outcome, path = self.give(way, data, typed)
        became, problems = self._explain(what, outcome, way, path)
        if self.canary.exists():
            self.canary.unlink()
            problems.append("its code was executed")
        extra = max(0, outcome.memory_mb - usual)
        if extra > MEMORY_MB:
            problems.append(f"it took {extra} MB")
        return {
            "fault": "broken checkpoint",
            "cases": 1,
            "what": what,
            "number": number,
            "way": way,
            "typed": typed,
            "became": [became],
            "memory_mb": extra,
            "seconds": round(time.time() - began, 2),
            "failed": problems,
            "ok": not problems,
        }

    def _explain(self, what: str, outcome: Outcome, way: str, path: Path) -> tuple[str, list[str]]:
        printed, code = outcome.printed, outcome.code
        told = [line for line in printed.splitlines() if line.startswith(("train.py: error:", "eval.py: error:"))]
        if code == 2 and len(told) == 1 and "Traceback" not in printed:
            if way == "resume, an older one is whole" and what not in FOREIGN:
                return "refused", [f"the older one was not taken: {printed[-300:]}"]
            named = str(path) in told[0] or "model.num_classes is" in told[0]
            return "refused", [] if named else [f"the line does not name the file: {told[0]}"]
        if code == 0 and "skipped " in printed and f"continuing from {path.parent / 'step-00000005.pt'}" in printed:
            return "passed over", []
        if code == 0:
            keys = ("model",) if way in ("starting weights", "eval") else (*STATE, "processes")
            if self._same(path, keys):
                return "harmless", []
            return "loaded", ["loaded, though it differs from the good one"]
        reason = "hangs" if code == -signal.SIGALRM else f"exit code {code}"
        return "defect", [f"{reason}: {printed[-400:]}"]

    def _same(self, path: Path, keys: tuple[str, ...]) -> bool:
        """Whether the file's content is the good one's, bit for bit."""
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
            return all(hash_value(payload[key]) == hash_value(self.payload[key]) for key in keys)
        except (RuntimeError, KeyError, TypeError):
            return False


def main() -> None:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True, help="which fifty of the plan")
    parser.add_argument("--count", type=int, required=True, help="at most 50")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="lines of JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.work.resolve())
    plan = hostile_files.plan(len(bench.bytes) // 1024 + 1)
    first = options.seed * 50
    lines = []
    for index in range(first, first + options.count):
        what, number = plan[index % len(plan)]
        way = WAYS[random.Random(index).randrange(len(WAYS))]
        lines.append(bench.judge(what, number, way, typed=index % 10 == 0))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    checkpoint.write_atomically(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    distributed.launch(main)
