import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import benchmarking
from harness.errors import BadOutput, HarnessError, Problems, Unsupported
from harness.kernels import bench
from harness.kernels.benchfile import Samples, ratio
from harness.kernels.configs import Config, choose, read_tuned, shipped, write_tuned
from harness.kernels.cpu import IntegerWeights
from harness.kernels.machines import Cpu, Gpu
from harness.kernels.pack import pack
from harness.kernels.packfile import stored_bytes
from harness.kernels.roofline import GPUS, Work, predict
from harness.kernels.timing import CpuTimer, interleaved
from harness.settings import Setting


def test_rounds_are_interleaved_and_all_samples_kept() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    samples = interleaved(works, CpuTimer(1024), rounds=5)
    assert calls == [*"abab", *"abbaabbaab"]  # two rounds do not count
    assert all(len(taken.seconds) == 5 for taken in samples.values())


def test_statistics_of_samples() -> None:
    steady, slowing = Samples((1.0, 1.0, 1.0, 1.0)), Samples((1.0, 1.0, 2.0, 2.0))
    assert not steady.drifted and slowing.drifted
    assert slowing.median == 1.5
    forwards, backwards = Samples((2.0, 8.0, 30.0, 8.0, 2.0, 80.0)), Samples((1.0, 1.0, 10.0, 1.0, 1.0, 1.0))
    assert ratio(forwards, backwards) == pytest.approx(4.0)
    assert ratio(Samples((6.0,)), Samples((3.0,))) == pytest.approx(2.0)


@pytest.mark.parametrize("setting", ["W4A16g64", "W4A8", "W4A4"])
def test_a_path_is_timed_beside_its_baselines(setting: str, tmp_path: Path) -> None:
    machine = Cpu(CpuTimer(1024))
    (timing,) = bench.bench([Setting.parse(setting)], [(64, 128)], [3], machine)
    assert timing.phase == "decode" and timing.relative_error < 0.01
    assert set(timing.samples) >= {"path", "operator", "bfloat16", "float32", "transforming the input"}
    assert ("quantizing the input" in timing.samples) == (setting != "W4A16g64")
    assert timing.bandwidth > 0 and timing.peak > 0 and timing.percent_of_roofline > 0
    found = bench.record([timing], machine)
    content = json.loads(found.write(tmp_path).read_text())
    assert content["device"] == "cpu" and content["machine"]["processor"]["name"] == content["device_name"]
    assert content["timings"][0]["samples"]["path"] == list(timing.path.seconds)
    assert content["timings"][0]["median_seconds"] == timing.path.median and content["timings"][0]["n"] == 9


@pytest.mark.parametrize(("setting", "tokens"), [("W4A16g64", 2), ("W4A16g64", 17), ("W4A8", 3)])
def test_the_path_of_a_gpu_is_timed_the_same_way(setting: str, tokens: int) -> None:
    """Under the interpreter, whose seconds mean nothing; the code is the one that a GPU runs."""
    machine = Gpu("cpu", "no GPU: Triton's interpreter", CpuTimer(1024), graph=CpuTimer(1024))
    (timing,) = bench.bench([Setting.parse(setting)], [(64, 128)], [tokens], machine)
    kernel = "act_quant + wna8" if setting == "W4A8" else "wna16_gemv" if tokens == 2 else "wna16_narrow "
    assert timing.operator.startswith(kernel) and timing.relative_error < 0.01
    assert set(timing.baselines) == {"float16", "bfloat16"}
    assert set(timing.graphed) == {"path", "float16", "bfloat16"}
    assert bench.record([timing], machine).device == "cuda"


class Cheat:
    """An honest path's deeds as somebody would have them who wants its times to be short."""

    def __init__(self) -> None:
        self.right = IntegerWeights.__call__
        self.kept: dict[object, torch.Tensor] = {}
        self.calls = self.computed = 0

    def honest(self, path: IntegerWeights, x: torch.Tensor) -> torch.Tensor:
        self.computed += 1
        return self.right(path, x)

    def off_by_a_tenth(self, path: IntegerWeights, x: torch.Tensor) -> torch.Tensor:
        return self.right(path, x) * 1.1

    def keeps_its_first_answer(self, path: IntegerWeights, x: torch.Tensor) -> torch.Tensor:
        return self._kept(x.data_ptr(), path, x)

    def is_right_when_looked_at_first(self, path: IntegerWeights, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.right(path, x) if self.calls < 2 else torch.zeros(len(x), path.layer.out_features)

    def leaves_out_half_of_the_rows(self, path: IntegerWeights, x: torch.Tensor) -> torch.Tensor:
        half = self.right(path, x[: len(x) // 2])
        return torch.nn.functional.pad(half, (0, 0, 0, len(x) - len(half)))

    def knows_inputs_again(self, path: IntegerWeights, x: torch.Tensor) -> torch.Tensor:
        return self._kept(x.numpy().tobytes(), path, x)

    def _kept(self, key: object, path: IntegerWeights, x: torch.Tensor) -> torch.Tensor:
        if key not in self.kept:
            self.kept[key] = self.honest(path, x)
        return self.kept[key]


def timed_with(how: str, monkeypatch: pytest.MonkeyPatch) -> Cheat:
    cheat = Cheat()
    monkeypatch.setattr(IntegerWeights, "__call__", lambda self, x: getattr(cheat, how)(self, x))
    list(bench.bench([Setting.parse("W4A8")], [(64, 128)], [4], Cpu(CpuTimer(1024))))
    return cheat


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "how",
    ["off_by_a_tenth", "keeps_its_first_answer", "is_right_when_looked_at_first", "leaves_out_half_of_the_rows"],
)
def test_a_path_that_cheats_is_not_timed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOutput, match="relative error"):
        timed_with(how, monkeypatch)


@pytest.mark.fault(24)
def test_a_path_that_knows_inputs_again_computes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """No input comes twice, so that such a memory saves it nothing."""
    honest = timed_with("honest", monkeypatch)
    monkeypatch.undo()
    remembering = timed_with("knows_inputs_again", monkeypatch)
    assert remembering.computed == honest.computed >= bench._ROUNDS


def test_no_path_is_said() -> None:
    with pytest.raises(Unsupported):
        list(bench.bench([Setting.parse("W3A16")], [(64, 128)], [3], Cpu(CpuTimer(1024))))


def test_shapes_of_presets_and_of_checkpoints(tiny_folder: Path) -> None:
    assert (11008, 4096) in bench.shapes_of(["llama2-7b"])
    assert set(bench.shapes_of([str(tiny_folder)])) == {(64, 64), (32, 64), (128, 64), (64, 128)}
    with pytest.raises(HarnessError):
        bench.shapes_of(["no-such-model"])


def test_the_command_prints_no_gpu_time(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    benchmarking.timed([str(tiny_folder)], ["W4A8", "W3A16"], ["1"], tmp_path, Console(width=240), device="cpu")
    shown = capsys.readouterr().out
    assert "GPU: not measured (no CUDA device)" in shown
    assert "W3A16: not measured" in shown
    with pytest.raises(Problems):
        benchmarking.timed(["llama2-7b"], ["W4A8"], ["0", "many"], tmp_path, Console(), device="cpu")
    with pytest.raises(HarnessError, match=r"not measured \(no CUDA device\)"):
        benchmarking.timed(["llama2-7b"], ["W4A8"], ["1"], tmp_path, Console(), device="cuda")


def test_a_prediction_is_the_larger_of_two_bounds() -> None:
    gpu = next(gpu for gpu in GPUS if gpu.name == "A100 80G SXM")
    decode, prefill = Work(1, 4096, 4096, 4, 16, 128), Work(2048, 4096, 4096, 4, 16, 128)
    assert predict(decode, gpu).bound_by == "memory"
    assert predict(decode, gpu).seconds_at_least == pytest.approx(4.3e-6, rel=0.05)
    assert predict(prefill, gpu).bound_by == "arithmetic"
    assert predict(prefill, gpu).seconds_at_least == pytest.approx(220e-6, rel=0.01)


@pytest.mark.parametrize("text", ["W4A16g128", "W2A16g64sym", "W4A8", "W4A4sym"])
def test_bytes_of_a_weight_are_those_that_are_stored(text: str) -> None:
    setting = Setting.parse(text)
    linear = bench.random_layer(100, 256, setting)
    if symmetric := setting.symmetric:
        linear = replace(linear, zeros=torch.full_like(linear.zeros, 2 ** (setting.weight_bits - 1)))
    work = Work(1, 100, 256, setting.weight_bits, setting.activation_bits, setting.group_size, not symmetric)
    assert work.weight_bytes == stored_bytes({"layer": pack(linear)})


def test_what_a_grid_asks_for_is_never_less_than_what_is_needed() -> None:
    work = Work(200, 4096, 4096, 4, 16, 128)
    assert work.requested_bytes(Config(256, 4096)) == pytest.approx(work.bytes)
    assert work.requested_bytes(Config(128, 128)) > work.bytes
    assert work.requested_bytes(Config(256, 4096, split_k=2)) == work.bytes + 16 * 200 * 4096


def test_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.kernels import configs

    assert choose("wna16", "sm_80", 1000, 4096, 4096, 108).split_k == 1
    few = choose("wna16", "sm_80", 16, 4096, 4096, 108)
    assert few.block_m == 16 and few.split_k > 1
    assert choose("wna8", "sm_90", 64, 4096, 4096, 132) in shipped("wna8", "sm_90")
    monkeypatch.setattr(configs, "_TUNED", tmp_path)
    best = Config(16, 128, 4, 8, 2)
    write_tuned("NVIDIA X 1", {"gpu": "NVIDIA X 1"}, {configs.key("wna16", 13, 4096, 4096): best})
    assert read_tuned("NVIDIA X 1") != {} and read_tuned("NVIDIA Y") == {}
    assert choose("wna16", "sm_90", 16, 4096, 4096, 132, gpu="NVIDIA X 1") == best
    assert choose("wna16", "sm_90", 17, 4096, 4096, 132, gpu="NVIDIA X 1") != best


def test_timers_time(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(300, 300)
    timer = CpuTimer(1024)
    assert timer(lambda: [x @ x for _ in range(20)], flush=False) > timer(lambda: None, flush=False) >= 0
