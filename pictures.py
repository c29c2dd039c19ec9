"""What every picture needs: matplotlib, which is optional, and colours.

Colour-blind readers can tell these colours apart too (Okabe and Ito, "Color Universal Design").
"""

BLUE, ORANGE, GREEN, RED, PINK, SKY = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def pyplot():
    """matplotlib.pyplot, set to draw into files.  Raises ImportError if matplotlib is missing."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot
