"""LoRA tuning on instructions or conversations: freeze the base model, learn low-rank updates (arXiv:2106.09685).

Reads   a base model (in 16, 8 or 4 bit) and records of any format in sample/README.md
Writes  output_dir/, the adapter with tokenizer and chat template. Next: generate.py, merge_lora.py

    bash scripts/finetune_lora.sh                                  # every GPU of this machine, or the CPU
    python finetune_lora.py --model_name_or_path M --data_path D   # one GPU, or the CPU

GPU memory in GB for one block of 1,024 tokens, r = 8 on all linear layers, gradient checkpointing (estimate):

| base         | weights                 | adapter | activations | logits | CUDA | sum  | runs on             |
|--------------|-------------------------|---------|-------------|--------|------|------|---------------------|
| 7B, 4 bit    | 6.5e9 x 0.52 + 0.5 = 3.9| 0.3     | 0.3 + 0.4   | 0.3    | 0.7  | 5.9  | 11 GB (2080Ti)      |
| 7B, 8 bit    | 6.5e9 x 1.00 + 0.5 = 7.0| 0.3     | 0.3 + 0.4   | 0.3    | 0.7  | 9.0  | 11 GB (2080Ti)      |
| 7B, 16 bit   | 6.7e9 x 2 = 13.5        | 0.3     | 0.3 + 0.4   | 0.3    | 0.7  | 15.5 | 24 GB (3090)        |
| 13B, 4 bit   | 12.7e9 x 0.52 + 0.7 = 7.3| 0.5    | 0.4 + 0.5   | 0.3    | 0.7  | 9.7  | 11 GB (2080Ti)      |

adapter: 20 million weights x 16 bytes (weight, gradient, two moments, all fp32). activations: one hidden state per layer
kept (32 x 1,024 x 4,096 x 2 bytes), and the inside of one layer while it is recomputed; in 8 bit the inputs of all linear
layers stay as well, since bitsandbytes keeps them where checkpointing cannot drop them. Embedding and head stay 16 bit.
"""
import json
import sys
from functools import partial
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
    output_dir: str = "output/finetune_lora",
    template: str = "auto",
    last_round_only: bool = False,
    max_length: int = 1024,
    packing: bool = True,
    skip_bad_records: bool = False,
    unescape_newlines: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    # LoRA
    bits: Literal[16, 8, 4] = 16,
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    lora_target_modules: str = "all-linear",
    use_rslora: bool = False,
    use_dora: bool = False,
    # optimization
    per_device_train_batch_size: int = 1,
    gradient_accumulation_steps: int = 8,
    num_train_epochs: float = 3,
    learning_rate: float = 3e-4,
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
    """Train a LoRA adapter on instructions or conversations.

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
        bits: Of the base model's weights: 16 as they are, 8 (int8) or 4 (NF4).
        lora_r: Rank of the update: r * (d_in + d_out) new weights per adapted layer.
        lora_alpha: The update is scaled by lora_alpha / lora_r, with rsLoRA by lora_alpha / sqrt(lora_r).
        lora_dropout: Share of the adapter's inputs that is dropped.
        lora_target_modules: Layers to adapt: all-linear, or names with commas such as q_proj,v_proj.
        use_rslora: Scale by the root of the rank (arXiv:2312.03732).
        use_dora: Learn the magnitude of each weight apart (arXiv:2402.09353).
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
    check_positive(max_length=max_length, per_device_train_batch_size=per_device_train_batch_size, gradient_accumulation_steps=gradient_accumulation_steps,
                   lora_r=lora_r)

    # ---- load ----
    # these imports take seconds: they wait until the flags are understood
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from models import DTYPES, add_token_rows, choose_precision, load_model, load_skeleton, load_tokenizer, lora_targets
    from training import (Blocks, SupervisedTrainer, check_machine, choose_attention, make_arguments, run_training, save_result,
                          speed_up_lora, supervised_forward)

    precision = choose_precision(precision)
    skeleton = load_skeleton(model_name_or_path, trust_remote_code)  # before the arguments: ZeRO-3 would shard it
    args = make_arguments(output_dir, precision, eval_path, eval_size, early_stopping_patience, training_arguments,
                          per_device_train_batch_size=per_device_train_batch_size, learning_rate=learning_rate,
                          gradient_accumulation_steps=gradient_accumulation_steps, num_train_epochs=num_train_epochs,
                          lr_scheduler_type=lr_scheduler_type, warmup_steps=warmup_steps, seed=seed,
                          gradient_checkpointing=gradient_checkpointing)
    targets = lora_targets(skeleton, lora_target_modules)
    chat = Chat(load_tokenizer(model_name_or_path, trust_remote_code), template, last_round_only)

    # ---- prepare ----
    facts = run_facts(flags, data=file_hash(data_path), eval_data=eval_path and file_hash(eval_path),
                      base=fingerprint(model_name_or_path) or model_name_or_path, template=chat.template, precision=precision, world_size=args.world_size)
    check_machine(args, skeleton, 0, facts, bits, bool(chat.new_tokens))
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
    model = load_model(model_name_or_path, DTYPES[precision], bits, attn_implementation=attention, allow_pickle=allow_pickle,
                       trust_remote_code=trust_remote_code, device_map=None if args.deepspeed else {"": args.device})
    rows = add_token_rows(model, chat.tokenizer, chat.new_tokens)
    model.forward = MethodType(supervised_forward, model)
    model = get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets,
        use_rslora=use_rslora, use_dora=use_dora, trainable_token_indices=rows or None))
    speed_up_lora(model)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # new rows alone, not all of a grown table
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
