"""Training of GPT-Neo and GPT-NeoX: the next token of text files, or the label of texts.

    python train.py --text data/train/*.txt --valid data/valid/*.txt --out my-model --family neo
    python train.py --text notes.txt --out my-pythia --init folder/of/pythia-70m --lr 1e-4
    python train.py --task classify --train a.csv --valid b.csv --init my-pythia --out my-labels
    torchrun --nproc-per-node 2 train.py ...                # any of them, on several processes

The first starts from scratch, the others from a checkpoint.  Labelled texts are CSV files with the
columns text and label, or JSON lines with these two keys.

OUT becomes a checkpoint in the official format: config.json, model.safetensors, tokenizer files,
and training.json, which says how it was made.  OUT.run beside it holds what an unfinished run needs
to go on (weights, optimizer, random numbers), metrics.jsonl and loss.png.  The same command goes on
where it was stopped or killed, and arrives at the same bits as a run that never stopped (on the
same machine with the same number of threads).

On several processes each takes its share of every batch (--batch-size counts all of them), and the
gradients are those of one process with the whole batch.  Only dropout differs: each process draws
its own.  Process 0 evaluates, prints and writes; the others only read, so all must see the same
files.

    B  sequences in a batch · T  tokens in a sequence (at most --context)
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from commands import (
    Parser,
    a_name,
    as_command,
    check_folder,
    check_text,
    discard_output,
    given,
    spelled,
    what_failed,
)
from files import error_line, plain, read_json, shown
from processes import (
    SharedError,
    everywhere,
    join_processes,
    lost_process,
    processes,
    rank,
    say,
    usable_device,
)
from training.model import new_model
from training.new_tokenizer import CLASSES, new_tokenizer
from training.run import Run, describe
from training.tasks import Label, NextToken, check_fit

FILES = dict(lm=["text"], classify=["train", "init"])       # options that a task must be given
ONLY = dict(text="lm", prompt="lm", train="classify")       # options that only one task uses
NEW_MODEL = dict(                                           # defaults; not allowed beside --init
    family=("neo", "architecture of a new model"), hidden_size=(256, "width of a new model"),
    layers=(4, "layers of a new model"), heads=(4, "attention heads of a new model"),
    window=(64, "window of the local layers of a new GPT-Neo"),
    vocab_size=(2048, "tokens that a new model's tokenizer learns"),
    dropout=(0.0, "dropout of a new model"))
STATE = ("settings", "step", "seconds", "history", "model", "optimizer", "random")  # in state.pt
RUN_FILE = re.compile(                                      # in OUT.run before its first save
    r"\..*|metrics\.jsonl|loss\.png|(vocab|tokenizer|tokenizer_config|added_tokens"
    r"|special_tokens_map)\.json|merges\.txt")
RECIPE = ("device", "dtype", "steps", "lr", "warmup", "weight_decay", "clip", "accumulate",
          "eval_every", "save_every")                       # the options that a Run takes


# ------------------------------------------------------------------------------------------------
# The command's options
# ------------------------------------------------------------------------------------------------

class RaisingParser(Parser):
    def error(self, message):
        """Bad options raise a ValueError, so that of several processes only one reports them."""
        raise ValueError(plain(message, 250))


def parser():
    p = RaisingParser(prog="train.py", description=__doc__.split("\n\n")[0])
    p.add_argument("--task", choices=list(FILES), default="lm",
                   help="learn the next token (lm, the default) or the label of a text (classify)")
    several = dict(nargs="+", action="extend", type=a_name, metavar="FILE")
    p.add_argument("--text", **several, help="for lm: UTF-8 text files to train on")
    p.add_argument("--train", **several, help="for classify: .csv or .jsonl files to train on")
    p.add_argument("--valid", **several, default=[],
                   help="held-out files of the same kind, for evaluation only")
    p.add_argument("--out", type=a_name, required=True,
                   help="folder for the checkpoint; OUT.run keeps an unfinished run")
    p.add_argument("--init", type=a_name, metavar="CHECKPOINT",
                   help="fine-tune this checkpoint with its tokenizer: a folder or a hub id")
    for name, (value, text) in NEW_MODEL.items():
        choices = list(CLASSES) if name == "family" else None
        p.add_argument(f"--{name.replace('_', '-')}", type=type(value), choices=choices,
                       metavar="neo|neox" if choices else name[0].upper(),
                       help=f"{text} (default {value})")
    for name, value, text in [
            ("context", 512, "tokens in a sequence"),
            ("batch-size", 8, "sequences in a step, over all processes together"),
            ("accumulate", 1, "gradient accumulation: parts of each process's share of a batch"),
            ("steps", 2000, "optimizer steps"), ("lr", 1e-3, "highest learning rate"),
            ("warmup", 100, "steps of linear learning-rate warm-up, before a cosine decay"),
            ("weight-decay", 0.1, "AdamW's weight decay, for the matrices of linear layers"),
            ("clip", 1.0, "gradient clipping: the largest norm of all gradients together"),
            ("seed", 0, "random seed of new weights, data order and dropout"),
            ("eval-every", 250, "steps between evaluations"),
            ("save-every", 100, "steps between saves of the run"),
            ("prompt", "", "prompt of the sample texts (default: the start of a text)")]:
        p.add_argument(f"--{name}", type=type(value), default=value, metavar=name[0].upper(),
                       help=text if name == "prompt" else f"{text} (default {value})")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                   help="dtype of the matrix products (default float32); the weights stay float32")
    p.add_argument("--save-dtype", choices=["float32", "bfloat16", "float16"], default="float32",
                   help="dtype of the checkpoint's weights (default float32)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("--device", type=a_name, default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda, ... (default: cuda if there is a GPU)")
    return p


def parse(argv):
    """The options; ValueError for what is missing, does not go together, or is out of its range."""
    args = parser().parse_args(argv)
    names = given(args, parser())
    for name in FILES[args.task]:
        if name not in names:
            raise ValueError(f"--task {args.task} needs --{name}")
    for name, task in ONLY.items():
        if task != args.task and name in names:
            raise ValueError(f"--{name} is for --task {task}")
    check_ranges(args)
    if args.init and (shape := [name for name in NEW_MODEL if name in names]):
        raise ValueError(f"{spelled(shape)}: with --init the checkpoint decides that")
    if args.family == "neox" and args.window is not None:
        raise ValueError("--window is for --family neo: GPT-NeoX has no local layers")
    for name, (value, _) in {} if args.init else NEW_MODEL.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_text(args.prompt, "--prompt")
    check_text(args.out, "--out")                           # safetensors reads no other name
    args.device = str(usable_device(args.device))
    if Path(args.out).name in ("", ".."):
        raise ValueError(f"--out must name a folder, not {args.out!r}")
    for folder in (args.out, run_folder(args.out)):
        check_folder(folder)
    return args


def check_ranges(args):
    """ValueError for a number that is out of its range."""
    for name in ("steps", "batch_size", "accumulate", "lr", "clip", "eval_every", "save_every",
                 "threads", "hidden_size", "layers", "heads", "window", "vocab_size"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 2**31:     # infinity and NaN are not
            name = name.replace("_", "-")
            raise ValueError(f"--{name} must be above 0 and below 2^31, not {value}")
    for name, least, end in (("context", 2, 2**31), ("batch-size", 1, 2**20), ("seed", 0, 2**32),
                             ("threads", 1, 1025)):
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not least <= value < end:
            raise ValueError(f"--{name} must be at least {least} and below {end}, not {value}")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout must be at least 0 and below 1, not {args.dropout}")
    if not 0 <= args.weight_decay < math.inf:
        raise ValueError(f"--weight-decay must be at least 0, not {args.weight_decay}")
    if args.batch_size < args.accumulate * processes():
        raise ValueError(f"--batch-size {args.batch_size} is too small for {processes()} x "
                         f"{args.accumulate} pieces (processes x --accumulate)")
    if not 0 <= args.warmup < args.steps:
        raise ValueError(f"--warmup must be in 0 … {args.steps - 1}, not {args.warmup}")


def settings_of(options, contents):
    """A dict of what the result depends on; of the texts it has a hash of their content."""
    elsewhere = ("out", "threads", "device", "save_every", "eval_every", "prompt")
    settings = {name: value for name, value in options.items() if name not in elsewhere}
    settings["processes"] = processes()
    for name, parts in contents.items():
        settings[name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return settings


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def run_folder(out):
    return Path(f"{out.rstrip('/')}.run")


def read_state(folder):
    """What an unfinished run saved, or None; ValueError where the file is damaged."""
    path = folder / "state.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
        return {name: state[name] for name in STATE}
    except OSError:
        raise
    except Exception as error:                              # a damaged file raises many kinds
        raise ValueError(f"{path} is damaged ({error_line(error):.80}): remove {folder} to start "
                         "again") from None


def find_earlier(out, folder, settings):
    """(finished, state) of the run that OUT belongs to; ValueError if that is another run."""
    finished, state = (out / "training.json").exists(), None
    if finished:
        earlier = read_json(out / "training.json").get("settings")
        if not isinstance(earlier, dict):
            raise ValueError(f"{out / 'training.json'}: field settings must be an object")
    elif state := read_state(folder):
        earlier = state["settings"]
    elif os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already and was not written by train.py: choose "
                         "another --out")
    elif mine := [path.name for path in folder.iterdir() if not RUN_FILE.fullmatch(path.name)
                  ] if folder.is_dir() else []:
        raise ValueError(f"{folder} holds {plain(mine[0])}, which train.py has not written: choose "
                         "another --out")
    else:
        return False, None
    # A run of an earlier version of this program did not save these settings.
    earlier = dict(task="lm", train=None, accumulate=1, processes=1) | earlier
    differ = [f"{name} has changed" if name in ("text", "train", "valid") else
              f"{name} was {shown(earlier.get(name), 30)} and is {shown(value, 30)}"
              for name, value in settings.items() if earlier.get(name) != value]
    if differ:
        more = f" and {len(differ) - 3} more" * (len(differ) > 3)
        raise ValueError(f"{out} belongs to a run with other settings ({'; '.join(differ[:3])}"
                         f"{more}): choose another --out, or remove {out} and {folder}")
    return finished, state


@contextlib.contextmanager
def leaving_nothing(folder):
    """If a run fails before its first save, remove the folders that were made for it."""
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        yield
    except BaseException:
        if rank() == 0 and made and not (folder / "state.pt").exists():
            shutil.rmtree(folder, ignore_errors=True)
            for parent in made[1:]:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        raise


def open_task(task, init, shape, folder):
    """Give the task its model and tokenizer: --init's, or new ones of this shape.

    folder: that of an earlier run, which holds a new model's tokenizer, or None.  Returns a line
    about the texts to print.
    """
    context = task.context
    if init:
        model, tokenizer = task.load(init)
        check_fit(init, model, tokenizer, context)
    else:
        family, vocab_size = shape["family"], shape["vocab_size"]
        tokenizer = (CLASSES[family].from_pretrained(folder) if folder else
                     new_tokenizer(task.texts, family, vocab_size, context))
        model = new_model(context=context, **shape)
    return task.open(model, tokenizer)


def start(args):
    """The run where it stopped, or a new one; None if it is finished."""
    options, folder = vars(args), run_folder(args.out)
    common = dict(context=args.context, batch_size=args.batch_size, seed=args.seed)
    task = (NextToken(args.text, args.valid, prompt=args.prompt, **common) if args.task == "lm" else
            Label(args.train, args.valid, **common))
    settings = settings_of(options, task.contents)
    finished, state = find_earlier(Path(args.out), folder, settings)
    if finished:
        return None
    torch.manual_seed(args.seed)                            # for weights that are drawn
    news = open_task(task, args.init, {name: options[name] for name in NEW_MODEL},
                     folder if state else None)
    run = Run(task, folder, settings, fresh=not args.init,
              **{name: options[name] for name in RECIPE})
    torch.manual_seed(args.seed + rank())                   # for dropout
    if state:
        run.restore(state)
        news = f"going on after step {run.step} of {run.steps}"
    if rank() == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        task.tokenizer.save_pretrained(run.folder)
    say(f"{args.out}: {news}")
    return run


def run_or_resume(argv):
    """The whole command; returns its exit status."""
    stopping = []

    def stop(*_):
        """The first Ctrl-C lets the current step end; a second one interrupts at once."""
        stopping.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    args = everywhere(parse, argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with leaving_nothing(run_folder(args.out)):
        run = everywhere(start, args)
        if run is None:
            say(f"{args.out}: this run is finished", sys.stdout)
            return 0
        signal.signal(signal.SIGINT, stop)
        run.train(stopping)
    if run.step < run.steps:
        say(f"stopped after step {run.step}: the same command goes on")
        return 130
    if rank() == 0:
        command = shlex.join(["python", "train.py", *argv])
        record = run.finish(Path(args.out), args.save_dtype, command)
        say(f"{args.out}: {describe(record)}", sys.stdout)
    return 0


@as_command
def main(argv=None):
    """Exit status: 0 finished, 130 stopped by Ctrl-C, 2 with one line on what is wrong."""
    try:
        if processes() > 1:
            join_processes()
        status = run_or_resume(sys.argv[1:] if argv is None else argv)
        if processes() > 1:
            dist.barrier()                                  # process 0 may still be writing
            dist.destroy_process_group()
        return status
    except SharedError as error:
        if rank() > 0:
            time.sleep(1)                                   # so that torchrun lets process 0 say it
        say(f"train.py: error: {error}")
        return 2
    except BrokenPipeError:                                 # | head has gone: not finished
        discard_output()
        return 2
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if lost_process(error):
            return 1                                       # another process ended, and has said why
        where = f"process {rank()}: " if processes() > 1 else ""
        begin = "\n" if processes() > 1 else ""             # on a line below the progress bar
        text = what_failed(error, "use a smaller model, --batch-size or --context, or more "
                                  "--accumulate")
        print(f"{begin}train.py: error: {where}{text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
