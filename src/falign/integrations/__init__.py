"""Falign inside other frameworks: callbacks for Lightning and Transformers, feedback in checkpoints, loggers.

Nothing of these packages is imported before a function that needs it is called.
"""

from falign.integrations._callbacks import lightning_callback, transformers_callback, transformers_loss
from falign.integrations._feedback_state import FeedbackState
from falign.integrations._loggers import MLflowLogger, TensorBoardLogger, WandbLogger

__all__ = [
    "FeedbackState",
    "MLflowLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "lightning_callback",
    "transformers_callback",
    "transformers_loss",
]
