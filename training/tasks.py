"""What train.py can teach a model: the next token of text files, or the label of texts.

A task reads its files when it is made.  Then it has

    load(checkpoint)        the model and the tokenizer to begin with
    open(model, tokenizer)  encodes the texts; returns a line that says what there is
    batch(step)             what the model is called with: {"input_ids": (B, T), "labels": ...}
    count(labels)           the number of labels that the model's loss is the mean over
    metrics(model, dtype)   of the held-out files: {"valid_loss": ...}
    evaluate(model, dtype)  the same while training, with a sample of text where there can be one

    B  sequences in a batch · T  tokens in a sequence, at most the context
"""

import contextlib
import math
import re
import warnings

import torch

from load_weights import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    read_config,
)
from training.texts import Batches, count_bytes, epoch_generator, padded, read_examples, read_plain

# ------------------------------------------------------------------------------------------------
# Without gradients
# ------------------------------------------------------------------------------------------------

def autocast(device, dtype):
    """For "bfloat16", matrix products in bfloat16; the weights stay float32 either way."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


@contextlib.contextmanager
def evaluating(model, dtype):
    """The model in eval mode and without gradients; afterwards in the mode that it had before."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(model.device, dtype):
        yield
    model.train(was_training)


def to_device(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ------------------------------------------------------------------------------------------------
# What a checkpoint must be
# ------------------------------------------------------------------------------------------------

def check_head(checkpoint, *wanted):
    """The head that config.json names, "CausalLM" or another, "" where it names none.

    Raises ValueError for a checkpoint with another head than those that are wanted.
    """
    kind = str(read_config(checkpoint).get("architectures") or "")
    found = re.search(r"\w+For(\w+)", kind)
    if found and found[1] not in wanted:
        raise ValueError(f"{checkpoint} is a {found[0]}, and this task starts from a checkpoint "
                         f"For{' or For'.join(wanted)}")
    return found[1] if found else ""


def check_fit(checkpoint, model, tokenizer, context):
    """ValueError where a checkpoint cannot be trained with its own tokenizer and this context."""
    rows, positions = model.config.vocab_size, model.config.max_position_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"{checkpoint}: its tokenizer has {len(tokenizer)} tokens and its model "
                         f"only {rows} (vocab_size in config.json), so they do not belong together")
    if context > positions:
        raise ValueError(f"--context {context} is more than the {positions} positions of "
                         f"{checkpoint}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{checkpoint}: {name} has numbers that are not finite "
                             "(NaN or infinity)")


# ------------------------------------------------------------------------------------------------
# Task 1: the next token
# ------------------------------------------------------------------------------------------------

class NextToken:
    """--task lm.  A batch is windows of the text; all tokens but a window's first are predicted."""

    curve = "valid_bits_per_byte"                          # what loss.png draws for held-out texts

    def __init__(self, text, valid, *, context, batch_size, seed, prompt=""):
        self.context, self.batch_size, self.seed, self.prompt = context, batch_size, seed, prompt
        self.texts, self.valid = ([read_plain(file) for file in files] for files in (text, valid))
        self.contents = dict(text=self.texts, valid=self.valid)

    @staticmethod
    def load(checkpoint):
        """A checkpoint's language model, in float32, and its tokenizer."""
        check_head(checkpoint, "CausalLM")
        model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{checkpoint}: its tokenizer has no eos_token "
                             "(tokenizer_config.json), which stands between the texts")
        return model, tokenizer

    def open(self, model, tokenizer):
        """Encode the texts; returns a line about them.

        Raises ValueError for a text or a prompt whose length does not fit the context.
        """
        self.model, self.tokenizer, texts = model, tokenizer, self.texts
        ids = [id for text in texts for id in (tokenizer.eos_token_id, *tokenizer.encode(text))]
        if len(ids) <= self.context:
            raise ValueError(f"--text has {len(ids) - len(texts)} tokens in all, fewer than one "
                             f"--context of {self.context}")
        if len(tokenizer.encode(self.prompt)) >= self.context:
            raise ValueError("--prompt must be shorter than --context")
        self.batches = Batches(torch.tensor(ids), self.context, self.batch_size, self.seed)
        self.scale = len(ids) / count_bytes(texts) / math.log(2)           # loss to bits per byte
        return f"{len(ids):,} tokens to train on"

    def batch(self, step):
        ids = self.batches[step]                                                         # (B, T)
        return dict(input_ids=ids, labels=ids)              # the model shifts the labels itself

    @staticmethod
    def count(labels):
        """How many of labels (B, T) are predicted: the first of a row has nothing before it."""
        return (labels[:, 1:] != -100).sum().item()

    def evaluate(self, model, dtype):
        """A sample of text, and `metrics`.  Training's own random numbers are left untouched."""
        prompt = self.tokenizer.encode(self.prompt) or [self.tokenizer.eos_token_id]
        model.eval()
        ids = model.generate(
            torch.tensor([prompt], device=model.device), do_sample=True, temperature=0.8, top_k=40,
            max_new_tokens=min(100, self.context - len(prompt)),
            generator=torch.Generator(model.device).manual_seed(self.seed))
        model.train()
        return dict(sample=self.tokenizer.decode(ids[0].tolist())) | self.metrics(model, dtype)

    def metrics(self, model, dtype):
        """Loss, perplexity and bits per byte of the held-out texts, see `score_texts`."""
        if not self.valid:
            return {}
        metrics = score_texts(model, self.valid, self.tokenizer, self.context, dtype)
        return {f"valid_{name}": value for name, value in metrics.items()}


def score_texts(model, texts, tokenizer, context, dtype="float32", batch_size=8):
    """Held-out loss and perplexity of a token, and bits per byte: what a byte costs.

    Only bits per byte can be compared between tokenizers.  Every token of every text is predicted
    once.  A text follows <|endoftext|>, and its windows of T tokens share one token: the last that
    is predicted in one is the first that is seen in the next.  A token early in its window has
    little text before it, so a longer context would give slightly better numbers.
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


# ------------------------------------------------------------------------------------------------
# Task 2: the label of a text
# ------------------------------------------------------------------------------------------------

class Label:
    """--task classify.  A batch is texts, padded on the right; the last token shows the label."""

    curve, scale = "valid_loss", 1.0

    def __init__(self, train, valid, *, context, batch_size, seed):
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.train, self.valid = read_examples(train), read_examples(valid)
        self.contents = {name: [row[:2] for row in rows] for name, rows in
                         (("train", self.train), ("valid", self.valid))}
        labels = {label for _, label, _ in self.train}
        whole = all(re.fullmatch(r"-?[0-9]{1,9}", label) for label in labels)
        self.names = sorted(labels, key=lambda label: (int(label), label) if whole else label)
        if len(self.names) < 2:
            raise ValueError(f"{', '.join(train)}: every label is {self.names[0]!r}, and there "
                             "must be at least two")
        for _, label, place in self.valid:
            if label not in labels:
                raise ValueError(f"{place}: label {label!r}, which no training text has")
        if self.valid:
            try:
                import sklearn.metrics  # noqa: F401  so that a missing package is found now
            except ImportError:
                raise ValueError("--task classify with --valid needs scikit-learn: "
                                 "pip install scikit-learn") from None

    def load(self, checkpoint):
        """A checkpoint's model, in float32, with a head for these labels, and its tokenizer."""
        head = check_head(checkpoint, "CausalLM", "SequenceClassification")
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError(f"{checkpoint}: its tokenizer has neither pad_token nor eos_token "
                             "(tokenizer_config.json), and the shorter texts must be padded")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token       # as is usual with GPT-2 and GPT-Neo
        labels = dict(id2label=dict(enumerate(self.names)))
        if head == "SequenceClassification":               # it has labels, which must be the same
            labels = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*drawn at random")        # a new head is wanted
            model = AutoModelForSequenceClassification.from_pretrained(
                checkpoint, torch_dtype=torch.float32, pad_token_id=tokenizer.pad_token_id,
                problem_type="single_label_classification", **labels)
        earlier = list(map(str, model.config.id2label.values()))
        if earlier != self.names:
            raise ValueError(f"{checkpoint} is a classifier already, of {', '.join(earlier)}, and "
                             f"the labels here are {', '.join(self.names)}: start from a language "
                             "model, or keep the labels")
        return model, tokenizer

    def open(self, model, tokenizer):
        """Encode the texts; returns a line about them."""
        self.model, self.tokenizer, self.pad = model, tokenizer, tokenizer.pad_token_id
        self.longer = 0
        self.train_rows, self.valid_rows = self.encode(self.train), self.encode(self.valid)
        count = len(self.train) + len(self.valid)
        return (f"{len(self.train):,} texts with {len(self.names)} labels to train on, padded with "
                f"{tokenizer.pad_token}; {self.longer:,} texts of {count:,} are longer than "
                f"{self.context} tokens and are cut there")

    def encode(self, examples):
        """[(ids, class id)]: at most `context` tokens, the last of which is not the padding token.

        The model takes the rightmost token that is not padding as the last of a text.  Where
        <|endoftext|> serves as padding, a text that ends with it would be read one token too early.
        """
        rows = []
        for text, label, place in examples:
            ids = self.tokenizer.encode(text)
            self.longer += len(ids) > self.context
            ids = ids[: self.context]
            while ids and ids[-1] == self.pad:
                ids.pop()
            if not ids:
                raise ValueError(f"{place}: there is nothing but {self.tokenizer.pad_token} in the "
                                 "text")
            rows.append((ids, self.names.index(label)))
        return rows

    def batch(self, step):
        """The texts of one batch.  Each epoch takes every text once, in another order.

        A batch may hold the end of one epoch and the beginning of the next.
        """
        orders, rows = {}, []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, k = divmod(i, len(self.train_rows))
            if epoch not in orders:
                orders[epoch] = torch.randperm(len(self.train_rows),
                                               generator=epoch_generator(self.seed, epoch))
            rows.append(self.train_rows[orders[epoch][k]])
        return self.collate(rows)

    def collate(self, rows):
        return dict(input_ids=padded([ids for ids, _ in rows], self.pad),                # (B, T)
                    attention_mask=padded([[1] * len(ids) for ids, _ in rows], 0),       # (B, T)
                    labels=torch.tensor([label for _, label in rows]))                   # (B,)

    @staticmethod
    def count(labels):
        return (labels != -100).sum().item()

    def evaluate(self, model, dtype):
        return self.metrics(model, dtype)

    def metrics(self, model, dtype, batch_size=32):
        """Held-out loss, accuracy and macro F1, which weights all labels equally."""
        if not self.valid:
            return {}
        from sklearn.metrics import accuracy_score, f1_score

        nats, answers = 0.0, []
        with evaluating(model, dtype):
            for i in range(0, len(self.valid_rows), batch_size):
                batch = to_device(self.collate(self.valid_rows[i : i + batch_size]), model.device)
                out = model(**batch)
                nats += out.loss.item() * len(batch["labels"])
                answers += out.logits.argmax(-1).tolist()
        labels = [label for _, label in self.valid_rows]
        f1 = f1_score(labels, answers, average="macro", zero_division=0)
        return dict(valid_loss=nats / len(labels),
                    valid_accuracy=float(accuracy_score(labels, answers)), valid_macro_f1=float(f1))
