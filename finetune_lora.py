"""LoRA tuning on instructions or conversations: freeze the base model, learn low-rank updates (arXiv:2106.09685).

Reads   a base model (in 16, 8 or 4 bit) and records of any format in sample/README.md
Writes  output_dir/, the adapter with tokenizer and chat template. Next: generate.py, merge_lora.py

    bash scripts/finetune_lora.sh                                  # every GPU of this machine, or the CPU
    python finetune_lora.py --model_name_or_path M --data_path D   # one GPU, or the CPU

GPU memory at 1,024 tokens, r = 8 (estimate_memory.py): 7B in 4 bit 5.9 GB, in 8 bit 9.0 GB, in 16 bit 15.5 GB; 13B in 4 bit 9.7 GB.
"""
import contextlib
import datetime
import importlib
import json
import math
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Literal

from utils import (IGNORE_INDEX, BadInput, Chat, RunStopped, can_pack, check_disk, check_ranks, check_run, check_tokenizer, cli, describe, draw_curves,
                   explain, make_blocks, read_examples, replace_json, resume_point, run_facts, write_facts)


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
    shuffle: bool = True,
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
        shuffle: Train in random order; else in that of the data, from easy to hard, say.
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
        precision: Arithmetic: auto (bf16 where the GPU or CPU computes in it, else fp16 on a GPU and fp32 on a CPU), bf16, fp16 or fp32.
        gradient_checkpointing: Keep one activation per layer and recompute the rest: a quarter slower, far less memory.
        early_stopping_patience: Evaluations in a row without a lower loss after which the run ends with the best weights; 0 never ends it.
        seed: Of everything random.
        resume: Go on from the last checkpoint in output_dir.
        training_arguments: Any other field of transformers.TrainingArguments, such as --max_steps or --report_to.
    """
    settings = check_run(flags := dict(locals()))

    # ---- load ----
    import torch  # these imports take seconds: they wait until the flags are understood
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

    config = load(AutoConfig, model_name_or_path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):  # names and shapes alone; before the arguments, since ZeRO-3 would shard it
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    linear = {name.rpartition(".")[2] for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = lora_target_modules if lora_target_modules == "all-linear" else [name.strip() for name in lora_target_modules.split(",")]
    if unknown := [name for name in targets if name not in linear and targets != "all-linear"]:  # peft skips what it does not find
        raise BadInput(f"--lora_target_modules: this model has no linear layer {unknown[0]!r}, it has {', '.join(sorted(linear))}; or take all-linear")
    args, precision = make_arguments(settings, precision)
    attention = choose_attention(skeleton, precision, max_length)
    chat = Chat(load(AutoTokenizer, model_name_or_path, trust_remote_code=trust_remote_code), template, last_round_only)
    check_tokenizer(chat, config)
    if args.deepspeed and args.hf_deepspeed_config.is_zero3() and (bits < 16 or chat.new_tokens):
        what = f"--bits={bits} cannot be spread" if bits < 16 else "the rows of this template's new tokens cannot be trained alone"
        raise BadInput(f"{what} by ZeRO-3: take ds_configs/zero2.json, or --bits 16 and another --template")

    # ---- prepare ----
    facts = run_facts(flags, template=chat.template, precision=precision, world_size=args.world_size)
    check_ranks(facts)
    checkpoint = resume_point(output_dir, facts) if resume else None
    examples, counts, train_on, evaluate_on = read_examples(flags, chat)
    blocks = make_blocks(examples["length"], train_on, max_length, packing, shuffle, args.world_size * args.train_batch_size * gradient_accumulation_steps)
    eval_blocks = make_blocks(examples["length"], evaluate_on, max_length, packing, shuffle, args.world_size * args.per_device_eval_batch_size)
    describe(counts, blocks, examples["length"], args)

    # ---- train ----
    set_seed(seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    quantization = None if bits == 16 else BitsAndBytesConfig(  # 8: LLM.int8, arXiv:2208.07339; 4: NF4 with double quantization, QLoRA, arXiv:2305.14314
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = load(AutoModelForCausalLM, model_name_or_path, dtype=dtype, quantization_config=quantization, attn_implementation=attention,
                 use_safetensors=None if allow_pickle else True, trust_remote_code=trust_remote_code,
                 device_map=None if args.deepspeed else {"": args.device}, output_loading_info=True)
    rows = add_token_rows(model, chat.tokenizer, chat.new_tokens)
    model.forward = MethodType(supervised_forward, model)
    model = get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=lora_r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=targets,
        use_rslora=use_rslora, use_dora=use_dora, trainable_token_indices=rows or None))
    speed_up_lora(model)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # new rows alone, not all of a grown table
    trainer = make_trainer(model, args, chat, facts, partial(collate, examples=examples, padded=not attention), blocks, eval_blocks, early_stopping_patience)
    write_facts(output_dir, facts)
    report = run_training(trainer, checkpoint, {"loss per supervised token": ["loss", "eval_loss"]})

    # ---- save ----
    save_result(trainer, report)


# ==== new tokens ====
def add_token_rows(model, tokenizer, new_tokens: list[str]) -> dict[str, list[int]]:
    """Give new tokens a row in embedding and head, each the mean of the old rows; {module name: row numbers}.

    A row left random is farther from all others than they are from one another, and it disturbs every softmax.
    """
    import torch

    if not new_tokens:
        return {}
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids, whole = tokenizer.convert_tokens_to_ids(new_tokens), contextlib.nullcontext()
    tables = {id(table.weight): table for table in (model.get_output_embeddings(), model.get_input_embeddings())}.values()  # one if tied
    if hasattr(model.get_input_embeddings().weight, "ds_id"):  # ZeRO-3 has given each rank its share: gather them, to be read and written
        whole = importlib.import_module("deepspeed").zero.GatheredParameters([table.weight for table in tables], modifier_rank=0)
    with torch.no_grad(), whole:
        for table in tables:
            table.weight[ids] = table.weight[: min(ids)].float().mean(dim=0).to(table.weight)
    return {name.rpartition(".")[2]: ids for name, module in model.named_modules() if module in tables}


# ==== fast lora ====
def speed_up_lora(model) -> None:
    """Let plain LoRA layers add their update in place (peft makes update, multiple and sum, each as large as the output), and drop inputs at less cost."""
    import torch
    from peft.tuners.lora import Linear

    def keep(x, p: float):  # 1, or with probability p 0: torch draws 64 bits a number on a CPU, a sixth of a step in bf16; 16 will do
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
        return (bits.view(x.shape) >= min(round(p * 2**16), 2**16 - 1) - 2**15).to(x.dtype)

    def forward(self, x, *_, **__):
        shape, x = x.shape, x.flatten(0, -2)  # (N, D); to add in place to a view would cost two copies of its gradient
        result = self.base_layer(x)
        for name in [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]:
            p = getattr(self.lora_dropout[name], "p", 0) if self.training and x.device.type == "cpu" else 0
            kept = x * keep(x, p) if 0 < p < 1 else self.lora_dropout[name](x)
            # (N, r), held by columns, so that no product, forward or backward, has rows of r numbers: those take CPUs 2 to 6 times as long
            low = (self.lora_A[name].weight @ kept.T).T
            result.addmm_(low, self.lora_B[name].weight.T.to(low.dtype).contiguous(), alpha=self.scaling[name] / (1 - p or 1))
        return result.unflatten(0, shape[:-1])

    for module in model.modules():  # DoRA, quantized and ZeRO-3's sharded layers keep peft's own
        if type(module) is Linear and not any(module.use_dora.values()) and not hasattr(module.base_layer.weight, "ds_id"):
            module.forward = MethodType(forward, module)


# ==== loading ====
def load(auto_class, name: str, may_lack: tuple = (), **arguments):
    """auto_class.from_pretrained(name); BadInput where a file is absent or cut off, or a weight is missing: transformers would take random ones."""
    try:
        loaded = auto_class.from_pretrained(name, **arguments)
    except Exception as problem:  # a cut-off file raises SafetensorError, RuntimeError or OSError, by where it was cut
        raise problem if "out of memory" in str(problem) else BadInput(f"{name} could not be loaded ({auto_class.__name__}): {str(problem)[:300]}") from None
    if arguments.get("output_loading_info"):
        loaded, found = loaded
        if missing := sorted({*found["missing_keys"]} - {*may_lack}) + sorted(str(key) for key in found["mismatched_keys"]):
            raise BadInput(f"{name} lacks {len(missing)} of its weights, {missing[0]} for one: the files do not belong to its config.json")
    return loaded


def document_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, document_lengths=None, **_):
    """Causal attention inside each document of one packed row: (1, heads, T, head size) -> (1, T, heads, head size).

    One call of torch's fused kernel per document needs no mask. The dense block mask that transformers would build for
    the row costs T x T and the work of all pairs of documents.
    """
    import torch

    if key.shape[1] < query.shape[1] and query.is_cuda and (query.dtype == torch.float32 or torch.cuda.get_device_capability()[0] < 8):
        # No fused kernel has grouped heads on GPUs before Ampere, nor in fp32: torch would fall back to one that holds all T x T scores
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
    # On a CPU short documents in fp32: torch's kernel takes up to twice the time for them in bf16
    dtypes = [torch.float32 if query.device.type == "cpu" and length <= 256 else value.dtype for length in document_lengths]
    documents = zip(dtypes, *(states.split(document_lengths, dim=2) for states in (query, key, value)))
    with torch.autocast("cpu", enabled=False):
        outputs = [attend(*(states.to(dtype) for states in document)) for dtype, *document in documents]
    return torch.cat([output.transpose(1, 2).to(value.dtype) for output in outputs], dim=1), None


def choose_attention(skeleton, precision: str, max_length: int) -> str | None:
    """How packed documents are kept apart: by flash_attention_2's variable-length kernel or by document_attention; None: padded rows."""
    import torch
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    AttentionInterface.register("documents", document_attention)
    if not can_pack(skeleton.config, max_length) or not skeleton._supports_attention_backend:
        return None
    fused = precision in ("bf16", "fp16") and is_flash_attn_2_available() and torch.cuda.get_device_capability()[0] >= 8
    return "flash_attention_2" if fused else "documents"


# ==== supervised ====
def supervised_forward(self, input_ids, labels, num_items_in_batch=None, position_ids=None, attention_mask=None, document_lengths=None, **_):
    """forward() of a causal language model, to train and to evaluate: the head sees the supervised positions only.

    Args:
        input_ids, labels: (B, T) long; labels are IGNORE_INDEX where nothing is trained, the first of a document included.
        num_items_in_batch: Supervised tokens of the global batch, by which the sum of the losses is divided.
        document_lengths: Of a packed row (B = 1), with position_ids from 0 in each document, by which flash_attention_2 tells them apart.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    lengths = {"document_lengths": document_lengths} if self.config._attn_implementation == "documents" else {}
    hidden = self.base_model(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False, **lengths)[0]
    supervised = labels[:, 1:] != IGNORE_INDEX
    hidden, targets, head = hidden[:, :-1][supervised], labels[:, 1:][supervised], self.get_output_embeddings()  # (N, D), (N,)
    if torch.is_grad_enabled() and not hasattr(head.weight, "ds_id"):
        loss, correct = head_loss(hidden, targets, head), None
    else:  # evaluation; and ZeRO-3, which gathers a sharded head by hooks of autograd's own graph
        def of_chunk(hidden, target):
            logits = head(hidden).float()  # (n, V)
            return torch.nn.functional.cross_entropy(logits, target, reduction="sum"), (logits.argmax(-1) == target).sum()
        loss, correct = hidden.sum(dtype=torch.float32) * 0.0, 0  # in fp16 the sum may be infinite, and 0 times that is no number
        for begin, end in chunks(head, len(targets), hidden.device):
            more, right = checkpoint(of_chunk, hidden[begin:end], targets[begin:end], use_reentrant=False)
            loss, correct = loss + more, correct + right
    return {"loss": loss / (max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch), "token_accuracy": correct, "count": len(targets)}


def head_loss(hidden, targets, head):
    """Sum of the cross-entropies of N positions, a chunk of logits at a time: hidden (N, D), targets (N,) -> scalar, fp32.

    The gradients are made here: every logit is computed once, turns into its gradient, which is its probability less one
    for the target, and is gone before the next chunk.
    """
    import torch

    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    total, gradients = torch.zeros((), device=hidden.device), [torch.zeros_like(tensor) for tensor in inputs]
    for begin, end in chunks(head, len(targets), hidden.device):
        chunk, target = hidden[begin:end].detach().requires_grad_(), targets[begin:end, None]
        logits = head(chunk)  # (n, V)
        gradient = torch.log_softmax(logits.detach(), dim=1, dtype=torch.float32)
        total -= gradient.gather(1, target).sum()
        gradient.exp_().scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
        gradients[0][begin:end], *of_parameters = torch.autograd.grad(logits, (chunk, *inputs[1:]), gradient.to(logits.dtype))
        for whole in gradients[1:]:
            whole += of_parameters.pop(0)
        del logits, gradient  # else they would still be there while the next chunk's are made
    # Zero, with those gradients: what autograd hands back to the model
    return total + sum(((tensor - tensor.detach()).float() * gradient.float()).sum() for tensor, gradient in zip(inputs, gradients))


# ==== logits ====
LOGITS_AT_ONCE = 2**25  # numbers: 128 MiB in fp32, as much again for their gradient


def chunks(head, positions: int, device) -> list[tuple[int, int]]:
    """Spans of positions whose logits together stay below LOGITS_AT_ONCE; under ZeRO-3 as many of them on every rank."""
    import torch

    size = max(1, LOGITS_AT_ONCE // getattr(head.weight, "ds_shape", head.weight.shape)[0])  # ZeRO-3 leaves shape empty
    count = torch.tensor(-(-positions // size), device=device)
    if hasattr(head.weight, "ds_id"):  # each use of a sharded head gathers it, and all ranks must take part in that, in an empty block too
        count.clamp_(min=1)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return [(min(begin, positions), min(begin + size, positions)) for begin in range(0, int(count) * size, size)]


# ==== training ====
def collate(blocks: list[list[int]], examples, padded: bool) -> dict:
    """A micro-batch: the examples of its blocks as one packed row, or as padded rows for models that cannot take that."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [examples[e] for block in blocks for e in block]
    ids = [torch.tensor(row["input_ids"]) for row in rows] or [torch.tensor([0])]  # an empty block trains nothing
    labels = [torch.tensor([IGNORE_INDEX] + row["labels"][1:]) for row in rows] or [torch.tensor([IGNORE_INDEX])]  # nothing predicts a first token
    counts = {"records": [row["record"] for row in rows], "tokens": sum(map(len, ids)) * bool(rows),
              "supervised": sum(int((row != IGNORE_INDEX).sum()) for row in labels)}
    if padded:
        return counts | {"input_ids": pad_sequence(ids, True), "labels": pad_sequence(labels, True, IGNORE_INDEX),
                         "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True)}
    return counts | {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], "document_lengths": [len(row) for row in ids],
                     "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None]}


def make_trainer(model, args, chat: Chat, facts: dict, collator, blocks, eval_blocks, patience: int = 0, characters: int = 0):
    """A Trainer that counts, stops at a NaN, evaluates (`characters`: of the evaluation text), and saves what a model needs to be talked to."""
    import torch
    from tqdm import tqdm
    from transformers import EarlyStoppingCallback, Trainer

    class SupervisedTrainer(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.in_step.append([inputs.pop("records"), inputs.pop("tokens"), inputs.pop("supervised"), num_items_in_batch])
            self.in_step[-1].append(loss := super().training_step(model, inputs, num_items_in_batch))
            return loss

        def _get_grad_norm(self, model, grad_norm=None):
            """Called once a step: the place to count, and to stop at a NaN. fp16 skips steps whose gradient overflows, so its norm is not looked at."""
            norm = super()._get_grad_norm(model, grad_norm)
            of_gradient = 0.0 if norm is None or args.fp16 else float(norm)
            (records, tokens, supervised, (items, *_), losses), self.in_step = zip(*self.in_step), []
            totals = torch.tensor([sum(tokens), sum(supervised), sum(losses) / args.world_size], dtype=torch.float64)  # Trainer multiplies by the ranks
            *counts, loss = self.accelerator.reduce(totals.to(args.device), "sum").tolist()
            if not math.isfinite(loss + of_gradient):
                ill = [held for held, of_batch in zip(records, losses) if not math.isfinite(float(of_batch))] or records  # of this rank
                raise RunStopped(f"in step {self.state.global_step + 1} the loss is {loss:.4g}, the norm of its gradient {of_gradient:.4g}; the step holds "
                                 f"the records {sorted(set(sum(ill, [])))}: look at them with inspect_labels.py, lower the learning rate, "
                                 f"or, in fp16 with a model that was made in bf16, take --precision fp32. The checkpoints in {args.output_dir} are from before")
            self.seen = [before + now for before, now in zip(self.seen, (*counts, float(items), loss * float(items)))]
            return norm

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            """Means of what forward() sums up, over all of the evaluation data, each token counted once."""
            self.model_wrapped.eval()
            start, sums = time.perf_counter(), {}
            for inputs in tqdm(self.get_eval_dataloader(), "evaluating", leave=False, disable=not self.is_world_process_zero()):
                with torch.no_grad(), self.compute_loss_context_manager():
                    outputs = self.model_wrapped(**self._prepare_inputs(inputs), num_items_in_batch=1)
                sums = {name: sums.get(name, 0.0) + float(value) for name, value in outputs.items()}
            sums = dict(zip(sums, self.accelerator.reduce(torch.tensor([*sums.values()], dtype=torch.float64).to(args.device), "sum").tolist()))
            metrics = {f"eval_{name}": total / sums["count"] for name, total in sums.items() if name != "count"}
            metrics |= {"eval_perplexity": math.exp(min(metrics["eval_loss"], 100))} if "token_accuracy" in sums else {}
            metrics |= {"eval_bits_per_character": sums["loss"] / math.log(2) / characters} if characters else {}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
            self.seconds_evaluating += time.perf_counter() - start
            return metrics

        def _save(self, output_dir=None, state_dict=None):
            """Weights, and beside them tokenizer, chat template, stop tokens: a checkpoint can be talked to as well."""
            super()._save(output_dir, state_dict)
            if args.should_save:
                Path(output_dir, "training_args.bin").unlink()  # a pickle
                chat.save(output_dir, getattr(self.model, "generation_config", None))
                replace_json(Path(output_dir, "yangtuo.json"), {name: facts.get(name) for name in ("base", "base_fingerprint", "template")})

    an_epoch = len(blocks) // (args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    if 0 < args.warmup_steps < 1 and args.warmup_steps * steps < 1:
        args.warmup_steps = 0  # else the first of a few steps would have the learning rate 0
    trainer = SupervisedTrainer(model, args, collator, blocks, eval_blocks or None, callbacks=[EarlyStoppingCallback(patience)] * bool(patience))
    trainer.model_accepts_loss_kwargs = True  # forward() divides by the supervised tokens, or pairs, of the global batch
    trainer.steps, trainer.in_step, trainer.seconds_evaluating, trainer.seen = steps, [], 0.0, [0.0] * 4
    return trainer


def make_arguments(settings: dict, precision: str):
    """transformers' TrainingArguments, and the precision: auto is bf16 where the hardware computes in it (not where it is emulated), else fp16 or fp32."""
    import torch
    from transformers import TrainingArguments

    cuda, cpu = torch.cuda.is_available(), torch.backends.cpu.get_cpu_capability()
    has_bf16 = torch.cuda.get_device_capability()[0] >= 8 if cuda else cpu == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    precision = precision if precision != "auto" else "bf16" if has_bf16 else "fp16" if cuda else "fp32"
    if not cuda and (precision == "fp16" or precision == "bf16" and not has_bf16):
        raise BadInput(f"--precision={precision} needs a GPU{', or a CPU with AVX512-BF16' * (precision == 'bf16')}: leave it at auto")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")  # else deepspeed warns that it found no other
    if not cuda and "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized():  # accelerate would leave the timeout out on CPUs
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=settings.get("ddp_timeout", 1800)))
        if "deepspeed" in settings:
            importlib.import_module("deepspeed").init_distributed("gloo", auto_mpi_discovery=False)
    try:
        return TrainingArguments(**settings, bf16=precision == "bf16", fp16=precision == "fp16", use_cpu=not cuda), precision
    except ValueError as problem:
        raise BadInput(f"transformers refuses these flags: {' '.join(str(problem).split())[:300]}") from None


def run_training(trainer, checkpoint: str | None, panels: dict[str, list[str]]) -> dict:
    """Train, evaluate, draw what `panels` names; returns what a training script prints as its last line."""
    import torch

    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
    check_disk(output_dir, 0 if checkpoint else trained * (4 + 12 * ((args.save_total_limit or 5) + 1)))  # fp32 weights and two moments of AdamW
    if checkpoint and json.loads(Path(checkpoint, "trainer_state.json").read_text("utf-8"))["global_step"] >= trainer.steps:
        args.num_train_epochs, args.max_steps = 0, -1  # it was killed behind its last step: transformers would train one more
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # tqdm.write prints the losses there; the standard output is for the last line
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except (RuntimeError, KeyboardInterrupt) as problem:  # torch.OutOfMemoryError is one; the CPU's allocator and gloo raise it bare
            raise explain(problem, args, trainer.state.global_step + 1) or problem from None
        seconds = time.perf_counter() - start - trainer.seconds_evaluating
        last = trainer.state.log_history[-3:]
        known = [entry for entry in last if "eval_loss" in entry and entry["step"] == trainer.state.global_step and not args.load_best_model_at_end]
        metrics = known[0] if known else trainer.evaluate() if trainer.eval_dataset else {}
    if trainer.is_world_process_zero() and any("loss" in entry for entry in trainer.state.log_history):
        draw_curves(trainer.state.log_history, panels, output_dir / "loss.png")
    tokens, supervised, items, loss = trainer.seen  # a loss is divided by its items: tokens, or pairs
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = {"tokens": int(tokens), "supervised_tokens": int(supervised), "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1),
              "train_loss": loss / items if items else None, "eval_loss": metrics.get("eval_loss"), "peak_memory_bytes": peak, "output_dir": str(output_dir)}
    return report | {name: value for name, value in metrics.items() if name[:5] == "eval_" and name not in ("eval_perplexity", "eval_token_accuracy")}


def save_result(trainer, report: dict) -> None:
    """Write the model or adapter with its tokenizer into output_dir, read back before it counts; print the report."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    args, model = trainer.args, trainer.model
    output_dir, saving_in = Path(args.output_dir), Path(args.output_dir, ".saving")
    if not isinstance(model, PeftModel) and not args.deepspeed:
        # fp32 masters have done their work: what was computed with in each step were their 16-bit roundings
        model.to(torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32)
    trainer.save_model(str(saving_in))  # under ZeRO-3 this gathers the shards, so every rank takes part
    if trainer.is_world_process_zero():
        saved = {name: tensor for file in saving_in.glob("*.safetensors") for name, tensor in load_file(file).items()}
        adapter = get_peft_model_state_dict(model, save_embedding_layers=False) if isinstance(model, PeftModel) else {}
        wanted = sum(getattr(p, "ds_numel", p.numel()) for p in (adapter or dict(model.named_parameters())).values())
        if (size := sum(tensor.numel() for tensor in saved.values())) < wanted:  # by size: transformers stores experts under other names
            raise RunStopped(f"{saving_in} holds {size:,} weights after saving, {wanted:,} were trained or belong to the model")
        if adapter and not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name):  # tloen/alpaca-lora#446
            raise RunStopped(f"the adapter in {saving_in} changes nothing, all its B matrices are zero: was the learning rate zero, or no step made?")
        for file in sorted(saving_in.iterdir(), key=lambda file: not file.name.endswith(".safetensors")):
            file.replace(output_dir / file.name)
        saving_in.rmdir()
        print(json.dumps(report, ensure_ascii=False))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    cli(main)
