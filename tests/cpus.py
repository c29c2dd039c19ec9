"""Run the tests that a processor can change as if on other processors.

    python tests/cpus.py                one run for each setting          (make test-cpus)
    python tests/cpus.py --combined     three runs that hold every value  (a slow test)

Which instructions torch, its BLAS (MKL), oneDNN and numpy's BLAS (OpenBLAS, which multiplies in Triton's
interpreter) use can be set by environment variables, and so can the number of threads.  Each run first
prints what is really in use, since a library is free to ignore its variable: MKL does on AMD processors.
Exit status: 1 if a run failed.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Equality with transformers, error rules, planted mistakes, compiled decoding: all that is arithmetic.
FILES = ["equality", "base", "attention", "triton", "flash", "cache", "mistakes", "decode", "fast", "task_heads",
         "generate", "diagnose"]
SETTINGS = ["ATEN_CPU_CAPABILITY=default", "ATEN_CPU_CAPABILITY=avx2", "OPENBLAS_CORETYPE=Haswell",
            "OPENBLAS_CORETYPE=Zen", "OPENBLAS_CORETYPE=SkylakeX", "MKL_ENABLE_INSTRUCTIONS=SSE4_2",
            "MKL_ENABLE_INSTRUCTIONS=AVX2", "ONEDNN_MAX_CPU_ISA=AVX2", "TEST_THREADS=1", "TEST_THREADS=2",
            "TEST_THREADS=4"]
COMBINED = ["ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Haswell MKL_ENABLE_INSTRUCTIONS=SSE4_2 TEST_THREADS=1",
            "ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Zen MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 "
            "TEST_THREADS=2",
            "OPENBLAS_CORETYPE=SkylakeX TEST_THREADS=4"]
IN_USE = """
import os, numpy, torch, threadpoolctl
blas = [pool["architecture"] for pool in threadpoolctl.threadpool_info() if pool["internal_api"] == "openblas"]
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
print(f"torch's kernels: {torch.backends.cpu.get_cpu_capability()}, numpy's BLAS: {', '.join(blas)}, "
      f"threads: {torch.get_num_threads()}", flush=True)
"""


def has_avx512():
    """Linux says so in a file; elsewhere OpenBLAS is not asked for it."""
    path = Path("/proc/cpuinfo")
    return path.exists() and "avx512f" in path.read_text()


def run(setting, more):
    """Exit status of the tests under one line of settings."""
    print(f"\n== {setting}", flush=True)
    if "SkylakeX" in setting and not has_avx512():
        setting = setting.replace("OPENBLAS_CORETYPE=SkylakeX", "").strip()
        print("   without SkylakeX: this processor has no AVX-512", flush=True)
        if not setting:
            return 0
    environment = {**os.environ, **dict(part.split("=") for part in setting.split())}
    subprocess.run([sys.executable, "-c", IN_USE], env=environment, check=True)
    # torch keeps what it has compiled and does not ask for which instructions: each run compiles for itself.
    with tempfile.TemporaryDirectory() as compiled:
        return run_tests(environment | {"TORCHINDUCTOR_CACHE_DIR": compiled}, more)


def run_tests(environment, more):
    """Exit status of pytest in this environment."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider",
               "-m", "not slow and not long and not official and not gpu", *(f"tests/test_{name}.py" for name in FILES), *more]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main(arguments):
    combined = "--combined" in arguments
    more = [argument for argument in arguments if argument != "--combined"]
    failed = [setting for setting in (COMBINED if combined else SETTINGS) if run(setting, more)]
    print("\n" + ("failed under: " + "; ".join(failed) if failed else "passed under every setting"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
