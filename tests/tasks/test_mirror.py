from __future__ import annotations

import json

import pyarrow.parquet

from harness import doctor
from harness.corpora import evaluation_text
from harness.progress import silent
from harness.tasks.catalogue import parse_task
from harness.tasks.lm_eval_loading import load_tasks
from harness.tasks.mirror import mirror

TASKS = ("arc_easy", "arc_challenge", "wikitext2", "pydoc")


def test_a_mirrored_data_root_holds_what_the_tasks_read(shared_data, tmp_path):
    folders = mirror([parse_task(task) for task in TASKS], tmp_path, shared_data, silent)
    assert sorted(str(folder.relative_to(tmp_path)) for folder in folders) == ["Salesforce/wikitext", "allenai/ai2_arc"]
    for name in ("arc_easy", "arc_challenge"):
        docs = [
            json.dumps(list(load_tasks(parse_task(name), root)["tasks"][name].eval_docs))
            for root in (shared_data, tmp_path)
        ]
        assert docs[0] == docs[1]
    assert evaluation_text("wikitext2", tmp_path) == evaluation_text("wikitext2", shared_data)
    files = [path for folder in folders for path in folder.rglob("*.parquet")]
    assert all(pyarrow.parquet.read_metadata(path).num_rows for path in files)


def test_doctor_says_beforehand_what_a_run_would_miss(shared_data, tmp_path):
    mirror([parse_task("arc_easy")], tmp_path, shared_data, silent)
    found = {
        finding.what: finding for finding in doctor.examine_tasks(["arc_easy", "piqa", "pydoc", "wikitext2"], tmp_path)
    }
    assert [finding.state for finding in found.values()] == ["good", "bad", "good", "bad"]
    assert "baber/piqa" in found["task piqa"].detail
    for file in (tmp_path / "allenai/ai2_arc/ARC-Easy").glob("test-*"):
        file.unlink()
    (finding,) = doctor.examine_tasks(["arc_easy"], tmp_path)
    assert finding.state == "bad"  # the folder is there, the split that is read is not
