"""Hooks on the weights of a converted model: they refuse gradients that came by the weight and not by its layer."""

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from falign._attached import Feedback
    from falign._wiring import Wiring


class Guard:
    """A hook on a weight: refuses a gradient that came without the layer having run, hence by its weight alone."""

    def __init__(self, part: "Feedback") -> None:
        self.part: Callable[[], Feedback | None] = ref(part)

    def __call__(self, weight: Tensor) -> None:
        """Raise where no pass of the layer explains the gradient.

        Raises:
            RuntimeError: the weight was used by other means than its layer.
        """
        part = self.part()  # a weak reference: a weight that outlives its model must not keep the feedback alive
        if part is None:
            return
        parts = [other for guard in guards_of(weight) if (other := guard.part()) is not None]  # of all its uses
        task = torch._C._current_graph_task_id()
        if any(use.untraceable or use.last_pass == use.wiring.passes for use in parts):
            return
        if any(task in met for use in parts for met in (use.backwards, use.true_backwards, use.learning_backwards)):
            return
        if part.wiring.lenient or _is_penalty(weight):
            return
        raise RuntimeError(
            f"the weight of layer {part.name!r} received a gradient, but the layer itself did not run: its weight is "
            "used by other means (F.linear, @, layer.forward, compiled code of before convert), and the error returns "
            "through it by backpropagation. Call the layer, name it in skip=, or call torch.compiler.reset()"
        )


class Follower:
    """A hook on a weight: gives its gradient to its learned feedback as well.

    Where processes train together, B takes what the weight's ``grad`` has become when the backward is through.
    """

    def __init__(self, part: "Feedback", weight: Tensor) -> None:
        self.part: Callable[[], Feedback | None] = ref(part)
        self.weight: Callable[[], Tensor | None] = ref(weight)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Give W and B; None where one of them is gone, or B stands still."""
        part, weight = self.part(), self.weight()
        matrix = None if part is None else part.B
        return None if weight is None or matrix is None or not matrix.requires_grad else (weight, matrix)

    def __call__(self, gradient: Tensor) -> None:
        """Add the gradient of a backward to that of B, if the backward met B."""
        part = self.part()
        if part is None or part.B is None or not part.B.requires_grad or torch.is_grad_enabled():
            return
        task = torch._C._current_graph_task_id()
        if part.wiring.measuring:
            return
        met = part.met(task)
        if distributed.is_available() and distributed.is_initialized():
            AveragedGradients.of(part.wiring, task).note(self, met)
        if met:
            gradient = part.learned_gradient(gradient)
            part.B.grad = gradient if part.B.grad is None else part.B.grad + gradient


class AveragedGradients:
    """Gradients of followed weights in one backward of processes that train together, and what of it each B is given.

    DistributedDataParallel averages all that a weight has in ``grad`` (that of earlier backwards as well) in a callback
    of autograd's, behind all hooks; what a callback queues runs behind that. A weight that this process did not use may
    receive the gradient of the others. FSDP averages the gradient of B, and has taken that of the weight away by then.
    """

    def __init__(self, task: int, followers: list[Follower]) -> None:
        self.task = task
        self.met: set[Follower] = set()
        self.passed: set[Follower] = set()  # by a backward that takes no notice of B
        self._before: list[tuple[Follower, bool, Tensor | None, Tensor | None]] = []
        for follower in followers:
            if (pair := follower.pair()) is not None:
                of_weight, of_feedback = pair[0].grad, pair[1].grad
                equal = _are_equal(of_weight, of_feedback)
                kept = None if equal or of_weight is None else of_weight.detach().clone()
                self._before.append((follower, equal, kept, of_feedback))

    @classmethod
    def of(cls, wiring: "Wiring", task: int) -> "AveragedGradients":
        """Give those of the running backward; the first time queue what ends it."""
        gradients = wiring.averaged
        if gradients is None or gradients.task != task:
            weights = {id(weight): weight for *_, weight in wiring.layers if isinstance(weight, Tensor)}
            followers = [one for weight in weights.values() for one in followers_of(weight)]
            gradients = wiring.averaged = cls(task, followers)
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(gradients.finish))
        return gradients

    def note(self, follower: Follower, met: bool) -> None:
        """Note that the gradient of a weight arrives, and whether B takes part in it."""
        (self.met if met else self.passed).add(follower)

    @torch.no_grad()
    def finish(self) -> None:
        """Give every B what its weight has received."""
        for follower, equal, of_weight, of_feedback in self._before if self.met else ():
            pair = follower.pair()
            if follower in self.passed or pair is None or pair[0].grad is None:
                continue
            part, gradient = follower.part(), pair[0].grad
            assert part is not None
            # Unequal: B lacks what came by backpropagation, or has what the optimizer's zero_grad did not reach.
            if not equal and of_weight is not None:
                gradient = gradient - of_weight
            gradient = part.learned_gradient(gradient)
            pair[1].grad = gradient if equal or of_feedback is None else of_feedback + gradient
        self._before = []


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Compare two gradients; none is zero."""
    if one is None or other is None:
        given = other if one is None else one
        return given is None or (given.layout is torch.strided and not given.any())
    return one.layout is other.layout is torch.strided and torch.equal(one, other)


def followers_of(weight: Tensor) -> list[Follower]:
    """List the followers that are attached to a parameter."""
    return [hook for hook in (weight._backward_hooks or {}).values() if isinstance(hook, Follower)]


def _is_penalty(weight: Tensor) -> bool:
    """Tell whether a gradient is that of a penalty on the size of the weight alone, which carries no error anywhere."""
    gradient, weight = weight.grad, weight.detach()
    if gradient is None or gradient.is_sparse:
        return False
    with torch.no_grad():
        for shape in (weight, weight.sign()):  # of |w|² and of |w|₁
            norms = float(gradient.norm()) * float(shape.norm())
            if norms == 0 or float((gradient * shape).sum()) > (1 - 1e-5) * norms:
                return True
    return False


def guards_of(weight: Tensor) -> list[Guard]:
    """List the guards that are attached to a parameter."""
    hooks = getattr(weight, "_post_accumulate_grad_hooks", None) or {}
    return [hook for hook in hooks.values() if isinstance(hook, Guard)]


def shared_weight(model: nn.Module) -> str | None:
    """Say which parameter of a model takes the rule of another one already."""
    for name, parameter in model.named_parameters():
        for part in (guard.part() for guard in guards_of(parameter)):
            if part is not None:
                return (
                    f"parameter {name!r} is also a weight of a model that is converted already, to rule "
                    f"{part.wiring.rule.name!r}, and one weight takes one rule: call falign.revert on that model "
                    "first, or convert the model that both are parts of"
                )
    return None


def unguard(weight: Tensor) -> None:
    """Take the guards and followers off a parameter."""
    hooks = getattr(weight, "_post_accumulate_grad_hooks", None) or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, Guard)]:
        del hooks[key]
    hooks = weight._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, Follower)]:
        del hooks[key]


def matrices_of(layer: nn.Module) -> list[nn.Parameter]:
    """List the matrices among a layer's parameters, or those that its weight is made of, its feedback left out.

    Left out, too, are the tensors that ``functional_call`` puts in their place: they may be no leaves of a graph.
    """
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if parameter.dim() > 1 and name.split(".")[0] != "feedback" and isinstance(parameter, nn.Parameter)
    ]


_looked_at: WeakSet[Optimizer] = WeakSet()
_watching: list[Any] = []


def watch_optimizers() -> None:
    """Check every optimizer once, before its first step: it should move learned feedback together with its weights."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_warn_of_standing_feedback))


def _warn_of_standing_feedback(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    """Warn of learned feedback that will not come closer to its weights: pre-hook of all optimizers' steps."""
    if optimizer in _looked_at:
        return
    _looked_at.add(optimizer)
    here = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group, part in _learned(optimizer):
        rule = f"rule {part.wiring.rule.name!r}"
        if id(part.B) not in here:
            text = (
                f"{rule} without its feedback in the optimizer, which has the weight of layer {part.name!r} but not "
                "its B: B never learns, which is feedback alignment; make the optimizer after falign.convert"
            )
        elif part.wiring.rule.wiring == "layerwise" and not group.get("weight_decay", 0):
            text = (
                f"{rule} without weight_decay in the optimizer: feedback and weights take the same steps and never "
                "come closer, which is feedback alignment with B in motion; give weight_decay"
            )
        else:
            continue
        warnings.warn(text, stacklevel=4)
        return


def _learned(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], "Feedback"]]:
    # By the guards of the weights: an optimizer made before convert does not have the feedback itself.
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for guard in guards_of(weight):
                part = guard.part()
                if part is not None and part.wiring.rule.learned and weight.requires_grad:
                    yield group, part
