# %% [markdown]
# # Reproduce your own paper
#
# A paper is a Python value: experiments with a grid, a function that computes a run, and claims that are read off the runs. One
# command computes what is missing, judges the claims and writes a page. This paper claims two things of feedback alignment on a
# linear network: that it reaches the solution, and that a wider network is no slower.

# %%
import polars as pl
import torch
from torch import nn

import falign
from falign.lab.experiment import Check, Claim, Evidence, Experiment, Outcome, Paper, grid
from falign.lab.experiment.statistics import final, mean


def run(*, seed: int, setting, width: int, rule: str) -> Outcome:
    """Learn a random linear map, and record the loss."""
    torch.manual_seed(seed)
    x = torch.randn(100, 10)
    target = x @ torch.randn(10, 3) / 10**0.5
    model = nn.Sequential(nn.Linear(10, width, bias=False), nn.Linear(width, 3, bias=False))
    falign.convert(model, rule, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps, losses = [], []
    for step in range(401):
        loss = (model(x) - target).square().mean()
        if step % 50 == 0:
            steps.append(step)
            losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Outcome(records={"step": steps, "loss": losses})


def solved(table: pl.DataFrame) -> Evidence:
    last = final(table.filter(pl.col("rule") == "fa"), by=["width"])["loss"]
    return Evidence(checks=(Check(label="largest loss", measured=float(last.max()), high=0.02),))


def wider_is_no_worse(table: pl.DataFrame) -> Evidence:
    last = final(table.filter(pl.col("rule") == "fa"), by=["width"])
    narrow, wide = (mean(last.filter(pl.col("width") == width)["loss"], of="loss") for width in (8, 64))
    return Evidence(checks=(Check(label="wide less narrow", measured=wide.value - narrow.value, high=0.0),))


LINEAR = Experiment(
    name="mine.linear",
    title="A linear map by feedback alignment",
    source="a note of my own",
    revision=1,
    grid={"smoke": grid(width=(8, 64), rule=("bp", "fa"))},
    seeds={"smoke": 3},
    run=run,
    claims=(
        Claim(
            name="solved",
            statement="Feedback alignment reaches the solution.",
            reference="section 2",
            method="Loss after 400 steps.",
            tolerance_reason="A fiftieth of the first loss.",
            read=solved,
        ),
        Claim(
            name="width",
            statement="A wider network is no slower.",
            reference="section 3",
            method="Mean losses after 400 steps.",
            tolerance_reason="The sign of the difference.",
            read=wider_is_no_worse,
        ),
    ),
)
MINE = Paper(name="mine", title="A linear map", authors="Me", venue="a note", address="none", experiments=(LINEAR,))

# %% [markdown]
# It has to be a module, in the working folder or in a package. Here the cell above is saved as one.

# %%
import os
import tempfile
from pathlib import Path

os.chdir(tempfile.mkdtemp())
Path("my_paper.py").write_text(In[-2])  # what IPython was given before

# %% [markdown]
# `falign reproduce my_paper:MINE --preset smoke` in a shell is the same as

# %% tags=["remove-stderr"]
from falign.cli import main

code = main(["reproduce", "my_paper:MINE", "--preset", "smoke"])
assert code == 0

# %% [markdown]
# The page is `results/report.html`, and the same numbers are in `report.json`. Called again, it computes only what is missing.

# %%
print(sorted(path.name for path in Path("results").iterdir() if not path.name.startswith(".")))

# %% [markdown]
# Types of the axes, names and seeds are checked when the values are made. What else there is (presets, blocks of runs, pictures, many
# machines) is in [the laboratory](../laboratory.md).
