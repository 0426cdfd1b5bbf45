"""Learning from rewards: PPO (arXiv:1707.06347), RLOO (arXiv:2402.14740) and GRPO (arXiv:2402.03300), with LoRA.

Reads   a tuned model, prompts, and what judges its answers: a reward model of train_reward.py, rules of yours (sample/rules.py), or both
Writes  output_dir/, the adapter with tokenizer and chat template, log.jsonl and curves.png. Next: generate.py, merge_lora.py

    bash scripts/train_ppo.sh                                                       # every GPU of this machine, or the CPU
    python train_ppo.py --model_name_or_path M --data_path sample/prompts.jsonl --rules sample/rules.py:finished=1,chinese=1 --advantage grpo

An update samples answers, scores them, and makes those likelier that did better than expected, without going far from the model that it
started from. Reward of a token: - kl_coef * log(p / p at the start), and on the last one the score: rules * weights + reward model
- missing_eos_penalty if the answer was cut. The start (adapter off), policy, critic and a reward model that is an adapter share one base.
"""
import contextlib
import copy
import datetime
import difflib
import importlib.util
import inspect
import json
import math
import random
import resource
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Literal

from utils import (SHORTEST, BadInput, Chat, RunStopped, can_pack, check_disk, check_file, check_model, check_numbers, check_output_dir, check_positive,
                   check_ranks, check_tokenizer, clean_messages, cli, draw_curves, file_hash, fingerprint, numbered_records, pack, read_json, replace_json,
                   resume_point, row_turns, run_facts, show, whole_folder, write_facts)


def main(
    *,
    # model and data
    model_name_or_path: str,
    data_path: str,
    output_dir: str = "output/train_ppo",
    template: str = "auto",
    max_length: int = 1024,
    shuffle: bool = True,
    skip_bad_records: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    # LoRA
    bits: Literal[16, 8, 4] = 16,
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_target_modules: str = "all-linear",
    # reward
    reward_model: str | None = None,
    rules: str | None = None,
    missing_eos_penalty: float = 1.0,
    kl_coef: float = 0.05,
    max_kl: float = 5.0,
    # optimization
    advantage: Literal["gae", "rloo", "grpo"] = "gae",
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    clip_range: float = 0.2,
    value_coef: float = 0.1,
    ppo_epochs: int = 1,
    num_mini_batches: int = 1,
    per_device_train_batch_size: int = 1,
    learning_rate: float = 1e-4,
    lr_scheduler_type: str = "constant",
    max_grad_norm: float = 1.0,
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    gradient_checkpointing: bool = True,
    # answers
    rollout_batch_size: int = 8,
    num_generations: int = 8,
    per_device_rollout_batch_size: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    # the run
    max_steps: int = 100,
    logging_steps: int = 10,
    save_steps: int = 10,
    seed: int = 42,
    resume: bool = False,
    deepspeed: str | None = None,
):
    """Train a LoRA adapter with rewards for its own answers.

    Args:
        model_name_or_path: Folder or hub name of the base model.
        data_path: Training data: JSON, JSONL, CSV or Parquet (pretrain_clm.py: also .txt, or a folder); see sample/README.md.
        output_dir: Folder for checkpoints and the result.
        template: Prompt format: auto (the model's own), alpaca, vicuna_chat, yayi, chatml, ziya, llama2_chinese, llama2 or plain.
        max_length: Tokens of a prompt and its answer together; a prompt that leaves less than max_new_tokens is bad.
        shuffle: Train in random order; else in that of the data, from easy to hard, say.
        skip_bad_records: Drop bad records and say how many and why, instead of stopping.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Load weights that are pickles, which can run code.
        bits: Of the base model's weights: 16 as they are, 8 (int8) or 4 (NF4).
        lora_r: Rank of the update: r * (d_in + d_out) new weights per adapted layer.
        lora_alpha: The update is scaled by lora_alpha / lora_r, with rsLoRA by lora_alpha / sqrt(lora_r).
        lora_target_modules: Layers to adapt: all-linear, or names with commas such as q_proj,v_proj.
        reward_model: Folder of a reward model, or of an adapter that is one.
        rules: Python file and the weights of its rules, as in sample/rules.py:finished=1,chinese=0.5.
        missing_eos_penalty: Taken from the score of an answer that was cut before its stop token.
        kl_coef: Weight of the KL to the start in the reward of each token.
        max_kl: The run stops where the KL to the start is above this, in nats a token.
        advantage: What was expected: gae (by a critic: PPO), rloo (the mean of the other answers) or grpo (of all, by their spread).
        gamma: Discount of later rewards, for gae.
        gae_lambda: From 0, trust the critic's next value alone, to 1, the rewards alone.
        clip_range: How far a token's probability, and the critic's value, may move in an update before it counts no more.
        value_coef: Weight of the critic's loss.
        ppo_epochs: Passes over the answers of an update.
        num_mini_batches: Steps of the optimizer in each pass.
        per_device_train_batch_size: Blocks per step and GPU.
        learning_rate: Peak of the schedule.
        lr_scheduler_type: Schedule: constant, linear or cosine.
        max_grad_norm: A longer gradient is shortened to this.
        precision: Arithmetic: auto (bf16 where the GPU has it, else fp16; fp32 on a CPU), bf16, fp16 or fp32.
        gradient_checkpointing: Keep one activation per layer and recompute the rest: a quarter slower, far less memory.
        rollout_batch_size: Prompts of an update, of all GPUs together.
        num_generations: Answers to each prompt.
        per_device_rollout_batch_size: Answers that a GPU samples at once.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; higher is more varied.
        max_steps: Updates.
        logging_steps: Updates from one look at three answers to the next.
        save_steps: Updates from one checkpoint to the next.
        seed: Of everything random.
        resume: Go on from the last checkpoint in output_dir.
        deepspeed: Not taken, since ZeRO would gather every layer for every token of an answer; the message says what to do.
    """
    judges = check_ppo(flags := dict(locals()))

    # ---- load ----
    import torch  # these imports take seconds: they wait until the flags are understood
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, get_scheduler, set_seed

    config = load(AutoConfig, model_name_or_path, trust_remote_code=trust_remote_code)
    chat = Chat(load(AutoTokenizer, model_name_or_path, trust_remote_code=trust_remote_code), template)
    check_tokenizer(chat, config)
    if chat.new_tokens or not chat.stops:
        raise BadInput(f"--template={template} " + (f"needs {chat.new_tokens[0]}, which the model never learned: tune it with this template first"
                       if chat.stops else "ends an answer with no special token, so that none would ever finish: choose another"))
    if max_length > (context := getattr(config, "max_position_embeddings", None) or max_length):
        raise BadInput(f"--max_length={max_length} is more than the model's context of {context}")
    prompts = read_prompts(data_path, chat, max_length - max_new_tokens, skip_bad_records)
    ranks, precision = join_ranks(precision)
    if rollout_batch_size % ranks.num_processes:
        raise BadInput(f"--rollout_batch_size={rollout_batch_size} prompts cannot be shared among {ranks.num_processes} ranks: give a multiple of it")

    # ---- prepare ----
    adapter = Path(reward_model or "", "adapter_model.safetensors")
    facts = run_facts(flags, template=chat.template, precision=precision, world_size=ranks.num_processes,
                      rules_file=rules and file_hash(rules.rpartition(":")[0]),
                      reward_model=reward_model and (file_hash(adapter) if adapter.is_file() else fingerprint(reward_model)))
    check_ranks(facts)
    checkpoint = resume_point(output_dir, facts) if resume else None
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    linear = {name.rpartition(".")[2] for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = lora_target_modules if lora_target_modules == "all-linear" else [name.strip() for name in lora_target_modules.split(",")]
    if unknown := [name for name in targets if name not in linear and targets != "all-linear"]:  # peft skips what it does not find
        raise BadInput(f"--lora_target_modules: this model has no linear layer {unknown[0]!r}, it has {', '.join(sorted(linear))}; or take all-linear")
    attention, dtype = choose_attention(skeleton, precision, max_length), {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    quantization = None if bits == 16 else BitsAndBytesConfig(  # 8: LLM.int8, arXiv:2208.07339; 4: NF4 with double quantization, QLoRA, arXiv:2305.14314
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    given = dict(dtype=dtype, device_map={"": ranks.device}, use_safetensors=None if allow_pickle else True, trust_remote_code=trust_remote_code)
    base = load(AutoModelForCausalLM, model_name_or_path, quantization_config=quantization, attn_implementation=attention, output_loading_info=True, **given)
    configured, base.generation_config = base.generation_config, GenerationConfig(  # a model's own top_k, say, would sample from what is not scored
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens, eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0],
        suppress_tokens=list(range(len(chat.tokenizer), base.get_input_embeddings().weight.shape[0])) or None)  # rows that no token has
    set_seed(seed)  # every rank makes the same adapters
    lora = LoraConfig(task_type="CAUSAL_LM", r=lora_r, lora_alpha=lora_alpha, target_modules=targets)  # without dropout: all passes have to agree
    model = get_peft_model(base, lora)
    judge = load_judge(model, reward_model, facts["base_fingerprint"], given) if reward_model else None
    critic = add_critic(model, lora, judge) if advantage == "gae" else None
    speed_up_lora(model)
    for module in model.modules():  # nor may the base drop anything
        vars(module).update({name: 0.0 for name in ("attention_dropout", "p") if isinstance(vars(module).get(name), float)})
    if gradient_checkpointing:
        base.activation_checkpointing_enable()
    trained = [p for name, p in model.named_parameters() if ".default." in name or ".critic." in name] + ([critic.weight] if critic else [])
    optimizer = torch.optim.AdamW(trained, learning_rate, eps=1e-5, weight_decay=0.0)
    schedule, scaler = get_scheduler(lr_scheduler_type, optimizer, 0, max_steps), torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16")
    torch.manual_seed(seed + ranks.process_index)  # from here on the ranks differ: they sample
    check_disk(output_dir, 4 * 12 * sum(p.numel() for p in trained))  # three checkpoints with two moments of AdamW, and the result
    log = begin_run(output_dir, facts, checkpoint, trained, kept := {"optimizer": optimizer, "schedule": schedule, "scaler": scaler}, ranks)
    save = partial(save_policy, model=model, chat=chat, configured=configured, facts=facts)
    head, autocast = base.get_output_embeddings(), partial(torch.autocast, ranks.device.type, dtype, enabled=precision != "fp32")
    when_sampling = "sdpa" if attention == "documents" else base.config._attn_implementation

    def states(adapter: str | None, batch: list[dict]):
        model.set_adapter(adapter or "default")
        with autocast(), contextlib.nullcontext() if adapter else model.disable_adapter():  # None: the model as the run started
            return answer_states(base, batch, packed=attention is not None)

    def log_probs(adapter: str | None, batch: list[dict]):
        hidden, tokens = states(adapter, batch)
        with autocast():
            return token_log_probs(hidden, tokens, head, temperature, len(chat.tokenizer))

    def values(batch: list[dict]):
        return critic(states("critic", batch)[0].float())[:, 0]

    # ---- train ----
    start, seen = time.perf_counter(), Counter()
    for step in range(len(log), max_steps):
        # Sample a group of answers to each prompt of this rank
        clock = [time.perf_counter()]
        places = range(step * rollout_batch_size + ranks.process_index, (step + 1) * rollout_batch_size, ranks.num_processes)
        answers = [dict(prompts[prompt_at(place, len(prompts), shuffle, seed)]) for place in places for _ in range(num_generations)]
        model.set_adapter("default")
        base.set_attn_implementation(when_sampling)
        with autocast():
            sample(base.eval(), chat, answers, per_device_rollout_batch_size)
        clock.append(time.perf_counter())

        # Score them: text goes to the reward model, whose template and tokens are its own
        for answer in answers:
            try:
                answer["rules"] = run_rules(judges, answer["messages"], answer["text"], answer["finished"], answer["record"], answer["where"])
            except BadInput as problem:  # in this rank's answers alone, so this rank has to say it
                raise RunStopped(str(problem), status=2) from None
            answer["score"] = sum(judges[name][0] * said for name, said in answer["rules"].items()) - missing_eos_penalty * (not answer["finished"])
        if judge:
            model.set_adapter("reward" if judge.shared else "default")
            rows = [reward_ids(judge.chat, answer["messages"], answer["text"], answer["finished"]) for answer in answers]
            with autocast():
                for i, reward in read_rewards(judge, rows, per_device_rollout_batch_size):
                    answers[i].update(reward_model=reward, score=answers[i]["score"] + reward)
        clock.append(time.perf_counter())

        # Measure them in the very blocks that are learned from below, so that ratios begin at exactly 1
        base.train().set_attn_implementation(attention or when_sampling)
        order, lengths = torch.randperm(len(answers)).tolist(), [len(answer["prompt"] + answer["ids"]) for answer in answers]
        parts = [order[k::num_mini_batches] for k in range(num_mini_batches)]
        mini_batches = [[[answers[part[i]] for i in block] for block in pack([lengths[e] for e in part], max_length * per_device_train_batch_size)]
                        for part in parts]
        for batch in sum(mini_batches, []):
            with torch.no_grad():
                old = log_probs("default", batch)
                known = {"old": old, "k1": old - log_probs(None, batch)} | ({"values": values(batch)} if critic else {})
            for name, tensor in known.items():
                for answer, part in zip(batch, tensor.split([len(answer["ids"]) for answer in batch])):
                    answer[name] = part
        for answer in answers:  # the KL all along, the score on the last token: the stop token, unless the answer was cut
            answer["rewards"] = -kl_coef * answer["k1"]
            answer["rewards"][-1] += answer["score"]
            if critic:
                answer["advantages"], answer["returns"] = gae(answer["rewards"], answer["values"], gamma, gae_lambda)
        if critic:
            whiten(answers, ranks)
        else:
            for i in range(0, len(answers), num_generations):
                compare_group(answers[i : i + num_generations], advantage)

        # Learn. An answer token counts the same wherever it is: a mini-batch is divided by those of all ranks
        counts, sums = add_up(ranks, [sum(len(answer["ids"]) for batch in mini_batch for answer in batch) for mini_batch in mini_batches]), Counter()
        for mini_batch, count in list(zip(mini_batches, counts)) * ppo_epochs:
            for batch in mini_batch:
                names = [name for name in ("old", "advantages", "values", "returns") if name in batch[0]]
                old, advantages, *known = (torch.cat([answer[name] for answer in batch]) for name in names)
                loss, clipped = policy_loss(log_probs("default", batch), old, advantages, clip_range)
                scaler.scale(loss / count).backward()
                sums.update(loss=float(loss.detach()), clipped=int(clipped), learned=len(old))
                if critic:
                    loss = value_loss(values(batch), *known, clip_range)
                    scaler.scale(value_coef * loss / count).backward()
                    sums.update(value_loss=float(loss.detach()))
            if count:
                sums.update(steps=1, grad_norm=change(trained, optimizer, scaler, max_grad_norm, ranks, step))
        schedule.step()
        clock.append(time.perf_counter())

        # Look
        log.append({"step": step + 1, "answers": rollout_batch_size * num_generations} | figures(answers, num_generations, sums, ranks) | {
            "grad_norm": sums["grad_norm"] / sums["steps"], "seconds": dict(zip(("sample", "score", "learn"), (b - a for a, b in zip(clock, clock[1:]))))})
        seen.update(tokens=sum(lengths), answers=sum(len(answer["ids"]) for answer in answers))
        if ranks.process_index == 0:
            tell(log[-1], max_steps, answers[:: len(answers) // 3 or 1][:3] if step % logging_steps == 0 else [])
            with open(Path(output_dir, "log.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(log[-1], ensure_ascii=False) + "\n")
        stop_if_lost(log, max_kl, max_new_tokens)
        if (step + 1) % save_steps == 0:
            save_checkpoint(output_dir, log, trained, kept, ranks, save)

    # ---- save ----
    seconds, (tokens, supervised) = time.perf_counter() - start, add_up(ranks, [seen["tokens"], seen["answers"]])
    if ranks.process_index == 0:
        save(saving_in := Path(output_dir, ".saving"))
        if not any(tensor.any() for name, tensor in load_file(saving_in / "adapter_model.safetensors").items() if "lora_B" in name):
            raise RunStopped(f"the adapter in {saving_in} changes nothing, all its B matrices are zero: did no answer ever do better than another?")
        for file in sorted(saving_in.iterdir(), key=lambda file: not file.name.endswith(".safetensors")):
            file.replace(Path(output_dir, file.name))
        saving_in.rmdir()
        panels = {"mean score": ["reward"], "KL, nats a token": ["kl"], "tokens an answer": ["length"], "share finished": ["finished"]}
        draw_curves(log, panels, Path(output_dir, "curves.png"))
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = {"tokens": int(tokens), "supervised_tokens": int(supervised), "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 1),
                  "train_loss": log[-1]["loss"], "eval_loss": None, "peak_memory_bytes": peak, "output_dir": output_dir}
        print(json.dumps(report | {name: log[-1][name] for name in ("reward", "finished", "length", "kl")}))


# ---- what goes in ----
def check_ppo(flags: dict) -> dict:
    """The rules, and what can be refused before torch is imported; then the flags are shown."""
    if flags["deepspeed"]:
        raise BadInput("--deepspeed: ZeRO-3 would gather every layer for every token of an answer, and LoRA leaves ZeRO-2 next to nothing to spread: leave it "
                       "out. A base that is too large for one GPU may fit in 4 bit (--bits 4); beyond that, README shows OpenRLHF and verl")
    check_file("data_path", flags["data_path"])
    folder, judge = Path(flags["model_name_or_path"]), Path(flags["reward_model"] or "")
    check_model(str(folder), flags["allow_pickle"])
    if (folder / "config.json").is_file() and "Classification" in str(read_json(folder / "config.json").get("architectures")):
        raise BadInput(f"--model_name_or_path={folder} is a reward model, which writes no answers: give the chat model that is to learn")
    check_output_dir(flags["output_dir"], flags["resume"], str(folder))
    check_numbers(flags)
    check_positive(**{name: flags[name] for name in ("rollout_batch_size", "num_generations", "per_device_rollout_batch_size", "temperature", "ppo_epochs",
                                                     "num_mini_batches", "max_steps", "clip_range", "max_grad_norm", "max_kl")})
    for name, most in {"kl_coef": math.inf, "value_coef": math.inf, "missing_eos_penalty": math.inf, "gamma": 1, "gae_lambda": 1}.items():
        if not 0 <= flags[name] <= most:
            raise BadInput(f"--{name}={flags[name]} must be " + ("zero or more" if most > 1 else "from 0 to 1"))
    if flags["reward_model"]:
        about = read_json(judge / ("adapter_config.json" if (judge / "adapter_config.json").is_file() else "config.json"))
        if not any(str(kind).endswith(("SEQ_CLS", "ForSequenceClassification")) for kind in (about.get("task_type"), *(about.get("architectures") or []))):
            raise BadInput(f"--reward_model={judge} gives no rewards: train one with train_reward.py")
    elif not flags["rules"]:
        raise BadInput("nothing judges the answers: give --rules, such as sample/rules.py:finished=1,chinese=1, or --reward_model, or both")
    if flags["num_generations"] < 2 and flags["advantage"] != "gae":
        raise BadInput(f"--num_generations={flags['num_generations']}: {flags['advantage']} compares answers to one prompt, give 2 or more, or --advantage gae")
    if flags["lr_scheduler_type"] not in ("constant", "linear", "cosine"):
        raise BadInput(f"--lr_scheduler_type={flags['lr_scheduler_type']} is not one of constant, linear, cosine")
    if flags["max_new_tokens"] >= flags["max_length"]:
        raise BadInput(f"--max_new_tokens={flags['max_new_tokens']} leaves no room for a prompt in --max_length={flags['max_length']}")
    judges = load_rules(flags["rules"]) if flags["rules"] else {}
    show(flags)
    return judges


def read_prompts(data_path: str, chat: Chat, room: int, skip_bad_records: bool) -> list[dict]:
    """The records of a file, each of which ends in a question, as {"messages", "prompt": at most `room` token ids, "record": the row, "where"}."""
    def read(row) -> dict:
        record = row
        if "prompt" in row and not {"messages", "output"} & row.keys():  # {"prompt": text}, or messages, as verl has them
            name = "instruction" if isinstance(row["prompt"], str) else "messages"
            record = {name: row["prompt"]} | ({"system": row["system"]} if "system" in row else {})
        messages = clean_messages(row_turns(record, Counter()), False, Counter())
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise BadInput("it ends in an answer where a question belongs: score_records.py --keep prompts writes such files")
        ids = [i for part, _ in chat.encode(messages, add_generation_prompt=True) for i in part]
        if len(ids) > room:
            raise BadInput(f"the prompt has {len(ids)} tokens, --max_length less --max_new_tokens leaves it {room}: raise the one or lower the other")
        return {"messages": messages, "prompt": ids, "record": row}

    return [prompt | {"where": f"{data_path}, record {number}"} for number, prompt in numbered_records(data_path, skip_bad_records, read=read)]


def prompt_at(place: int, count: int, shuffle: bool, seed: int) -> int:
    """The prompt at a place in the endless order of a run: every one once, then all again in another order."""
    again, place = divmod(place, count)
    return random.Random(f"{seed} {again}").sample(range(count), count)[place] if shuffle else place


def join_ranks(precision: str):
    """What this process is among the others (num_processes, process_index, device), and the precision, which auto leaves to the device."""
    import torch
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    if not cuda and precision in ("bf16", "fp16"):
        raise BadInput(f"--precision={precision} needs a GPU: leave it at auto")
    ranks = PartialState(cpu=not cuda, timeout=datetime.timedelta(hours=1))  # one rank may sample longer than another
    if precision == "auto":
        precision = "fp32" if not cuda else "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
    return ranks, precision


def load_judge(model, reward_model: str, base_fingerprint: str | None, given: dict):
    """The reward model, as read_rewards takes it. An adapter of the policy's own base goes into `model` and shares it; any other is loaded beside."""
    import torch
    from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder, base, shared = Path(reward_model), model.get_base_model(), False
    chat = Chat(load(AutoTokenizer, reward_model, trust_remote_code=given["trust_remote_code"]), last_round_only=True)
    if (folder / "adapter_config.json").is_file():
        config = load(LoraConfig, reward_model)
        made_on = read_json(folder / "yangtuo.json").get("base_fingerprint") if (folder / "yangtuo.json").is_file() else None
        shared = base_fingerprint is not None and made_on == base_fingerprint and not config.trainable_token_indices  # new tokens are rows of its own
    if shared:
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
        head = torch.nn.Linear(base.config.hidden_size, 1, bias=False, device=base.device)
        try:
            weights = load_file(folder / "adapter_model.safetensors")
            score = weights.pop(next((name for name in weights if name.endswith("score.weight")), ""), None)
            model.add_adapter("reward", config)
            set_peft_model_state_dict(model, weights, "reward")
        except Exception as problem:  # safetensors and peft have their own of each kind
            raise problem if "out of memory" in str(problem) else BadInput(f"--reward_model={reward_model} is damaged: {str(problem)[:200]}") from None
        if score is None or score.shape != head.weight.shape:
            raise BadInput(f"--reward_model={reward_model} has no head that gives one reward: train one with train_reward.py")
        head.load_state_dict({"weight": score})
        if missing := get_peft_model_state_dict(model, adapter_name="reward", save_embedding_layers=False).keys() - weights.keys():
            raise BadInput(f"--reward_model={reward_model} lacks {len(missing)} tensors, {min(missing)} for one")
    elif (folder / "adapter_config.json").is_file():
        if made_on and fingerprint(config.base_model_name_or_path) not in (None, made_on):
            raise BadInput(f"--reward_model={reward_model} was trained on another model than {config.base_model_name_or_path} is now")
        base = load(AutoPeftModelForSequenceClassification, reward_model, num_labels=1, **given).get_base_model().eval()
    else:
        base = load(AutoModelForSequenceClassification, reward_model, output_loading_info=True, **given).eval()
    if not shared and (base.config.num_labels != 1 or not hasattr(base, "score")):
        raise BadInput(f"--reward_model={reward_model} gives {base.config.num_labels} labels, one reward is wanted: train one with train_reward.py")
    check_tokenizer(chat, base.config)
    head = head if shared else base.score.float()  # in 16 bit two good answers would often get one reward
    score = torch.autocast(base.device.type, enabled=False)(head.forward)
    return SimpleNamespace(chat=chat, shared=shared, head=head, base_model=base.base_model, score=score)


def add_critic(model, lora, judge):
    """The critic: an adapter of its own in `model`, and the head that is returned, (1, D): the reward model's at first, where that shares the base."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    shared = judge is not None and judge.shared
    model.add_adapter("critic", copy.deepcopy(model.peft_config["reward"]) if shared else lora)
    head = torch.nn.Linear(model.config.hidden_size, 1, bias=False, device=model.device)
    torch.nn.init.zeros_(head.weight)  # expects nothing
    if shared:
        set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="reward"), "critic")
        head.load_state_dict(judge.head.state_dict())
    return head


# ---- an update ----
def sample(model, chat: Chat, answers: list[dict], batch_size: int) -> None:
    """Give each of `answers`, which has a "prompt", its "ids" up to the first stop token, whether it "finished" with one, and its "text"."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(answers, key=lambda answer: len(answer["prompt"]))  # prompts of like length go together: little padding
    for batch in (order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)):
        prompts = [torch.tensor(answer["prompt"], device=model.device) for answer in batch]
        ids, mask = (pad_sequence(rows, True, padding_side="left") for rows in (prompts, [torch.ones_like(row) for row in prompts]))  # (B, T)
        with torch.inference_mode():
            rows = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1]:].tolist()
        for answer, row in zip(batch, rows):
            length = next((n for n, token in enumerate(row, 1) if token in chat.stop_ids), 0)
            answer.update(ids=row[: length or len(row)], finished=length > 0)
            answer["text"] = answer_text(chat, answer["ids"])


def answer_text(chat: Chat, ids: list[int]) -> str:
    """The text of an answer, without its stop token, half a character at its end, and what its template writes around it."""
    anchor = chat.tokenizer.encode("。", add_special_tokens=False)  # SentencePiece takes away the blank that a text begins with
    decode = lambda ids: chat.tokenizer.decode(anchor + ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).partition("。")[2]
    *_, (shortest, _), _ = chat.encode(SHORTEST)
    before, _, behind = decode(shortest).partition(SHORTEST[1]["content"])
    return decode(ids).rstrip("\ufffd").removeprefix(before).removesuffix(behind)


def answer_states(model, batch: list[dict], packed: bool):
    """The hidden states that predict the tokens of the answers in a batch, and those tokens, one answer behind the other: (N, D), (N,)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(answer["prompt"] + answer["ids"], device=model.device) for answer in batch]
    said = [torch.arange(len(row), device=model.device) >= len(answer["prompt"]) for row, answer in zip(ids, batch)]
    if packed:
        ids, said, lengths = torch.cat(ids)[None], torch.cat(said)[None], [len(row) for row in ids]
        given = {"position_ids": torch.cat([torch.arange(length, device=model.device) for length in lengths])[None]}
        given |= {"document_lengths": lengths} if model.config._attn_implementation == "documents" else {}
    else:
        given = {"attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True)}
        ids, said = pad_sequence(ids, True), pad_sequence(said, True)
    hidden = model.base_model(input_ids=ids, use_cache=False, **given)[0]  # (B, T, D)
    return hidden[:, :-1][said[:, 1:]], ids[:, 1:][said[:, 1:]]


def token_log_probs(hidden, targets, head, temperature: float, vocabulary: int):
    """log p of each token as it was sampled, under logits / temperature: hidden (N, D), targets (N,) -> (N,). Backward makes each chunk of logits again."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def of_chunk(hidden, targets):
        logits = head(hidden)[:, :vocabulary].float() / temperature  # (n, V)
        return logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]

    return torch.cat([checkpoint(of_chunk, hidden[i:j], targets[i:j], use_reentrant=False) for i, j in chunks(head, len(targets), hidden.device)])


def gae(rewards, values, gamma: float, gae_lambda: float):
    """Advantages and returns of one answer, (T,) each (arXiv:1506.02438). values[t] was expected before token t; behind the last one nothing is."""
    advantages, later, after = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist())):
        later, after = reward + gamma * after - value + gamma * gae_lambda * later, value
        advantages.append(later)
    advantages = values.new_tensor(advantages[::-1])
    return advantages, advantages + values


def whiten(answers: list[dict], ranks) -> None:
    """Shift and scale the advantages to mean 0 and variance 1 over the answer tokens of all ranks."""
    import torch

    mine = torch.cat([answer["advantages"] for answer in answers]).double()
    count, total, squares = add_up(ranks, [len(mine), float(mine.sum()), float(mine @ mine)])
    mean, variance = total / count, max(0.0, squares / count - (total / count) ** 2)
    for answer in answers:
        answer["advantages"] = (answer["advantages"] - mean) / math.sqrt(variance + 1e-8)


def compare_group(group: list[dict], advantage: str) -> None:
    """Advantages of the answers to one prompt, one for all tokens: the sum of its rewards less that of the others (rloo), or of all, by their spread (grpo)."""
    import torch

    totals = torch.stack([answer["rewards"].sum() for answer in group])
    totals = totals - totals[0]  # so that equal rewards give exactly 0
    centred = totals - totals.mean()
    advantages = centred * len(group) / (len(group) - 1) if advantage == "rloo" else centred / (totals.std() + 1e-4)
    for answer, ours in zip(group, advantages):
        answer["advantages"] = ours.expand(len(answer["ids"]))


def policy_loss(new, old, advantages, clip_range: float):
    """Sum over tokens of -min(r A, clip(r, 1 - e, 1 + e) A) with r = p / p_old (eq. 7 of PPO), and how many r were beyond the clip."""
    import torch

    ratio = torch.exp(new - old)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    return losses.sum(), ((ratio - 1).abs() > clip_range).sum()


def value_loss(new, old, returns, clip_range: float):
    """Sum over tokens of half the squared error: of the value, or where that is larger of the value kept near the old one."""
    import torch

    near = old + (new - old).clamp(-clip_range, clip_range)
    return torch.maximum((new - returns) ** 2, (near - returns) ** 2).sum() / 2


def change(trained: list, optimizer, scaler, max_grad_norm: float, ranks, step: int) -> float:
    """One step of the optimizer with the gradients of all ranks; returns their norm. RunStopped where that is no number."""
    import torch

    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if ranks.num_processes > 1:
        torch.distributed.all_reduce(flat := torch.cat([p.grad.flatten() for p in trained]))
        for p, part in zip(trained, flat.split([p.numel() for p in trained])):
            p.grad.copy_(part.view_as(p))
    scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_grad_norm))
    if not math.isfinite(norm) and not scaler.is_enabled():  # fp16 passes over a step whose gradient overflows
        raise RunStopped(f"in update {step + 1} the norm of the gradient is {norm}: lower the learning rate; the checkpoints are from before")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm if math.isfinite(norm) else 0.0


def add_up(ranks, numbers: list[float]) -> list[float]:
    """Each number summed over the ranks."""
    import torch
    from accelerate.utils import reduce

    return reduce(torch.tensor(numbers, dtype=torch.float64, device=ranks.device), "sum").tolist()


# ---- what comes out ----
def figures(answers: list[dict], num_generations: int, sums: Counter, ranks) -> dict:
    """What the log says of an update, over all ranks."""
    groups = [[answer["score"] for answer in answers[i : i + num_generations]] for i in range(0, len(answers), num_generations)]
    totals = Counter({name: sums[name] for name in ("loss", "value_loss", "clipped", "learned")})
    totals.update(answers=len(answers), groups=len(groups), no_variance=sum(num_generations > 1 and min(group) == max(group) for group in groups))
    for answer in answers:
        k1, returns = float(answer["k1"].sum()), answer.get("returns", answer["k1"])
        totals.update(reward=answer["score"], reward_model=answer.get("reward_model", 0), finished=answer["finished"], tokens=len(answer["ids"]),
                      k1=k1, k1_squares=k1**2, returns=float(returns.sum()), squares=float(returns @ returns),
                      errors=float((returns - answer.get("values", returns)).square().sum()))
        totals.update({f"rule {name}": said for name, said in answer["rules"].items()})
    totals = SimpleNamespace(**dict(zip(totals, add_up(ranks, [*totals.values()]))))
    rules = {name: vars(totals)[f"rule {name}"] / totals.answers for name in answers[0]["rules"]}
    found = {"reward": totals.reward / totals.answers, "rules": rules, "finished": totals.finished / totals.answers, "length": totals.tokens / totals.answers,
             "kl": totals.k1 / totals.tokens, "kl_error": math.sqrt(max(0.0, totals.k1_squares - totals.k1**2 / totals.answers)) / totals.tokens,
             "no_variance": totals.no_variance / totals.groups, "clipped": totals.clipped / totals.learned, "loss": totals.loss / totals.learned}
    if "reward_model" in answers[0]:
        found["reward_model"] = totals.reward_model / totals.answers
    if "returns" in answers[0]:
        variance = totals.squares / totals.tokens - (totals.returns / totals.tokens) ** 2
        explained = 1 - totals.errors / totals.tokens / variance if variance > 1e-6 else 0.0  # where all returns are one, there is nothing to explain
        found |= {"value_loss": totals.value_loss / totals.learned, "explained_variance": explained}
    return found


def tell(entry: dict, max_steps: int, shown: list[dict]) -> None:
    """One line about an update, and what some answers were and got."""
    parts = entry["rules"] | {name: entry[name] for name in ("reward_model", "explained_variance") if name in entry}
    print(f"update {entry['step']}/{max_steps}: reward {entry['reward']:.3f} ({', '.join(f'{name} {value:.2f}' for name, value in parts.items())}), "
          f"{entry['finished']:.0%} finished, {entry['length']:.0f} tokens, KL {entry['kl']:.4f}, {entry['no_variance']:.0%} of groups without variance, "
          f"{entry['clipped']:.1%} clipped, {sum(entry['seconds'].values()):.1f} s", file=sys.stderr)
    for answer in shown:
        cut = "" if answer["finished"] else " (cut)"
        print(f"  {answer['messages'][-1]['content'][-80:]!r} -> {answer['text'][:200]!r}{cut}: {answer['score']:.2f}", file=sys.stderr)


def stop_if_lost(log: list[dict], max_kl: float, max_new_tokens: int) -> None:
    """RunStopped where the last updates say that going on makes no sense."""
    last = log[-1]
    if last["step"] == 1 and last["kl"] != 0:
        raise RunStopped(f"the KL to the start is {last['kl']:.3g} before anything was learned, where it must be 0: are there layers that drop something?")
    recent = log[-math.ceil(16 / last["answers"]):]  # of a few answers the error itself is known too badly
    kl, error = sum(entry["kl"] for entry in recent) / len(recent), math.hypot(*(entry["kl_error"] for entry in recent)) / len(recent)
    if kl < -5 * error - 1e-4 and len(recent) * last["answers"] >= 16:
        raise RunStopped(f"the KL is {kl:.4f}, below 0 by more than chance ({error:.4f}): the answers are not sampled from what is scored")
    if last["kl"] > max_kl:
        raise RunStopped(f"the KL is {last['kl']:.2f} nats a token, above --max_kl={max_kl}: the model has left its start behind. Take an earlier checkpoint, "
                         f"a larger --kl_coef or a smaller --learning_rate")
    if len(log) > 2 and not any(entry["finished"] for entry in log[-3:]):
        raise RunStopped(f"every answer of three updates was cut: raise --max_new_tokens={max_new_tokens}, or tune the model on short answers first")


# ---- the state of a run ----
def begin_run(output_dir: str, facts: dict, checkpoint: str | None, trained: list, kept: dict, ranks) -> list[dict]:
    """The log of the updates that are done; everything else is made as it was behind the last of them."""
    import torch

    write_facts(output_dir, facts)
    log = []
    if checkpoint:
        read = lambda name: torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
        run, state = read_json(Path(checkpoint, "trainer_state.json")), read("optimizer.pt") | {"schedule": read("scheduler.pt")}
        if not isinstance(log := run.get("log_history"), list) or len(log) != run["global_step"] or not all(
                isinstance(entry, dict) and {"step", "kl", "kl_error", "answers", "finished", "loss"} <= entry.keys() for entry in log):
            raise BadInput(f"the log_history in {checkpoint}/trainer_state.json is damaged: remove that checkpoint, and the run goes on from the one before")
        for p, saved in zip(trained, state.pop("trained")):
            p.data.copy_(saved)
        for name, saved in state.items():
            kept[name].load_state_dict(saved)
        states = read(f"rng_state_{ranks.process_index}.pth" if ranks.num_processes > 1 else "rng_state.pth")
        for set_state, saved in zip((torch.set_rng_state, torch.cuda.set_rng_state), states):
            set_state(saved)
    if ranks.process_index == 0:  # what a killed run left unfinished, and lines of updates that are made again
        for unfinished in Path(output_dir).glob(".checkpoint-*"):
            shutil.rmtree(unfinished)
        Path(output_dir, ".log.new").write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in log), "utf-8")
        Path(output_dir, ".log.new").replace(Path(output_dir, "log.jsonl"))
    return log


def save_checkpoint(output_dir: str, log: list[dict], trained: list, kept: dict, ranks, save) -> None:
    """checkpoint-N, whole or not at all: the adapter, ready for use, and what begin_run goes on from. The last two stay."""
    import torch
    from accelerate.utils import gather_object

    everyone = gather_object([[torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])])
    if ranks.process_index:
        return
    shutil.rmtree(target := Path(output_dir, f"checkpoint-{len(log)}"), ignore_errors=True)  # one that resume_point found damaged
    with whole_folder(target) as folder:
        save(folder)
        torch.save({"trained": [p.data for p in trained]} | {name: kept[name].state_dict() for name in ("optimizer", "scaler")}, folder / "optimizer.pt")
        torch.save(kept["schedule"].state_dict(), folder / "scheduler.pt")
        for rank, states in enumerate(everyone):
            torch.save(states, folder / (f"rng_state_{rank}.pth" if ranks.num_processes > 1 else "rng_state.pth"))
        replace_json(folder / "trainer_state.json", {"global_step": len(log), "log_history": log})
    for old in sorted(Path(output_dir).glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))[:-2]:
        shutil.rmtree(old)


def save_policy(folder: Path, model, chat: Chat, configured, facts: dict) -> None:
    """The policy's adapter, and beside it tokenizer, chat template and stop tokens; `configured` is how the base was to generate."""
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    chat.save(folder, configured)
    replace_json(folder / "yangtuo.json", {name: facts[name] for name in ("base", "base_fingerprint", "template")})


# ==== rules ====
def load_rules(rules: str) -> dict[str, tuple[float, Callable]]:
    """{name: (weight, function)} of FILE:name=weight,name=weight, a Python file of the user's; sample/rules.py says what a rule is.

    A weight of 0 reports a rule without paying for it.
    """
    path, _, chosen = rules.rpartition(":")
    if not path.endswith(".py") or not chosen:
        raise BadInput(f"--rules={rules}: write FILE.py:name=weight,name=weight, such as sample/rules.py:finished=1,chinese=0.5")
    check_file("rules", path)
    spec = importlib.util.spec_from_file_location("rules", path)
    module = sys.modules["rules"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise BadInput(f"--rules: {path} cannot be run: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}") from None
    known, loaded = {name: rule for name, rule in vars(module).items() if inspect.isfunction(rule) and not name.startswith("_")}, {}
    for name, _, weight in (part.strip().partition("=") for part in chosen.split(",")):
        if name not in known:
            near = "".join(f": did you mean {name}?" for name in difflib.get_close_matches(name, known, n=1))
            raise BadInput(f"--rules: {path} has no rule {name!r}{near or ', it has ' + ', '.join(known)}")
        try:
            loaded[name] = float(weight), known[name]
            inspect.signature(known[name]).bind("", "", True, {})
        except (ValueError, TypeError) as problem:
            what = "must take (prompt, answer, finished, record)" if isinstance(problem, TypeError) else f"needs a weight, such as {name}=1"
            raise BadInput(f"--rules: the rule {name} {what}") from None
        if not math.isfinite(loaded[name][0]):
            raise BadInput(f"--rules: the weight of {name} is {weight}, a finite number belongs there")
    return loaded


def run_rules(rules: dict, messages: list[dict], answer: str, finished: bool, record: dict, where: str) -> dict[str, float]:
    """{rule: what it says of an answer to messages}, before the weights; BadInput names rule and record (`where`) if one raises or gives no number."""
    said = {}
    for name, (_, rule) in rules.items():
        try:
            said[name] = float(rule(messages[-1]["content"], answer, finished, record))
        except Exception as problem:
            line = traceback.extract_tb(problem.__traceback__)[-1].lineno
            raise BadInput(f"{where}: the rule {name} raised {type(problem).__name__} in line {line}: {' '.join(str(problem).split())[:200]}") from None
        if not math.isfinite(said[name]):
            raise BadInput(f"{where}: the rule {name} gives {said[name]}, a finite number belongs there")
    return said


# ==== read rewards ====
def reward_ids(chat: Chat, messages: list[dict], answer: str, finished: bool) -> list[int]:
    """What a reward model reads: the dialogue up to the answer's stop token; of a cut answer up to its last token, and nothing behind it."""
    *prompt, (ids, _), _ = chat.encode([*messages, {"role": "assistant", "content": answer}])
    if not finished:
        ids = ids[:-1]  # the stop token; before it a template may have a blank or a line break of its own
        decoded = lambda ids: chat.tokenizer.decode(ids, skip_special_tokens=True)
        said = answer if answer in decoded(ids) else answer.strip()  # ziya strips it
        before = decoded(ids).rpartition(said)[0] if said else ""
        ids = ids if said else []  # cut before it said anything
        while said and decoded(ids[:-1]).startswith(before + said):
            ids = ids[:-1]
    return [i for part, _ in prompt for i in part] + ids


def read_batches(backbone, rows: list[list[int]], batch_size: int, value_of):
    """Yield (number of a row of token ids, its value), the longest first: value_of(numbers, hidden states (B, T, d), places of the last tokens) gives B."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))  # rows of like length go together: little padding
    for begin in range(0, len(rows), batch_size):
        batch = order[begin : begin + batch_size]
        ids = pad_sequence([torch.tensor(rows[number]) for number in batch], batch_first=True).to(backbone.device)  # (B, T), padded right with 0
        last = [len(rows[number]) - 1 for number in batch]
        mask = torch.arange(ids.shape[1]) <= torch.tensor(last)[:, None]  # from the lengths: an id that pads may also stand in a text
        with torch.inference_mode():
            hidden = backbone(input_ids=ids, attention_mask=mask.long().to(ids.device), use_cache=False).last_hidden_state
            values = value_of(batch, hidden, last)
        yield from zip(batch, values)


def read_rewards(model, rows: list[list[int]], batch_size: int):
    """Yield (number of the row, its reward), the longest first: each is read at its last token.

    `model` needs base_model (ids to hidden states) and score (hidden states to rewards). transformers reads at the last id that is no padding:
    where the stop token is the padding as well, a finished answer would get the reward of a cut one.
    """
    return read_batches(model.base_model, rows, batch_size, lambda batch, hidden, last: model.score(hidden[range(len(batch)), last].float())[:, 0].tolist())


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


if __name__ == "__main__":
    cli(main)
