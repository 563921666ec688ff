"""Loads the adapter that this example wrote with PEFT, on the same decoder in PyTorch, and compares logits.

Usage: check_with_peft.py FOLDER
FOLDER holds adapter/ (PEFT's files) and check.safetensors (the base's weights in PyTorch's layout, ids, and the logits that Burn
computed with the adapter). Needs torch, peft and safetensors.
"""

import math
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, safe_open
from torch import nn
from torch.nn import functional as F

HEADS = 4


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))

    def forward(self, x):
        rows, length, width = x.shape
        heads = lambda y: y.view(rows, length, HEADS, width // HEADS).transpose(1, 2)
        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = q @ k.transpose(2, 3) / math.sqrt(width // HEADS)
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -1e9)
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary, width, blocks):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def main():
    folder = Path(sys.argv[1])
    check = load_file(folder / "check.safetensors")
    weights = {name.removeprefix("base."): tensor for name, tensor in check.items() if name.startswith("base.")}
    vocabulary, width = weights["embedding.weight"].shape
    blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    base = Transformer(vocabulary, width, blocks)
    base.load_state_dict(weights)
    with torch.no_grad():
        without = base(check["ids"].long())
        with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
            factors = len(list(file.keys()))
        model = PeftModel.from_pretrained(base, folder / "adapter")
        loaded = sum("lora_" in name for name, _ in model.named_parameters())
        assert loaded == factors, f"PEFT took {loaded} of {factors} tensors"
        logits = model.base_model.model(check["ids"].long())
    difference = (logits - check["logits"]).abs().max().item()
    effect = (logits - without).abs().max().item()
    print(f"{factors} tensors; the adapter moves logits by up to {effect:.3f}; PEFT and Burn differ by {difference:.1e}")
    # f32 sums in another order, over logits of order 10.
    assert difference < 1e-4 and effect > 0.1


main()
