"""Next-token training of GPT-Neo and GPT-NeoX on text files, from scratch or on from a checkpoint.

    python train.py --text data/train/*.txt --valid data/valid/*.txt --out my-model --family neo
    python train.py --text notes.txt --out my-pythia --init folder/of/pythia-70m --lr 1e-4

OUT becomes a checkpoint in the official format: config.json, model.safetensors, tokenizer files,
and training.json, which says how it was made.  OUT.run beside it holds what an unfinished run needs
to go on (weights, optimizer, random numbers), metrics.jsonl and loss.png.  The same command goes on
where it was stopped or killed, and arrives at the same bits as a run that never stopped (on the
same machine with the same number of threads).

The two demo checkpoints (checkpoints/prepare_shakespeare.py makes the text):

    DEMO="--text data/train/*.txt --valid data/valid/*.txt --hidden-size 256 --layers 4 --heads 4
          --context 512 --dropout 0.05 --batch-size 4 --warmup 100 --seed 0
          --dtype bfloat16 --save-dtype float16 --threads 1"
    python train.py $DEMO --out checkpoints/demo-neo --family neo --window 64 --vocab-size 2048 \\
        --lr 1.5e-3 --steps 3500
    python train.py $DEMO --out checkpoints/demo-neox --family neox --vocab-size 1472 \\
        --lr 1.5e-3 --steps 2500

    B  sequences in a batch · T  tokens in a sequence (--context)
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import unicodedata
from pathlib import Path

import torch
from tqdm import tqdm

from load_weights import AutoModelForCausalLM, AutoTokenizer
from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM
from tokenizer import GPT2Tokenizer, GPTNeoXTokenizerFast

END, PADDING = "<|endoftext|>", "<|padding|>"
NEW_MODEL = dict(family="neo", hidden_size=256, layers=4, heads=4, window=64, vocab_size=2048,
                 dropout=0.0)                               # defaults; --init leaves no choice


# ------------------------------------------------------------------------------------------------
# Text and tokenizer
# ------------------------------------------------------------------------------------------------

def read_texts(files):
    """The texts of UTF-8 files.  A byte that is not UTF-8, or no text at all, raises ValueError."""
    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8, the byte at offset {error.start} "
                             f"is {error.object[error.start]:#04x}") from None
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from None
        if not texts[-1].strip():
            raise ValueError(f"{file}: there is no text in it")
    return texts


def learn_merges(texts, alphabet, count):
    """Byte-pair encoding's training: `count` times, join the pair of neighbours seen most often."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if count < 1:
        raise ValueError(f"--vocab-size: {1 - count} too small to hold the bytes and one merge")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=len(alphabet) + count, min_frequency=2, initial_alphabet=alphabet,
        show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # The official files have one merge for each token.  Were a token made in two ways, its rank
    # would not be its id's; and a short text runs out of pairs that occur twice.
    if not len(merges) == len({left + right for left, right in merges}) == count:
        raise ValueError(f"--vocab-size needs {count} merges and the text gives {len(merges)}: "
                         "choose another size, or more text")
    return merges


def train_tokenizer(texts, family, vocab_size, context):
    """A byte-level BPE of vocab_size ids in the family's official files: {name: content}.

    In both families the order of the ids is the order of the merges.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())                 # the 256 bytes as printable characters
    config = dict(bos_token=END, eos_token=END, unk_token=END, add_prefix_space=False,
                  model_max_length=context)
    if family == "neo":
        merges = learn_merges(texts, alphabet, vocab_size - len(alphabet) - 1)
        vocab = [*alphabet, *map("".join, merges), END]
        config["tokenizer_class"] = "GPT2Tokenizer"
        files = {"vocab.json": {token: i for i, token in enumerate(vocab)},
                 "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""])}
    else:
        # UTF-8 never has the bytes C0, C1 and F5 to FF, and the official file no tokens for them.
        alphabet = sorted(set(alphabet) - set(map(chr, [0xC0, 0xC1, *range(0xF5, 0x100)])))
        # encode cuts out runs of spaces before BPE sees the text, so no merge is spent on them.
        pieces = [piece for text in texts
                  for piece in re.split(" {2,24}", unicodedata.normalize("NFC", text))]
        runs = [" " * n for n in range(24, 1, -1)]
        merges = learn_merges(pieces, alphabet, vocab_size - 2 - len(alphabet) - len(runs))
        vocab = [END, PADDING, *alphabet, *map("".join, merges)]
        config |= dict(tokenizer_class="GPTNeoXTokenizerFast", pad_token=PADDING)
        files = {"tokenizer.json": neox_tokenizer_json(vocab, merges, runs)}
    files["tokenizer_config.json"] = config
    return {name: content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            for name, content in files.items()}


def neox_tokenizer_json(vocab, merges, runs):
    """GPT-NeoX-20B's tokenizer.json, field by field, around another vocabulary."""
    def added(id, content, special):
        return dict(id=id, special=special, content=content, single_word=False, lstrip=False,
                    rstrip=False, normalized=not special)

    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[added(0, END, True), added(1, PADDING, True),
                      *(added(len(vocab) + i, run, False) for i, run in enumerate(runs))],
        normalizer=dict(type="NFC"), pre_tokenizer=byte_level, post_processor=byte_level,
        decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False,
                   vocab={token: i for i, token in enumerate(vocab)},
                   merges=list(map(" ".join, merges))))


class Batches:
    """batches[step] is a function of (seed, step) alone: there is no place in the data to save.

    Every epoch cuts the text into windows of T tokens, at another offset than the epoch before, and
    takes each of them once, in another order.
    """

    def __init__(self, ids, context, batch_size, seed):
        self.ids, self.context, self.batch_size, self.seed = ids, context, batch_size, seed
        self.windows = (len(ids) - 1) // context            # the - 1 leaves room for an offset
        self.epoch = None

    def window(self, i):
        epoch, k = divmod(i, self.windows)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            spare = len(self.ids) - self.windows * self.context
            offset = torch.randint(spare + 1, (), generator=generator)
            order = torch.randperm(self.windows, generator=generator)
            self.epoch, self.starts = epoch, (order * self.context + offset).tolist()
        return self.ids[self.starts[k] : self.starts[k] + self.context]                  # (T,)

    def __getitem__(self, step):
        first = step * self.batch_size
        rows = range(first, first + self.batch_size)
        return torch.stack([self.window(i) for i in rows])                               # (B, T)


# ------------------------------------------------------------------------------------------------
# Model, loss, optimizer
# ------------------------------------------------------------------------------------------------

def new_model(args):
    """A model of the asked shape with fresh float32 weights."""
    shape = dict(vocab_size=args.vocab_size, max_position_embeddings=args.context,
                 hidden_size=args.hidden_size)
    if args.family == "neo":
        kinds = [["global", "local"], args.layers // 2], [["global"], args.layers % 2]
        end = args.vocab_size - 1
        model = GPTNeoForCausalLM(GPTNeoConfig(
            **shape, num_layers=args.layers, num_heads=args.heads, window_size=args.window,
            attention_types=[[names, times] for names, times in kinds if times],
            resid_dropout=args.dropout, embed_dropout=args.dropout,
            bos_token_id=end, eos_token_id=end))
        with torch.no_grad():
            # GPT-Neo's scores have no 1/sqrt(D); its authors folded it into the first q weights
            # (mesh-tensorflow, fold_scaling_into_initializer).  And a token must be heard over what
            # the blocks add to it, which starts at about 0.1, so embeddings do too and not at 0.02.
            # The demo's mean loss of steps 201 to 250: 4.70 so, 4.73 with only the second, 4.93 with
            # only the first.
            for block in model.transformer.blocks:
                block.attn.q_proj.weight *= model.config.head_dim ** -0.5
            model.transformer.embed.weight *= 5
        return model
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        **shape, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden_size, hidden_dropout=args.dropout,
        bos_token_id=0, eos_token_id=0))                    # the class default for eos, 2, is "!"


def bits_per_byte(model, texts, tokenizer, context, dtype="float32", batch_size=8):
    """What a byte of the texts costs, in bits: comparable between any two tokenizers.

    Every token of every text is predicted once.  A text follows <|endoftext|>; its windows of T
    tokens share one token, the last to be predicted in one being the first to be seen in the next.
    A token early in its window has little to go on, so longer contexts would do a little better.
    """
    windows, nats, was_training = [], 0.0, model.training
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        windows += [ids[i : i + context] for i in range(0, len(ids) - 1, context - 1)]
    model.eval()
    with torch.no_grad(), autocast(model.device, dtype):
        for i in range(0, len(windows), batch_size):
            rows = windows[i : i + batch_size]
            longest = max(map(len, rows))                   # a text's last window may be shorter
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])       # (B, T)
            labels = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
            loss = model(ids.to(model.device), labels=labels.to(model.device)).loss
            nats += loss.item() * (labels[:, 1:] != -100).sum().item()
    model.train(was_training)
    return nats / math.log(2) / count_bytes(texts)


def count_bytes(texts):
    return sum(len(text.encode("utf-8")) for text in texts)


def autocast(device, dtype):
    """For "bfloat16", matrix products in bfloat16; the weights stay float32 either way."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def learning_rate(step, peak, warmup, steps):
    """Linear from peak / warmup to peak, then half a cosine that would be 0 at step `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def parameter_groups(model, weight_decay, fresh):
    """AdamW's parameter groups, each with the share of the learning rate that it takes.

    Decay is for the matrices of linear layers.  Biases are few and LayerNorm weights belong near 1,
    not 0.  A row of an embedding has a gradient only when its token occurs but would shrink at every
    step, so decay would fade the rare tokens; GPT-Neo's output matrix is its embedding and goes
    with it.

    A fresh GPT-Neo's q weights have 1/sqrt(D) folded in (new_model).  AdamW moves a weight by about
    the learning rate whatever its size, so theirs is folded too: together that is the training of a
    model that divides its scores (but for clipping and Adam's epsilon, which see other gradients).
    """
    embedded = {id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding)
                for p in module.parameters()}
    folded = {id(p) for name, p in model.named_parameters() if fresh and name.endswith("q_proj.weight")}
    groups = {"decayed": [], "kept": [], "folded": []}
    for p in model.parameters():
        matrix = p.ndim >= 2 and id(p) not in embedded
        groups["folded" if id(p) in folded else "decayed" if matrix else "kept"].append(p)
    share = model.config.head_dim ** -0.5
    return [dict(params=groups["decayed"], weight_decay=weight_decay, share=1.0),
            dict(params=groups["kept"], weight_decay=0.0, share=1.0),
            dict(params=groups["folded"], weight_decay=weight_decay / share, share=share)]


def draw(history, bits_per_nat, path):
    """Plot training loss (smoothed) and held-out loss by step, both in bits per byte."""
    try:
        import matplotlib
    except ImportError:                                     # optional: metrics.jsonl has it all
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record["step"] for record in history if "loss" in record]
    bits = [record["loss"] * bits_per_nat for record in history if "loss" in record]
    valid = [(r["step"], r["valid_bits_per_byte"]) for r in history if "valid_bits_per_byte" in r]
    smooth, mean = [], 0.0
    for i, value in enumerate(bits):
        mean += (value - mean) / min(i + 1, 50)             # a running mean of about 50 steps
        smooth.append(mean)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(steps, smooth, label="training text, smoothed")
    if valid:
        axes.plot(*zip(*valid), "o-", markersize=3, label="held-out text")
    axes.set(xlabel="step", ylabel="bits per byte", title=Path(path).parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    beside = Path(f"{path}.part")
    figure.savefig(beside, format="png", dpi=120, bbox_inches="tight")
    os.replace(beside, path)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------

class Run:
    """A training run.  Whatever changes while it runs is in state(), so that it can be killed."""

    def __init__(self, args, settings, model, tokenizer, texts, valid_texts):
        self.args, self.settings, self.tokenizer = args, settings, tokenizer
        self.model, self.valid_texts, self.folder = model, valid_texts, run_folder(args)
        ids = [id for text in texts for id in (tokenizer.eos_token_id, *tokenizer.encode(text))]
        if len(ids) <= args.context:
            raise ValueError(f"--text has {len(ids) - len(texts)} tokens in all, fewer than one "
                             f"--context of {args.context}")
        self.batches = Batches(torch.tensor(ids), args.context, args.batch_size, args.seed)
        self.bits_per_nat = len(ids) / count_bytes(texts) / math.log(2)    # loss to bits per byte
        self.optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, not args.init),
                                           lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds, self.history = 0, 0.0, []

    def state(self):
        return dict(settings=self.settings, step=self.step, seconds=self.seconds,
                    history=self.history, model=self.model.state_dict(),
                    optimizer=self.optimizer.state_dict(), rng=torch.get_rng_state(),
                    cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])

    def save(self):
        """Written beside, then renamed: a kill at any moment leaves the old state or the new."""
        torch.save(self.state(), self.folder / "state.pt.part")
        os.replace(self.folder / "state.pt.part", self.folder / "state.pt")

    def restore(self, state):
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def update(self):
        """One step of the optimizer; returns what to log."""
        args = self.args
        lr = learning_rate(self.step, args.lr, args.warmup, args.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        ids = self.batches[self.step].to(args.device)                                    # (B, T)
        with autocast(args.device, args.dtype):
            loss = self.model(ids, labels=ids).loss         # the model shifts the labels itself
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        if not norm.isfinite():
            raise FloatingPointError(f"the gradient of step {self.step} is not finite: lower --lr")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return dict(step=self.step, loss=loss.item(), lr=lr, grad_norm=norm.item())

    def evaluate(self):
        """Held-out loss and a sample.  It draws no number from the generator that training uses."""
        args = self.args
        prompt = self.tokenizer.encode(args.prompt) or [self.tokenizer.eos_token_id]
        self.model.eval()
        ids = self.model.generate(
            torch.tensor([prompt], device=args.device), do_sample=True, temperature=0.8, top_k=40,
            max_new_tokens=min(100, args.context - len(prompt)),
            generator=torch.Generator(args.device).manual_seed(args.seed))
        self.model.train()
        record = dict(step=self.step, sample=self.tokenizer.decode(ids[0].tolist()))
        if self.valid_texts:
            record["valid_bits_per_byte"] = bits_per_byte(
                self.model, self.valid_texts, self.tokenizer, args.context, args.dtype)
        return record

    def train(self, stopping):
        """Train until the last step, or until `stopping` is no longer empty (Ctrl-C fills it)."""
        args, began = self.args, time.time() - self.seconds
        bar = tqdm(total=args.steps, initial=self.step, unit="step", file=sys.stderr)
        metrics = open(self.folder / "metrics.jsonl", "w", encoding="utf-8")

        def log(record):
            metrics.write(json.dumps(record, ensure_ascii=False) + "\n")
            metrics.flush()
            return record

        with metrics, bar:
            for record in self.history:                     # not what came after the last save:
                log(record)                                 # it is computed, and logged, again
            self.model.train()
            while self.step < args.steps and not stopping:
                record = log(self.update())
                self.history.append(record)
                bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
                bar.update()
                if self.step % args.eval_every == 0 or self.step == args.steps:
                    self.history.append(log(self.evaluate()))
                    draw(self.history, self.bits_per_nat, self.folder / "loss.png")
                    bar.write(describe(self.history[-1]), file=sys.stderr)
                self.seconds = time.time() - began
                if self.step % args.save_every == 0:
                    self.save()
            self.save()

    def finish(self):
        """Write OUT.  training.json comes last: where it is, the run is complete."""
        args, out = self.args, Path(self.args.out)
        self.model.to(getattr(torch, args.save_dtype)).save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        record = dict(
            command=shlex.join(["python", *sys.argv]), settings=self.settings, steps=self.step,
            tokens=self.step * args.batch_size * args.context, seconds=round(self.seconds),
            parameters=sum(p.numel() for p in self.model.parameters()),
            threads=torch.get_num_threads(), python=sys.version.split()[0], torch=torch.__version__)
        if self.valid_texts:                                # of the file, as anyone loads it
            saved = type(self.model).from_pretrained(out).to(args.device)
            record["valid_bytes"] = count_bytes(self.valid_texts)
            record["valid_bits_per_byte"] = bits_per_byte(
                saved, self.valid_texts, self.tokenizer, args.context)
        write_whole(out / "training.json", json.dumps(record, indent=2) + "\n")
        return record


def describe(record):
    bits = record.get("valid_bits_per_byte")
    held_out = f", {bits:.4f} bits per held-out byte" if bits else ""
    sample = f"\n{record['sample']}\n" if "sample" in record else ""
    return f"step {record.get('step', record.get('steps'))}{held_out}{sample}"


def write_whole(path, text):
    beside = Path(f"{path}.part")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def run_folder(args):
    return Path(f"{args.out.rstrip('/')}.run")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def parse(argv):
    """The arguments; ValueError for a number out of its range."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8, to train on")
    p.add_argument("--valid", nargs="*", default=[], metavar="FILE", help="UTF-8, held out whole")
    p.add_argument("--out", required=True, help="folder for the checkpoint; OUT.run is for the run")
    p.add_argument("--init", metavar="CHECKPOINT", help="go on from this model with its tokenizer")
    for name, value in NEW_MODEL.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=type(value), metavar=name[0].upper(),
                       help=f"of a new model (default {value})")
    for name, value, text in [
            ("context", 512, "tokens in a sequence"), ("batch-size", 8, "sequences in a step"),
            ("steps", 2000, "updates of the weights"), ("lr", 1e-3, "highest learning rate"),
            ("warmup", 100, "steps up to it"), ("weight-decay", 0.1, "of linear layers' matrices"),
            ("clip", 1.0, "longest gradient"), ("seed", 0, "of weights, data order and dropout"),
            ("eval-every", 250, "steps"), ("save-every", 100, "steps"),
            ("prompt", "", "of the samples (default: the start of a text)")]:
        p.add_argument(f"--{name}", type=type(value), default=value, metavar=name[0].upper(),
                       help=text if name == "prompt" else f"{text} (default {value})")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                   help="of the matrix products; the weights stay float32")
    p.add_argument("--save-dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)

    for name in ("steps", "batch_size", "lr", "clip", "eval_every", "save_every", "threads"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.context < 2:
        raise ValueError(f"--context must be at least 2, not {args.context}")
    if not 0 <= args.warmup < args.steps:
        raise ValueError(f"--warmup must be in 0 … {args.steps - 1}, not {args.warmup}")
    given = [f"--{name.replace('_', '-')}" for name in NEW_MODEL if getattr(args, name) is not None]
    if args.init and given:
        raise ValueError(f"{', '.join(given)}: with --init the checkpoint decides that")
    for name, value in {} if args.init else NEW_MODEL.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def settings_of(args, texts, valid_texts):
    """What the result depends on.  Of the texts their content counts, not where they lie."""
    elsewhere = ("out", "threads", "device", "save_every", "eval_every", "prompt")
    settings = {name: value for name, value in vars(args).items() if name not in elsewhere}
    for name, parts in (("text", texts), ("valid", valid_texts)):
        settings[name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return settings


def find_earlier(args, settings):
    """(finished, state) of the run that OUT belongs to; ValueError if that is another run."""
    out, folder, finished, state = Path(args.out), run_folder(args), False, None
    if (out / "training.json").exists():
        finished = True
        earlier = json.loads((out / "training.json").read_text(encoding="utf-8"))["settings"]
    elif (folder / "state.pt").exists():
        state = torch.load(folder / "state.pt", weights_only=True)
        earlier = state["settings"]
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already, and not from train.py: choose another --out")
    else:
        return False, None
    differ = [f"{name} was {earlier.get(name)!r} and is {value!r}"
              for name, value in settings.items() if earlier.get(name) != value]
    if differ:
        raise ValueError(f"{out} belongs to a run with other settings ({'; '.join(differ)}): "
                         f"choose another --out, or remove {out} and {folder}")
    return finished, state


def start(args):
    """The run as it was left, or a new one; None if it is finished."""
    texts, valid_texts = read_texts(args.text), read_texts(args.valid)
    settings = settings_of(args, texts, valid_texts)
    finished, state = find_earlier(args, settings)
    if finished:
        return None
    run_folder(args).mkdir(parents=True, exist_ok=True)
    if args.init:
        model = AutoModelForCausalLM.from_pretrained(args.init, torch_dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.init)
    else:
        torch.manual_seed(args.seed)                        # the weights'
        model = new_model(args)
        if not state:
            for name, text in train_tokenizer(
                    texts, args.family, args.vocab_size, args.context).items():
                write_whole(run_folder(args) / name, text)
        tokenizer_class = {"neo": GPT2Tokenizer, "neox": GPTNeoXTokenizerFast}[args.family]
        tokenizer = tokenizer_class.from_pretrained(run_folder(args))
    if args.context > model.config.max_position_embeddings:
        raise ValueError(f"--context {args.context} is more than the "
                         f"{model.config.max_position_embeddings} positions of {args.init}")
    if len(tokenizer.encode(args.prompt)) >= args.context:
        raise ValueError("--prompt must be shorter than --context")
    run = Run(args, settings, model.to(args.device), tokenizer, texts, valid_texts)
    torch.manual_seed(args.seed)                            # dropout's
    if state:
        run.restore(state)
    return run


def main(argv=None):
    stopping = []

    def stop(*_):
        """An update must not be cut in two: the first Ctrl-C asks, only a second one interrupts."""
        stopping.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        args = parse(argv)
        if args.threads:
            torch.set_num_threads(args.threads)
        run = start(args)
        if run is None:
            print(f"{args.out}: this run is finished")
            return 0
        if run.step:
            print(f"{args.out}: going on after step {run.step} of {args.steps}", file=sys.stderr)
        signal.signal(signal.SIGINT, stop)
        run.train(stopping)
        if run.step < args.steps:
            print(f"stopped after step {run.step}: the same command goes on", file=sys.stderr)
            return 130
        print(f"{args.out}: {describe(run.finish())}")
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
