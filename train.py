"""Training of GPT-Neo and GPT-NeoX: the next token of text files, or the label of texts.

    python train.py --text data/train/*.txt --valid data/valid/*.txt --out my-model --family neo
    python train.py --text notes.txt --out my-pythia --init folder/of/pythia-70m --lr 1e-4
    python train.py --task classify --train a.csv --valid b.csv --init checkpoints/demo-neo --out my-own
    torchrun --nproc-per-node 2 train.py ...                # any of them, on several processes

The first starts from scratch, the others from a checkpoint.  Labelled texts are CSV files with the columns
text and label, or JSON lines with these two keys.

OUT becomes a checkpoint in the official format: config.json, model.safetensors, tokenizer files,
and training.json, which says how it was made.  OUT.run beside it holds what an unfinished run needs
to go on (weights, optimizer, random numbers), metrics.jsonl and loss.png.  The same command goes on
where it was stopped or killed, and arrives at the same bits as a run that never stopped (on the
same machine with the same number of threads).

On several processes each takes its share of every batch (--batch-size counts all of them), and the gradients
are those of one process with the whole batch.  Only dropout differs: each process draws its own.  Process 0
evaluates, prints and writes; the others only read, so all must see the same files.

    B  sequences in a batch · T  tokens in a sequence (at most --context)
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM
from tasks import Label, NextToken, autocast, to_device

TASKS = dict(lm=NextToken, classify=Label)
FILES = dict(lm=["text"], classify=["train", "init"])       # what a task cannot do without
NEW_MODEL = dict(family="neo", hidden_size=256, layers=4, heads=4, window=64, vocab_size=2048,
                 dropout=0.0)                               # defaults; --init leaves no choice


# ------------------------------------------------------------------------------------------------
# Processes: torchrun starts several of this script; without it there is one
# ------------------------------------------------------------------------------------------------

class SharedError(ValueError):
    """What was wrong in one process, raised in all of them."""


def processes():
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank():
    """Which process this is: 0, the first, speaks and writes for all."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def say(text, file=None):
    if rank() == 0:
        print(text, file=file or sys.stderr)


def meet():
    """Find the other processes.  They wait while process 0 evaluates, which may take its time."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))


def gathered(thing):
    """The list of what each process has for `thing`."""
    if processes() == 1:
        return [thing]
    things = [None] * processes()
    dist.all_gather_object(things, thing)
    return things


def everywhere(function, *args):
    """function(*args); where it fails in one process, all raise its error and nobody waits for ever."""
    if processes() == 1:
        return function(*args)
    result = problem = None
    try:
        result = function(*args)
    except (ValueError, OSError) as error:
        problem = str(error)
    for problem in filter(None, gathered(problem)):
        raise SharedError(problem)
    return result


def total(number):
    """The sum of a number over the processes."""
    if processes() == 1:
        return number
    number = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(number)
    return number.item()


# ------------------------------------------------------------------------------------------------
# Model and optimizer
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


def draw(history, task, path):
    """Plot training loss (smoothed) and held-out loss by step; a language model's in bits per byte."""
    try:
        import matplotlib
    except ImportError:                                     # optional: metrics.jsonl has it all
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [record["step"] for record in history if "loss" in record]
    bits = [record["loss"] * task.scale for record in history if "loss" in record]
    valid = [(r["step"], r[task.curve]) for r in history if task.curve in r]
    smooth, mean = [], 0.0
    for i, value in enumerate(bits):
        mean += (value - mean) / min(i + 1, 50)             # a running mean of about 50 steps
        smooth.append(mean)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(steps, smooth, label="training, smoothed")
    if valid:
        axes.plot(*zip(*valid), "o-", markersize=3, label="held out")
    unit = task.curve.removeprefix("valid_").replace("_", " ")
    axes.set(xlabel="step", ylabel=unit, title=Path(path).parent.name)
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
    """A training run.  Whatever changes while it runs is in its state, so that it can be killed."""

    def __init__(self, args, settings, task):
        self.args, self.settings, self.task, self.folder = args, settings, task, run_folder(args)
        self.model = self.replica = task.model.to(args.device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, args.weight_decay, not args.init),
                                           lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.step, self.seconds, self.history = 0, 0.0, []

    def save(self):
        """Written beside, then renamed: a kill at any moment leaves the old state or the new."""
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        random = gathered([torch.get_rng_state(), *gpus])
        if rank() == 0:
            state = dict(
                settings=self.settings, step=self.step, seconds=self.seconds, history=self.history,
                model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), random=random)
            torch.save(state, self.folder / "state.pt.part")
            os.replace(self.folder / "state.pt.part", self.folder / "state.pt")

    def restore(self, state):
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        cpu, *gpus = state["random"][rank()]
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    def backward(self):
        """The gradients of the whole batch's mean loss, left in the model; returns that loss.

        The batch is cut into one piece for each process and turn (--accumulate).  A piece's loss is a mean,
        so it counts by the piece's share of all that is scored; and since DDP averages where a sum is meant,
        times the processes.
        """
        args, turns = self.args, self.args.accumulate
        batch = self.task.batch(self.step)
        scored, parts = self.task.count(batch["labels"]), turns * processes()
        cut = zip(*(tensor.tensor_split(parts) for tensor in batch.values()))
        pieces, loss = [dict(zip(batch, tensors)) for tensors in cut], 0.0
        for turn, piece in enumerate(pieces[rank() * turns : (rank() + 1) * turns]):
            share = self.task.count(piece["labels"]) / scored
            alone = turn + 1 < turns and processes() > 1    # DDP exchanges gradients in the last turn only
            with self.replica.no_sync() if alone else contextlib.nullcontext():
                with autocast(args.device, args.dtype):
                    out = self.replica(**to_device(piece, args.device))
                mean = out.loss if share else 0 * out.logits.sum()         # the mean of nothing is NaN
                (mean * (share * processes())).backward()
            loss += mean.item() * share
        return total(loss)

    def update(self):
        """One step of the optimizer; returns what to log."""
        args = self.args
        lr = learning_rate(self.step, args.lr, args.warmup, args.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        loss = self.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        if not norm.isfinite():                             # in every process, once averaged
            raise SharedError(f"the gradient of step {self.step} is not finite: lower --lr")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return dict(step=self.step, loss=loss, lr=lr, grad_norm=norm.item())

    def train(self, stopping):
        """Train until the last step, or until `stopping` is filled in some process, as Ctrl-C does."""
        args, began, first = self.args, time.time() - self.seconds, rank() == 0
        if processes() > 1:                                 # the same weights, gradients averaged
            self.replica = DistributedDataParallel(self.model, broadcast_buffers=False)
        bar = tqdm(total=args.steps, initial=self.step, unit="step", file=sys.stderr, disable=not first)
        metrics = open(self.folder / "metrics.jsonl" if first else os.devnull, "w", encoding="utf-8")

        def log(record):
            metrics.write(json.dumps(record, ensure_ascii=False) + "\n")
            metrics.flush()
            return record

        with metrics, bar:
            for record in self.history:                     # not what came after the last save:
                log(record)                                 # it is computed, and logged, again
            self.model.train()
            while self.step < args.steps and not total(len(stopping)):
                self.history.append(log(self.update()))
                bar.set_postfix_str(f"loss {self.history[-1]['loss']:.3f}", refresh=False)
                bar.update()
                if first and (self.step % args.eval_every == 0 or self.step == args.steps):
                    self.history.append(log(dict(step=self.step) | self.task.evaluate(self.model)))
                    draw(self.history, self.task, self.folder / "loss.png")
                    bar.write(describe(self.history[-1]), file=sys.stderr)
                self.seconds = time.time() - began
                if self.step % args.save_every == 0:
                    self.save()
            self.save()

    def finish(self):
        """Write OUT.  training.json comes last: where it is, the run is complete."""
        args, out, task = self.args, Path(self.args.out), self.task
        self.model.to(getattr(torch, args.save_dtype)).save_pretrained(out)
        task.tokenizer.save_pretrained(out)
        saved = type(self.model).from_pretrained(out).to(args.device)      # of the file, as anyone loads it
        record = dict(
            command=shlex.join(["python", *sys.argv]), settings=self.settings, steps=self.step,
            tokens=self.step * args.batch_size * args.context, seconds=round(self.seconds),
            parameters=sum(p.numel() for p in self.model.parameters()),
            threads=torch.get_num_threads(), python=sys.version.split()[0], torch=torch.__version__,
            **task.scores(saved, "float32"))
        write_whole(out / "training.json", json.dumps(record, indent=2) + "\n")
        return record


def describe(record):
    scores = ", ".join(f"{name.removeprefix('valid_').replace('_', ' ')} {value:.4f}" for name, value
                       in record.items() if name.startswith("valid_") and isinstance(value, float))
    held_out = f", held out: {scores}" if scores else ""
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

def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--task", choices=list(TASKS), default="lm", help="next tokens (lm) or labels of texts")
    p.add_argument("--text", nargs="+", metavar="FILE", help="of lm: UTF-8, to train on")
    p.add_argument("--train", nargs="+", metavar="FILE", help="of classify: .csv or .jsonl, to train on")
    p.add_argument("--valid", nargs="*", default=[], metavar="FILE", help="the like, held out whole")
    p.add_argument("--out", required=True, help="folder for the checkpoint; OUT.run is for the run")
    p.add_argument("--init", metavar="CHECKPOINT", help="go on from this model with its tokenizer")
    for name, value in NEW_MODEL.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=type(value), metavar=name[0].upper(),
                       help=f"of a new model (default {value})")
    for name, value, text in [
            ("context", 512, "tokens in a sequence"),
            ("batch-size", 8, "sequences in a step, over all processes"),
            ("accumulate", 1, "turns to take for them, each a part of the batch"),
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
    return p


def parse(argv):
    """The arguments; ValueError for what is missing, does not go together, or is out of its range."""
    args = parser().parse_args(argv)
    for name in FILES[args.task]:
        if not getattr(args, name):
            raise ValueError(f"--task {args.task} needs --{name}")
    for task, (name, *_) in FILES.items():
        if task != args.task and getattr(args, name):
            raise ValueError(f"--{name} is for --task {task}")
    for name in ("steps", "batch_size", "accumulate", "lr", "clip", "eval_every", "save_every", "threads"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.context < 2:
        raise ValueError(f"--context must be at least 2, not {args.context}")
    if args.batch_size < args.accumulate * processes():
        raise ValueError(f"--batch-size {args.batch_size} is too small for {processes()} x "
                         f"{args.accumulate} pieces (processes x --accumulate)")
    if not 0 <= args.warmup < args.steps:
        raise ValueError(f"--warmup must be in 0 … {args.steps - 1}, not {args.warmup}")
    given = [f"--{name.replace('_', '-')}" for name in NEW_MODEL if getattr(args, name) is not None]
    if args.init and given:
        raise ValueError(f"{', '.join(given)}: with --init the checkpoint decides that")
    for name, value in {} if args.init else NEW_MODEL.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda" and processes() > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    return args


def settings_of(args, contents):
    """What the result depends on.  Of the texts their content counts, not where they lie."""
    elsewhere = ("out", "threads", "device", "save_every", "eval_every", "prompt")
    settings = {name: value for name, value in vars(args).items() if name not in elsewhere}
    settings["processes"] = processes()
    for name, parts in contents.items():
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
    before = dict(task="lm", train=None, accumulate=1, processes=1)        # when there was no choice yet
    earlier = before | earlier
    differ = [f"{name} was {earlier.get(name)!r} and is {value!r}"
              for name, value in settings.items() if earlier.get(name) != value]
    if differ:
        raise ValueError(f"{out} belongs to a run with other settings ({'; '.join(differ)}): "
                         f"choose another --out, or remove {out} and {folder}")
    return finished, state


def start(args):
    """The run as it was left, or a new one; None if it is finished.  What cannot start leaves no files."""
    task = TASKS[args.task](args)
    settings = settings_of(args, task.contents)
    finished, state = find_earlier(args, settings)
    if finished:
        return None
    torch.manual_seed(args.seed)                            # of weights that are drawn
    news = task.open(None if args.init else new_model(args), run_folder(args) if state else None)
    if args.context > task.model.config.max_position_embeddings:
        raise ValueError(f"--context {args.context} is more than the "
                         f"{task.model.config.max_position_embeddings} positions of {args.init}")
    run = Run(args, settings, task)
    torch.manual_seed(args.seed + rank())                   # dropout's
    if state:
        run.restore(state)
        news = f"going on after step {run.step} of {args.steps}"
    if rank() == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        task.tokenizer.save_pretrained(run.folder)
    say(f"{args.out}: {news}")
    return run


def run_or_resume(argv):
    """The whole command; returns its exit status."""
    stopping = []

    def stop(*_):
        """An update must not be cut in two: the first Ctrl-C asks, only a second one interrupts."""
        stopping.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    args = everywhere(parse, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    run = everywhere(start, args)
    if run is None:
        say(f"{args.out}: this run is finished", sys.stdout)
        return 0
    signal.signal(signal.SIGINT, stop)
    run.train(stopping)
    if run.step < args.steps:
        say(f"stopped after step {run.step}: the same command goes on")
        return 130
    if rank() == 0:
        say(f"{args.out}: {describe(run.finish())}", sys.stdout)
    return 0


def main(argv=None):
    try:
        if processes() > 1:
            meet()
        status = run_or_resume(argv)
        if processes() > 1:
            dist.destroy_process_group()
        return status
    except SharedError as error:
        if rank() > 0:
            time.sleep(1)                                   # so that torchrun lets process 0 say it
        say(f"train.py: error: {error}")
        return 2
    except (ValueError, OSError) as error:
        if processes() > 1:                                 # on a line below process 0's bar
            print(f"\ntrain.py: error: process {rank()}: {error}", file=sys.stderr)
        else:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if processes() == 1 or "gloo" not in str(error):
            raise
        return 1                                            # another process ended, and has said why
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
