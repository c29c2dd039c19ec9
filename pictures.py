"""What every picture needs: matplotlib, which is optional, and colours.

Colour-blind readers can tell these colours apart too (Okabe and Ito, "Color Universal Design").
"""

from importlib.util import find_spec
from pathlib import Path

from files import plain

FORMATS = ("png", "svg", "pdf", "jpg", "jpeg", "webp", "tif", "tiff", "eps", "ps", "svgz")
BLUE, ORANGE, GREEN, RED, PINK, SKY = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def pyplot():
    """matplotlib.pyplot, set to draw into files.  Raises ImportError if matplotlib is missing."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def picture_format(path):
    """The format that the name of a picture's file asks for.

    Raises ValueError for one that matplotlib cannot write everywhere, and if it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("a picture needs matplotlib: pip install matplotlib")
    kind = Path(path).suffix.removeprefix(".").lower() or "png"
    if kind not in FORMATS:
        raise ValueError(f"{plain(path)}: pictures are written as {', '.join(FORMATS)}")
    return kind


def plain_label(text):
    """A name for a picture: matplotlib takes what stands between two $ for a formula."""
    return plain(text).replace("$", r"\$")
