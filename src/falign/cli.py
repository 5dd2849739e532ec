"""The command ``falign``."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter, Token

from falign.lab.config import ConfigError, TrainConfig, option

# What needs torch is imported in the commands, so that help comes at once.

_FILES = Group("Files", sort_key=6)
_WHERE = Group("Where it is computed", sort_key=7)
_RESULTS = Path("results")
_Preset = Literal["smoke", "quick", "paper"]
_Shown = Annotated[_Preset | None, Parameter(show_default=lambda _: "the one of which most runs are there")]
_FREE = ("epochs",)
"""Options that may differ when a run goes on."""


def _stored(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """With --resume, options that are not given are those of the run."""
    given = next((part for part in arguments if part.name == "--resume" and part.tokens), None)
    if given is None:
        return
    from falign.lab.runs import Run

    config, _ = Run(Path(given.tokens[-1].value)).read_config()
    values = asdict(config)
    for part in arguments:
        value = values.get(part.keys[-1]) if part.keys else None
        if value is not None and not part.tokens:
            part.append(Token(keyword=part.name, value=str(value), source=str(given.tokens[-1].value)))


def _version() -> str:
    from falign import __version__

    return __version__


app = App(
    name="falign",
    help="Train networks without weight transport, and see how well the errors align with the true gradient.",
    version=_version,
    config=_stored,
)


@app.command
def train(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    data: Annotated[Path | None, Parameter(group=_FILES, show_default=lambda _: "FALIGN_DATA, then the cache")] = None,
    out: Annotated[Path | None, Parameter(group=_FILES, show_default=lambda _: "runs/DATASET-MODEL-RULE-SEED")] = None,
    resume: Annotated[Path | None, Parameter(group=_FILES)] = None,
    force: Annotated[bool, Parameter(group=_FILES, negative="")] = False,
) -> int:
    """Train a network on real data by a rule, and write configuration, records, pictures and checkpoints.

    falign train digits --model mlp:64-128-10 --rule dfa

    Ctrl-C leaves a run that --resume continues, to the same numbers.

    Args:
        config: What to train.
        data: Folder that holds the data sets; what is not there is downloaded.
        out: The run folder.
        resume: Go on with the run in this folder; of its options only --epochs may be raised.
        force: Replace the run that the folder holds.
    """
    from falign.lab.completion import located
    from falign.lab.runs import Run
    from falign.lab.train import resume as go_on
    from falign.lab.train import train as begin

    if resume is None:
        outcome = begin(config, out, data=data, replaces=force)
    else:
        if out is not None or force:
            raise ConfigError(f"--resume goes on in {resume}: leave out {'--out' if out is not None else '--force'}")
        before, _ = Run(resume).read_config()
        config = replace(config, dataset=located(config.dataset))
        for name, (now, then) in config.differences(before).items():
            if name not in _FREE:
                raise ConfigError(
                    f"{option(name)} is {now}, but the run in {resume} has {then}: leave it out, or begin a new run"
                )
        outcome = go_on(resume, epochs=config.epochs, data=data)
    print(outcome.message, file=sys.stdout if outcome.status == "done" else sys.stderr)
    if outcome.failure:
        print(f"falign: {outcome.failure}", file=sys.stderr)
    return {"done": 1 if outcome.failure else 0, "diverged": 1, "interrupted": 130}[outcome.status]


@app.command
def compare(*runs: Path, out: Path = Path("comparison.png")) -> int:
    """Print a table of several runs, and write one picture: accuracy, loss, angles and alignment dominance.

    falign compare runs/digits-* --out digits.png

    Args:
        runs: Run folders that falign train wrote.
        out: The picture, a PNG file.
    """
    from rich.console import Console

    from falign.lab import compare as comparison
    from falign.lab.pictures.comparison import figure
    from falign.lab.report.drawing import png
    from falign.lab.writing import write

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out is {out}, expected a file name that ends in .png")
    found = comparison.read(runs)
    comparison.show(found, Console())
    write(out, png(figure(found)))
    print(f"the picture is {out}")
    return 0


@app.command(name="list")
def list_papers() -> int:
    """List the papers and their experiments: number of runs at each preset, claims and figures."""
    from rich.console import Console

    from falign.lab.experiment.summary import show_papers
    from falign.papers import PAPERS

    show_papers(PAPERS, Console())
    return 0


@app.command
def reproduce(
    *names: Annotated[str, Parameter(name="NAME")],
    preset: _Preset = "quick",
    out: Annotated[Path, Parameter(group=_FILES)] = _RESULTS,
    data: Annotated[Path | None, Parameter(group=_FILES, show_default=lambda _: "FALIGN_DATA, then the cache")] = None,
    workers: Annotated[int | None, Parameter(group=_WHERE, show_default=lambda _: "1")] = None,
    memory: Annotated[
        float | None, Parameter(group=_WHERE, show_default=lambda _: "half of the machine's, shared among the workers")
    ] = None,
    device: Annotated[str, Parameter(group=_WHERE)] = "cpu",
    ray: Annotated[str | None, Parameter(group=_WHERE)] = None,
    cpus_per_run: Annotated[float | None, Parameter(group=_WHERE, show_default=lambda _: "1")] = None,
    gpus_per_run: Annotated[float | None, Parameter(group=_WHERE, show_default=lambda _: "0")] = None,
) -> int:
    """Compute the runs of papers that are missing, judge what the papers claim, and write a page of it.

    falign reproduce song2021 --preset quick --workers 2

    Called again, it does only what is missing; several may work on one folder at once.

    Args:
        names: Papers or experiments; none is all papers.
        preset: Sizes and repetitions: seconds, minutes on two cores, or the paper's own.
        out: Folder of the results.
        data: Folder that holds the data sets; what is not there is downloaded.
        workers: Processes that compute; 1 is this one alone.
        memory: GiB that a block of runs may need.
        device: cpu, cuda or cuda:INDEX.
        ray: Compute on the Ray cluster at this address; local starts one here.
        cpus_per_run: Cores that Ray gives to a block of runs.
        gpus_per_run: GPUs, or a part of one, that Ray gives to a block of runs.
    """
    from rich.console import Console

    from falign.lab.experiment import options
    from falign.lab.experiment.reproduce import reproduce as bring_all
    from falign.lab.experiment.selection import select
    from falign.papers import PAPERS

    selection = select(names, PAPERS)
    executor = options.executor(
        workers=workers, device=device, data=data, ray=ray, cpus_per_run=cpus_per_run, gpus_per_run=gpus_per_run
    )
    limit = options.memory(memory, workers=workers, device=device)
    return bring_all(selection, preset, out=out, executor=executor, memory=limit, console=Console())


@app.command
def status(
    *names: Annotated[str, Parameter(name="NAME")],
    preset: _Shown = None,
    out: Annotated[Path, Parameter(group=_FILES)] = _RESULTS,
) -> int:
    """Show how the runs of papers stand, and what their claims come to so far.

    falign status song2021 --preset quick

    Args:
        names: Papers or experiments; none is all papers.
        preset: Which runs.
        out: Folder of the results.
    """
    from rich.console import Console

    from falign.lab.experiment.reproduce import read
    from falign.lab.experiment.selection import choose, select
    from falign.lab.experiment.store import Store
    from falign.lab.experiment.summary import show
    from falign.papers import PAPERS

    selection, store = select(names, PAPERS), Store(folder=out, repairs=False)
    store.open(create=False)
    chosen, note = choose(preset, store.counts(selection.experiments))
    if note:
        print(note)
    show(store, selection, read(store, selection, chosen), Console())
    return 0


@app.command
def report(
    *names: Annotated[str, Parameter(name="NAME")],
    preset: _Shown = None,
    out: Annotated[Path, Parameter(group=_FILES)] = _RESULTS,
) -> int:
    """Write the page of papers again from the runs that are there; nothing is computed.

    falign report song2021 --preset quick

    Args:
        names: Papers, or experiments whose papers are meant; none is all papers.
        preset: Which runs.
        out: Folder of the results, where the page is written.
    """
    from falign.lab.experiment.reproduce import read
    from falign.lab.experiment.selection import choose, select
    from falign.lab.experiment.store import Store
    from falign.lab.report import write_report
    from falign.lab.writing import RunError
    from falign.papers import PAPERS

    selection, store = select(names, PAPERS), Store(folder=out, repairs=False)
    store.open(create=False)
    counts = store.counts(experiment for paper in selection.papers for experiment in paper.experiments)
    chosen, note = choose(preset, counts)
    if any(counts.values()) and not counts[chosen]:
        raise RunError(f"{note}; the page was left as it is")
    if note:
        print(note)
    page, numbers = write_report(out, read(store, selection, chosen))
    print(f"the page is {page}, the same as JSON {numbers}")
    return 0


def main(tokens: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        tokens: Its words; None is those of the command line.

    Returns:
        0: done; 1: it went wrong on the way; 2: an argument is wrong; 130: interrupted.
    """
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        return command(*bound.args, **bound.kwargs) or 0
    except CycloptsError as error:
        return _failed(f"{_sentence(error)}: see falign --help", 2)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except (ValueError, RuntimeError) as error:
        code = _code(error)
        if code is None:
            raise
        return _failed(str(error), code)


def _sentence(error: CycloptsError) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _code(error: Exception) -> int | None:
    """The exit code of an error whose message is meant for the user; None for others."""
    from falign.lab.data import DataError
    from falign.lab.writing import RunError

    if isinstance(error, RunError):
        return error.code
    return 2 if isinstance(error, (ConfigError, DataError)) else None


def _failed(message: str, code: int) -> int:
    print(f"falign: {message}", file=sys.stderr)
    return code
