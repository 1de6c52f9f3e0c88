"""Triton's kernels run on CPU tensors here: the decorator looks at this variable when a kernel is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
