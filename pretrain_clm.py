"""Continued pretraining on plain text, or pretraining from scratch: predict every token of every document.

Reads   a base model, such as extend_vocab.py's, and documents: .txt, JSON, JSONL, CSV, Parquet, or a folder of them
Writes  output_dir/, the model (or the adapter, for --train lora). Next: merge_lora.py, finetune.py, finetune_lora.py

    bash scripts/pretrain_clm.sh                                                      # every GPU of this machine, or the CPU
    python pretrain_clm.py --model_name_or_path M --data_path D --train embeddings    # first after extend_vocab.py
    python pretrain_clm.py --model_name_or_path M --data_path D --train lora          # then this

Documents end with the end-of-text token, are packed without seeing one another, and are never cut off: a long one becomes
windows that train each of its tokens once. The corpus is tokenized once into the cache, file by file, and read from there
through the page cache, so that it may be larger than the memory, and a run resumes at its very block.

GPU memory in GB for one block of 2,048 tokens of a 7B model with 55,296 pieces, gradient checkpointing (estimate):

| train      | weights            | trained                               | activations, logits, CUDA | sum  | runs on             |
|------------|--------------------|---------------------------------------|---------------------------|------|---------------------|
| embeddings | 6.9e9 x 2 = 13.8   | 2 x 55,296 x 4,096 x 16 bytes = 7.2   | 2.5                       | 23.5 | 1 x 40 GB           |
| lora, 4 bit| 3.4 + 0.9          | 7.2 + 0.3                             | 2.5                       | 14.3 | 1 x 24 GB (3090)    |
| lora       | 13.8               | 7.2 + 0.3                             | 2.5                       | 23.8 | 1 x 40 GB           |
| full       | 6.9e9 x 16 = 110   | in the weights' column                | 3                         | 113  | 4 x 40 GB with ZeRO-3 |
"""
import json
import os
import sys
from types import MethodType
from typing import Literal

from memory import announce_memory
from utils import (BadInput, Chat, check_file, check_model, check_output_dir, check_positive, cli, document_files, file_hash, fingerprint, hold_out,
                   resume_point, run_facts, show, summarize, tokenize_documents, write_facts)


def main(
    *,
    # model and data
    model_name_or_path: str,
    config_name: str | None = None,
    data_path: str,
    document_separator: Literal["line", "blank_line"] = "line",
    eval_path: str | None = None,
    eval_size: float = 0,
    output_dir: str = "output/pretrain_clm",
    max_length: int = 2048,
    packing: bool = True,
    shuffle: bool = True,
    skip_bad_records: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    # what is trained
    train: Literal["full", "embeddings", "lora"] = "full",
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
    num_train_epochs: float = 1,
    learning_rate: float = 2e-4,
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
    """Train a model on documents.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        config_name: Folder or file of the configuration of a model to begin from scratch, with the base model's tokenizer.
        data_path: Training data: JSON, JSONL, CSV or Parquet (pretrain_clm.py: also .txt, or a folder); see sample/README.md.
        document_separator: What parts the documents of a .txt file: line (one a line) or blank_line.
        eval_path: File of records to evaluate on.
        eval_size: Records of data_path held out to evaluate on: a number, or a share below 1.
        output_dir: Folder for checkpoints and the result.
        max_length: Tokens per example; what is longer is cut into windows, a dialogue into whole rounds.
        packing: Fill blocks of max_length tokens with whole examples; else an example is a block.
        shuffle: Train in random order; else in that of the data, from easy to hard, say.
        skip_bad_records: Drop bad records and say how many and why, instead of stopping.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        train: full (all weights), embeddings (embedding and head alone) or lora (those two, and an adapter for the rest).
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
    for flag, path in (("data_path", data_path), ("eval_path", eval_path)):
        if not os.path.isdir(path or ""):
            check_file(flag, path)
    check_output_dir(output_dir, resume)
    check_positive(max_length=max_length, per_device_train_batch_size=per_device_train_batch_size, gradient_accumulation_steps=gradient_accumulation_steps,
                   lora_r=lora_r)
    if bits < 16 and train != "lora":
        raise BadInput(f"--bits={bits} needs --train lora: quantized weights cannot be trained themselves")
    if config_name and train != "full":
        raise BadInput(f"--config_name begins from scratch, where --train={train} would leave random weights as they are: take --train full")

    # ---- load ----
    # these imports take seconds: they wait until the flags are understood
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from models import DTYPES, choose_precision, freeze_all_but_embeddings, load_model, load_skeleton, load_tokenizer, lora_targets, new_model, table_names
    from training import (Blocks, SupervisedTrainer, check_machine, choose_attention, count_characters, make_arguments, run_training, save_result,
                          speed_up_lora, supervised_forward)

    precision = choose_precision(precision)
    skeleton = load_skeleton(config_name or model_name_or_path, trust_remote_code)  # before the arguments: ZeRO-3 would shard it
    args = make_arguments(output_dir, precision, eval_path, eval_size, early_stopping_patience, training_arguments,
                          per_device_train_batch_size=per_device_train_batch_size, learning_rate=learning_rate,
                          gradient_accumulation_steps=gradient_accumulation_steps, num_train_epochs=num_train_epochs,
                          lr_scheduler_type=lr_scheduler_type, warmup_steps=warmup_steps, seed=seed,
                          gradient_checkpointing=gradient_checkpointing)
    targets = lora_targets(skeleton, lora_target_modules)
    tokenizer = load_tokenizer(model_name_or_path, trust_remote_code)
    if not config_name and len(tokenizer) > skeleton.config.vocab_size:
        raise BadInput(f"{model_name_or_path}: its tokenizer has {len(tokenizer):,} tokens, its model {skeleton.config.vocab_size:,} rows: they do not "
                       f"belong together, or the model was not resized (extend_vocab.py does both)")
    chat_template = tokenizer.chat_template
    chat = Chat(tokenizer, "plain")
    tokenizer.chat_template = chat_template  # the base's own is saved with the model: it is no worse a chat model for having read

    # ---- prepare ----
    data, eval_data = ([file_hash(file) for file in document_files(path)] if path else None for path in (data_path, eval_path))
    facts = run_facts(flags, data=data, eval_data=eval_data,
                      base=fingerprint(model_name_or_path) or model_name_or_path, template=chat.template, precision=precision, world_size=args.world_size)
    trained = sum(p.numel() for p in skeleton.parameters()) if train == "full" else 2 * skeleton.get_input_embeddings().weight.numel()
    check_machine(args, skeleton, trained, facts, bits, new_rows=train == "lora")
    checkpoint = resume_point(output_dir, facts) if resume else None
    reading = dict(max_length=max_length, skip_bad_records=skip_bad_records, document_separator=document_separator)
    examples = tokenize_documents(data_path, chat, **reading)
    evaluated = tokenize_documents(eval_path, chat, **reading) if eval_path else examples
    train_on, evaluate_on = hold_out(examples, eval_size, seed)
    evaluate_on = range(len(evaluated)) if eval_path else evaluate_on
    blocks = Blocks(examples, train_on, max_length, packing, shuffle)
    eval_blocks = Blocks(evaluated, evaluate_on, max_length, packing) if len(evaluate_on) else None
    if args.process_index == 0:
        print(summarize(examples.counts), blocks.describe(args), sep="\n", file=sys.stderr)
    announce_memory(skeleton.config.to_dict(), flags, args, blocks.lengths, precision, check_memory)

    # ---- train ----
    set_seed(seed)
    attention = choose_attention(skeleton, precision, max_length)
    if config_name:
        model = new_model(config_name, len(tokenizer), DTYPES[precision], attention, trust_remote_code).to(args.device)
    else:
        model = load_model(model_name_or_path, DTYPES[precision], bits, attn_implementation=attention, allow_pickle=allow_pickle,
                           trust_remote_code=trust_remote_code, device_map=None if args.deepspeed else {"": args.device})
    model.forward = MethodType(supervised_forward, model)
    if train == "embeddings":
        freeze_all_but_embeddings(model)
    elif train == "lora":
        model = get_peft_model(model, LoraConfig(
            task_type="CAUSAL_LM", r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets, use_rslora=use_rslora,
            use_dora=use_dora, modules_to_save=table_names(model), ensure_weight_tying=True))
        speed_up_lora(model)
    for parameter in model.parameters():
        if parameter.requires_grad and not args.deepspeed:  # in 16 bit a small update is lost; DeepSpeed keeps its own fp32 copy
            parameter.data = parameter.data.float()
    about = {"base": model_name_or_path, "base_fingerprint": fingerprint(model_name_or_path), "template": chat.template}
    trainer = SupervisedTrainer(model, args, blocks, eval_blocks, attention is None, chat, about, longest_first, early_stopping_patience)
    trainer.eval_characters = count_characters(eval_blocks, tokenizer) if eval_blocks else 0
    write_facts(output_dir, facts)
    report = run_training(trainer, checkpoint)

    # ---- save ----
    save_result(trainer)
    if args.process_index == 0:
        print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    cli(main)
