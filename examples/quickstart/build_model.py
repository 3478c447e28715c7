"""Builds an untrained small chat model with a tokenizer of its own: byte-level BPE on an environment's own words.

usage: python build_model.py --env shop --out DIR [--hidden 256 --layers 4 --vocab 2048 --copies 9600]

``--copies`` writes an exercise for the warm start into DIR/copies.jsonl: random tokens to be repeated. A reply repeats
order numbers, prices and names from its prompt; a model of this size learns to copy much sooner from text in which
every token is a copy than from replies alone.
"""

import argparse
import json
import random
from pathlib import Path

from openrlhf_gopo import platform

platform.activate()  # before transformers: without a GPU a CUDA build of torchvision cannot be imported

# ruff: noqa: E402
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from openrlhf_gopo.cli.export_sft import export
from openrlhf_gopo.envs import load_environment

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts, vocab: int, max_len: int) -> PreTrainedTokenizerFast:
    """A ChatML tokenizer of at most ``vocab`` tokens, all 256 bytes included."""
    bpe = Tokenizer(models.BPE())
    # A number is one token where it is frequent: one thing to copy, not several.
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=max_len,
    )


def write_copies(path: Path, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> None:
    """``count`` conversations of one exchange: 6 to 19 random tokens, and the same as the reply."""
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    pieces = [piece for piece in pieces if piece.strip() and "\ufffd" not in piece]  # no parts of a character
    draws = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            line = "".join(draws.choices(pieces, k=draws.randint(6, 19))).strip()
            messages = [{"role": role, "content": line} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="shop")
    parser.add_argument("--data", default=None)
    parser.add_argument("--out", required=True)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--max_len", type=int, default=2048)
    parser.add_argument("--copies", type=int, default=0, help="exercises in copies.jsonl; 0: no file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    env = load_environment(args.env, args.data)
    labels = [str(i) for i in range(env.catalogue_size())]
    played = export(env, labels, 200, 0.5, args.seed)
    texts = [m["content"] for streams in played for stream in streams.values() for m in stream]
    tokenizer = train_tokenizer(texts, args.vocab, args.max_len)
    torch.manual_seed(args.seed)
    # Not Qwen2: for that type transformers replaces the saved tokenizer's splitting rules by Qwen's own.
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,  # the smallest heads that vLLM takes: many small ones copy sooner
        num_key_value_heads=args.hidden // 32,
        max_position_embeddings=args.max_len,
        initializer_range=args.hidden**-0.5,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    if args.copies:
        write_copies(Path(args.out, "copies.jsonl"), tokenizer, args.copies, args.seed)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters, {len(tokenizer)} tokens -> {args.out}")


if __name__ == "__main__":
    main()
