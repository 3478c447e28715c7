"""Run by test_cpu_stack.py in processes of their own: activation changes the process that it happens in."""

from __future__ import annotations

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openrlhf_gopo import platform

platform.activate()

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

IDS = list(range(3, 40))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def build(folder: str) -> None:
    """A random Qwen2 of 0.2 M parameters with a tied head, its byte-level tokenizer, and 32 dialogues."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    raw.add_special_tokens(special)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    # vLLM's CPU attention takes head sizes from 32 on
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=264, num_hidden_layers=2, tie_word_embeddings=True, eos_token_id=2, **sizes)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)

    with Path(folder, "dialogues.jsonl").open("w") as file:
        for i in range(32):
            turns = [("user", f"hello {i}"), ("assistant", "how are you"), ("user", "refund"), ("assistant", "order")]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")


def compare(before: str, after: str) -> None:
    """Both load, and training moved the weights."""
    old, new = AutoModelForCausalLM.from_pretrained(before), AutoModelForCausalLM.from_pretrained(after)
    pairs = zip(old.parameters(), new.parameters(), strict=True)
    moved = [not a.equal(b) for a, b in pairs]
    tokens = AutoTokenizer.from_pretrained(after)("hello")["input_ids"]
    dtype = json.loads(Path(after, "config.json").read_text())["dtype"]
    print(json.dumps({"moved": sum(moved), "of": len(moved), "tokens": len(tokens), "dtype": dtype}))


def sync(folder: str, dtype: str) -> None:
    """Mean |engine - model| log-probability: at the start, with new weights in the model alone, after a sync without
    and then with the repacking of tied heads, and after a second sync."""
    import vllm

    from openrlhf_gopo.platform import weights

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    engine = vllm.LLM(
        folder,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=128,
        enable_prefix_caching=False,
        worker_extension_cls="openrlhf.trainer.ray.vllm_worker_wrap.WorkerWrap",
    )
    trainer = _connect(engine)
    gaps = {"start": _gap(engine, model)}
    _perturb(model, seed=1)
    gaps["not synced"] = _gap(engine, model)

    repack, weights.repack_tied_heads = weights.repack_tied_heads, lambda model: None
    _send(engine, trainer, model)
    gaps["head not repacked"] = _gap(engine, model)
    weights.repack_tied_heads = repack
    _send(engine, trainer, model)
    gaps["synced"] = _gap(engine, model)
    _perturb(model, seed=2)
    _send(engine, trainer, model)
    gaps["synced again"] = _gap(engine, model)
    print(json.dumps(gaps))


def _connect(engine: Any) -> Any:
    """Trainer's rank 0 in a thread, the engine as rank 1, through the functions that OpenRLHF calls."""
    from openrlhf.utils.distributed_util import stateless_init_process_group

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        trainer = pool.submit(stateless_init_process_group, "127.0.0.1", port, 0, 2, torch.cuda.current_device())
        engine.collective_rpc("init_process_group", args=("127.0.0.1", port, 1, 2, "openrlhf", "gloo", False))
        return trainer.result(60)


def _send(engine: Any, trainer: Any, model: Any) -> None:
    parameters = list(model.named_parameters())
    with ThreadPoolExecutor(1) as pool:
        for i, (name, parameter) in enumerate(parameters, start=1):
            sent = pool.submit(trainer.broadcast, parameter.data, src=0, stream=None)
            last = i == len(parameters)
            engine.collective_rpc("update_weight", args=(name, parameter.dtype, parameter.shape, last))
            sent.result(60)


def _perturb(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def _gap(engine: Any, model: Any) -> float:
    import vllm

    parameters = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
    answer = engine.generate([{"prompt_token_ids": IDS}], parameters, use_tqdm=False)[0]
    theirs = [step[token].logprob for step, token in zip(answer.prompt_logprobs[1:], IDS[1:], strict=True)]
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1].float()
    ours = logits.log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    return float((ours - torch.tensor(theirs)).abs().mean())


if __name__ == "__main__":
    {"build": build, "compare": compare, "sync": sync}[sys.argv[1]](*sys.argv[2:])
