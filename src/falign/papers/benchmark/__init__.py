"""The field's table: rules beside backpropagation and references, tuned alike, and published values beside ours."""

from falign.lab.experiment import LazyExperiments, Paper

__all__ = ["BENCHMARK"]

BENCHMARK = Paper(
    name="benchmark",
    title="The field's table: learning without weight transport beside backpropagation",
    authors="The falign developers",
    venue="This package",
    address="https://arxiv.org/abs/2306.02325",
    experiments=LazyExperiments({"benchmark.table": "falign.papers.benchmark.table:TABLE"}),
)
