"""Text from a model, on the command line.

    python generate.py "My favorite food is" --model EleutherAI/pythia-70m
    python generate.py "HAMLET." --top-p 0.9 --seed 1            (the bundled demo checkpoint)
    python generate.py --score FILE, or --top 5 "HAMLET."        (see score.py)
    torchrun --nproc-per-node 2 generate.py ...                  (any of them, on several processes)

With several processes, each has a share of the model (parallel.py), and process 0 prints.

This file is the command line; the loop that generates is in sampling.py.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
import time

import torch
import torch.distributed as dist

from attention import choose_backend, prefers_triton
from commands import (
    Parser,
    a_name,
    as_command,
    check_text,
    given,
    spelled,
)
from files import read_text
from load_weights import AutoModelForCausalLM, AutoTokenizer
from processes import (
    SharedError,
    everywhere,
    gathered,
    join_processes,
    lost_process,
    processes,
    rank,
    usable_device,
)
from sampling import Settings, check_prompt, generate, stream  # noqa: F401  (generate)
from score import likeliest, score_text, window_and_stride
from transformers_arguments import settings_dict

# ------------------------------------------------------------------------------------------------
# The options
# ------------------------------------------------------------------------------------------------

DEMO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoints", "demo-neo")

# Options that choose how a text is continued.  One that is not given comes from the checkpoint's
# generation_config.json or, if it is not there either, is the default in the help.
SETTINGS = ("max_new_tokens", "temperature", "greedy", "top_k", "top_p", "min_p",
            "repetition_penalty", "no_repeat_ngram_size")
GENERATION = (*SETTINGS, "seed", "num_samples", "stop", "compile", "interactive")


def arguments(argv=None):
    """The options, parsed and checked; if they are wrong, the program ends with status 2."""
    parser = Parser(
        description="Continue a prompt with GPT-Neo, GPT-NeoX, Pythia or TinyStories, or evaluate "
                    "a text. The text goes to standard output, everything else to standard error.")
    add_generation_options(parser.add_argument)
    add_model_options(parser.add_argument)
    add = parser.add_argument
    add("--score", type=a_name, metavar="FILE",
        help="instead of generating: print loss, bits per byte and perplexity of this text file; "
             "- is standard input")
    add("--stride", type=int, metavar="N",
        help="stride of --score's sliding window (default: half the window)")
    add("--top", type=int, metavar="N",
        help="instead of generating: print the N likeliest next tokens")
    args = parser.parse_args(argv)
    if problem := what_is_wrong(args, parser):
        parser.error(problem)
    return args


def add_generation_options(add):
    add("prompt", nargs="?", help="the text to continue")
    add("--max-new-tokens", type=int, metavar="N",
        help="generate at most N tokens (default: 200, or fewer where the model has no more "
             "positions)")
    add("--temperature", type=float, metavar="X",
        help="temperature of sampling (default 0.9); 0 means greedy decoding.  This option and the "
             "next five have another default if the checkpoint's generation_config.json names one")
    add("--top-k", type=int, metavar="K",
        help="sample from the K likeliest tokens (default 50; 0 is off)")
    add("--top-p", type=float, metavar="P",
        help="sample from the fewest tokens that together have the probability P (default 1, off)")
    add("--min-p", type=float, metavar="P",
        help="sample from tokens with at least P times the largest probability (default 0, off)")
    add("--repetition-penalty", type=float, metavar="X",
        help="above 1, make tokens that are already in the text less likely (default 1, off)")
    add("--no-repeat-ngram-size", type=int, metavar="N",
        help="never write the same N tokens in a row twice (default 0, off)")
    add("--greedy", action="store_true",
        help="greedy decoding: always take the likeliest token, which temperature, top-k, top-p "
             "and min-p do not change")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--num-samples", type=int, default=1, metavar="N",
        help="how many texts to generate (default 1); an empty line stands between them")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end the text before TEXT; may be given several times")
    add("--interactive", action="store_true",
        help="read prompts from standard input, one on each line")


def add_model_options(add):
    add("--model", type=a_name, default=DEMO, metavar="NAME",
        help="a folder or a hub id (default: the bundled demo checkpoint)")
    add("--tokenizer", type=a_name, metavar="NAME",
        help="folder or hub id of the tokenizer, for a checkpoint that has none (for TinyStories: "
             "EleutherAI/gpt-neo-125M)")
    add("--revision", type=a_name, metavar="NAME",
        help="the model's branch, tag or commit on the hub; Pythia's training steps are step0 ... "
             "step143000")
    add("--device", type=a_name, metavar="NAME",
        help="cpu, cuda, ... (default: cuda if there is a GPU)")
    add("--dtype", type=a_name, default="float32", metavar="NAME",
        help="float32 (default), bfloat16, float16, or auto for the checkpoint's own")
    add("--weights", choices=["int8", "int4"],
        help="round the weights to 8 or 4 bits while loading: they need a quarter or a sixth of "
             "float32's memory; decoding becomes faster with --compile and slower without it")
    add("--backend", type=a_name, default="auto", metavar="NAME",
        help="attention backend: auto (default), naive, sdpa, triton, flash")
    add("--compile", action="store_true",
        help="compile decoding: takes some seconds first, then decodes faster (1.6 to 2.9 times "
             "as fast on a CPU)")


def what_is_wrong(args, parser):
    """Why these options cannot go together, or None."""
    names = given(args, parser)
    instead = [f"--{name}" for name in ("score", "top") if name in names]
    if len(instead) == 2:
        return "--score and --top exclude each other"
    if instead and (unused := [name for name in GENERATION if name in names]):
        return f"{instead[0]} writes no text, so it takes no {spelled(unused)}"
    if args.score is not None and args.prompt is not None:
        return "--score reads its text from FILE, so it takes no prompt"
    if args.stride is not None and args.score is None:
        return "--stride belongs to --score"
    if args.prompt is None and not args.interactive and args.score is None:
        return "give a prompt, or --interactive, or --score FILE"
    for name in ("num_samples", "stride", "top"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
    if processes() > 1 and (args.interactive or args.score == "-"):
        return ("standard input cannot be shared by several processes: give the text as an "
                "argument or a file")
    if args.seed is not None and not -2**63 <= args.seed < 2**64:
        return "--seed must fit into 64 bits"
    for name in ("temperature", "repetition_penalty"):     # beyond these float32 has no scores
        value = getattr(args, name) or 1.0
        if 0 < value < 1e-30 or 1e30 < value < math.inf:
            return f"{spelled([name])} must be in 1e-30 … 1e30, not {value}"
    return "--stop needs a text that is not empty" if "" in args.stop else None


# ------------------------------------------------------------------------------------------------
# Generating
# ------------------------------------------------------------------------------------------------

def text_until(pieces, stops):
    """Pass pieces of text on, up to the first stop text; hold back what may be the start of one."""
    held = ""
    for piece in pieces:
        held += piece
        found = [i for i in (held.find(stop) for stop in stops) if i >= 0]
        if found:
            yield held[:min(found)]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])),
                   default=0)
        yield held[:len(held) - keep]
        held = held[len(held) - keep:]
    yield held


def settings_of(model, prompt_length, *, max_new_tokens, temperature, greedy, **given):
    """Settings from the command line's options, where None means that one was not given.

    Here a temperature of 0 means greedy decoding, and the default length fits the model.
    """
    if max_new_tokens is None:
        positions = model.config.position_limit
        room = 200 if positions is None else positions - prompt_length
        max_new_tokens = max(1, min(200, room))
    if temperature is None:
        temperature = settings_dict(model.generation_config).get("temperature")
        temperature = 0.9 if temperature is None else temperature
    given = {name: value for name, value in given.items() if value is not None}
    greedy = greedy or temperature == 0
    return Settings.of(model, dict(
        given, do_sample=not greedy, temperature=1.0 if greedy else temperature,
        max_new_tokens=max_new_tokens, max_length=None, num_return_sequences=1))


def continue_prompt(model, tokenizer, prompt, options, *, generator, stops, compile):
    """Print a prompt and its continuation.

    options: for `settings_of`; stops: texts before which to end.
    Returns (prompt tokens, seconds, new tokens after the first, seconds).
    """
    check_text(prompt, "the prompt")
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long, device=model.device)
    settings = settings_of(model, ids.size(1), **options)
    check_prompt(model, ids, None, settings)
    times = [time.perf_counter()]

    def tokens():
        for token in stream(model, ids, settings=settings, generator=generator, tokenizer=tokenizer,
                            real_vocab=len(tokenizer), compile=compile):
            times.append(time.perf_counter())
            yield token.item()

    with contextlib.closing(tokens()) as new:
        first = next(new)                                  # errors come before any text
        print(prompt, end="", flush=True)
        pieces = tokenizer.stream(itertools.chain([first], new), skip_special_tokens=True)
        for piece in text_until(pieces, stops):
            print(piece, end="", flush=True)
    print(flush=True)
    return ids.size(1), times[1] - times[0], len(times) - 2, times[-1] - times[1]


def print_texts(model, tokenizer, prompts, count, interactive, **how):
    """Print `count` continuations of each prompt; returns what continue_prompt returned for each.

    how: for `continue_prompt`.  Raises ValueError for a prompt that cannot be continued; where
    prompts are typed (interactive), it prints that error and takes the next prompt.
    """
    counts = []
    for prompt in prompts:
        try:
            for _ in range(count):
                if counts:
                    print(flush=True)
                counts.append(continue_prompt(model, tokenizer, prompt, **how))
        except ValueError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)
    return counts


def status(model, name, backend, counts):
    """One line: which model ran, on which device, how fast, and in how much memory.

    name, backend: as the user gave them; counts: what print_texts returned.
    """
    prompt, prompt_seconds, new, new_seconds = (sum(column) for column in zip(*counts))
    chosen = choose_backend(backend)
    if backend == "auto" and prefers_triton(model.device.type == "cuda", model.dtype,
                                            model.config.model_type == "gpt_neo"):
        chosen = "triton for prompts, then sdpa"
    backend = f"{chosen} ({backend})" if chosen != backend else chosen
    speed = f"{new / new_seconds:.0f} tokens/s" if new else "no more"
    return (f"{os.path.basename(os.path.normpath(name))}"
            f" · {model.num_parameters() / 1e6:.1f} M weights"
            f"{f' as {model.weights}' * bool(model.weights)}"
            f" · {model.device} {str(model.dtype).removeprefix('torch.')} · attention {backend}"
            f" · prompt {prompt} tokens, {prompt / prompt_seconds:.0f} tokens/s"
            f" · then {speed} · peak memory {peak_memory(model.device) / 2**20:.0f} MiB")


def peak_memory(device):
    """The most bytes that this process has ever held on the GPU, or for a CPU in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):                     # Linux: getrusage counts the parent
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def load(name, *, tokenizer, revision, dtype, device, backend, weights):
    """Model and tokenizer; for each of these options see --help.

    With several processes, each loads its own share of the model.
    Raises ValueError or OSError for what cannot be loaded, ImportError for a backend that cannot
    be used.
    """
    device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer or name,
                                              revision=None if tokenizer else revision)
    model = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, torch_dtype=dtype, device=device, attn_implementation=backend,
        weights=weights, tp_plan="auto" if processes() > 1 else None)
    return model, tokenizer


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

def print_score(model, tokenizer, text, stride):
    """What --score prints."""
    L, S = window_and_stride(model.config, stride)
    score = score_text(model, tokenizer, text, S)
    print(f"loss           {score.loss:.6f} nats a token\n"
          f"bits per byte  {score.bits_per_byte:.6f}\n"
          f"perplexity     {score.perplexity:.6f}\n"
          f"scored         {score.tokens} tokens, {score.bytes} bytes: all but the first token\n"
          f"window         {L} tokens, stride {S}")


def print_top(model, tokenizer, prompt, count):
    """What --top prints: probability, id and text of each token."""
    for p, id, text in likeliest(model, tokenizer, prompt, count):
        print(f"{p:.6f} {id:6d}  {text}")


def run(args):
    """The whole command.  The texts are checked before the weights are loaded."""
    loaded = functools.partial(everywhere, functools.partial(
        load, args.model, tokenizer=args.tokenizer, revision=args.revision, dtype=args.dtype,
        device=args.device, backend=args.backend, weights=args.weights))
    if args.score is not None:
        text = read_text(args.score)
        return print_score(*loaded(), text, args.stride)
    if args.top is not None:
        check_text(args.prompt, "the prompt")
        return print_top(*loaded(), args.prompt, args.top)
    if args.interactive and sys.stdin is None:
        raise ValueError("--interactive reads prompts from standard input, which is closed")
    for stop in args.stop:
        check_text(stop, "--stop")
    model, tokenizer = loaded()
    generator = torch.Generator(model.device)
    seed = generator.seed() if args.seed is None else args.seed
    generator.manual_seed(gathered(seed)[0])               # all processes draw the same
    counts = print_texts(
        model, tokenizer, prompts(args.prompt, args.interactive), args.num_samples,
        args.interactive, options={name: getattr(args, name) for name in SETTINGS},
        generator=generator, stops=args.stop, compile=args.compile)
    if counts:
        print(status(model, args.model, args.backend, counts), file=sys.stderr)


def prompts(first, interactive):
    """The first prompt, unless it is None; then, if interactive, the lines of standard input."""
    if first is not None:
        yield first
    if not interactive:
        return
    if hasattr(sys.stdin, "reconfigure"):                  # check_text reports what is not UTF-8
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        print("prompt> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except OSError as error:
            raise ValueError(f"standard input: {error.strerror}") from None
        if not line:
            print(file=sys.stderr)
            return
        if (line := line.rstrip("\r\n").removeprefix("\ufeff")).strip():
            yield line


@as_command
def main(argv=None):
    """Exit status: 0, 2 with one line on what is wrong, 130 when interrupted."""
    if rank() > 0:                                         # process 0 prints
        sys.stdout = sys.stderr = open(os.devnull, "w")
    args = arguments(argv)
    if sys.stdout is None:
        raise ValueError("standard output is closed: there is nowhere to write the text")
    if processes() > 1:
        join_processes()
    try:
        run(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if lost_process(error):
            raise ValueError("another of the processes that share the model has ended") from None
        if isinstance(error, SharedError) and rank() > 0:
            time.sleep(1)                                  # so that torchrun lets process 0 say it
        raise
    finally:
        if processes() > 1:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
