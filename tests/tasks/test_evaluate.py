from __future__ import annotations

from harness.progress import silent
from harness.tasks.catalogue import parse_task
from harness.tasks.evaluate import evaluate, read_result, write_result


def test_results_come_one_by_one_and_can_be_taken_up_again(tiny_model, tmp_path):
    texts = ["pydoc:windows=2:length=32", "pydoc_cloze:limit=1", "pydoc_kl:windows=1:length=32"]
    specs = [parse_task(text) for text in texts]

    def results(of):
        return evaluate(of, tiny_model, reference=None, data_root=None, seed=0, progress=silent)

    first = next(results(specs))
    write_result(tmp_path, first)
    assert first.task == specs[0].key
    rest = [result.task for result in results(specs[1:])]
    assert rest == [specs[1].key, specs[2].key]
    assert [result.task for result in results(specs)] == [specs[0].key, specs[2].key, specs[1].key]
    assert read_result(tmp_path, first.task).measurements[0].value == first.measurements[0].value
