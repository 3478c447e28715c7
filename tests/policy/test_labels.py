"""Strategy labels: one distinct token each, at the place where the expert says them."""

import copy

import pytest
from tokenizers import normalizers

from openrlhf_gopo.errors import ConfigError, StreamError
from openrlhf_gopo.policy.labels import choose_labels
from openrlhf_gopo.policy.template import ChatTemplate
from openrlhf_gopo.policy.two_level import TwoLevelPolicy
from openrlhf_gopo.types import Strategy


def test_texts_with_the_same_token_are_one_label(llama3):
    """A tokenizer that lowers its text has one token for A and a."""
    tokenizer = copy.deepcopy(llama3)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    labels = choose_labels(tokenizer, 36)
    assert list(labels) == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    assert len(set(labels.values())) == 36
    with pytest.raises(ConfigError, match="A,a gives 1 distinct"):
        choose_labels(tokenizer, 2, "A,a")


@pytest.mark.parametrize("count", [1, 26, 62])
def test_defaults_are_distinct_single_tokens(tokenizer, count):
    labels = choose_labels(tokenizer, count)
    assert list(labels)[:26] == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")[:count]
    assert len(labels) == len(set(labels.values())) == count
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for text, token in labels.items():
        assert token not in control
        assert tokenizer.decode([token]).strip() == text


def test_the_id_is_what_the_whole_dialogue_would_be_tokenised_to(tokenizer):
    """So behaviour cloning on rendered dialogues teaches the very tokens that the rollout allows."""
    stop = ChatTemplate(tokenizer).stop_token
    for text, token in choose_labels(tokenizer, 40).items():
        messages = [{"role": "user", "content": "Pick."}, {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        end = len(whole) - 1 - whole[::-1].index(stop)
        assert whole[end - 1] == token


def test_labels_after_a_newline_are_other_tokens_than_after_a_blank(mistral):
    """SentencePiece has two A's; the template decides which of them a reply starts with."""
    other = copy.deepcopy(mistral)
    other.chat_template = mistral.chat_template.replace("' ' + message['content']", "'\n' + message['content']")
    other.chat_template = other.chat_template.replace(
        "'[/INST]'", "'[/INST]' + ('\n' if add_generation_prompt else '')"
    )
    with pytest.raises(StreamError, match="rewrites earlier messages"):
        ChatTemplate(other)  # the newline is there for the last prompt only
    other.chat_template = mistral.chat_template.replace("' ' + message['content']", "message['content']")
    other.chat_template = other.chat_template.replace("'[/INST]'", "'[/INST]\n'")
    assert choose_labels(other, 1)["A"] == mistral.convert_tokens_to_ids("A")
    assert choose_labels(mistral, 1)["A"] == mistral.convert_tokens_to_ids("▁A")


def test_given_labels_keep_their_order(tokenizer):
    labels = choose_labels(tokenizer, 2, "C, A,B")
    assert list(labels) == ["C", "A"]
    assert labels == {text: choose_labels(tokenizer, 3)[text] for text in "CA"}


@pytest.mark.parametrize("label", ["Zxqvj", "A B", "<|im_end|>", "</s>", "<|eot_id|>", ""])
def test_a_label_of_several_tokens_is_refused(tokenizer, label):
    ids = tokenizer.encode(label, add_special_tokens=False)
    with pytest.raises(ConfigError) as error:
        choose_labels(tokenizer, 1, f"A,{label},B")
    assert str(error.value).startswith(f"--gopo.labels {label!r}: ")
    assert str(tokenizer.convert_ids_to_tokens(ids)) in str(error.value)
    assert "replace it" in str(error.value)


@pytest.mark.parametrize(("given", "distinct"), [("A", 1), ("A,B", 2), ("A,A,B", 2)])
def test_too_few_given_labels(tokenizer, given, distinct):
    with pytest.raises(ConfigError, match=f"--gopo.labels: {given} gives {distinct} distinct .* needs 3; give 3 comma"):
        choose_labels(tokenizer, 3, given)


def test_too_few_defaults(llama3):
    """A small vocabulary has the 62 single characters and few of the pairs AA to ZZ."""
    with pytest.raises(ConfigError, match=r"--gopo.labels: .* has \d+ distinct single-token labels, .* needs 700"):
        choose_labels(llama3, 700)


def test_a_strategy_keeps_its_label_in_a_smaller_catalogue(llama3):
    policy = TwoLevelPolicy(llama3, llama3, 3)
    strategies = [Strategy(name, name, "") for name in ("x", "y", "z")]
    all_ids = policy.label_ids(strategies)
    assert list(all_ids) == ["x", "y", "z"]
    assert list(all_ids.values()) == list(choose_labels(llama3, 3).values())
    assert policy.label_ids(strategies[:2]) == {name: all_ids[name] for name in "xy"}
