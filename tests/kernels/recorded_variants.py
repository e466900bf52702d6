"""Prints the variants, their kernels, and which are new at other numbers of rows and columns.

In a process of its own: the Triton engine is registered for CPU tensors there.
"""

import json
from unittest.mock import patch

from triton.runtime.jit import JITFunction

from benchmarks.resources import variants
from s2srm_kernels.triton import backward, forward, hopper, merge, sample


def _kernels():
    """The kernels of the modules that the engine launches from, by name."""
    found = [
        x for module in (forward, backward, hopper, merge, sample) for x in vars(module).values()
    ]
    names = {x.__name__ for x in found if isinstance(x, JITFunction)}
    return sorted(name for name in names if name.endswith("_kernel"))


def _described(variant):
    names = variant.kernel.arg_names
    constants = {name: variant.constant(name) for name in names}
    return {
        "name": variant.name,
        "kernel": variant.kernel.__name__,
        "divisible": [names[place[0]] for place, what in variant.attrs.items() if what],
        "constants": {k: v for k, v in constants.items() if isinstance(v, int | float)},
    }


def _key(variant):
    return str((variant.name, variant.signature, variant.constexprs, variant.attrs))


if __name__ == "__main__":
    every = variants.variants()
    listed = variants.variants_of(90, "bf16")
    with patch.multiple(variants, _ROWS=1040, _COLUMNS=4608):
        others = variants.variants_of.__wrapped__(90, "bf16")
    known = {_key(variant) for variant in listed}
    print(
        json.dumps(
            {
                "variants": [_described(variant) for variant in every],
                "kernels": _kernels(),
                "new": [variant.name for variant in others if _key(variant) not in known],
            }
        )
    )
