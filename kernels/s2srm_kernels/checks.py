"""Checks of arguments: each raises ValueError naming the argument and its value.

Only what can be seen without reading a tensor's data is checked here, so that nothing synchronises
and torch.compile can trace it. Checks of data (targets, cu_seqlens) are made inside the operators.
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import numbers

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER = (torch.int64, torch.int32)
_OPTIONAL = ("bias", "row_weight", "ref_logprobs", "bootstrap")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    if any(t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients that are made in forward and wait for backward's factor, by the inputs' dtype.

    bfloat16 has the range of float32, so nothing is lost but one rounding by a factor that is not a
    power of two. float16 would lose what a loss scale is there to keep.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def autocast_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to a linear layer: cast to its dtype, float64 left alone."""
    device_type = hidden.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    return cast(hidden), cast(weight), None if bias is None else cast(bias)


def check_tensors(name: str, **tensors: Tensor | None) -> None:
    """What the operator `name` cannot take although it is a tensor of the right shape.

    NotImplementedError under a transform of torch.func or forward-mode differentiation, ValueError
    for a tensor whose elements lie elsewhere or in another layout.
    """
    # All three questions are answered by a flag: no tensor is looked into where there is none.
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]
            raise NotImplementedError(
                f"{name} does not run under torch.func (grad, vmap, jvp, ...): call it outside, "
                "with backward() or torch.autograd.grad, and once for each sample of a vmap"
            )
        if forward_ad._current_level >= 0 and any(  # pyright: ignore[reportPrivateUsage]
            t is not None and forward_ad.unpack_dual(t).tangent is not None
            for t in tensors.values()
        ):
            raise NotImplementedError(
                f"{name} has no forward-mode derivative: use backward() or torch.autograd.grad"
            )
    for argument, tensor in tensors.items():
        if type(tensor) is Tensor and tensor.layout == torch.strided:  # nearly always
            continue
        if tensor is None and argument in _OPTIONAL:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{argument} must be a torch.Tensor, got {type(tensor).__name__}")
        if hasattr(tensor, "to_local"):
            raise ValueError(
                f"{argument} is a DTensor: pass {argument}.full_tensor(), or of a weight and bias "
                "sharded over the vocabulary .to_local() with process_group=mesh.get_group()"
            )
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(
                f"{argument} is a {type(tensor).__name__}: pass a plain torch.Tensor of its values"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"{argument} has layout {tensor.layout}: pass {argument}.to_dense()")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    """Shapes, dtypes and devices of the tensors that every vocabulary operation takes.

    hidden (..., D) has weight's dtype, or is 16 bits wide where weight is float32.
    """
    if hidden.dim() < 2:
        raise ValueError(
            f"hidden must have shape (N, D) or (..., D), got shape {tuple(hidden.shape)}"
        )
    depth = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != depth or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape (V, {depth}) with V > 0 to fit hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
            + (": pass weight.t()" if weight.shape[:1] == hidden.shape[-1:] else "")
        )
    if hidden.dtype not in _FLOATING:
        raise ValueError(f"hidden must have one of the dtypes {_FLOATING}, got {hidden.dtype}")
    widened = weight.dtype == torch.float32 and hidden.dtype.itemsize == 2
    if weight.dtype != hidden.dtype and not widened:
        raise ValueError(
            f"weight must have hidden's dtype {hidden.dtype} outside autocast, or float32 where "
            f"hidden has 16 bits, got {weight.dtype}"
        )
    check_device("weight", weight, hidden)
    if hidden.dim() > 2 and target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}: pass hidden.flatten(0, -2) and target "
            f"(N,), or target in shape {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}"
        )
    check_target(target, hidden)
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have shape ({weight.shape[0]},) to fit weight, got {tuple(bias.shape)}"
        )
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias must have weight's dtype {weight.dtype}, got {bias.dtype}")
    check_device("bias", bias, hidden)


def check_main_grad(main_grad: Tensor, weight: Tensor) -> None:
    """A buffer that a gradient of `weight` can be added to."""
    check_tensors("main_grad", main_grad=main_grad)
    if hasattr(weight, "to_local"):
        raise ValueError("main_grad must be None where weight is a DTensor, got a tensor")
    if main_grad.shape != weight.shape:
        raise ValueError(
            f"main_grad must have weight's shape {tuple(weight.shape)}, got "
            f"{tuple(main_grad.shape)}"
        )
    check_floating("main_grad", main_grad)
    check_device("main_grad", main_grad, weight, "weight")
    if main_grad.requires_grad:
        raise ValueError("main_grad requires a gradient but is a buffer here: detach it")


def check_target(target: Tensor, hidden: Tensor) -> None:
    """(...) token ids."""
    check_rows("target", target, hidden)
    check_integer("target", target)


def check_rows(name: str, tensor: Tensor, like: Tensor, like_name: str = "hidden") -> None:
    """One value for every row of `like`: of shape (N,), or the leading one of (..., D)."""
    shape = like.shape[:-1] if like.dim() > 1 else like.shape
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, one value for each row of {like_name}, "
            f"got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, like, like_name)


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str = "hidden") -> None:
    """Same device."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like_name}'s device {like.device}, got {tensor.device}"
        )


def check_integer(name: str, tensor: Tensor) -> None:
    """int64 or int32."""
    if tensor.dtype not in _INTEGER:
        raise ValueError(f"{name} must be int64 or int32, got {tensor.dtype}")


def check_floating(name: str, tensor: Tensor) -> None:
    """A floating dtype that the operations know."""
    if tensor.dtype not in _FLOATING:
        raise ValueError(f"{name} must have one of the dtypes {_FLOATING}, got {tensor.dtype}")


def check_whole(name: str, value: int) -> None:
    """A whole number of Python or NumPy."""
    # torch.compile may hand over a symbolic one.
    if torch.compiler.is_compiling() or type(value) is int:
        return
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_workspace(workspace_bytes: int | None) -> None:
    """A number of bytes, or None for the backend's own bound."""
    if workspace_bytes is None:
        return
    check_whole("workspace_bytes", workspace_bytes)
    if workspace_bytes < 0:
        raise ValueError(f"workspace_bytes must be None or at least 0, got {workspace_bytes}")


def assert_on_device(condition: Tensor, message: str) -> None:
    """A check of data that nobody waits for: ValueError on the CPU.

    On CUDA a device-side assertion, which torch reports at the next synchronisation; a CUDA graph
    can hold it.
    """
    try:
        torch._assert_async(condition, message)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    except RuntimeError as error:
        if condition.device.type != "cpu":
            raise
        raise ValueError(message) from error
