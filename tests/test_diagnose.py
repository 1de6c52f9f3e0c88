import torch

from harness.diagnose import first_not_finite
from harness.models import LoadedModel

IDS = torch.arange(16)[None]


def test_first_layer_that_breaks_is_named(tiny_model: LoadedModel) -> None:
    assert first_not_finite(tiny_model.module, IDS) is None
    tiny_model.module.get_parameter("model.layers.1.self_attn.v_proj.weight").data[0, 0] = torch.nan
    tiny_model.module.get_parameter("lm_head.weight").data[0, 0] = torch.nan
    assert first_not_finite(tiny_model.module, IDS) == "model.layers.1.self_attn.v_proj"
    assert all(not module._forward_hooks for module in tiny_model.module.modules())
