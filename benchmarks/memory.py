"""The estimate of estimate_memory.py against the peak memory of real training steps.

    python benchmarks/memory.py          # two CPU threads, about 10 minutes, the quantized rows the most of it; on a GPU the same rows

Each row trains a random LLaMA for two steps (the optimizer has its state at the second), in a process of its own, and asks the allocator what
was alive at the most: on a CPU torch's profiler, which notes every allocation, on a GPU max_memory_allocated. What lies
outside of torch's allocator (CUDA's context, Python) is neither measured nor estimated here.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.report import add
from estimate_memory import Run, estimate, shapes_of, total
from utils import cli

SMALL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, vocab_size=2000)
WIDE = SMALL | dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=6)
GROUPED = WIDE | dict(num_key_value_heads=2, vocab_size=16000)
TIED = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, vocab_size=49152, tie_word_embeddings=True)
ON = dict(gradient_checkpointing=True)
LORA = dict(train="lora")
ROWS = {  # name: shapes, and what is not as in DEFAULTS
    "full, 1,024 tokens": (SMALL, {}),
    "full, 256 tokens": (SMALL, dict(tokens=256)),
    "full, 4,096 tokens": (SMALL, dict(tokens=4096)),
    "full, 1 document": (SMALL, dict(documents=1)),
    "full, accumulation": (SMALL, dict(gradient_accumulation_steps=2)),
    "full, batch 4": (SMALL, dict(batch=4, tokens=512)),
    "full, checkpointing": (SMALL, ON),
    "full, checkpointing, 4,096": (SMALL, dict(tokens=4096) | ON),
    "full, wide": (WIDE, {}),
    "full, wide, checkpointing, 256": (WIDE, dict(tokens=256) | ON),
    "full, grouped heads": (GROUPED, dict(tokens=512)),
    "full, tied": (TIED, dict(tokens=2048)),
    "full, tied, checkpointing": (TIED, dict(tokens=2048) | ON),
    "full, tied, checkpointing, accumulation": (TIED, dict(tokens=512, gradient_accumulation_steps=2) | ON),
    "full, 2 of 4 layers frozen": (SMALL, dict(freeze_layers=2)),
    "full, bf16": (SMALL, dict(precision="bf16")),
    "full, bf16, checkpointing": (WIDE, dict(precision="bf16", tokens=2048) | ON),
    "full, Adafactor": (WIDE, dict(optim="adafactor", tokens=256) | ON),
    "LoRA, 1,024 tokens": (SMALL, LORA),
    "LoRA, dropout": (SMALL, LORA | dict(lora_dropout=0.05)),
    "LoRA, dropout, 4,096": (SMALL, LORA | dict(lora_dropout=0.05, tokens=4096)),
    "LoRA, q_proj,v_proj": (SMALL, LORA | dict(lora_target_modules="q_proj,v_proj")),
    "LoRA, r = 64": (SMALL, LORA | dict(lora_r=64)),
    "LoRA, batch 4": (SMALL, LORA | dict(batch=4, tokens=512)),
    "LoRA, checkpointing": (SMALL, LORA | ON),
    "LoRA, checkpointing, dropout, 4,096": (SMALL, LORA | dict(tokens=4096, lora_dropout=0.05) | ON),
    "LoRA, wide, checkpointing": (WIDE, LORA | dict(tokens=2048) | ON),
    "LoRA, grouped heads, dropout": (GROUPED, LORA | dict(tokens=512, lora_dropout=0.05)),
    "LoRA, tied": (TIED, LORA | dict(tokens=2048)),
    "LoRA, tied, checkpointing": (TIED, LORA | dict(tokens=2048) | ON),
    "LoRA, bf16": (SMALL, LORA | dict(precision="bf16")),
    "LoRA, bf16, checkpointing, dropout": (WIDE, LORA | dict(precision="bf16", tokens=2048, lora_dropout=0.05) | ON),
    "LoRA, 4 bit": (WIDE, LORA | dict(bits=4, lora_dropout=0.05)),
    "LoRA, 4 bit, checkpointing": (WIDE, LORA | dict(bits=4, tokens=2048, lora_dropout=0.05) | ON),
    "LoRA, 8 bit, checkpointing": (WIDE, LORA | dict(bits=8, tokens=2048, lora_dropout=0.05) | ON),
    "LoRA and tables": (GROUPED, LORA | dict(tables=True, tokens=512)),
    "embeddings": (GROUPED, dict(train="embeddings", tokens=512)),
}
DEFAULTS = dict(train="full", tokens=1024, batch=1, documents=4, gradient_accumulation_steps=1, precision="fp32", gradient_checkpointing=False, lora_dropout=0.0)
SHARE = 0.7  # of the tokens that are supervised


def main(
    *,
    threads: int = 2,
    row: str = "",
):
    """Print a table of peak memory, estimated and measured.

    Args:
        threads: Of the CPU.
        row: Which row of the table this process runs; else all, each in a process.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if row:
        return print(measure(*ROWS[row]))
    print("| what is trained | estimated | measured | estimated / measured |\n|---|---|---|---|")
    ratios = []
    for name, (shapes, changes) in ROWS.items():
        command = [sys.executable, __file__, "--row", name, "--threads", str(threads)]
        measured = int(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True).stdout.splitlines()[-1])
        expected = expect(shapes, changes)
        ratios.append(expected / measured)
        print(f"| {name} | {expected / 1e6:.1f} MB | {measured / 1e6:.1f} MB | {expected / measured:.2f} |", flush=True)
    print(f"{len(ROWS)} rows, the estimate is off by {max(abs(ratio - 1) for ratio in ratios):.0%} at most", file=sys.stderr)
    add(f"estimate_memory.py, {len(ROWS)} training steps", "of what was measured", ratios, "torch's allocator", [1.0])


def expect(shapes: dict, changes: dict) -> float:
    """The estimate of a row, less what torch's allocator does not see."""
    import torch

    flags = DEFAULTS | changes
    tokens = flags["tokens"] * flags["batch"]
    run = Run(**{name: flags[name] for name in Run._fields if name in flags} | {"tokens": tokens, "supervised": int(SHARE * tokens), "gpu": torch.cuda.is_available()})
    parts = estimate(shapes_of({"model_type": "llama"} | shapes, "row"), run)
    return total(parts) - parts["framework"]


def measure(shapes: dict, changes: dict) -> int:
    """Bytes of tensors that are alive at the most in two training steps."""
    import gc
    from functools import partial
    from types import MethodType

    import numpy
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.profiler import ProfilerActivity, profile
    from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments

    from finetune import layers_of
    from finetune_lora import collate, document_attention, make_trainer, speed_up_lora, supervised_forward

    AttentionInterface.register("documents", document_attention)
    flags = DEFAULTS | changes
    generator = numpy.random.default_rng(0)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[flags["precision"]]
    count, length = 2 * flags["batch"] * flags["gradient_accumulation_steps"] * flags["documents"], flags["tokens"] // flags["documents"]
    examples = []
    for e in range(count):
        ids, supervised = generator.integers(0, shapes["vocab_size"], length), generator.random(length) < SHARE
        examples.append({"input_ids": ids.tolist(), "labels": numpy.where(supervised, ids, -100).tolist(), "record": e})
    blocks = [list(range(b, b + flags["documents"])) for b in range(0, count, flags["documents"])]
    config = LlamaConfig(**shapes, max_position_embeddings=8192)
    with tempfile.TemporaryDirectory() as folder:
        if flags.get("bits"):
            LlamaForCausalLM(config).save_pretrained(f"{folder}/base")
        gc.collect()  # what is freed while the profiler looks on, and was made before, would count as less than nothing
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            if flags.get("bits"):
                kind = BitsAndBytesConfig(load_in_8bit=flags["bits"] == 8, load_in_4bit=flags["bits"] == 4, bnb_4bit_quant_type="nf4",
                                          bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch_dtype)
                model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch_dtype, quantization_config=kind, attn_implementation="documents")
                for tensor in (*model.parameters(), *model.buffers()):  # on a CPU they are parts of the whole file in memory
                    tensor.data = tensor.data.clone()
            else:
                model = LlamaForCausalLM._from_config(config, attn_implementation="documents", dtype=torch.float32 if flags["train"] == "full" else torch_dtype)
            for module in (model.get_input_embeddings(), *layers_of(model)[: flags.get("freeze_layers", 0)]) if flags.get("freeze_layers") else ():
                module.requires_grad_(False)
            model.forward = MethodType(supervised_forward, model)
            tables = (model.get_input_embeddings(), model.get_output_embeddings())
            if flags["train"] == "embeddings":
                model.requires_grad_(False)
                for table in tables:
                    table.weight.requires_grad_(True)
            if flags["train"] == "lora":
                targets = flags.get("lora_target_modules", "all-linear")
                names = ["embed_tokens"] + ["lm_head"] * (not model.config.tie_word_embeddings) if flags.get("tables") else None
                model = get_peft_model(model, LoraConfig(
                    task_type="CAUSAL_LM", r=flags.get("lora_r", 8), lora_dropout=flags["lora_dropout"], modules_to_save=names,
                    target_modules=targets if targets == "all-linear" else targets.split(","), ensure_weight_tying=bool(names)))
                speed_up_lora(model)
            args = TrainingArguments(
                folder, bf16=flags["precision"] == "bf16", fp16=flags["precision"] == "fp16", per_device_train_batch_size=flags["batch"], num_train_epochs=1,
                gradient_accumulation_steps=flags["gradient_accumulation_steps"], activation_checkpointing=flags["gradient_checkpointing"],
                activation_checkpointing_kwargs={"use_reentrant": False} if flags["gradient_checkpointing"] else None, save_strategy="no", disable_tqdm=True,
                remove_unused_columns=False, report_to="none", use_cpu=not torch.cuda.is_available(),
                train_sampling_strategy="sequential", **{"optim": flags["optim"]} if "optim" in flags else {})
            make_trainer(model, args, None, {}, partial(collate, examples=examples, padded=False), blocks, []).train()
    alive = most = 0
    for event in sorted((event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else most


if __name__ == "__main__":
    cli(main)
