"""Commands of ``falign``: one function a command, whose annotations and docstring are its options and its help.

Each function checks its options first and imports what it needs after that: PyTorch takes seconds to import, polars and
Matplotlib some tenths, and neither the help nor a mistyped option shall wait for them.
"""

import gc
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Group, Parameter, Token

from falign.lab._text import echo, standard_console
from falign.lab.config import ConfigError, TrainConfig, option

if TYPE_CHECKING:
    from falign.lab._ending import TrainingOutcome

_FILES = Group("Files", sort_key=6)
_WHERE = Group("Where it is computed", sort_key=7)
_RESULTS = Path("results")
_Preset = Literal["smoke", "quick", "paper"]
_ShownPreset = Annotated[_Preset | None, Parameter(show_default=lambda _: "the one of which most runs are there")]
_MAX_NAME = 255
"""Bytes of a file's name on all usual file systems."""
_FOLDER = "runs/DATASET-MODEL-RULE-SEED, then -OPTION=VALUE for each that is not the default"
_CHANGEABLE = ("epochs",)
"""Options that may differ when a run is resumed."""

_Folder = Annotated[Path, Parameter(group=_FILES)]
_SomeFolder = Annotated[Path | None, Parameter(group=_FILES)]
_Data = Annotated[
    Path | None,
    Parameter(group=_FILES, show_default=lambda _: "FALIGN_DATA, then the cache"),
]


def _options_of_run(app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Take options that are not given from the run, with --resume; cyclopts calls it with the parsed arguments."""
    given = next((part for part in arguments if part.name == "--resume" and part.tokens), None)
    if given is None:
        return
    from falign.lab._run_folder import RunFolder

    folder = Path(given.tokens[-1].value)
    _check_path(folder, "--resume")
    config, _ = RunFolder(folder).read_config()
    values = asdict(config)
    for part in arguments:
        value = values.get(part.keys[-1]) if part.keys else None
        if value is not None and not part.tokens:
            for each in value if isinstance(value, tuple) else (value,):
                part.append(Token(keyword=part.name, value=str(each), source=str(folder)))


def _version() -> str:
    from falign import __version__

    return __version__


app = App(
    name="falign",
    help="Train networks without weight transport, and see how well the errors align with the true gradient.",
    version=_version,
    config=_options_of_run,
)


@app.command
def train(
    config: Annotated[TrainConfig, Parameter(name="*")],
    *,
    data: _Data = None,
    out: Annotated[_SomeFolder, Parameter(show_default=lambda _: _FOLDER)] = None,
    resume: _SomeFolder = None,
    trust: Annotated[bool, Parameter(group=_FILES, negative="")] = False,
    force: Annotated[bool, Parameter(group=_FILES, negative="")] = False,
    references: Annotated[bool, Parameter(group=_FILES, negative="")] = False,
) -> int:
    """Train a network on real data by a rule, and write configuration, records, pictures and checkpoints.

    falign train digits --model mlp:64-128-10 --rule dfa

    Ctrl-C, TERM and HUP leave a run that --resume continues, to the same numbers; a second one stops it at once. Models
    of your own are tried before the first step: a line says what they are seen to keep in Python that no checkpoint
    holds, and whether the same seed and state give other numbers when they run a second time.

    Args:
        config: What to train.
        data: Folder that holds the data sets; what is not there is downloaded.
        out: The run folder.
        resume: Go on with the run in this folder; of its options only --epochs may be raised.
        trust: Run the code that the configuration of --resume names, though the run did not begin with it here.
        force: Replace the run that the folder holds.
        references: Train frozen and shallow as well, into FOLDER-frozen and FOLDER-shallow, and compare: a rule of
            which deep layers learn is better than these.
    """
    if resume is not None and references:
        raise ConfigError("--references is for a new run: train them by --rule frozen and --rule shallow")
    if resume is None and trust:
        raise ConfigError("--trust is for --resume: leave it out")
    if resume is not None and (out is not None or force):
        raise ConfigError(f"--resume goes on in {resume}: leave out {'--out' if out is not None else '--force'}")
    from falign.lab._run_folder import RunFolder
    from falign.lab._validate import check_options

    if resume is None:
        check_options(config)
    from falign.lab._train import resume as go_on
    from falign.lab._train import train as begin
    from falign.lab._trust import RECORDED, ask
    from falign.lab._validate import resolve_dataset

    if references:
        return _train_beside(config, out, data=data, force=force)
    if resume is None:
        outcome = begin(config, out, data=data, replaces=force)
    else:
        before, origin = RunFolder(resume).read_config()
        config = replace(config, dataset=resolve_dataset(config.dataset))
        for name, (now, then) in config.differences(before).items():
            if name not in _CHANGEABLE:
                now, then = (" ".join(each) if isinstance(each, tuple) else each for each in (now, then))
                raise ConfigError(
                    f"{option(name)} is {now}, but the run in {resume} has {then}: leave it out, or begin a new run"
                )
        if not trust:
            for code in (before.model, before.rule):
                ask(code, origin.get(RECORDED), resume)
        outcome = go_on(resume, epochs=config.epochs, data=data)
    return _say(outcome)


def _say(outcome: "TrainingOutcome") -> int:
    """Print how a training ended, and return the exit status."""
    echo(outcome.message, error=outcome.status != "done")
    if outcome.failure:
        echo(f"falign: {outcome.failure}", error=True)
    if outcome.status == "interrupted":
        return 128 + (outcome.signal or signal.SIGINT)
    return 0 if outcome.status == "done" and not outcome.failure else 1


def _train_beside(config: TrainConfig, out: Path | None, *, data: Path | None, force: bool) -> int:
    """Train, and the references beside it; the folders are looked at before the first step."""
    from falign.lab import _compare as comparison
    from falign.lab._run_folder import RunFolder
    from falign.lab._train import default_folder, train

    first = default_folder(config) if out is None else out
    runs = {first: config} | {
        first.with_name(f"{first.name}-{rule}"): config.reference(rule)
        for rule in ("frozen", "shallow")
        if rule != config.rule
    }
    for folder in runs:
        RunFolder(folder).refuse_existing(replaces=force)
    for folder, each in runs.items():
        if (code := _say(train(each, folder, data=data, replaces=force))) != 0:
            return code
    comparison.show(comparison.read(list(runs)), standard_console())
    return 0


@app.command
def compare(*runs: Path, out: Path = Path("comparison.png")) -> int:
    """Print a table of several runs, and write one picture: accuracy, loss, angles and alignment dominance.

    falign compare runs/digits-* --out digits.png

    Args:
        runs: Run folders that falign train wrote.
        out: The picture, a PNG file.
    """
    if not runs:
        raise ConfigError("no run folders given: give one or more that falign train wrote")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out is {out}, expected a file name that ends in .png")
    from falign.lab._run_folder import RunFolder

    for folder in runs:
        RunFolder(folder).require()
    from falign.lab import _compare as comparison
    from falign.lab._compare import comparison_figure
    from falign.lab._files import atomic_write
    from falign.lab.report._figures import png

    compared = comparison.read(runs)
    comparison.show(compared, standard_console())
    atomic_write(out, png(comparison_figure(compared)))
    echo(f"the picture is {out}")
    return 0


@app.command(name="list")
def list_papers() -> int:
    """List the papers and their experiments: number of runs at each preset, claims and figures."""
    from falign.lab.experiment._reproduce import show_papers
    from falign.papers import PAPERS

    show_papers(PAPERS, standard_console())
    return 0


@app.command
def reproduce(
    *names: Annotated[str, Parameter(name="NAME")],
    preset: _Preset = "quick",
    only: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    seeds: int | None = None,
    out: _Folder = _RESULTS,
    data: _Data = None,
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
        names: Papers, experiments, or module:PAPER for a paper of your own; none is all papers.
        preset: Sizes and repetitions: seconds, minutes on two cores, or the paper's own.
        only: AXIS=VALUE, or several values with commas between them: only runs of these; may be given several times.
        seeds: Only the first so many seeds.
        out: Folder of the results.
        data: Folder that holds the data sets; what is not there is downloaded.
        workers: Processes that compute; 1 is this one alone.
        memory: GiB that a block of runs may need.
        device: cpu, cuda or cuda:INDEX.
        ray: Compute on the Ray cluster at this address; local starts one here.
        cpus_per_run: Cores that Ray gives to a block of runs.
        gpus_per_run: GPUs, or a part of one, that Ray gives to a block of runs.
    """
    from falign.lab._options import ExecutionOptions

    options = ExecutionOptions(
        workers=workers,
        device=device,
        data=data,
        memory=memory,
        ray=ray,
        cpus_per_run=cpus_per_run,
        gpus_per_run=gpus_per_run,
    )
    from falign.lab.experiment._selection import narrow, select
    from falign.papers import PAPERS

    selection = select(names, PAPERS)
    if only or seeds is not None:
        selection = narrow(selection, only, seeds, preset)
    from falign.lab.experiment import _reproduce

    executor, limit = _reproduce.make_executor(options), _reproduce.memory_limit(options)
    return _reproduce.reproduce(selection, preset, out=out, executor=executor, memory=limit, console=standard_console())


@app.command
def status(
    *names: Annotated[str, Parameter(name="NAME")],
    preset: _ShownPreset = None,
    out: _Folder = _RESULTS,
    against: _SomeFolder = None,
) -> int:
    """Show how the runs of papers stand, and what their claims come to so far.

    falign status song2021 --preset quick

    Args:
        names: Papers, experiments, or module:PAPER for a paper of your own; none is all papers.
        preset: Which runs.
        out: Folder of the results.
        against: Folder of other results: compare the runs that are in both, at all presets.
    """
    from falign.lab.experiment._selection import choose_preset, select
    from falign.papers import PAPERS

    selection = select(names, PAPERS)
    from falign.lab.experiment import _agreement
    from falign.lab.experiment._reproduce import read_results, show_status
    from falign.lab.experiment._store import Store

    gc.freeze()  # modules stay: the collector need not look through them while many runs are read
    store = Store(folder=out, repairs=False)
    store.open(create=False)
    chosen, note = choose_preset(preset, store.counts(selection.experiments))
    if note:
        echo(note)
    show_status(store, selection, read_results(store, selection, chosen), standard_console())
    if against is None:
        return 0
    other = Store(folder=against, repairs=False)
    other.open(create=False)
    return _agreement.show_agreements(store, other, selection.experiments, standard_console())


@app.command
def report(
    *names: Annotated[str, Parameter(name="NAME")],
    preset: _ShownPreset = None,
    out: _Folder = _RESULTS,
) -> int:
    """Write the page of papers again from the runs that are there; nothing is computed.

    falign report song2021 --preset quick

    Args:
        names: Papers, experiments whose papers are meant, or module:PAPER for one of your own; none is all papers.
        preset: Which runs.
        out: Folder of the results, where the page is written.
    """
    from falign.lab.experiment._selection import choose_preset, select
    from falign.papers import PAPERS

    selection = select(names, PAPERS)
    from falign.lab._files import RunError
    from falign.lab.experiment._reproduce import read_results
    from falign.lab.experiment._store import Store
    from falign.lab.report import write_report

    gc.freeze()  # modules stay: the collector need not look through them while many runs are read
    store = Store(folder=out, repairs=False)
    store.open(create=False)
    counts = store.counts(experiment for paper in selection.papers for experiment in paper.experiments)
    chosen, note = choose_preset(preset, counts)
    if any(counts.values()) and not counts[chosen]:
        raise RunError(f"{note}; the page was left as it is")
    if note:
        echo(note)
    page, numbers = write_report(out, read_results(store, selection, chosen))
    echo(f"the page is {page}, the same as JSON {numbers}")
    return 0


@app.command
def query(
    sql: Annotated[str | None, Parameter(name="SQL", show_default=False)] = None,
    *,
    store: Annotated[
        tuple[Path, ...], Parameter(group=_FILES, negative="", show_default=lambda _: "results and runs, as there are")
    ] = (),
    csv: Annotated[Path | None, Parameter(group=_FILES, allow_leading_hyphen=True)] = None,
    rows: int = 100,
) -> int:
    """Run a query in SQL over results: runs, records and claims of papers, trainings and their measurements.

    falign query "SELECT experiment, status, count(*) FROM runs GROUP BY ALL"

    Without a query it lists the tables and their columns. It only reads.

    Args:
        sql: One SELECT, in DuckDB's dialect.
        store: A folder of falign reproduce, a run folder of falign train, or a folder of these; several times for more.
        csv: Write the result into this file, all of it, as CSV; - is standard output.
        rows: Rows that are printed at most.
    """
    if rows < 1:
        raise ConfigError(f"--rows is {rows}, expected a number from 1 on")
    if csv is not None and sql is None:
        raise ConfigError('--csv needs a query: falign query "SELECT …" --csv FILE')
    from falign.lab import _query

    folders = list(store) or [folder for folder in (_RESULTS, Path("runs")) if folder.is_dir()]
    if not folders:
        raise ConfigError("there is neither a folder results nor runs here: name one with --store")
    from falign.papers import PAPERS

    there = _query.views(folders, PAPERS)
    if sql is None:
        _query.show_views(there, standard_console())
        return 0
    result = _query.run_query(sql, there)
    if csv is None:
        _query.show(result, standard_console(), rows)
    elif str(csv) == "-":
        for lines in _query.as_csv(result):
            echo(lines.removesuffix("\n"))
    else:
        from falign.lab._files import atomic_write

        atomic_write(csv, "".join(_query.as_csv(result)).encode())
        echo(f"the result is {csv}")
    return 0


@app.command
def explore(
    *,
    runs: _Folder = Path("runs"),
    store: _Folder = _RESULTS,
    port: Annotated[int, Parameter(show_default=lambda _: "any that is free")] = 0,
    browser: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Open a page of this machine alone: watch runs, and move the parameters of the simulators.

    falign explore

    It listens on 127.0.0.1 and lets in those who have the address that is printed, with a random token in it. Ctrl-C
    ends it.

    Args:
        runs: Folder of run folders.
        store: Folder of the results of falign reproduce.
        port: Port to listen to.
        browser: Open the page in a browser.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port is {port}, expected a number from 0 to 65535")
    from falign.lab.explore._server import serve

    serve(runs=runs, store=store, port=port, browser=browser)
    return 0


@app.command
def doctor(
    *,
    data: _Data = None,
    out: _Folder = _RESULTS,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show what is here and what is not: versions, devices, data sets, folders, and what killed processes left.

    falign doctor --json

    Args:
        data: Folder that holds the data sets.
        out: Folder of the results.
        json: Print the same for programs, and for reports of faults.
    """
    from falign.lab._doctor import as_json, examine, show

    findings = examine(data=data, out=out)
    if json:
        echo(as_json(findings))
    else:
        show(findings, standard_console())
    return int(any(each.broken for each in findings))


def run(words: Sequence[str]) -> int:
    """Run the command that the words of the command line name.

    Args:
        words: The words after ``falign``.

    Returns:
        The exit code.

    Raises:
        ConfigError: The words are no command with its options.
    """
    for before, word in pairwise(["", *words]):
        if not word or (
            word.startswith("--") and word.find("=") == len(word) - 1
        ):  # from a shell's variable that is not set
            option_name = word or (before if before.startswith("--") else "an argument")
            raise ConfigError(f"{option_name} is empty: give a value, or leave it out")
    try:
        command, bound, _ = app.parse_args(words, console=standard_console(), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        sentence = " ".join(str(error).split()).rstrip(" .?")
        raise ConfigError(f"{sentence}: see falign --help") from None
    for name, value in bound.arguments.items():
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                _check_path(path, "RUNS" if name == "runs" else option(name))
    return command(*bound.args, **bound.kwargs) or 0


def _check_path(path: Path, name: str) -> None:
    """Refuse impossible paths: a name that is too long, links in a circle, a file where a folder must be."""
    try:
        os.stat(path)
    except FileNotFoundError:
        too_long = next((part for part in path.parts if len(os.fsencode(part)) > _MAX_NAME), None)
        if too_long is None:
            return
        why = f"{too_long} is longer than the {_MAX_NAME} bytes that a name may have"
    except OSError as error:
        why = error.strerror or str(error)
    else:
        return
    raise ConfigError(f"{name} is {path}, which cannot be used: {why}")
