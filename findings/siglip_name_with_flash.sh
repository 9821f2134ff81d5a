#!/usr/bin/env bash
# transformers 4.57.6: SigLIP's text encoder loses its padding mask where the attention's *name* contains "flash".
#
# Any attention function can be registered under any name, with a mask function of its own. SigLIP's text encoder
# asks whether "flash" is in that name, and if it is, hands the layers neither the registered mask function's mask nor any
# other. The very same functions (here transformers' own sdpa and its mask) under another name are right: unpadded tokens
# come out otherwise, without a warning.
#
# Seen with transformers 4.57.6 and torch 2.13.0 on a CPU, Python 3.11: largest difference from sdpa of unpadded tokens,
#     registered as my_attention: 0.000
#     registered as my_flash_attention: 0.592
# Exits with 1 if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.57.6

cat >compare.py <<'PY'
import copy

import torch
from transformers import AttentionInterface, SiglipTextConfig, SiglipTextModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

for name in ("my_attention", "my_flash_attention"):
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)

torch.manual_seed(0)
config = SiglipTextConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, projection_size=32
)
model = SiglipTextModel(config).eval()
for weights in model.parameters():
    torch.nn.init.normal_(weights, std=0.5)
ids = torch.arange(2, 18)[None]
mask = torch.ones_like(ids)
mask[:, 10:] = 0


@torch.no_grad()
def states(name):
    model.set_attn_implementation(name)
    return model(ids, attention_mask=mask).last_hidden_state[:, :10]


expected = states("sdpa")
found = {name: float((states(name) - expected).abs().max()) for name in ("my_attention", "my_flash_attention")}
for name, difference in found.items():
    print(f"registered as {name}: {difference:.3f}")
raise SystemExit(not (found["my_attention"] < 1e-5 and found["my_flash_attention"] > 0.1))
PY
env/bin/python compare.py
