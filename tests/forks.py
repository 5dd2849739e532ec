"""Processes of their own, forked from one that has imported torch, most of a short process's time."""

import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

FORKSERVER = get_context("forkserver")
"""For ``FORKSERVER.Process``: all tests of a process share its server, which begins with the first of them."""
FORKSERVER.set_forkserver_preload(
    ["falign.lab._train", "falign.cli", "falign.measure", "sklearn.datasets", "torch.distributed.fsdp"]
)

_FORK = """
import importlib, os, runpy, sys, warnings
for name in sys.argv[2].split(","):
    importlib.import_module(name)
os.chdir(sys.argv[1])
for script in sys.argv[3:]:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(os.open(f"{script}.{number}", os.O_WRONLY | os.O_CREAT), number)
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # among its own parts
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_each(
    scripts: Sequence[str], folder: Path, *, imports: Sequence[str] = ("torch",)
) -> list[subprocess.CompletedProcess[str]]:
    """Run texts as scripts in a folder, warnings being errors: the exit code and the output of each.

    Annotations are not checked, and only ``imports`` (with what they import) are there before a script begins.
    """
    paths = [folder / f"script-{number}.py" for number, _ in enumerate(scripts)]
    for path, text in zip(paths, scripts, strict=True):
        path.write_text(text)
    clean = {name: value for name, value in os.environ.items() if name != "FALIGN_TYPECHECK"}
    words = [sys.executable, "-c", _FORK, str(folder), ",".join(imports), *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, env={**clean, "OMP_NUM_THREADS": "1"}, check=True)
    codes = map(int, done.stdout.split())
    return [
        subprocess.CompletedProcess(path, code, *(Path(f"{path}.{number}").read_text() for number in (1, 2)))
        for path, code in zip(paths, codes, strict=True)
    ]
