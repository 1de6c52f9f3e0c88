"""Finished windows on disk: what they leave behind, and what they hand to the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import sealed
from harness.method import QuantizedWindow
from harness.quantized import QuantizedModel

_STATE_KEY, _STATE_FORMAT = "harness-state", 1
_FIX = "delete it and run the cell again"


@dataclass(frozen=True)
class WindowFiles:
    """One file of results for each window, and one of state for those that hand some on."""

    folder: Path

    def load(self, index: int) -> QuantizedWindow | None:
        """The window ``index``, if it was finished before."""
        if not self._result(index).is_file():
            return None
        found = QuantizedModel.load(self._result(index))
        # Only the last finished window still has its state: nobody reads that of the others.
        state: sealed.Tensors = {}
        if self._state(index).is_file():
            _, state = sealed.load(self._state(index), _STATE_KEY, _STATE_FORMAT, fix=_FIX)
        return QuantizedWindow(found.linears, found.norms, found.attention, found.report, state=state)

    def save(self, index: int, part: QuantizedWindow) -> None:
        """The state goes first: where there is a result, there is the state that belongs to it."""
        if part.state:
            state = {name: value.contiguous() for name, value in part.state.items()}
            sealed.save(self._state(index), _STATE_KEY, {"format": _STATE_FORMAT}, state)
        QuantizedModel().joined(part).save(self._result(index))
        self._state(index - 1).unlink(missing_ok=True)

    def _result(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _state(self, index: int) -> Path:
        return self.folder / f"{index:05d}.state.safetensors"
