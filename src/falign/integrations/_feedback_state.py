"""State of a converted model that its ``state_dict`` lacks, for checkpoints of other frameworks."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from falign._convert import feedback_state, load_feedback_state
from falign._wiring import converted
from falign.measure import Monitor

FILE = "falign.safetensors"
"""File of a checkpoint folder."""
_MONITOR = "monitor"


class FeedbackState:
    """Feedback of a converted model, and what a monitor has recorded, as an object with a state.

    It is what ``Accelerator.register_for_checkpointing`` and ``torch.distributed.checkpoint`` take. Feedback that moves
    is in the model's own ``state_dict``; fixed feedback is a function of seed, layer and family. With this a checkpoint
    holds that as well, and goes on with the very B, whatever the script converts with by then.

    Args:
        model: A converted model.
        monitor: Its monitor.

    Raises:
        ValueError: The model is not converted.
    """

    def __init__(self, model: nn.Module, monitor: Monitor | None = None) -> None:
        converted(model)
        self._model, self._monitor = model, monitor

    def state_dict(self) -> dict[str, Any]:
        """Copy the feedback, {"feedback": {layer name: B}}, and with a monitor its count and records, "monitor"."""
        state: dict[str, Any] = {"feedback": feedback_state(self._model)}
        return state if self._monitor is None else {**state, _MONITOR: self._monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put everything back; records that no monitor is there to take are left out.

        Raises:
            ValueError: It is the state of another network, or none.
        """
        if not isinstance(state, dict) or not isinstance(state.get("feedback"), dict):
            raise ValueError("this is no state of feedback: expected what FeedbackState.state_dict() gave")
        load_feedback_state(self._model, state["feedback"])
        if self._monitor is not None and _MONITOR in state:
            self._monitor.load_state_dict(state[_MONITOR])

    def save(self, folder: Path) -> None:
        """Write the state into a folder that exists, whole or not at all."""
        from safetensors.torch import save_file

        state = self.state_dict()
        tensors: dict[str, Tensor] = {name: B.contiguous() for name, B in state["feedback"].items()}
        unfinished = folder / f".{FILE}.{os.getpid()}"
        try:
            save_file(tensors, unfinished, metadata={_MONITOR: json.dumps(state.get(_MONITOR))})
            unfinished.replace(folder / FILE)
        finally:
            unfinished.unlink(missing_ok=True)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote there.

        Raises:
            ValueError: It holds none, or that of another network.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / FILE, "pt") as file:
                feedback = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
                monitor = json.loads((file.metadata() or {}).get(_MONITOR, "null"))
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"{folder / FILE} cannot be read ({error}): the callback writes it at every save. Name the folder with "
                "resume=, or go on without the callback"
            ) from None
        self.load_state_dict({"feedback": feedback} | ({} if monitor is None else {_MONITOR: monitor}))
