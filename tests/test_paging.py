"""A model that is read block by block computes what it does in memory, bit for bit, and holds no more than it must."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from harness.architecture import discover
from harness.checkpoint import open_checkpoint
from harness.driver import quantize_to_files
from harness.models import LoadedModel, load_model
from harness.pagedmodel import load_paged
from harness.placement import TOKENS_AT_ONCE, Placement
from harness.progress import silent
from harness.quantizedfile import QuantizedFile
from harness.registry import create_method, method_class
from harness.settings import Setting
from harness.spill import SpilledTensors
from harness.tasks.perplexity import Reference, score_windows
from tests import architectures

SPILLS = pytest.mark.parametrize("spills", [False, True], ids=["in memory", "spilled"])


@pytest.fixture
def reads(monkeypatch):
    """How often each parameter was read."""
    counts: Counter[str] = Counter()
    from harness import pagedmodel

    plain = pagedmodel._read

    def counting(*args):
        counts[args[-1]] += 1
        return plain(*args)

    monkeypatch.setattr(pagedmodel, "_read", counting)
    return counts


def blocks_in_memory(module):
    return {name for name, p in module.named_parameters() if ".layers." in name and not p.is_meta}


def read_by_blocks(tiny_model):
    return load_model(tiny_model.path, name="tiny", placement=Placement(paged=True))


RENAMED = "gpt-neox"  # its checkpoints name the output head otherwise


@pytest.mark.parametrize("name", sorted(architectures.CONFIGS.keys() - {RENAMED}))
def test_every_architecture_computes_the_same(name, tmp_path):
    whole = architectures.build(name)
    whole.save_pretrained(tmp_path)
    paged, weights = load_paged(open_checkpoint(tmp_path), torch.float32, "cpu")
    paged.eval()
    assert discover(paged) == discover(whole)
    ids = architectures.ids()
    with torch.inference_mode():
        passes = [lambda row=row: paged(row[None], use_cache=False).logits for row in ids]
        for row, logits in zip(ids, weights.run(passes, lambda *_: None), strict=True):
            assert torch.equal(logits, whole(row[None], use_cache=False).logits)
        assert torch.equal(paged(ids).logits, whole(ids).logits)  # without waiting for one another


@pytest.mark.parametrize(("most", "sweeps"), [(10_000, 1), (7 * 16, 1), (3 * 16, 3), (1, 7)])
def test_each_block_is_read_once_for_passes_that_wait_together(tiny_model, reads, monkeypatch, most, sweeps):
    paged = read_by_blocks(tiny_model)
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", most)
    ids = torch.randint(3, 500, (7, 16))
    reads.clear()
    told = []
    with torch.inference_mode():
        passes = [lambda row=row: paged.module(row[None], use_cache=False).logits for row in ids]
        found = list(paged.weights.run(passes, lambda *step: told.append(step)))
    assert set(reads.values()) == {sweeps}
    assert blocks_in_memory(paged.module) == set()
    assert told == [(i, 14) for i in range(15)]
    whole = load_model(tiny_model.path, name="tiny").module
    assert all(torch.equal(whole(row[None]).logits, logits) for row, logits in zip(ids, found, strict=True))


def test_a_pass_that_fails_leaves_nothing_behind(tiny_model):
    paged = read_by_blocks(tiny_model)
    hook = paged.module.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.inference_mode():
        list(paged.weights.run([lambda: paged.module(torch.ones(1, 4, dtype=torch.int64))] * 3, lambda *_: None))
    hook.remove()
    assert blocks_in_memory(paged.module) == set()


@SPILLS
@pytest.mark.parametrize(
    ("method", "setting"),
    [("rtn", "W4A8"), ("gptq", "W4A4KV4"), ("gptq:qronos_alpha=0.5", "W2A16g16"),
     ("duquant:max_rotation_step=4", "W4A4"), ("cbq:epochs=1:size=2", "W4A4")],
)  # fmt: skip
def test_integers_and_scores_do_not_depend_on_the_placement(tiny_model, tmp_path, spills, method, setting):
    calibration = torch.randint(3, 500, (6, 32), generator=torch.Generator().manual_seed(0))
    found = []
    models = {"memory": load_model(tiny_model.path, name="tiny"), "paged": read_by_blocks(tiny_model)}
    for name, model in models.items():
        (tmp_path / name).mkdir()
        files = quantize_to_files(
            model, method_class(method)[1](), Setting.parse(setting), calibration,
            seed=0, checkpoints=tmp_path / name, progress=silent, spill=tmp_path if spills else None,
        )  # fmt: skip
        files.join_into(tmp_path / f"{name}.safetensors")
        if name == "paged":
            assert blocks_in_memory(model.module) == set()
        file = QuantizedFile(tmp_path / f"{name}.safetensors")
        model.weights.quantize(file, model.architecture)
        scores = score_windows(model, calibration, Reference(load_model(model.path, name="other"), 4), lambda *_: None)
        found.append((file.path.read_bytes(), scores.nll.tolist(), scores.divergence[0].tolist()))
    assert found[0] == found[1]


def test_joined_files_are_what_saving_the_whole_writes(tiny_model, tmp_path):
    model = load_model(tiny_model.path, name="tiny")
    (tmp_path / "windows").mkdir()
    files = quantize_to_files(
        model, create_method("rtn", {}), Setting.parse("W4A8g32"), None,
        seed=0, checkpoints=tmp_path / "windows", progress=silent,
    )  # fmt: skip
    files.join_into(tmp_path / "joined.safetensors")
    whole = replace(files.joined(), report=())
    whole.save(tmp_path / "saved.safetensors")
    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "saved.safetensors").read_bytes()
    file = QuantizedFile(tmp_path / "joined.safetensors")
    assert (file.packed_bytes, file.bits_per_weight) == (whole.packed_bytes, whole.bits_per_weight)


def test_a_checkpoint_with_other_names_is_loaded_whole_and_that_is_said(tiny_model, tmp_path):
    whole = architectures.build(RENAMED)
    whole.save_pretrained(tmp_path)
    tiny_model.tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"loaded whole.*not in the checkpoint under their own names, first lm_head"):
        model = load_model(tmp_path, name="renamed", placement=Placement(paged=True))
    assert model.paged is None
    assert torch.equal(model.module(architectures.ids()).logits, whole(architectures.ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_spilled_tensors_come_back_as_they_were(tmp_path, dtype):
    tensors = [torch.randn(3, 5).to(dtype), torch.randn(0, 4).to(dtype), torch.randn(2, 2, 2).to(dtype).transpose(0, 2)]
    kept = SpilledTensors(iter(tensors), tmp_path)
    assert len(kept) == 3
    for tensor, back in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, back)
    assert torch.equal(kept[-1], tensors[-1])
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_model_without_pages_is_in_memory():
    model = LoadedModel(architectures.build("llama, tied"), None, "x", None)
    assert list(model.weights.run([lambda: 1, lambda: 2], lambda *_: None)) == [1, 2]
