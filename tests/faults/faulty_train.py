"""train.py with one fault in it, which FAULT names: kind:rank:step (nan, sleep or kill; steps count from 1).

It needs the repository in PYTHONPATH.
A file `fault-was-here` beside the run folder keeps `kill` from happening twice.
"""

import os
import signal
import sys
import time
from pathlib import Path

import lip_commands
from lip_resnet import distributed
from lip_resnet.training import classification

KIND, RANK, STEP = os.environ["FAULT"].split(":")
prepare = classification.Classification.prepare


def faulty(self, images, labels, step, part):
    images, labels, targets = prepare(self, images, labels, step, part)
    if distributed.rank() == int(RANK) and step + 1 == int(STEP):
        if KIND == "nan":
            images[0, 0, 0, 0] = float("nan")
        elif KIND == "sleep":
            time.sleep(1000)
        elif KIND == "kill":
            once = Path(sys.argv[sys.argv.index("--output") + 1]).parent / "fault-was-here"
            if not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
    return images, labels, targets


classification.Classification.prepare = faulty
sys.argv[0] = "train.py"
if __name__ == "__main__":
    lip_commands.train()
