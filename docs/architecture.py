"""Draw docs/architecture.svg: GPT-Neo and GPT-NeoX side by side, with every tensor's shape.

    python docs/architecture.py
    chromium --headless --force-device-scale-factor=1.5 --window-size=1280,720 \\
        --screenshot=docs/architecture.png docs/architecture.svg

The same part has the same colour on both sides, so that what differs is the arrangement and the
text.  The picture has the shape of a slide, 16 : 9; the PNG is 1920 pixels wide.
"""

from pathlib import Path

WIDTH, HEIGHT = 1280, 720
GREY, LINE = "#57606a", "#24292f"
COLOURS = {"embed": "#dbeafe", "norm": "#fef3c7", "attention": "#d1fae5", "mlp": "#fde2d3",
           "head": "#e9e2f8", "sum": "#ffffff"}


def text(x, y, words, size=14, colour=LINE, weight="normal", anchor="middle"):
    return (f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
            f'text-anchor="{anchor}">{words}</text>')


def box(x, y, kind, *lines, width=150):
    """A part of the model with its centre at x and its top at y; the first line is its name in the
    code."""
    height = 12 + 18 * len(lines)
    words = [text(x, y + 20 + 18 * i, line, *((13, LINE) if i else (15, LINE, "bold")))
             for i, line in enumerate(lines)]
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
    return text(x, 30, name, 22, weight="bold") + text(x, 52, sentence, 14, GREY)


def beginning(x, *lines):
    """What comes before the blocks in both families."""
    return [text(x, 78, "ids (B, T)"), arrow((x, 84), (x, 94)),
            box(x, 96, "embed", *lines, width=400),
            text(x + 8, 165, "x (B, T, C)", 13, anchor="start")]


def neo(x=320):
    """GPT-Neo: attention, then the MLP, each added to what came in."""
    side = x - 250                                         # the residual, which goes around
    return [
        title(x, "GPT-Neo", "neo.py: one part after the other"),
        *beginning(x, "embed and pos_embed",
                   "embed (V, C), pos_embed (P, C): one row per position"),
        frame(30, 150, 580, 400, "Block, repeated"),
        arrow((x, 144), (x, 182)), arrow((x, 172), (side, 172), (side, 358), (x - 14, 358)),
        box(x, 184, "norm", "ln_1 (C)"), arrow((x, 214), (x, 224)),
        box(x, 226, "attention", "attn", "q_proj (C, C), k_proj (C, C), v_proj (C, C), no bias",
            "q, k, v (B, H, T, D), scores not divided by √D",
            "weights (B, H, T, S), layers global and local by turns",
            "out_proj (C, C), bias (C)", width=420),
        arrow((x, 328), (x, 344)), plus(x, 358), arrow((x, 370), (x, 398)),
        arrow((x, 380), (side, 380), (side, 526), (x - 14, 526)),
        box(x, 400, "norm", "ln_2 (C)"), arrow((x, 430), (x, 438)),
        box(x, 440, "mlp", "mlp", "up_proj (4C, C), bias (4C), then GELU (B, T, 4C)",
            "down_proj (C, 4C), bias (C)", width=420),
        arrow((x, 506), (x, 512)), plus(x, 526),
        *end(x, "the same matrix as embed"),
    ]


def neox(x=950):
    """GPT-NeoX: attention and MLP read the same input, and both are added to it."""
    left, right, side = x - 90, x + 195, x - 280
    return [
        title(x, "GPT-NeoX, Pythia", "neox.py: attention and MLP side by side"),
        *beginning(x, "embed", "embed (V, C), nothing for the position"),
        frame(650, 150, 610, 400, "Block, repeated"),
        arrow((x, 144), (x, 182), (left, 182), (left, 204)),
        arrow((x, 182), (right, 182), (right, 204)),
        arrow((left, 182), (side, 182), (side, 526), (x - 14, 526)),
        box(left, 206, "norm", "ln_1 (C)"), arrow((left, 236), (left, 264)),
        box(left, 266, "attention", "attn", "qkv_proj (3C, C), bias (3C)",
            "rows: q, k, v of head 0, then of head 1, …", "q, k, v (B, H, T, D)",
            "the first R dims of q and k are rotated", "weights (B, H, T, S), scores q · k / √D",
            "out_proj (C, C), bias (C)", width=320),
        arrow((left, 404), (left, 460), (x, 460), (x, 512)),
        box(right, 206, "norm", "ln_2 (C)"), arrow((right, 236), (right, 264)),
        box(right, 266, "mlp", "mlp", "up_proj (4C, C), bias (4C)", "GELU (B, T, 4C)",
            "down_proj (C, 4C), bias (C)", width=215),
        arrow((right, 350), (right, 526), (x + 14, 526)), plus(x, 526),
        *end(x, "a matrix of its own"),
    ]


def end(x, note):
    """What follows the blocks in both families."""
    return [arrow((x, 538), (x, 562)), box(x, 564, "norm", "ln_f (C)"), arrow((x, 594), (x, 604)),
            box(x, 606, "head", "lm_head", f"lm_head (V, C), {note}", width=400),
            arrow((x, 654), (x, 664)), text(x, 680, "logits (B, T, V)")]


LETTERS = ("B texts · T new tokens · S tokens in view · P positions · C width · H heads · "
           "D = C / H · R rotated dims · V vocabulary · ln: weight and bias")


def picture():
    head = ('<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M 0 0 L 10 5 L 0 10 z" '
            f'fill="{LINE}"/></marker>')
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             'font-family="Helvetica, Arial, sans-serif">',
             f"<title>GPT-Neo and GPT-NeoX side by side</title><defs>{head}</defs>",
             f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *neo(), *neox(),
             text(WIDTH / 2, 708, LETTERS, 13, GREY), "</svg>"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
