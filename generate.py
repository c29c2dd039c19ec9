"""Text from a model, on the command line.

    python generate.py "My favorite food is" --model EleutherAI/pythia-70m
    python generate.py "HAMLET." --top-p 0.9 --seed 1            (the bundled demo checkpoint)
    python generate.py --score FILE, or --top 5 "HAMLET."        (see score.py)

This file is the command line; the loop that generates is in sampling.py.
"""

import argparse
import contextlib
import os
import sys
import time

import torch

from attention import choose_backend
from load_weights import AutoModelForCausalLM, AutoTokenizer
from sampling import Settings, check_prompt, generate, stream  # noqa: F401  (generate: for those who import it from here)
from score import likeliest, read_text, score_text, window_and_stride


# ------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------

DEMO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoints", "demo-neo")


GENERATION = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "greedy", "seed",
              "num_samples", "stop", "compile", "interactive")             # options that only writing has


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Continue a prompt with GPT-Neo, GPT-NeoX, Pythia or TinyStories, or score a text. "
                    "The text goes to standard output, everything else to standard error.")
    add = parser.add_argument
    add("prompt", nargs="?", help="the text to continue")
    add("--model", default=DEMO, help="folder or hub id (default: the bundled demo checkpoint)")
    add("--revision", metavar="NAME",
        help="branch, tag or commit on the hub; Pythia's training steps are step0 ... step143000")
    add("--max-new-tokens", type=int, metavar="N", help="at most this many (default: 200, or what fits)")
    add("--temperature", type=float, default=0.9, metavar="X", help="default 0.9; 0 is greedy")
    add("--top-k", type=int, default=50, metavar="K", help="default 50; 0 is off")
    add("--top-p", type=float, default=1.0, metavar="P", help="default 1, which is off")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="default 1, which is off")
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--num-samples", type=int, default=1, metavar="N",
        help="texts to write, an empty line between them")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end before this text; may be repeated")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", default="float32", metavar="NAME",
        help="float32, bfloat16, float16, auto (the checkpoint's)")
    add("--backend", default="auto", metavar="NAME", help="attention: auto, naive, sdpa, triton, flash")
    add("--compile", action="store_true",
        help="compile decoding: some seconds at first, then about twice the speed or more on a CPU")
    add("--interactive", action="store_true", help="read prompts from standard input, one a line")
    add("--score", metavar="FILE", help="instead of writing: how likely is this text?  - is standard input")
    add("--stride", type=int, metavar="N", help="of --score's window (default: half of it)")
    add("--top", type=int, metavar="N", help="instead of writing: the N likeliest tokens after the prompt")
    args = parser.parse_args(argv)
    if problem := what_is_wrong(args, parser):
        parser.error(problem)
    return args


def what_is_wrong(args, parser):
    """Why these options cannot go together, or None."""
    instead = [f"--{name}" for name in ("score", "top") if getattr(args, name) is not None]
    writing = ["--" + name.replace("_", "-") for name in GENERATION
               if getattr(args, name) != parser.get_default(name)]
    if len(instead) == 2:
        return "--score and --top exclude each other"
    if instead and writing:
        return f"{instead[0]} writes no text, so it takes no {', '.join(writing)}"
    if args.score is not None and args.prompt is not None:
        return "--score reads its text from FILE, so it takes no prompt"
    if args.stride is not None and args.score is None:
        return "--stride belongs to --score"
    if args.prompt is None and not args.interactive and args.score is None:
        return "give a prompt, or --interactive, or --score FILE"
    for name in ("num_samples", "stride", "top"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
    return "--stop needs a text that is not empty" if "" in args.stop else None


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


def settings_of(args, model, prompt_length):
    """Settings from the command line, where 0 is a temperature and the length fits the model."""
    room = model.config.position_limit
    new = args.max_new_tokens
    if new is None:
        new = 200 if room is None else max(1, min(200, room - prompt_length))
    greedy = args.greedy or args.temperature == 0
    return Settings.of(model, dict(
        do_sample=not greedy, temperature=args.temperature or 1.0, top_k=args.top_k, top_p=args.top_p,
        repetition_penalty=args.repetition_penalty, max_new_tokens=new, num_return_sequences=1))


def write(model, tokenizer, prompt, args, generator):
    """Continue one prompt on standard output; returns (prompt tokens, seconds, new tokens, seconds)."""
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long, device=model.device)
    settings = settings_of(args, model, ids.size(1))
    check_prompt(model, ids, None, settings)
    settings.total_length(ids.size(1), model.config)       # what cannot be is said before text begins
    times = [time.perf_counter()]

    def tokens():
        for token in stream(model, ids, settings=settings, generator=generator,
                            real_vocab=len(tokenizer), compile=args.compile):
            times.append(time.perf_counter())
            yield token.item()

    print(prompt, end="", flush=True)
    with contextlib.closing(tokens()) as new:
        for piece in text_until(tokenizer.stream(new, skip_special_tokens=True), args.stop):
            print(piece, end="", flush=True)
    print(flush=True)
    return ids.size(1), times[1] - times[0], len(times) - 2, times[-1] - times[1]


def status(model, args, counts):
    """One line: what ran, on what, how fast, in how much memory."""
    prompt, prompt_seconds, new, new_seconds = (sum(column) for column in zip(*counts))
    chosen = choose_backend(args.backend)
    backend = f"{chosen} ({args.backend})" if chosen != args.backend else chosen
    speed = f"{new / new_seconds:.0f} tokens/s" if new else "no more"
    name = os.path.basename(os.path.normpath(args.model))
    return (f"{name} · {model.num_parameters() / 1e6:.1f} M weights"
            f" · {model.device} {str(model.dtype).removeprefix('torch.')} · attention {backend}"
            f" · prompt {prompt} tokens, {prompt / prompt_seconds:.0f} tokens/s"
            f" · then {speed} · peak memory {peak_memory(model.device) / 2**20:.0f} MiB")


def peak_memory(device):
    """The most bytes that this process ever held: on the GPU if the model is there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):                     # Linux; getrusage there counts the parent too
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def usable_device(name):
    """The device of that name, or ValueError where this machine or this torch has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None


def load(args):
    """Model and tokenizer, as the options say."""
    device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=args.revision)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, revision=args.revision, torch_dtype=args.dtype, device=device,
        attn_implementation=args.backend)
    return model, tokenizer


def print_score(args):
    """What --score prints."""
    text = read_text(args.score)                           # before the weights, which may be many
    model, tokenizer = load(args)
    L, S = window_and_stride(model.config, args.stride)
    score = score_text(model, tokenizer, text, S)
    print(f"loss           {score.loss:.6f} nats a token\n"
          f"bits per byte  {score.bits_per_byte:.6f}\n"
          f"perplexity     {score.perplexity:.6f}\n"
          f"scored         {score.tokens} tokens, {score.bytes} bytes: all but the first token\n"
          f"window         {L} tokens, stride {S}")


def print_top(args):
    """What --top prints: probability, id and text of each token."""
    for p, id, text in likeliest(*load(args), args.prompt, args.top):
        print(f"{p:.6f} {id:6d}  {text}")


def run(args):
    """The whole command: load, write each text, say how it went."""
    if args.score is not None:
        return print_score(args)
    if args.top is not None:
        return print_top(args)
    model, tokenizer = load(args)
    generator = torch.Generator(model.device)
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    counts = []
    for prompt in prompts(args):
        try:
            for _ in range(args.num_samples):
                if counts:
                    print(flush=True)
                counts.append(write(model, tokenizer, prompt, args, generator))
        except ValueError as error:
            if not args.interactive:
                raise
            print(f"error: {error}", file=sys.stderr)      # the next prompt may be a better one
    if counts:
        print(status(model, args, counts), file=sys.stderr)


def prompts(args):
    """The prompt, then, if interactive, each line of standard input."""
    if args.prompt is not None:
        yield args.prompt
    while args.interactive:
        print("prompt> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.rstrip("\n")


def main(argv=None):
    """Exit status: 0, 2 with one line on what is wrong, 130 when interrupted."""
    args = arguments(argv)
    try:
        run(args)
    except KeyboardInterrupt:                              # what was written stays
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:                                # the reader has gone, as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
