"""The field's table as the documentation shows it, from the runs of ``falign reproduce benchmark``.

Prints, for every data set, a table of test accuracies, one of what a step costs and what the hidden layers learned, and
the published values beside ours; ``--csv`` writes all cells, ``--trials`` the studies behind them, a line for every
training, and ``--pictures`` draws both pictures as PNG files. ``--also`` adds the studies of such a file, from another
machine, to those of the folder, which come first where both have a run.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from falign.lab.experiment._results import Results
from falign.lab.experiment._store import Store
from falign.lab.report.style import Figure, panels
from falign.papers.benchmark._pictures import PICTURES, draw_row, marker_of, summary
from falign.papers.benchmark._training import NETWORKS, ROWS
from falign.papers.benchmark.published import PUBLISHED, published_values, values_beside
from falign.papers.benchmark.table import TABLE


def accuracies(results: Results, dataset: str) -> Iterator[str]:
    """Lines of the table of one data set: mean and half the 95 % interval, and points behind backpropagation."""
    cells = summary(results.table).filter(dataset=dataset)
    networks = [name for name in NETWORKS if name in set(cells["network"])]
    yield f"| trained by | {' | '.join(f'{NETWORKS[name].title} | behind' for name in networks)} |"
    yield f"|---|{'---|---|' * len(networks)}"
    for row in ROWS:
        texts = []
        for network in networks:
            there = cells.filter(row=row, network=network)
            ended = results.runs.filter(dataset=dataset, row=row, network=network)["status"]
            away = int((ended == "diverged").sum())
            if there.is_empty():
                texts += ["runs away at every rate" if away else "", ""]
                continue
            cell = there.row(0, named=True)
            lost = f" ({away} of {away + cell['runs']} seeds run away)" if away else ""
            texts.append(f"{cell['accuracy']:.2f}{_half(cell['half'])}{lost}")
            texts.append("" if row == "bp" else f"{cell['behind']:.2f}{_half(cell['behind_half'])}")
        if any(texts):
            yield f"| `{row}` | {' | '.join(texts)} |"


def _half(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


def costs(results: Results, dataset: str, network: str) -> Iterator[str]:
    """Lines of the table of one network's costs, all over backpropagation's."""
    yield "| trained by | time of a step | operations | bytes kept | cosine of hidden layers | growth |"
    yield "|---|---|---|---|---|---|"
    cells = summary(results.table).filter(dataset=dataset, network=network)
    for row in ROWS:
        for cell in cells.filter(row=row).to_dicts():
            cosine = "-" if cell["cosine"] is None else f"{cell['cosine']:.2f}"
            lost = f" ({cell['unreadable']} layers unreadable)" if cell["unreadable"] else ""
            yield (
                f"| `{row}` | {cell['seconds']:.2f} | {cell['flops']:.2f} | {cell['bytes']:.2f} | {cosine}{lost} | "
                f"{cell['growth']:.2g} |"
            )


def published(results: Results) -> Iterator[str]:
    """Lines of all published values, with ours where there are runs on the same data."""
    keys = ["source", "network", "setting", "data", "rule"]
    values = published_values()
    if not results.table.is_empty():
        ours = values_beside(results.table).filter("same").select("runs_here", "mean", sd_ours="sd")
        values = values.join(ours, on="runs_here", how="left").with_columns(ours=pl.coalesce("mean", "ours"))
    yield "| source | network, data | setting | rule | published | ours | tolerance | the value was |"
    yield "|---|---|---|---|---|---|---|---|"
    for cell in values.sort(keys, maintain_order=True).to_dicts():
        ours = "" if cell["ours"] is None else f"{cell['ours']:.2f}"
        yield (
            f"| {cell['source']} | {cell['network']}, {cell['data']} | {cell['setting']} | `{cell['rule']}` | "
            f"{cell['value']:g}{_half(cell['sd'])} | {ours} | "
            f"{'' if cell['tolerance'] is None else cell['tolerance']} | {cell['provenance']} |"
        )


def together(results: Results, trials: Path) -> Results:
    """Add the studies of a file that ``--trials`` wrote."""
    run = [*TABLE.grid[results.preset][0], "seed"]
    theirs = pl.read_csv(trials, infer_schema_length=None)
    if not results.table.is_empty():
        theirs = theirs.join(results.table.select(run).unique(), on=run, how="anti")
    return replace(results, table=pl.concat([theirs, results.table], how="diagonal_relaxed").sort(*run, "trial"))


SIX = {
    "bp": "backpropagation",
    "kp": "layer by layer, feedback learned",
    "probe+centred": "straight to each layer, learned",
    "dfa": "straight to each layer, random",
    "fa": "layer by layer, random",
    "frozen": "hidden layers not trained",
}
"""Rows of the README's picture, and how their error goes back."""


def six_rows(cells: pl.DataFrame) -> Figure:
    """The README's picture: accuracy of six rows on three networks."""
    networks = {"mlp": "perceptron", "lenet": "LeNet, tanh", "lenet-norm": "LeNet, batch norm"}
    figure, axes = panels(
        3, titles=list(networks.values()), xlabels=["test accuracy, %"], share="row", width=10, height=2.9
    )
    axes[0].set_yticks(range(len(SIX)), [f"{row}: {how}" for row, how in SIX.items()])
    axes[0].set_ylim(len(SIX) - 0.4, -0.7)
    for panel, network in zip(axes, networks, strict=True):
        for at, name in enumerate(SIX):
            (cell,) = cells.filter(dataset="fashion-mnist", network=network, row=name).to_dicts()
            draw_row(panel, at, cell)
            label, colour = f"{cell['accuracy']:.1f}", marker_of(cell["kind"])["color"]
            panel.annotate(label, (cell["accuracy"], at - 0.2), ha="center", va="bottom", size=8, color=colour)
    return figure


def draw(trials: pl.DataFrame, folder: Path) -> None:
    """Write the pictures of a table of trainings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {f"benchmark-{picture.name}": picture.draw(picture.data(trials)) for picture in PICTURES}
    for name, figure in {**drawn, "benchmark-six": six_rows(summary(trials))}.items():
        figure.set_facecolor("white")
        FigureCanvasAgg(figure)
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--also", type=Path, help="file of other trainings, as --trials writes it")
    parser.add_argument("--csv", type=Path, help="file of all cells")
    parser.add_argument("--trials", type=Path, help="file of all trainings")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures")
    chosen = parser.parse_args()
    store = Store(folder=chosen.out, repairs=False)
    store.open(create=False)
    results = store.results(TABLE, chosen.preset)
    if chosen.also is not None:
        results = together(results, chosen.also)
    if results.table.is_empty():
        print(f"no run of preset {chosen.preset} is in {chosen.out}")
    else:
        cells = summary(results.table)
        for (dataset,), part in cells.group_by(["dataset"], maintain_order=True):
            print(f"\n## {dataset}\n", *accuracies(results, str(dataset)), sep="\n")
            for network in [name for name in NETWORKS if name in set(part["network"])]:
                print(f"\n{NETWORKS[network].title}:\n", *costs(results, str(dataset), network), sep="\n")
        if chosen.csv is not None:
            cells.write_csv(chosen.csv, float_precision=6)
        if chosen.trials is not None:
            results.table.write_csv(chosen.trials, float_precision=6)
        if chosen.pictures is not None:
            draw(results.table, chosen.pictures)
    print("\n## Published values\n", *published(store.results(PUBLISHED, chosen.preset)), sep="\n")


if __name__ == "__main__":
    main()
