"""Writes preference/: what TRL's preference trainers compute, step by step, on the folder's tiny-llama.

usage: make_preference.py REFERENCE_DIR

Everything is computed on the CPU in float32. The base is tiny-llama as the QLoRA run holds it (NF4, double quantization),
dequantized; the adapter is the QLoRA run's final one, whose B is not zero. The reference is the base without an adapter, in
one run the initial adapter. Rows are random token ids. TRL's trainers take text, so a tokenizer with one word per id carries
the rows through their own preparation, collators and losses.

rows.json   40 rows in the order of the runs: ids of prompt, chosen and rejected (both end with EOS), and the label with which
            KTO sees prompt and chosen (true) or prompt and rejected (false).
runs.json   Versions, base, adapter and optimizer, and for each run TRL's trainer and settings, rows a microbatch, microbatches a
            step, what the trainer logged after each step (null where it logged nothing: KTO's steps without one kind), and the
            Euclidean distance that all factors moved. `kl_answer_of_row` is, for each row, the row whose answer its prompt gets in KTO's
            KL estimate; `kl_unclamped` that estimate of each microbatch. `equals` are settings that TRL has no name for.

With DTYPE=float64, on a copy of the folder, the same runs show how far rounding alone carries float32: losses within 5e-5
(relative), gradient norms within 6e-5 (relative), rewards within 2e-4. At a learning rate of 5e-3 losses are 7e-2 apart after 20 steps.
Needs torch (the CPU is enough), transformers, PEFT and TRL 1.16.
"""
import json, os, random, sys, tempfile, time
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")
import peft, torch, transformers, trl
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

disable_progress_bars()
torch.set_num_threads(1)  # sums in one order
DTYPE = getattr(torch, os.environ.get("DTYPE", "float32"))
REFERENCE = sys.argv[1]
OUT = os.path.join(REFERENCE, "preference")
ADAPTER = os.path.join(REFERENCE, "qlora/final_adapter_f32")
VOCABULARY, EOS, PAD = 4096, 2, 3
OPTIMIZER = dict(learning_rate=1e-3, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.0, max_grad_norm=1e9)


def make_rows():
    """40 prompts with two answers each; an answer ends with EOS, as TRL would have it."""
    pick = random.Random(19)
    ids = lambda count: [pick.randrange(4, VOCABULARY) for _ in range(count)]
    answer_ids = lambda: ids(pick.randint(1, 23)) + [EOS]
    rows = [dict(prompt=ids(pick.randint(3, 20)), chosen=answer_ids(), rejected=answer_ids()) for _ in range(40)]
    assert all(row["chosen"] != row["rejected"] for row in rows)
    # Some of KTO's steps of 4 rows have no row of one kind.
    labels = [pick.random() < 0.6 for _ in rows]
    labels[8:12], labels[20:24] = [True] * 4, [False] * 4
    return [dict(row, label=label) for row, label in zip(rows, labels)]


def dequantized():
    """The 4-bit weights of tiny-llama-bnb-4bit in float32 arithmetic, and its other weights."""
    stored = os.path.join(REFERENCE, "tiny-llama-bnb-4bit/model.safetensors")
    tensors, weights = load_file(stored), {}
    for name, tensor in tensors.items():
        state = tensors.get(name + ".quant_state.bitsandbytes__nf4")
        if state is not None:
            state = json.loads(bytes(state.tolist()))
            scales = tensors[name + ".nested_quant_map"][tensors[name + ".absmax"].long()]
            scales = scales * tensors[name + ".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scales)] + state["nested_offset"]
            codes = torch.stack([tensor.flatten() >> 4, tensor.flatten() & 15], dim=1).flatten().long()
            values = tensors[name + ".quant_map"][codes] * scales.repeat_interleave(state["blocksize"])[: len(codes)]
            weights[name] = values.reshape(state["shape"])
        elif not any(part in name for part in (".absmax", ".quant_map", ".nested_", ".quant_state")):
            weights[name] = tensor.float()
    return weights


def base():
    model = AutoModelForCausalLM.from_pretrained(os.path.join(REFERENCE, "tiny-llama"), dtype=torch.float32, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(WEIGHTS, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.to(DTYPE)


def check_base():
    """The QLoRA run recorded this base's logits with this adapter, cut to some of the vocabulary."""
    with safe_open(os.path.join(REFERENCE, "qlora/logits_f32.safetensors"), "pt") as file:
        ids, recorded = file.get_tensor("input_ids"), file.get_tensor("logits.4bit")
    rows, columns, vocabulary = recorded.shape
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base(), ADAPTER)(input_ids=ids[:rows, :columns]).logits
    difference = (logits[..., :: VOCABULARY // vocabulary] - recorded).abs().max().item()
    print(f"base: logits within {difference:.1e} of the recorded ones")
    assert difference < 1e-4


def one_word_per_id():
    tokenizer = Tokenizer(models.WordLevel({f"[{i}]": i for i in range(VOCABULARY)}, unk_token="[1]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"[{EOS}]", pad_token=f"[{PAD}]")


def text(ids):
    return "".join(f"[{i}] " for i in ids)


def answer(ids):
    return text(ids).rstrip()


class Recorder(TrainerCallback):
    """Keeps what the trainer logs after each step."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **keys):
        if "loss" in logs:
            self.logs.append(dict(logs))


class RecordedKTO(KTOTrainer):
    """Keeps the rows of each KL estimate, and the log-probabilities that it is made of."""

    def _compute_loss(self, model, inputs, return_outputs):
        self.batches.append({name: inputs[name].clone() for name in ("KL_input_ids", "KL_attention_mask", "KL_completion_mask")})
        return super()._compute_loss(model, inputs, return_outputs)

    def _compute_kl_logps(self, model, batch):
        logps = super()._compute_kl_logps(model, batch)
        self.kl_logps.append(logps.detach())
        return logps


TRAINERS = dict(dpo=(DPOTrainer, DPOConfig), kto=(RecordedKTO, KTOConfig), orpo=(ORPOTrainer, ORPOConfig), cpo=(CPOTrainer, CPOConfig))
METRICS = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
           "nll_loss", "log_odds_ratio", "log_odds_chosen", "kl"]


def dataset(kind, rows):
    if kind == "kto":
        columns = dict(prompt=[text(row["prompt"]) for row in rows], label=[row["label"] for row in rows],
                       completion=[answer(row["chosen"] if row["label"] else row["rejected"]) for row in rows])
    else:
        columns = dict(prompt=[text(row["prompt"]) for row in rows], chosen=[answer(row["chosen"]) for row in rows],
                       rejected=[answer(row["rejected"]) for row in rows])
    return Dataset.from_dict(columns)


def mismatched(trainer, rows):
    """For each row the row whose answer its prompt gets in the KL estimate, as seen in the batches."""
    answers = [row["chosen"] if row["label"] else row["rejected"] for row in rows]
    assert all(answers.count(answer) == 1 for answer in answers)
    found = []
    for batch in trainer.batches:
        for ids, attention, completion in zip(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"]):
            prompt, ids = rows[len(found)]["prompt"], ids[attention.bool()].tolist()
            assert ids[: len(prompt)] == prompt and completion.sum() == len(ids) - len(prompt)
            found.append(answers.index(ids[len(prompt):]))
    return found


def run(name, kind, rows, reference="base", batch=2, accumulation=1, equals=None, **settings):
    trainer_class, config_class = TRAINERS[kind]
    recorder, start = Recorder(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=1, logging_steps=1,
            lr_scheduler_type="constant", optim="adamw_torch", train_sampling_strategy="sequential", bf16=False, gradient_checkpointing=False,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=0, **OPTIMIZER, **settings)
        adapter = dict(peft_config=LoraConfig.from_pretrained(ADAPTER))
        adapter["peft_config"].inference_mode = False
        model = base()
        if reference == "adapter":
            model, adapter = PeftModel.from_pretrained(model, ADAPTER, is_trainable=True), {}
        trainer = trainer_class(model=model, args=config, train_dataset=dataset(kind, rows), processing_class=one_word_per_id(),
                                callbacks=[recorder], **adapter)
        trainer.remove_callback(transformers.PrinterCallback)
        set_peft_model_state_dict(trainer.model, load_file(os.path.join(ADAPTER, "adapter_model.safetensors")))
        trainer.batches, trainer.kl_logps = [], []
        factors = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        assert len(factors) == 6 * 7 * 2 and all(parameter.dtype == DTYPE for parameter in factors.values())
        initial = {name: parameter.detach().clone() for name, parameter in factors.items()}
        trainer.train()
    moved = sum((factors[name].detach() - initial[name]).double().pow(2).sum() for name in factors).sqrt().item()
    record = dict(name=name, trainer=config_class.__name__.replace("Config", "Trainer"), reference=reference if kind in ("dpo", "kto") else None,
                  settings=settings, rows_per_microbatch=batch, accumulation=accumulation)
    if equals is not None:
        record["equals"] = equals
    if kind == "kto":
        policy, frozen = trainer.kl_logps[0::2], trainer.kl_logps[1::2]
        record["kl_answer_of_row"] = mismatched(trainer, rows)
        record["kl_unclamped"] = [(ours - theirs).mean().item() for ours, theirs in zip(policy, frozen, strict=True)]
    logged = [key for key in METRICS if any(key in log for log in recorder.logs)]
    record.update(adapter_moved=moved, metrics={key: [log.get(key) for log in recorder.logs] for key in logged})
    losses = record["metrics"]["loss"]
    print(f"{name}: {len(losses)} steps in {time.time() - start:.0f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}, adapter moved {moved:.3f}")
    return record


def number(value):
    """Nine digits tell every float32 from its neighbours."""
    if isinstance(value, list):
        return "[" + ", ".join(map(number, value)) + "]"
    return f"{value:.9g}" if isinstance(value, float) else json.dumps(value)


def written(record):
    metrics = ",\n".join(f"   {json.dumps(key)}: {number(values)}" for key, values in record["metrics"].items())
    rest = ",\n".join(f"  {json.dumps(key)}: {number(value)}" for key, value in record.items() if key != "metrics")
    return f' {{\n{rest},\n  "metrics": {{\n{metrics}\n  }}\n }}'


WEIGHTS = dequantized()
check_base()
ROWS = make_rows()
RUNS = [
    run("dpo", "dpo", ROWS, beta=0.1, loss_type=["sigmoid"]),
    # TRL's sigmoid knows no label smoothing. Its robust loss at -e / (1 - 2 e) is (1 - e) of the loss and e of the flipped loss.
    run("dpo with label smoothing", "dpo", ROWS, beta=0.1, loss_type=["robust"], label_smoothing=-0.125,
        equals=dict(loss_type=["sigmoid"], label_smoothing=0.1)),
    run("dpo robust", "dpo", ROWS, beta=0.1, loss_type=["robust"], label_smoothing=0.1),
    run("dpo hinge", "dpo", ROWS, beta=0.1, loss_type=["hinge"]),
    run("dpo ipo", "dpo", ROWS, beta=0.1, loss_type=["ipo"]),
    run("dpo apo_zero", "dpo", ROWS, beta=0.1, loss_type=["apo_zero"]),
    run("dpo apo_down", "dpo", ROWS, beta=0.1, loss_type=["apo_down"]),
    # TRL 1.16 has no `rpo_alpha`; a list of losses does that work.
    run("dpo and sft", "dpo", ROWS, beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    run("dpo against the initial adapter", "dpo", ROWS, reference="adapter", beta=0.1, loss_type=["sigmoid"]),
    run("dpo accumulated", "dpo", ROWS, accumulation=2, beta=0.1, loss_type=["sigmoid"]),
    run("dpo and sft accumulated", "dpo", ROWS, accumulation=2, beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    run("kto", "kto", ROWS, batch=4, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
    run("kto weighted", "kto", ROWS, batch=4, beta=0.1, desirable_weight=1.0, undesirable_weight=1.5),
    run("kto accumulated", "kto", ROWS, batch=4, accumulation=2, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
    run("orpo", "orpo", ROWS, beta=0.1),
    run("simpo", "cpo", ROWS, beta=2.0, loss_type="simpo", simpo_gamma=1.0, cpo_alpha=0.0),
    run("cpo", "cpo", ROWS, beta=0.1, loss_type="sigmoid", cpo_alpha=1.0),
]
HEAD = dict(versions=dict(torch=torch.__version__.split("+")[0], transformers=transformers.__version__, peft=peft.__version__, trl=trl.__version__),
            base="tiny-llama", quantization="nf4", adapter="qlora/final_adapter_f32", pad_id=PAD, optimizer=OPTIMIZER)
os.makedirs(OUT, exist_ok=True)
with open(os.path.join(OUT, "rows.json"), "w") as file:
    file.write("[\n" + ",\n".join(" " + json.dumps(row, separators=(",", ":")) for row in ROWS) + "\n]\n")
with open(os.path.join(OUT, "runs.json"), "w") as file:
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in HEAD.items())
    file.write("{\n" + head + ' "runs": [\n' + ",\n".join(map(written, RUNS)) + "\n ]\n}\n")
