"""What `benchmark.py gpu` writes: tables in gpu.md, every figure in gpu.json, a plot in gpu.png."""

import json
import math
from collections import Counter

from benchmarks import backends


def summary(part):
    """One line about a part."""
    right = sum(x["right"] for x in part["rows"])
    return (f"{part['name']}: {right} of {len(part['rows'])} results right, "
            f"{len(part['cannot_run'])} cases cannot run here, "
            f"{len(part['left_out'])} did not fit, {part['seconds']:.0f} s")


def write(report, folder):
    """gpu.json and gpu.md, as far as the run has come."""
    (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text("\n".join(markdown(report)) + "\n", encoding="utf-8")


def markdown(report):
    """The lines of gpu.md."""
    speed = report["speed"]
    yield f"# {report['card']}\n"
    yield "Measured: " + ", ".join(f"{value / 1e12:.2f} T{name}"
                                   for name, value in speed.items()) + ".\n"
    if report["missing"]:
        yield f"Missing packages: {', '.join(report['missing'])}.\n"
    yield "| part | right | wrong | cannot run here | did not fit | seconds |"
    yield "|---|---|---|---|---|---|"
    for part in report["parts"]:
        right = sum(x["right"] for x in part["rows"])
        yield (f"| {part['name']} | {right} | {len(part['rows']) - right} | "
               f"{len(part['cannot_run'])} | {len(part['left_out'])} | {part['seconds']:.0f} |")
    yield from listing("Wrong", (f"{x['what']}: {x['figure']:.3g}, limit {x['limit']}"
                                 for part in report["parts"] for x in part["rows"]
                                 if not x["right"]))
    yield from largest(report)
    yield from whole_models(report)
    yield from timing_tables(report)
    if "plot" in report:
        yield f"\nPlot: {report['plot']}."
    yield from listing("Cannot run here", reasons(report))
    yield from listing("Did not fit into the time",
                       (f"{part['name']}: {case}" for part in report["parts"]
                                                     for case in part["left_out"]))


def reasons(report):
    """A line for each reason why cases cannot run, with their number."""
    counts = Counter((part["name"], x["reason"]) for part in report["parts"]
                     for x in part["cannot_run"])
    return [f"{name}, {n} case{'s' * (n > 1)}: {reason}" for (name, reason), n in counts.items()]


def listing(title, lines):
    lines = list(lines)
    return [f"\n## {title}\n", *(f"* {line}" for line in lines)] if lines else []


def largest(report):
    """The largest figure of each kind of check: of each first word but widths and families."""
    worst = {}
    for part in report["parts"]:
        for x in part["rows"]:
            if x["limit"] and not math.isnan(x["figure"]):
                words = [word for word in x["what"].split() if not word.startswith(("D=", "GPT"))]
                key = part["name"], " ".join(words), x["limit"]
                worst[key] = max(worst.get(key, 0.0), x["figure"])
    yield "\n## The largest figure of each check\n"
    yield "| part | check | largest | limit |\n|---|---|---|---|"
    for (name, what, limit), figure in worst.items():
        yield f"| {name} | {what} | {figure:.3g} | {limit:g} |"


def timings(report):
    """All rows that are times."""
    return [x for part in report["parts"] for x in part["rows"] if "backend" in x]


def whole_models(report):
    """A table of whole models: a row for each shape and what was timed."""
    rows = [x for part in report["parts"] for x in part["rows"] if "shape" in x]
    if rows:
        yield "\n## Whole models, one text: milliseconds\n"
        yield "| model | what | naive | auto |\n|---|---|---|---|"
    for shape, kind in dict.fromkeys((x["shape"], x["kind"]) for x in rows):
        took = {x["attention"]: f"{x['figure']:.2f}" for x in rows
                if (x["shape"], x["kind"]) == (shape, kind)}
        yield f"| {shape} | {kind} | {took.get('naive', '–')} | {took.get('auto', '–')} |"


def timing_tables(report):
    """A table for each layer and direction, with the shares of bandwidth and matrix speed."""
    measured, speed = timings(report), report["speed"]
    for layer, backward in sorted({(x["layer"], x["backward"]) for x in measured},
                                  key=lambda x: (x[1], x[0])):
        rows = [x for x in measured if (x["layer"], x["backward"]) == (layer, backward)]
        names = list(dict.fromkeys(x["backend"] for x in rows))
        yield (f"\n## {layer} layer, {'forward and backward' if backward else 'forward'}: "
               f"milliseconds (share of the bandwidth / of the matrix speed), {rows[0]['dtype']}\n")
        yield "| T | texts | " + " | ".join(names) + " |\n|---|---|" + "---|" * len(names)
        for T in sorted({x["T"] for x in rows}):
            at = {x["backend"]: x for x in rows if x["T"] == T}
            cells = [cell(at[name], speed) if name in at else "–" for name in names]
            yield f"| {T} | {next(iter(at.values()))['B']} | " + " | ".join(cells) + " |"


def cell(x, speed):
    took = x["figure"] / 1e3
    moved, computed = x["bytes"] / took / speed["bytes/s"], x["operations"] / took
    return f"{x['figure']:.3f} ({moved:.0%} / {computed / speed['operations/s ' + x['dtype']]:.0%})"


def plot(report, file):
    """Draw the times; returns a sentence about it."""
    result = {}
    for x in timings(report):
        key = x["layer"], x["backward"], x["T"]
        result.setdefault(key, dict(zip(("layer", "backward", "T"), key), milliseconds={}))
        result[key]["milliseconds"][x["backend"]] = x["figure"]
    try:
        backends.draw(list(result.values()), report["card"].split(",")[0], file)
    except ImportError:
        return "no plot was drawn, because matplotlib is missing"
    return f"the plot is {file.name}"
