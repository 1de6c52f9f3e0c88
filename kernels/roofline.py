"""The least time that hardware allows: bytes over bandwidth, operations over peak. Predictions, not measurements."""

from __future__ import annotations

from dataclasses import dataclass

from harness.kernels.configs import Config
from harness.kernels.pack import TILE_IN, TILE_OUT


@dataclass(frozen=True)
class Gpu:
    """Peaks without sparsity, as published: bytes a second, and operations a second (2 a multiply-add)."""

    name: str
    bandwidth: float
    fp16: float
    int8: float


GPUS = (
    Gpu("A100 80G SXM", 2.039e12, 312e12, 624e12),
    Gpu("RTX 4090", 1.008e12, 165.2e12, 660.6e12),
    Gpu("H100 SXM", 3.35e12, 989e12, 1979e12),
    Gpu("H200 SXM", 4.8e12, 989e12, 1979e12),
    Gpu("B200", 7.7e12, 2250e12, 4500e12),
)


@dataclass(frozen=True)
class Work:
    """A linear layer on ``tokens`` rows: what must be moved and multiplied at the least."""

    tokens: int
    outputs: int
    inputs: int
    weight_bits: int = 16
    activation_bits: int = 16
    group_size: int | None = None
    asymmetric: bool = True

    @property
    def operations(self) -> float:
        return 2.0 * self.tokens * self.outputs * self.inputs

    @property
    def weight_bytes(self) -> float:
        """As packed: padded codes, float16 scales, zero points as wide as the words that codes are in."""
        if self.weight_bits == 16:
            return 2.0 * self.outputs * self.inputs
        padded = (self.outputs + -self.outputs % TILE_OUT) * (self.inputs + -self.inputs % TILE_IN)
        groups = self.outputs * (self.inputs // (self.group_size or self.inputs))
        word = 2 if self.activation_bits == 16 else 1
        return padded * self.weight_bits / 8 + groups * (2 + word * self.asymmetric)

    @property
    def bytes(self) -> float:
        """Every operand once. Quantized activations are a byte a value, whatever their bits, and 12 a row."""
        quantized = self.activation_bits < 16
        activations = self.tokens * (self.inputs + 12 if quantized else 2 * self.inputs)
        return self.weight_bytes + activations + 2.0 * self.tokens * self.outputs

    def requested_bytes(self, config: Config) -> float:
        """What the kernel's grid asks the memory system for: activations once for every block of outputs, weights once
        for every block of tokens, partial sums written and read."""
        across, down = -(-self.outputs // config.block_n), -(-self.tokens // config.block_m)
        activations = self.bytes - self.weight_bytes - 2.0 * self.tokens * self.outputs
        partial = 8.0 * config.split_k * self.tokens * self.outputs if config.split_k > 1 else 0.0
        return self.weight_bytes * down + activations * across + 2.0 * self.tokens * self.outputs + partial


@dataclass(frozen=True)
class Prediction:
    """A lower bound by a model. Its type keeps it out of tables of measured times."""

    gpu: str
    work: Work
    seconds_at_least: float
    bound_by: str


def predict(work: Work, gpu: Gpu) -> Prediction:
    """The roofline: no launch, no latency, no imbalance. Attainable is some 60 to 90 % of it."""
    moving = work.bytes / gpu.bandwidth
    multiplying = work.operations / (gpu.int8 if work.activation_bits < 16 else gpu.fp16)
    return Prediction(gpu.name, work, max(moving, multiplying), "memory" if moving >= multiplying else "arithmetic")
