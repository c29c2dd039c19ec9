"""Which mistake gives a port's own numbers?

    diagnose(model, ids, theirs)    the sets of mistakes that explain the port; none if none does

mistakes.py can make every known mistake in our own model.  So the search is simple: make one, run the
same ids, and see whether the numbers that come out are the port's.

    1. Find the first row that differs.  What lies before it is right and is not computed again: a trial
       runs from there, and stops at the first row that is not the port's.
    2. A mistake explains the port if all rows then agree to rounding.
    3. Where none does, one that moves the first difference to a later row or position is kept, and a
       second and a third are looked for on top of it.
    4. Where none does even that, two are tried at once, on the shortest text that shows a difference.

A mistake is never named because it comes near: what it leaves must be rounding.

    B batch · T tokens · C width · V vocabulary · L layers
    rows: what flows through a model, as `trace` has it: what goes into block 0, what comes out of
    each block, out of the final norm, and the logits; L + 3 tensors (B, T, C), the last (B, T, V)
"""

import contextlib
import itertools
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
from tqdm import tqdm

from mistakes import planted, variants

AT_ONCE = 3                                # mistakes that are looked for together
SECONDS = 120.0                            # after which only single mistakes are still tried


@dataclass
class Found:
    """Mistakes that together give the port's numbers."""
    mistakes: tuple                        # of mistakes.Mistake
    patches: list
    relative: float                        # what they leave: the largest relative difference of a row

    @property
    def ids(self):
        return tuple(sorted({mistake.id for mistake in self.mistakes}))


@dataclass
class Outcome:
    """How far a trial agrees with the port: the first row and position that differ, or row = len(rows)."""
    row: int
    position: int = 0
    relative: float = 0.0                  # how far off that row is
    worst: float = 0.0                     # how far off the worst row is that was looked at

    @property
    def place(self):
        return self.row, self.position


class Stop(Exception):
    """Ends a forward pass when a trial is decided."""


# ------------------------------------------------------------------------------------------------
# What goes into a model, and what flows through it
# ------------------------------------------------------------------------------------------------

def make_ids(seed, B, T, vocab_size):
    """Arbitrary ids (B, T), by a linear congruential generator that any language can repeat.

    x <- (1664525 x + 1013904223) mod 2^32, starting from the seed; each x gives floor(x V / 2^32).
    They fill column after column, so that a shorter text is the beginning of a longer one.
    """
    x, ids = seed, []
    for _ in range(B * T):
        x = (1664525 * x + 1013904223) % 2**32
        ids.append(x * vocab_size >> 32)
    return torch.tensor(ids, dtype=torch.long).view(T, B).T


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
    """Run the patched model and call see(row, tensor) as each row comes about, until see raises Stop.

    Rows are cut to their last T positions, since one mistake puts a token before the ids.
    """
    T = ids.size(1)
    with planted(list(patches) + (resumed(model, start, x) if start else [])), contextlib.ExitStack() as hooks:
        blocks = model.transformer.blocks

        def watch(module, row):
            hooks.callback(module.register_forward_hook(
                lambda module, args, out: see(row, (out[0] if isinstance(out, tuple) else out)[:, -T:])).remove)

        if start == 0:
            hooks.callback(blocks[0].register_forward_pre_hook(
                lambda module, args: see(0, args[0][:, -T:])).remove)
        for i, block in enumerate(blocks):
            watch(block, start + i + 1)
        watch(model.transformer.ln_f, start + len(blocks) + 1)
        with contextlib.suppress(Stop):
            see(start + len(blocks) + 2, model(ids).logits)


def off(x, reference):
    """|x - reference| / |reference| at each position (B, T), and over all.  One position of a text may be
    NaN in x, where it says nothing."""
    x, reference = x.double(), reference.double()
    silent = x.isnan().all(-1)                             # (B, T): what a shifted row has no number for
    if silent.sum() > len(x):
        return torch.full(x.shape[:2], math.inf), math.inf
    gap = (x - reference).norm(dim=-1).masked_fill(silent, 0.0)            # (B, T)
    size = reference.norm(dim=-1).masked_fill(silent, 0.0)
    whole = gap.norm() / size.norm() if size.any() else gap.norm() * math.inf if gap.any() else gap.norm()
    return gap / size.clamp(min=1e-300), math.inf if whole.isnan() else whole.item()


# ------------------------------------------------------------------------------------------------
# Trials
# ------------------------------------------------------------------------------------------------

class Search:
    """What a port has saved, our model, and the trials of mistakes."""

    def __init__(self, model, ids, theirs, tolerance, bar):
        self.model, self.ids, self.theirs, self.tolerance = model, ids, theirs, tolerance
        self.saved = [row for row, x in enumerate(theirs) if x is not None]
        self.bar, self.begun = bar, time.monotonic()
        self.before = {}                                   # row: how far off the port is
        self.right, rows = self.whole([])
        for row in self.saved:
            self.before[row] = off(rows[row], theirs[row])[1]

    def limit(self, row, rounds):
        """How far off a row may be that a mistake explains: rounding, and a part of what it explains.

        A mistake that rounds within the computation (softmax in bfloat16) rounds some numbers the other
        way wherever a port sums in another order.  A twentieth of its own effect is left for that at
        most positions (`fits`), and half for all together: measured up to 0.28, where a large score
        is rounded the other way.
        """
        before = self.before.get(row, 0.0)
        if rounds:
            return max(self.tolerance, 0.05 * min(before, 0.1))
        return min(self.tolerance, 0.2 * before) if before > self.tolerance else self.tolerance

    def fits(self, row, x, rounds):
        """Is this row the port's?  -> (yes or no, how far off it is at each position (B, T), and as a whole)"""
        each, whole = off(x, self.theirs[row][:, :x.size(1)])
        limit = self.limit(row, rounds)
        most = each.median().item() if rounds else whole
        return most <= limit and whole <= (10 * limit if rounds else limit), each, whole

    def judge(self, until, rounds, result):
        """A function for `run` that fills in the Outcome `result`."""
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
        """The Outcome of these patches for the first `length` tokens and the rows up to `until`."""
        self.bar.update()
        ids, last = self.ids[:, :length], len(self.theirs) - 1
        if any(name == "forward" and thing is self.model.transformer for thing, name, _ in patches):
            start = 0                                      # a token more than rows are kept for
        until = last if until is None else until
        result = Outcome(until + 1)
        try:
            run(self.model, ids, patches, self.judge(until, rounds, result), start, x)
        except ValueError:                                 # one token more than there are positions
            return Outcome(0, 0, math.inf, math.inf)
        return result

    def whole(self, patches, rounds=False):
        """The Outcome from the very beginning, and all rows."""
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
        """The block to begin with when `row` is the first that differs; 0 is the very beginning."""
        right = [saved for saved in self.saved if saved < row]
        return min(right[-1], len(self.model.transformer.blocks)) if right else 0

    @property
    def late(self):
        return time.monotonic() - self.begun > SECONDS


# ------------------------------------------------------------------------------------------------
# The search
# ------------------------------------------------------------------------------------------------

def diagnose(model, ids, theirs, tolerance=1e-5, progress=False):
    """All smallest sets of mistakes that give what a port has saved, as a list of Found.

    model: ours, eval mode, naive attention; ids (B, T); theirs: the port's rows, None for each that it did
    not save.  tolerance: the relative difference up to which a row is the same.  Empty where nothing
    differs and where no mistake explains what does.  Several mean that these ids cannot tell them apart.
    """
    bar = tqdm(desc="looking for the mistake", unit=" trials", disable=not progress, leave=False)
    with bar:
        search = Search(model, ids, theirs, tolerance, bar)
        if search.right.row == len(theirs):
            return []
        return smallest(explain(search, (), []))


def explain(search, chosen, base):
    """Sets of mistakes that explain the port, each of them these and more, at most AT_ONCE in all."""
    state, rows = search.whole(base, any(m.rounds for m in chosen))
    if state.row == len(search.theirs):
        return [Found(chosen, base, state.worst)]
    if len(chosen) == AT_ONCE:
        return []
    singles = tried(search, chosen, base, state, rows)
    found = []
    for mistake, patches, outcome in singles:
        if outcome.row == len(search.theirs):              # the rows before it must stay right, too
            whole, _ = search.whole(patches, any(m.rounds for m in (*chosen, mistake)))
            if whole.row == len(search.theirs):
                found.append(Found((*chosen, mistake), patches, whole.worst))
    if found:
        return found
    better = sorted((s for s in singles if s[2].place > state.place), key=lambda s: s[2].place, reverse=True)
    for mistake, patches, outcome in better[:4]:
        if search.whole(patches)[0].place > state.place:
            found += explain(search, (*chosen, mistake), patches)
    if not found and len(chosen) + 2 <= AT_ONCE:
        for pair, patches in pairs(search, chosen, base, state, rows, singles):
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
            # Nothing ends a trial early where only logits are known, so it begins with a part of the text.
            outcome = search.trial(patches, start, rows[start], length=short, rounds=rounds)
        if outcome is None or outcome.row == len(search.theirs):
            outcome = search.trial(patches, start, rows[start], rounds=rounds)
        singles.append((mistake, patches, outcome))
    return singles


def pairs(search, chosen, base, state, rows, singles):
    """Yield (two mistakes, patches) that put the first wrong row right, up to its first wrong position."""
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
    """Without sets that hold more mistakes than needed, repetitions, and those that explain less well."""
    if not found:
        return []
    fewest = min(len(f.mistakes) for f in found)
    found = sorted((f for f in found if len(f.mistakes) == fewest), key=lambda f: f.relative)
    best = {}
    for f in found:
        best.setdefault(f.ids, f)
    return [f for f in best.values() if f.relative <= max(3 * found[0].relative, 1e-6)]


def told_apart(model, found, longer):
    """The shortest of the texts `longer` (ids (1, T)) on which the found sets differ, or None."""
    for ids in longer:
        logits = []
        for f in found:
            run(model, ids, f.patches, lambda row, x: logits.append(x) if x.size(-1) == model.config.vocab_size
                and row == len(model.transformer.blocks) + 2 else None)
        if any(off(a, b)[1] > 1e-5 for a, b in itertools.combinations(logits, 2)):
            return ids
    return None
