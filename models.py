"""Loading what the scripts train and use: tokenizer, base model in 16, 8 or 4 bit, adapter. Whatever is missing is an
error here, since transformers and peft would warn and go on with random weights."""
import contextlib
import json
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found no other
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from gptq import dequantized_state, gptq_config, has_gptqmodel
from utils import BadInput, Chat, fingerprint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(precision: str) -> str:
    """auto: bf16 where the GPU computes in it (not where it is emulated), else fp16, on a CPU fp32."""
    if precision != "auto":
        if precision != "fp32" and not torch.cuda.is_available():
            raise BadInput(f"--precision={precision} needs a GPU: leave it at auto")
        return precision
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"


def load_tokenizer(model_name_or_path: str, trust_remote_code: bool = False):
    """The tokenizer of a model folder or hub name; BadInput where there is none."""
    try:
        return AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as problem:
        raise BadInput(f"no tokenizer could be loaded from {model_name_or_path}: {first_line(problem)}") from None


def load_skeleton(model_name_or_path: str, trust_remote_code: bool = False):
    """The model without its weights (on torch's meta device): its configuration and the names and shapes of its layers."""
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as problem:
        raise BadInput(f"{model_name_or_path} is no causal language model that transformers can load: {first_line(problem)}") from None


def lora_targets(skeleton, lora_target_modules: str) -> str | list[str]:
    """What peft takes as target_modules: all-linear, or the given names, each of which must be that of a linear layer."""
    linear = {name.rpartition(".")[2] for name, module in skeleton.named_modules()
              if isinstance(module, torch.nn.Linear) and module is not skeleton.get_output_embeddings()}
    if lora_target_modules == "all-linear":
        return lora_target_modules
    names = [name.strip() for name in lora_target_modules.split(",")]
    for name in names:
        if name not in linear:
            raise BadInput(f"--lora_target_modules: this model has no linear layer {name!r}, it has {', '.join(sorted(linear))}; or take all-linear")
    return names


def load_model(model_name_or_path: str, dtype: torch.dtype, bits: int = 16, *, attn_implementation: str | None = None,
               trust_remote_code: bool = False, allow_pickle: bool = False, device_map=None):
    """A causal language model with every weight loaded from its files.

    Args:
        dtype: Of the weights that stay unquantized, and of the arithmetic.
        bits: 16 for the weights as they are, 8 for LLM.int8 (arXiv:2208.07339), 4 for NF4 with double quantization
            (QLoRA, arXiv:2305.14314). A GPTQ folder has its own, and is made 16 bit again where gptqmodel is not installed.
    """
    quantization, kind, name, given = None, AutoModelForCausalLM, model_name_or_path, {}
    if gptq := gptq_config(model_name_or_path):
        if bits < 16:
            raise BadInput(f"--bits={bits}: {model_name_or_path} is quantized already, to {gptq['bits']} bits by GPTQ: leave --bits at 16")
        if not has_gptqmodel():
            skeleton = load_skeleton(model_name_or_path, trust_remote_code)
            del skeleton.config.quantization_config
            kind, name, given = type(skeleton), None, dict(config=skeleton.config, state_dict=dequantized_state(model_name_or_path, gptq, dtype))
    if bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif bits == 4:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    try:
        model, loaded = kind.from_pretrained(
            name, dtype=dtype, quantization_config=quantization, attn_implementation=attn_implementation, device_map=device_map,
            trust_remote_code=trust_remote_code, use_safetensors=None if allow_pickle else True, output_loading_info=True, **given)
    except Exception as problem:  # a cut-off file raises SafetensorError, RuntimeError or OSError, by where it was cut
        raise BadInput(f"{model_name_or_path} could not be loaded: {first_line(problem)}") from problem
    missing = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if missing:
        raise BadInput(f"{model_name_or_path} lacks {len(missing)} of its weights, {missing[0]} for one: the files do not belong to its config.json")
    return model


def add_token_rows(model, tokenizer, new_tokens: list[str]) -> dict[str, list[int]]:
    """Give new tokens a row in embedding and head, each the mean of the old rows; {module name: row numbers}.

    A row left random is farther from all others than they are from one another, and it disturbs every softmax.
    """
    if not new_tokens:
        return {}
    weight = model.get_input_embeddings().weight
    if len(tokenizer) > getattr(weight, "ds_shape", weight.shape)[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(new_tokens)
    layers = {id(layer.weight): layer for layer in (model.get_output_embeddings(), model.get_input_embeddings())}  # one if tied
    with torch.no_grad(), gathered([layer.weight for layer in layers.values()]):
        for layer in layers.values():
            layer.weight[ids] = layer.weight[: min(ids)].float().mean(dim=0).to(layer.weight)
    return {name.rpartition(".")[2]: ids for name, module in model.named_modules() if module in layers.values()}


def gathered(parameters: list):
    """Under ZeRO-3 these parameters whole, to be read and written; else they are whole anyway."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def freeze(model, freeze_layers: int, new_tokens: list[str]) -> int:
    """Leave the embeddings and the lowest layers as they are; returns the number of weights that are trained."""
    if freeze_layers and new_tokens:
        raise BadInput(f"--freeze_layers={freeze_layers} would leave the template's new tokens ({', '.join(new_tokens)}) all alike: choose a --template "
                       f"without new tokens, or freeze nothing")
    if freeze_layers:
        layers = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
        if not 0 < freeze_layers < len(layers):
            raise BadInput(f"--freeze_layers={freeze_layers}: this model has {len(layers)} layers, leave one at least")
        for module in (model.get_input_embeddings(), *layers[:freeze_layers]):
            module.requires_grad_(False)
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def table_names(model) -> list[str]:
    """Names of the modules that hold the embedding and, where it has weights of its own, the head: embed_tokens, lm_head."""
    tables = {id(layer.weight): layer for layer in (model.get_output_embeddings(), model.get_input_embeddings())}.values()  # one if tied
    return [name.rpartition(".")[2] for name, module in model.named_modules() if module in tables]


def freeze_all_but_embeddings(model) -> None:
    """Train embedding and head alone: the step after new tokens, which leaves what the layers know as it is."""
    model.requires_grad_(False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.requires_grad_(True)


def new_model(config_name: str, vocab_size: int, dtype: torch.dtype, attn_implementation: str | None, trust_remote_code: bool = False):
    """A model of random weights, of the architecture that a configuration describes."""
    config = AutoConfig.from_pretrained(config_name, trust_remote_code=trust_remote_code, vocab_size=vocab_size)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)


def load_adapter(model, lora_path: str, model_name_or_path: str, allow_pickle: bool = False, name: str = "default"):
    """`model` with the LoRA adapter in a folder; BadInput if it was trained on another base or lacks a tensor."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    folder = Path(lora_path)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():  # old Chinese-Vicuna checkpoints
        pickles = [folder / name for name in ("adapter_model.bin", "pytorch_model.bin") if (folder / name).is_file()]
        if not pickles or not allow_pickle:
            raise BadInput(f"{lora_path} holds no adapter_model.safetensors" + (f" but a pickle, {pickles[0].name}, which can run code when it is loaded: if "
                           f"you trust it, --allow_pickle True converts it" if pickles else ""))
        weights = torch.load(pickles[0], map_location="cpu", weights_only=True)
        save_file({key.replace(".default.", "."): tensor.contiguous() for key, tensor in weights.items() if "lora_" in key}, file)
        print(f"converted {pickles[0]} to {file}", file=sys.stderr)
    about = folder / "yangtuo.json"
    if about.is_file():
        base = json.loads(about.read_text("utf-8")).get("base_fingerprint")
        if base and base != (found := fingerprint(model_name_or_path)):
            raise BadInput(f"{lora_path} was trained on another base than {model_name_or_path} (fingerprint {base[:12]}, this one has {str(found)[:12]})")
    try:
        adapted = PeftModel.from_pretrained(model, folder, adapter_name=name) if not hasattr(model, "peft_config") else model
        if adapted is model:
            model.load_adapter(folder, adapter_name=name)
    except (RuntimeError, ValueError, KeyError) as problem:
        raise BadInput(f"{lora_path} does not fit {model_name_or_path}, was it trained on another base? {first_line(problem)}") from None
    wanted, found = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)), set(load_file(file))
    if wanted - found:
        raise BadInput(f"{lora_path} lacks {len(wanted - found)} tensors, {min(wanted - found)} for one")
    return adapted


def load_choices(model_name_or_path, folders: dict[str, str | None], template="auto", bits=16, precision="auto", trust_remote_code=False, allow_pickle=False):
    """(model, {name: (Chat, adapter)}), ready to generate: one base, and adapters over it to choose from.

    Args:
        folders: {name: folder of an adapter}, or None for the base itself. Each has a Chat of its own, with the tokenizer and
            template of the adapter if it brings them, else of the base.
    """
    choices = {}
    for name, folder in folders.items():
        tuned = folder if folder and Path(folder, "tokenizer_config.json").is_file() else model_name_or_path
        choices[name] = Chat(load_tokenizer(tuned, trust_remote_code), template), f"adapter{len(choices)}" if folder else None
    model = load_model(model_name_or_path, DTYPES[choose_precision(precision)], bits, trust_remote_code=trust_remote_code,
                       allow_pickle=allow_pickle, device_map={"": "cuda" if torch.cuda.is_available() else "cpu"})
    rows = model.get_input_embeddings().weight.shape[0]  # an adapter's template may have added tokens to its base's
    for chat, _ in choices.values():  # one id may be another token elsewhere: the rows start alike, and each adapter brings what it made of them
        add_token_rows(model, chat.tokenizer, [token for token, i in chat.tokenizer.get_added_vocab().items() if i >= rows])
    for name, (_, adapter) in choices.items():
        if adapter:
            model = load_adapter(model, folders[name], model_name_or_path, allow_pickle, adapter)
    return model.eval(), choices


def first_line(problem: BaseException) -> str:
    return str(problem).strip().split("\n")[0][:300]
