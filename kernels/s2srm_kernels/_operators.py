"""Registration of operators and the choice of an implementation.

torch's dispatcher is the only registry. Operator `s2srm::X` has three overloads with one schema,
one fake kernel and one autograd formula:

    s2srm::X          the reference, plain PyTorch, on every device
    s2srm::X.cpp      no kernel until the compiled extension registers one for a device
    s2srm::X.triton   no kernel until the Triton package registers one for a device

A backend adds itself by registering a kernel for its overload and device, and by nothing else;
`select` asks the dispatcher what is there.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

NAMESPACE = "s2srm"
IMPLS = ("reference", "cpp", "triton")

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_AUTO_ORDER = {"cuda": ("triton", "cpp", "reference")}
_AUTO_ORDER_ELSEWHERE = ("cpp", "reference")

Kernel = Callable[..., Any]


def define(
    name: str,
    schema: str,
    reference: Kernel,
    fake: Kernel,
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define `s2srm::name` with all its overloads.

    schema: arguments and results, without the name. backward(impl, ctx, *grads) is told which
    implementation ran forward, so that the same one runs backward.
    """
    for impl in IMPLS:
        overload = _overload_name(name, impl)
        _LIBRARY.define(overload + schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"{NAMESPACE}::{overload}"
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        if backward is not None:
            torch.library.register_autograd(
                qualified,
                functools.partial(backward, impl),
                setup_context=setup_context,
                lib=_LIBRARY,
            )
    _LIBRARY.impl(name, _without_autocast(reference), "CompositeExplicitAutograd")


def operator(name: str, impl: str) -> Kernel:
    """The overload of `s2srm::name` that `impl` stands for."""
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    return getattr(packet, "default" if impl == "reference" else impl)


def select(name: str, impl: str, device: torch.device) -> Kernel:
    """The overload to call for tensors on `device`.

    "auto" takes the first that has a kernel: triton, cpp, reference on CUDA; cpp, reference
    elsewhere. An explicit choice without a kernel raises ValueError with the reason.
    """
    if impl == "auto":
        order = _AUTO_ORDER.get(device.type, _AUTO_ORDER_ELSEWHERE)
        impl = next(choice for choice in order if _has_kernel(name, choice, device.type))
    elif impl not in IMPLS:
        raise ValueError(f"impl must be 'auto' or one of {IMPLS}, got {impl!r}")
    elif not _has_kernel(name, impl, device.type):
        raise ValueError(
            f"impl={impl!r} is not available for {name}: no {impl} kernel is registered for "
            f"{device.type} tensors; use impl='auto' or impl='reference'"
        )
    return operator(name, impl)


def refuse_second_order(name: str) -> Callable[..., NoReturn]:
    """`backward` argument of `define` for an operator that is itself a backward."""

    def backward(impl: str, ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise NotImplementedError(f"{name}: second-order gradients are not supported")

    return backward


def _overload_name(name: str, impl: str) -> str:
    return name if impl == "reference" else f"{name}.{impl}"


def _has_kernel(name: str, impl: str, device_type: str) -> bool:
    if impl == "reference":
        return True
    return torch._C._dispatch_has_kernel_for_dispatch_key(  # pyright: ignore[reportPrivateUsage]
        f"{NAMESPACE}::{_overload_name(name, impl)}", device_type.upper()
    )


# torch.compile cannot trace a question to the dispatcher; the answer does not change in a process
# once the backends are loaded. This is torch.compiler.assume_constant_result, which would import
# the whole compiler: four seconds for callers that never compile.
_has_kernel._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _without_autocast(kernel: Kernel) -> Kernel:
    """Autocast is still on inside an operator and would undo the upcast before a product."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        device_type = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device_type, enabled=False):
            return kernel(*args)

    return run
