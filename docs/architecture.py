"""Draw docs/architecture.svg: GPT-Neo and GPT-NeoX side by side, with the names of the code.

    python docs/architecture.py

The same part has the same colour on both sides, so that what differs is the arrangement and the
text.
"""

from pathlib import Path

WIDTH, HEIGHT = 980, 685
GREY, LINE = "#57606a", "#24292f"
COLOURS = {"embed": "#dbeafe", "norm": "#fef3c7", "attention": "#d1fae5", "mlp": "#fde2d3",
           "head": "#e9e2f8", "sum": "#ffffff"}


def text(x, y, words, size=14, colour=LINE, weight="normal", anchor="middle"):
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
            f'text-anchor="{anchor}">{words}</text>')


def box(x, y, kind, *lines, width=150):
    """A part of the model with its centre at x and its top at y; the first line is its name in the
    code."""
    height = 14 + 18 * len(lines)
    words = [text(x, y + 21 + 18 * i, line, 14 if i == 0 else 12, LINE if i == 0 else GREY,
                  "bold" if i == 0 else "normal") for i, line in enumerate(lines)]
    return (f'<rect x="{x - width / 2}" y="{y}" width="{width}" height="{height}" rx="7" '
            f'fill="{COLOURS[kind]}" stroke="{LINE}"/>' + "".join(words))


def arrow(*points):
    """A line through the points (x, y), with a head at the last one."""
    path = " L ".join(f"{x} {y}" for x, y in points)
    return (f'<path d="M {path}" fill="none" stroke="{LINE}" stroke-width="1.4" '
            'marker-end="url(#head)"/>')


def plus(x, y):
    return (f'<circle cx="{x}" cy="{y}" r="12" fill="{COLOURS["sum"]}" stroke="{LINE}" '
            'stroke-width="1.4"/>' + text(x, y + 6, "+", 18))


def frame(x, y, width, height, words):
    """The block that is repeated."""
    return (f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="12" fill="none" '
            f'stroke="{GREY}" stroke-dasharray="6 4"/>'
            + text(x + width - 12, y + height - 6, words, 13, GREY, anchor="end"))


def title(x, name, sentence):
    return text(x, 34, name, 21, weight="bold") + text(x, 56, sentence, 13, GREY)


def neo(x=240):
    """GPT-Neo: attention, then the MLP, each added to what came in."""
    side = x - 130                                         # the residual, which goes around
    return [
        title(x, "GPT-Neo", "neo.py: one part after the other"),
        text(x, 88, "ids (B, T)"), arrow((x, 94), (x, 108)),
        box(x, 110, "embed", "embed + pos_embed", "a learned vector for each position", width=240),
        arrow((x, 160), (x, 212)),
        frame(40, 172, 400, 350, "Block, repeated"),
        arrow((x, 194), (side, 194), (side, 356), (x - 14, 356)),
        box(x, 214, "norm", "ln_1"), arrow((x, 246), (x, 260)),
        box(x, 262, "attention", "attn", "q · k, not divided by √D",
            "global and local layers alternate", width=230),
        arrow((x, 330), (x, 342)), plus(x, 356), arrow((x, 368), (x, 394)),
        arrow((x, 378), (side, 378), (side, 500), (x - 14, 500)),
        box(x, 396, "norm", "ln_2"), arrow((x, 428), (x, 440)),
        box(x, 442, "mlp", "mlp"), arrow((x, 474), (x, 486)), plus(x, 500),
        *end(x, "lm_head", "the same matrix as embed"),
    ]


def neox(x=740):
    """GPT-NeoX: attention and MLP read the same input, and both are added to it."""
    left, right, side = x - 80, x + 105, x - 215
    return [
        title(x, "GPT-NeoX, Pythia", "neox.py: attention and MLP side by side"),
        text(x, 88, "ids (B, T)"), arrow((x, 94), (x, 108)),
        box(x, 110, "embed", "embed", "no vector for the position", width=240),
        arrow((x, 160), (x, 194), (left, 194), (left, 214)),
        arrow((x, 194), (right, 194), (right, 214)),
        frame(508, 172, 432, 350, "Block, repeated"),
        arrow((left, 194), (side, 194), (side, 500), (x - 14, 500)),
        box(left, 216, "norm", "ln_1"), arrow((left, 248), (left, 294)),
        box(left, 296, "attention", "attn", "rotary positions on a part",
            "of each head; q · k / √D",
            "q, k, v interleaved by head", width=205),
        arrow((left, 382), (left, 430), (x, 430), (x, 486)),
        box(right, 216, "norm", "ln_2"), arrow((right, 248), (right, 294)),
        box(right, 296, "mlp", "mlp"), arrow((right, 328), (right, 500), (x + 14, 500)),
        plus(x, 500),
        *end(x, "lm_head", "a matrix of its own"),
    ]


def end(x, name, note):
    """What follows the blocks in both families."""
    return [arrow((x, 512), (x, 536)), box(x, 538, "norm", "ln_f"), arrow((x, 570), (x, 584)),
            box(x, 586, "head", name, note, width=200), arrow((x, 636), (x, 652)),
            text(x, 668, "logits (B, T, V)")]


def picture():
    head = ('<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" '
            f'fill="{LINE}"/></marker>')
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             'font-family="Helvetica, Arial, sans-serif">',
             f"<title>GPT-Neo and GPT-NeoX side by side</title><defs>{head}</defs>",
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *neo(), *neox(), "</svg>"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
