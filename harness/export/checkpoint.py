"""What all export formats share: the finished cell, the parts that are not quantized, the checkpoint folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32, Integer
from safetensors.torch import save_file

from harness.cells import Cell
from harness.errors import HarnessError, Unsupported
from harness.linear import QuantizedLinear
from harness.models import LoadedModel, load_model
from harness.quantized import QuantizedModel
from harness.runfolder import CellFolder

WORD_BITS = 32


@dataclass(frozen=True)
class Finished:
    """A cell whose integers are on disk, and its full-precision model."""

    cell: Cell
    quantized: QuantizedModel
    model: LoadedModel

    def rest(self) -> dict[str, torch.Tensor]:
        """All tensors but those of quantized linears, with folded norms in place; tied ones once."""
        linears = {f"{name}.{part}" for name in self.quantized.linears for part in ("weight", "bias")}
        kept: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.model.module.state_dict().items():
            if name in linears or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            value = self.quantized.norms.get(name)
            kept[name] = (tensor if value is None else value.to(tensor)).contiguous()
        return kept


def read_finished(path: Path) -> Finished:
    """The cell in the folder ``path``, or whose artifact that is. Raises HarnessError when it is not finished."""
    folder = CellFolder(path.parent if path.is_file() else path)
    if not folder.cell.is_file():
        raise HarnessError(
            "no cell here", where=str(path), fix="give RUN/cells/ID; `harness results RUN --cells` has the artifacts"
        )
    cell = Cell.from_json(json.loads(folder.cell.read_text())["cell"])
    if cell.is_baseline or not folder.quantized_report.is_file():
        what = "is the untouched model" if cell.is_baseline else "has no integers yet"
        raise HarnessError(f"{cell.label} at {cell.setting} {what}", where=str(path), fix="choose a finished cell")
    quantized = QuantizedModel.load(folder.quantized)
    return Finished(cell, quantized, load_model(Path(cell.model_path), name=cell.model, dtype=cell.dtype))


def refuse(format: str, quantized: QuantizedModel, faults: Callable[[QuantizedLinear], Iterator[str]]) -> None:
    """Raises Unsupported with every reason, each with the first layer that it holds for."""
    reasons: dict[str, str] = {}
    for name, linear in quantized.linears.items():
        for fault in faults(linear):
            reasons.setdefault(fault, name)
    if quantized.attention:
        reasons["keys and values are quantized inside attention"] = next(iter(quantized.attention))
    if reasons:
        told = "; ".join(f"{reason} ({name})" for reason, name in reasons.items())
        raise Unsupported(
            f"the format {format} cannot carry this cell: {told}", fix="--format native carries everything"
        )


def weight_faults(linear: QuantizedLinear, bits: Sequence[int]) -> Iterator[str]:
    """What formats of packed weights with groups along the inputs have no place for."""
    if linear.transform is not None:
        yield "inputs are transformed at run time"
    if linear.axis != "oc":
        yield "groups run along the outputs of an input channel"
    if linear.bits not in bits:
        yield f"codes have {linear.bits} bits, not {' or '.join(map(str, bits))}"
    if any(size % WORD_BITS for size in linear.codes.shape):
        yield f"sizes {list(linear.codes.shape)} are not multiples of {WORD_BITS}"


def common_group(quantized: QuantizedModel) -> int | None:
    """Weights that share a scale, the same in all layers; None for one scale for each output channel."""
    sizes = {linear.group_size for linear in quantized.linears.values()}
    return sizes.pop() if len(sizes) == 1 else None


def pack_words(codes: Integer[torch.Tensor, "rows columns"], bits: int) -> Int32[torch.Tensor, "rows words"]:
    """Codes along each row in 32-bit words, the first in the lowest bits."""
    per_word = WORD_BITS // bits
    parts = codes.to(torch.int64).reshape(len(codes), -1, per_word)
    words = (parts << (bits * torch.arange(per_word))).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def write_folder(
    finished: Finished, to: Path, tensors: Mapping[str, torch.Tensor], quantization: Mapping[str, Any]
) -> None:
    """A folder as transformers has them: configuration, tokenizer, one file of tensors. Whole or not at all."""
    config = finished.model.module.config.to_dict() | {"quantization_config": dict(quantization)}
    config["dtype"] = str(finished.model.module.dtype).removeprefix("torch.")
    temporary = to.with_name(f".{to.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    finished.model.tokenizer.save_pretrained(temporary)
    (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    temporary.rename(to)
