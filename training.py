"""The training step that every script shares: packed documents, a loss on supervised positions, whole checkpoints.

A micro-batch is one row of documents laid end to end, without padding. They do not see each other, their positions
start from 0, and the head is run only where a token is supervised. The optimizer, schedule, logging, DeepSpeed and the
loop itself are transformers.Trainer's.
"""
import contextlib
import copy
import datetime
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import MethodType

if "LOCAL_RANK" not in os.environ:  # Trainer would split each batch over all GPUs (nn.DataParallel): torchrun is for that
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import numpy
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from utils import IGNORE_INDEX, BadInput, Chat, Examples, RunStopped, check_file, fill, pack

LOGITS_AT_ONCE = 2**25  # numbers: 128 MiB in fp32, as much again for their gradient


# ---- model ----
def document_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, document_lengths=None, **_):
    """Causal attention inside each document of one packed row: (1, heads, T, head size) -> (1, T, heads, head size).

    One call of torch's fused kernel per document needs no mask. The dense block mask that transformers would build for
    the row costs T x T and the work of all pairs of documents.
    """
    if key.shape[1] < query.shape[1] and query.is_cuda and (query.dtype == torch.float32 or torch.cuda.get_device_capability()[0] < 8):
        # GPUs before Ampere have no fused kernel for grouped heads: torch would fall back to one that holds all T x T scores
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    rows = zip(*(states.split(document_lengths, dim=2) for states in (query, key, value)))
    outputs = [F.scaled_dot_product_attention(*row, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True) for row in rows]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register("documents", document_attention)


def choose_attention(skeleton, precision: str, max_length: int) -> str | None:
    """How packed documents are kept apart: by flash_attention_2's variable-length kernel or by document_attention.

    None, for padded rows and the model's own attention, if it is of an architecture that takes no other (BLOOM), has a
    sliding window shorter than max_length or layers of another kind.
    """
    from transformers.utils import is_flash_attn_2_available

    config = skeleton.config
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise BadInput(f"models of the kind {config.model_type} change their logits ({name}), which the loss here would leave out")
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention"} or getattr(config, "attn_logit_softcapping", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if not skeleton._supports_attention_backend or (window or max_length) < max_length or (others and not window):
        return None
    if precision in ("bf16", "fp16") and is_flash_attn_2_available() and torch.cuda.get_device_capability()[0] >= 8:
        return "flash_attention_2"
    return "documents"


class LoraUpdate(torch.autograd.Function):
    """Add the low-rank update to the output of a frozen layer, in place: result += scaling * (x A^T) B^T.

    peft writes out (x A^T) B^T, its multiple and the sum, and reads the like in the backward: on layers of 8 ranks those
    passes over memory cost as much as the update itself.
    """

    @staticmethod
    def forward(ctx, result, x, a, b, scaling):
        """result (..., d_out) of the frozen layer, x (..., d_in), a (r, d_in), b (d_out, r)."""
        rows = x.reshape(-1, x.shape[-1]).to(result.dtype)
        low = (rows @ a.to(rows.dtype).T).mul_(scaling)  # (N, r)
        result.view(-1, result.shape[-1]).addmm_(low, b.to(low.dtype).T)
        ctx.mark_dirty(result)
        ctx.save_for_backward(rows, low, a, b)
        ctx.scaling, ctx.x = scaling, (x.shape, x.dtype)
        return result

    @staticmethod
    def backward(ctx, gradient):
        rows, low, a, b = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])  # (N, d_out)
        of_low = (flat @ b.to(flat.dtype)).mul_(ctx.scaling)  # (N, r)
        of_x = (of_low @ a.to(of_low.dtype)).view(ctx.x[0]).to(ctx.x[1])
        return gradient, of_x, (of_low.T @ rows).to(a.dtype), (flat.T @ low).to(b.dtype), None


def lora_forward(self, x, *_, **__):
    """forward() of a peft LoRA layer with one adapter, in training."""
    name = self.active_adapters[0]
    return LoraUpdate.apply(self.base_layer(x), self.lora_dropout[name](x), self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])


def speed_up_lora(model) -> None:
    """Give the plain LoRA layers of a peft model lora_forward; DoRA, quantized and ZeRO-3's sharded layers keep peft's own."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear and not module.use_dora[module.active_adapters[0]] and not hasattr(module.base_layer.weight, "ds_id"):
            module.forward = MethodType(lora_forward, module)


class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of N positions, a chunk of logits at a time.

    The gradients are made in the forward pass: every logit is computed once, turns into its gradient, which is its
    probability less one for the target, and is gone before the next chunk.
    """

    @staticmethod
    def forward(ctx, hidden, targets, head, *parameters):
        """hidden (N, D), targets (N,), head (n, D) -> (n, V), the head's trainable parameters -> scalar, fp32."""
        ctx.gradients = [torch.zeros_like(tensor) for tensor in (hidden, *parameters)]
        total = torch.zeros((), device=hidden.device)
        for begin, end in chunks(head, len(targets), hidden.device):
            with torch.enable_grad():
                chunk = hidden[begin:end].detach().requires_grad_()
                logits = head(chunk)  # (n, V)
            target = targets[begin:end, None]
            gradient = torch.log_softmax(logits.detach(), dim=1, dtype=torch.float32)
            total -= gradient.gather(1, target).sum()
            gradient.exp_().scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
            ctx.gradients[0][begin:end], *of_parameters = torch.autograd.grad(logits, (chunk, *parameters), gradient.to(logits.dtype))
            for whole in ctx.gradients[1:]:
                whole += of_parameters.pop(0)
            del logits, gradient  # else they would still be there while the next chunk's are made
        return total

    @staticmethod
    def backward(ctx, gradient):
        scaled, ctx.gradients = [whole.mul_(gradient) for whole in ctx.gradients], None  # kept here, they would be copied into .grad
        return scaled[0], None, None, *scaled[1:]


def chunks(head, positions: int, device) -> list[tuple[int, int]]:
    """Spans of positions whose logits together stay below LOGITS_AT_ONCE; under ZeRO-3 as many of them on every rank."""
    weight = next(head.parameters())
    size = max(1, LOGITS_AT_ONCE // getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 leaves shape empty
    count = torch.tensor(math.ceil(positions / size), device=device)
    if hasattr(weight, "ds_id"):  # each use of a sharded head gathers it, and all ranks must take part in that, in an empty block too
        count.clamp_(min=1)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return [(min(begin, positions), min(begin + size, positions)) for begin in range(0, int(count) * size, size)]


def supervised_forward(self, input_ids, labels, num_items_in_batch=None, position_ids=None, attention_mask=None,
                       document_lengths=None, **_):
    """forward() of a causal language model in training: the head sees the supervised positions only.

    Args:
        input_ids, labels: (B, T) long; labels are IGNORE_INDEX where nothing is trained, the first of a document included.
        num_items_in_batch: Supervised tokens of the global batch, by which the sum of the losses is divided.
        document_lengths: Of a packed row (B = 1), with position_ids that start from 0 in each document.
    """
    lengths = {"document_lengths": document_lengths} if self.config._attn_implementation == "documents" else {}
    hidden = self.base_model(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False, **lengths)[0]
    supervised = labels[:, 1:] != IGNORE_INDEX
    hidden, targets, head = hidden[:, :-1][supervised], labels[:, 1:][supervised], self.get_output_embeddings()  # (N, D), (N,)
    parameters = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and not any(hasattr(p, "ds_id") for p in head.parameters()):
        loss, correct = HeadLoss.apply(hidden, targets, head, *parameters), None
    else:
        # Evaluation; and ZeRO-3, which gathers a sharded head by hooks of autograd's own graph
        loss, correct = hidden.sum(dtype=torch.float32) * 0.0, 0  # in fp16 the sum may be infinite, and 0 times that is no number
        for begin, end in chunks(head, len(targets), hidden.device):
            of_chunk, right = checkpoint(head_chunk, head, hidden[begin:end], targets[begin:end], use_reentrant=False)
            loss, correct = loss + of_chunk, correct + right
    return {"loss": loss / (max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch), "correct": correct}


def head_chunk(head, hidden, targets):
    """hidden (n, D), targets (n,) -> sum of the cross-entropies, number of targets that are the likeliest token."""
    logits = head(hidden).float()  # (n, V)
    return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()


# ---- batches ----
class Blocks(torch.utils.data.Dataset):
    """Some of the examples, packed into blocks; item b is the list of the examples of block b, item -1 an empty block.

    Args:
        chosen: Numbers of the examples.
        shuffle: Else blocks, and the examples in them, stay in the order of the data.
    """

    def __init__(self, examples: Examples, chosen, max_length: int, packing: bool, shuffle: bool = True):
        chosen = numpy.asarray(chosen)
        lengths = examples.lengths[chosen]
        at_once = 2**20 if packing and shuffle else max(1, len(chosen))  # examples that are packed together, to bound the memory of it
        members, sizes = [], []
        for begin in range(0, len(chosen), at_once):
            part = lengths[begin : begin + at_once].tolist()
            blocks = [[i] for i in range(len(part))] if not packing else pack(part, max_length) if shuffle else fill(part, max_length)
            members.append(begin + numpy.fromiter(itertools.chain.from_iterable(blocks), "int64", len(part)))
            sizes += map(len, blocks)
        members = numpy.concatenate(members)
        self.examples, self.shuffle, self.members, self.starts = examples, shuffle, chosen[members], numpy.cumsum([0, *sizes])
        self.lengths = numpy.add.reduceat(lengths[members], self.starts[:-1])  # tokens of each block

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, b: int) -> list[dict]:
        return [self.examples[int(e)] for e in self.members[self.starts[b] : self.starts[b + 1]]] if b >= 0 else []

    def describe(self, args) -> str:
        """What one step trains on."""
        together = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        share = min(1, together / len(self))
        return (f"global batch = {args.per_device_train_batch_size} blocks x {args.gradient_accumulation_steps} accumulation x {args.world_size} ranks = "
                f"{together} blocks, about {share * len(self.members):.0f} examples and {share * self.lengths.sum():,.0f} tokens; "
                f"{math.ceil(len(self) / together)} steps an epoch")


class BlockSampler(torch.utils.data.Sampler):
    """Block numbers of one epoch, shuffled by seed and epoch alone; -1 fills the last global batch up.

    With the same blocks in each global batch on one rank and on many, batch, accumulation and ranks can be traded for
    one another, and no block is trained twice to make the ranks even.

    Args:
        first: Blocks that the first epoch begins with, whatever the seed says.
    """

    def __init__(self, blocks: int, multiple_of: int, seed: int | None, first: tuple[int, ...] = ()):
        self.blocks, self.length, self.seed, self.first, self.epoch = blocks, math.ceil(blocks / multiple_of) * multiple_of, seed, first, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = list(range(self.blocks))
        if self.seed is not None:
            order = torch.randperm(self.blocks, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        if self.epoch == 0 and self.first:
            order = [*self.first, *(b for b in order if b not in self.first)]
        return iter(order + [-1] * (self.length - self.blocks))


def collate(blocks: list[list[dict]], padded: bool = False) -> dict:
    """A micro-batch: the examples of its blocks as one packed row, or as padded rows for models that cannot take that.

    The first token of a document has nothing before it that could predict it, so it is never a label.
    """
    examples = [example for block in blocks for example in block] or [{"input_ids": [0], "labels": [IGNORE_INDEX], "record": -1}]
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    labels = [torch.tensor([IGNORE_INDEX] + example["labels"][1:]) for example in examples]
    batch = {"records": [example["record"] for example in examples]}
    if padded:
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        batch |= {"input_ids": pad(ids, batch_first=True), "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX), "attention_mask": mask}
    else:
        batch |= {"input_ids": torch.cat(ids)[None], "labels": torch.cat(labels)[None], "document_lengths": [len(row) for row in ids],
                  "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None]}
    tokens = sum(len(example["input_ids"]) for example in examples if example["record"] >= 0)
    return batch | {"tokens": tokens, "supervised": int((batch["labels"] != IGNORE_INDEX).sum())}


def count_characters(blocks: Blocks, tokenizer) -> int:
    """Characters of the text whose tokens are predicted: all but the first token of each example."""
    labels = ([label for label in example["labels"][1:] if label != IGNORE_INDEX] for b in range(len(blocks)) for example in blocks[b])
    return sum(len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for ids in labels)


# ---- trainer ----
class StopOnSignal(TrainerCallback):
    """Ctrl-C or a scheduler's SIGTERM ends the run after the step, with a checkpoint; a second Ctrl-C ends it at once."""

    caught, before = None, {}

    def on_train_begin(self, args, state, control, **_):
        def note(number, frame):
            if self.caught == number == signal.SIGINT:
                raise KeyboardInterrupt
            self.caught = self.caught or number
            print("stopping after this step, with a checkpoint (Ctrl-C again: at once)", file=sys.stderr)

        self.before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args, state, control, **_):
        caught = torch.tensor(int(self.caught is not None), device=args.device)
        if args.world_size > 1:  # all ranks stop after the same step
            torch.distributed.all_reduce(caught)
        if caught.item():
            self.caught = self.caught or signal.SIGINT
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Give the signals back, also after a run that failed: later processes would inherit a SIGTERM that ends nothing."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class SupervisedTrainer(Trainer):
    """transformers.Trainer on Blocks: counts tokens, stops at a NaN, evaluates by token, and saves whole checkpoints."""

    def __init__(self, model, args, train: Blocks, evaluation: Blocks | None, padded: bool, chat: Chat, about: dict,
                 longest_first: bool = False, early_stopping_patience: int = 0):
        args.remove_unused_columns, args.logging_nan_inf_filter = False, False
        super().__init__(model, args, data_collator=lambda blocks: collate(blocks, padded), train_dataset=train, eval_dataset=evaluation)
        self.chat, self.about = chat, about
        self.model_accepts_loss_kwargs = True  # supervised_forward divides by the supervised tokens of the global batch
        self.stopper = StopOnSignal()
        self.add_callback(self.stopper)
        if early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(early_stopping_patience))
        self.longest_first = longest_first
        self.seen = torch.zeros(2, dtype=torch.float64)  # tokens, supervised tokens
        self.records_in_step = []  # of each micro-batch, with its loss
        self.seconds_evaluating, self.saving_in, self.eval_characters = 0.0, None, 0

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        together = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        lengths, seed = self.train_dataset.lengths, args.seed if args.data_seed is None else args.data_seed
        first = numpy.argsort(-lengths, kind="stable")[:together].tolist() if self.longest_first else ()
        self.sampler = BlockSampler(len(lengths), together, seed if self.train_dataset.shuffle else None, tuple(first))
        return self.sampler

    def _get_eval_sampler(self, eval_dataset):
        return BlockSampler(len(eval_dataset), self.args.per_device_eval_batch_size * self.args.world_size, seed=None)

    def _run_epoch(self, epoch, **kwargs):
        self.sampler.epoch = epoch
        return super()._run_epoch(epoch=epoch, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if 0 < self.args.warmup_steps < 1 and self.args.warmup_steps * num_training_steps < 1:
            self.args.warmup_steps = 0  # else the first of a few steps would have the learning rate 0
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model, inputs, num_items_in_batch=None):
        records = inputs.pop("records")
        self.seen += torch.tensor([inputs.pop("tokens"), inputs.pop("supervised")])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.records_in_step.append((records, loss))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Called once a step: the place to stop at a NaN. fp16 skips steps whose gradient overflows, so its norm is not looked at."""
        norm = super()._get_grad_norm(model, grad_norm)
        of_gradient = 0.0 if norm is None or self.args.fp16 else float(norm)
        total = torch.stack([loss for _, loss in self.records_in_step]).sum().to(self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(total)
        if not math.isfinite(float(total) + of_gradient):
            ill = [records for records, loss in self.records_in_step if not math.isfinite(float(loss))]
            if self.args.world_size > 1:
                everyone = [None] * self.args.world_size
                torch.distributed.all_gather_object(everyone, ill)
                ill = sum(everyone, [])
            records = sorted({record for batch in ill or [batch for batch, _ in self.records_in_step] for record in batch if record >= 0})
            raise RunStopped(f"in step {self.state.global_step + 1} the loss is {float(total):.4g}, the norm of its gradient {of_gradient:.4g}; the step "
                             f"holds the records {records}: look at them with inspect_labels.py, lower the learning rate, or, in fp16 with a model that "
                             f"was made in bf16, take --precision fp32. The checkpoints in {self.args.output_dir} are from before")
        self.records_in_step = []
        return norm

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss, perplexity and accuracy over all supervised tokens of the evaluation data, each token counted once."""
        self.model_wrapped.eval()
        start = time.perf_counter()
        totals = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # loss, correct, supervised tokens
        for inputs in tqdm(self.get_eval_dataloader(), "evaluating", leave=False, disable=not self.is_world_process_zero()):
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model_wrapped(**inputs, num_items_in_batch=1)
            totals += torch.tensor([float(outputs["loss"]), float(outputs["correct"]), inputs["supervised"]], dtype=torch.float64).to(totals)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        loss, correct, count = totals.tolist()
        metrics = {"eval_loss": loss / count, "eval_perplexity": math.exp(min(loss / count, 100)), "eval_token_accuracy": correct / count}
        if self.eval_characters:  # the one figure that can be compared across vocabularies
            metrics["eval_bits_per_character"] = loss / math.log(2) / self.eval_characters
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.seconds_evaluating += time.perf_counter() - start
        return metrics

    # A checkpoint is written into .saving and renamed when it is whole: a run killed meanwhile leaves the one before.
    def _get_output_dir(self, trial):
        return self.saving_in or self.args.output_dir

    def _save_checkpoint(self, model, trial):
        output_dir, saving_in = Path(self.args.output_dir), Path(self.args.output_dir, ".saving")
        name = f"checkpoint-{self.state.global_step}"

        def publish():
            if not (saving_in / name).is_dir():
                return  # another machine that shares the folder has done it
            write_chat(saving_in / name, self)
            self.state.save_to_json(str(saving_in / name / "trainer_state.json"))
            if not (output_dir / name).exists():
                (saving_in / name).rename(output_dir / name)
            rotate_checkpoints(str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint)

        self.on_each_machine(lambda: shutil.rmtree(saving_in, ignore_errors=True))
        self.saving_in = str(saving_in)
        super()._save_checkpoint(model, trial)
        self.saving_in = None
        if self.state.best_model_checkpoint:
            self.state.best_model_checkpoint = str(output_dir / Path(self.state.best_model_checkpoint).name)
        self.on_each_machine(publish)
        self.on_each_machine(lambda: shutil.rmtree(saving_in, ignore_errors=True))

    def on_each_machine(self, act) -> None:
        """Run `act` on the first rank of each machine, the first machine before the others: they may share the folder."""
        self.accelerator.wait_for_everyone()
        for turn in (self.args.process_index == 0, self.args.process_index and self.args.local_process_index == 0):
            if turn:
                act()
            self.accelerator.wait_for_everyone()


# ---- a run ----
def make_arguments(output_dir: str, precision: str, eval_path: str | None, eval_size: float, early_stopping_patience: int, given: dict,
                   **chosen) -> TrainingArguments:
    """TrainingArguments out of our flags, our defaults, and what the user gave of the other fields."""
    ours = {"bf16": "precision", "fp16": "precision", "activation_checkpointing": "gradient_checkpointing", "resume_from_checkpoint": "resume",
            "auto_find_batch_size": None, "train_sampling_strategy": None, "label_smoothing_factor": None,
            "use_liger_kernel": None, "torch_compile": None, "remove_unused_columns": None, "do_train": None}
    for name in given.keys() & ours:
        raise BadInput(f"--{name} is not taken here" + (f": use --{ours[name]}" if ours[name] else ": the loss and the batches are our own"))
    if eval_path and eval_size:
        raise BadInput("--eval_path and --eval_size are two ways to say what to evaluate on: give one")
    evaluates = bool(eval_path or eval_size)
    if given.get("eval_strategy", "no") != "no" and not evaluates:
        raise BadInput(f"--eval_strategy={given['eval_strategy']} needs something to evaluate on: add --eval_path or --eval_size")
    for tracker in str(given.get("report_to") or "none").split(","):
        if tracker not in ("none", "all") and importlib.util.find_spec(tracker) is None:
            raise BadInput(f"--report_to={tracker} needs a package that is missing: pip install {tracker}")
    if early_stopping_patience and not evaluates:
        raise BadInput("--early_stopping_patience needs something to evaluate on: add --eval_path or --eval_size")
    every = "steps" if evaluates else "no"
    defaults = {"logging_steps": 10, "logging_first_step": True, "save_steps": 200, "save_total_limit": 2, "eval_strategy": every,
                "eval_steps": given.get("save_steps", 200), "per_device_eval_batch_size": chosen["per_device_train_batch_size"],
                "ddp_find_unused_parameters": False, "dataloader_pin_memory": torch.cuda.is_available()}
    if early_stopping_patience:
        defaults |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "restore_callback_states_from_checkpoint": True}
    if "deepspeed" in given:
        check_deepspeed(given["deepspeed"])
        if "LOCAL_RANK" not in os.environ:
            raise BadInput("--deepspeed needs torchrun: use the wrapper in scripts/, or put torchrun --nproc_per_node 1 in front of the script")
    given = given | {"report_to": str(given.get("report_to") or "none").split(",")}
    checkpointing = chosen.pop("gradient_checkpointing")
    if not torch.cuda.is_available():
        defaults["use_cpu"] = True
        if "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized():  # on CPUs accelerate would leave the timeout out
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=given.get("ddp_timeout", 1800)))
            if "deepspeed" in given:
                import deepspeed

                deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    try:
        return TrainingArguments(output_dir=output_dir, bf16=precision == "bf16", fp16=precision == "fp16", activation_checkpointing=checkpointing,
                                 activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None, **(defaults | chosen | given))
    except ValueError as problem:
        raise BadInput(f"transformers refuses these flags: {' '.join(str(problem).split())[:300]}") from None


def check_deepspeed(path: str) -> None:
    """BadInput if a DeepSpeed file would overrule the flags in silence, or cannot be read."""
    check_file("deepspeed", path)
    try:
        sections = json.loads(Path(path).read_text("utf-8"))
    except json.JSONDecodeError as problem:
        raise BadInput(f"--deepspeed={path}, line {problem.lineno}: not JSON ({problem.msg})") from None
    for section in ("optimizer", "scheduler"):
        if section in sections:
            raise BadInput(f"--deepspeed={path} has a section {section!r}, which would overrule the flags (--learning_rate, --optim, --lr_scheduler_type, "
                           f"--warmup_steps): remove it, the flags say it all")


def check_machine(args: TrainingArguments, skeleton, trained: int, facts: dict, bits: int = 16, new_rows: bool = False) -> None:
    """BadInput if the ranks disagree on what they train, or the machine cannot do what the DeepSpeed file asks for.

    Args:
        skeleton: The model on the meta device.
        trained: Number of weights that are trained.
        facts: What must be the same on every rank.
        bits: Of a frozen base.
        new_rows: Whether new tokens are trained beside a frozen table.
    """
    if args.world_size > 1:
        everyone = [None] * args.world_size
        torch.distributed.all_gather_object(everyone, facts)
        for rank, others in enumerate(everyone):
            for name in facts:
                if others[name] != everyone[0][name]:
                    raise BadInput(f"rank {rank} has another {name} than rank 0 ({others[name]}, not {everyone[0][name]}): give every machine the same files")
    if not args.deepspeed:
        return
    zero = json.loads(Path(args.deepspeed).read_text("utf-8")).get("zero_optimization", {})
    if zero.get("stage") == 3 and bits < 16:
        raise BadInput(f"--bits={bits} cannot be spread by ZeRO-3: take ds_configs/zero2.json, or --bits 16")
    if zero.get("stage") == 3 and new_rows:
        raise BadInput("this template's special tokens are new to the model, and peft cannot train their rows alone under ZeRO-3: take "
                       "ds_configs/zero2.json, or another --template")
    needed = 16 * trained * ((zero.get("offload_optimizer") or {}).get("device") == "cpu")  # fp32 weights, gradients, two moments
    needed += 2 * sum(p.numel() for p in skeleton.parameters()) * ((zero.get("offload_param") or {}).get("device") == "cpu")
    free = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if needed / machines > free:
        raise BadInput(f"--deepspeed={args.deepspeed} offloads {needed / machines / 1e9:.1f} GB to this machine's RAM, of which {free / 1e9:.1f} GB "
                       f"are free: take a file without offload on more GPUs, or train less (LoRA, --freeze_layers)")


def run_training(trainer: SupervisedTrainer, checkpoint: str | None) -> dict:
    """Train, evaluate, draw the loss curve; returns what a training script prints as its last line."""
    args = trainer.args
    output_dir = Path(args.output_dir)
    if checkpoint is None:
        trainable = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
        needed = trainable * 12 * ((args.save_total_limit or 5) + 1) + trainable * 4  # fp32 weights and two moments of AdamW
        parent = next(folder for folder in (output_dir, *output_dir.resolve().parents) if folder.exists())
        if shutil.disk_usage(parent).free < needed:
            raise BadInput(f"--output_dir={output_dir} has {shutil.disk_usage(parent).free / 1e9:.1f} GB free, checkpoints and result need "
                           f"{needed / 1e9:.1f} GB: free some space, or lower --save_total_limit")
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # tqdm.write prints the losses there; the standard output is for the last line
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
        except RuntimeError as problem:  # torch.OutOfMemoryError is one; the CPU's allocator and gloo raise it bare
            raise explain(problem, trainer) or problem from None
        finally:
            trainer.stopper.restore()
        seconds = time.perf_counter() - start - trainer.seconds_evaluating
        if trainer.is_world_process_zero():
            plot_loss(trainer.state.log_history, output_dir / "loss.png")
        if trainer.stopper.caught:
            raise RunStopped(f"stopped at step {trainer.state.global_step}, checkpoint kept in {output_dir}: go on with --resume True", status=130)
        known = [entry for entry in trainer.state.log_history[-3:] if "eval_loss" in entry and entry["step"] == trainer.state.global_step]
        if known and not args.load_best_model_at_end:
            metrics = known[0]
        else:
            metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    seen = trainer.seen.to(args.device)
    if args.world_size > 1:
        torch.distributed.all_reduce(seen)
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = {"tokens": int(seen[0]), "supervised_tokens": int(seen[1]), "seconds": round(seconds, 2), "tokens_per_second": round(float(seen[0]) / seconds, 1),
              "train_loss": result.training_loss, "eval_loss": metrics.get("eval_loss"), "peak_memory_bytes": peak, "output_dir": str(output_dir)}
    return report | {name: value for name, value in metrics.items() if name == "eval_bits_per_character"}


def explain(problem: RuntimeError, trainer: SupervisedTrainer) -> RunStopped | None:
    """What to do about a lack of memory or a lost machine, in the order of what costs least; None for anything else."""
    args, said = trainer.args, str(problem)
    if isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in said:
        batch = args.per_device_train_batch_size
        remedies = [f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {args.gradient_accumulation_steps * 2}"] if batch > 1 else []
        remedies += [] if args.activation_checkpointing else ["--gradient_checkpointing True"]
        remedies += [] if args.deepspeed else ["a smaller --max_length", "--optim adamw_8bit",
                                               "with several GPUs --deepspeed ds_configs/zero3.json, with much RAM ds_configs/zero3_offload.json"]
        remedies += ["finetune_lora.py, with --bits 4 at the last"]
        return RunStopped(f"out of memory in step {trainer.state.global_step + 1} ({said.splitlines()[0][:150]}). What to change, cheapest first: "
                          + "; ".join(remedies) + ". --longest_first True shows at the first step whether it fits")
    if args.world_size > 1 and re.search("timed out|connection (closed|reset)|broken pipe|peer", said, re.IGNORECASE):
        return RunStopped(f"another rank has died or cannot be reached ({said.splitlines()[0][:150]}): look at its messages, then start all of them again "
                          f"with --resume True; --ddp_timeout sets how many seconds to wait ({args.ddp_timeout} now)")
    return None


def plot_loss(history: list[dict], path: Path) -> None:
    """Loss over steps, training and evaluation, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points), label=label, marker="." if len(points) < 50 else None)
    axes.set(xlabel="step", ylabel="loss per supervised token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def write_chat(folder: Path, trainer: SupervisedTrainer) -> None:
    """What a saved model needs to be talked to: tokenizer, chat template, stop tokens, and which base an adapter is for."""
    chat = trainer.chat
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle
    chat.tokenizer.save_pretrained(folder)
    generation = copy.deepcopy(trainer.model.generation_config)
    generation.eos_token_id = chat.stop_ids
    if generation.pad_token_id is None:
        generation.pad_token_id = chat.tokenizer.eos_token_id
    # Older chat models give a temperature without do_sample, which transformers refuses to save
    generation.do_sample = bool(generation.do_sample or generation.temperature or generation.top_p or generation.top_k)
    generation.save_pretrained(folder)
    (folder / "yangtuo.json").write_text(json.dumps(trainer.about, indent=2, ensure_ascii=False), "utf-8")


def save_result(trainer: SupervisedTrainer) -> None:
    """Write the model or adapter with its tokenizer into output_dir, read back before it counts."""
    from peft import PeftModel

    output_dir, saving_in = Path(trainer.args.output_dir), Path(trainer.args.output_dir, ".saving")
    trainer.on_each_machine(lambda: shutil.rmtree(saving_in, ignore_errors=True))
    if not isinstance(trainer.model, PeftModel) and not trainer.args.deepspeed:
        # fp32 masters have done their work: what was computed with in each step were their 16-bit roundings
        trainer.model.to(torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else torch.float32)
    trainer.save_model(str(saving_in))  # under ZeRO-3 this gathers the shards, so every rank takes part
    if trainer.is_world_process_zero():
        write_chat(saving_in, trainer)
        check_saved(saving_in, trainer.model)
        for file in sorted(saving_in.iterdir(), key=lambda file: not file.name.endswith(".safetensors")):
            file.replace(output_dir / file.name)
        saving_in.rmdir()
    trainer.accelerator.wait_for_everyone()


def check_saved(folder: Path, model) -> None:
    """RunStopped if what was written lacks a tensor, or is an adapter that does nothing (tloen/alpaca-lora#446)."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    files = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]
    if not isinstance(model, PeftModel):  # by size, not by name: transformers stores experts under other names than it runs them
        saved = sum(math.prod(file.get_slice(name).get_shape()) for file in files for name in file.keys())
        wanted = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        if saved < wanted:
            raise RunStopped(f"{folder} holds {saved:,} weights after saving, the model has {wanted:,}")
        return
    tensors = {name: file.get_tensor(name) for file in files for name in file.keys()}
    if missing := set(get_peft_model_state_dict(model, save_embedding_layers=False)) - tensors.keys():
        raise RunStopped(f"{folder} lacks {len(missing)} tensors after saving, {min(missing)} for one")
    if not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name):
        raise RunStopped(f"the adapter in {folder} changes nothing, all its B matrices are zero: was the learning rate zero, or no step made?")
