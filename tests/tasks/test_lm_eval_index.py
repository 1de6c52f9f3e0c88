from __future__ import annotations

import pytest

from harness.tasks import lm_eval_index

GROUP = """
group: basket
task:
  - apple
  - task: pear
    dataset_path: org/own
  - group: inner
    task:
      - fig
"""


@pytest.fixture
def cold(tmp_path, monkeypatch):
    """As on a machine where the index was never built."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    lm_eval_index.index.cache_clear()
    yield
    lm_eval_index.index.cache_clear()


@pytest.fixture
def tasks(tmp_path):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("a/_base_yaml", "tag:\n  - fruit # all of them\n  # and a comment\n  - food\ndataset_path: org/a\n")
    write("a/apple.yaml", 'include: _base_yaml\n"task": "apple"\n')
    write("a/pear.yaml", "task: pear\ninclude: _base_yaml\ntag: [fruit, green]\n")
    write("b/apple.yaml", "task: apple\ndataset_path: org/second\n")
    write("b/group.yaml", GROUP)
    write("b/fig.yaml", "task: fig\ndataset_path: org/fig\ndoc_to_text: !function utils.text\n")
    write("b/broken_yaml", "no names here")
    return tmp_path


def test_scan_reads_names_groups_and_inherited_tags(tasks):
    index = lm_eval_index.scan(tasks)
    assert index.files == {
        "apple": "a/apple.yaml", "pear": "a/pear.yaml", "fig": "b/fig.yaml", "basket": "b/group.yaml",
    }  # fmt: skip
    assert index.tags == {"fruit": ["apple", "pear"], "food": ["apple"], "green": ["pear"]}


def test_datasets_of_groups_and_tags(tasks, monkeypatch, cold):
    monkeypatch.setattr(lm_eval_index, "tasks_folder", lambda: tasks)
    monkeypatch.setattr(lm_eval_index, "shipped_index", lambda: tasks / "none.json.gz")
    assert lm_eval_index.datasets_of("basket") == ["org/a", "org/fig", "org/own"]
    assert lm_eval_index.datasets_of("fruit") == ["org/a"]


def test_what_is_shipped_is_what_a_scan_finds():
    """Made anew when lm-eval's pin moves: `asdict(scan(tasks_folder()))`, as compressed JSON."""
    shipped = lm_eval_index.shipped_index()
    assert shipped.is_file(), "constraints.txt pins an lm-eval whose index is not shipped"
    assert lm_eval_index.index() == lm_eval_index.scan(lm_eval_index.tasks_folder())


def test_another_version_is_scanned_once(tasks, monkeypatch, cold):
    monkeypatch.setattr(lm_eval_index, "tasks_folder", lambda: tasks)
    monkeypatch.setattr(lm_eval_index, "shipped_index", lambda: tasks / "none.json.gz")
    assert lm_eval_index.is_known("apple")
    assert lm_eval_index._cache_file().exists()
    lm_eval_index.index.cache_clear()
    monkeypatch.setattr(lm_eval_index, "scan", None)
    assert lm_eval_index.is_known("basket")
    assert not lm_eval_index.is_known("banana")


def test_the_index_agrees_with_lm_evals_own_on_a_folder_of_its():
    from lm_eval.tasks import TaskManager

    folder = lm_eval_index.tasks_folder() / "mmlu"
    theirs = TaskManager(include_defaults=False, include_path=folder)
    ours = lm_eval_index.scan(folder)
    assert sorted(ours.files) == sorted([*theirs.all_subtasks, *theirs.all_groups])
    assert sorted(ours.tags) == theirs.all_tags
    assert all(set(tasks) == theirs.task_index[tag].tags for tag, tasks in ours.tags.items())
