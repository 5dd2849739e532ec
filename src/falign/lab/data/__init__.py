"""Image data sets as uint8 tensors: found in a folder or downloaded, and verified either way; texts.

``load("fashion-mnist")`` returns a :class:`Dataset`; ``NAMES`` lists the names it knows, and the path of a
folder of IDX files or of images by class is accepted in their place. ``load_text("pydoc")`` returns a :class:`Text`, as
does ``load_text("text:FILE")``. Every refusal is a :class:`DataError`.
"""

from falign.lab.data._dataset import DataError, Dataset, Text
from falign.lab.data._loading import NAMES, load, load_text

__all__ = ["NAMES", "DataError", "Dataset", "Text", "load", "load_text"]
