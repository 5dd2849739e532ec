"""Image data sets as uint8 tensors: found in a folder or downloaded, and verified either way.

``load("fashion-mnist")`` returns a :class:`Dataset`; ``NAMES`` lists the names it knows, and the path of a
folder of IDX files or of images by class is accepted in their place. Every refusal is a :class:`DataError`.
"""

from falign.lab.data._dataset import DataError, Dataset
from falign.lab.data._loading import NAMES, load

__all__ = ["NAMES", "DataError", "Dataset", "load"]
