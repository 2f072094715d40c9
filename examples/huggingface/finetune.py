"""Fine-tune an exported model on the texts of a .jsonl file, whole or by low-rank adapters.

    python examples/huggingface/finetune.py --model DIR --input train.jsonl --output DIR [--lora]

Adapters are merged into the weights before those are saved, so that `tools/convert_checkpoint.py
import` reads what either of them writes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_scmoe.say import one_line, say


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, text in (
        ("--model", "exported directory, with a tokenizer"),
        ("--input", '.jsonl with a "text" per line'),
        ("--output", "directory for the fine-tuned model"),
    ):
        parser.add_argument(name, type=Path, required=True, metavar="PATH", help=text)
    parser.add_argument("--lora", action="store_true", help="low-rank adapters, by peft")
    for name, kind, default, text in (
        ("--steps", int, 20, "of the optimizer"),
        ("--batch-size", int, 8, "sequences of a step"),
        ("--sequence-length", int, 128, "tokens of a sequence"),
        ("--lr", float, 5e-4, "learning rate at the start; it falls to 0"),
    ):
        parser.add_argument(name, type=kind, default=default, metavar="N", help=text)
    return parser.parse_args(argv)


def read_sequences(path: Path, tokenizer: Any, length: int, most: int) -> list[dict[str, Any]]:
    """At most so many samples for the Trainer: documents one behind the other, cut to equal length.

    Raises:
        ValueError: the text is too short for one.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            tokens += [*tokenizer(json.loads(line)["text"])["input_ids"], *end]
            if len(tokens) >= most * length:
                break
    cut = [tokens[begin : begin + length] for begin in range(0, len(tokens) - length + 1, length)]
    if not cut:
        raise ValueError(f"{path} has {len(tokens)} tokens, and a sequence {length}")
    return [{"input_ids": row, "labels": row} for row in cut]


def fine_tune(args: argparse.Namespace) -> list[float]:
    """Train, save, and return the loss of every step."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    # Without it the tokenizer asks on the terminal whether the model's code may run.
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    most = args.steps * args.batch_size
    samples = read_sequences(args.input, tokenizer, args.sequence_length, most)
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, trust_remote_code=True, dtype=torch.float32
    )
    if args.lora:
        import peft

        adapters = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, adapters)
        model.print_trainable_parameters()
    trainer: Any = Trainer(
        model=model,
        args=TrainingArguments(
            str(args.output / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.lr,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=samples,
    )
    trainer.train()
    model = trainer.model.merge_and_unload() if args.lora else trainer.model
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        losses = fine_tune(args)
    except (OSError, ValueError) as error:
        say(one_line(error))
        return 2
    kind = "adapters" if args.lora else "all weights"
    print(f"{kind}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
