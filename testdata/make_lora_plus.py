"""Writes lora_plus.json: the learning rate and weight decay that PEFT's LoRA+ gives each parameter of a small model.

usage: make_lora_plus.py REFERENCE_DIR

Needs torch (the CPU is enough), transformers and PEFT.
"""
import json, os, sys
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS = dict(learning_rate=2e-4, lora_plus_ratio=16.0, embedding_learning_rate=1e-5, weight_decay=0.01)

config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(
    r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["post_attention_layernorm", "up_proj"], use_dora=True))
optimizer = create_loraplus_optimizer(
    model, torch.optim.AdamW, lr=SETTINGS["learning_rate"], loraplus_lr_ratio=SETTINGS["lora_plus_ratio"],
    loraplus_lr_embedding=SETTINGS["embedding_learning_rate"], loraplus_weight_decay=SETTINGS["weight_decay"])
groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
parameters = {
    name.replace("base_model.model.", "").replace(".default", ""): [groups[id(parameter)]["lr"], groups[id(parameter)]["weight_decay"]]
    for name, parameter in model.named_parameters() if parameter.requires_grad
}
with open(os.path.join(sys.argv[1], "lora_plus.json"), "w") as file:
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rates)}" for name, rates in parameters.items())
    settings = "".join(f" {json.dumps(key)}: {value},\n" for key, value in SETTINGS.items())
    file.write("{\n" + settings + ' "parameters": {\n' + rows + "\n }\n}\n")
