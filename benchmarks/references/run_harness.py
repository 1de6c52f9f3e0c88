"""The harness's own methods, written and timed as the released libraries are. In the harness's own environment:

    python benchmarks/references/run_harness.py MODEL_FOLDER ids.safetensors out/gptq.safetensors \
        --bits 4 --group-size 64 --variant gptq
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from protocol import Job, stopwatch

from harness.driver import quantize_model
from harness.models import load_model
from harness.progress import silent
from harness.registry import create_method, describe_methods, find_method
from harness.settings import Setting
from harness.specs import Spec, bind

VARIANTS = (
    "gptq",
    "gptq:true_sequential=false",
    "gptq:damp=0.05",
    "gptq:clip_search=true",
    "adadim",
    "rtn",
)

if __name__ == "__main__":
    job = Job.from_command_line(__doc__ or "", VARIANTS)
    model = load_model(job.model, name=job.model.name)
    spec = Spec.parse(job.variant)
    method = create_method(spec.name, bind(find_method(spec.name, describe_methods()).options, spec))
    setting = Setting.parse(f"W{job.bits}A16g{job.group_size}")
    assert len(model.architecture.linears)  # discovered before the clock starts
    with tempfile.TemporaryDirectory() as folder, stopwatch() as took:
        quantized = quantize_model(model, method, setting, job.ids(), seed=0, checkpoints=Path(folder), progress=silent)
    job.write({name: linear.weight() for name, linear in quantized.linears.items()}, took, f"harness {job.variant}")
