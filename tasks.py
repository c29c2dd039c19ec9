"""What train.py can teach a model: the next token of text files, or the label of texts.

A task reads its files, opens the model and the tokenizer, and has

    batch(step)             what the model is called with: {"input_ids": (B, T), "labels": ...}
    count(labels)           over how many of the labels the model's loss is the mean
    scores(model, dtype)    of the held-out files: {"valid_loss": ...}
    evaluate(model)         the same while training, with a sample if there is one to see

    B  sequences in a batch · T  tokens in a sequence (at most --context)
"""

import contextlib
import csv
import io
import json
import math
import re
import warnings
from pathlib import Path

import torch

from load_weights import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, read_config


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def read_text(file):
    """The text of a UTF-8 file.  A byte that is not UTF-8, or no text at all, raises ValueError."""
    try:
        text = Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{file}: not UTF-8, the byte at offset {error.start} is "
                         f"{error.object[error.start]:#04x} (line {line})") from None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{file}: there is no text in it")
    return text


def read_examples(files):
    """[(text, label, place)] of .csv and .jsonl files, labels as strings; place is the file and the line.

    Raises ValueError with the place of the first thing that is wrong.
    """
    examples = []
    for file in files:
        rows = {".csv": csv_rows, ".jsonl": json_rows}.get(Path(file).suffix)
        if rows is None:
            raise ValueError(f"{file}: labelled texts are in files that end in .csv or .jsonl")
        before, content = len(examples), read_text(file).removeprefix("\ufeff")         # which Excel writes
        for place, text, label in rows(file, content):
            if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
                raise ValueError(f"{place}: text must be a string of whole characters, not {text!r:.40}")
            if not text.strip():
                raise ValueError(f"{place}: the text is empty")
            if type(label) not in (str, int) or not str(label).strip():
                raise ValueError(f"{place}: label must be a word or a whole number, not {label!r:.40}")
            examples.append((text, str(label), place))
        if len(examples) == before:
            raise ValueError(f"{file}: there are no rows in it")
    return examples


def csv_rows(file, content):
    """(place, text, label) of each row after the header; a quoted text may go over several lines."""
    csv.field_size_limit(2**31 - 1)
    reader, line = csv.reader(io.StringIO(content, newline=""), strict=True), 1
    try:
        header = next(reader)
        for name in ("text", "label"):
            if header.count(name) != 1:
                raise ValueError(f"{file}: line 1: the header must name the columns text and label, each "
                                 f"once; it is {','.join(header)!r:.80}")
        text, label, line = header.index("text"), header.index("label"), reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):             # an empty line is no row
                raise ValueError(f"{file}: line {line}: {len(row)} fields, and the header has {len(header)} "
                                 "(a text with commas is put in quotes)")
            if row:
                yield f"{file}: line {line}", row[text], row[label]
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}: line {line}: {error}") from None


def json_rows(file, content):
    """(place, text, label) of each line that is not empty."""
    for line, row in enumerate(content.split("\n"), 1):     # splitlines would cut at U+2028 too
        place = f"{file}: line {line}"
        if not row.strip():
            continue
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: broken JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(row, dict) or not {"text", "label"} <= row.keys():
            raise ValueError(f'{place}: a line must be an object with "text" and "label"')
        yield place, row["text"], row["label"]


def padded(rows, value):
    """Lists of different lengths as one tensor (B, T), with `value` to the right of the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


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
# Without gradients
# ------------------------------------------------------------------------------------------------

def autocast(device, dtype):
    """For "bfloat16", matrix products in bfloat16; the weights stay float32 either way."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


@contextlib.contextmanager
def evaluating(model, dtype):
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(model.device, dtype):
        yield
    model.train(was_training)


def to_device(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ------------------------------------------------------------------------------------------------
# Task 1: the next token
# ------------------------------------------------------------------------------------------------

class NextToken:
    """--task lm.  A batch is windows of the text; every token but a window's first is scored."""

    curve = "valid_bits_per_byte"                           # what loss.png draws of the held-out texts

    def __init__(self, args):
        self.args = args
        self.texts, self.valid = ([read_text(file) for file in files] for files in (args.text, args.valid))
        self.contents = dict(text=self.texts, valid=self.valid)

    def open(self, model, folder):
        """The model with its tokenizer: --init's, or a new one and what `folder`, if it is there, has for it.

        Returns what to tell.  Raises ValueError for what does not fit together.
        """
        args, texts = self.args, self.texts
        if args.init:
            model = AutoModelForCausalLM.from_pretrained(args.init, torch_dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(args.init)
        else:
            from checkpoints.new_tokenizer import CLASSES, new_tokenizer
            tokenizer = (CLASSES[args.family].from_pretrained(folder) if folder else
                         new_tokenizer(texts, args.family, args.vocab_size, args.context))
        self.model, self.tokenizer = model, tokenizer
        ids = [id for text in texts for id in (tokenizer.eos_token_id, *tokenizer.encode(text))]
        if len(ids) <= args.context:
            raise ValueError(f"--text has {len(ids) - len(texts)} tokens in all, fewer than one "
                             f"--context of {args.context}")
        if len(tokenizer.encode(args.prompt)) >= args.context:
            raise ValueError("--prompt must be shorter than --context")
        self.batches = Batches(torch.tensor(ids), args.context, args.batch_size, args.seed)
        self.scale = len(ids) / count_bytes(texts) / math.log(2)           # loss to bits per byte
        return f"{len(ids):,} tokens to train on"

    def batch(self, step):
        ids = self.batches[step]                                                         # (B, T)
        return dict(input_ids=ids, labels=ids)              # the model shifts the labels itself

    @staticmethod
    def count(labels):
        """How many of labels (B, T) are scored: the first of a row has nothing before it."""
        return (labels[:, 1:] != -100).sum().item()

    def evaluate(self, model):
        """A sample, and the held-out scores.  It draws no number from the generator that training uses."""
        args = self.args
        prompt = self.tokenizer.encode(args.prompt) or [self.tokenizer.eos_token_id]
        model.eval()
        ids = model.generate(
            torch.tensor([prompt], device=args.device), do_sample=True, temperature=0.8, top_k=40,
            max_new_tokens=min(100, args.context - len(prompt)),
            generator=torch.Generator(args.device).manual_seed(args.seed))
        model.train()
        return dict(sample=self.tokenizer.decode(ids[0].tolist())) | self.scores(model, args.dtype)

    def scores(self, model, dtype):
        if not self.valid:
            return {}
        scores = score_texts(model, self.valid, self.tokenizer, self.args.context, dtype)
        return {f"valid_{name}": value for name, value in scores.items()}


def score_texts(model, texts, tokenizer, context, dtype="float32", batch_size=8):
    """Held-out scores: loss and perplexity of a token, and what a byte costs in bits.

    Only the last is comparable between tokenizers.  Every token of every text is predicted once.  A text
    follows <|endoftext|>; its windows of T tokens share one token, the last to be predicted in one being
    the first to be seen in the next.  A token early in its window has little to go on, so longer contexts
    would do a little better.
    """
    windows, nats, tokens = [], 0.0, 0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
        windows += [ids[i : i + context] for i in range(0, len(ids) - 1, context - 1)]
    with evaluating(model, dtype):
        for i in range(0, len(windows), batch_size):
            rows = windows[i : i + batch_size]              # a text's last window may be shorter
            labels = padded(rows, -100)                                                  # (B, T)
            loss = model(padded(rows, 0).to(model.device), labels=labels.to(model.device)).loss
            nats += loss.item() * NextToken.count(labels)
            tokens += NextToken.count(labels)
    loss = nats / tokens
    return dict(loss=loss, perplexity=math.exp(min(loss, 700.0)), bytes=count_bytes(texts),
                bits_per_byte=nats / math.log(2) / count_bytes(texts))


def count_bytes(texts):
    return sum(len(text.encode("utf-8")) for text in texts)


# ------------------------------------------------------------------------------------------------
# Task 2: the label of a text
# ------------------------------------------------------------------------------------------------

class Label:
    """--task classify.  A batch is texts, padded on the right; a text's last token shows its label."""

    curve, scale = "valid_loss", 1.0

    def __init__(self, args):
        self.args = args
        self.train, self.valid = read_examples(args.train), read_examples(args.valid)
        self.contents = {name: [row[:2] for row in rows] for name, rows in
                         (("train", self.train), ("valid", self.valid))}
        labels = {label for _, label, _ in self.train}
        whole = all(re.fullmatch(r"-?[0-9]{1,9}", label) for label in labels)
        self.names = sorted(labels, key=lambda label: (int(label), label) if whole else label)
        if len(self.names) < 2:
            raise ValueError(f"{', '.join(args.train)}: every label is {self.names[0]!r}, and there must be "
                             "two at least")
        for _, label, place in self.valid:
            if label not in labels:
                raise ValueError(f"{place}: label {label!r}, which no training text has")
        if self.valid:
            try:
                import sklearn.metrics                      # noqa: F401  here, and not after the training
            except ImportError:
                raise ValueError("--task classify with --valid needs scikit-learn: "
                                 "pip install scikit-learn") from None

    def open(self, model=None, folder=None):
        """--init's model and tokenizer, and the texts' ids; returns what to tell about them."""
        args, config = self.args, read_config(self.args.init)
        earlier = [str(name) for name in (config.get("id2label") or {}).values()]
        if "ForSequenceClassification" in str(config.get("architectures")) and earlier != self.names:
            raise ValueError(f"{args.init} is a classifier already, of {', '.join(earlier)}, and the labels here "
                             f"are {', '.join(self.names)}: start from a language model, or keep the labels")
        self.tokenizer = tokenizer = AutoTokenizer.from_pretrained(args.init)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token       # as everyone does for GPT-2 and GPT-Neo
        self.pad = tokenizer.pad_token_id
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*drawn afresh")            # which is what we want
            self.model = AutoModelForSequenceClassification.from_pretrained(
                args.init, torch_dtype=torch.float32, pad_token_id=self.pad,
                id2label=dict(enumerate(self.names)), problem_type="single_label_classification")
        self.longer = 0
        self.train_rows, self.valid_rows = self.encode(self.train), self.encode(self.valid)
        return (f"{len(self.train):,} texts with {len(self.names)} labels to train on, padded with "
                f"{tokenizer.pad_token}; {self.longer:,} texts of {len(self.train) + len(self.valid):,} are "
                f"longer than {args.context} tokens and are cut there")

    def encode(self, examples):
        """[(ids, class id)]: at most --context tokens, the last of which is none of padding's.

        The model takes the rightmost token that is not padding for the last of a text.  Where padding is
        <|endoftext|>, a text that ends so would otherwise be read too early.
        """
        rows = []
        for text, label, place in examples:
            ids = self.tokenizer.encode(text)
            self.longer += len(ids) > self.args.context
            ids = ids[: self.args.context]
            while ids and ids[-1] == self.pad:
                ids.pop()
            if not ids:
                raise ValueError(f"{place}: there is nothing but {self.tokenizer.pad_token} in the text")
            rows.append((ids, self.names.index(label)))
        return rows

    def batch(self, step):
        """Every epoch takes each text once, in an order of its own; a batch may span two epochs."""
        size, orders, rows = self.args.batch_size, {}, []
        for i in range(step * size, (step + 1) * size):
            epoch, k = divmod(i, len(self.train_rows))
            if epoch not in orders:
                generator = torch.Generator().manual_seed(1_000_003 * self.args.seed + epoch)
                orders[epoch] = torch.randperm(len(self.train_rows), generator=generator)
            rows.append(self.train_rows[orders[epoch][k]])
        return self.collate(rows)

    def collate(self, rows):
        return dict(input_ids=padded([ids for ids, _ in rows], self.pad),                # (B, T)
                    attention_mask=padded([[1] * len(ids) for ids, _ in rows], 0),       # (B, T)
                    labels=torch.tensor([label for _, label in rows]))                   # (B,)

    @staticmethod
    def count(labels):
        return (labels != -100).sum().item()

    def evaluate(self, model):
        return self.scores(model, self.args.dtype)

    def scores(self, model, dtype, batch_size=32):
        """Held-out loss, accuracy and macro F1, which counts a rare label as much as a frequent one."""
        if not self.valid:
            return {}
        from sklearn.metrics import accuracy_score, f1_score

        nats, found = 0.0, []
        with evaluating(model, dtype):
            for i in range(0, len(self.valid_rows), batch_size):
                batch = to_device(self.collate(self.valid_rows[i : i + batch_size]), model.device)
                out = model(**batch)
                nats += out.loss.item() * len(batch["labels"])
                found += out.logits.argmax(-1).tolist()
        labels = [label for _, label in self.valid_rows]
        return dict(valid_loss=nats / len(labels), valid_accuracy=float(accuracy_score(labels, found)),
                    valid_macro_f1=float(f1_score(labels, found, average="macro", zero_division=0)))
