"""Give broken and hostile checkpoints to train.py and eval.py, and print what became of each as a line of JSON.

One in ten is given to the command as a user types it; for the others this process, which has loaded the libraries,
forks, which saves their four seconds.
"""

import argparse
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import hostile_files
import sklearn.datasets  # noqa: F401  (the slowest import: loaded once, and every fork has it)
import torch
from processes import RECIPE, ROOT
from run_contents import STATE, hash_value, read_whole

from lip_resnet import cli
from lip_resnet.recipe import load_config

SMALL = ["model.args.channels=[8,8,8,8]", "model.args.stem_width=8", "data.workers=0"]
"""A network whose checkpoint has 250 kilobytes."""
OLDER = "resume, an older one is whole"
USES = ("resume", OLDER, "starting weights", "eval")
MAY_END_THE_RUN = ("altered entries", "wrong model or classes", "expanded", "shared lists")
"""Whole files that are not of this run; a damaged one must be passed over for the older one."""
MEMORY_MB = 256
"""Peak memory that a bad file may take beyond the good one's."""
SECONDS = 100
"""After which a command counts as hanging, on a busy machine too."""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    printed: str
    memory_mb: int
    """Peak resident memory."""


class Commands:
    """train.py and eval.py, run to their ends, and a good run of a small network.

    Args:
        work: an existing folder, which the caller has made for this alone.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.log, self.canary = work, work / "log.txt", work / "canary"
        self.mains = {script: runpy.run_path(str(ROOT / script))["main"] for script in ("train.py", "eval.py")}
        self.recipe, whole = work / "small.yaml", work / "whole"
        self.recipe.write_text(load_config(RECIPE, SMALL).dump(), encoding="utf-8")
        if not (whole / "done").exists():
            shutil.rmtree(whole, ignore_errors=True)
            outcome = self.run("train.py", self._train(whole, "train.max_steps=10"), typed=False)
            assert outcome.code == 0, outcome.printed
            (whole / "done").touch()
        self.whole = whole
        self.bytes = (whole / "checkpoints" / "last.pt").read_bytes()
        self.payload = read_whole(whole / "checkpoints" / "last.pt")
        self.usual = work / "memory.json"

    def _train(self, folder: Path, *overrides: str) -> list[str]:
        return ["--config", str(self.recipe), "--output", str(folder), "--resume", "auto", *overrides]

    def run(self, script: str, arguments: list[str], typed: bool) -> Outcome:
        """Run a command in a process of its own, or in a fork of this one."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))  # a bomb must not take the machine down
                descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.chdir(ROOT)
                signal.alarm(SECONDS)
                if typed:
                    os.execv(sys.executable, [sys.executable, script, *arguments])
                sys.argv = [script, *arguments]
                cli.launch(self.mains[script])
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return Outcome(os.waitstatus_to_exitcode(status), text, usage.ru_maxrss >> 10)

    def give(self, use: str, data: bytes, typed: bool) -> tuple[Outcome, Path]:
        """Put a file in a checkpoint's place, and run the command that reads it."""
        run = self.work / "run"
        shutil.rmtree(run, ignore_errors=True)
        path = run / "checkpoints" / "last.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        if use == "eval":
            arguments = ["--checkpoint", str(path), "--weights", "model", "--config", str(self.recipe)]
            return self.run("eval.py", arguments, typed), path
        if use == "starting weights":
            fresh = self.work / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            return self.run("train.py", self._train(fresh, f"model.weights={path}", "train.max_steps=1"), typed), path
        shutil.copy(self.whole / "config.yaml", run)
        if use == OLDER:
            os.link(path, path.with_name("step-00000010.pt"))
            shutil.copy(self.whole / "checkpoints" / "step-00000005.pt", path.parent)
        return self.run("train.py", self._train(run, "train.max_steps=5"), typed), path

    def examine(self, what: str, number: int, use: str, typed: bool) -> dict[str, Any]:
        """Say what became of one bad file: refused, passed over for the older one, or harmless (nothing differs)."""
        usual = json.loads(self.usual.read_text()) if self.usual.exists() else {}
        if f"{use} {typed}" not in usual:
            usual[f"{use} {typed}"] = self.give(use, self.bytes, typed)[0].memory_mb
            self.usual.write_text(json.dumps(usual))
        data = hostile_files.make(what, number, self.payload, self.bytes, self.canary)
        outcome, path = self.give(use, data, typed)
        became, problem = self._explain(what, outcome, use, path)
        extra = max(0, outcome.memory_mb - usual[f"{use} {typed}"])
        problems = [problem] if problem else []
        if self.canary.exists():
            self.canary.unlink()
            problems.append("its code was executed")
        if extra > MEMORY_MB:
            problems.append(f"it took {extra} MB")
        facts = {"what": what, "number": number, "use": use, "typed": typed, "memory_mb": extra}
        return {"cases": 1, "became": {became: 1}, "failed": problems, "ok": not problems, **facts}

    def _explain(self, what: str, outcome: Outcome, use: str, path: Path) -> tuple[str, str]:
        printed, code = outcome.printed, outcome.code
        errors = [line for line in printed.splitlines() if line.startswith(("train.py: error:", "eval.py: error:"))]
        if code == 2 and len(errors) == 1 and "Traceback" not in printed:
            if use == OLDER and what not in MAY_END_THE_RUN:
                return "refused", f"the older one was not taken: {printed[-300:]}"
            named = str(path) in errors[0] or "model.num_classes is" in errors[0]
            return "refused", "" if named else f"the line does not name the file: {errors[0]}"
        if code == 0 and "skipped " in printed and f"continuing from {path.parent / 'step-00000005.pt'}" in printed:
            return "passed over", ""
        if code == 0:
            same = self._is_good(path, ("model",) if use in ("starting weights", "eval") else (*STATE, "processes"))
            return ("harmless", "") if same else ("loaded", "loaded, though it differs from the good one")
        reason = "hangs" if code == -signal.SIGALRM else f"exit code {code}"
        return "defect", f"{reason}: {printed[-400:]}"

    def _is_good(self, path: Path, keys: tuple[str, ...]) -> bool:
        """Whether a file's entries are the good one's, bit for bit."""
        try:
            payload = torch.load(path, map_location="cpu", weights_only=True)
            return all(hash_value(payload[key]) == hash_value(self.payload[key]) for key in keys)
        except (RuntimeError, KeyError, TypeError):
            return False


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("first", type=int, help="number of the first file in hostile_files.plan")
    parser.add_argument("count", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    commands = Commands(options.work)
    plan = hostile_files.plan(len(commands.bytes) // 1024 + 1)
    for index in range(options.first, options.first + options.count):
        what, number = plan[index % len(plan)]
        use = USES[random.Random(index).randrange(len(USES))]
        print(json.dumps(commands.examine(what, number, use, typed=index % 10 == 0)), flush=True)
