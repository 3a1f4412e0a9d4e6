"""Broken and hostile checkpoints, and what train.py and eval.py make of each:  broken_checkpoints.py FOLDER COUNT

This process, which has loaded the libraries, forks for each, which saves their four seconds. Prints the outcomes as a
line of JSON.
"""

import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

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
        self.recipe, self.whole = work / "small.yaml", work / "whole"
        self.recipe.write_text(load_config(RECIPE, SMALL).dump(), encoding="utf-8")
        outcome = self.run("train.py", self._train(self.whole, "train.max_steps=10"))
        assert outcome.code == 0, outcome.printed
        self.bytes = (self.whole / "checkpoints" / "last.pt").read_bytes()
        self.payload = read_whole(self.whole / "checkpoints" / "last.pt")
        self.usual = {use: self.give(use, self.bytes)[0].memory_mb for use in USES}

    def _train(self, folder: Path, *overrides: str) -> list[str]:
        return ["--config", str(self.recipe), "--output", str(folder), "--resume", "auto", *overrides]

    def run(self, script: str, arguments: list[str]) -> Outcome:
        """Run a command in a fork of this process."""
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

    def give(self, use: str, data: bytes) -> tuple[Outcome, Path]:
        """Put a file in a checkpoint's place, and run the command that reads it."""
        run = self.work / "run"
        shutil.rmtree(run, ignore_errors=True)
        path = run / "checkpoints" / "last.pt"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        if use == "eval":
            arguments = ["--checkpoint", str(path), "--weights", "model", "--config", str(self.recipe)]
            return self.run("eval.py", arguments), path
        if use == "starting weights":
            fresh = self.work / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            return self.run("train.py", self._train(fresh, f"model.weights={path}", "train.max_steps=1")), path
        shutil.copy(self.whole / "config.yaml", run)
        if use == OLDER:
            os.link(path, path.with_name("step-00000010.pt"))
            shutil.copy(self.whole / "checkpoints" / "step-00000005.pt", path.parent)
        return self.run("train.py", self._train(run, "train.max_steps=5")), path

    def examine(self, what: str, number: int, use: str) -> tuple[str, list[str], int]:
        """What became of one bad file: refused, passed over for the older one, or harmless (nothing differs).

        Returns:
            That word, what was wrong about it, and the memory beyond the good file's, MB.
        """
        outcome, path = self.give(use, hostile_files.make(what, number, self.payload, self.bytes, self.canary))
        became, problem = self._explain(what, outcome, use, path)
        extra = max(0, outcome.memory_mb - self.usual[use])
        problems = [problem] if problem else []
        if self.canary.exists():
            self.canary.unlink()
            problems.append("its code was executed")
        if extra > MEMORY_MB:
            problems.append(f"it took {extra} MB")
        return became, [f"{what} {number}, {use}: {text}" for text in problems], extra

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
    torch.set_num_threads(1)
    folder, count = Path(sys.argv[1]) / "files", int(sys.argv[2])
    folder.mkdir()
    commands, became, failed, memory = Commands(folder), Counter(), [], 0
    for index, (what, number) in enumerate(hostile_files.plan(len(commands.bytes) // 1024 + 1)[:count]):
        word, problems, extra = commands.examine(what, number, random.Random(index).choice(USES))
        became[word] += 1
        failed += problems
        memory = max(memory, extra)
    row = {"cases": sum(became.values()), "became": dict(became.most_common()), "failed": failed, "memory_mb": memory}
    print(json.dumps(row))
