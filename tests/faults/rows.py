"""The faults that the harness must survive, by number. What came of each is printed by ``tox -e faults``."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    fault: str
    left_out: str | None = None  # why no test of it runs here


_GPU = "needs a GPU"

ROWS: dict[int, Row] = {
    1: Row("supervisor killed at a random moment"),
    2: Row("worker killed in the middle of a cell"),
    3: Row("interrupt, once and twice"),
    4: Row("SIGTERM, as a batch system sends it"),
    5: Row("killed at the Nth write, every N"),
    6: Row("finished run started again"),
    7: Row("disk full or broken from the Nth write on"),
    8: Row("run folder read-only, deleted or moved"),
    9: Row("store or its log damaged"),
    10: Row("random stores, plans, TOML files, options"),
    11: Row("two runs in one folder; readers during a run"),
    12: Row("method raises at import, when made, when used"),
    13: Row("worker dies in every way there is"),
    14: Row("worker hangs, ignores SIGTERM, leaves children"),
    15: Row("results of one variant reused for another"),
    16: Row("out of memory on the host"),
    17: Row("out of memory on the GPU", _GPU),
    18: Row("GPU kernel faults, miscomputes, does not compile", _GPU),
    19: Row("NaN or infinity in weights, activations, logits"),
    20: Row("scores no better than guessing"),
    21: Row("degenerate rows and groups in the quantizer"),
    22: Row("method cheats on its bits"),
    23: Row("method changes what others see"),
    24: Row("timed path is not the path that was scored"),
    25: Row("same seed, other order, batch size, threads"),
    26: Row("checkpoint that carries code"),
    27: Row("unsound safetensors file"),
    28: Row("hostile names"),
    29: Row("every mistake in one command"),
    30: Row("task data missing, hub silent"),
    31: Row("clock steps back, other time zones"),
    32: Row("GPU throttled, shared, replaced", _GPU),
    33: Row("store of another schema"),
    34: Row("impossible rows"),
    35: Row("very many cells"),
    36: Row("regression gate: planted losses, no change"),
    37: Row("locale, narrow terminal, closed pipe"),
    38: Row("another package named kernels"),
}
