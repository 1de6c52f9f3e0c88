"""Finished windows on disk: what they leave behind, and what they hand to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from harness import sealed
from harness.method import QuantizedWindow
from harness.quantized import QuantizedModel
from harness.quantizedfile import QuantizedFile, join

_STATE = ".state.safetensors"

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
        # Only the last finished window still has its state: nobody reads that of the others.
        state: sealed.Tensors = {}
        if self._state(index).is_file():
            _, state = sealed.load(self._state(index), _STATE_KEY, _STATE_FORMAT, fix=_FIX)
        return replace(QuantizedFile(self._result(index)).part(), state=state)

    def save(self, index: int, part: QuantizedWindow) -> None:
        """The state goes first: where there is a result, there is the state that belongs to it."""
        if part.state:
            state = {name: value.contiguous() for name, value in part.state.items()}
            sealed.save(self._state(index), _STATE_KEY, {"format": _STATE_FORMAT}, state)
        QuantizedModel().joined(part).save(self._result(index))
        self._state(index - 1).unlink(missing_ok=True)

    def results(self) -> list[QuantizedFile]:
        """What is finished, window after window."""
        files = sorted(self.folder.glob("*.safetensors"))
        return [QuantizedFile(file) for file in files if not file.name.endswith(_STATE)]

    def joined(self) -> QuantizedModel:
        """All windows in memory."""
        model = QuantizedModel()
        for file in self.results():
            model = model.joined(file.part())
        return model

    def join_into(self, path: Path) -> None:
        """All windows in one file, without their reports (:func:`harness.quantizedfile.join`)."""
        join(self.results(), path)

    def remove(self) -> None:
        """Nobody needs them any more."""
        for file in self.folder.glob("*"):
            file.unlink()

    def _result(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def _state(self, index: int) -> Path:
        return self.folder / f"{index:05d}{_STATE}"
