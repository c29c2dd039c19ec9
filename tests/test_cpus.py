"""What is proven here holds on other processors: the numeric tests run again as if on them."""

import os
import subprocess
import sys

import pytest

import cpus
from conftest import ROOT


@pytest.mark.slow
def test_as_if_on_other_processors():
    """tests/cpus.py says what each run imitates.  The workers of this run must not be taken for the inner one's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, "tests/cpus.py", "--combined"], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "torch's kernels: DEFAULT, numpy's BLAS: Haswell" in done.stdout


def test_the_combined_runs_hold_every_setting():
    assert set(" ".join(cpus.COMBINED).split()) == set(cpus.SETTINGS)
