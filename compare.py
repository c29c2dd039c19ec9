"""Is it the same model?  A report, layer by layer, against transformers or against anyone's port.

    python compare.py EleutherAI/pythia-70m                              ours against transformers
    python compare.py checkpoints/demo-neo --gradients --plot layers.png
    python compare.py checkpoints/demo-neo --theirs mine.safetensors     a port against ours

The same ids go through both models at several lengths, and the output of every layer is compared.
The first row that differs shows where to look.  The first position that differs in this row shows
what to look for: position 0 can attend to nothing but itself, and before position `window` a local
layer does the same as a global one.

Our naive attention agrees with transformers' eager attention to the last bit.  Another order of
operations (another backend, another port) does not, and is judged by |difference| / |reference|,
with norms over the whole tensor.  The tolerance is --tolerance X, or by default
    float32             1e-5    a right model is near 2e-7, the mildest known mistake at 1.7e-5
    float16, bfloat16   8 eps   7.8e-3 and 6.2e-2.  sdpa is 1 to 6 eps from naive in random models
                                of 4 to 24 layers, and 15 eps in 24 GPT-Neo layers with ten times
                                the usual weights.  A wrong GELU changes far less than this, so
                                check a port in float32 first.
    gradients           the same, but 1e-6 in float32 with naive attention

To check a port, in any language: let it read these ids, save what it computes, compare.

    python compare.py MODEL --ids > ids.json              # as long as the local layers need

    ids = torch.tensor(json.load(open("ids.json")))                                # (1, T)
    logits, hidden = my_model(ids)                        # (1, T, V) and L + 1 times (1, T, C)
    tensors = {"input_ids": ids, "logits": logits}
    tensors |= {f"hidden_states.{i}": x for i, x in enumerate(hidden)}             # optional
    safetensors.torch.save_file(tensors, "mine.safetensors")

`hidden` is transformers' tuple: the embeddings, what each block but the last returns, and what the
final norm returns.  One stacked tensor "hidden_states" will do as well, and a batch of 1 may be
left out.  Without input_ids the file is taken to answer the ids of `--seed`.

    B  batch · T  tokens · C  width · V  vocabulary · L  layers
"""

import contextlib
import json
import math
import os
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import torch
from safetensors.torch import save_file

from attention import choose_backend
from base import PreTrainedModel, check_inputs
from commands import Parser, a_name, as_command, check_outputs, given, spelled
from diagnose import (
    HINTS,
    as_dicts,
    diagnose,
    explained,
    hint,
    make_ids,
    nan_is_infinite,
    rows_of,
    tensors_of,
    told_apart,
    trace,
    window_of,
)
from files import error_line, one_line, plain, shown, write_result
from load_weights import (
    NAMES,
    AutoModelForCausalLM,
    official_names,
    our_name,
    read_config,
    read_tensors,
)
from neo import GPTNeoConfig
from neox import GPTNeoXConfig
from pictures import COLOURS, picture_format, plain_label, pyplot
from vectors import check_vectors, table, write_junit, write_vectors

CONFIGS = {"gpt_neo": GPTNeoConfig, "gpt_neox": GPTNeoXConfig}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LONGEST = 2**20                                            # more tokens would take days


# ------------------------------------------------------------------------------------------------
# What goes in
# ------------------------------------------------------------------------------------------------

def config_of(name, revision=None):
    """The config of a checkpoint, without its weights."""
    raw = read_config(name, revision)
    return CONFIGS[raw["model_type"]].from_dict(raw)


def default_lengths(config):
    """Lengths of one token, and below, at, above and twice the window, within the positions."""
    W = window_of(config)
    lengths = [1, 5, 64, 300]
    if W is not None:                                      # the last is not a multiple of W
        lengths = [1, min(5, W), W, W + 1, 2 * W + max(1, W // 32)]
    return sorted({min(T, config.max_position_embeddings) for T in lengths})


def check_room(config, batch, lengths, models=2):
    """Raise ValueError for texts whose numbers, in float32, this machine's memory cannot hold.

    These are the hidden states and logits of so many models, the scores of naive attention while
    they are computed, and the logits in float64 while they are compared; the weights are not
    counted.
    """
    if not hasattr(os, "sysconf"):                         # Windows
        return
    longest = max(lengths)
    numbers = models * batch * sum(lengths) * (
        (config.num_hidden_layers + 2) * config.hidden_size + config.vocab_size)
    numbers += models * batch * longest * max(config.num_attention_heads * longest,
                                              3 * config.vocab_size)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * numbers > memory:
        need = 4 * numbers / 2**30
        raise ValueError(f"{batch} texts of {longest} tokens need about {need:.3g} GiB "
                         f"of memory, and this machine has {memory / 2**30:.3g}: take a smaller "
                         "--batch or --lengths")


# ------------------------------------------------------------------------------------------------
# What comes out
# ------------------------------------------------------------------------------------------------

def row_names(config):
    """One name for each tensor of `trace`."""
    everywhere = "" if window_of(config) is None else " (global)"      # NeoX has no others
    kinds = [everywhere if w is None else f" (local, window {w})" for w in config.windows]
    blocks = [f"block {i}{kind}" for i, kind in enumerate(kinds)]
    return ["embeddings", *blocks, "final norm", "logits"]


def gradients(model, ids, table):
    """{"loss": the next-token loss on these ids, official name: its gradient, ...}."""
    loss = model(ids, labels=ids).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    if not isinstance(model, PreTrainedModel):             # transformers' names, as in its memory
        grads = {our_name(name, table): grad for name, grad in grads.items()}
    return {"loss": loss.detach(), **official_names(grads, table)}


def run(model, inputs, table, with_gradients):
    """(a trace for each of the inputs, gradients for the longest or, if not asked for, {})"""
    traces = [trace(model, ids) for ids in inputs]
    return traces, gradients(model, inputs[-1], table) if with_gradients else {}


def load_ours(name, revision, dtype, backend):
    """The model of this project."""
    return AutoModelForCausalLM.from_pretrained(name, revision=revision, torch_dtype=dtype,
                                                attn_implementation=backend)


def load_transformers(name, revision, dtype):
    """(the reference with eager attention in a torch dtype, its name and version)"""
    try:
        import transformers
    except ImportError:
        raise ValueError("the reference is not installed: pip install transformers "
                         "(or compare with what a port saved: --theirs FILE)") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, attn_implementation="eager")
    except Exception as error:                             # it raises errors of many kinds
        raise ValueError(f"transformers cannot load {name}: {type(error).__name__}: "
                         f"{error_line(error)}") from None
    return model.eval(), f"transformers {transformers.__version__} eager"


# ------------------------------------------------------------------------------------------------
# Files of another port
# ------------------------------------------------------------------------------------------------

def read_port(path, layers):
    """{name: tensor} of a port's file: logits, and maybe input_ids and all of the hidden states.

    Raises ValueError where another tensor is there or one of these is missing.
    """
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        raise ValueError(f"--theirs needs a .safetensors file, and {path} is not one")
    tensors = dict(read_tensors(Path(path)))
    hidden = [f"hidden_states.{i}" for i in range(layers + 1)]
    stack = tensors.pop("hidden_states", None)
    if stack is not None:
        if stack.dim() < 3 or len(stack) != len(hidden):
            raise ValueError(f"{path}: hidden_states has shape {tuple(stack.shape)}, expected "
                             f"{len(hidden)}: embeddings, each block but the last, final norm")
        if both := sorted(tensors.keys() & set(hidden)):
            raise ValueError(f"{path} holds {both[0]} beside hidden_states: leave one of them out")
        tensors |= zip(hidden, stack)
    if unknown := sorted(tensors.keys() - {"input_ids", "logits", *hidden}):
        raise ValueError(f"{path} holds {', '.join(map(plain, unknown[:5]))}; known are input_ids, "
                         f"logits, and hidden_states or hidden_states.0 to hidden_states.{layers}")
    wanted = ["logits"] + (hidden if tensors.keys() & set(hidden) else [])
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return tensors


def read_theirs(path, config, seed):
    """A port's file -> (ids (B, T), rows, seed).

    Of the rows, those that the port did not save are None.  A file without ids answers those of the
    seed; where it has its own, the seed that is returned is None.
    Raises ValueError, in one line, for a file that cannot be compared.
    """
    tensors = {name: x if x.dim() == (2 if name == "input_ids" else 3) else x[None]
               for name, x in read_port(path, config.num_hidden_layers).items()}
    B, T = (*tensors["logits"].shape, 0)[:2]
    if not B * T:
        shape = tuple(tensors["logits"].shape)
        raise ValueError(f"{path}: logits has shape {shape}, without any token")
    widths = {"input_ids": (), "logits": (config.vocab_size,)}
    for name, x in sorted(tensors.items(), key=lambda item: item[0] != "logits"):
        shape = (B, T, *widths.get(name, (config.hidden_size,)))
        kind, dtypes = ("integers", INTEGERS) if name == "input_ids" else ("floats", FLOATS)
        if x.shape != shape or x.dtype not in dtypes:
            raise ValueError(f"{path}: {name} is {x.dtype} of shape {tuple(x.shape)}, expected "
                             f"{kind} of shape {shape}, where a batch of 1 may be left out")
    ids, seed = ((tensors["input_ids"].long(), None) if "input_ids" in tensors
                 else (make_ids(seed, B, T, config.vocab_size), seed))
    try:
        check_inputs(ids, None, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return ids, rows_of(tensors, config.num_hidden_layers), seed


def save_ours(path, ids, rows):
    """Write our results in the format of a port's file."""
    tensors = {"input_ids": ids.contiguous(), **tensors_of(rows)}
    write_result(path, lambda part: save_file(tensors, part))


# ------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------

def default_tolerance(dtype, float32=1e-5):
    """The limit of a relative difference; the top of this file says where its numbers come from."""
    eps = torch.finfo(dtype).eps
    return 8 * eps if eps > 1e-4 else float32


def tolerances(dtype, same_order):
    """(limit for the rows, limit for the gradients).

    None asks for the same bits, of two models that compute in the same order of operations.  (In
    float64 the reference still computes its scores in float32.)
    """
    if same_order:
        return None, default_tolerance(dtype, 1e-6)
    return default_tolerance(dtype), default_tolerance(dtype)


def measure(x, reference, tolerance):
    """A dict that says how far x is from the reference, and whether it is the same.

    tolerance: the largest relative difference allowed; None asks for the same bits.
    """
    bit_equal = x.dtype == reference.dtype and torch.equal(x, reference)
    gap, size = x.double() - reference.double(), reference.double().norm().item()
    if bit_equal or not gap.any():                         # equal infinities would make NaN below
        relative = largest = 0.0
    else:
        largest = gap.abs().max().item()
        relative = gap.norm().item() / size if size else math.inf
    return {"max_abs": largest, "relative": relative, "bit_equal": bit_equal,
            "same": bit_equal if tolerance is None else relative <= tolerance}


def first_position(x, reference, tolerance):
    """The first position at which x (B, T, C) is too far off in any text of the batch."""
    gap = (x.double() - reference.double()).norm(dim=-1)                   # (B, T)
    bad = ~(gap <= (tolerance or 0.0) * reference.double().norm(dim=-1))   # NaN is bad
    return bad.any(0).int().argmax().item()


def compare_traces(names, inputs, xs, references, tolerance):
    """A dict for each name that was saved, with a result for each of the inputs."""
    rows = []
    for i, name in enumerate(names):
        results = []
        for ids, x, reference in zip(inputs, xs, references):
            if x[i] is not None:
                result = measure(x[i], reference[i], tolerance)
                first = None if result["same"] else first_position(x[i], reference[i], tolerance)
                results.append({"length": ids.size(1), **result, "first_position": first})
        if results:
            rows.append({"row": name, "same": all(r["same"] for r in results), "results": results})
    return rows


def compare_gradients(xs, references, tolerance):
    """The loss and each parameter's gradient, worst first; and all gradients as one vector."""
    rows = [{"row": name, **measure(xs[name], references[name], tolerance)} for name in references]
    rows.sort(key=lambda row: nan_is_infinite(row["relative"]), reverse=True)
    names = references.keys() - {"loss"}
    gap = sum(squares(xs[name].double() - references[name].double()) for name in names)
    size = sum(squares(references[name].double()) for name in names)
    return {"tolerance": tolerance, "same": all(row["same"] for row in rows),
            "total": math.sqrt(gap / size) if size else math.inf, "rows": rows}


def squares(x):
    return x.square().sum().item()


def next_token_agreement(xs, references):
    """For each of the inputs, the share of positions whose likeliest next token is the same."""
    return [(x[-1].argmax(-1) == reference[-1].argmax(-1)).double().mean().item()
            for x, reference in zip(xs, references)]


def make_report(name, *, revision=None, dtype="float32", backend="naive", theirs=None, lengths=None,
                batch=1, seed=0, tolerance=None, with_gradients=False):
    """The whole comparison, as a dict that JSON can hold.

    With theirs, a port's file is judged by our model; without it, our model by transformers'.
    Raises ValueError or OSError for what cannot be read or compared.
    """
    config = config_of(name, revision)
    if theirs:
        ids, saved, seed = read_theirs(theirs, config, seed)
        inputs = [ids]
    else:
        lengths = lengths or default_lengths(config)
        check_room(config, batch, lengths)
        inputs = [make_ids(seed, batch, T, config.vocab_size) for T in lengths]
    table = NAMES[config.model_type]
    model = load_ours(name, revision, dtype, backend)
    backend, dtype = choose_backend(backend), model.dtype
    ours, our_gradients = run(model, inputs, table, with_gradients)
    if theirs:
        xs, references, reference = [saved], ours, f"{Path(theirs).name}, ours as reference"
    else:
        del model                                          # one model in memory at a time
        model, reference = load_transformers(name, revision, dtype)
        xs, (references, their_gradients) = ours, run(model, inputs, table, with_gradients)

    same_order = backend == "naive" and not theirs and dtype != torch.float64
    limits = tolerances(dtype, same_order) if tolerance is None else (tolerance, tolerance)
    report = {"model": name, "revision": revision, "layers": config.num_hidden_layers,
              "window": window_of(config), "dtype": str(dtype).removeprefix("torch."),
              "backend": backend, "reference": reference, "torch": torch.__version__,
              "tolerance": limits[0], "seed": seed, "lengths": [ids.size(1) for ids in inputs],
              "input_ids": [ids.tolist() for ids in inputs],
              "rows": compare_traces(row_names(config), inputs, xs, references, limits[0]),
              "next_token_agreement": next_token_agreement(xs, references),
              "rows_saved_by_port": bool(theirs), "gradients": None}
    if with_gradients:
        report["gradients"] = compare_gradients(our_gradients, their_gradients, limits[1])
    report |= verdict(report, config)
    return report | name_mistakes(report, model, ids, saved, config) if theirs else report


def name_mistakes(report, model, ids, saved, config):
    """The part of the report that says which known mistakes give a port's own numbers.

    mistakes: empty where the port is right and where none fits.  alternatives: whether each of them
    alone would give these numbers, and not all of them together.  told_apart_at: N, where the ids
    of `--ids --lengths N` would tell alternatives apart.
    """
    explanations = []
    if not report["same"] and model.dtype == torch.float32:
        explanations = diagnose(model, ids, saved, report["tolerance"])
    longest = min(config.position_limit or 2048, 2048)
    longer = (make_ids(0, 1, T, config.vocab_size) for T in (16, 64, 256, 520, longest)
              if T <= longest)
    text = told_apart(model, explanations, longer) if len(explanations) > 1 else None
    return {"mistakes": as_dicts(explanations), "alternatives": len(explanations) > 1,
            "told_apart_at": None if text is None else text.size(1)}


def verdict(report, config):
    """The part of the report that says whether the models are the same, or where to look."""
    rows, grads = report["rows"], report["gradients"]
    bad = [row for row in rows if not row["same"]]
    out = {"rows_same": len(rows) - len(bad), "first_difference": None, "first_position": None,
           "at_lengths": [], "hint": None, "same": not bad and (grads is None or grads["same"])}
    if bad:
        results = [r for r in bad[0]["results"] if not r["same"]]
        position = min(r["first_position"] for r in results)
        rounding = default_tolerance(getattr(torch, report["dtype"]), 1e-6)
        key = hint(bad[0], position, config, report["rows_saved_by_port"], rounding)
        key = "no rows" if len(rows) == 1 else key
        out.update(first_difference=bad[0]["row"], first_position=position,
                   hint=HINTS[config.model_type].get(key) or HINTS[key],
                   at_lengths=[r["length"] for r in results])
    elif not out["same"]:
        out.update(first_difference=f"gradient of {grads['rows'][0]['row']}",
                   hint=HINTS["gradient"], at_lengths=[max(report["lengths"])])
    return out


# ------------------------------------------------------------------------------------------------
# What is shown
# ------------------------------------------------------------------------------------------------

def listed(numbers):
    return ", ".join(map(str, numbers))


def setting(report):
    return f"{report['dtype']}, {report['backend']} against {report['reference']}"


def cell(result):
    """"=" for the same bits, else the relative difference, marked where it is too much."""
    if result["bit_equal"]:
        return "=  "
    return f"{result['relative']:.1e}" + ("  " if result["same"] else " !")


def print_table(report, out):
    """A line for each row, a column for each length, and the verdict."""
    window = f", window {report['window']}" if report["window"] else ""
    origin = "of the file" if report["seed"] is None else f"of seed {report['seed']}"
    few = " ".join(map(str, report["input_ids"][-1][0][:8]))
    print(f"{report['model']}: {report['layers']} layers{window}; {setting(report)}", file=out)
    print(f"ids {origin}: {few} ...\n", file=out)

    width = max(map(len, ["next token agrees", *(row["row"] for row in report["rows"])]))
    heads = [f"T = {T}" for T in report["lengths"]] + ["max |Δ|"]
    print(" " * width + "".join(f"{head:>11}" for head in heads), file=out)
    for row in report["rows"]:
        cells = "".join(f"{cell(r):>11}" for r in row["results"])
        worst = max((r["max_abs"] for r in row["results"]), key=nan_is_infinite)
        arrow = "   <-- look here first" if row["row"] == report["first_difference"] else ""
        print(f"{row['row']:{width}}{cells}{worst:>11.2g}{arrow}", file=out)
    shares = "".join(f"{f'{100 * x:.4g} %':>11}" for x in report["next_token_agreement"])
    print(f"{'next token agrees':{width}}{shares}\n", file=out)

    limit = "" if report["tolerance"] is None else f" and above {report['tolerance']:.1e}"
    print(f"= same bits, otherwise |difference| / |reference|; ! different{limit}", file=out)
    if report["gradients"]:
        print_gradients(report["gradients"], max(report["lengths"]), out)
    if report["window"] and max(report["lengths"]) <= report["window"]:
        print(f"note: no length is above the window of {report['window']}: this proves nothing "
              "about local attention", file=out)
    print(summary(report), file=out)


def print_gradients(grads, T, out):
    """All of them in one line, then the worst five, without those that are bit-identical."""
    good, exact = (sum(row[key] for row in grads["rows"]) for key in ("same", "bit_equal"))
    print(f"loss and gradients at T = {T}: {good} of {len(grads['rows'])} within "
          f"{grads['tolerance']:.1e}, {exact} bit-identical; all together {grads['total']:.1e}",
          file=out)
    for row in grads["rows"][:5]:
        if not row["bit_equal"]:
            print(f"    {cell(row)}  {row['row']}", file=out)


def summary(report):
    """The verdict in one line, and below it, where the models differ, where to look."""
    how = "bit-identical" if report["tolerance"] is None else f"within {report['tolerance']:.1e}"
    line = (f"{report['rows_same']} of {len(report['rows'])} rows {how} at lengths "
            f"{listed(report['lengths'])} ({setting(report)})")
    if report["same"]:
        return "equal: " + line
    position = report["first_position"]
    since = "" if position is None else f" from position {position} on,"
    return (f"DIFFERENT: {line}\nfirst difference: {report['first_difference']},{since} at lengths "
            f"{listed(report['at_lengths'])}\n" + "\n".join(advice(report)))


def advice(report):
    """Lines: the mistakes that give the port's own numbers, or, where none does, where to look."""
    if not report.get("mistakes"):
        if report["rows_saved_by_port"]:
            yield "none of the known mistakes gives these numbers"
        yield f"hint: {report['hint']}"
        return
    yield from explained(report["mistakes"])
    if report["alternatives"]:
        N = report["told_apart_at"]
        longer = f"; those of --ids --lengths {N} can" if N else ""
        yield "these ids cannot tell them apart" + longer


def markdown(report):
    """| checkpoint | dtype | lengths | rows bit-equal | max |Δ| of the logits | relative |"""
    logits = report["rows"][-1]["results"]
    equal = sum(all(r["bit_equal"] for r in row["results"]) for row in report["rows"])
    largest, relative = (max((r[key] for r in logits), key=nan_is_infinite)
                         for key in ("max_abs", "relative"))
    return (f"| {Path(report['model']).name} | {report['dtype']} | {listed(report['lengths'])} | "
            f"{equal} of {len(report['rows'])} | {largest:.2g} | {relative:.2g} |")


def plot(report, path):
    """Draw the relative difference by layer, a line for each length; exact zeros lie on a floor."""
    names = [row["row"].replace(f", window {report['window']}", "") for row in report["rows"]]
    values = [[r["relative"] for r in row["results"]] for row in report["rows"]]
    positive = [x for row in values for x in row if x > 0 and math.isfinite(x)]
    low = math.floor(math.log10(min([1e-8, *positive]))) - 1               # exponent of the floor
    high = math.ceil(math.log10(max([1e-4, *positive, report["tolerance"] or 0]))) + 1
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(max(7, 3 + 0.35 * len(names)), 4.8), layout="constrained")
    for i, T in enumerate(report["lengths"]):              # smaller hollow markers hide no others
        axes.plot(names, [max(row[i], 10.0 ** low) for row in values], label=f"T = {T}",
                  color=COLOURS[i % 6], marker="osD^v"[i % 5], fillstyle="none",
                  markersize=max(4, 14 - 2.5 * i))
    if report["tolerance"]:
        axes.axhline(report["tolerance"], color="grey", linestyle="--", label="tolerance")
    axes.set_yscale("log")
    axes.set_ylim(10.0 ** (low - 0.5), 10.0 ** high)
    axes.set_yticks([10.0 ** e for e in range(low, high + 1)],
                    ["exactly 0", *(f"$10^{{{e}}}$" for e in range(low + 1, high + 1))])
    axes.grid(axis="y", alpha=0.3)
    axes.minorticks_off()
    axes.tick_params(axis="x", rotation=90)
    axes.set_ylabel("|difference| / |reference|")
    axes.set_xlabel("what comes out of")
    axes.set_title(plain_label(f"{Path(report['model']).name}, {setting(report)}"), size="medium")
    figure.legend(loc="outside right upper", title="tokens")
    kind = picture_format(path)
    write_result(path, lambda part: figure.savefig(part, dpi=150, format=kind))
    plt.close(figure)


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

def lengths(text):
    """"9,5,5" -> [5, 9]; argparse makes a ValueError a message."""
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1 or numbers[-1] > LONGEST:
        raise ArgumentTypeError(f"{shown(text)}: a length must be in 1 … {LONGEST}")
    return numbers


def arguments(argv=None):
    """The options, parsed and checked; if they are wrong, the program ends with status 2."""
    parser = Parser(
        description="Compare every layer of a checkpoint with transformers' eager attention, or "
                    "with what a port saved. Exit status: 0 the same, 1 different, 2 bad input.")
    add_options(parser.add_argument)
    args = parser.parse_args(argv)
    try:
        check(args, parser)
    except ValueError as error:
        parser.error(one_line(error))
    return args


def add_options(add):
    add("model", nargs="?", type=a_name, help="the checkpoint: a folder or a hub id")
    add("--revision", type=a_name, metavar="NAME", help="branch, tag or commit on the hub")
    add("--dtype", type=a_name, default="float32", metavar="NAME",
        help="float32 (default), bfloat16, float16, or auto for the checkpoint's own")
    add("--backend", type=a_name, default="naive", metavar="NAME",
        help="our attention backend: naive (default), sdpa, triton, flash, auto")
    add("--lengths", type=lengths, metavar="N,N,...",
        help="lengths of the texts in tokens (default: 1, and lengths below, at, above and twice "
             "above the window)")
    add("--batch", type=int, default=1, metavar="B", help="texts in a batch (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the input ids (default 0)")
    add("--tolerance", type=float, metavar="X",
        help="the largest relative difference that counts as equal (default: 1e-5 in float32, 8 "
             "eps in half precision; none for naive attention against transformers: the same bits)")
    add("--gradients", action="store_true",
        help="also compare the loss and its gradients, at the longest length")
    add("--theirs", type=a_name, metavar="FILE",
        help="judge a port's .safetensors file by our model, without transformers")
    add("--ids", action="store_true", help="only print the ids of the longest text as JSON")
    add("--save-ours", type=a_name, metavar="FILE",
        help="only save our results for the longest text, in the format that --theirs reads")
    add("--vectors", type=a_name, metavar="DIR",
        help="only write test vectors for ports in any language: checkpoints and right answers")
    add("--check-vectors", nargs=2, type=a_name, metavar=("DIR", "ANSWERS"),
        help="only judge a port's answers to the test vectors in DIR")
    add("--junit", type=a_name, metavar="FILE",
        help="also write the verdicts of --check-vectors as JUnit XML")
    add("--json", type=a_name, metavar="FILE",
        help="also write the report as JSON; - is standard output")
    add("--plot", type=a_name, metavar="FILE.png",
        help="also draw the relative difference by layer")
    add("--markdown", action="store_true",
        help="also print the result as a row of a Markdown table, on standard output")


# For each option that chooses what is done, the options that may be given with it.  The first one
# in this table that is given decides.
MODES = {"vectors": (), "check_vectors": ("junit",),
         "save_ours": ("model", "revision", "dtype", "backend", "lengths", "batch", "seed", "ids"),
         "ids": ("model", "revision", "dtype", "backend", "lengths", "batch", "seed"),
         "theirs": ("model", "revision", "dtype", "seed", "tolerance", "json", "plot", "markdown")}


def check(args, parser):
    """Raise ValueError, before any work is done, for options that are wrong together."""
    names = given(args, parser)
    mode = next((name for name in MODES if name in names), None)
    if ("model" in names) == (mode in ("vectors", "check_vectors")):
        raise ValueError("give a model, or --vectors DIR, or --check-vectors DIR ANSWERS")
    if unused := [name for name in names if mode and name not in (mode, *MODES[mode])]:
        raise ValueError(f"{spelled([mode])} does not use {spelled(unused)}: leave one of them out")
    if mode is None and args.junit:
        raise ValueError("--junit belongs to --check-vectors")
    longest = max(args.lengths or [1])
    if args.gradients and args.lengths and longest < 2:
        raise ValueError("--gradients needs a length of at least 2: after one token nothing is "
                         "predicted")
    if not 1 <= args.batch * longest <= LONGEST:
        raise ValueError(f"--batch must be in 1 … {LONGEST // longest}, not {shown(args.batch)}"
                         f"{f' with texts of {longest} tokens' * (longest > 1)}")
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        raise ValueError(f"--tolerance must be a number of at least 0, not {args.tolerance}")
    check_outputs({"--json": None if args.json == "-" else args.json, "--plot": args.plot,
                   "--save-ours": args.save_ours, "--junit": args.junit},
                  [args.model, args.theirs, *(args.check_vectors or [])])
    if args.plot:
        picture_format(args.plot)


def write_report(report, json_path=None, plot_path=None, as_markdown=False):
    """Write the report as a table, as JSON, as a plot and as Markdown.

    JSON or Markdown for another program has standard output for itself: then the table goes to
    standard error.  Files come first, and a reader that goes away, as with | head, is no error.
    """
    valid = json.loads(json.dumps(report), parse_constant=str)             # JSON has no NaN
    text = json.dumps(valid) + "\n"
    if json_path not in (None, "-"):
        write_result(json_path, text.encode())
    if plot_path:
        plot(report, plot_path)
    with contextlib.suppress(BrokenPipeError):
        print_table(report, sys.stderr if json_path == "-" or as_markdown else sys.stdout)
        if json_path == "-":
            sys.stdout.write(text)
        if as_markdown:
            print(markdown(report))


def judge_vectors(folder, answers, junit_path=None):
    """Print the table of --check-vectors.  Exit status: 0 all passed, 1 not."""
    verdicts, mistakes = check_vectors(folder, answers)
    if junit_path:
        write_junit(verdicts, mistakes, junit_path)
    with contextlib.suppress(BrokenPipeError):             # | head: the status still says which
        print(table(verdicts, mistakes))
    return 0 if all(v.passed for v in verdicts) else 1


@as_command
def main(argv=None):
    """Exit status: 0 the same, 1 different, 2 with one line on what is wrong."""
    args = arguments(argv)
    if sys.stdout is None:
        raise ValueError("standard output is closed: there is nowhere to write the result")
    if args.vectors:
        write_vectors(args.vectors)
        return 0
    if args.check_vectors:
        return judge_vectors(*args.check_vectors, args.junit)
    if args.ids or args.save_ours:                         # one length, and nothing is compared
        return only_ours(args)
    report = make_report(
        args.model, revision=args.revision, dtype=args.dtype, backend=args.backend,
        theirs=args.theirs, lengths=args.lengths, batch=args.batch, seed=args.seed,
        tolerance=args.tolerance, with_gradients=args.gradients)
    write_report(report, args.json, args.plot, args.markdown)
    return 0 if report["same"] else 1


def only_ours(args):
    """What --ids and --save-ours do."""
    config = config_of(args.model, args.revision)
    longest = (args.lengths or default_lengths(config))[-1]
    if args.save_ours:
        check_room(config, args.batch, [longest], models=1)
    ids = make_ids(args.seed, args.batch, longest, config.vocab_size)
    if args.ids:
        print(json.dumps(ids.tolist()))
    if args.save_ours:
        model = load_ours(args.model, args.revision, args.dtype, args.backend)
        save_ours(args.save_ours, ids, trace(model, ids))
    return 0


if __name__ == "__main__":
    sys.exit(main())
