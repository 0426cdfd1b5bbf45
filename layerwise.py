"""Run a model whose weights stay in their files: each layer is read just before it runs and forgotten behind it, so that a
model needs the memory of its largest layer, in fp32."""
import functools
import re
import sys
from itertools import islice
from pathlib import Path

import torch
from torch.nn import Parameter

from models import AutoConfig, AutoModelForCausalLM, first_line, load_tokenizer
from tensors import EMBEDDINGS, HEADS, Weights
from utils import BadInput, Chat, RunStopped, read_records


def hollow_model(weights: Weights, trust_remote_code: bool = False, vocab_size: int | None = None, attention: str | None = None):
    """The model of a folder without its weights: each is one NaN, spread over its shape, so that none can be used unread.

    Args:
        vocab_size: Rows of the tables, if there are to be more than in the files.
        attention: How packed documents are kept apart, see training.choose_attention.
    """
    from accelerate import init_empty_weights

    try:
        config = AutoConfig.from_pretrained(weights.folder, trust_remote_code=trust_remote_code)
        config.vocab_size = vocab_size or config.vocab_size
        with init_empty_weights():  # what is computed rather than read, as rotary frequencies, is there
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code).eval()
    except (OSError, ValueError, ImportError) as problem:
        raise BadInput(f"{weights.folder} is no causal language model that transformers can load: {first_line(problem)}") from None
    model.tie_weights()  # init_empty_weights takes ties apart
    hollow = {p: Parameter(torch.tensor(torch.nan).expand(p.shape), requires_grad=False) for p in model.parameters()}
    for module in model.modules():
        module._parameters.update({name: hollow[p] for name, p in module._parameters.items() if p is not None})  # tied ones stay one
    return model


def is_hollow(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 0 and not any(tensor.stride())


def attach(model, adapters: list, shares: list[float] | None) -> None:
    """Put LoRA adapters into a model, by peft, all at work.

    Args:
        adapters: Folder and Weights of each.
        shares: What each is multiplied by; rows and layers that they replace are averaged. None: the last one's stand.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    names, adapted = [f"adapter{number}" for number in range(len(adapters))], None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    for name, (folder, weights) in zip(names, adapters):
        config = LoraConfig.from_pretrained(folder)
        config.init_lora_weights = True  # some ways to begin look at the weights of the base
        state = {re.sub(r"\.default(?=\.)|\.modules_to_save(?=\.)", "", key): weights.floats(key) for key in weights.tensors if ".original_module." not in key}
        try:
            if adapted is None:
                adapted = get_peft_model(model, config, name)
            else:
                adapted.add_adapter(name, config)
            wanted = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False).keys()
            if wanted <= state.keys():
                set_peft_model_state_dict(adapted, state, name, low_cpu_mem_usage=True)
        except (RuntimeError, ValueError, TypeError, KeyError) as problem:
            raise BadInput(f"peft cannot put {folder} into this model, so the result could not be checked: {first_line(problem)}") from None
        if missing := wanted - state.keys():
            raise BadInput(f"{folder} lacks {len(missing)} tensors, {min(missing)} for one")
    adapted.eval()  # else there is dropout
    if tied and is_hollow(head.weight):  # peft may have saved a tied table once
        head.weight = embedding.weight
    if len(names) == 1 and shares is None:
        return
    share_of = dict(zip(names, shares or [1.0] * len(names)))
    average = lambda values: sum(share_of[name] * value for name, value in values.items()) / sum(share_of[name] for name in values)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([name for name in names if name in module.scaling])
            module.scaling.update({name: share_of[name] * scaling for name, scaling in module.scaling.items()})
        elif isinstance(module, ModulesToSaveWrapper):
            last = list(module.modules_to_save)[-1]
            module.set_adapter(last)
            for key, p in module.modules_to_save[last].named_parameters() if shares else ():
                p.data = average({name: copy.get_parameter(key).data for name, copy in module.modules_to_save.items()})
        elif isinstance(module, TrainableTokensWrapper):
            layer, rows = module.token_adapter, {}
            last = list(layer.trainable_tokens_delta)[-1]
            for name, values in layer.trainable_tokens_delta.items() if not layer.tied_adapter else ():
                for number, value in zip(layer.token_indices[name], values.data):
                    rows[number] = {name: value} | (rows.get(number, {}) if shares else {})
            if rows:
                layer.token_indices[last], layer.trainable_tokens_delta[last] = list(rows), Parameter(torch.stack([average(row) for row in rows.values()]))
            module.set_adapter(last)


def stream_layers(model, weights: Weights) -> str:
    """Let a hollow model read each layer just before it runs and forget it behind; returns the device that it runs on, a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = {module: name for name, module in model.named_modules()}
    layers = [layer for child in model.base_model.children() for layer in (child if isinstance(child, torch.nn.ModuleList) else [child])]
    filled = set()
    for layer in dict.fromkeys([*layers, model.get_output_embeddings()]):
        places = [(module, leaf, p, file_name(weights, f"{names[module]}.{leaf}")) for module in layer.modules() for leaf, p in module._parameters.items()
                  if p is not None and is_hollow(p) and not names[module].endswith("original_module")]
        layer.register_forward_pre_hook(functools.partial(_fill, weights, device, places))
        layer.register_forward_hook(functools.partial(_empty, places))
        filled.update(p for _, _, p, _ in places)
    for name, p in model.named_parameters():
        if is_hollow(p) and p not in filled and ".original_module." not in name:
            raise BadInput(f"{name} lies outside of the layers of this model, so it cannot be run layer by layer (merge_lora.py: --check False)")
    for module in model.modules():  # what there is of weights: adapters, and what is computed
        for p in module.parameters(recurse=False):
            p.data = p.data if is_hollow(p) else p.data.to(device)
        module._buffers.update({name: value.to(device) for name, value in module._buffers.items() if value is not None})
    return device


def layerwise_logits(model, weights: Weights, ids: list[list[int]]) -> torch.Tensor:
    """Logits (N, vocabulary) of a hollow model at the N tokens of some texts, in fp32, on a GPU if there is one."""
    device = stream_layers(model, weights)
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in ids], batch_first=True)  # behind, where no token sees it
    with torch.inference_mode():
        logits = model(input_ids=padded.to(device), use_cache=False).logits.float().cpu()
    return torch.cat([row[: len(text)] for row, text in zip(logits, ids)])


def read_prompts(folder: Path, eval_path: str | None, vocab_size: int, trust_remote_code: bool = False) -> list[list[int]]:
    """The first 64 tokens of four dialogues of eval_path, or of sample/, as a model is trained on them."""
    try:
        chat = Chat(load_tokenizer(str(folder), trust_remote_code))
    except BadInput as problem:  # the model can be run all the same
        print(f"no prompts can be written for this model, so random tokens are taken ({problem})", file=sys.stderr)
        return torch.randint(vocab_size, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()
    records = read_records(eval_path or str(Path(__file__).with_name("sample") / "conversation.json"))
    texts = [[i for ids, _ in chat.encode(record["messages"]) for i in ids][:64] for record in islice(records, 4)]
    if (highest := max(map(max, texts))) >= vocab_size:
        raise BadInput(f"the tokenizer in {folder} makes token {highest} out of a prompt, the model has {vocab_size} rows: they do not belong together")
    return texts


def compare_logits(expected: torch.Tensor, found: torch.Tensor, bound: float) -> str:
    """The line that says how near two models' logits (N, vocabulary) are; RunStopped if they are not.

    Args:
        bound: The mean difference that may be, as a share of the logits' spread.
    """
    difference, spread = (expected - found).abs(), float(expected.std())
    agree = int((expected.argmax(dim=1) == found.argmax(dim=1)).sum())
    line = (f"logits differ by {difference.max():.2g} at most and {difference.mean():.2g} on average (bound {bound * spread:.2g}, "
            f"they spread by {spread:.3g}), {agree} of {len(found)} greedy tokens agree")
    if not difference.mean() <= bound * spread:  # nor if it is no number
        raise RunStopped(f"{line}: that is more than rounding explains, so nothing was written")
    return line


def file_name(weights: Weights, name: str) -> str:
    """The tensor in the files that belongs to a parameter: peft wraps modules, some files leave out a prefix, a tied head is the embedding."""
    name = re.sub(r"\.(base_layer|token_adapter)(?=\.)", "", name)
    embedding = next((tensor for tensor in weights.tensors if tensor.endswith(EMBEDDINGS)), None)
    for candidate in (name, name.partition(".")[2], embedding if name.endswith(HEADS) else None):
        if candidate in weights.tensors:
            return candidate
    raise BadInput(f"{weights.folder} has no tensor {name}, so it cannot be run layer by layer (merge_lora.py: --check False)")


def _fill(weights: Weights, device: str, places: list, *_) -> None:
    for module, leaf, hollow, name in places:
        tensor, data = weights.tensors[name], torch.empty(hollow.shape)
        for first, last in tensor.row_chunks():
            data[first:last] = weights.floats(name, first, last)
        if len(data) > tensor.shape[0]:  # rows of new tokens start as the mean of the old ones
            data[tensor.shape[0]:] = data[: tensor.shape[0]].mean(dim=0)
        module._parameters[leaf] = Parameter(data.to(device), requires_grad=False)


def _empty(places: list, *_) -> None:
    for module, leaf, hollow, _ in places:
        module._parameters[leaf] = hollow
