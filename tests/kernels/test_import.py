import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code, folder=ROOT):
    env = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


def test_import_is_quick_and_needs_torch_alone():
    code = (
        "import json, sys, time, torch, torch.distributed\n"
        "before = set(sys.modules); start = time.process_time(); import s2srm_kernels\n"
        "seconds = time.process_time() - start\n"
        "print(json.dumps([seconds, sorted({m.split('.')[0] for m in set(sys.modules) - before})]))"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    seconds, packages = json.loads(done.stdout)
    assert seconds < 0.3
    assert not {"transformers", "deepspeed", "triton", "s2srm", "datasets"} & set(packages)


def test_the_kernels_folder_hides_no_installed_package():
    """transformers imports a package of PyPI called `kernels`; this folder must not be one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    done = run("from transformers import LlamaForCausalLM, __version__; print(__version__)")
    assert done.returncode == 0, done.stderr
