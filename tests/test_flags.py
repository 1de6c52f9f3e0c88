from __future__ import annotations

import pytest
from planted import cell, write_run

from harness import results
from harness.flags import worse_than_guessing
from harness.tasks.measurement import Measurement, TaskResult


@pytest.mark.fault(20)
@pytest.mark.parametrize(("value", "flagged"), [(511.0, False), (513.0, True)])
def test_a_perplexity_above_the_vocabulary_is_flagged(value, flagged, tmp_path):
    measurement = Measurement("token_perplexity", value, 1.0, 12, False)
    result = TaskResult("pydoc", (measurement,), 1.0, {"vocabulary": 512})
    run = write_run(tmp_path, [(cell("W2A16", ["pydoc"]), [result])])
    lines = worse_than_guessing(results.load(run), run)
    assert len(lines) == flagged
    assert all("tiny W2A16 rtn: pydoc perplexity 513.00 is above the 512 tokens" in line for line in lines)
