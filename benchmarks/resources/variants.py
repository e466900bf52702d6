"""Every kernel and configuration that the operations launch, as a compiler hears of it.

For a machine without a GPU. The public operations run on small CPU tensors with the Triton engine
told which chip it has; each launch is recorded with what Triton makes of its arguments (signature,
constants, divisibility), and no kernel runs. So a variant is what a launch would compile, and a new
kernel or option is found as soon as a call of `_calls` reaches it.

Left out: numbers (every buffer holds what it held); process groups, whose kernels are the same.
"""

# triton and torch annotate their functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false
from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

import s2srm_kernels as ops
from s2srm_kernels import dispatch
from s2srm_kernels.triton import configs, engine, problem

ARCHITECTURES = (80, 90, 100)
# Multiprocessors of an A100, an H100 and a B200: programs of a persistent grid.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
# Where each option is compiled alone too: the chip and dtypes that the kernels are tuned for.
ONE_BY_ONE = {(90, "bf16"), (90, "fp16")}
# Rows and a vocabulary of several tiles and splits; every size a multiple of 16, as real ones.
_ROWS, _DEPTH, _COLUMNS = 144, 64, 2304
# No multiple of a tile in any direction, but of the 16 bytes that descriptors need.
_UNEVEN_DEPTH, _UNEVEN_COLUMNS = 72, 2307


@dataclass(frozen=True)
class Variant:
    """One compilation: triton.compile(source of (kernel, signature, constexprs, attrs), options).

    name is unique: kernel, path of its copies, options, dtype, chip. dtype is the inputs' ("bf16",
    ...), arch the compute capability (90), case the inputs' label ("plain", "full", "unaligned").
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]
    dtype: str
    arch: int
    case: str = ""

    def constant(self, name: str) -> Any:
        """The value of one constant of the kernel; None where it has no such."""
        if name not in self.kernel.arg_names:
            return None
        place = self.kernel.arg_names.index(name)
        return self.constexprs.get(name, self.constexprs.get((place,)))

    @property
    def matrix(self) -> bool:
        """Whether it makes products, on the matrix units where the dtype has them."""
        return self.constant("BLOCK_K") is not None

    @property
    def tile(self) -> str:
        """Rows x columns of a tile of products, "-" where there is none."""
        if not self.matrix:
            return "-"
        return f"{self.constant('BLOCK_M')}x{self.constant('BLOCK_N')}"

    def source(self) -> Any:
        """What triton.compile takes."""
        gluon = isinstance(self.kernel, GluonJITFunction)
        kind = GluonASTSource if gluon else ASTSource
        return kind(self.kernel, self.signature, self.constexprs, self.attrs)


def find(name: str) -> Variant:
    """The variant of that name; KeyError where there is none."""
    dtype, chip = name.split(".")[0].split("-")[-2:]
    listed = variants_of(int(chip.removeprefix("sm_")), dtype)
    return {variant.name: variant for variant in listed}[name]


@dataclass(frozen=True)
class _Case:
    """One set of inputs. aligned: rows begin at multiples of 16 bytes, as descriptors need."""

    label: str
    aligned: bool
    full: bool

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """hidden, weight, target and the head's options."""
        depth = _UNEVEN_DEPTH if self.full else _DEPTH
        columns = _UNEVEN_COLUMNS if self.full else _COLUMNS
        stride = depth if self.aligned else depth + 1
        hidden = torch.zeros(_ROWS, stride, dtype=dtype)[:, :depth].requires_grad_()
        weight = torch.zeros(columns, stride, dtype=dtype)[:, :depth].requires_grad_()
        target = torch.arange(_ROWS) % columns
        if not self.full:
            return hidden, weight, target, {}
        bias = torch.zeros(columns, dtype=dtype, requires_grad=True)
        return hidden, weight, target, {"bias": bias, "softcap": 12.0, "temperature": 1.5}


_CASES = (
    _Case("plain", aligned=True, full=False),
    _Case("full", aligned=True, full=True),
    _Case("unaligned", aligned=False, full=True),
)


def _calls(case: _Case, dtype: torch.dtype, one_by_one: bool) -> Iterator[Callable[[], Any]]:
    """Calls that reach every kernel: both orders of the losses; options together, or each alone."""
    hidden, weight, target, options = case.inputs(dtype)
    head = (hidden, weight, target)
    options: dict[str, Any] = options | {"impl": "triton"}
    rows = torch.zeros(_ROWS)

    def cross_entropy(**extra: Any) -> None:
        ops.linear_cross_entropy(*head, **extra, **options).backward()

    def logprobs(with_entropy: bool) -> None:
        found = ops.linear_logprobs(*head, with_entropy=with_entropy, **options)
        (found.logprobs.sum() + (found.entropy.sum() if with_entropy else 0)).backward()

    def ppo_loss(entropy_coef: float) -> None:
        loss = ops.linear_ppo_loss(*head, rows, rows, entropy_coef=entropy_coef, **options)
        loss.loss.backward()

    yield lambda: ops.linear_token_stats(*head, **options)
    yield lambda: logprobs(True)
    yield lambda: ppo_loss(0.01)
    # Nothing fits no workspace: the logits are made again.
    yield lambda: cross_entropy(workspace_bytes=0, label_smoothing=0.1, skip_mass=1e-3)
    yield cross_entropy
    yield lambda: ops.linear_sample(*head[:2], target, target, **options)
    if one_by_one:
        yield lambda: logprobs(False)
        yield lambda: ppo_loss(0.0)
        yield lambda: cross_entropy(label_smoothing=0.1)
        yield lambda: cross_entropy(workspace_bytes=0)
        yield lambda: cross_entropy(workspace_bytes=0, skip_mass=1e-3)


def _hopper_calls(case: _Case, dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Calls that reach every variant of the opt-in kernel."""
    hidden, weight, target, _ = case.inputs(dtype)

    def call(operation: Callable[..., Any], **options: Any) -> None:
        with patch.dict(os.environ, {"S2SRM_HOPPER": "1"}):
            operation(hidden, weight, target, impl="triton", **options)

    yield lambda: call(ops.linear_token_stats)
    yield lambda: call(ops.linear_logprobs, with_entropy=False)
    yield lambda: call(ops.linear_logprobs, with_entropy=True)
    yield lambda: call(ops.linear_cross_entropy)


@functools.cache
def variants() -> tuple[Variant, ...]:
    """All of them, architecture by architecture, each with a name of its own."""
    return tuple(v for arch in ARCHITECTURES for dtype in DTYPES for v in variants_of(arch, dtype))


@functools.cache
def variants_of(arch: int, dtype: str) -> tuple[Variant, ...]:
    """Those of one chip and dtype; the second with one name ends in ".2"."""
    found: dict[str, Variant] = {}
    names = Counter[str]()
    for case in _CASES:
        if case.label == "unaligned" and DTYPES[dtype].itemsize > 2:
            # The other dtypes have pointers alone, and uneven sizes are in `full`.
            continue
        with _launches(arch) as launches:
            alone = case.label == "plain" and (arch, dtype) in ONE_BY_ONE
            for call in _calls(case, DTYPES[dtype], alone):
                call()
            if (arch, dtype) in ONE_BY_ONE and case.label == "plain":
                for call in _hopper_calls(case, DTYPES[dtype]):
                    call()
        for kernel, arguments, options in launches:
            variant = _specialise(kernel, arguments, options, arch, dtype, case)
            key = str((kernel.__name__, variant.signature, variant.constexprs, variant.attrs))
            if key in found:
                continue
            names[variant.name] += 1
            if (count := names[variant.name]) > 1:
                variant = replace(variant, name=f"{variant.name}.{count}")
            found[key] = variant
    return tuple(found.values())


@contextmanager
def _launches(arch: int) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Kernel, arguments and options of each launch inside, none of which takes place.

    CPU tensors count as tensors of a GPU of compute capability `arch`.
    """
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((kernel, arguments, options))

    family = configs.family_of(divmod(arch, 10))
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", record))
        for module, name, value in (
            (problem, "family_on", lambda device: family),
            (problem, "programs_on", lambda device: MULTIPROCESSORS[arch]),
            # More than one chunk of columns, whose products are added up.
            (engine, "GRADIENT_CHUNK_BYTES", 0),
        ):
            stack.enter_context(patch.object(module, name, value))
        _serve_cpu_tensors()
        yield seen


@functools.cache
def _serve_cpu_tensors() -> None:
    """Register the engine for CPU tensors too, as the interpreter does."""
    reason = dispatch.load("triton")
    if reason is not None:
        raise ImportError(reason)
    if problem.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set: the interpreter's kernels cannot be compiled")
    dispatch.implement("triton", "CPU", engine.TritonEngine())


def _specialise(
    kernel: Any,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    arch: int,
    dtype: str,
    case: _Case,
) -> Variant:
    """What Triton compiles for a launch: the steps of JITFunction.run up to there."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"debug": False, "instrumentation_mode": "", **options}
    bound, specialization, given = bind(*arguments, **options)
    _, signature, constexprs, attrs = kernel._pack_args(
        backend, options, bound, specialization, given
    )
    compiler = {k: v for k, v in options.items() if k not in kernel.arg_names}
    variant = Variant("", kernel, signature, constexprs, attrs, compiler, dtype, arch, case.label)
    return replace(variant, name=_name(variant))


def _name(variant: Variant) -> str:
    """statistics-tma-count-plain-bf16-sm_90: kernel, path, options that are on, sizes, inputs."""
    words = [variant.kernel.__name__.removesuffix("_kernel")]
    flags = [name for name in variant.kernel.arg_names if variant.constant(name) is True]
    words += [name.lower() for name in flags if not name.startswith("EVEN") and name != "FAST"]
    return "-".join([*words, variant.case, variant.dtype, f"sm_{variant.arch}"])
