"""Draw docs/porting_picture.svg: how far a right port and three wrong ones are off, by layer.

    python docs/porting_picture.py

The model is checkpoints/demo-neo.  The right port is our own with torch's fused attention: float32
in another order of operations.  The wrong ones are our definition with a mistake of mistakes.py.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diagnose import make_ids, relative_differences, trace  # noqa: E402
from load_weights import AutoModelForCausalLM  # noqa: E402
from mistakes import planted, variants  # noqa: E402

T = 130                                                    # two windows of 64, and more
MISTAKES = {"scaled-scores": "#D55E00", "window-plus-one": "#0072B2", "gelu-exact": "#E69F00"}
RIGHT = "#009E73"
WIDTH, HEIGHT, LEFT, TOP, RIGHT_EDGE, BOTTOM = 860, 440, 90, 50, 640, 370
LOW, HIGH = -8, 0                                          # exponents of the axis; LOW stands for 0
GREY, INK = "#57606a", "#24292f"


def differences():
    """(names of the rows, {port: relative difference of each row})."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "checkpoints" / "demo-neo",
                                                 attn_implementation="naive")
    ids = make_ids(0, 1, T, model.config.vocab_size)
    reference = trace(model, ids)
    model.set_attn_implementation("sdpa")
    ports = {"a right port": trace(model, ids)}
    model.set_attn_implementation("naive")
    for name in MISTAKES:
        patches = next(patches for mistake, patches in variants(model) if mistake.id == name)
        with planted(patches):
            ports[name] = trace(model, ids)
    kinds = ["global" if window is None else "local" for window in model.config.windows]
    rows = ["embeddings", *(f"block {i}, {kind}" for i, kind in enumerate(kinds)), "final norm",
            "logits"]
    return rows, {name: [relative_differences(x, right)[1] for x, right in zip(port, reference)]
                  for name, port in ports.items()}


def text(x, y, words, colour=INK, anchor="middle", size=13, more=""):
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" '
            f'{more}>{words}</text>')


def height(value):
    """Where a relative difference stands; an exact 0 stands on the bottom line."""
    exponent = LOW if value == 0 else min(max(math.log10(value), LOW), HIGH)
    return round(BOTTOM - (exponent - LOW) / (HIGH - LOW) * (BOTTOM - TOP), 1)


def axes(places, rows):
    for exponent in range(LOW, HIGH + 1):
        y, label = height(10.0 ** exponent), "exactly 0" if exponent == LOW else f"1e{exponent}"
        yield f'<line x1="{LEFT}" y1="{y}" x2="{RIGHT_EDGE}" y2="{y}" stroke="#d0d7de"/>'
        yield text(LEFT - 10, y + 4, label.replace("1e0", "1"), GREY, "end")
    for x, row in zip(places, rows):
        yield text(x, BOTTOM + 20, row.split(",")[0], size=12)
        yield text(x, BOTTOM + 36, row.partition(", ")[2], GREY, size=12)
    y = height(1e-5)
    yield (f'<line x1="{LEFT}" y1="{y}" x2="{RIGHT_EDGE}" y2="{y}" stroke="{INK}" '
           'stroke-dasharray="6 4"/>')
    yield text(RIGHT_EDGE + 12, y + 4, "tolerance 1e-5", anchor="start")
    yield text(LEFT, 26, f"|difference| / |reference|, demo-neo, {T} tokens, window 64",
               anchor="start", size=15)


def picture():
    rows, ports = differences()
    step = (RIGHT_EDGE - LEFT - 60) / (len(rows) - 1)
    places = [round(LEFT + 30 + i * step, 1) for i in range(len(rows))]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             'font-family="Helvetica, Arial, sans-serif">',
             "<title>Relative difference by layer of a right port and three wrong ones</title>",
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *axes(places, rows)]
    for name, values in ports.items():
        colour = MISTAKES.get(name, RIGHT)
        points = [(x, height(value)) for x, value in zip(places, values)]
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(text(RIGHT_EDGE + 12, points[-1][1] + 4, name, colour, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
