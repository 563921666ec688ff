"""What the peers' DPO step benchmarks share: pairs of random tokens, the trainer's settings, and the clock.

Steps are those of `qlora-bench step` on `ROWSxTOKENS-pairs`: so many pairs of answers, two rows of that length each, the first half of which is
their common prompt. A trainer's own `train()` runs them, from its sampler and collator to its metrics and its log: what a user
waits for. Of `-pairs-ahead` the reference's log-probabilities are columns of the data, as the trainer leaves them there when it computes
them ahead. A step lasts from the end of the one before to its own, each ended by a synchronisation.
"""

import math
import os
import random
import tempfile
import time

import step_timing

# The trainer refuses to spread one process over several cards.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Words that end and pad a text; the pairs have none of the first, but for EOS at the end.
EOS, PAD, FIRST = 2, 3, 4


def run(args, peer, build, before):
    """Answers for every case with the trainer that `build(args, case)` makes."""
    if step_timing.ranks() > 1:
        raise SystemExit("the DPO benchmarks are of one process, and torchrun started several")
    step_timing.run(args, peer, build, before, steps=steps, pairs=True)


def tokenizer(args):
    """A tokenizer that has one word for each id, by which ids come through the trainer's own preparation."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word(id): id for id in range(step_timing.sizes(args)["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token=word(1)))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=word(EOS), pad_token=word(PAD))


def word(id):
    return f"[{id}]"


def dataset(args, case):
    """Pairs for all steps, each of them another."""
    from datasets import Dataset

    vocab, prompt = step_timing.sizes(args)["vocab_size"], case.length // 2
    draw = random.Random(0)

    def text(count):
        return " ".join(word(draw.randrange(FIRST, vocab)) for _ in range(count))

    def answer():
        return f"{text(case.length - prompt - 1)} {word(EOS)}"

    count = (args.warm_up + args.steps) * args.accumulation * case.rows
    columns = {
        "prompt": [text(prompt) + " " for _ in range(count)],
        "chosen": [answer() for _ in range(count)],
        "rejected": [answer() for _ in range(count)],
    }
    if case.kind == "-pairs-ahead":
        # What a model of random weights gives each token of an answer, so that nothing saturates.
        known = -(case.length - prompt) * 10.5
        columns |= {"ref_chosen_logps": [known] * count, "ref_rejected_logps": [known] * count}
    return Dataset.from_dict(columns)


def settings(args, case):
    """What DPOConfig is made of."""
    import torch

    return dict(
        output_dir=os.path.join(tempfile.gettempdir(), "bench-step-dpo"),
        beta=0.1,
        loss_type=["sigmoid"],
        max_length=case.length,
        per_device_train_batch_size=case.rows,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.warm_up + args.steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.3,
        optim="adamw_torch" if args.base == "bf16" else f"paged_{args.optimizer}",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trainer(args, case, model, config, **more):
    """The trainer of the library that `config` is of, on the case's pairs."""
    import trl

    made = trl.DPOTrainer(
        model=model, args=config, train_dataset=dataset(args, case), processing_class=tokenizer(args), **more
    )
    # The data has what the trainer would compute before its first step.
    made.precompute_ref_logps = case.kind == "-pairs-ahead"
    rows = made.train_dataset[0]
    lengths = [len(rows["prompt_ids"]), len(rows["chosen_ids"]), len(rows["rejected_ids"])]
    half = case.length // 2
    if lengths != [half, case.length - half, case.length - half]:
        raise ValueError(f"the trainer made rows of {lengths} tokens, of prompt and answers, from pairs of {case.length}")
    return made


def steps(args, case, trainer):
    """Trains; see `step_timing.supervised`."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        ends = []

        def on_train_begin(self, *_args, **_named):
            self.on_step_end()

        def on_step_end(self, *_args, **_named):
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    clock = Clock()
    trainer.add_callback(clock)
    loss = trainer.train().training_loss
    used = step_timing.used_bytes()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:])]
    if len(seconds) != args.warm_up + args.steps:
        raise ValueError(f"{len(seconds)} steps were trained instead of {args.warm_up + args.steps}")
    return seconds, loss if have_moved(trainer.model) else math.nan, used


def have_moved(model):
    """Whether the adapters' second factors, which start as zeros, are finite and others now: a loss alone hides what is not, since one of
    zeros in the place of numbers is near its logarithm of two."""
    moved = [p.detach().float().abs().sum().item() for name, p in model.named_parameters() if "lora_B" in name and p.requires_grad]
    return bool(moved) and all(0.0 < distance < math.inf for distance in moved)
