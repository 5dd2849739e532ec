"""The papers that established the field, each as experiments that are run and claims that are judged."""

from falign.lab.experiment import Paper
from falign.papers.garg2022 import GARG2022
from falign.papers.girotti2021 import GIROTTI2021
from falign.papers.robertson2024 import ROBERTSON2024
from falign.papers.song2021 import SONG2021

PAPERS: dict[str, Paper] = {paper.name: paper for paper in (SONG2021, GIROTTI2021, GARG2022, ROBERTSON2024)}
"""Name on the command line -> paper."""
