"""The Triton kernels on a CPU, in Triton's interpreter.

The interpreter is chosen by an environment variable before triton is imported, and pytest's workers
have other tests to run: so each group runs in a process of its own, with all that it printed shown
when it fails.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="without triton there is no interpreter")

HERE = Path(__file__).parent
OF_TRITON = [(f"interpreted/{path.name}",) for path in HERE.glob("interpreted/test_*.py")]
# Long rows are slow here, and the bits of a gradient are cuBLAS's: interpreted/test_statistics.py
# has a test of its own for the bits of a row.
SLOW = "not same_bits and not many_chunks and not no_tensor_of_all"
OF_EVERY_BACKEND = [
    ("test_known_bugs.py", "-k", SLOW),
    ("test_skipping.py", "-k", "error_is_within or whole_blocks"),
    ("test_linear_token_stats.py", "-k", "ties"),
    ("test_call.py", "-k", "narrow or known_number or main_grad"),
    ("test_linear_ppo_loss.py", "-k", "equals_autograd and not 300"),
    ("test_callers.py", "-k", "again or handed_out or batched or meta or threads"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [*sorted(OF_TRITON), *OF_EVERY_BACKEND], ids=lambda arguments: arguments[0]
)
def test_in_the_interpreter(arguments):
    name, *options = arguments
    plain = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    done = subprocess.run(
        [sys.executable, *plain, HERE / name, *options],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
