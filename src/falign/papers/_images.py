"""Data sets of papers' experiments, loaded once for the runs of a block that follow each other."""

from functools import lru_cache
from pathlib import Path

from falign.lab.data import Dataset, load
from falign.lab.experiment import Setting


def load_images(name: str, setting: Setting) -> Dataset:
    """The data set of a name; whoever takes it leaves its tensors as they are.

    Raises:
        DataError: It is not in the folder of data sets.
    """
    return _load(name, setting.data)


@lru_cache(maxsize=1)  # the runs of a block have the same data; one that is absent raises, and is looked for again
def _load(name: str, folder: Path | None) -> Dataset:
    return load(name, folder=folder, progress=False)
