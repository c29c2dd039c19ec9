"""A page to look inside a model: what each token reads, and what each layer would say next.

    python look.py "MACBETH. Is this a dagger" --model checkpoints/demo-neo --out page.html
    python look.py "..." --out page.html --other checkpoints/demo-neox    two models side by side
    python look.py "..." --out page.html --mistake scaled-scores          the model with a mistake

    look("MACBETH. Is this a dagger")          in a notebook cell: the page itself

The page is one file without a network: look.html, with the numbers of this text put into it.

    T tokens · L layers · H heads · C width · V vocabulary · W window of a local layer
"""

import base64
import difflib
import html
import json
import os
import sys
from pathlib import Path

import torch

from commands import Parser, a_name, as_command, check_outputs, check_text
from files import plain, shown, write_result
from load_weights import AutoModelForCausalLM, AutoTokenizer
from mistakes import BY_ID, planted, variants
from tokenizer import token_bytes

HERE = Path(__file__).resolve().parent
DEMO = str(HERE / "checkpoints" / "demo-neo")
MOST_TOKENS = 512                          # the page holds L * H * T * T bytes of attention
LIKELIEST = 6                              # tokens that are shown of each prediction


class Page(str):
    """The page as text; a notebook cell shows it in a frame of its own."""

    def _repr_html_(self):
        frame = '<iframe srcdoc="{}" width="100%" height="900" title="Inside the model"></iframe>'
        return frame.format(html.escape(self))


def look(text, model=DEMO, *, tokenizer=None, other=None, mistake=None):
    """The page for one text -> Page, a str of HTML.

    model, other: folder, hub id or a loaded causal language model; other is shown beside it.
    tokenizer: needed with a loaded model.  mistake: an id of mistakes.py, which a copy of the model
    beside it makes.  Raises ValueError for a text that is empty, longer than MOST_TOKENS or than
    the model allows, for both other and mistake, for a mistake that does not exist in this family,
    and for two models that cut the text into different tokens; OSError for a model that cannot be
    loaded.
    """
    if other is not None and mistake is not None:
        raise ValueError("other and mistake both name what is shown beside the model: give one")
    model, own, name = loaded(model, tokenizer)
    ids = token_ids(text, model, own)
    sides = [inside(model, ids, own, name)]
    if mistake is not None:
        with planted(patches_of(model, mistake)):
            sides.append(inside(model, ids, own, f"{name}, {mistake}"))
    if other is not None:
        second, its, second_name = loaded(other, tokenizer)
        if not torch.equal(token_ids(text, second, its), ids):
            raise ValueError(f"{name} and {second_name} cut this text into different tokens, so "
                             "they cannot be shown side by side")
        sides.append(inside(second, ids, its, second_name))
    tokens = [visible_text(own, id) for id in ids[0].tolist()]
    data = {"tokens": tokens, "ids": ids[0].tolist(), "sides": sides}
    template = (HERE / "look.html").read_text(encoding="utf-8")
    # In a <script> only "</" could end the script early.
    return Page(template.replace("/*DATA*/null",
                                 json.dumps(data, separators=(",", ":")).replace("</", "<\\/")))


# ------------------------------------------------------------------------------------------------
# What is shown
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def inside(model, ids, tokenizer, name):
    """Everything that the page shows of one model for ids (1, T)."""
    stream = []                                            # what the final norm is given
    hook = model.transformer.ln_f.register_forward_pre_hook(
        lambda norm, inputs: stream.append(inputs[0]))
    try:
        out = model(ids, output_hidden_states=True, output_attentions=True)
    finally:
        hook.remove()
    if out.attentions[0].size(-1) != ids.size(1):
        raise ValueError(f"{name} reads another number of tokens than the text has, so it cannot "
                         "be shown beside it")
    x = torch.stack([*out.hidden_states[:-1], stream[0]])[:, 0]            # (L + 1, T, C)
    # The logit lens: the final norm and the head, applied to what each layer has so far.
    lens = [likeliest(model.lm_head(model.transformer.ln_f(layer)), tokenizer) for layer in x[:-1]]
    return {
        "name": name,
        "windows": list(model.config.windows),
        "heads": model.config.num_attention_heads,
        "attention": [packed(weights[0]) for weights in out.attentions],
        "causal": [is_causal(weights[0]) for weights in out.attentions],
        "norms": [[round(v, 3) for v in row]                               # (L + 1, T)
                  for row in x.float().norm(dim=-1).tolist()],
        "lens": [*lens, likeliest(out.logits[0], tokenizer)],              # (L + 1, T, 6 pairs)
    }


def is_causal(weights):
    """Does no token read a later one?  Only a mistake makes it False."""
    return not weights.triu(1).any().item()


def packed(weights):
    """Attention weights (H, T, T) as text: a byte for each query and key, row by row.

    Keys after their query are left out if nothing reads them.  A byte is 255 times the root of the
    weight, so that small weights keep their digits: a weight w is off by at most sqrt(w) / 255.
    """
    shown = torch.ones(weights.shape[1:], dtype=torch.bool, device=weights.device)
    if is_causal(weights):
        shown = shown.tril()
    values = weights.float()[:, shown].clamp(0, 1).sqrt().mul(255)         # (H, T (T + 1) / 2)
    values = values.round().to(torch.uint8)
    return base64.b64encode(values.cpu().numpy().tobytes()).decode()


def likeliest(logits, tokenizer):
    """logits (T, V) -> for each token the likeliest next ones: [text, probability] pairs."""
    logits = logits.float()
    found = logits.topk(min(LIKELIEST, logits.size(-1)))
    probabilities = (found.values - logits.logsumexp(-1, keepdim=True)).exp()
    return [[[visible_text(tokenizer, id), float(f"{p:.4g}")] for p, id in zip(ps, ids)]
            for ps, ids in zip(probabilities.tolist(), found.indices.tolist())]


def visible_text(tokenizer, id):
    """A token as a reader sees it: its text, or the bytes where it is a part of a character."""
    token = tokenizer.convert_ids_to_tokens([id])[0]
    if token is None:
        return f"<{id}>"                                  # a row that only rounds up the vocabulary
    raw = token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return " ".join(f"<{byte:02X}>" for byte in raw)


# ------------------------------------------------------------------------------------------------
# What is asked for
# ------------------------------------------------------------------------------------------------

def loaded(model, tokenizer):
    """(model, tokenizer, name for the page), loaded where they are names."""
    if isinstance(model, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
        name = os.path.basename(os.path.normpath(model))
        model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="naive")
        return model, tokenizer, name
    if tokenizer is None:
        raise ValueError("a loaded model needs its tokenizer too: look(text, model, "
                         "tokenizer=tokenizer)")
    return model, tokenizer, model.config.model_type


def token_ids(text, model, tokenizer):
    """ids (1, T) of the text; ValueError for too few or too many."""
    ids = tokenizer.encode(text)
    limit = min(MOST_TOKENS, model.config.position_limit or MOST_TOKENS)
    if not 1 <= len(ids) <= limit:
        raise ValueError(f"the text has {len(ids)} tokens; the page can show 1 to {limit}")
    return torch.tensor([ids], device=model.device)


def patches_of(model, mistake):
    """The first way to make a mistake in this model, for mistakes.planted."""
    ways = {}
    for known, patches in variants(model):
        ways.setdefault(known.id, patches)
    if mistake not in ways:
        raise ValueError(unknown_mistake(mistake, ways, f" in {model.config.model_type}"))
    return ways[mistake]


def unknown_mistake(mistake, known=BY_ID, where=""):
    """The message for a mistake that does not exist."""
    near = difflib.get_close_matches(mistake, known, n=3, cutoff=0.4) or [*known][:3]
    return (f"there is no mistake {shown(mistake)}{where}; similar are {', '.join(near)}, and "
            "python mistakes.py prints all of them")


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(
        description="Write a page that shows what happens inside a model for one text.")
    add = parser.add_argument
    add("text", help="the text to look at, at most 512 tokens")
    add("--model", type=a_name, default=DEMO, metavar="NAME",
        help="folder or hub id (default: the bundled demo-neo)")
    add("--other", type=a_name, metavar="NAME",
        help="a second model, shown beside the first, with the differences coloured")
    add("--mistake", type=a_name, metavar="ID",
        help="show the model a second time beside itself, with this mistake of mistakes.py")
    add("--out", type=a_name, required=True, metavar="FILE.html", help="the page to write")
    return parser.parse_args(argv)


@as_command
def main(argv=None):
    """Exit status: 0, 2 with one line on what is wrong, 130 when interrupted."""
    args = arguments(argv)
    check_text(args.text, "the text")
    if args.mistake is not None and args.mistake not in BY_ID:
        raise ValueError(unknown_mistake(args.mistake))
    check_outputs({"--out": args.out}, [args.model, args.other])
    page = look(args.text, args.model, other=args.other, mistake=args.mistake)
    write_result(args.out, page.encode())
    print(f"{plain(args.out)}: {len(page.encode()) / 1e6:.2f} MB, open it in a browser",
          file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
