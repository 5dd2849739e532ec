"""What ``gpu.py`` keeps: the rows of a stage, written after every case, so that a run cut off keeps what it has."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy
import scipy
import torch

import falign

Row = dict[str, object]

NO_TIME = "no time"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how large a run is.

    Attributes:
        device: What is measured.
        small: Whether sizes are those of the test suite.
        begun: Clock at the start.
        budget: Seconds that the whole run may take.
    """

    device: torch.device
    small: bool
    begun: float
    budget: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.budget - (time.monotonic() - self.begun)

    @property
    def backend(self) -> str:
        """The compiler backend: the default one, or in the test suite one that traces and generates no code."""
        return "aot_eager" if self.small else "inductor"


def environment(device: torch.device) -> Row:
    """Versions, card and driver."""
    found: Row = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "falign": falign.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    if device.type != "cuda":
        return found
    card = torch.cuda.get_device_properties(device)
    return found | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "card": card.name,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "driver": _driver(),
    }


def _driver() -> str:
    """Version of the driver, as ``nvidia-smi`` tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return answer.split("\n")[0].strip()


class Record:
    """The rows of one stage, and its file."""

    def __init__(self, folder: Path, stage: str, setting: Setting, about: Row) -> None:
        self.path = folder / f"{stage}.json"
        self.stage = stage
        self.setting = setting
        self.about = about
        self.rows: list[Row] = []

    def case(self, group: str, name: str, run: Callable[[], list[Row]], *, needs: float = 0.0) -> None:
        """Run a case and write what came out, also if that is an exception or that no time was left.

        Args:
            group: What kind of case it is.
            name: Its name.
            run: Gives its rows.
            needs: Seconds that it takes on a GPU, by estimate; in the test suite's sizes they count for nothing.
        """
        left, begun = self.setting.left, time.monotonic()
        if left <= (0 if self.setting.small else needs):
            new: list[Row] = [{"left_out": NO_TIME}]
        else:
            try:
                new = run()
            except Exception as error:  # whatever one case meets, the others are still to run
                new = [{"error": one_line(error)}]
            if self.setting.device.type == "cuda":
                torch.cuda.empty_cache()
        took = round(time.monotonic() - begun, 2)
        rows = [{"group": group, "case": name, **row} for row in new]
        self.rows += rows
        self.write()
        print(f"[{took:6.1f} s] {self.stage}: {group}, {name}: {told(rows)}", flush=True)

    def write(self) -> None:
        """Write the file whole or not at all."""
        content = {"stage": self.stage, "small": self.setting.small, "environment": self.about, "rows": self.rows}
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")
        os.replace(beside, self.path)

    @property
    def failed(self) -> list[Row]:
        """Rows of checks that do not hold or raised."""
        return [row for row in self.rows if row.get("holds") is False or "error" in row]


def told(rows: list[Row]) -> str:
    """A case in a few words."""
    if any("left_out" in row for row in rows):
        return f"left out: {rows[0]['left_out']}"
    if errors := [row["error"] for row in rows if "error" in row]:
        return f"ERROR {errors[0]}"
    checks = [row for row in rows if "holds" in row]
    if checks:
        wrong = [row for row in checks if not row["holds"]]
        worst = max(float(str(row.get("difference", 0.0))) for row in checks)
        return f"{len(checks) - len(wrong)} of {len(checks)} hold, largest difference {worst:.1e}"
    return "; ".join(str(row["told"]) for row in rows if "told" in row)


def one_line(error: Exception) -> str:
    """Kind and first line of an exception."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


def check(what: str, difference: float, tolerance: float, **more: object) -> Row:
    """The row of a check; NaN does not hold."""
    return {
        "what": what,
        "difference": float(difference),
        "tolerance": tolerance,
        "holds": bool(difference <= tolerance),
        **more,
    }
