"""The notebooks' pictures, in one quiet style.  A function for each kind of picture; no model code here.

    from plots import *          each function draws, labels its axes, and leaves showing to the notebook

Colours are Okabe and Ito's, which colour-blind readers can tell apart; sequences use viridis, differences
PuOr around white.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#666666"
COLOURS = [BLUE, RED, GREEN, PURPLE, ORANGE, SKY, YELLOW, GREY]

plt.rcParams.update({
    "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True, "font.size": 11,
    "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "legend.frameon": False, "image.interpolation": "auto",
    "axes.prop_cycle": plt.cycler(color=COLOURS), "lines.linewidth": 1.8})


def panels(n, width=9.0, height=3.4, **how):
    """n axes side by side, as wide together as a page on GitHub."""
    figure, axes = plt.subplots(1, n, figsize=(width, height), squeeze=False, **how)
    return list(axes[0])


def matrix(values, title="", x="key", y="query", labels=None, axes=None, colours="viridis", bar=False, limits=None,
           borders=False):
    """A (rows, columns) tensor or a bool mask as an image.  Labels are written along both axes if they are few;
    borders between the squares let a reader count them."""
    axes = axes or panels(1, 4.2, 3.8)[0]
    shown = torch.as_tensor(values).detach().float().cpu()
    low, high = limits or (None, None)
    image = axes.imshow(shown, cmap=colours, aspect="auto" if shown.shape[0] != shown.shape[1] else "equal",
                        vmin=low, vmax=high)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(False)
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
    if borders:
        for count, line in ((shown.shape[0], axes.axhline), (shown.shape[1], axes.axvline)):
            for n in range(1, count):
                line(n - 0.5, color=GREY, linewidth=0.6)
    if bar:
        axes.figure.colorbar(image, ax=axes, shrink=0.85)
    return axes


def curves(xs, lines, title="", x="", y="", axes=None, marker=None, log=""):
    """Named lines over the same xs: lines is {name: values}.  log: "x", "y" or "xy"."""
    axes = axes or panels(1, 6.5, 3.4)[0]
    for name, values in lines.items():
        axes.plot(xs, torch.as_tensor(values).detach().float().cpu(), marker=marker, markersize=4, label=name)
    axes.set(title=title, xlabel=x, ylabel=y)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
        readable_ticks(axes)
    if len(lines) > 1:
        axes.legend()
    return axes


def readable_ticks(axes):
    """Where a logarithmic y axis spans few powers of ten: 0.01, 0.02, 0.05 and so on, in plain numbers."""
    low, high = axes.get_ylim()
    if high / low < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def bars(names, values, title="", x="", axes=None, colour=BLUE):
    """Horizontal bars, the first name on top; names are tokens or parts of a model."""
    axes = axes or panels(1, 6.5, 0.26 * len(names) + 1)[0]
    axes.barh(range(len(names)), torch.as_tensor(values).detach().float().cpu(), color=colour)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=x)
    return axes


def histograms(groups, title="", x="", y="share", bins=60, axes=None):
    """Named distributions over each other: groups is {name: tensor}."""
    axes = axes or panels(1, 6.5, 3.4)[0]
    for name, values in groups.items():
        flat = values.detach().float().flatten()
        axes.hist(flat.cpu().numpy(), bins=bins, weights=torch.full_like(flat, 1 / len(flat)).cpu().numpy(),
                  alpha=0.55, label=name)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.legend()
    return axes


# ---- 0_setup_and_shapes ----

def shares(rows, title="", x="", axes=None):
    """Stacked bars that all end at 100 %: rows is {name: {part: number}}, with the same parts in each."""
    axes = axes or panels(1, 9, 0.45 * len(rows) + 1.5)[0]
    left = torch.zeros(len(rows))
    for part, colour in zip(next(iter(rows.values())), COLOURS):
        share = torch.tensor([100 * row[part] / sum(row.values()) for row in rows.values()])
        drawn = axes.barh(range(len(rows)), share, left=left, color=colour, label=part)
        axes.bar_label(drawn, [f"{s:.0f}" if s >= 3 else "" for s in share], label_type="center", color="white", fontsize=9)
        left += share
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(title=title, xlabel=x, xlim=(0, 100))
    axes.figure.legend(loc="outside lower center", ncols=6, fontsize=9)
    return axes


# ---- 4_weights_and_equivalence ----

def zero_floor(axes, values, side="y"):
    """A log axis where exact zeros have a floor of their own; -> function that says where a value is drawn."""
    positive = [v for v in values if v > 0]
    low = int(torch.tensor(min(positive, default=1e-8)).log10().floor()) - 1
    high = int((torch.tensor(max(positive, default=1.0)).log10() + 0.2).ceil())
    at = range(low, high + 1, 2 if high - low > 9 else 1)
    labels = ["exactly 0" if side == "y" else "exactly\n0", *(f"$10^{{{e}}}$" for e in at[1:])]
    getattr(axes, f"set_{side}scale")("log")
    getattr(axes, f"set_{side}lim")(10.0 ** (low - 0.5), 10.0 ** high)
    getattr(axes, f"set_{side}ticks")([10.0 ** e for e in at], labels)
    axes.minorticks_off()
    return lambda value: max(value, 10.0 ** low)


def differences(xs, lines, title="", x="", y="|difference| / |reference|", edge=None, axes=None, width=8.6):
    """Named lines over the rows of a model or over lengths, on a log axis with a floor for exact zeros."""
    axes = axes or panels(1, width, 3.8)[0]
    names = [str(x_).split(", window")[0].rstrip(")").partition(" (") for x_ in xs]
    xs = [f"{name}\n({kind})" if kind else name for name, _, kind in names]
    drawn = zero_floor(axes, [v for values in lines.values() for v in values])
    for i, (name, values) in enumerate(lines.items()):                     # hollow, ever smaller: none hides another
        axes.plot(xs, [drawn(v) for v in values], label=name, marker="osD^v<>"[i % 7], fillstyle="none",
                  markersize=max(4, 10 - 1.2 * i), color=COLOURS[i % len(COLOURS)])
    if edge is not None:
        axes.axvline(str(edge), color=GREY, linewidth=1, linestyle="--")
        axes.annotate(f" window {edge}", (str(edge), 1), xycoords=("data", "axes fraction"), va="top", color=GREY, fontsize=9)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.figure.legend(loc="outside right upper", fontsize=9)
    return axes


def losses_without(losses, title=""):
    """By how much the loss moved for each part that a load left out, on a log axis; the colour says which way."""
    moved = {part: loss - losses["nothing"] for part, loss in losses.items() if part != "nothing"}
    axes = panels(1, 8.6, 0.27 * len(moved) + 1.2)[0]
    for row, change in enumerate(moved.values()):
        axes.plot(abs(change), row, marker="o" if change > 0 else "v", color=RED if change > 0 else BLUE)
        axes.annotate(f"{change:+.4f}", (abs(change), row), (8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(moved)), moved, fontsize=9)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="change of the loss on the speech, nats per token", xscale="log", xlim=(2e-4, 30))
    axes.plot([], [], "o", color=RED, label="the loss rises")
    axes.plot([], [], "v", color=BLUE, label="the loss falls")
    axes.figure.legend(loc="outside right upper", fontsize=9)
    return axes


def ladder(groups, title="", x="|difference| / |reference|, logits", bounds=(), axes=None):
    """Dots on a log axis, a line for each name: groups is {group: {name: value}}; bounds are marked."""
    names = [name for values in groups.values() for name in values]
    axes = axes or panels(1, 8.6, 0.27 * len(names) + 1.2)[0]
    drawn, row = zero_floor(axes, [v for values in groups.values() for v in values.values()], "x"), 0
    for i, (group, values) in enumerate(groups.items()):
        rows = range(row, row := row + len(values))
        axes.scatter([drawn(v) for v in values.values()], rows, color=COLOURS[i], marker="osD^"[i % 4], label=group, zorder=3)
    for bound in bounds:
        axes.axvline(bound, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(f" {bound:.0e}", (bound, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(x)
    axes.set_title(title, pad=18 if bounds else 6)
    axes.figure.legend(loc="outside right upper", fontsize=9)
    return axes


# ---- 1_gpt_neo ----

def lens(words, values, columns, rows, title="", bar="probability"):
    """A heat map with a word in each cell: words and values (rows, columns), colour says the value."""
    axes = panels(1, 9, 0.42 * len(rows) + 1.4)[0]
    values = torch.as_tensor(values).detach().float().cpu()
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=0, vmax=1)
    for i, line in enumerate(words):
        for j, word in enumerate(line):
            axes.text(j, i, word, ha="center", va="center", fontsize=8.5, color="black" if values[i, j] > 0.6 else "white")
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.grid(False)
    axes.set(title=title, xlabel="token that is read")
    axes.figure.colorbar(image, ax=axes, label=bar, shrink=0.9)
    return axes


# ---- 2_gpt_neox ----

def turning(pairs, width=9.0, labels=None):
    """A circle for each pair of dims: pairs is {title: (n, 2)}, an arrow for each row, with its label where there is room.

    labels: what is written at the n arrows, by default 0, 1, 2, and so on.
    """
    axes = panels(len(pairs), width, width / len(pairs) + 0.5)
    for ax, (title, points) in zip(axes, pairs.items()):
        points = points.tolist()
        ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="#cccccc"))
        last = (9, 9)
        for t, (x, y) in enumerate(points):
            shade, out = plt.cm.viridis(0.9 * t / max(1, len(points) - 1)), 1 + 0.2 / max(0.1, (x * x + y * y) ** 0.5)
            ax.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="-|>", color=shade, lw=1.6, shrinkA=0, shrinkB=0))
            if (x - last[0]) ** 2 + (y - last[1]) ** 2 > 0.09:
                ax.text(out * x, out * y, labels[t] if labels else t, color=shade, fontsize=9, ha="center", va="center")
                last = (x, y)
        ax.set(title=title, aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), xticks=[-1, 0, 1], yticks=[-1, 0, 1],
               xlabel="first dim of the pair")
    axes[0].set_ylabel("second dim of the pair")


def strips(rows, title="", x=""):
    """Lines of coloured blocks under each other: rows is {name: [(label, width, colour), ...]}."""
    axes = panels(1, 9, 0.55 * len(rows) + 1.1)[0]
    for y, blocks in enumerate(rows.values()):
        left = 0
        for label, width, colour in blocks:
            axes.barh(y, width, left=left, height=0.75, color=colour, edgecolor="white")
            axes.text(left + width / 2, y, label, ha="center", va="center", fontsize=9, color="black" if colour in (YELLOW, SKY, ORANGE) else "white")
            left += width
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(False)
    axes.margins(x=0)
    axes.set(title=title, xlabel=x)


def by_distance(measured):
    """A panel for each layer and a curve for each head, with a dot at its maximum: measured is (layers, H, distances)."""
    axes = panels(len(measured), 9, 3.2, sharey=True)
    for layer, (ax, curves_) in enumerate(zip(axes, measured.tolist())):
        for head, line in enumerate(curves_):
            ax.plot(line, color=COLOURS[head], linewidth=1.4, label=f"head {head}")
            ax.plot(line.index(max(line)), max(line), "o", color=COLOURS[head], markersize=5)
        ax.set(title=f"layer {layer}", xlabel="distance, tokens")
    axes[0].set_ylabel("mean score")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(measured[0]), fontsize=9)


def attention_maps(maps):
    """A small square for each head: maps is a list with (H, T, T) of each layer; layers are rows, heads columns."""
    figure, rows = plt.subplots(len(maps), len(maps[0]), figsize=(8.4, 2.1 * len(maps)), sharex=True, sharey=True, squeeze=False)
    for layer, (axes, heads) in enumerate(zip(rows, maps)):
        for head, (ax, weights) in enumerate(zip(axes, heads)):
            image = ax.imshow(weights.detach().float() ** 0.5, vmin=0, vmax=1)
            ax.set_title(f"layer {layer}, head {head}", fontsize=9)
            ax.grid(False)
        axes[0].set_ylabel("query", fontsize=9)
    for ax in rows[-1]:
        ax.set_xlabel("key", fontsize=9)
    bar = figure.colorbar(image, ax=rows, shrink=0.5, label="weight", ticks=[0, 0.1 ** 0.5, 0.3 ** 0.5, 1])
    bar.ax.set_yticklabels(["0", "0.1", "0.3", "1"])


def by_layer(lines, title="", x="layer", y=""):
    """Named lines over whole numbers, with the axis from 0: lines is {name: values}."""
    count = max(map(len, lines.values()))
    curves(range(count), lines, title, x, y, marker="o").set(ylim=(0, None), xticks=range(count))


def level(axes, value, text, x):
    """A dashed line at a height that means something, with its name at x."""
    axes.axhline(value, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(text, (x, value), (0, 2), textcoords="offset points", color=GREY, fontsize=9)


def residual_forms():
    """The two blocks as drawings: sequential as in GPT-Neo, parallel as in GPT-NeoX."""
    colours = {"ln_1": GREY, "ln_2": GREY, "attn": BLUE, "mlp": RED, "+": "black"}
    forms = {"one after the other: the MLP reads what attention wrote": (
        [[(0.35, 0.97), (0.35, 0.02)], [(0.35, 0.92), (0.68, 0.92), (0.68, 0.56), (0.35, 0.56)], [(0.35, 0.47), (0.68, 0.47), (0.68, 0.11), (0.35, 0.11)]],
        [("ln_1", 0.68, 0.82), ("attn", 0.68, 0.67), ("+", 0.35, 0.56), ("ln_2", 0.68, 0.37), ("mlp", 0.68, 0.22), ("+", 0.35, 0.11)]),
        "in parallel: both read the same x, and one sum ends the block": (
        [[(0.5, 0.97), (0.5, 0.02)], [(0.5, 0.92), (0.18, 0.92), (0.18, 0.3), (0.5, 0.3)], [(0.5, 0.92), (0.82, 0.92), (0.82, 0.3), (0.5, 0.3)]],
        [("ln_1", 0.18, 0.74), ("attn", 0.18, 0.5), ("ln_2", 0.82, 0.74), ("mlp", 0.82, 0.5), ("+", 0.5, 0.3)])}
    for ax, (title, (paths, boxes)) in zip(panels(2, 9, 3.7), forms.items()):
        for i, path in enumerate(paths):                                   # the first is the residual stream
            ax.plot(*zip(*path), color="black", lw=1.4 if i else 2.6, solid_joinstyle="miter")
            ax.annotate("", path[-1], path[-2], arrowprops=dict(arrowstyle="-|>", color="black", shrinkA=0, shrinkB=9 if i else 0))
        for name, x, y in boxes:
            ax.text(x, y, name, ha="center", va="center", color="white",
                    bbox=dict(boxstyle="circle,pad=0.2" if name == "+" else "round,pad=0.45", fc=colours[name], ec="none"))
        ax.text(paths[0][0][0] + 0.03, 0.97, "x", va="center", fontsize=12)
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.set_title(title, fontsize=10)
        ax.axis("off")


def wavelengths(values, contexts, title=""):
    """Tokens for one turn of each pair, beside the lengths of contexts: {name: tokens}."""
    axes = curves(range(len(values)), {"wavelength": values}, title, "pair", "tokens for one turn", marker="o", log="y")
    for name, tokens in contexts.items():
        level(axes, tokens, f"{tokens}: {name}", 0)


def angle_errors(positions, low, high):
    """Largest error of an angle so far, float32 (low) and bfloat16 (high): both (positions, pairs)."""
    lines = {**{f"pair {i}, bfloat16": high[:, i] for i in (0, 2, 5)}, "worst pair, float32": low.amax(-1)}
    axes = curves(positions, lines, "angle = position × speed, in two precisions", "position",
                  "largest error so far, radians", log="xy")
    level(axes, 3.14159, "half a turn", 1)
    axes.set_ylim(1e-11, 50)
    axes.legend(fontsize=9, ncols=2, loc="lower left")


def row_lengths(embedding, head, never, name):
    """A dot for each token: the length of its row in both matrices; `never` marks those that never came."""
    axes = panels(1, 6.5, 3.6)[0]
    for group, chosen, marker in (("all other tokens", ~never, "o"), (name, never, "^")):
        axes.scatter(embedding[chosen].tolist(), head[chosen].tolist(), s=12, marker=marker, alpha=0.6, label=group)
    axes.set(title="tokens that never came: rows as drawn in the one, long and alike in the other",
             xlabel="length of the row in the embedding", ylabel="length of the row in the head",
             xlim=(0, None), ylim=(0, None))
    axes.legend()


def training(logs):
    """Loss of each step, lightly smoothed, and bits per byte of held-out text: logs is {name: rows of metrics}."""
    loss, bits = panels(2, 9, 3.4)
    for name, rows in logs.items():
        values = torch.tensor([row["loss"] for row in rows if "loss" in row]).unfold(0, 25, 1).mean(-1)
        loss.plot(range(13, 13 + len(values)), values, label=name, linewidth=1.2)
        bits.plot(*zip(*[(row["step"], row["valid_bits_per_byte"]) for row in rows if "sample" in row]), marker="o", markersize=4, label=name)
    loss.set(title="training loss, mean of 25 steps", xlabel="step", ylabel="nats per token", ylim=(2.8, 8))
    bits.set(title="held-out plays", xlabel="step", ylabel="bits per byte")
    bits.legend()


# ---- 5_sampling ----

def candidates(names, before, afters, count=18):
    """The likeliest tokens: grey what the model gave them, blue what is drawn from; nothing blue where cut."""
    order = before.argsort(descending=True)[:count]
    figure = panels(len(afters), min(9.0, 4 + 2.5 * len(afters)), 0.16 * count + 1, sharex=True, sharey=True)
    for axes, (title, after) in zip(figure, afters.items()):
        axes.barh(range(count), before[order].tolist(), color="#CCCCCC", height=0.85, label="the model's")
        axes.barh(range(count), after[order].tolist(), color=BLUE, height=0.45, label="drawn from")
        axes.set_yticks(range(count), [names[i] for i in order.tolist()], fontsize=8)
        axes.grid(axis="y", visible=False)
        axes.set(title=f"{title}: {(after > 0).sum()} tokens", xlabel="probability", ylim=(count - 0.4, -0.6))
    axes.legend(loc="lower right", fontsize=9)


def by_rank(distributions, title="", floor=1e-9, axes=None, log="xy"):
    """Named distributions, each from its likeliest token to its unlikeliest; nothing below `floor` is shown."""
    ranked = {name: p.sort(descending=True).values for name, p in distributions.items()}
    ranks = range(1, 1 + len(next(iter(ranked.values()))))
    curves(ranks, ranked, title, "rank (likeliest first)", "probability", axes, log=log).set_ylim(floor, 1.5)


def rank_octaves(before, afters):
    """Probability by rank in groups 1, 2–3, 4–7, …, each a bar of its whole group: before, and each way after."""
    V, order = len(before), before.argsort(descending=True)
    firsts = [2**i for i in range(V.bit_length())]

    def heights(p):
        return [p[order][first - 1:2 * first - 1].sum().item() for first in firsts]

    for axes, (title, after) in zip(panels(len(afters), sharey=True), afters.items()):
        axes.bar(range(len(firsts)), heights(before), color="#CCCCCC", width=0.95, label="the model's")
        axes.bar(range(len(firsts)), heights(after), color="none", edgecolor=BLUE, linewidth=1.6, width=0.95,
                 label="drawn from")
        axes.set_xticks(range(len(firsts)), firsts, fontsize=8, rotation=90)
        axes.grid(axis="x", visible=False)
        axes.set(title=title, xlabel="rank, groups from … on", ylabel="probability of the group")
        axes.label_outer()
    axes.legend(fontsize=9)


def coloured_text(pieces, values, title="", label="", colours="viridis_r", axes=None):
    """A text in its own lines, each token on a ground of its value's colour; a line break is shown as ↵."""
    lines = "".join(pieces).split("\n")
    axes = axes or panels(1, 9.0, 0.27 * len(lines) + 0.5)[0]
    values = torch.as_tensor(values).tolist()
    low, high = min(values), max(values)
    row = column = 0
    for piece, value in zip(pieces, values):
        shade = (value - low) / (high - low)
        for run in filter(None, piece.replace("\n", "\0\n\0").split("\0")):
            axes.barh(row, len(run), left=column, height=0.94, color=plt.get_cmap(colours)(shade),
                      edgecolor="white", linewidth=0.8)
            for i, letter in enumerate(run.replace("\n", "↵")):
                axes.text(column + i + 0.5, row, letter, ha="center", va="center", fontsize=9, family="monospace",
                          color="white" if shade > 0.45 else "black")
            row, column = (row + 1, 0) if run == "\n" else (row, column + len(run))
    axes.set(xlim=(0, 1 + max(map(len, lines))), ylim=(len(lines) - (0.4 if lines[-1] else 1.4), -0.6))
    axes.set_title(title, loc="left")
    axes.axis("off")
    scale = plt.cm.ScalarMappable(plt.Normalize(low, high), colours)
    axes.figure.colorbar(scale, ax=axes, label=label, aspect=15, fraction=0.05)
    return axes


def window_rows(rows, title="", axes=None):
    """The windows (begin, first, end) of a sliding evaluation: blue what each scores, grey what it only reads."""
    axes, rows = axes or panels(1, 6.5, 2.6)[0], list(rows)
    for i, (begin, first, end) in enumerate(rows):
        axes.barh(i, first - begin, left=begin, color="#CCCCCC", edgecolor="white", label="read" if i == 0 else None)
        axes.barh(i, end - first, left=first, color=BLUE, edgecolor="white", label="scored" if i == 0 else None)
    axes.set_yticks(range(len(rows)), range(1, len(rows) + 1), fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title=f"{title}: {len(rows)} passes", xlabel="token", ylabel="pass")
    axes.legend(loc="lower left", fontsize=9)
    return axes


# ---- 3_triton_window ----

def key_blocks(tiles, T, S, title="", axes=None):
    """Tiles (first query, queries, first key, keys, full?) in the plane of keys and queries; the rest is never visited."""
    axes = axes or panels(1, 4.6, 4.6)[0]
    axes.set_facecolor("#F2F2F2")
    for first, rows, start, keys, full in tiles:
        axes.add_patch(plt.Rectangle((start, first), keys, rows, facecolor=BLUE if full else ORANGE, edgecolor="white", linewidth=0.6))
    axes.set(title=title, xlabel="key", ylabel="query", xlim=(0, S), ylim=(T, 0), aspect="equal")
    axes.grid(False)
    return axes


def key_block_legend(axes):
    """What the colours of `key_blocks` mean, once for the whole figure."""
    for name, colour in (("full: all scores count", BLUE), ("edge: some are masked", ORANGE), ("skipped", "#E4E4E4")):
        axes.bar(0, 0, color=colour, label=name)
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)


def online_steps(scores, steps, truth, size):
    """Online softmax of one row: the scores with the maximum so far, the sum's old and new part, the accumulator as rows of an image."""
    left, middle, right = panels(3, 9, 4.1, gridspec_kw=dict(width_ratios=(3, 2.4, 3)))
    peaks, sums, sofar = [m.item() for m, _, _ in steps], [l.item() for _, l, _ in steps], [o for _, _, o in steps]
    fades, before = [0.0, *(2.718281828459045 ** (a - b) for a, b in zip(peaks, peaks[1:]))], [0.0, *sums[:-1]]
    kept, blocks = [f * l for f, l in zip(fades, before)], range(1, len(steps) + 1)
    left.plot(scores.cpu(), "o", color=GREY, markersize=3, label="score")
    left.step([n * size - 0.5 for n in range(len(steps) + 1)], [*peaks, peaks[-1]], where="post", color=RED, label="m, largest so far")
    left.set(title="scores come block by block", xlabel="key in the window", ylabel="score", xticks=range(0, len(scores) + 1, size))
    left.legend(loc="lower right", fontsize=8.5, frameon=True)
    middle.bar(blocks, kept, color=BLUE, label="old sum, faded")
    middle.bar(blocks, [l - x for l, x in zip(sums, kept)], bottom=kept, color=ORANGE, label="new in this block")
    middle.bar(blocks[1:], before[1:], color="none", edgecolor="black", linestyle="--", zorder=3, label="old sum before fading")
    for n, fade, total in zip(blocks[1:], fades[1:], kept[1:]):
        middle.text(n, total / 2, f"×{fade:.2f}", ha="center", va="center", fontsize=8, color="white")
    middle.set(title="the sum l", xlabel="block", ylabel="l", xticks=list(blocks), ylim=(0, 1.4 * max(sums)))
    middle.legend(loc="upper left", fontsize=8.5)
    rows, names = [sofar[0]], ["o after 1"]
    for n, fade in zip(blocks[1:], fades[1:]):
        rows, names = rows + [sofar[n - 2] * fade, sofar[n - 1]], names + [f"faded ×{fade:.2f}", f"o after {n}"]
    ends = torch.stack([sofar[-1] / sums[-1], truth])                      # much smaller, so with a scale of their own
    image = torch.cat([torch.stack(rows) / torch.stack(rows).abs().max(), ends / ends.abs().max()])
    right.imshow(image.cpu(), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    right.set_yticks(range(len(image)), [*names, "o / l", "softmax(s) v"], fontsize=9)
    right.set(title="the accumulator o\n(last two rows: own scale)", xlabel="dim of the head")
    right.grid(False)
    for edge in range(len(image)):
        right.axhline(edge + 0.5, color="white", linewidth=3)


def masked_tiles(seen, size, nan_rows, title="", axes=None):
    """Which score counts (dark), cut into blocks of `size` keys; rows whose result is NaN are marked at the right."""
    axes = matrix(~seen, title, axes=axes or panels(1, 8.2, 3.4)[0], colours="Blues_r", limits=(-0.6, 1))
    axes.set_aspect("equal")
    for edge in range(size, seen.shape[1], size):
        axes.axvline(edge - 0.5, color=GREY, linewidth=1)
    for row in nan_rows:
        axes.text(seen.shape[1] - 0.2, row, "NaN", color=RED, va="center", fontsize=8)
    return axes


def plain_ticks(axes, xs, ys=None):
    """Plain numbers at the powers of two (and at ys) of logarithmic axes."""
    axes.set_xticks(xs, xs)
    if ys is not None:
        axes.set_yticks(ys, ys)
    axes.minorticks_off()


# ---- 6_finetuning ----

def seeds_with_margins(rates, margins, title="", x="", axes=None):
    """A row for each method: a point for each seed, and the mean with its interval; rates are {name: (seeds,)}."""
    axes = axes or panels(1, 8, 0.5 * len(rates) + 1.2)[0]
    for i, (name, values) in enumerate(rates.items()):
        axes.errorbar(values.mean().item(), i, xerr=float(margins[name]), fmt="|", color=GREY, capsize=4, markersize=12,
                      label="mean, 95 % interval" if i == 0 else None)
        axes.plot(values.tolist(), [i - 0.18] * len(values), "o", color=BLUE, markersize=5, alpha=0.7,
                  label="one seed" if i == 0 else None)
        axes.text(1.0, i, f"{values.mean():.2f}", va="center", ha="right", fontsize=10)
    axes.set_yticks(range(len(rates)), rates)
    axes.invert_yaxis()
    axes.axvline(1 / 3, color=GREY, linewidth=1, linestyle="--")
    axes.text(1 / 3 + 0.005, len(rates) - 0.6, "chance", color=GREY, fontsize=9)
    axes.grid(axis="y", visible=False)
    axes.set(title=title, xlabel=x, xlim=(0, 1), ylim=(len(rates) - 0.5, -0.6))
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, 0.62))
    return axes


def grouped(places, groups, title="", y="", axes=None):
    """Bars side by side at each place: groups is {name: values}."""
    axes = axes or panels(1, 9, 3.6)[0]
    for i, (name, values) in enumerate(groups.items()):
        at = [p + (i - (len(groups) - 1) / 2) * 0.8 / len(groups) for p in range(len(places))]
        axes.bar(at, values, 0.8 / len(groups), color=(SKY, ORANGE, BLUE)[i % 3], label=name)
    axes.set_xticks(range(len(places)), ["much ado" if place.startswith("much") else place.replace("_", " ") for place in places], fontsize=9)
    axes.grid(axis="x", visible=False)
    axes.set(title=title, ylabel=y, ylim=(0, 1))
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return axes


def confusion(counts, names, title="", axes=None):
    """How often (row) was taken for (column), with the numbers."""
    axes = matrix(counts, title, "answer", "truth", names, axes, "Blues", limits=(0, counts.sum(1).max()))
    axes.set_xticks(range(len(names)), names, rotation=0, fontsize=9)
    for i, row in enumerate(counts.tolist()):
        for j, count in enumerate(row):
            axes.text(j, i, f"{count:.0f}", ha="center", va="center", color="white" if count > counts.sum(1).max() / 2 else "black")
    return axes
