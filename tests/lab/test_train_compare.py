"""The table of several runs, and what is said of folders that are none."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import falign
from falign.lab import _compare
from falign.lab._checkpoints import TrainingState
from falign.lab._files import RunError
from falign.lab._pictures import figures
from falign.lab._run_folder import RunFolder, find_runs
from falign.lab.config import TrainConfig
from falign.lab.report._figures import png

COLUMNS = ("step", "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
ROWS = [
    dict(zip((*COLUMNS, "angle_fc1", "angle_fc2", "dominance", "seconds"), row, strict=True))
    for row in [
        (0, 0.0, None, None, 2.3, 0.1, 91.0, 0.0, -0.1, 0.1),
        (5, 1.0, 1.25, 0.5, 0.9, 0.875, 60.4, 0.0, 0.1, 1.25),
        (7, 1.4, 0.8, 0.7, None, None, 55.0, 0.0, 0.2, 1.5),
        (10, 2.0, 0.625, 0.75, 0.95, 0.85, 45.2, 0.0, 0.256, 2.5),
    ]
]


OPTIONS = ("seed", "learning_rate")


def written(folder: Path, *, rule: str = "fa", model: str = "lenet", rows: list[dict] = ROWS, **status) -> Path:
    run = RunFolder(folder)
    run.begin()
    options = {name: status.pop(name) for name in OPTIONS if name in status}
    run.write_config(TrainConfig("digits", model=model, rule=rule, **options), {})
    run.write_tables(TrainingState(records=rows).tables())
    run.write_status(**{"status": "done", "step": 10, **status})
    return folder


def shown(folders: list[Path], width: int = 120) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=width)
    _compare.show(_compare.read(folders), console)
    return [line.split() for line in console.file.getvalue().splitlines() if line.strip()]


def test_a_run_a_row(tmp_path: Path) -> None:
    table = shown([written(tmp_path / "one"), written(tmp_path / "two", rule="dfa", status="interrupted")])
    assert table[0] == ["digits", "·", "lenet"], "what the runs share is the title"
    assert [" ".join(row) for row in table[3:]] == [
        "one fa 2 85.00 87.50 0.625 45 0 0.26 2.5 done",
        "two dfa 2 85.00 87.50 0.625 45 0 0.26 2.5 interrupted",
    ]


def test_one_run_has_all_columns(tmp_path: Path) -> None:
    table = shown([written(tmp_path / "one", status="diverged", step=12)])
    row = " ".join(table[-1])
    assert row == "one digits lenet fa 2 — — 0.625 45 0 0.26 2.5 diverged at step 12"


def test_many_layers_have_a_mean_without_the_last(tmp_path: Path) -> None:
    angles = {f"angle_{number}": 10.0 * number for number in range(1, 8)}
    rows = [{"step": 0, "epoch": 0.0, "test_loss": 1.0, "test_accuracy": 0.5, **angles, "seconds": 0.0}]
    table = shown([written(tmp_path / "one", rows=rows)])
    assert " ".join(table[-1]) == "one digits lenet fa 0 50.00 50.00 — mean 35 — 0.0 done"


def test_the_law_has_a_column_where_a_run_was_checked(tmp_path: Path) -> None:
    table = shown([written(tmp_path / "one", law="holds"), written(tmp_path / "two", rule="dfa")])
    assert [" ".join(row) for row in table[3:]] == [
        "one fa 2 85.00 87.50 0.625 45 0 0.26 2.5 holds done",
        "two dfa 2 85.00 87.50 0.625 45 0 0.26 2.5 — done",
    ]


def test_a_run_that_says_that_it_goes_on_and_does_not_was_killed(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", status="running")
    assert shown([folder])[-1][-1] == "killed"
    with RunFolder(folder).locked():
        assert shown([folder])[-1][-1] == "running"
    assert not list(folder.glob(".*"))


def test_a_killed_run_without_records_has_a_row(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", status="running")
    (folder / "records.parquet").unlink()
    assert " ".join(shown([folder])[-1]) == "one digits lenet fa 0 — — — — — — killed"
    written(tmp_path / "two")
    (tmp_path / "two" / "records.parquet").unlink()
    with pytest.raises(RunError, match=r"two has no records.parquet yet"):
        _compare.read([tmp_path / "two"])


def test_seeds_are_summed_up_and_what_differs_has_a_column(tmp_path: Path) -> None:
    folders = []
    for seed, accuracy in ((0, 0.8), (1, 0.9), (2, 0.5)):
        rows = [*ROWS[:-1], {**ROWS[-1], "test_accuracy": accuracy}]
        status = {"status": "diverged"} if seed == 2 else {}
        folders.append(written(tmp_path / f"{seed}", rows=rows, seed=seed, **status))
    folders.append(written(tmp_path / "other", learning_rate=0.5))
    table = [" ".join(row) for row in shown(folders)]
    assert "run lr seed epochs test % best % train loss angles ° D seconds status" in table
    assert "0 — 0 2 80.00 87.50 0.625 45 0 0.26 2.5 done" in table
    assert "lr n test % best % train loss mean angle ° D status" in table
    assert "— 2 85.00 ± 7.07 88.75 ± 1.77 0.6250 ± 0.0000 45.2 ± 0.0 0.26 ± 0.00 2 done, 1 diverged" in table
    assert "0.5 1 85.00 87.50 0.6250 45.2 0.26 1 done" in table
    assert "seeds together" not in " ".join(" ".join(row) for row in shown(folders[2:]))


def test_a_folder_of_runs_stands_for_them_and_a_file_of_a_monitor_for_a_run(tmp_path: Path) -> None:
    for name in ("demo/s10", "demo/s9", "single"):
        written(tmp_path / name)
    (tmp_path / "comparison.png").touch()
    (tmp_path / "empty").mkdir()
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    falign.convert(model, "fa", seed=0)
    with falign.measure.Monitor(model, every=1) as monitor:
        for _ in range(2):
            report = monitor.step(torch.nn.functional.cross_entropy, torch.eye(4), torch.tensor([0, 1, 0, 1]))
    monitor.save(tmp_path / "monitor.parquet")
    found, others = find_runs([tmp_path / "demo", tmp_path / "comparison.png", tmp_path / "single", tmp_path / "empty"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["demo/s9", "demo/s10", "single"]
    assert [path.name for path in others] == ["comparison.png", "empty"]
    with pytest.raises(RunError, match="empty is not a run folder"):
        find_runs([tmp_path / "empty"])
    runs = _compare.read([*found, tmp_path / "monitor.parquet"])
    assert runs[-1].records["step"].to_list() == [0, 1]
    assert runs[-1].numbers()["dominance"] == report.dominance
    assert runs[-1].numbers()["train_loss"] == report.loss
    figure = _compare.comparison_figure(runs)
    assert png(figure).startswith(b"\x89PNG")
    assert figure.axes[0].get_xlabel() == "step"
    (tmp_path / "no.parquet").write_bytes(b"PAR1 PAR1")
    with pytest.raises(RunError, match="cannot be read as what falign"):
        _compare.read([tmp_path / "no.parquet"])


NAMES = [
    "fa[lr=0.1]",
    "[bold]",
    r"$\frac$",
    "a_$x",
    "_hidden",
    "[red]r",
    ":smile:",
    "\x1b[31mred",
    "测试",
    "a\nb",
    "$",
    "\udcff",
]


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    folders = [written(tmp_path / name, model=f"m{number}[b]$", status="[/x]") for number, name in enumerate(NAMES)]
    console = Console(file=io.StringIO(), width=400, force_terminal=True, color_system=None)
    runs = _compare.read(folders)
    _compare.show(runs, console)
    for name in NAMES:
        seen = name.replace("\x1b", "\\x1b").replace("\n", "\\n").replace("\udcff", "\\xff")
        assert f"{seen} " in console.file.getvalue()
    assert "m3[b]$" in console.file.getvalue()
    assert console.file.getvalue().count("[/x]") == len(NAMES)
    figure = _compare.comparison_figure(runs)
    assert png(figure).startswith(b"\x89PNG")
    legend = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert len(legend) == len(NAMES)
    drawn = [text.lstrip("\u200b").replace(r"\$", "$") for text in legend]
    assert drawn[:7] == NAMES[:7]
    assert drawn[8:10] == [r"\u6d4b\u8bd5", r"a\nb"]


def test_layers_and_titles_are_drawn_as_they_are(tmp_path: Path) -> None:
    rows = [{**row, r"angle_$\frac$": 40.0, "angle__x": 3.0} for row in ROWS]
    run = RunFolder(written(tmp_path / "one", rows=rows, model=r"a.b:$\sqrt$"))
    config, _ = run.read_config()
    for figure in figures(TrainingState(records=rows).tables(), config).values():
        assert png(figure).startswith(b"\x89PNG")
    figure = _compare.comparison_figure(_compare.read([run.folder]))
    assert png(figure).startswith(b"\x89PNG")
    ticks = [text.get_text() for text in figure.axes[4].get_xticklabels()]
    assert ticks == ["fc1", "fc2", r"\$\frac\$", "\u200b_x"]


def test_narrow_terminals_lose_no_digits(tmp_path: Path) -> None:
    folders = [written(tmp_path / "a-very-long-name-of-a-run-folder"), written(tmp_path / "two", rule="bp")]
    assert any("87.50" in row and "0.625" in row for row in shown(folders, width=30))


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    folders = [written(tmp_path / "a" / "fa"), written(tmp_path / "b" / "fa")]
    assert [run.name for run in _compare.read(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize("name", ["config.json", "records.parquet", "status.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"PAR1\x00\x00PAR1"])
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    folder = written(tmp_path / "one")
    (folder / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"one/{name} cannot be read .*damaged"):
        _compare.read([folder])


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing is not a run folder"):
        _compare.read([tmp_path / "nothing"])
    (written(tmp_path / "one") / "records.parquet").unlink()
    with pytest.raises(RunError, match=r"one has no records.parquet yet"):
        _compare.read([tmp_path / "one"])


@pytest.mark.parametrize("loss", [0.0, 5e-324, 1e308])
def test_losses_of_any_size_can_be_drawn(loss: float, tmp_path: Path) -> None:
    rows = [{**row, "train_loss": loss, "test_loss": loss, "dominance": -loss} for row in ROWS]
    run = RunFolder(written(tmp_path / "one", rows=rows))
    assert png(_compare.comparison_figure(_compare.read([run.folder]))).startswith(b"\x89PNG")
    for figure in figures(TrainingState(records=rows).tables(), run.read_config()[0]).values():
        assert png(figure).startswith(b"\x89PNG")
