"""Files of texts to train on, and batches of them.

    read_plain      one plain text file
    read_examples   labelled texts: CSV files with the columns text and label, or JSON lines
    Batches         batches of windows of one long text, in an order that depends on the seed

    B  sequences in a batch · T  tokens in a sequence
"""

import csv
import io
import json
import re
from pathlib import Path

import torch

from files import read_text


def read_plain(file):
    """The text of a UTF-8 file, without a byte-order mark and with "\\n" for "\\r\\n".

    Raises ValueError that names the file if it cannot be read, is not UTF-8 text, or is empty.
    """
    text = read_text(Path(file)).replace("\r\n", "\n")
    if not text.strip():
        raise ValueError(f"{file}: there is no text in it")
    if "\0" in text:                                        # as UTF-16 has in every other byte
        raise ValueError(f"{file}: not a text in UTF-8, it has zero bytes: save it as UTF-8")
    return text


def count_bytes(texts):
    return sum(len(text.encode("utf-8")) for text in texts)


# ------------------------------------------------------------------------------------------------
# Labelled texts
# ------------------------------------------------------------------------------------------------

def read_examples(files):
    """[(text, label, place)] of .csv and .jsonl files.

    A label is a string without spaces around it; place is the file and the line.  Raises ValueError
    with the place of the first thing that is wrong.
    """
    examples = []
    for file in files:
        rows = {".csv": csv_rows, ".jsonl": json_rows}.get(Path(file).suffix.lower())
        if rows is None:
            raise ValueError(f"{file}: labelled texts are in files that end in .csv or .jsonl")
        before = len(examples)
        examples += [checked(*row) for row in rows(file, read_plain(file))]
        if len(examples) == before:
            raise ValueError(f"{file}: there are no rows in it")
    return examples


def checked(place, text, label):
    """One labelled text as (text, label, place); ValueError for what is not one."""
    if not isinstance(text, str) or not is_unicode(text):
        raise ValueError(f"{place}: text must be a string of whole characters, not {text!r:.40}")
    if not text.strip():
        raise ValueError(f"{place}: the text is empty")
    if type(label) not in (str, int) or not str(label).strip() or not is_unicode(str(label)):
        raise ValueError(f"{place}: label must be a word or a whole number, not {label!r:.40}")
    return text, str(label).strip(), place


def is_unicode(text):
    """False if half of a surrogate pair stands alone, as "\\ud800" may in JSON: no UTF-8 has it."""
    return not re.search("[\ud800-\udfff]", text)


def csv_rows(file, content):
    """(place, text, label) of each row after the header; a quoted text may have several lines."""
    csv.field_size_limit(2**31 - 1)
    reader, line = csv.reader(io.StringIO(content, newline=""), strict=True), 1
    try:
        header = [name.strip() for name in next(reader)]
        for name in ("text", "label"):
            if header.count(name) != 1:
                raise ValueError(f"{file}: line 1: the header must name the columns text and "
                                 f"label, each once; it is {','.join(header)!r:.80}")
        text, label, line = header.index("text"), header.index("label"), reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):             # an empty line is not a row
                raise ValueError(f"{file}: line {line}: {len(row)} fields, and the header has "
                                 f"{len(header)} (a text with commas is put in quotes)")
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


# ------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------

def padded(rows, value):
    """Lists of different lengths as one tensor (B, T); `value` fills shorter ones on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def epoch_generator(seed, epoch):
    """Random numbers that depend on the seed and the epoch alone."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


class Batches:
    """batches[step] is batch number `step`, (B, T), of one long text.

    Every epoch cuts the text into windows of T tokens, at another offset than the epoch before, and
    takes each of them once, in another order.  A batch depends on the seed and the step alone, so a
    run that goes on need not restore a place in the data.
    """

    def __init__(self, ids, context, batch_size, seed):
        self.ids, self.context, self.batch_size, self.seed = ids, context, batch_size, seed
        self.windows = (len(ids) - 1) // context              # the - 1 leaves room for an offset
        self.epoch = None

    def window(self, i):
        epoch, k = divmod(i, self.windows)
        if epoch != self.epoch:
            generator = epoch_generator(self.seed, epoch)
            spare = len(self.ids) - self.windows * self.context
            offset = torch.randint(spare + 1, (), generator=generator)
            order = torch.randperm(self.windows, generator=generator)
            self.epoch, self.starts = epoch, (order * self.context + offset).tolist()
        return self.ids[self.starts[k] : self.starts[k] + self.context]                  # (T,)

    def __getitem__(self, step):
        first = step * self.batch_size
        rows = range(first, first + self.batch_size)
        return torch.stack([self.window(i) for i in rows])                               # (B, T)
