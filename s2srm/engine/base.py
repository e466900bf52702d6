"""The interface of an engine, and micro-batch loops in which all ranks keep step.

Convention of every loss: it is divided by a count over all ranks and all micro-batches of the
optimiser step. The engine adds gradients up over ranks and micro-batches and never averages them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2srm import distributed
from s2srm.engine.pieces import Piece, trained
from s2srm.engine.sleep import Sleeper, address
from s2srm.models.causal import PackedCausalLM
from s2srm.models.export import SavedTemplate, exported_tensors, save_model
from s2srm.models.value import PackedValueModel
from s2srm.packing import Packed, Segment, pack
from s2srm.watchdog import pulse

T = TypeVar("T")
R = TypeVar("R")

EXPORT_GROUP_BYTES = 2**28


class StepInfo(NamedTuple):
    """What one optimiser step was: gradient norm before clipping, and learning rate."""

    grad_norm: float
    lr: float


class Engine(ABC):
    """A model, its optimiser if it is trained, and where they run."""

    module: nn.Module
    """The model itself. Read its parameters only inside `gathered`."""
    device: torch.device
    optimizer: torch.optim.Optimizer | None
    """The optimiser over this rank's pieces of the weights; None where the model is frozen."""
    num_steps: int
    """Optimiser steps taken: the position in the learning-rate schedule."""
    keeps_graphs = False
    """Whether a `train_forward` may wait for its backward while there are other forwards."""
    replicated = False
    """Whether every rank has all `pieces()`."""
    may_sleep = False
    """Whether `sleep` does something: engine.offload is idle, and there is a device to relieve."""

    def __init__(self) -> None:
        self._weights, self._training = Sleeper(), Sleeper()

    @abstractmethod
    def train_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with gradients."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward in evaluation mode, without gradients."""

    @abstractmethod
    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of loss. last: this is the step's last micro-batch."""

    @abstractmethod
    def step(self) -> StepInfo:
        """Clip, update the weights, clear the gradients, advance the learning rate.

        Whoever calls it looks at the norm: one that is not finite ends the run.
        """

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What this rank's optimiser trains."""

    @abstractmethod
    def adopt_masters(self) -> None:
        """Let the model compute with what was written into `pieces()`. All ranks call it."""

    @abstractmethod
    def whole(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Inside, these parameters are whole on every rank, by one gather. All ranks must enter.

        They are to be read or copied, not changed.
        """

    def sleep(self, *, weights: bool = True) -> None:
        """Let masters and moments, and the weights, wait in host memory until they are used.

        Between two steps, not while gradients are being added up. What uses the engine wakes it:
        the weights for a forward, all of it for a backward, a step or `pieces`.
        """
        if not self.may_sleep:
            return
        if self.optimizer is not None and not self._training.is_asleep:
            # It wakes the weights, which have no address while they sleep.
            training = self.training_tensors()
            used = set(map(address, self.weight_tensors()))
            others = [t for t in training if address(t) not in used]
            self._training.sleep(others, self.scratch_tensors())
        if weights and not self._weights.is_asleep:
            self._weights.sleep(self.weight_tensors())

    def wake(self, *, weights_only: bool = False) -> None:
        """What sleeps is back on the device."""
        self._weights.wake()
        if not weights_only:
            self._training.wake()

    @abstractmethod
    def weight_tensors(self) -> list[Tensor]:
        """What this rank holds of the weights that the model computes with."""

    def training_tensors(self) -> list[Tensor]:
        """Masters and moments of this rank."""
        assert self.optimizer is not None
        state = [value for found in self.optimizer.state.values() for value in found.values()]
        moments = [value for value in state if isinstance(value, Tensor) and value.dim() > 0]
        return [*(piece.key for piece in self.pieces()), *moments]

    def scratch_tensors(self) -> list[Tensor]:
        """Buffers that are only used between the first backward and the end of a step."""
        return []

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every whole trained parameter, tied ones once."""
        return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in trained(self.module)}

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, every parameter of `module` is whole on every rank. All ranks must enter."""
        return self.whole(list(self.module.parameters()))

    def export_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of the Hugging Face model `module.lm`, tied parameters once.

        All ranks must run through it; a tensor is valid until the next one is asked for. At most
        EXPORT_GROUP_BYTES (or one parameter) are whole at a time.
        """
        for group in _groups(exported_tensors(self._lm)):
            with self.whole([tensor for _, tensor in group]):
                for name, tensor in group:
                    yield name, tensor.detach()
                    pulse.beat()

    def save(
        self, out_dir: Path, tokenizer: PreTrainedTokenizerBase, template: SavedTemplate
    ) -> None:
        """Write the model in Hugging Face layout with tokenizer and template. All ranks call it."""
        extra = self.module.extra_files() if isinstance(self.module, PackedValueModel) else {}
        with self.whole([tensor for file in extra.values() for tensor in file.values()]):
            copies = {
                name: {key: tensor.detach().clone() for key, tensor in file.items()}
                for name, file in extra.items()
            }
        save_model(self.export_state(), self._lm, tokenizer, template, out_dir, copies)

    @property
    def _lm(self) -> PreTrainedModel:
        assert isinstance(self.module, PackedCausalLM | PackedValueModel)
        return self.module.lm


def _groups(
    named: Iterator[tuple[str, Tensor]],
) -> Iterator[list[tuple[str, Tensor]]]:
    group: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named:
        group.append((name, tensor))
        size += getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
        if size >= EXPORT_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def dummy_batch(device: torch.device | str = "cpu") -> Packed:
    """The smallest batch, for ranks that have run out of data."""
    return pack([Segment((0, 0), 1, weight=0.0)]).to(device)


def run_microbatches(
    engine: Engine,
    microbatches: Sequence[T],
    loss_fn: Callable[[T], Tensor],
) -> Tensor:
    """Forward and backward of every micro-batch; returns this rank's sum of losses, detached.

    loss_fn(microbatch) calls engine.train_forward and returns a scalar that is already divided by
    global counts. Ranks with fewer micro-batches than the others run dummies whose gradients are
    zero, because under ZeRO-3 every rank must run the same number of forwards and backwards. The
    caller then calls `engine.step()`.

    A loss is made of one tensor of the forward's output, as a dummy's is: ZeRO-3 counts how many
    take part in the backward and compares the ranks.
    """
    count = max(1, distributed.max_over_ranks(len(microbatches)))
    total = torch.zeros((), device=engine.device)
    for i in range(count):
        if i < len(microbatches):
            loss = loss_fn(microbatches[i])
            total += loss.detach()
        else:
            loss = 0.0 * engine.train_forward(dummy_batch(engine.device)).sum()
        engine.backward(loss, last=i == count - 1)
        pulse.beat()
    return total


def map_microbatches(engine: Engine, microbatches: Sequence[T], fn: Callable[[T], R]) -> list[R]:
    """[fn(m) for m in microbatches] for an fn that calls the engine once, without gradients.

    Ranks with fewer micro-batches than the others run dummy forwards.
    """
    # Agreed on first: once a rank is in a forward, the others must be in one too.
    count = distributed.max_over_ranks(len(microbatches))
    results: list[R] = []
    for microbatch in microbatches:
        results.append(fn(microbatch))
        pulse.beat()
    for _ in range(count - len(microbatches)):
        engine(dummy_batch(engine.device))
    return results
