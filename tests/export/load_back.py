"""``python load_back.py FOLDER IDS OUT``: the logits of an exported model, loaded as any user of the format loads it.

Runs where transformers and the format's own library are installed; knows nothing of the harness.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig

folder, ids, out = sys.argv[1:]
torch.set_grad_enabled(False)
about = AutoConfig.from_pretrained(folder).quantization_config
# The kernel that GPTQModel prefers on a CPU computes in bfloat16; its plain one in the dtype of its scales.
chosen = {"quantization_config": GPTQConfig(about["bits"], backend="torch")} if about["quant_method"] == "gptq" else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **chosen).eval()
for module in model.modules():
    # GPTQModel keeps scales in float16 whatever the model's dtype, and multiplies them with the codes there, which
    # rounds every weight once more. The same scales in float32 give the weights that the checkpoint stands for.
    if hasattr(module, "qweight"):
        module.float()
tokens = load_file(ids)["ids"]
logits = torch.cat([model(input_ids=row[None]).logits for row in tokens])
save_file({"logits": logits.float().contiguous()}, out)
print({type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj")}, file=sys.stderr)
