"""The regression gate: what it lets pass, what it catches, what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from planted import FAULTS, cell, rounded, with_fault, write_run

from harness.errors import HarnessError
from harness.models import load_model
from harness.progress import silent
from harness.reports.compare import compare_runs, grids, read_margins
from harness.reports.junit import junit
from harness.runfolder import RunFolder
from harness.settings import Setting
from harness.tables import markdown
from harness.tasks.catalogue import parse_task
from harness.tasks.perplexity import measure_windows

TASKS = ("pydoc:length=64:windows=12", "pydoc_kl:length=64:windows=12")
SETTINGS = ("W4A16g32", "W8A16")
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def reference(tiny_folder):
    return load_model(tiny_folder, name="tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def measure(tiny_folder, reference):
    """Results of a quantized model, its weights off by ``noise`` as another machine's arithmetic would have them."""
    model = load_model(tiny_folder, name="tiny", dtype="float32", device="cpu")

    def measured(quantized, noise=0.0, seed=0):
        quantized.install(model.module, reference.architecture)
        generator = torch.Generator().manual_seed(seed)
        for name in quantized.linears if noise else ():
            weight = model.module.get_submodule(name).weight
            weight.mul_(1 + noise * torch.randn(weight.shape, generator=generator))
        return measure_windows(list(map(parse_task, TASKS)), model, lambda: reference, None, silent)

    return measured


@pytest.fixture(scope="module")
def good(reference):
    return {setting: rounded(reference, Setting.parse(setting)) for setting in SETTINGS}


@pytest.fixture(scope="module")
def good_results(good, measure):
    return {setting: measure(good[setting]) for setting in SETTINGS}


@pytest.fixture(scope="module")
def baseline(good_results, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("baseline"), cells(good_results))


def cells(results):
    return [(cell(setting, TASKS), found) for setting, found in results.items()]


def failed_settings(gate):
    return {check.place[1] for check in gate.failed}


def test_a_run_passes_against_itself(baseline):
    gate = compare_runs(baseline, baseline, {})
    assert not gate.failed
    assert len(gate.checks) == 2 * (1 + 3)
    assert {check.verdict for check in gate.checks} == {"same"}


@pytest.mark.fault(36)
def test_fifty_of_fifty_pairs_that_differ_in_rounding_errors_pass(good, measure, baseline, good_results, tmp_path):
    for seed in range(50):
        noisy = measure(good["W4A16g32"], noise=1e-5, seed=seed)
        values = [
            [m.value for result in found for m in result.measurements] for found in (noisy, good_results["W4A16g32"])
        ]
        assert values[0] != values[1]
        candidate = write_run(tmp_path / str(seed), cells(good_results | {"W4A16g32": noisy}))
        assert not compare_runs(baseline, candidate, {}).failed


@pytest.mark.fault(36)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_caught_in_its_cell(
    fault, setting, reference, good, measure, baseline, good_results, tmp_path
):
    faulty = with_fault(reference, good[setting], LAYER, FAULTS[fault], Setting.parse(setting))
    candidate = write_run(tmp_path, cells(good_results | {setting: measure(faulty)}))
    gate = compare_runs(baseline, candidate, {})
    assert failed_settings(gate) == {setting}
    assert f"tiny {setting} rtn" in gate.summary()


def test_a_cell_that_no_longer_ends_well_fails(baseline, good_results, tmp_path):
    """A zeroed scale is such a case: the layer refuses it, and the cell ends as bad_output."""
    broken = write_run(tmp_path, [(cell(SETTINGS[0], TASKS), [])], status="bad_output")
    gate = compare_runs(baseline, broken, {})
    assert [check.verdict for check in gate.failed] == ["bad_output", "missing"]
    assert "not a finite positive number" in gate.failed[0].detail


def test_more_bits_fail_and_fewer_do_not(baseline, good_results, tmp_path):
    for bits, failing in ((4.5, set(SETTINGS)), (4.0, set())):
        candidate = write_run(tmp_path / str(bits), cells(good_results), bits=bits)
        assert failed_settings(compare_runs(baseline, candidate, {})) == failing
    assert not compare_runs(baseline, tmp_path / "4.5", {"bits_per_weight": 0.25}).failed


@pytest.mark.parametrize(("codes", "verdict"), [(b"codes", "same"), (b"other", "changed")])
def test_other_integers_under_one_id_are_told(codes, verdict, good_results, tmp_path):
    runs = [write_run(tmp_path / name, cells(good_results)) for name in ("one", "other")]
    for run, content in zip(runs, (b"codes", codes), strict=True):
        RunFolder(run).cell(cell(SETTINGS[0], TASKS).id).quantized.write_bytes(content)
    gate = compare_runs(*runs, {})
    assert [check.verdict for check in gate.checks if check.what == "integers"] == [verdict]
    assert not gate.failed
    asked = compare_runs(*runs, {"integers": 0.0})
    assert failed_settings(asked) == ({SETTINGS[0]} if verdict == "changed" else set())


@pytest.mark.parametrize(("codes", "verdict"), [(b"codes", "same"), (b"other", "changed"), (None, "missing")])
def test_a_method_written_anew_has_to_give_the_old_integers_where_that_is_asked(codes, verdict, good_results, tmp_path):
    anew = [(replace(one, method_sha256="d" * 64), found) for one, found in cells(good_results)]
    runs = [write_run(tmp_path / name, found) for name, found in (("one", cells(good_results)), ("other", anew))]
    first, second = cells(good_results)[0][0], anew[0][0]
    RunFolder(runs[0]).cell(first.id).quantized.write_bytes(b"codes")
    if codes is not None:
        RunFolder(runs[1]).cell(second.id).quantized.write_bytes(codes)
    assert not [check for check in compare_runs(*runs, {}).checks if check.what == "integers"]
    gate = compare_runs(*runs, {"integers": 0.0})
    assert [check.verdict for check in gate.checks if check.what == "integers"] == [verdict]
    assert failed_settings(gate) == (set() if verdict == "same" else {first.setting})


def test_a_missing_task_fails(baseline, good_results, tmp_path):
    only_perplexity = [(cell(setting, TASKS[:1]), found[:1]) for setting, found in good_results.items()]
    gate = compare_runs(baseline, write_run(tmp_path, only_perplexity), {})
    assert {check.verdict for check in gate.failed} == {"missing"}
    assert all("kl_divergence" in check.what or "top1" in check.what for check in gate.failed)


def test_other_samples_fail_as_not_comparable(reference, baseline, good_results, tmp_path):
    other = [measure_windows([parse_task(TASKS[0])], reference, None, None, silent)[0]]
    samples = dict(other[0].measurements[0].samples)
    samples["window_hash"] = samples["window_hash"][::-1].copy()
    object.__setattr__(other[0].measurements[0], "samples", samples)
    runs = [
        write_run(tmp_path / name, [(cell(SETTINGS[0], TASKS[:1]), found)])
        for name, found in (("one", good_results[SETTINGS[0]][:1]), ("other", other))
    ]
    (check,) = compare_runs(*runs, {}).failed
    assert check.verdict == "not comparable"
    assert "0 are the same" in check.detail


def test_times_are_gated_when_asked_on_one_machine_only(good_results, tmp_path):
    eight = [(cell("W4A16g32", TASKS[:1], f"m{number}"), good_results["W4A16g32"][:1]) for number in range(8)]
    steady = [10 + number for number in range(8)]
    runs = {
        "before": steady, "again": [1.01 * s if n % 2 else s / 1.01 for n, s in enumerate(steady)],
        "slower": [1.3 * s for s in steady],
    }  # fmt: skip
    paths = {name: write_run(tmp_path / name, eight, seconds=seconds) for name, seconds in runs.items()}
    margins = {"quantize_seconds": 0.05}
    assert not compare_runs(paths["before"], paths["slower"], {}).failed
    assert not compare_runs(paths["before"], paths["again"], margins).failed
    (check,) = compare_runs(paths["before"], paths["slower"], margins).failed
    assert check.what == "quantize_seconds"
    elsewhere = write_run(tmp_path / "elsewhere", eight, seconds=runs["slower"], provenance='{"processor": "other"}')
    gate = compare_runs(paths["before"], elsewhere, margins)
    assert not gate.failed
    assert [check.verdict for check in gate.checks if check.what == "quantize_seconds"] == ["not compared"]


def test_what_is_written_for_a_ci(baseline, good, reference, measure, good_results, tmp_path):
    faulty = with_fault(
        reference, good[SETTINGS[0]], LAYER, FAULTS["a sign flip in one layer"], Setting.parse(SETTINGS[0])
    )
    candidate = write_run(tmp_path / "run", cells(good_results | {SETTINGS[0]: measure(faulty)}))
    words = [
        "compare",
        str(baseline),
        str(candidate),
        "--junit",
        str(tmp_path / "gate.xml"),
        "--markdown",
        str(tmp_path / "gate.md"),
    ]
    done = subprocess.run([sys.executable, "-P", "-m", "harness", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"tiny {SETTINGS[0]} rtn" in done.stdout.splitlines()[-1]
    (suite,) = ElementTree.parse(tmp_path / "gate.xml").getroot()
    failing = {case.get("classname") for case in suite if case.find("failure") is not None}
    assert failing == {f"tiny.{SETTINGS[0]}.rtn"}
    assert int(suite.get("failures")) == sum(case.find("failure") is not None for case in suite) > 0
    assert "FAIL" in (tmp_path / "gate.md").read_text()
    words[2] = str(baseline)
    assert (
        subprocess.run([sys.executable, "-P", "-m", "harness", *words], capture_output=True, check=False).returncode
        == 0
    )


def test_names_that_xml_and_markdown_must_not_take_literally(good_results, tmp_path):
    path = write_run(tmp_path, [(cell("W4A16g32", TASKS, "<b>|\x01"), good_results["W4A16g32"])])
    gate = compare_runs(path, path, {})
    ElementTree.fromstring(junit(gate))
    assert "<b>" not in markdown(grids(gate))


def test_margins_are_read_and_refused():
    assert read_margins(["acc=0.02", "quantize_seconds=0.1"]) == {"acc": 0.02, "quantize_seconds": 0.1}
    for text in ("acc", "acc=", "acc=-1", "acc=nan", "acc=inf", "=1x"):
        with pytest.raises(HarnessError, match="no margin"):
            read_margins([text])


def test_other_terms_are_told(baseline, good_results, tmp_path):
    candidate = write_run(tmp_path, cells(good_results))
    plan = json.loads((candidate / "plan.json").read_text())
    plan["terms"]["calibration"] = "c4:32x512"
    (candidate / "plan.json").write_text(json.dumps(plan))
    assert compare_runs(baseline, candidate, {}).warnings == (
        "calibration: pydoc:4x64 in the baseline, c4:32x512 in the candidate",
    )
