"""The papers that established the field, each as experiments that are run and claims that are judged."""

from falign.lab.experiment import Paper

PAPERS: dict[str, Paper] = {}
"""Name on the command line -> paper."""
