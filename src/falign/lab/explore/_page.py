"""The page: runs as they stand, and the simulators with their sliders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from nicegui import run, ui

from falign.lab.explore import _curves
from falign.lab.explore._curves import Panel, Shown, Training
from falign.lab.report.style import COLOURS

_EVERY = 2.0
"""Seconds between two looks at the folders."""
_THROTTLE = 0.05
"""Seconds between two places of a slider that are told."""
_DARK = ("#6ea8ec", "#f0925c", "#55c09a", "#c793d6", "#d0a93a", "#9aa4b2")
"""The palette of the report on a dark ground."""


def page(runs: Path, store: Path) -> None:
    """Build the page for one who opens it.

    Args:
        runs: Folder of run folders.
        store: Store of ``falign reproduce``.
    """
    swapped = "\n".join(
        f'.chart svg [stroke="{light}"] {{ stroke: {dark} }} .chart svg [fill="{light}"] {{ fill: {dark} }}'
        for light, dark in zip(COLOURS, _DARK, strict=True)
    )
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    ui.add_css(f"{style}@media (prefers-color-scheme: dark) {{\n{swapped}\n}}")
    ui.html("<h1>falign explore</h1><p class=lead>Watch runs, and move what the theory is made of.</p>", sanitize=False)
    with ui.tabs().props('align=left no-caps aria-label="parts of this page"') as tabs:
        places = {name: ui.tab(name) for name in ("Runs", "Two layers", "Deep linear")}
    with ui.tab_panels(tabs, value=places["Runs"], animated=False):
        with ui.tab_panel(places["Runs"]):
            _runs(runs, store)
        with ui.tab_panel(places["Two layers"]):
            _two_layer()
        with ui.tab_panel(places["Deep linear"]):
            _deep_linear()


# The simulators.


def _two_layer() -> None:
    _lead(
        "A linear network f = βᵀWx/√p is trained on 20 points by feedback alignment: W learns from fixed random b in "
        "place of β. A ridge λ on β makes the two align; without it they do so less, the wider the network is. The "
        "simulator is exact, at any width p.",
        "two_layer.md",
    )
    values = {"strength": 10.0, "power": 2.0}

    def shown() -> Shown:
        return _curves.two_layer(strength=values["strength"], width=round(10 ** values["power"]))

    sliders = ui.element("div").classes("sliders")
    update = _follow(shown)
    with sliders:
        _slider("ridge λ", values, "strength", 0, 100, 1, "{:g}".format, update)
        _slider("width p", values, "power", 1, 6, 0.25, lambda power: f"{round(10**power):,}", update)


def _deep_linear() -> None:
    _lead(
        "Each component λ has a network θ₂θ₁ of its own, trained by gradient flow with feedback m = 1. K = θ₂ - θ₁²/2 "
        "is conserved, and decides with the start which components are learned first.",
        "deep_linear.md",
    )
    values: dict[str, Any] = {"target": 0.5, "invariant": -0.5, "start": "anti-aligned"}

    def shown() -> Shown:
        return _curves.deep_linear(**values)

    def begin(event: Any) -> None:
        values["start"] = event.value
        update()

    sliders = ui.element("div").classes("sliders")
    update = _follow(shown)
    with sliders:
        _slider("largest component λ", values, "target", 0.05, 3, 0.05, "{:.2f}".format, update)
        _slider("invariant K", values, "invariant", -1.5, 1.5, 0.05, "{:.2f}".format, update)
        start = ui.toggle(list(get_args(_curves.Start)), value=values["start"], on_change=begin)
        start.props('no-caps dense aria-label="start, where K is negative"')


def _lead(text: str, document: str) -> None:
    ui.html(f"<p class=note>{text} More: docs/{document}.</p>", sanitize=False)


def _slider(
    name: str,
    values: dict[str, Any],
    key: str,
    low: float,
    high: float,
    step: float,
    form: Callable[[float], str],
    update: Callable[[], None],
) -> None:
    """Add a slider, which sets a value and has it shown what comes of it."""
    with ui.element("div").classes("slider"):
        with ui.element("div").classes("name"):
            ui.label(name)
            told = ui.html(f"<b>{form(values[key])}</b>", sanitize=False)
        # The browser's own: of Quasar's what has the focus is not what is called a slider.
        slider = ui.element("input").props(f"type=range min={low} max={high} step={step}")
        slider.props["^value"] = str(values[key])  # as an attribute: as a property it would be put back at every change
        slider.props(f'aria-label="{name}" aria-valuetext="{form(values[key])}"')

    def moved(event: Any) -> None:
        values[key] = float(event.args)
        told.set_content(f"<b>{form(values[key])}</b>")
        slider.props(f'aria-valuetext="{form(values[key])}"')
        update()

    slider.on("input", moved, throttle=_THROTTLE, js_handler="event => emit(event.target.value)")


def _follow(shown: Callable[[], Shown]) -> Callable[[], None]:
    """Draw what is shown; the function that it gives draws it anew."""
    first = shown()
    said = ui.html(first.sentence, sanitize=False).classes("said").props("aria-live=polite")
    with ui.element("div").classes("charts"):
        charts = [_chart(panel) for panel in first.panels]

    def update() -> None:
        now = shown()
        said.set_content(now.sentence)
        for chart, panel in zip(charts, now.panels, strict=True):
            _redraw(chart, panel)

    return update


def _chart(panel: Panel) -> Any:
    with ui.element("figure"):
        ui.html(f"<figcaption>{panel.title}</figcaption>", sanitize=False)
        return ui.echart(_options(panel), renderer="svg").classes("chart").props(f'role=img aria-label="{panel.title}"')


def _redraw(chart: Any, panel: Panel) -> None:
    chart.options.clear()
    chart.options.update(_options(panel))
    chart.update()


def _options(panel: Panel) -> dict[str, Any]:
    """Describe a chart to ECharts; colours of texts are of the style sheet."""
    faint = {"lineStyle": {"color": "#8a8f9640"}}
    axis = {"axisLine": {"show": False}, "axisTick": {"show": False}, "splitLine": faint}
    label = {"name": panel.x, "nameLocation": "middle", "nameGap": 26}
    scale, form = "value", {}
    if panel.logarithmic:
        scale, form = "log", {"axisLabel": {":formatter": "y => y < 1e-3 || y >= 1e4 ? y.toExponential(0) : `${y}`"}}
    return {
        "animation": False,
        "color": list(COLOURS),
        "grid": {"left": 8, "right": 12, "top": 36, "bottom": 30, "containLabel": True},
        "legend": {"left": 0, "top": 4, "icon": "roundRect", "itemHeight": 3, "itemWidth": 18, "type": "scroll"},
        "tooltip": {"trigger": "axis"},
        "xAxis": {**axis, **label, "type": "value", "min": "dataMin", "max": "dataMax"},
        "yAxis": {**axis, **form, "type": scale, "min": panel.low, "max": panel.high, "scale": True},
        "series": [
            {
                "name": curve.name,
                "type": "line",
                "showSymbol": len(curve.points) < 2,
                "lineStyle": {"width": 2, "type": ("solid", "dashed", "dotted")[place % 3]},
                "data": curve.points,
            }
            for place, curve in enumerate(panel.curves)
        ],
    }  # fmt: skip


# The runs.


def _runs(folder: Path, store: Path) -> None:
    chosen: dict[str, Path | None] = {"folder": None}
    seen: dict[str, Any] = {"trainings": None, "experiments": None}

    @ui.refreshable
    def shown() -> None:
        trainings, experiments = seen["trainings"], seen["experiments"]
        if trainings is None:
            return
        if not trainings and not experiments:
            _say(f"Nothing is in {folder} and in {store} yet: falign train and falign reproduce write there.")
        if trainings:
            _say(f"Trainings in {folder}, the latest first", "h2")
            with ui.element("div").classes("runs"), ui.element("table"):
                _row("th", "run", "what", "status", "epochs", "test %")
                for each in trainings:
                    _training_row(each, chosen, shown.refresh)
        for each in trainings:
            if each.folder == chosen["folder"]:
                _say(each.folder.name, "h2")
                with ui.element("div").classes("charts"):
                    for panel in each.panels:
                        if panel.curves:
                            _chart(panel)
        if experiments:
            _say(f"Experiments in {store}", "h2")
            with ui.element("div").classes("runs"), ui.element("table"):
                _row("th", "experiment", "runs that are there")
                for each in experiments:
                    _row("td", each.experiment, f"{each.runs:,}")

    async def look() -> None:
        now = {
            "trainings": await run.io_bound(_curves.trainings, folder),
            "experiments": await run.io_bound(_curves.experiments, store),
        }
        if now == seen or now["trainings"] is None:  # the second where the page is being closed
            return
        seen.update(now)
        if chosen["folder"] is None and now["trainings"]:
            chosen["folder"] = now["trainings"][0].folder
        shown.refresh()

    with ui.element("div"):
        shown()
    ui.timer(_EVERY, look)


def _training_row(training: Training, chosen: dict[str, Path | None], refresh: Callable[[], Any]) -> None:
    def choose() -> None:
        chosen["folder"] = training.folder
        refresh()

    with ui.element("tr"):
        with ui.element("td"):
            pressed = "true" if chosen["folder"] == training.folder else "false"
            with ui.element("button").props(f"type=button aria-pressed={pressed}").on("click", choose):
                _text(training.folder.name)
        with ui.element("td"):
            _text(training.title)
        with ui.element("td"), ui.element("span").classes("state"):
            _text(training.status)
        for text in (training.epochs, training.accuracy):
            with ui.element("td"):
                _text(text)


def _row(kind: str, *texts: str) -> None:
    with ui.element("tr"):
        for text in texts:
            with ui.element(kind):
                _text(text)


def _say(text: str, kind: str = "p") -> None:
    with ui.element(kind):
        _text(text)


def _text(text: str) -> None:
    """Show a text literally: names of folders are data."""
    ui.label(text)
