"""Registration of operators and the choice of an implementation.

torch's dispatcher is the only registry. Operator `s2srm::X` has three overloads with one schema,
one fake kernel and one autograd formula:

    s2srm::X          the reference, plain PyTorch, on every device
    s2srm::X.cpp      no kernel until the compiled extension registers one for a device
    s2srm::X.triton   no kernel until the Triton package registers one for a device

A backend is a module with a function `register()`, imported when it is first asked for; the
reference is asked for when s2srm_kernels is imported. It registers kernels for overloads and
devices: of a sequence operation directly, of the vocabulary operations through `implement`, whose
bodies are written once on an engine; and it returns, by type of device, why it has no kernels
there, where it should. `choose` asks the dispatcher what is there.

Left out: what an engine is (lm_head.engine); it is handed to the bodies as it was registered.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

import functools
import importlib
import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, get_args, get_type_hints

import torch
from torch import Tensor

NAMESPACE = "s2srm"
# Where each backend's register() is.
BACKENDS = {
    "reference": "s2srm_kernels.lm_head.reference",
    "cpp": "s2srm_kernels.cpp",
    "triton": "s2srm_kernels.triton",
}
IMPLS = tuple(BACKENDS)

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# On meta tensors every overload has the fake kernel, so nothing need be loaded.
_AUTO_ORDER = {"cuda": ("triton", "cpp", "reference"), "meta": ("reference",)}
_AUTO_ORDER_ELSEWHERE = ("cpp", "reference")
_AUTO_CHOICES: dict[tuple[str, str, int | None], str] = {}
_OLDEST_GPU = {"triton": (8, 0)}
_EVERYWHERE = "every type of device"

Kernel = Callable[..., Any]

# functools.cache lets two threads in at once, and an overload takes one kernel for each device.
_LOADING = threading.Lock()
_BODIES: dict[str, Kernel] = {}
_ENGINES: dict[str, Any] = {}


def define(
    name: str,
    schema: str,
    fake: Kernel,
    *,
    reference: Kernel | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define `s2srm::name` with all its overloads.

    schema: arguments and results, without the name (see `schema`).
    reference: the kernel of the overload of that name, where no engine runs it. backward(impl, ctx,
    *grads) is told which implementation ran forward, so that the same one runs backward.
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
    if reference is not None:
        _LIBRARY.impl(name, _without_autocast(reference), "CompositeExplicitAutograd")


def define_body(name: str, schema: str, body: Kernel, fake: Kernel, **autograd: Any) -> None:
    """`define` for body(engine, *args), which every backend runs on its own engine."""
    _BODIES[name] = body
    define(name, schema, fake, **autograd)


def implement(impl: str, dispatch_key: str, engine: Any) -> None:
    """Register an engine for every body: overload `impl`, dispatch key "CPU", "CUDA" or any."""
    _ENGINES[impl] = engine
    for name, body in _BODIES.items():
        kernel = _without_autocast(functools.partial(body, engine))
        _LIBRARY.impl(_overload_name(name, impl), kernel, dispatch_key)


def engine_of(impl: str) -> Any:
    """The engine that was registered for `impl`."""
    return _ENGINES[impl]


def operator(name: str, impl: str) -> Kernel:
    """The overload of `s2srm::name` that `impl` stands for."""
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    return getattr(packet, "default" if impl == "reference" else impl)


def choose(name: str, impl: str, device: torch.device) -> str:
    """The implementation to call for tensors on `device`.

    "auto" takes the first that has a kernel: triton, cpp, reference on CUDA; cpp, reference
    elsewhere. One that cannot be loaded, or whose kernels do not run on so old a GPU, is left out
    with one warning. An explicit choice without a kernel raises ValueError with the reason.
    """
    if impl == "auto":
        return _auto_choice(name, device.type, device.index)
    if impl not in IMPLS:
        raise ValueError(f"impl must be 'auto' or one of {IMPLS}, got {impl!r}")
    obstacle = _obstacle(name, impl, device.type, device.index, True)
    if obstacle is not None:
        raise ValueError(
            f"impl={impl!r} is not available for {name}: {obstacle}; use impl='auto' or "
            "impl='reference'"
        )
    return impl


def select(name: str, impl: str, device: torch.device) -> Kernel:
    """The overload to call for tensors on `device`; see `choose`."""
    return operator(name, choose(name, impl, device))


def refuse_second_order(name: str) -> NoReturn:
    """What the backward of an operator that is itself a backward does."""
    raise NotImplementedError(
        f"{name}: second-order gradients are not supported: differentiate once, or take the "
        "loss of F.linear's logits"
    )


def schema(arguments: Mapping[str, Any], num_results: int) -> str:
    """Of an operator with these annotated arguments that returns that many tensors."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, annotation=a) for n, a in arguments.items()]

    def prototype() -> None: ...

    prototype.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
        parameters, return_annotation=tuple[(Tensor,) * num_results]
    )
    return torch.library.infer_schema(prototype, mutates_args=())


def schema_of(function: Kernel) -> str:
    """Of an operator with a function's own arguments, which returns a tuple of tensors."""
    hints = get_type_hints(function)
    return schema(hints, len(get_args(hints.pop("return"))))


def _overload_name(name: str, impl: str) -> str:
    return name if impl == "reference" else f"{name}.{impl}"


def _auto_choice(name: str, device_type: str, index: int | None) -> str:
    """The first without an obstacle, found once: the dispatcher takes longer than a small call."""
    key = (name, device_type, index)
    if key not in _AUTO_CHOICES:
        order = _AUTO_ORDER.get(device_type, _AUTO_ORDER_ELSEWHERE)
        _AUTO_CHOICES[key] = next(
            choice for choice in order if _obstacle(name, choice, device_type, index) is None
        )
    return _AUTO_CHOICES[key]


def _obstacle(
    name: str, impl: str, device_type: str, index: int | None, quiet: bool = False
) -> str | None:
    """Why `impl` cannot run `name` on such a device; None if it can."""
    if impl == "reference":
        return None
    reason = load(impl, device_type)
    overload = f"{NAMESPACE}::{_overload_name(name, impl)}"
    key = torch._C._dispatch_key_for_device(device_type)  # pyright: ignore
    if torch._C._dispatch_has_kernel_for_dispatch_key(overload, key):  # pyright: ignore
        reason = _too_old(impl, device_type, index)
        if reason is None:
            return None
    elif reason is None:
        return f"no {impl} kernel is registered for {device_type} tensors"
    if not quiet:
        _warn_once(impl, reason)
    return reason


def _too_old(impl: str, device_type: str, index: int | None) -> str | None:
    """The reason if the backend's kernels do not compile for this GPU, else None."""
    if device_type != "cuda" or impl not in _OLDEST_GPU:
        return None
    oldest, ours = _OLDEST_GPU[impl], torch.cuda.get_device_capability(index)
    if ours >= oldest:
        return None
    needed, got = (".".join(map(str, capability)) for capability in (oldest, ours))
    return f"it needs a GPU of compute capability {needed} or later, got {got}"


# torch.compile cannot trace a question to the dispatcher; the answer does not change in a process
# once the backends are loaded. This is torch.compiler.assume_constant_result, which would import
# the whole compiler: four seconds for callers that never compile.
for _answer in (_auto_choice, _obstacle):
    _answer._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def load(impl: str, device_type: str | None = None) -> str | None:
    """Import a backend and let it register itself, once.

    The reason if it cannot, on `device_type` or, without one, on any device; else None.
    """
    with _LOADING:
        reasons = _load(impl)
    return reasons.get(_EVERYWHERE, None if device_type is None else reasons.get(device_type))


@functools.cache
def _load(impl: str) -> dict[str, str | None]:
    try:
        return importlib.import_module(BACKENDS[impl]).register()
    except ImportError as error:
        return {_EVERYWHERE: str(error)}


@functools.cache
def _warn_once(impl: str, reason: str) -> None:
    warnings.warn(f"the {impl} backend of s2srm_kernels is not used: {reason}", stacklevel=2)


def _without_autocast(kernel: Kernel) -> Kernel:
    """Autocast is still on inside an operator and would undo the upcast before a product."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        device_type = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.amp.is_autocast_available(device_type):
            return kernel(*args)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args)

    return run
