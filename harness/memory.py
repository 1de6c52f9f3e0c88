"""What a cell will hold in memory at most, estimated before it runs, and how much of its model can be there at a time.

Sizes come from the checkpoint's headers and the cell's own words; what a method needs beside its window's weights it
says itself (``workspace``). The estimate is meant to be high rather than low: with ``--memory`` it is a promise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness.calibration import CalibrationSpec
from harness.cells import Cell
from harness.checkpoint import Checkpoint, open_checkpoint
from harness.errors import HarnessError, Problems
from harness.limits import Limits, show_bytes
from harness.placement import TOKENS_AT_ONCE
from harness.registry import Workspace, describe_methods, find_method
from harness.tasks.catalogue import TaskSpec, parse_task

IN_MEMORY, PAGED, SPILLED = "in memory", "paged", "spilled"
PLACEMENTS = (IN_MEMORY, PAGED, SPILLED)
"""From the largest to the smallest: all weights; the blocks in use; hidden states between windows on disk too."""

_PROCESS_BYTES = 735_000_000  # Python, torch, transformers, and what the allocator keeps
_LM_EVAL_BYTES = 450_000_000
_FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CHUNK_TOKENS = 2048
_MARGIN = 1.05


@dataclass(frozen=True)
class ModelSize:
    """Counts of weights, and the widths that activations have."""

    blocks: int
    block: int
    """Weights of the largest block."""
    all_blocks: int
    others: int
    """Weights outside of the blocks: embeddings, head, norms."""
    widest: int
    """Inputs of the widest linear."""
    hidden: int
    vocabulary: int
    positions: int
    """Values a token of every sequence needs beside its hidden state: sines and cosines of its position."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelSize:
        nested = checkpoint.config.get("text_config")
        config = nested if isinstance(nested, dict) else checkpoint.config

        def said(key: str) -> int | None:
            value = config.get(key)
            return value if isinstance(value, int) and value > 0 else None

        blocks: dict[str, int] = {}
        others = 0
        for name, info in checkpoint.tensors.items():
            block = checkpoint.block_of(name)
            if block is None:
                others += math.prod(info.shape)
            else:
                blocks[block] = blocks.get(block, 0) + math.prod(info.shape)
        linears = checkpoint.block_linears().values()
        hidden = said("hidden_size") or min((inputs for _, inputs in linears), default=1)
        heads = said("num_attention_heads") or 1
        return cls(
            blocks=len(blocks),
            block=max(blocks.values(), default=0),
            all_blocks=sum(blocks.values()),
            others=others,
            widest=max((inputs for _, inputs in linears), default=hidden),
            hidden=hidden,
            vocabulary=said("vocab_size") or 1,
            positions=2 * (said("head_dim") or max(1, hidden // heads)),
        )


def needed_bytes(cell: Cell, size: ModelSize, workspace: Workspace, placement: str) -> int:
    """The most that the cell's process will hold at ``placement``."""
    float_bytes = _FLOAT_BYTES.get(cell.dtype, 4)
    kept = size.others * float_bytes
    if placement == IN_MEMORY:
        kept += size.all_blocks * float_bytes
    tasks = [parse_task(task) for task in cell.tasks]
    phases = [_quantizing(cell, size, workspace, placement, float_bytes)]
    phases += [_evaluating(cell, task, size, placement, float_bytes, kept) for task in tasks]
    libraries = _LM_EVAL_BYTES if any(task.kind == "lm_eval" for task in tasks) else 0
    return int(_MARGIN * (_PROCESS_BYTES + libraries + kept + max(phases)))


def _quantizing(cell: Cell, size: ModelSize, workspace: Workspace, placement: str, float_bytes: int) -> float:
    """Beside what is kept: a window, its method's workspace, the streams, and what waits within a walk."""
    if cell.is_baseline:
        return 0
    blocks = int(cell.options.get("size") or 1)
    window = 0 if placement == IN_MEMORY else blocks * size.block * float_bytes
    # What is as wide as the widest layer and what is as large as the window are not there at the same time.
    own = 4 * max(workspace.weights * blocks * size.block, workspace.squares * size.widest**2)
    if not workspace.streams:
        return window + own
    calibration = CalibrationSpec.parse(cell.calibration)
    tokens = calibration.sequences * calibration.length
    chunk = min(tokens, _CHUNK_TOKENS)
    # Passes that wait within a walk hold what they began with, so that one stream at least is in memory anyway.
    between = (workspace.streams - 1) * (chunk if placement == SPILLED else tokens)
    streams = (tokens + between) * size.hidden
    walk = workspace.streams * tokens * (2.5 * size.hidden + 1.25 * size.widest)  # residuals, inputs of the widest
    return window + own + float_bytes * (streams + walk)


def _evaluating(cell: Cell, task: TaskSpec, size: ModelSize, placement: str, float_bytes: int, kept: int) -> float:
    """Beside what is kept: a block being dequantized, one forward pass, and the hidden states that wait."""
    length = int(task.options.get("length") or _CHUNK_TOKENS)
    dequantized = 0 if cell.is_baseline else 2 * size.block * float_bytes
    block = (0 if placement == IN_MEMORY else size.block * float_bytes) + dequantized
    logits = 4 * 4 * size.vocabulary * min(length, 128)
    forward = float_bytes * length * (6 * size.hidden + 4 * size.widest)
    if task.kind == "kernels":
        return size.all_blocks + logits + forward + 4 * 2 * length * size.vocabulary
    models = 2 if task.kind == "kl" and not cell.is_baseline else 1
    waiting = 0
    if placement != IN_MEMORY:
        windows = int(task.options.get("windows") or 1024)
        tokens = min(windows * length, TOKENS_AT_ONCE[cell.device] + length)
        waiting = float_bytes * tokens * (size.positions + size.hidden)
    return models * (block + waiting) + (models - 1) * kept + logits + forward


def place(cells: Iterable[Cell], limits: Limits) -> dict[str, str]:
    """For each cell's id the best placement that fits ``limits``, or the machine where they set none.

    Raises Problems with every cell that fits none of them, and the memory that it would need.
    """
    budget = limits.memory_bytes or _physical_bytes() // limits.jobs
    problems, found = [], {}
    for cell in cells:
        options = possible(cell)
        found[cell.id] = next((name for name, needs in options.items() if needs <= budget), list(options)[-1])
        if limits.memory_bytes is not None and (least := min(options.values())) > limits.memory_bytes:
            problems.append(
                HarnessError(
                    f"{cell.model}, {cell.label}, {cell.setting} needs {show_bytes(least)}, "
                    f"--memory allows {show_bytes(limits.memory_bytes)}",
                    fix=f"--memory {math.ceil(least / 1e8) / 10}GB, fewer calibration tokens, or shorter windows",
                )
            )
    if problems:
        raise Problems(problems)
    return found


def possible(cell: Cell) -> Mapping[str, int]:
    """What the cell needs at each placement that it can be run at, the best one first.

    Kernels want all packed layers in memory. On a CPU blocks are read in next to no time, and a model held whole would
    only take memory; but what lm-eval's tasks generate enters every block for every token.
    """
    said = Workspace() if cell.is_baseline else find_method(cell.method_source, describe_methods()).workspace
    workspace = said.given(cell.options)
    tasks = {parse_task(task).kind for task in cell.tasks}
    places: tuple[str, ...] = PLACEMENTS
    if cell.execute == "kernels" or "kernels" in tasks:
        places = (IN_MEMORY,)
    elif cell.device == "cpu" and "lm_eval" not in tasks:
        places = (PAGED, SPILLED)
    size = _size_of(Path(cell.model_path))
    return {placement: needed_bytes(cell, size, workspace, placement) for placement in places}


@cache
def _size_of(path: Path) -> ModelSize:
    return ModelSize.of(open_checkpoint(path))


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
