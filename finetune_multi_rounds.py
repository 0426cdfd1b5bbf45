"""Dialogue tuning of all weights: loss on every assistant round of a conversation, long ones in windows of whole rounds.

Reads   a base model and conversations of any format in sample/README.md
Writes  output_dir/, the model with tokenizer and chat template. Next: generate.py, quantize_gptq.py

    bash scripts/finetune_multi_rounds.sh                                  # every GPU of this machine, or the CPU
    python finetune_multi_rounds.py --model_name_or_path M --data_path D   # one GPU, or the CPU

A dialogue that is longer than max_length becomes windows: the system text again, as many rounds as fit, and before them
as many earlier rounds as still fit, which are read but not trained a second time. So every answer is trained once.

GPU memory in GB a card for one block of 2,048 tokens, gradient checkpointing (estimate; 16 bytes a weight are its fp32
master, gradient and two moments of AdamW; ds_configs/README.md has the arithmetic of ZeRO):

| base | 16 bytes a weight | ranks, file          | states a card | working weights, activations, logits, CUDA | sum | runs on            |
|------|-------------------|----------------------|---------------|--------------------------------------------|-----|--------------------|
| 1.1B | 18                | 1, none              | 18            | 4                                          | 22  | 1 x 24 GB          |
| 7B   | 108               | 1, zero3_offload     | 0             | 6                                          | 6   | 1 x 11 GB, 121 GB RAM |
| 7B   | 108               | 4, zero3             | 27            | 6                                          | 33  | 4 x 40 GB          |
| 13B  | 208               | 8, zero3             | 26            | 8                                          | 34  | 8 x 40 GB          |
"""
import json
import sys
from types import MethodType
from typing import Literal

from memory import announce_memory
from utils import (Chat, check_file, check_model, check_output_dir, check_positive, cli, file_hash, fingerprint, hold_out, resume_point, run_facts, show,
                   summarize, tokenize_records, write_facts)


def main(
    *,
    # model and data
    model_name_or_path: str,
    data_path: str,
    eval_path: str | None = None,
    eval_size: float = 0,
    output_dir: str = "output/finetune_multi_rounds",
    template: str = "auto",
    last_round_only: bool = False,
    max_length: int = 2048,
    packing: bool = True,
    skip_bad_records: bool = False,
    unescape_newlines: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    # optimization
    freeze_layers: int = 0,
    per_device_train_batch_size: int = 1,
    gradient_accumulation_steps: int = 8,
    num_train_epochs: float = 3,
    learning_rate: float = 2e-5,
    lr_scheduler_type: str = "cosine",
    warmup_steps: float = 0.03,
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    gradient_checkpointing: bool = True,
    longest_first: bool = False,
    check_memory: bool = False,
    early_stopping_patience: int = 0,
    seed: int = 42,
    resume: bool = False,
    **training_arguments,
):
    """Train all weights of a model on conversations.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        data_path: Training data: JSON, JSONL, CSV or Parquet (pretrain_clm.py: also .txt, or a folder); see sample/README.md.
        eval_path: File of records to evaluate on.
        eval_size: Records of data_path held out to evaluate on: a number, or a share below 1.
        output_dir: Folder for checkpoints and the result.
        template: Prompt format: auto (the model's own), alpaca, vicuna_chat, yayi, chatml, ziya, llama2_chinese, llama2 or plain.
        last_round_only: Train the last answer of each dialogue alone.
        max_length: Tokens per example; what is longer is cut into windows, a dialogue into whole rounds.
        packing: Fill blocks of max_length tokens with whole examples; else an example is a block.
        skip_bad_records: Drop bad records and say how many and why, instead of stopping.
        unescape_newlines: Turn a literal backslash and n in the data into a line break.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        freeze_layers: Lowest layers, with the embeddings, that are not trained.
        per_device_train_batch_size: Blocks per step and GPU.
        gradient_accumulation_steps: Steps whose gradients are added up before the weights change.
        num_train_epochs: Passes over the data.
        learning_rate: Peak of the schedule.
        lr_scheduler_type: Schedule: cosine, linear, constant_with_warmup or another of transformers.
        warmup_steps: Steps of linear warm-up: a number, or a share below 1.
        precision: Arithmetic: auto (bf16 where the GPU has it, else fp16; fp32 on a CPU), bf16, fp16 or fp32.
        gradient_checkpointing: Keep one activation per layer and recompute the rest: a quarter slower, far less memory.
        longest_first: Begin with the longest blocks, so that a lack of memory shows at the first step.
        check_memory: Refuse to start where the estimate exceeds the free memory of the GPU (or of a machine without one); else it is printed all the same.
        early_stopping_patience: Evaluations in a row without a lower loss after which the run ends with the best weights; 0 never ends it.
        seed: Of everything random.
        resume: Go on from the last checkpoint in output_dir.
        training_arguments: Any other field of transformers.TrainingArguments, such as --max_steps or --report_to.
    """
    flags = dict(locals())
    show(flags)
    check_model(model_name_or_path, allow_pickle)
    check_file("data_path", data_path)
    check_file("eval_path", eval_path)
    check_output_dir(output_dir, resume)
    check_positive(max_length=max_length, per_device_train_batch_size=per_device_train_batch_size, gradient_accumulation_steps=gradient_accumulation_steps)

    # ---- load ----
    # these imports take seconds: they wait until the flags are understood
    from transformers import set_seed

    from models import DTYPES, add_token_rows, choose_precision, freeze, load_model, load_skeleton, load_tokenizer
    from training import Blocks, SupervisedTrainer, check_machine, choose_attention, make_arguments, run_training, save_result, supervised_forward

    precision = choose_precision(precision)
    skeleton = load_skeleton(model_name_or_path, trust_remote_code)  # before the arguments: ZeRO-3 would shard it
    args = make_arguments(output_dir, precision, eval_path, eval_size, early_stopping_patience, training_arguments,
                          per_device_train_batch_size=per_device_train_batch_size, learning_rate=learning_rate,
                          gradient_accumulation_steps=gradient_accumulation_steps, num_train_epochs=num_train_epochs,
                          lr_scheduler_type=lr_scheduler_type, warmup_steps=warmup_steps, seed=seed,
                          gradient_checkpointing=gradient_checkpointing)
    chat = Chat(load_tokenizer(model_name_or_path, trust_remote_code), template, last_round_only)
    trained = freeze(skeleton, freeze_layers, chat.new_tokens)

    # ---- prepare ----
    facts = run_facts(flags, data=file_hash(data_path), eval_data=eval_path and file_hash(eval_path),
                      base=fingerprint(model_name_or_path) or model_name_or_path, template=chat.template, precision=precision, world_size=args.world_size)
    check_machine(args, skeleton, trained, facts)
    checkpoint = resume_point(output_dir, facts) if resume else None
    reading = dict(max_length=max_length, skip_bad_records=skip_bad_records, unescape_newlines=unescape_newlines)
    examples = tokenize_records(data_path, chat, **reading)
    evaluated = tokenize_records(eval_path, chat, **reading) if eval_path else examples
    train_on, evaluate_on = hold_out(examples, eval_size, seed)
    evaluate_on = range(len(evaluated)) if eval_path else evaluate_on
    blocks = Blocks(examples, train_on, max_length, packing)
    eval_blocks = Blocks(evaluated, evaluate_on, max_length, packing) if len(evaluate_on) else None
    if args.process_index == 0:
        print(summarize(examples.counts), blocks.describe(args), sep="\n", file=sys.stderr)
    announce_memory(skeleton.config.to_dict(), flags, args, blocks.lengths, precision, check_memory)

    # ---- train ----
    set_seed(seed)
    attention = choose_attention(skeleton, precision, max_length)
    # The weights that the optimizer changes stay fp32, since in 16 bit a small update is lost; DeepSpeed keeps its own fp32 copy
    model = load_model(model_name_or_path, DTYPES[precision if args.deepspeed else "fp32"], attn_implementation=attention, allow_pickle=allow_pickle,
                       trust_remote_code=trust_remote_code, device_map=None if args.deepspeed else {"": args.device})
    add_token_rows(model, chat.tokenizer, chat.new_tokens)
    freeze(model, freeze_layers, chat.new_tokens)
    model.forward = MethodType(supervised_forward, model)
    about = {"base": model_name_or_path, "base_fingerprint": fingerprint(model_name_or_path), "template": chat.template}
    trainer = SupervisedTrainer(model, args, blocks, eval_blocks, attention is None, chat, about, longest_first, early_stopping_patience)
    write_facts(output_dir, facts)
    report = run_training(trainer, checkpoint)

    # ---- save ----
    save_result(trainer)
    if args.process_index == 0:
        print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    cli(main)
