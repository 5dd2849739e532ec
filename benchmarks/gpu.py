"""Correctness, speed and memory of falign on a GPU, in minutes, with PyTorch, NumPy, SciPy and jaxtyping alone.

From a checkout: ``PYTHONPATH=src python benchmarks/gpu.py``. Three stages, each a JSON file that is written anew after
every case: 1 correctness against float64 on the CPU, 2 time and memory of a step under each rule, 3 the simulators of
two-layer networks. Stage 4, on demand, trains and reproduces papers, which needs the extra ``lab``. What no longer fits
the budget is recorded as left out; the most important comes first, and all that is compiled last. ``--page`` writes a
page from the files of a run that is over.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

import gpu_correctness
import gpu_page
import gpu_theory
from gpu_record import Record, Setting, environment
from gpu_speed import Speed

STAGES = {1: "correctness", 2: "speed", 3: "theory", 4: "laboratory"}
_ALONE = (1, 2, 3)
"""Stages that need no extra."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes of the test suite, compiled code traced only")
    parser.add_argument("--stages", nargs="+", type=int, choices=list(STAGES), default=list(_ALONE))
    parser.add_argument("--budget", type=float, default=460.0, metavar="SECONDS", help="of the whole run")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), metavar="FOLDER")
    parser.add_argument(
        "--page", type=Path, nargs="?", const=PAGE, metavar="FILE", help="measure nothing: write the page from --out"
    )
    return parser.parse_args()


def measure(setting: Setting, stages: list[int], folder: Path) -> bool:
    """Run the stages, what is compiled last; whether every check holds."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    about = environment(setting.device)
    records = {stage: Record(folder, STAGES[stage], setting, about) for stage in sorted(stages)}
    speed = Speed(records[2], setting) if 2 in records else None
    if 1 in records:
        gpu_correctness.eager_cases(records[1], setting)
        gpu_theory.correctness_cases(records[1], setting)
    if speed:
        speed.eager()
    if 3 in records:
        gpu_theory.speed_cases(records[3], setting)
    if 4 in records:
        import gpu_laboratory  # what it imports is an extra

        gpu_laboratory.cases(records[4], setting)
    if 1 in records:
        gpu_correctness.compiled_cases(records[1], setting)
    if speed:
        speed.compiled()
    if 1 in records:
        gpu_correctness.traced_cases(records[1], setting)
    failed = [(record.stage, row) for record in records.values() for row in record.failed]
    for stage, row in failed:
        why = row.get("error") or f"difference {row['difference']:.1e}, tolerance {row['tolerance']:.0e}"
        what = row.get("what") or row.get("variant") or ""
        print(f"FAILED {stage}: {row['group']}, {row['case']}: {what} {row.get('network', '')}: {why}")
    return not failed


def main() -> int:
    """Run what the command line asks for."""
    chosen = arguments()
    if chosen.page is not None:
        gpu_page.write(chosen.out, list(STAGES.values()), chosen.page)
        print(f"wrote {chosen.page}")
        return 0
    warnings.filterwarnings("ignore", module=r"torch\.")  # of the compiler, about what it does
    setting = Setting(
        device=torch.device(chosen.device), small=chosen.small, begun=time.monotonic(), budget=chosen.budget
    )  # fmt: skip
    return 0 if measure(setting, chosen.stages, chosen.out) else 1


if __name__ == "__main__":
    sys.exit(main())
