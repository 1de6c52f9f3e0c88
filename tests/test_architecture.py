"""Blocks, linears and shared inputs are found in every architecture, and streams through them are the model's own."""

import pytest
import torch
from architectures import CONFIGS, LLAMA, build, ids
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from harness.architecture import discover
from harness.attention import AttentionSpec, allow_quantized_attention
from harness.errors import Unsupported
from harness.linear import round_to_nearest
from harness.method import QuantizedWindow
from harness.quantized import QuantizedModel
from harness.quantizer import ActivationSpec
from harness.settings import Setting
from harness.window import open_streams


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_and_shared_inputs(name: str) -> None:
    model = build(name)
    architecture = discover(model)
    assert len(architecture.blocks) == 3
    for block in architecture.blocks:
        assert [len(group) for group in block.shared_inputs] == CONFIGS[name][1]
        assert len(block.attentions) == 1
    inside = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    assert set(architecture.linears) == inside


@pytest.mark.parametrize("name", CONFIGS)
def test_stream_through_single_blocks_is_the_model_itself(name: str) -> None:
    model = build(name)
    architecture = discover(model)
    seen: list[torch.Tensor] = []
    last = model.get_submodule(architecture.blocks[-1].name)
    hook = last.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(input_ids=ids())
    hook.remove()
    streams = open_streams(model, architecture, ids())
    for block in architecture.blocks:
        streams.advance([block], QuantizedWindow({}))
    torch.testing.assert_close(torch.cat(streams.streams["full_precision"].chunks), seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_installed_model_is_what_the_quantized_stream_saw(name: str) -> None:
    model, setting = build(name), Setting.parse("W4A8")
    architecture = discover(model)
    linears = {
        n: round_to_nearest(model.get_submodule(n).weight, setting, bias=model.get_submodule(n).bias)
        for n in architecture.linears
    }
    before = {n: p.clone() for n, p in model.named_parameters()}
    streams = open_streams(model, architecture, ids())
    for block in architecture.blocks:
        streams.advance([block], QuantizedWindow({n: linears[n] for n in block.linears}))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    QuantizedModel(linears).install(model, architecture)
    seen: list[torch.Tensor] = []
    last = model.get_submodule(architecture.blocks[-1].name)
    last.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(input_ids=ids())
    # A code may flip where two roundings tie, so a few values differ by a step.
    close = torch.isclose(torch.cat(streams.streams["quantized"].chunks), seen[0], rtol=1e-3, atol=1e-3)
    assert close.float().mean() > 0.99


@pytest.mark.parametrize("name", [n for n in CONFIGS if "gemma2" not in n])
def test_kv_quantization_reaches_every_layer_and_a_rotation_cancels(name: str) -> None:
    model = build(name)
    architecture = discover(model)
    plain = model(input_ids=ids()).logits
    allow_quantized_attention(model)
    torch.testing.assert_close(model(input_ids=ids()).logits, plain)
    head = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    rotation = torch.linalg.qr(torch.randn(head, head, generator=torch.Generator().manual_seed(0)))[0]
    logits = []
    for bits, turn in ((16, rotation), (8, None), (4, None)):
        spec = AttentionSpec(ActivationSpec(bits), turn)
        QuantizedModel(attention={n: spec for b in architecture.blocks for n in b.attentions}).install(
            model, architecture
        )
        logits.append(model(input_ids=ids()).logits)
    errors = [float((value - plain).abs().max()) for value in logits]
    assert errors[0] < 1e-2 * plain.abs().max() and errors[0] < errors[1] < errors[2]


def test_eager_attention_cannot_be_quantized() -> None:
    with pytest.raises(Unsupported, match="choose a setting without KV"):
        allow_quantized_attention(build("gemma2, two kinds of block"))


def test_weights_outside_linears_are_refused_by_name() -> None:
    mixture = AutoModelForCausalLM.from_config(MixtralConfig(**LLAMA, num_local_experts=4))
    with pytest.raises(Unsupported, match=r"model\.layers\.0\.mlp\.\S+ \[.*\] is a weight outside nn\.Linear"):
        discover(mixture)
    conv = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(Unsupported, match="no repeated decoder blocks"):
        discover(conv)
