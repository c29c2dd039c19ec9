"""Which mistake gives a port's own numbers?

    diagnose(model, ids, theirs)    the sets of mistakes that explain the port; none if none does
    hint(row, position, ...)        where to look then: key of a sentence in HINTS

mistakes.py can make every known mistake in our own model.  So the search is simple: make one, run
the same ids, and see whether the numbers that come out are the port's.

    1. Find the first row that differs.  What lies before it is right and is not computed again: a
       trial runs from there, and stops at the first row that is not the port's.
    2. A mistake explains the port if all rows then agree to rounding.
    3. If no mistake does, one that moves the first difference to a later row or position is kept,
       and a second and a third are looked for on top of it.
    4. If no mistake does even that, two are tried at once, on the shortest text that shows a
       difference.

It is not enough that a mistake comes near the port's numbers: what it leaves must be rounding.

    B batch · T tokens · C width · V vocabulary · L layers
    rows: what flows through a model, as `trace` returns it: what goes into block 0, what comes out
    of each block and of the final norm, and the logits: L + 3 tensors (B, T, C), the last (B, T, V)
"""

import contextlib
import itertools
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
from tqdm import tqdm

from commands import not_a_command
from mistakes import planted, variants

AT_ONCE = 3                                # at most so many mistakes are looked for together
SECONDS = 120.0                            # after this time only single mistakes are still tried


@dataclass
class Found:
    """Mistakes that together give the port's numbers."""
    mistakes: tuple                        # of mistakes.Mistake
    patches: list
    relative: float                        # the largest relative difference that a row still has

    @property
    def ids(self):
        return tuple(sorted({mistake.id for mistake in self.mistakes}))


@dataclass
class Outcome:
    """How far a trial agrees with the port."""
    row: int                               # the first that differs, or len(rows)
    position: int = 0                      # the first that differs in that row
    relative: float = 0.0                  # the relative difference of that row
    worst: float = 0.0                     # the largest relative difference of all rows looked at

    @property
    def place(self):
        return self.row, self.position


class Stop(Exception):
    """Raised by a hook to end a forward pass as soon as a trial is decided."""


# ------------------------------------------------------------------------------------------------
# What goes into a model, and what flows through it
# ------------------------------------------------------------------------------------------------

def make_ids(seed, B, T, vocab_size):
    """Arbitrary ids (B, T) int64, by a linear congruential generator that any language can repeat.

    x <- (1664525 x + 1013904223) mod 2^32, starting from the seed; each x gives floor(x V / 2^32).
    They fill column after column, so that a shorter text is the beginning of a longer one.
    """
    x, ids = seed, []
    for _ in range(B * T):
        x = (1664525 * x + 1013904223) % 2**32
        ids.append(x * vocab_size >> 32)
    return torch.tensor(ids, dtype=torch.long).view(T, B).T


def window_of(config):
    """The window of the local layers, or None if all layers are global."""
    return next((w for w in config.windows if w is not None), None)


def parts(model):
    """(blocks, final norm) of a model of ours or of transformers'."""
    if hasattr(model, "gpt_neox"):
        return model.gpt_neox.layers, model.gpt_neox.final_layer_norm
    inner = model.transformer
    return inner.blocks if hasattr(inner, "blocks") else inner.h, inner.ln_f


@torch.no_grad()
def trace(model, ids):
    """What flows through a model: [into block 0, out of each block, out of the norm, logits].

    Hooks, since output_hidden_states leaves out what the last block returns before the final norm.
    """
    seen = []

    def enters(module, args):
        seen.append(args[0])

    def leaves(module, args, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    blocks, norm = parts(model)
    hooks = [blocks[0].register_forward_pre_hook(enters),
             *(module.register_forward_hook(leaves) for module in [*blocks, norm])]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return [*seen, logits]


def tensors_of(rows):
    """{name: row} as a port's file names them: logits, and hidden_states.0 to .L.

    As in transformers' tuple of hidden states, what the last block returns is not among them.
    """
    *hidden, last_block, norm, logits = rows
    return {"logits": logits} | {f"hidden_states.{i}": x for i, x in enumerate([*hidden, norm])}


def rows_of(tensors, layers):
    """The opposite of tensors_of: rows, with None for each that the port did not save."""
    hidden = [tensors.get(f"hidden_states.{i}") for i in range(layers + 1)]
    return [*hidden[:-1], None, hidden[-1], tensors["logits"]]


# ------------------------------------------------------------------------------------------------
# Running our model with patches
# ------------------------------------------------------------------------------------------------

def resumed(model, start, x):
    """Patches that let the model begin with x (B, T, C), which goes into block `start`."""
    transformer = model.transformer
    patches = [(transformer.embed, "forward", lambda ids: x[:, :ids.size(1)]),
               (transformer, "blocks", nn.ModuleList(list(transformer.blocks)[start:]))]
    if hasattr(transformer, "pos_embed"):
        patches.append((transformer.pos_embed, "forward", lambda ids: x.new_zeros(1)))
    return patches


@torch.no_grad()
def run(model, ids, patches, see, start=0, x=None):
    """Run the patched model; call see(row, tensor) for each row when it is computed.

    Where see raises Stop, the run ends there.  Rows are cut to their last T positions, since one
    mistake puts a token before the ids.  start, x: see `resumed`.
    """
    T = ids.size(1)
    patches = [*patches, *(resumed(model, start, x) if start else [])]
    with planted(patches), contextlib.ExitStack() as hooks:
        blocks = model.transformer.blocks

        def watch(module, row):
            def leaves(module, args, out):
                see(row, (out[0] if isinstance(out, tuple) else out)[:, -T:])
            hooks.callback(module.register_forward_hook(leaves).remove)

        if start == 0:
            hooks.callback(blocks[0].register_forward_pre_hook(
                lambda module, args: see(0, args[0][:, -T:])).remove)
        for i, block in enumerate(blocks):
            watch(block, start + i + 1)
        watch(model.transformer.ln_f, start + len(blocks) + 1)
        with contextlib.suppress(Stop):
            see(start + len(blocks) + 2, model(ids).logits)


def relative_differences(x, reference):
    """|x - reference| / |reference| at each position, (B, T) float64, and over all, a float.

    x, reference (B, T, C).  x may be NaN at one position of each text, which is then left out: a
    mistake that shifts the rows has no number for it.
    """
    x, reference = x.double(), reference.double()
    empty = x.isnan().all(-1)                                              # (B, T)
    if empty.sum() > len(x):
        return torch.full(x.shape[:2], math.inf), math.inf
    gap = (x - reference).norm(dim=-1).masked_fill(empty, 0.0)             # (B, T)
    size = reference.norm(dim=-1).masked_fill(empty, 0.0)                  # (B, T)
    whole = gap.norm().item()
    if whole:                                              # a reference of zeros makes it infinite
        whole = whole / size.norm().item() if size.any() else math.inf
    return gap / size.clamp(min=1e-300), math.inf if math.isnan(whole) else whole


# ------------------------------------------------------------------------------------------------
# Trials
# ------------------------------------------------------------------------------------------------

class Search:
    """What a port has saved, our model, and the trials of mistakes.

    right is the Outcome of our model without any mistake.
    """

    def __init__(self, model, ids, theirs, tolerance, bar):
        self.model, self.ids, self.theirs, self.tolerance = model, ids, theirs, tolerance
        self.saved = [row for row, x in enumerate(theirs) if x is not None]
        self.bar, self.begun = bar, time.monotonic()
        self.before = {}                                   # row: how far off the port is
        self.right, rows = self.whole([])
        for row in self.saved:
            self.before[row] = relative_differences(rows[row], theirs[row])[1]

    def limit(self, row, rounds):
        """The relative difference that a row may still have if a mistake explains it.

        Only rounding may be left, and at most a fifth of the difference that the mistake explains.
        A mistake that itself rounds (softmax in bfloat16) rounds some numbers the other way if a
        port sums in another order.  Such a mistake may leave a twentieth of its effect at the
        median position, and half of it over all positions (see `fits`); up to 0.28 was measured,
        where a large score was rounded the other way.
        """
        before = self.before.get(row, 0.0)
        if rounds:
            return max(self.tolerance, 0.05 * min(before, 0.1))
        return min(self.tolerance, 0.2 * before) if before > self.tolerance else self.tolerance

    def fits(self, row, x, rounds):
        """Is this row the port's?  -> (yes or no, its relative_differences from the port)"""
        each, whole = relative_differences(x, self.theirs[row][:, :x.size(1)])
        limit = self.limit(row, rounds)
        most = each.median().item() if rounds else whole
        return most <= limit and whole <= (10 * limit if rounds else limit), each, whole

    def judge(self, until, rounds, result):
        """The function `see` for `run`: it compares rows up to `until` and fills in `result`."""
        def see(row, x):
            if row in self.saved and row <= until:
                fits, each, whole = self.fits(row, x, rounds)
                result.worst = max(result.worst, whole)
                if not fits:
                    wrong = ~(each <= self.limit(row, rounds))
                    result.row, result.relative = row, whole
                    result.position = wrong.any(0).int().argmax().item()
                    raise Stop
            if row >= until:
                raise Stop
        return see

    def trial(self, patches, start=0, x=None, length=None, until=None, rounds=False):
        """The Outcome of these patches for the first `length` tokens and the rows up to `until`.

        start, x: where to begin (`resumed`).  rounds: whether one of the mistakes rounds.
        """
        self.bar.update()
        if any(name == "forward" and thing is self.model.transformer for thing, name, _ in patches):
            start = 0                                      # with an extra token no row is known
        until = len(self.theirs) - 1 if until is None else until
        result = Outcome(until + 1)
        see = self.judge(until, rounds, result)
        try:
            run(self.model, self.ids[:, :length], patches, see, start, x)
        except ValueError:                                 # the extra token has no position left
            return Outcome(0, 0, math.inf, math.inf)
        return result

    def whole(self, patches, rounds=False):
        """(the Outcome from the very beginning, all rows)"""
        result, rows = Outcome(len(self.theirs)), [None] * len(self.theirs)
        judge = self.judge(len(self.theirs), rounds, result)

        def see(row, x):
            rows[row] = x
            if result.row == len(self.theirs):             # nothing differs so far
                with contextlib.suppress(Stop):
                    judge(row, x)

        run(self.model, self.ids, patches, see)
        return result, rows

    def resume(self, row):
        """The block to begin with where `row` is the first that differs; 0 is the beginning."""
        right = [saved for saved in self.saved if saved < row]
        return min(right[-1], len(self.model.transformer.blocks)) if right else 0

    @property
    def late(self):
        return time.monotonic() - self.begun > SECONDS


# ------------------------------------------------------------------------------------------------
# The search
# ------------------------------------------------------------------------------------------------

def diagnose(model, ids, theirs, tolerance=1e-5):
    """All smallest sets of mistakes that give what a port has saved, as a list of Found.

    model: ours, in eval mode, with naive attention; ids (B, T) int64; theirs: the port's rows, with
    None for each that it did not save.  tolerance: the relative difference up to which a row counts
    as the same.  The list is empty where nothing differs, and where no mistake explains what does;
    several sets in it cannot be told apart by these ids.
    """
    with tqdm(desc="looking for the mistake", unit=" trials", disable=None, leave=False) as bar:
        search = Search(model, ids, theirs, tolerance, bar)
        if search.right.row == len(theirs):
            return []
        return smallest(explain(search, (), []))


def explain(search, chosen, base):
    """[Found]: sets of mistakes that explain the port.

    Each set holds the mistakes `chosen`, whose patches are `base`, and at most AT_ONCE in all.
    """
    state, rows = search.whole(base, any(m.rounds for m in chosen))
    if state.row == len(search.theirs):
        return [Found(chosen, base, state.worst)]
    if len(chosen) == AT_ONCE:
        return []
    singles = tried(search, chosen, base, state, rows)
    found = []
    for mistake, patches, outcome in singles:
        if outcome.row == len(search.theirs):              # the rows before must stay right, too
            whole, _ = search.whole(patches, any(m.rounds for m in (*chosen, mistake)))
            if whole.row == len(search.theirs):
                found.append(Found((*chosen, mistake), patches, whole.worst))
    if found:
        return found
    better = [s for s in singles if s[2].place > state.place]
    for mistake, patches, outcome in sorted(better, key=lambda s: s[2].place, reverse=True)[:4]:
        if search.whole(patches)[0].place > state.place:
            found += explain(search, (*chosen, mistake), patches)
    if not found and len(chosen) + 2 <= AT_ONCE:
        for pair, patches in pairs(search, chosen, state, rows, singles):
            found += explain(search, (*chosen, *pair), patches)
    return found


def tried(search, chosen, base, state, rows):
    """[(mistake, patches, Outcome)] of each further mistake on top of what is chosen."""
    start = search.resume(state.row)
    short = state.position + 16
    singles = []
    with planted(base):
        more = list(variants(search.model))
    for mistake, patches in more:
        if chosen and search.late:
            break
        rounds = any(m.rounds for m in (*chosen, mistake))
        patches = base + patches
        outcome = None
        if len(search.saved) == 1 and not any(m.whole_text for m in (*chosen, mistake)):
            # Nothing ends a trial early where only logits are known: try a part of the text first.
            outcome = search.trial(patches, start, rows[start], length=short, rounds=rounds)
        if outcome is None or outcome.row == len(search.theirs):
            outcome = search.trial(patches, start, rows[start], rounds=rounds)
        singles.append((mistake, patches, outcome))
    return singles


def pairs(search, chosen, state, rows, singles):
    """Yield (two mistakes, patches) that put right the first wrong position of the first wrong row.

    singles: what `tried` returned.  Mistakes that leave this row as it is are not paired.
    """
    start, length = search.resume(state.row), state.position + 1
    touching = [(mistake, patches) for mistake, patches, outcome in singles
                if outcome.row != state.row or outcome.relative != state.relative]
    for first, patches in touching:
        with planted(patches):
            more = list(variants(search.model))
        known = {mistake.id for mistake, _ in touching}
        for second, top in more:
            if search.late:
                return
            if second.id > first.id and second.id in known:
                rounds = any(m.rounds for m in (*chosen, first, second))
                part = None if any(m.whole_text for m in (*chosen, first, second)) else length
                outcome = search.trial(patches + top, start, rows[start], part, state.row, rounds)
                if outcome.row > state.row:
                    whole, _ = search.whole(patches + top, rounds)
                    if whole.place > state.place:
                        yield (first, second), patches + top


def smallest(found):
    """Leave out repetitions, larger sets than needed, and sets that explain the port less well."""
    if not found:
        return []
    fewest = min(len(f.mistakes) for f in found)
    found = sorted((f for f in found if len(f.mistakes) == fewest), key=lambda f: f.relative)
    best = {}
    for f in found:
        best.setdefault(f.ids, f)
    return [f for f in best.values() if f.relative <= max(3 * found[0].relative, 1e-6)]


def told_apart(model, found, longer):
    """The first of the texts `longer` (ids (1, T)) for which the found sets give other logits."""
    for ids in longer:
        logits = []
        for f in found:
            rows = []
            run(model, ids, f.patches, lambda row, x: rows.append(x))
            logits.append(rows[-1])
        if any(relative_differences(a, b)[1] > 1e-5
               for a, b in itertools.combinations(logits, 2)):
            return ids
    return None


# ------------------------------------------------------------------------------------------------
# What is said about it
# ------------------------------------------------------------------------------------------------

def as_dicts(found):
    """The mistakes of all sets as a report in JSON has them."""
    return [{"id": m.id, "relative": f.relative, "sentence": m.sentence, "fix": m.fix}
            for f in found for m in f.mistakes]


def explained(mistakes):
    """Two lines about each of the mistakes, given as dicts."""
    for m in mistakes:
        yield f"mistake: {m['id']}: {m['sentence']}"
        yield f"  instead: {m['fix']}"


# ------------------------------------------------------------------------------------------------
# Where to look, where no mistake has a name
# ------------------------------------------------------------------------------------------------

HINTS = {
    "finite": "Some numbers are not finite. Look for an overflow (float16 ends at 65504), and for "
              "a row of the mask in which every key is -inf.",
    "rounding": "The difference is rounding: the same function is computed in another order of "
                "operations.",
    "small": "The difference is too small for a wrong matrix. Check that the GELU is the one that "
             "config.json names (tanh or exact), and LayerNorm's epsilon.",
    "precision": "The difference is too small for a wrong rule, and position 0 is right. Check "
                 "that rotary angles, scores and softmax are not computed in half precision.",
    "window": "Check the window: query i reads the keys j with 0 <= i - j < window, which are its "
              "own and the window - 1 before it.",
    "order": "Check the order of the layers: this layer is global and seems to have a window.",
    "weights": "Check the weights of this layer: an earlier layer that is computed in the same "
               "way is right.",
    "final norm": "Check the weight, the bias and the epsilon of the final norm.",
    "last block": "Check the weight, the bias and the epsilon of the final norm, and the last "
                  "block, whose result is not in the file.",
    "logits": "Check the head: config.json says whether it is tied to the embedding, and it has "
              "no bias.",
    "no rows": "Save the hidden states as well, which show where the difference begins.",
    "gradient": "The forward pass is right and the gradients are wrong. Check that the labels are "
                "shifted by one, that the loss is a mean, and that nothing is detached.",
    "gpt_neo": {
        "embeddings": "Check that this is token embedding + position embedding, with positions "
                      "from 0 and without a factor.",
        "scores": "Position 0 is right, so check the attention scores: GPT-Neo does not divide "
                  "them by sqrt(D). Then check the causal mask, and q and k.",
        "block": "Position 0 is wrong too, so the scores are not the cause. Check the LayerNorms, "
                 "v and out_proj (are they transposed?), the biases, GELU, and the residuals: "
                 "x + attn(ln_1(x)), then x + mlp(ln_2(x))."},
    "gpt_neox": {
        "embeddings": "Check that this is the token embedding alone, without positions and "
                      "without a factor.",
        "scores": "Position 0 is right, so check the attention scores: only the first rotary_pct "
                  "of each head is rotated, in pairs (i, i + R/2) and not of neighbours, and the "
                  "scores are divided by sqrt(D). Then check the causal mask.",
        "block": "Position 0 is wrong too, so the rotation is not the cause. Check that "
                 "query_key_value is cut by heads first and then into q, k and v, that attention "
                 "and MLP each have their own LayerNorm, the parallel residual, and GELU."}}


def nan_is_infinite(x):
    """x, or infinity for NaN, so that NaN is the largest difference."""
    return math.inf if math.isnan(x) else x


def hint(row, position, config, theirs, rounding):
    """The key of HINTS for the first row that differs.

    It is chosen by how much the row differs and by the first position at which it does.
    """
    size = max(nan_is_infinite(r["relative"]) for r in row["results"])
    if math.isinf(size):
        return "finite"
    if size <= rounding:
        return "rounding"
    if not row["row"].startswith("block"):
        return "last block" if theirs and row["row"] == "final norm" else row["row"]
    layer, W = int(row["row"].split()[1]), window_of(config)
    own = config.windows[layer]
    if own and position >= max(1, own - 1):                # own - 1: a window that is one too small
        return "window"
    if W and not own and position >= W:
        return "order"
    if size < 1e-3:
        return "precision" if position else "small"
    if own in config.windows[:layer] or (layer and position == 0):
        return "weights"
    return "scores" if position else "block"


if __name__ == "__main__":
    not_a_command("python compare.py MODEL --theirs FILE")
