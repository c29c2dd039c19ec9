"""Text from a model, on the command line.

    python generate.py "My favorite food is" --model EleutherAI/pythia-70m
    python generate.py "HAMLET." --top-p 0.9 --seed 1            (the bundled demo checkpoint)
    python generate.py --score FILE, or --top 5 "HAMLET."        (see score.py)

This file is the command line; the loop that generates is in sampling.py.
"""

import argparse
import codecs
import contextlib
import itertools
import os
import sys
import time

import torch

from attention import choose_backend
from load_weights import AutoModelForCausalLM, AutoTokenizer
from sampling import Settings, as_dict, check_prompt, generate, stream  # noqa: F401  (generate)
from score import likeliest, read_text, score_text, window_and_stride

# ------------------------------------------------------------------------------------------------
# The options
# ------------------------------------------------------------------------------------------------

DEMO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoints", "demo-neo")

# Options that are settings of generate.  Where one is not given, the checkpoint's
# generation_config.json decides, and where that is silent, the default in the help.
SETTINGS = ("top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")
GENERATION = ("max_new_tokens", "temperature", *SETTINGS, "greedy", "seed", "num_samples", "stop",
              "compile", "interactive")                    # options that only generation has


def arguments(argv=None):
    """The options, parsed and checked; what is wrong with them ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description="Continue a prompt with GPT-Neo, GPT-NeoX, Pythia or TinyStories, or evaluate "
                    "a text. The text goes to standard output, everything else to standard error.")
    add_generation_options(parser.add_argument)
    add_model_options(parser.add_argument)
    add = parser.add_argument
    add("--score", metavar="FILE",
        help="instead of generating: evaluate this text, its loss, bits per byte and perplexity; "
             "- is standard input")
    add("--stride", type=int, metavar="N",
        help="stride of --score's sliding window (default: half the window)")
    add("--top", type=int, metavar="N", help="instead of generating: the N likeliest next tokens")
    args = parser.parse_args(argv)
    if problem := what_is_wrong(args, parser):
        parser.error(problem)
    return args


def add_generation_options(add):
    add("prompt", nargs="?", help="the text to continue")
    add("--max-new-tokens", type=int, metavar="N",
        help="at most this many (default: 200, or what fits)")
    add("--temperature", type=float, metavar="X",
        help="default 0.9; 0 is greedy.  For this and the next five options the checkpoint's "
             "generation_config.json goes before the default")
    add("--top-k", type=int, metavar="K",
        help="sample from the K likeliest tokens (default 50; 0 is off)")
    add("--top-p", type=float, metavar="P",
        help="sample from the fewest tokens that hold probability P (default 1, which is off)")
    add("--min-p", type=float, metavar="P",
        help="sample from tokens with at least P times the largest probability (default 0, off)")
    add("--repetition-penalty", type=float, metavar="X", help="default 1, which is off")
    add("--no-repeat-ngram-size", type=int, metavar="N",
        help="write no N tokens twice (default 0, which is off)")
    add("--greedy", action="store_true", help="greedy decoding: always the likeliest token")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--num-samples", type=int, default=1, metavar="N",
        help="texts to generate, an empty line between them")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end before this text; may be repeated")
    add("--interactive", action="store_true", help="read prompts from standard input, one a line")


def add_model_options(add):
    add("--model", default=DEMO, help="folder or hub id (default: the bundled demo checkpoint)")
    add("--tokenizer", metavar="NAME",
        help="folder or hub id of the tokenizer, for a checkpoint without its own (TinyStories: "
             "EleutherAI/gpt-neo-125M)")
    add("--revision", metavar="NAME",
        help="the model's branch, tag or commit on the hub; Pythia's training steps are step0 ... "
             "step143000")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", default="float32", metavar="NAME",
        help="float32, bfloat16, float16, auto (the checkpoint's)")
    add("--backend", default="auto", metavar="NAME",
        help="attention: auto, naive, sdpa, triton, flash")
    add("--compile", action="store_true",
        help="compile decoding: some seconds at first, then about twice the speed or more on a CPU")


def what_is_wrong(args, parser):
    """Why these options cannot go together, or None."""
    instead = [f"--{name}" for name in ("score", "top") if getattr(args, name) is not None]
    generation = ["--" + name.replace("_", "-") for name in GENERATION
               if getattr(args, name) != parser.get_default(name)]
    if len(instead) == 2:
        return "--score and --top exclude each other"
    if instead and generation:
        return f"{instead[0]} writes no text, so it takes no {', '.join(generation)}"
    if args.score is not None and args.prompt is not None:
        return "--score reads its text from FILE, so it takes no prompt"
    if args.stride is not None and args.score is None:
        return "--stride belongs to --score"
    if args.prompt is None and not args.interactive and args.score is None:
        return "give a prompt, or --interactive, or --score FILE"
    for name in ("num_samples", "stride", "top"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}"
    if args.seed is not None and not -2**63 <= args.seed < 2**64:
        return "--seed must fit into 64 bits"
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


def settings_of(args, model, prompt_length):
    """Settings from the command line, where 0 is a temperature and the length fits the model."""
    room = model.config.position_limit
    new = args.max_new_tokens
    if new is None:
        new = 200 if room is None else max(1, min(200, room - prompt_length))
    temperature = args.temperature
    if temperature is None:
        temperature = as_dict(model.generation_config).get("temperature", 0.9)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    greedy = args.greedy or temperature == 0
    return Settings.of(model, dict(
        given, do_sample=not greedy, temperature=1.0 if greedy else temperature,
        max_new_tokens=new, max_length=None, num_return_sequences=1))


def continue_prompt(model, tokenizer, prompt, args, generator):
    """Continue one prompt; returns (prompt tokens, seconds, new tokens, seconds)."""
    check_text(prompt, "the prompt")
    ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long, device=model.device)
    settings = settings_of(args, model, ids.size(1))
    check_prompt(model, ids, None, settings)
    times = [time.perf_counter()]

    def tokens():
        for token in stream(model, ids, settings=settings, generator=generator, tokenizer=tokenizer,
                            real_vocab=len(tokenizer), compile=args.compile):
            times.append(time.perf_counter())
            yield token.item()

    with contextlib.closing(tokens()) as new:
        first = next(new)                                  # errors come before any text
        print(prompt, end="", flush=True)
        pieces = tokenizer.stream(itertools.chain([first], new), skip_special_tokens=True)
        for piece in text_until(pieces, args.stop):
            print(piece, end="", flush=True)
    print(flush=True)
    return ids.size(1), times[1] - times[0], len(times) - 2, times[-1] - times[1]


def check_text(text, what):
    """Raise ValueError for text from bytes that are not UTF-8; Python keeps them as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 at character {error.start + 1}") from None


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
    with contextlib.suppress(OSError):                     # Linux; getrusage counts the parent
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


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
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model,
                                              revision=None if args.tokenizer else args.revision)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, revision=args.revision, torch_dtype=args.dtype, device=device,
        attn_implementation=args.backend)
    return model, tokenizer


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

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
    check_text(args.prompt, "the prompt")
    for p, id, text in likeliest(*load(args), args.prompt, args.top):
        print(f"{p:.6f} {id:6d}  {text}")


def run(args):
    """The whole command: load, write each text, say how it went."""
    if args.score is not None:
        return print_score(args)
    if args.top is not None:
        return print_top(args)
    if args.interactive and sys.stdin is None:
        raise ValueError("--interactive reads prompts from standard input, which is closed")
    for stop in args.stop:
        check_text(stop, "--stop")
    model, tokenizer = load(args)
    generator = torch.Generator(model.device)
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    counts = []
    for prompt in prompts(args):
        try:
            for _ in range(args.num_samples):
                if counts:
                    print(flush=True)
                counts.append(continue_prompt(model, tokenizer, prompt, args, generator))
        except ValueError as error:
            if not args.interactive:
                raise
            print(f"error: {error}", file=sys.stderr)      # the next prompt may be a better one
    if counts:
        print(status(model, args, counts), file=sys.stderr)


def prompts(args):
    """The prompt, then, if interactive, each line of standard input that holds anything."""
    if args.prompt is not None:
        yield args.prompt
    if not args.interactive:
        return
    if hasattr(sys.stdin, "reconfigure"):                  # what is not UTF-8: check_text says so
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


def replace_what_cannot_be_written(output):
    """Let `output` write ? for characters that its encoding does not have; returns their list."""
    replaced = []

    def replace(error):
        replaced.extend(error.object[error.start:error.end])
        return "?" * (error.end - error.start), error.end

    codecs.register_error("replace and note", replace)
    if hasattr(output, "reconfigure"):                     # a notebook's output takes everything
        output.reconfigure(errors="replace and note")
    return replaced


def main(argv=None):
    """Exit status: 0, 2 with one line on what is wrong, 130 when interrupted."""
    args = arguments(argv)
    replaced = replace_what_cannot_be_written(sys.stdout)
    try:
        if sys.stdout is None:
            raise ValueError("standard output is closed: there is nowhere to write the text")
        run(args)
    except KeyboardInterrupt:                              # what was written stays
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:                                # the reader has gone, as with | head
        discard_output()
        return 0
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        try:
            sys.stdout and sys.stdout.flush()
        except OSError:                                    # a full disk: do not try once more
            discard_output()
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if replaced:
            print(f"standard output is {sys.stdout.encoding}, which has no "
                  f"{' '.join(sorted(set(replaced)))}: written as ?.  PYTHONIOENCODING=utf-8 "
                  "has the text written whole", file=sys.stderr)
    return 0


def discard_output():
    """What is still to be written to standard output goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
