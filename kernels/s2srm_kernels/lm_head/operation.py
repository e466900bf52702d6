"""How a vocabulary operation becomes an operator: its arguments are written down once.

An operator takes the fields of `Inputs`, then those of the operation's own NamedTuple, and returns
those of a third one. Schema, autograd's places and the call are made from their annotations, so
that nothing is counted by hand:

    class _Arguments(NamedTuple): ...                 what the operation takes beyond `Inputs`
    class _Results(NamedTuple): ...                   tensors alone
    def _body(engine: Engine, inputs: Inputs, own: _Arguments) -> _Results
    def _fake(inputs: Inputs, own: _Arguments) -> _Results
    run = define_operation("name", _body, _fake)      run(impl, inputs, own) -> _Results

Source: the schema inferred from a signature is quack's (torch_library_op.py).
"""

# torch annotates these only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from s2srm_kernels.dispatch import define_body, operator, refuse_second_order, schema
from s2srm_kernels.lm_head.engine import Engine, ThreeGradients
from s2srm_kernels.lm_head.head import Head
from s2srm_kernels.options import unpack_options

HEAD_OPTIONS = ("temperature", "softcap")
"""What the options of every vocabulary operation begin with."""

Own = TypeVar("Own", bound=tuple[Any, ...])
Results = TypeVar("Results", bound=tuple[Tensor, ...])
Run = Callable[[str, "Inputs", Own], Results]


class Inputs(NamedTuple):
    """What every operator of a vocabulary operation takes first.

    hidden (N, D), weight (V, D), bias (V,) or None of one dtype; target (N,); options (k,) float64
    on the CPU, HEAD_OPTIONS first. num_live: the number of live rows, where the caller knows it.
    group: the name of the process group that the vocabulary is split over. needs: which of hidden,
    weight and bias autograd will ask for. main_grad: where the weight's gradient is added instead.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    options: Tensor
    ignore_index: int
    num_live: int | None
    group: str | None
    needs: list[bool]
    main_grad: Tensor | None

    def open(self, name: str, *options: str, **facts: Any) -> tuple[Head, list[float]]:
        """(the head of operator `name`, the values of its options after HEAD_OPTIONS).

        facts: what else the ranks of a group must agree on.
        """
        temperature, softcap, *values = unpack_options(self.options, *HEAD_OPTIONS, *options)
        facts = {
            "operation": name,
            "which inputs need gradients": list(self.needs),
            **dict(zip(options, values, strict=True)),
            **facts,
        }
        tensors = (self.hidden, self.weight, self.bias, self.target)
        head = Head(
            *(*tensors, softcap, temperature, self.ignore_index, self.group),
            num_live=self.num_live,
            **facts,
        )
        return head, values

    def for_backward(self, ctx: Any) -> Inputs:
        """The inputs of the operator that a backward runs: what autograd asks for by now."""
        needs = [bool(need) for need in ctx.needs_input_grad[:3]]
        return self._replace(needs=needs, main_grad=None)


class Gradients(NamedTuple):
    """What an operator that is a backward returns; empty where not needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def define_operation(
    name: str,
    body: Callable[[Engine, Inputs, Own], Results],
    fake: Callable[[Inputs, Own], Results],
    *,
    save: Callable[[Any, Inputs, Own, Results], None] | None = None,
    backward: Callable[[str, Any, Any], Sequence[Tensor | None]] | None = None,
) -> Run[Own, Results]:
    """Define the operator `s2srm::name` for every backend; returns the function that calls it.

    save(ctx, inputs, own, results) keeps what backward(impl, ctx, grads) needs, which is told the
    gradients of the results, each None where there is none, and returns those of hidden, weight and
    bias. Without them a gradient is an error.
    """
    hints = get_type_hints(body)
    own_type, results_type = hints["own"], hints["return"]
    names = [*Inputs._fields, *own_type._fields]
    num_inputs = len(Inputs._fields)

    def split(arguments: tuple[Any, ...]) -> tuple[Inputs, Own]:
        return Inputs(*arguments[:num_inputs]), own_type(*arguments[num_inputs:])

    def run_body(engine: Engine, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(body(engine, *split(arguments)))

    def run_fake(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(fake(*split(arguments)))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if save is not None:
            ctx.set_materialize_grads(False)
            given = split(inputs)
            save(ctx, *given, results_type(*output))
            ctx.main_grad = given[0].main_grad

    def run_backward(impl: str, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if backward is None:
            refuse_second_order(name)
        made = backward(impl, ctx, results_type(*grads))
        wanted = zip(made, ctx.needs_input_grad, strict=False)
        d_hidden, d_weight, d_bias = (g if need else None for g, need in wanted)
        if d_weight is not None and ctx.main_grad is not None:
            with torch.no_grad():
                ctx.main_grad.add_(d_weight)
            d_weight = None
        return (d_hidden, d_weight, d_bias, *[None] * (len(names) - 3))

    def run(impl: str, inputs: Inputs, own: Own) -> Results:
        return results_type(*operator(name, impl)(*inputs, *own))

    arguments = {**get_type_hints(Inputs), **get_type_hints(own_type)}
    define_body(
        *(name, schema(arguments, len(results_type._fields)), run_body, run_fake),
        setup_context=setup_context,
        backward=run_backward,
    )
    return run


def define_backward(
    name: str,
    body: Callable[[Engine, Inputs, Own], Gradients],
    fake: Callable[[Inputs], ThreeGradients],
) -> Run[Own, Gradients]:
    """`define_operation` of a backward: its own gradient is an error."""
    return define_operation(name, body, lambda inputs, own: Gradients(*fake(inputs)))


def save_values(ctx: Any, *values: Any) -> None:
    """Keep values for `saved_values`: tensors as autograd keeps them, anything else as it is."""
    ctx.save_for_backward(*[v for v in values if isinstance(v, Tensor)])
    ctx.others = [None if isinstance(v, Tensor) else (v,) for v in values]


def saved_values(ctx: Any) -> list[Any]:
    """What `save_values` was given. Once a backward: a checkpoint gives tensors out only once."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if other is None else other[0] for other in ctx.others]
