"""The page of a finished run of ``gpu.py``, from its JSON alone."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write(folder: Path, stages: list[str], page: Path) -> None:
    """Write the page from the files of the stages that ran."""
    found = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in stages if _there(folder, stage)}
    if not found:
        raise SystemExit(f"no JSON of a run here: {', '.join(f'{stage}.json' for stage in stages)}")
    page.parent.mkdir(parents=True, exist_ok=True)
    notes = folder / "notes.md"  # what the figures cannot say of themselves
    page.write_text(text(found) + ("\n" + notes.read_text() if notes.is_file() else ""))


def _there(folder: Path, stage: str) -> bool:
    return (folder / f"{stage}.json").is_file()


def text(found: dict[str, Row]) -> str:
    """The whole page."""
    first = next(iter(found.values()))
    rows = {stage: content["rows"] for stage, content in found.items()}
    parts = [_head(first, rows)]
    makers: dict[str, Callable[[list[Row]], list[str]]] = {
        "correctness": _correctness, "speed": _speed, "theory": _theory, "laboratory": _laboratory,
    }  # fmt: skip
    parts += ["\n\n".join(makers[stage](own)) for stage, own in rows.items()]
    return "\n\n".join([*parts, *_missing(rows)]) + "\n"


def _head(first: Row, rows: dict[str, list[Row]]) -> str:
    about = first["environment"]
    where = (
        f"{about['card']} ({about['memory_gib']} GiB, {about['multiprocessors']} multiprocessors), driver "
        f"{about['driver']}, CUDA {about['cuda']}, cuDNN {about['cudnn']}"
        if "card" in about
        else f"the {about['device'].upper()} (threads: {about['threads']})"
    )
    every = [row for own in rows.values() for row in own]
    checks = [row for row in every if "holds" in row]
    held = sum(row["holds"] for row in checks)
    errors, left = sum("error" in row for row in every), sum("left_out" in row for row in every)
    lines = [
        "# On a GPU",
        f"Measured {about['date']} on {where}; Python {about['python']}, torch {about['torch']}, NumPy "
        f"{about['numpy']}, SciPy {about['scipy']}, falign {about['falign']}. `PYTHONPATH=src python "
        "benchmarks/gpu.py` does it again, and `--page` writes this page from what it kept.",
        f"**{held} of {len(checks)} checks hold.** Cases that raised: {errors}. Left out for want of time: {left}.",
    ]
    if first["small"]:
        lines.append("These are the sizes of the test suite: they show that the script works, and no speed.")
    return "\n\n".join(lines)


def _table(head: list[str], lines: Iterable[list[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*rows, *("| " + " | ".join(line) + " |" for line in lines)])


def _verdict(rows: list[Row]) -> str:
    held = sum(row["holds"] for row in rows)
    return "holds" if held == len(rows) else f"**fails** ({len(rows) - held} of {len(rows)})"


def _small(number: float | None) -> str:
    return "-" if number is None else "0" if number == 0 else f"{number:.1e}"


def _number(number: float | None, digits: int = 3) -> str:
    """A number with about that many digits; "-" where there is none."""
    if number is None:
        return "-"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:#.{digits}g}".rstrip(".")


def _grouped(rows: list[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row.get(key, "")) for key in keys), []).append(row)
    return found


def _correctness(rows: list[Row]) -> list[str]:
    checks = [row for row in rows if "holds" in row]
    lines = []
    for (group, what, dtype, backend), own in _grouped(checks, "group", "what", "dtype", "backend").items():
        worst, least = max(own, key=lambda row: row["difference"]), {row["tolerance"] for row in own}
        of = ", ".join(_cases(own))
        how = ", ".join(part for part in (dtype, backend) if part)
        lines.append([group, what, of, how, str(len(own)), _small(worst["difference"]), _small(max(least)),
                      _verdict(own)])  # fmt: skip
    if not lines:
        return ["## Correctness", "Not checked."]
    head = ["", "what", "rules, or numbers", "type, compiler", "checks", "largest difference", "tolerance", "verdict"]
    parts = [
        "## Correctness",
        "Every rule on the test suite's four networks (MLP, convolutions, residual, sequence), whose gradients an "
        "oracle in NumPy confirms on the CPU, tf32 off. A difference is |a - b| / |b| of a parameter's gradient, the "
        "largest of all parameters, unless the line says otherwise; of B it is 0 or infinite.",
        _table(head, lines),
    ]
    gradients = [row for row in checks if row["group"] == "gradients" and row["what"].startswith("gradients")]
    if gradients:
        networks = list(dict.fromkeys(row["network"] for row in gradients))
        by = _grouped(gradients, "case", "network", "dtype")
        lines = [
            [f"`{rule}`", *(
                " / ".join(_small(by[rule, network, kind][0]["difference"]) for kind in ("float64", "float32"))
                for network in networks
            )]
            for rule in dict.fromkeys(row["case"] for row in gradients)
        ]  # fmt: skip
        parts += ["Gradients against float64 on the CPU, in float64 / float32:", _table(["rule", *networks], lines)]
    return parts


def _cases(rows: list[Row]) -> list[str]:
    """The rules, or the numbers compared."""
    named = (row.get("quantity", f"`{row['case'].removesuffix(', traced')}`") for row in rows)
    return list(dict.fromkeys(named))


def _speed(rows: list[Row]) -> list[str]:
    ceilings = [row for row in rows if row["group"] == "ceilings" and "told" in row]
    bench = [row for row in rows if "mode" in row]
    count = next((row["repetitions"] for row in bench if "repetitions" in row), 0)
    parts = [
        "## Time and memory of a step",
        "Forward and backward, without the optimizer's step, in which rules do not differ. Device events around each "
        f"step, variants interleaved in shuffled order; medians of {count} repetitions after three. A ratio is the "
        "median [quartiles], over repetitions, of time / time of eager backpropagation in the same repetition. `bp` is "
        "plain PyTorch, never converted. Held: weights, feedback, other buffers. Step: the most that a step needs "
        "above that, gradients included. FLOPs are PyTorch's own count of an eager step; the share is of the "
        "matrix-product rate measured on the card, without what checkpointing computes twice.",
    ]
    if ceilings:
        parts.append("The card itself: " + "; ".join(f"{row['what']}: {_ceiling(row)}" for row in ceilings) + ".")
    for name, own in _grouped(bench, "group").items():
        titled = next((row for row in own if "title" in row), None)
        if titled is None:
            continue
        parts += [f"**{name[0]}**: {titled['title']}; {titled['numbers']}.", _table(_HEAD, _lines(own))]
    return parts


_HEAD = ["", "eager ms", "ratio", "compiled ms", "ratio", "compilation s", "held GiB", "step GiB",
         "step GiB, compiled", "TFLOP", "share of the card, eager / compiled"]  # fmt: skip


def _ceiling(row: Row) -> str:
    if "tflops" in row:
        return f"{_number(row['tflops'])} TFLOP/s"
    return f"{_number(row['terabytes_a_second'])} TB/s"


def _lines(rows: list[Row]) -> list[list[str]]:
    by = {(row["variant"], row["mode"]): row for row in rows if "ms" in row}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        eager, compiled = by.get((variant, "eager"), {}), by.get((variant, "compiled"), {})
        marks = " (**wrong gradients**)" * (compiled.get("holds") is False)
        marks += " (graph breaks)" * (compiled.get("whole_graph") is False)
        share = " / ".join(
            "-" if row.get("utilisation") is None else f"{100 * row['utilisation']:.0f} %" for row in (eager, compiled)
        )
        lines.append([
            f"`{variant}`", _number(eager.get("ms")), _ratio(eager), _number(compiled.get("ms")) + marks,
            _ratio(compiled), _number(compiled.get("compile_seconds")), _number(eager.get("held_gib")),
            _number(eager.get("step_gib")), _number(compiled.get("step_gib")), _number(eager.get("tflop_counted")),
            share,
        ])  # fmt: skip
    return lines


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if "ratio" in row else "-"


def _theory(rows: list[Row]) -> list[str]:
    lines = [[row["what"], _finding(row)] for row in rows if "what" in row]
    table = _table(["what", "measured"], lines) if lines else "Not measured."
    return ["## The simulators of two-layer networks", table]


def _finding(row: Row) -> str:
    if "seconds_an_epoch" in row:
        shares = ", ".join(f"{value:.3f}" for value in row["accuracy"])
        found = (
            f"{_number(row['seconds_an_epoch'])} s an epoch ({_number(row['tflops_a_second'])} TFLOP/s); 300 epochs "
            f"{_number(row['seconds_300_epochs'])} s, extrapolated from {row['epochs']}. Data: {row['data']}. Mean "
            f"test accuracy then: {shares} for λ = 0, 0.1, 0.3"
        )
    elif "product_ms" in row:
        found = (
            f"{_number(row['ms_a_step'])} ms a step, {_number(row['ms_a_step'] / row['product_ms'])} times the matrix "
            f"product in it ({_number(row['product_ms'])} ms)"
        )
    else:
        found = (
            f"{_number(row['ms_a_step'])} ms a step; 20,000 steps {_number(row['seconds_20000_steps'])} s, extrapolated"
        )
    return found if row["finite"] else found + "; **not finite at the end**"


def _laboratory(rows: list[Row]) -> list[str]:
    checks = [row for row in rows if "holds" in row]
    trained = [
        [group[0], group[1], ", ".join(_cases(own)), _small(max(row["difference"] for row in own)),
         _small(own[0]["tolerance"]), _verdict(own)]
        for group, own in _grouped([row for row in checks if "network" in row], "network", "what").items()
    ]  # fmt: skip
    computed = [
        [f"`{row['quantity']}`", *(str(row[name]) for name in ("equal", "within", "beyond")),
         _small(row["tolerance"]), _small(row["difference"]) if row["beyond"] else "-"]
        for row in checks if "equal" in row
    ]  # fmt: skip
    parts = ["## The laboratory"]
    if trained:
        parts += [
            "`falign train mnist-10k --device cuda`, two epochs: everything that was measured and the last checkpoint "
            "(weights, feedback, optimizer, generators), compared to the bit; 0 is equal, anything else infinite.",
            _table(["network", "what", "rules", "largest difference", "tolerance", "verdict"], trained),
        ]
    if computed:
        parts += [
            "`falign reproduce --preset smoke --device cuda` beside the same on that machine's CPU: runs whose records "
            "are equal to the bit, within the agreement that the experiment states, or beyond it, the farthest by "
            "how much.",
            _table(["experiment", "equal", "within", "beyond", "agreement", "farthest beyond"], computed),
        ]
    return parts


def _missing(rows: dict[str, list[Row]]) -> list[str]:
    """What failed, raised or was left out, one line each."""
    lines = []
    for stage, own in rows.items():
        for row in own:
            what = " ".join(str(row[key]) for key in ("what", "variant", "network") if key in row)
            name = f"{stage}: {row['group']}, {row['case']}" + f" ({what})" * bool(what)
            if "error" in row:
                lines.append(f"- {name} raised `{row['error']}`")
            elif "left_out" in row:
                lines.append(f"- {name} was left out: {row['left_out']}")
            elif row.get("holds") is False:
                lines.append(f"- {name} fails: {_small(row['difference'])}, tolerance {_small(row['tolerance'])}")
    return ["## What failed or was left out", "\n".join(lines)] if lines else []
