"""The environment ``shop`` in English and in Chinese: the same course of every dialogue, and every text translated."""

import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.envs.shop import Shop
from openrlhf_gopo.envs.shop_goals import PERSONAS
from openrlhf_gopo.envs.shop_texts import LANGUAGES, load_texts
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.users.agenda import AgendaUser

EN, ZH = Shop("en"), Shop("zh")
CHINESE = r"[\u4e00-\u9fff]"
LATIN = r"[A-Za-z]+"


def slots(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


def foreign(text):
    """The Latin words of a Chinese text, ids such as A5 aside."""
    return re.findall(LATIN, re.sub(r"[A-Z]\d", "", text))


def test_the_language_is_chosen_by_data():
    assert load_environment("shop").catalogue(None) == load_environment("shop", "en").catalogue(None)
    assert load_environment("shop", "zh").catalogue(None)[0].name == "询问需求"
    for data in ("fr", "ZH", "", "zh.json"):
        with pytest.raises(
            ConfigError, match=rf"--gopo.data {data}: .* choose one of en, zh, or leave --gopo.data out"
        ):
            load_environment("shop", data)


def test_both_languages_keep_the_contract_of_environments():
    check_env(ZH)


def test_every_text_has_a_translation_with_the_same_values():
    en, zh = (load_texts(language) for language in LANGUAGES)
    for mine, other in ((en.phrases, zh.phrases), (en.flavour, zh.flavour)):
        assert mine.keys() == other.keys()
        for key, texts in mine.items():
            assert len(texts) == len(other[key]), key  # the same draw says the same
            for text, translated in zip(texts, other[key], strict=True):
                if key not in ("need.late", "need.coupon"):  # Chinese may name the family where English does not
                    assert set(slots(text)) == set(slots(translated)), key
    assert en.scripts.keys() == zh.scripts.keys()
    for name, script in en.scripts.items():
        other = zh.scripts[name]
        assert [slots(text) for text in script.expected] == [slots(text) for text in other.expected], name
        assert slots(script.briefing) == slots(other.briefing), name
        assert len(script.replies) == len(other.replies), name
        assert bool(script.topic) == bool(other.topic), name
        assert all(any(word in reply for word in other.topic) for reply in other.replies if other.topic), name
    assert en.flavour.keys() == PERSONAS.keys() - {"calm"}


def test_nothing_in_a_chinese_text_is_english():
    texts = load_texts("zh")
    said = [text for group in (texts.phrases, texts.flavour) for entry in group.values() for text in entry]
    for script in texts.scripts.values():
        said += [script.briefing, *script.replies, *script.expected, *script.topic]
    for text in said:
        assert not foreign(re.sub(r"{\w+}", "", text)), text
        assert not re.search("[,?!;:]", text), text  # but their full-width forms


def test_nothing_in_a_chinese_goal_or_catalogue_is_english():
    for strategy in ZH.catalogue(None):
        assert not foreign(strategy.name + strategy.description)
        assert re.search(CHINESE, strategy.name)
        assert re.search(CHINESE, strategy.description)
    for goal in (*ZH.goals("heldout"), *ZH.goals("train")[:2000]):
        said = [goal.context, *goal.facts.values()]
        said += [value for name, value in goal.data.items() if isinstance(value, str) and name != "stock"]
        assert not [word for text in said for word in foreign(text)], goal.id


def test_goals_are_the_same_in_both_languages():
    for split in ("train", "heldout"):
        for one, other in zip(EN.goals(split)[:500], ZH.goals(split)[:500], strict=True):
            assert (one.id, one.intent, one.subgoals, one.persona) == (
                other.id,
                other.intent,
                other.subgoals,
                other.persona,
            )
            assert one.facts.keys() == other.facts.keys()
            numbers = {name: value for name, value in one.data.items() if isinstance(value, int)}
            assert numbers.items() <= other.data.items()


@pytest.mark.parametrize("skill", [0.0, 0.6, 1.0])
def test_the_scripted_policy_plays_the_same_dialogues_in_both_languages(skill):
    policy = ScriptedPolicy(skill, slip=0)
    for one, other in zip(EN.goals("heldout")[:60], ZH.goals("heldout")[:60], strict=True):
        english, chinese = (play(env, goal, 0, 7, policy) for env, goal in ((EN, one), (ZH, other)))
        assert english.stop is chinese.stop
        for mine, its in zip(english.turns, chinese.turns, strict=True):
            for name in ("strategy", "allowed", "relevance", "events", "completed", "engagement", "on_task"):
                assert getattr(mine, name) == getattr(its, name), (one.id, name)
            for text in (its.user, its.reply, its.briefing, *its.expected):
                assert not foreign(text), (one.id, text)
                assert "," not in text
            assert re.search(CHINESE, its.user + its.reply)
        assert chinese.rewards["realised"] == chinese.rewards["grounded"] == 1.0
        assert chinese.rewards["tse"] == english.rewards["tse"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2239), st.integers(0, 9), st.randoms(use_true_random=False), st.floats(0, 0.4))
def test_any_play_has_the_same_course_in_both_languages(index, seed, rng, silence):
    dialogues = [env.start(env.goals("heldout")[index], seed) for env in (EN, ZH)]
    seen = [dialogue.opening for dialogue in dialogues]
    while seen[0] is not None:
        assert seen[0].allowed == seen[1].allowed
        assert dialogues[0].relevance() == dialogues[1].relevance()
        strategy = rng.choice(seen[0].allowed)
        mute = rng.random() < silence  # says nothing: the customer is confused
        outcomes = [d.step(strategy, "" if mute else d.reference_reply(strategy)) for d in dialogues]
        for name in ("events", "completed", "engagement", "on_task", "stop"):
            assert getattr(outcomes[0], name) == getattr(outcomes[1], name)
        seen = [outcome.next for outcome in outcomes]


def advised():
    """A Chinese dialogue with a loyal customer up to where an item is recommended, and that item with its price."""
    goal = next(
        g for g in ZH.goals("train") if g.intent == "advice" and g.persona["type"] == "loyal" and not g.data["vague"]
    )
    dialogue = ZH.start(goal, 0)
    for strategy in ("ask_use", "ask_budget"):
        assert dialogue.step(strategy, dialogue.reference_reply(strategy)).completed
    return dialogue, goal.data["item"], goal.data["price"]


@pytest.mark.parametrize(
    "wording", ["给您推荐{0}，{1}元", "{0} 只要 {1} 元！", "价格￥{1}的{0}很好", "{0}（{1}.00元）", "{0}卖{1}块钱"]
)
def test_other_chinese_wording_of_the_same_values_is_understood(wording):
    dialogue, item, price = advised()
    assert dialogue.step("recommend", wording.format(item, price)).completed == ("item_found",)


@pytest.mark.parametrize(
    "wording", ["推荐{0}，1{1}元", "推荐X{0}，{1}元", "推荐{0}1，{1}元", "推荐{0}，{1}0元", "推荐这款"]
)
def test_other_values_are_not(wording):
    dialogue, item, price = advised()
    assert dialogue.step("recommend", wording.format(item, price)).events == ("confused",)


def test_what_a_chinese_customer_says_is_joined_by_chinese_commas():
    persona = {"type": "x", "patience": 1, "trust": 1, "price_sensitivity": 1}
    phrases = {"a": ["有货吗？"], "b": ["好的"], "c": ["谢谢，"]}
    user = AgendaUser(persona, phrases, {"x": ["再见"]}, comma="，")
    assert user.say(random.Random(0), ["a", "b", "c"], {}, flavour=1.0) == "有货吗？好的，谢谢，再见"
