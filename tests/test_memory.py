"""What a cell may hold decides where its model is, before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness import memory
from harness.cells import Cell
from harness.checkpoint import open_checkpoint
from harness.errors import Problems
from harness.limits import Limits
from harness.registry import Workspace, describe_methods


@pytest.fixture
def cell(tiny_folder: Path) -> Cell:
    gptq = describe_methods()["gptq"]
    return Cell(
        model="tiny", model_path=str(tiny_folder), weights_sha256="0" * 64, method="gptq", method_source="gptq",
        method_sha256=gptq.sha256, options={o.name: o.default for o in gptq.options}, setting="W4A16", dtype="float32",
        device="cpu", seed=0, calibration="pydoc:4x32", calibration_sha256="0" * 64,
        tasks=("pydoc:length=64:windows=2",), data_root=None, execute="simulation",
    )  # fmt: skip


def size(blocks: int, scale: int = 1) -> memory.ModelSize:
    return memory.ModelSize(
        blocks=blocks, block=200_000_000 * scale, all_blocks=blocks * 200_000_000 * scale, others=260_000_000,
        widest=11_008, hidden=4096, vocabulary=32_000, positions=256,
    )  # fmt: skip


def test_sizes_are_read_from_the_headers(tiny_folder: Path) -> None:
    found = memory.ModelSize.of(open_checkpoint(tiny_folder))
    block = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert (found.blocks, found.block, found.all_blocks) == (2, block, 2 * block)
    assert found.others == 2 * 512 * 64 + 64
    assert (found.widest, found.hidden, found.vocabulary, found.positions) == (128, 64, 512, 32)


@pytest.mark.parametrize("nonsense", ["many", -3, None, [], 1e400, {"a": 1}])
def test_a_configuration_that_lies_is_no_traceback(tiny_folder: Path, nonsense: object) -> None:
    checkpoint = open_checkpoint(tiny_folder)
    keys = ("hidden_size", "num_attention_heads", "vocab_size", "head_dim", "text_config")
    found = memory.ModelSize.of(replace(checkpoint, config=dict.fromkeys(keys, nonsense)))
    assert found.hidden == 64 and found.positions > 0


def test_depth_costs_memory_only_where_all_blocks_are_in_memory(cell: Cell) -> None:
    def needs(placement: str, blocks: int) -> int:
        return memory.needed_bytes(cell, size(blocks), Workspace(), placement)

    assert needs(memory.PAGED, 4) == needs(memory.PAGED, 80)
    assert needs(memory.IN_MEMORY, 80) - needs(memory.IN_MEMORY, 4) > 76 * 200_000_000 * 4


def test_spilling_saves_the_streams_of_long_calibrations(cell: Cell) -> None:
    long = replace(cell, calibration="pydoc:512x2048", tasks=("pydoc:length=2048",))
    paged, spilled = (memory.needed_bytes(long, size(32), Workspace(), p) for p in (memory.PAGED, memory.SPILLED))
    assert paged - spilled > (512 * 2048 - 2048) * 4096 * 4  # of two streams; one waits within the walk anyway


def test_more_room_is_never_used_worse(cell: Cell) -> None:
    needs = [memory.needed_bytes(cell, size(32), Workspace(), placement) for placement in memory.PLACEMENTS]
    assert needs == sorted(needs, reverse=True)


def test_each_cell_gets_the_first_placement_that_fits(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_size_of", lambda _: size(32))
    two_streams = cell.options | {"qronos_alpha": 0.25}
    cell = replace(cell, calibration="pydoc:512x2048", device="cuda", options=two_streams)
    options = memory.possible(cell)
    assert list(options) == list(memory.PLACEMENTS)
    for placement, needed in options.items():
        assert memory.place([cell], Limits(memory_bytes=needed)) == {cell.id: placement}
    with pytest.raises(Problems, match=r"needs .* GB, --memory allows 1\.0 GB"):
        memory.place([cell, replace(cell, seed=1)], Limits(memory_bytes=10**9))


def test_without_a_limit_nothing_is_refused(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_size_of", lambda _: size(32, scale=1000))
    assert memory.place([cell], Limits()) == {cell.id: memory.SPILLED}
    monkeypatch.setattr(memory, "_size_of", lambda _: size(1))
    monkeypatch.setattr(memory, "_physical_bytes", lambda: 10**11)
    assert memory.place([cell], Limits()) == {cell.id: memory.PAGED}


def test_a_model_is_held_whole_where_reading_its_blocks_would_take_time(cell: Cell) -> None:
    assert list(memory.possible(cell)) == [memory.PAGED, memory.SPILLED]
    assert list(memory.possible(replace(cell, device="cuda"))) == list(memory.PLACEMENTS)
    assert list(memory.possible(replace(cell, tasks=(*cell.tasks, "gsm8k")))) == list(memory.PLACEMENTS)


def test_kernels_need_the_whole_model(cell: Cell) -> None:
    assert list(memory.possible(replace(cell, execute="kernels"))) == [memory.IN_MEMORY]
    assert list(memory.possible(replace(cell, tasks=("pydoc_kernels:windows=1:length=64",)))) == [memory.IN_MEMORY]


def test_an_option_can_cost_memory(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_size_of", lambda _: size(32))
    corrected = replace(cell, options=cell.options | {"qronos_alpha": 0.25})
    more = [memory.possible(corrected)[name] - needed for name, needed in memory.possible(cell).items()]
    assert min(more) > 2 * 11_008**2 * 4


def test_every_method_says_what_it_needs() -> None:
    said = {name: info.workspace for name, info in describe_methods().items() if info.source}
    assert Workspace() not in said.values(), "a built-in method leaves its workspace out"
    assert said["rtn"].streams == 0
