"""``ConservationLaw``: the law of a model's neurons, checked while the model trains."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from falign._delivery import transformed
from falign._survey import call
from falign._wiring import converted, is_measured, unwrapped, unwrapped_optimizer
from falign.measure.law._balance import Balance
from falign.measure.law._downstream import DownstreamBatchNorm
from falign.measure.law._laws import Law, WatchedLaw, find_laws
from falign.measure.law._rates import Rates, run_after_closure, skips_step
from falign.measure.law._report import LawReport, rows_of
from falign.measure.law._trace import trace
from falign.measure.law._weights import sums_cached


class ConservationLaw:
    """Checks while a model trains that every neuron's ``C = ½|w_in|² + ½b² - ⟨B, w_out⟩`` changes as its rule says.

    The law holds where everything between a layer and the next scales each neuron by factors that do not depend on its
    size (ReLU, dropout, pooling). Then ``⟨w, ∇w⟩ + b∇b = ⟨B, ∇W⟩`` for the gradients that a layerwise rule takes, in
    every batch, and steps of plain gradient descent change C by ``½Ση²|∇|²`` and nothing else. The instrument finds
    the pairs of layers by itself, says for which of them the law holds and why it does not for the others, and
    accounts for weight decay, moving feedback and changing rates. Queries and keys, which no B is between, have a law
    with each other, ``½|w_q|² + ½b_q² - ½|w_k|² - ½b_k²`` under every rule. What is left, the residual, is rounding if
    all gradients were the rule's, and more if one was not::

        law = falign.measure.ConservationLaw(model, optimizer)
        ...                                                       # the training loop as it is
        print(law.report())

    The start is the weights before the first step that it sees. It reads the gradients when ``optimizer.step`` is
    called: they may have been accumulated, unscaled, or clipped by their common norm, and steps that a gradient scaler
    skips do not count. Nothing of the training changes.

    Limits:
        - The loss must be a function of the model's output alone, without a penalty on weights or activations.
        - Gradients may be scaled all together, not layer by layer.
        - Every pass must run the operations of the pass that was followed, at the same precision: no layers skipped,
          no autograd function whose backward is not its forward's, such as a reversed gradient. Else a correct
          training is reported as broken.
        - Parameters of a second optimizer count as not trained.
        - Under bp, sign-symmetric, learned and moving feedback, a change of the weights by anything but the optimizer
          is noticed only if it changes their length.

    Args:
        model: A converted model, or a compiled or data-parallel wrapper of it.
        optimizer: The optimizer that trains it.
        example: An input of the model (a tuple: positional arguments, a dict: keyword arguments) on which it is run
            once, to find which neurons are which inputs of the next layer. Default: the input of the first forward
            pass with gradients through ``model``.

    Raises:
        ValueError: The model is not converted, the optimizer has none of its parameters, a parameter is not finite,
            the two have a law already, or the model does not run on the example.

    Source: Robertson and Koyejo 2024 (ICML), the law at the level of neurons, derived anew here with the exact terms
    of discrete steps.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, example: Any = None) -> None:
        self.model = unwrapped(model)
        self.optimizer = optimizer = unwrapped_optimizer(optimizer)
        self.steps = 0
        self._laws: dict[str, WatchedLaw] | None = None
        self._pending_state: dict[str, Any] | None = None
        self._batch_norm_hooks: list[Any] = []
        self._example_run: Callable[[], Any] | None = None
        self._followed_mode = model.training
        _check(self.model, optimizer)
        if any(law.model is self.model for law in attached(optimizer)):
            raise ValueError("this model and optimizer have a law already: use it, or detach() it first")
        self._first = model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        self._handles: list[Any] = [self._first, optimizer.register_step_pre_hook(self._before_step)]
        if example is not None:
            try:
                self._follow(partial(call, self.model, example))
            except Exception:
                self.detach()
                raise

    @property
    def laws(self) -> tuple[Law, ...]:
        """The law of each layer that feeds another, in running order.

        Raises:
            ValueError: No forward pass was seen yet.
        """
        return tuple(watched.current() for watched in self._watched().values())

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
        """{layer: C(T) - C(0) less all that is accounted for, of every neuron}; the drift, if nothing can be.

        Raises:
            ValueError: No step was seen yet, or a parameter is not finite.
        """
        drifts, laws = self.drift(), self._watched()
        return {
            name: drifts[name] if laws[name].departed else balance.residual() for name, balance in self._moved().items()
        }

    @sums_cached()
    def report(self) -> LawReport:
        """The largest drift and residual of each layer, relative to the terms of C.

        Raises:
            ValueError: No step was seen yet, or a parameter is not finite.
        """
        return LawReport(steps=self.steps, laws=rows_of(self.laws, self._moved(), self.changes(), self.residual()))

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors, numbers and texts that a resumed run needs beside the model's and optimizer's state.

        Raises:
            ValueError: No forward pass was seen yet.
        """
        if self._pending_state is not None:
            return self._pending_state
        laws = {
            name: {**watched.balance.state(), "departed": watched.departed}
            for name, watched in self._watched().items()
            if watched.balance is not None
        }
        return {"steps": self.steps, "laws": laws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a ``state_dict``; the model and the optimizer must be resumed from the same moment.

        Raises:
            ValueError: The state is of other layers.
        """
        if self._laws is None:
            self._pending_state = state
            return
        here = {name for name, watched in self._laws.items() if watched.balance is not None}
        if here != set(state["laws"]):
            came = ", ".join(sorted(state["laws"])) or "none"
            raise ValueError(
                f"the state is of the layers {came}, expected {', '.join(sorted(here)) or 'none'}: load it into the "
                "law of the same model"
            )
        self.steps = state["steps"]
        for name, watched in self._laws.items():
            if watched.balance is not None:
                watched.balance.load(state["laws"][name])
                watched.departed = watched.departed or state["laws"][name]["departed"]

    def detach(self) -> None:
        """Remove all hooks; the results so far can still be read."""
        for handle in (*self._handles, *self._batch_norm_hooks):
            handle.remove()
        self._handles, self._batch_norm_hooks, self._example_run = [], [], None

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook until the first step: without an example, the first training pass is followed."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or transformed() or is_measured(self.model):
            return
        if self._laws is None:
            self._follow(partial(self.model, *args, **kwargs))
        elif self.model.training != self._followed_mode:
            self._mode_changed()

    @sums_cached()
    def _follow(self, run: Callable[[], Any]) -> None:
        for handle in self._batch_norm_hooks:
            handle.remove()
        self._example_run, self._followed_mode, self._batch_norm_hooks = run, self.model.training, []
        followed = trace(self.model, run)
        self._laws = find_laws(self.model, followed, self.optimizer)
        for watched in self._laws.values():
            for target in watched.balance.targets if watched.balance is not None else ():
                if isinstance(target, DownstreamBatchNorm):
                    self._batch_norm_hooks.append(
                        target.layer.register_forward_pre_hook(partial(self._note_batch, target))
                    )
        if self._pending_state is not None:
            loaded, self._pending_state = self._pending_state, None
            self.load_state_dict(loaded)

    def _note_batch(self, target: DownstreamBatchNorm, layer: nn.Module, args: tuple) -> None:
        """Forward pre-hook of a batch normalisation: keep its batch, unless the pass is one of ``falign.measure``."""
        if not (torch.compiler.is_compiling() or is_measured(self.model)):
            target.note(layer, args)

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the optimizer's step."""
        if skips_step(optimizer):
            return None
        wrapped = run_after_closure(args, kwargs, self._account) if isinstance(optimizer, SGD) else None
        return wrapped or self._account()  # a closure makes the gradients within the step, so it is wrapped

    @sums_cached()
    def _account(self) -> None:
        if self._laws is None:
            return
        if self.model.training != self._followed_mode:
            self._mode_changed()
        self._example_run = None  # it holds a batch
        self._first.remove()
        rates = Rates(self.optimizer)
        for watched in self._laws.values():
            if watched.balance is not None and self.steps == 0:
                watched.balance.begin(rates)  # weights may have been loaded since the pass that was followed
            watched.step(rates)
        self.steps += 1

    def _mode_changed(self) -> None:
        """Follow the neurons anew if that is still possible; else the law is lost, for a mode may change operations.

        Dropout and batch normalisation are other operations in training than in evaluation.
        """
        if self._example_run is not None:
            self._pending_state = self.state_dict() if self.steps else None
            self._follow(self._example_run)
            return
        for watched in self._watched().values():
            mode = "training" if self.model.training else "evaluation"
            watched.departed = watched.departed or (f"steps in {mode} mode, in which it was not followed", "O(1)")

    def _watched(self) -> dict[str, WatchedLaw]:
        if self._laws is None:
            loaded = "; the state that was loaded is used from then on" if self._pending_state is not None else ""
            raise ValueError(
                "no forward pass was seen yet, so it is not known which neurons feed which layer: run the model "
                "through the module that was given here, or give example=" + loaded
            )
        return self._laws

    def _balances(self) -> dict[str, Balance]:
        laws = self._watched()
        _check_finite(self.model)
        return {name: watched.balance for name, watched in laws.items() if watched.balance is not None}

    def _moved(self) -> dict[str, Balance]:
        balances = self._balances()
        if self.steps == 0:
            raise ValueError("no step of the optimizer was seen yet, so nothing has changed: train, then ask")
        return balances


def attached(optimizer: Optimizer) -> list[ConservationLaw]:
    """List the laws that are attached to an optimizer."""
    hooks = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return [law for law in hooks if isinstance(law, ConservationLaw)]


def _check(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse a model without feedback, an optimizer that does not train it, and parameters that are not finite.

    Raises:
        ValueError: The model is not converted, the optimizer has none of its parameters, or one is not finite.
    """
    converted(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in parameters for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the {type(optimizer).__name__} has none of the parameters of this {type(model).__name__}: give the "
            "optimizer that trains it"
        )
    _check_finite(model)


def _check_finite(model: nn.Module) -> None:
    """Refuse parameters that are not finite.

    Raises:
        ValueError: One is not; it is named.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"parameter {name!r} holds numbers that are not finite, so there is no law to check: the training has "
                "diverged, lower its learning rate"
            )
