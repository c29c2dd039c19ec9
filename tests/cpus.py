"""Run the tests that a processor can change as if on other processors.

    python tests/cpus.py                    one run for each setting          (make test-cpus)
    python tests/cpus.py --combined         three runs that hold every value  (a slow test)
    python tests/cpus.py MKL_CBWR=COMPATIBLE "ATEN_CPU_CAPABILITY=avx2 TEST_THREADS=2"     these alone

Which instructions torch, its BLAS (MKL), oneDNN and numpy's BLAS (OpenBLAS, which multiplies in Triton's
interpreter) use can be set by environment variables, and so can the number of threads.  A library is
free to ignore its variable, so each run first prints what is really in use, and whether a sample of
products has other bits than without the setting.  Exit status: 1 if a run failed.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Equality with transformers, error rules, planted mistakes, compiled decoding: all that is arithmetic.
FILES = ["equality", "base", "attention", "triton", "flash", "cache", "mistakes", "decode", "fast", "task_heads",
         "generate", "odd_weights", "diagnose"]
# In these files, what a processor cannot change: refusals and messages, and how work is counted.
LEFT_OUT = ["refused", "wrong_kind", "names", "without_triton", "import_that_fails", "interpreter_is_on", "visited",
            "in_proportion", "look_at_the_text", "stop_strings", "no_compiler", "what_it_cannot_do", "settings_is_known"]
SETTINGS = [
    "ATEN_CPU_CAPABILITY=default", "ATEN_CPU_CAPABILITY=avx2",
    "OPENBLAS_CORETYPE=Haswell", "OPENBLAS_CORETYPE=SkylakeX",
    "OPENBLAS_CORETYPE=Zen",                               # Haswell's kernels under another name
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2", "MKL_ENABLE_INSTRUCTIONS=AVX2",      # these change no bit on AMD processors,
    "MKL_CBWR=COMPATIBLE",                                                 # and this does: the same code for all
    "ONEDNN_MAX_CPU_ISA=AVX2", "TEST_THREADS=1", "TEST_THREADS=2", "TEST_THREADS=4"]
COMBINED = ["ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Haswell MKL_ENABLE_INSTRUCTIONS=SSE4_2 TEST_THREADS=1",
            "ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Zen MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 "
            "TEST_THREADS=2",
            "OPENBLAS_CORETYPE=SkylakeX MKL_CBWR=COMPATIBLE TEST_THREADS=4"]
IN_USE = """
import hashlib, os, numpy, torch, threadpoolctl
blas = [pool["architecture"] for pool in threadpoolctl.threadpool_info() if pool["internal_api"] == "openblas"]
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
a, b = numpy.random.default_rng(0).standard_normal((2, 300, 300), dtype="float32")
x, y = torch.from_numpy(a), torch.from_numpy(b)
sample = [torch.from_numpy(a @ b), x @ y, (x.bfloat16() @ y.bfloat16()).float(), x[:3] @ y, torch.softmax(x, -1), x.exp().sum(-1)]
bits = hashlib.sha1(b"".join(t.numpy().tobytes() for t in sample)).hexdigest()[:8]
print(f"torch's kernels: {torch.backends.cpu.get_cpu_capability()}, numpy's BLAS: {', '.join(blas)}, "
      f"threads: {torch.get_num_threads()}, sample: {bits}")
"""


def has_avx512():
    """Linux says so in a file; elsewhere OpenBLAS is not asked for it."""
    path = Path("/proc/cpuinfo")
    return path.exists() and "avx512f" in path.read_text()


def in_use(environment):
    """One line; its end is a hash of the sample's bits."""
    return subprocess.run([sys.executable, "-c", IN_USE], env=environment, check=True, capture_output=True,
                          text=True).stdout.strip()


def run(setting):
    """Run the tests under one line of settings -> (exit status, what to say of it)."""
    if "SkylakeX" in setting and not has_avx512():
        setting = setting.replace("OPENBLAS_CORETYPE=SkylakeX", "").strip()
        print("   without SkylakeX: this processor has no AVX-512", flush=True)
        if not setting:
            return 0, "not run: this processor has no AVX-512"
    # Threads that wait must sleep: by default they spin, and two workers would keep each other from working.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **dict(part.split("=") for part in setting.split())}
    used = in_use(environment)
    same = used.split()[-1] == in_use(os.environ).split()[-1]
    print(f"   {used} ({'the same bits as' if same else 'other bits than'} without the setting)", flush=True)
    # torch keeps what it has compiled and does not ask for which instructions: each run compiles for itself.
    with tempfile.TemporaryDirectory() as compiled:
        return run_tests(environment | {"TORCHINDUCTOR_CACHE_DIR": compiled})


def run_tests(environment):
    """(exit status of pytest in this environment, its last line: passed, failed and the time)."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider",
               "-m", "not slow and not long and not official and not gpu", "-k", f"not ({' or '.join(LEFT_OUT)})",
               *(f"tests/test_{name}.py" for name in FILES)]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(done.stdout, flush=True)
    counts = done.stdout.strip().splitlines()[-1].split(" in ")[0].strip("= ")
    return done.returncode, f"{counts}, {time.monotonic() - begun:.0f} s"


def main(arguments):
    results = {}
    for setting in COMBINED if arguments == ["--combined"] else arguments or SETTINGS:
        print(f"\n== {setting}", flush=True)
        results[setting] = run(setting)
        print(f"   {results[setting][1]}", flush=True)
    failed = [setting for setting, (status, _) in results.items() if status]
    print("\n" + ("failed under: " + "; ".join(failed) if failed else "passed under every setting"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
