"""For the fault harness: give thousands of fuzzed recipes to the config loader, and say what became of them."""

import json
import resource
import time
from collections import Counter
from pathlib import Path

import fuzz_recipes
from hypothesis import HealthCheck, Phase, given, seed, settings

from lip_resnet import checkpoint, distributed

MEMORY_MB = 256


def peak() -> int:
    """Most resident memory so far, kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = distributed.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a line of JSON")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path, began = options.work / "recipe.yaml", time.time()
    became: Counter[str] = Counter()
    failed: list[str] = []
    usual = [peak()]

    @seed(options.seed)
    @settings(
        max_examples=options.count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzz_recipes.cases)
    def fuzz(case: fuzz_recipes.Case) -> None:
        if sum(became.values()) == 20:  # by now hypothesis has its own tables
            usual.append(peak())
        try:
            became[fuzz_recipes.examine(case, path)] += 1
        except Exception as error:  # whatever else comes out of the loader is a defect of it
            became["defect"] += 1
            failed.append(f"{type(error).__name__}: {error} {case}"[:600])

    fuzz()
    memory = (peak() - usual[-1]) >> 10
    if memory > MEMORY_MB:
        failed.append(f"it took {memory} MB")
    line = {
        **{"fault": "fuzzed config", "cases": sum(became.values()), "became": dict(became), "memory_mb": memory},
        **{"seconds": round(time.time() - began, 1), "failed": failed, "ok": not failed},
    }
    checkpoint.write_atomically(options.output, lambda file: file.write((json.dumps(line) + "\n").encode()))


if __name__ == "__main__":
    distributed.launch(main)
