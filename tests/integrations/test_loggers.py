"""Loggers: what a monitor measures is read back from the files of TensorBoard, MLflow and Weights & Biases."""

from collections.abc import Iterator

import pytest
import torch
from digits import loader, network
from torch.nn.functional import cross_entropy

import falign
from falign.integrations import MLflowLogger, TensorBoardLogger, WandbLogger
from falign.measure import Logger, Monitor

COLUMNS = {
    "angle of the gradient/2": "gradient_angle",
    "angle of the optimizer's step/2": "displacement_angle",
    "network/dominance D": "dominance",
}


def watched(logger: Logger) -> Monitor:
    """Train on eight batches, measuring at every third."""
    model = falign.convert(network(), "fa")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Monitor(model, every=3, optimizer=optimizer, logger=logger) as monitor:
        for x, y in loader():
            monitor.step(cross_entropy, x, y)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return monitor


def recorded(monitor: Monitor, column: str) -> list[float]:
    return [row[column] for row in monitor.records if row["layer"] == "2"]


def test_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    monitor = watched(logger)
    events = accumulators.EventAccumulator(str(tmp_path)).Reload()  # also before it is closed
    assert "alignment of neurons/2" in events.Tags()["histograms"]
    for name, column in COLUMNS.items():
        assert [event.step for event in events.Scalars(name)] == [0, 3, 6]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(recorded(monitor, column), rel=1e-6)
    logger.log({"mine": 1.0}, 7)  # the monitor, which is closed, left it open
    logger.close()


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason='MLflow is not installed: pip install "falign[mlflow]"')
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # they advise a database
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    folder = (tmp_path / "mlruns").as_uri()
    mlflow.set_tracking_uri(folder)
    try:
        run = mlflow.start_run()
        with MLflowLogger(run) as logger:
            monitor = watched(logger)
        mlflow.end_run()
        client = mlflow.MlflowClient(folder)
    finally:
        mlflow.set_tracking_uri(before)
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    for name, column in COLUMNS.items():
        history = client.get_metric_history(run.info.run_id, name.replace("'", "_"))
        assert [metric.step for metric in history] == [0, 3, 6]
        assert [metric.value for metric in history] == pytest.approx(recorded(monitor, column))


def records(content: bytes) -> Iterator[bytes]:
    """Split W&B's file: LevelDB's log, blocks of 32 KiB of pieces with checksum, length and type, after 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield whole
            whole = b""


def test_wandb(tmp_path):
    wandb = pytest.importorskip("wandb", reason='W&B is not installed: pip install "falign[wandb]"')
    from wandb.proto.wandb_internal_pb2 import Record

    quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    run = wandb.init(project="digits", dir=tmp_path, mode="offline", settings=quiet)
    with WandbLogger(run) as logger:
        monitor = watched(logger)
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history: dict[str, list[str]] = {}
    for content in records(written.read_bytes()):
        for item in Record.FromString(content).history.item:
            history.setdefault(item.key or "/".join(item.nested_key), []).append(item.value_json)
    assert any(name.startswith("alignment of neurons/2") for name in history), list(history)
    assert [int(step) for step in history["_step"]] == [0, 3, 6]
    for name, column in COLUMNS.items():
        assert [float(value) for value in history[name]] == pytest.approx(recorded(monitor, column))


@pytest.mark.unchecked
def test_one_sentence_for_what_is_no_logger(tmp_path):
    model = falign.convert(network(), "fa")
    with pytest.raises(TypeError, match=r"logger is 'runs', expected an object with log\(values, step\)"):
        Monitor(model, logger="runs")
    with pytest.raises(TypeError, match=r"run is None, expected what mlflow\.start_run"):
        MLflowLogger(None)
    with pytest.raises(TypeError, match=r"run is 'mine', expected what wandb\.init"):
        WandbLogger("mine")
    assert isinstance(TensorBoardLogger(tmp_path), Logger)
