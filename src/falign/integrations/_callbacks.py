"""Public functions that make callbacks; the classes are of the frameworks, and imported only when one is made."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from falign._outputs import Output, pick
from falign.measure import Logger
from falign.measure._passes import Loss
from falign.rules import Rule

if TYPE_CHECKING:
    import lightning.pytorch
    import transformers

_IGNORED = -100
"""Label that counts for no loss of Transformers."""


def lightning_callback(
    rule: str | Rule | type[Rule] | None = "fa",
    *,
    module: str = "",
    options: Mapping[str, Any] | None = None,
    loss_fn: Loss | None = None,
    every: int = 100,
    unpack: Callable[[Any], tuple[Any, Any]] | None = None,
    logger: Logger | None = None,
) -> "lightning.pytorch.Callback":
    """Make a callback for Lightning's ``Trainer``: it converts, measures, logs, and keeps the feedback in checkpoints.

    The model is converted when ``fit`` sets up, before ``configure_optimizers``, so that learned feedback is among the
    parameters. What is measured goes to all loggers of the trainer, at its ``global_step``; the callback's ``monitor``
    has the records. ``fit(model, ckpt_path=...)`` goes on with the very feedback of the checkpoint.

    Args:
        rule: The rule, as for ``falign.convert``; None: the model is converted already, as it is on a second ``fit``.
        module: Name of the module within the LightningModule that ``training_step`` calls, such as "model"; empty is
            the LightningModule itself, where ``training_step`` calls ``self(x)``. Direct rules take the error at its
            output.
        options: Further arguments of ``falign.convert``, {name: value}. ``example`` is the LightningModule's
            ``example_input_array``, if it has one.
        loss_fn: (output, y) -> scalar, which turns measuring on: every so many batches, before their step.
        every: Measure at the first batch and at every so many-th after it.
        unpack: Batch -> (x, y), what ``loss_fn`` and the module are given; by default the batch is this pair.
        logger: Another logger, ``falign.integrations`` has some; it is yours to close.

    Returns:
        The callback; its ``monitor`` is a ``falign.measure.Monitor`` from the beginning of the training on, else None.

    Raises:
        ImportError: Lightning is not installed.
    """
    try:
        from falign.integrations._lightning import FeedbackAlignmentCallback
    except ModuleNotFoundError as error:
        raise _missing(error, "lightning") from None
    return FeedbackAlignmentCallback(
        rule,
        module=module,
        options={} if options is None else dict(options),
        loss_fn=loss_fn,
        every=every,
        unpack=unpack,
        logger=logger,
    )


def transformers_callback(
    *,
    probe: Mapping[str, Any] | None = None,
    every: int = 100,
    loss_fn: Loss | None = None,
    logger: Logger | None = None,
    resume: str | Path | None = None,
) -> "transformers.TrainerCallback":
    """Make a callback for Transformers' ``Trainer``: it measures, logs, and keeps the feedback in checkpoints.

    The model is to be converted before the ``Trainer`` is made. What is measured is appended to the trainer's
    ``state.log_history``, which ``trainer_state.json`` keeps; the callback's ``monitor`` has the records. Every
    checkpoint gets a file ``falign.safetensors``, and ``train(resume_from_checkpoint=True)`` goes on with it.

    Args:
        probe: A batch with "labels", on which is measured throughout, as ``Trainer`` shows its callbacks no batch.
            None measures nothing.
        every: Measure before the first step and before every so many-th after it.
        loss_fn: (output, labels) -> scalar; by default ``transformers_loss``.
        logger: Where every measurement is logged as well; it is yours to close.
        resume: The checkpoint that ``train`` resumes from, if it is none of ``output_dir``.

    Returns:
        The callback; its ``monitor`` is a ``falign.measure.Monitor`` from the beginning of the training on, else None.

    Raises:
        ImportError: Transformers or Accelerate is not installed.
        ValueError: The probe has no labels.
    """
    if probe is not None and "labels" not in probe:
        raise ValueError(f"probe has {', '.join(map(repr, probe)) or 'nothing'}, expected a batch with 'labels'")
    try:
        from falign.integrations._transformers import FeedbackAlignmentCallback
    except ModuleNotFoundError as error:
        raise _missing(error, "hf") from None
    return FeedbackAlignmentCallback(
        probe=probe, every=every, loss_fn=loss_fn, logger=logger, resume=None if resume is None else Path(resume)
    )


def transformers_loss(model: nn.Module, *, output: Output = "logits") -> Callable[..., Tensor]:
    """Make the function for ``Trainer(compute_loss_func=...)``: the model's own loss, taken from what it returned.

    A model of Transformers computes its loss inside its forward, from logits that no error of a direct rule reaches
    through ``output="logits"``. Computed from what the model returns, it meets them. It is the loss that the model has
    for its task (``model.loss_function``), normalised over accumulated batches as ``Trainer`` asks for.

    Args:
        model: A model of Transformers with a task, converted or not.
        output: Which of its outputs the loss is of, as for ``falign.convert``.

    Returns:
        (outputs, labels, num_items_in_batch=None) -> loss, a scalar.

    Raises:
        TypeError: The model has no loss of its own, or one that needs more than logits and labels.
    """
    own: Callable[..., Tensor] | None = getattr(model, "loss_function", None)
    if own is None:
        raise TypeError(f"{type(model).__name__} has no loss_function of its own: write a function (outputs, labels)")
    config: Any = model.config
    known = {"config": config, "vocab_size": getattr(config.get_text_config(), "vocab_size", None)}
    parameters = signature(own).parameters
    places = ("logits", "pooled_logits", "labels", "num_items_in_batch", *known)
    lacking = [
        name
        for name, each in parameters.items()
        if each.default is Parameter.empty and each.kind is not Parameter.VAR_KEYWORD and name not in places
    ]
    if lacking:
        raise TypeError(
            f"the loss of {type(model).__name__} needs {', '.join(lacking)}, expected logits and labels alone: write a "
            "function (outputs, labels)"
        )

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = pick(outputs, output)
        given = {"logits": logits, "pooled_logits": logits, "labels": labels, **known}
        if num_items_in_batch is None or "num_items_in_batch" in parameters:
            given["num_items_in_batch"] = num_items_in_batch
            return own(**{name: value for name, value in given.items() if name in parameters})
        mean = own(**{name: value for name, value in given.items() if name in parameters})
        return mean * (labels != _IGNORED).sum() / num_items_in_batch

    return loss


def _missing(error: ModuleNotFoundError, extra: str) -> ImportError:
    package = (error.name or "").partition(".")[0]
    return ImportError(f'the package {package} is not installed: pip install "falign[{extra}]"')
