"""The conservation law of a model in training, as an instrument."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from falign._delivery import transformed
from falign._survey import call
from falign._wiring import converted, is_measured, unwrapped
from falign.measure.law._balance import Balance
from falign.measure.law._downstream import DownstreamBatchNorm, sums_cached
from falign.measure.law._laws import Law, WatchedLaw, find_laws
from falign.measure.law._rates import Rates, run_after_closure, skips_step
from falign.measure.law._report import LawReport, rows_of
from falign.measure.law._trace import trace

# What must be so before the law of a model can be looked at.


def _check(model: nn.Module, optimizer: Optimizer) -> None:
    """The model must be converted and finite, and the optimizer must train it.

    Raises:
        ValueError: One of these is not so.
    """
    converted(model)
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the {type(optimizer).__name__} has none of the parameters of this {type(model).__name__}: give the "
            "optimizer that trains it"
        )
    _check_finite(model)


def _check_finite(model: nn.Module) -> None:
    """All parameters must be finite.

    Raises:
        ValueError: One is not; it is named.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"parameter {name!r} holds numbers that are not finite, so the law cannot be looked at: the training "
                "has diverged, lower its rate"
            )


class ConservationLaw:
    """Watches that every neuron's ``C = ½|w_in|² + ½b² - ⟨B, w_out⟩`` changes as its rule says, to rounding.

    Between a layer and the next let there be only what scales each neuron by something that does not depend on its
    size (ReLU, dropout, pooling). Then ``⟨w, ∇w⟩ + b∇b = ⟨B, ∇W⟩`` for the gradients that a layerwise rule takes, in
    every batch, and steps of plain gradient descent change C by ``½Ση²|∇|²`` and nothing else. The instrument finds
    the pairs of layers by itself, says for which the law holds and why not of the others, accounts for weight decay,
    moving feedback and changing rates, and leaves a residual that is rounding exactly when all gradients were right::

        law = falign.measure.ConservationLaw(model, optimizer)
        ...                                                       # the training loop as it is
        print(law.report())

    The start is the weights before the first step that it sees. It reads gradients when ``optimizer.step`` is called,
    so accumulated, clipped (as a whole) and unscaled ones are right, and steps that a gradient scaler skips do not
    count. Nothing of the training changes.

    Limits: the loss must be a function of the model's output alone, with no penalty on weights or activations, and
    gradients may be scaled all together but not layer by layer; every pass must take the way of the pass that was
    followed (no layers skipped, no autograd function whose backward is not its forward's, such as a reversed gradient)
    at the same precision, or a correct training is reported as broken; a second optimizer's parameters count as not
    trained. Of bp, sign, learned and moving feedback a change of weights by another hand is seen that changes their
    length.

    Args:
        model: A converted model; compiled and data-parallel wrappers are looked through.
        optimizer: What trains it.
        example: An input of the model (a tuple: positional arguments, a dict: keyword arguments) that shows which
            neurons are which inputs of the next layer. Default: the input of the first forward pass with gradients,
            called through the model as it is given here.

    Raises:
        ValueError: The model is not converted, the optimizer has none of its parameters, a parameter is not finite,
            the two have a law already, or the model does not run on the example.

    Source: Robertson and Koyejo 2024 (ICML), the law at the level of neurons, derived anew here with the exact terms
    of discrete steps.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, example: Any = None) -> None:
        self.model = unwrapped(model)
        self.optimizer = optimizer
        self.steps = 0
        self._entries: dict[str, WatchedLaw] | None = None
        self._loaded: dict[str, Any] | None = None
        self._noting: list[Any] = []
        self._run: Callable[[], Any] | None = None
        self._training = model.training
        _check(self.model, optimizer)
        if any(law.model is self.model for law in attached(optimizer)):
            raise ValueError("this model and optimizer have a law already: use it, or detach() it first")
        self._first = model.register_forward_pre_hook(self._see, prepend=True, with_kwargs=True)
        self._handles: list[Any] = [self._first, optimizer.register_step_pre_hook(self._before)]
        if example is not None:
            try:
                self._find(partial(call, self.model, example))
            except Exception:
                self.detach()
                raise

    @property
    def laws(self) -> tuple[Law, ...]:
        """A law a layer that feeds another, in running order.

        Raises:
            ValueError: No forward pass was seen yet.
        """
        return tuple(entry.current() for entry in self._found().values())

    @sums_cached()
    def value(self) -> dict[str, Tensor]:
        """{layer: C of every neuron, float64}, with the weights as they are now.

        Raises:
            ValueError: No forward pass was seen yet, or a parameter is not finite.
        """
        return {name: balance.incoming() - balance.outgoing() for name, balance in self._balances().items()}

    @sums_cached()
    def changes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{layer: (change of ½|w|² + ½b², change of the alignment term, coefficient included) of every neuron}.

        Raises:
            ValueError: No step was seen yet, or a parameter is not finite.
        """
        return {name: balance.changes() for name, balance in self._moved().items()}

    def drift(self) -> dict[str, Tensor]:
        """{layer: C(T) - C(0) of every neuron}, O(η) for a law that is exact.

        Raises:
            ValueError: No step was seen yet, or a parameter is not finite.
        """
        return {name: incoming - outgoing for name, (incoming, outgoing) in self.changes().items()}

    @sums_cached()
    def residual(self) -> dict[str, Tensor]:
        """{layer: C(T) - C(0) less all that is accounted for, of every neuron}; the drift, where nothing is.

        Raises:
            ValueError: No step was seen yet, or a parameter is not finite.
        """
        drifts, entries = self.drift(), self._found()
        return {
            name: drifts[name] if entries[name].departed else balance.residual()
            for name, balance in self._moved().items()
        }

    @sums_cached()
    def report(self) -> LawReport:
        """The largest drift and residual of each layer, relative to the terms of C.

        Raises:
            ValueError: No step was seen yet, or a parameter is not finite.
        """
        return LawReport(steps=self.steps, laws=rows_of(self.laws, self._moved(), self.changes(), self.residual()))

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts that a resumed run needs beside the model's and the optimizer's state.

        Raises:
            ValueError: No forward pass was seen yet.
        """
        if self._loaded is not None:
            return self._loaded
        laws = {
            name: {**entry.balance.state(), "departed": entry.departed}
            for name, entry in self._found().items()
            if entry.balance is not None
        }
        return {"steps": self.steps, "laws": laws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run stopped whose ``state_dict`` this is; the model's own state must be loaded as well.

        Raises:
            ValueError: It is of other layers.
        """
        if self._entries is None:
            self._loaded = state
            return
        here = {name for name, entry in self._entries.items() if entry.balance is not None}
        if here != set(state["laws"]):
            came = ", ".join(sorted(state["laws"])) or "none"
            raise ValueError(
                f"the state is of the layers {came}, expected {', '.join(sorted(here)) or 'none'}: load it into the "
                "law of the same model"
            )
        self.steps = state["steps"]
        for name, entry in self._entries.items():
            if entry.balance is not None:
                entry.balance.load(state["laws"][name])
                entry.departed = entry.departed or state["laws"][name]["departed"]

    def detach(self) -> None:
        """Take all hooks off; what was found can still be read."""
        for handle in (*self._handles, *self._noting):
            handle.remove()
        self._handles, self._noting, self._run = [], [], None

    def _see(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook until the first step: the first pass of the training is the example."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or transformed() or is_measured(self.model):
            return
        if self._entries is None:
            self._find(partial(self.model, *args, **kwargs))
        elif self.model.training != self._training:
            self._mode_changed()

    @sums_cached()
    def _find(self, run: Callable[[], Any]) -> None:
        for handle in self._noting:
            handle.remove()
        self._run, self._training, self._noting = run, self.model.training, []
        followed = trace(self.model, run)
        self._entries = find_laws(self.model, followed, self.optimizer)
        for entry in self._entries.values():
            for target in entry.balance.targets if entry.balance is not None else ():
                if isinstance(target, DownstreamBatchNorm):
                    self._noting.append(target.layer.register_forward_pre_hook(partial(self._note, target)))
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            self.load_state_dict(loaded)

    def _note(self, target: DownstreamBatchNorm, layer: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a batch normalisation: passes that only measure are no part of the training."""
        if not (torch.compiler.is_compiling() or is_measured(self.model)):
            target.note(layer, args)

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the optimizer's step."""
        if skips_step(optimizer):
            return None
        wrapped = run_after_closure(args, kwargs, self._step) if isinstance(optimizer, SGD) else None
        return wrapped or self._step()  # gradients are there behind the closure

    @sums_cached()
    def _step(self) -> None:
        if self._entries is None:
            return
        if self.model.training != self._training:
            self._mode_changed()
        self._run = None
        self._first.remove()
        rates = Rates(self.optimizer)
        for entry in self._entries.values():
            if entry.balance is not None and self.steps == 0:
                entry.balance.begin(rates)
            entry.step(rates)
        self.steps += 1

    def _mode_changed(self) -> None:
        """Follow the neurons anew in the mode that the training has; one that changes later may change what they do."""
        if self._run is not None:
            self._loaded = self.state_dict() if self.steps else None
            self._find(self._run)
            return
        for entry in self._found().values():
            mode = "training" if self.model.training else "evaluation"
            entry.departed = entry.departed or (f"steps in {mode} mode, in which it was not followed", "O(1)")

    def _found(self) -> dict[str, WatchedLaw]:
        if self._entries is None:
            loaded = "; the state that was loaded is used from then on" if self._loaded is not None else ""
            raise ValueError(
                "no forward pass was seen yet, so it is not known which neurons feed which layer: run the model "
                "through the module that was given here, or give example=" + loaded
            )
        return self._entries

    def _balances(self) -> dict[str, Balance]:
        entries = self._found()
        _check_finite(self.model)
        return {name: entry.balance for name, entry in entries.items() if entry.balance is not None}

    def _moved(self) -> dict[str, Balance]:
        balances = self._balances()
        if self.steps == 0:
            raise ValueError("no step of the optimizer was seen yet, so nothing has changed: train, then ask")
        return balances


def attached(optimizer: Optimizer) -> list[ConservationLaw]:
    """The laws that watch an optimizer."""
    hooks = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return [law for law in hooks if isinstance(law, ConservationLaw)]
