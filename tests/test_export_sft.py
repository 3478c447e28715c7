"""Behaviour cloning must teach the very tokens that the rollout then asks for."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from openrlhf_gopo.cli import export_sft
from openrlhf_gopo.cli.export_sft import SINGLE_LEVEL
from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.evaluation.scripted import demonstrations
from openrlhf_gopo.logs import Dialogue, to_trajectory
from openrlhf_gopo.platform.media import hide_what_cuda_builds_break
from openrlhf_gopo.policy.two_level import SingleLevelPolicy, TwoLevelPolicy

hide_what_cuda_builds_break()

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """ChatML over single bytes and two merges, so that tokens can join across characters."""
    from transformers import PreTrainedTokenizerFast

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "er", "Ġt"]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("e", "r"), ("Ġ", "t")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def env():
    return load_environment("shop")


@pytest.fixture(scope="module")
def policy(tokenizer, env):
    return TwoLevelPolicy(tokenizer, tokenizer, env.catalogue_size())


@pytest.fixture(scope="module")
def single(tokenizer, env):
    return SingleLevelPolicy(tokenizer, tokenizer, env.catalogue_size())


def rollout_streams(policy, env, trajectory):
    """The streams that a rollout with the same turns would have."""
    catalogue = env.catalogue(trajectory.goal)
    expert, responder = policy.streams(trajectory.goal, catalogue)
    ids, by_id, previous = policy.label_ids(catalogue), {s.id: s for s in catalogue}, None
    encode = policy.responder.tokenizer.encode
    for turn in trajectory.turns:
        expert.ask(expert.message(policy.decision_text(previous, turn.user)))
        token = ids[turn.strategy]
        if turn.forced:
            expert.force(token)
        else:
            expert.act([token], [-1.0], [ids[s] for s in turn.allowed or by_id])  # a log may not know what was allowed
        responder.ask(responder.message(policy.reply_text(turn.user, by_id[turn.strategy], turn.briefing)))
        sampled = [*encode(turn.reply, add_special_tokens=False), policy.responder.stop_token]
        responder.act(sampled, [-1.0] * len(sampled))
        previous = policy.responder.decode(sampled)
    return {EXPERT: expert.stream, RESPONDER: responder.stream}


@pytest.mark.parametrize("skill", [0.0, 0.7])
def test_exported_messages_are_the_rollouts_streams(tokenizer, env, policy, skill):
    played = list(demonstrations(env, 12, skill, seed=1))
    assert max(len(trajectory.turns) for trajectory in played) >= 4
    for trajectory in played:
        exported = export_sft.messages(trajectory, env, list(policy.labels))
        replayed = policy.replay(trajectory, env.catalogue(trajectory.goal))
        for role, stream in rollout_streams(policy, env, trajectory).items():
            assert (replayed[role].tokens, replayed[role].spans) == (stream.tokens, stream.spans)
            assert replayed[role].allowed == stream.allowed
            whole, tokens = (
                tokenizer.apply_chat_template(exported[role], tokenize=True, return_dict=False),
                stream.tokens,
            )
            # The expert decodes its label alone, so its stream ends before the end of that message.
            assert whole[: len(tokens)] == tokens
            rest = tokenizer.convert_ids_to_tokens(whole[len(tokens) :])
            assert rest == {EXPERT: ["<|im_end|>", "Ċ"], RESPONDER: ["Ċ"]}[role]


def test_one_model_that_does_both_is_taught_its_own_stream(tokenizer, env, single):
    for trajectory in demonstrations(env, 12, 0.7, seed=1):
        exported = export_sft.messages(trajectory, env, list(single.labels))[SINGLE_LEVEL]
        stream = rollout_streams(single, env, trajectory)[RESPONDER]
        whole = tokenizer.apply_chat_template(exported, tokenize=True, return_dict=False)
        assert whole[: len(stream.tokens)] == stream.tokens
        assert tokenizer.convert_ids_to_tokens(whole[len(stream.tokens) :]) == ["Ċ"]
        # A decision and a reply per turn, in this order; a forced decision is no action.
        actions = [kind for turn in trajectory.turns for kind in ([] if turn.forced else ["label"]) + ["reply"]]
        assert ["label" if allowed else "reply" for allowed in stream.allowed] == actions
        assert [len(allowed) for allowed in stream.allowed if allowed] == [
            len(turn.allowed) for turn in trajectory.turns if not turn.forced
        ]


def test_the_command_writes_what_the_rollout_reads(tokenizer, policy, env, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "new" / "out"
    export_sft.main(
        ["--env", "shop", "--tokenizer", str(tmp_path / "model"), "--dialogues", "5", "--seed", "3", "--out", str(out)]
    )
    names = (EXPERT, RESPONDER, SINGLE_LEVEL, "both")
    written = {n: [json.loads(x) for x in (out / f"{n}.jsonl").open()] for n in names}
    assert len(written[EXPERT]) == len(written[RESPONDER]) == 5
    assert sorted(map(json.dumps, written["both"])) == sorted(map(json.dumps, written[EXPERT] + written[RESPONDER]))
    expected = list(export_sft.export(env, list(policy.labels), 5, 0.5, 3))
    assert [line["messages"] for line in written[EXPERT]] == [conversation[EXPERT] for conversation in expected]
    assert [line["messages"] for line in written[RESPONDER]] == [conversation[RESPONDER] for conversation in expected]
    assert [line["messages"] for line in written[SINGLE_LEVEL]] == [
        conversation[SINGLE_LEVEL] for conversation in expected
    ]
    assert "5 dialogues of shop" in capsys.readouterr().out


def logged(trajectory, number, **changes):
    """A dialogue of the script as a log would have it."""
    goal = trajectory.goal
    fields = ("user", "strategy", "reply", "briefing", "events", "completed", "engagement", "on_task")
    record = {
        "id": f"call {number}",
        "source": "chat export",
        "language": "en",
        "goal": {n: getattr(goal, n) for n in ("intent", "context", "subgoals", "facts")},
        "turns": [{name: getattr(turn, name) for name in fields} for turn in trajectory.turns],
        "outcome": {"stop": trajectory.stop.value, "success": trajectory.success},
    }
    record["goal"]["id"] = changes.pop("goal", f"call {number}")
    for path, value in changes.items():
        index, name = path.split("_", 1)
        record["turns"][int(index.removeprefix("t"))][name] = value
    return record


@pytest.fixture
def export_logs(tokenizer, tmp_path, capsys):
    """Run the command on log records; what it wrote by file, and what it printed."""

    def run(*records):
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "logs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        flags = ["--env", "shop", "--tokenizer", str(tmp_path / "model"), "--logs", str(tmp_path / "logs.jsonl")]
        export_sft.main([*flags, "--out", str(tmp_path / "out")])
        names = (EXPERT, RESPONDER, SINGLE_LEVEL, "both", "replies")
        found = {n: [json.loads(x)["messages"] for x in (tmp_path / "out" / f"{n}.jsonl").open()] for n in names}
        assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == sorted(names)
        return found, capsys.readouterr().out

    return run


def test_logged_dialogues_are_the_rollouts_streams(tokenizer, env, policy, export_logs):
    """Token for token, with white space that the rollout would not have, and other people's letters."""
    played = [t for t in demonstrations(env, 40, 0.7, seed=2) if len(t.turns) >= 3][:10]
    odd = {
        "t0_user": "  Grüß Gott! \n",
        "t1_reply": "\tÜber 35 € 🙂 ",
        "t2_user": "line\nbreak\u2028end",
        "t2_briefing": "",
    }
    records = [logged(trajectory, number, **(odd if number % 2 else {})) for number, trajectory in enumerate(played)]
    written, printed = export_logs(*records)
    assert "10 dialogues of shop" in printed
    trajectories = [to_trajectory(Dialogue.model_validate_json(json.dumps(record))) for record in records]
    assert any("Über" in turn.reply for trajectory in trajectories for turn in trajectory.turns)
    for index, trajectory in enumerate(trajectories):
        for role, stream in rollout_streams(policy, env, trajectory).items():
            whole = tokenizer.apply_chat_template(written[role][index], tokenize=True, return_dict=False)
            assert whole[: len(stream.tokens)] == stream.tokens
            rest = tokenizer.convert_ids_to_tokens(whole[len(stream.tokens) :])
            assert rest == {EXPERT: ["<|im_end|>", "Ċ"], RESPONDER: ["Ċ"]}[role]


@pytest.mark.parametrize("told", [True, False])
def test_what_offline_training_learns_from_are_the_rollouts_streams(env, policy, single, told):
    """Logged dialogues, whether they tell what was allowed or not."""
    for number, trajectory in enumerate(t for t in demonstrations(env, 20, 0.7, seed=2) if len(t.turns) >= 3):
        record = logged(trajectory, number)
        for turn, played in zip(record["turns"], trajectory.turns, strict=True):
            turn["allowed"] = list(played.allowed) if told else None
        replayed = to_trajectory(Dialogue.model_validate_json(json.dumps(record)))
        for who in (policy, single):
            found = who.replay(replayed, env.catalogue(trajectory.goal))
            expected = rollout_streams(who, env, trajectory if told else replayed)
            for role in who.roles:
                assert found[role].tokens == expected[role].tokens
                assert (found[role].spans, found[role].allowed) == (expected[role].spans, expected[role].allowed)


def test_logged_turns_that_are_no_decision(env, policy):
    """A forbidden strategy stands in the stream and is not learnt; an unknown one leaves neither label nor reply."""
    (whole,) = (t for t in demonstrations(env, 1, 1.0, seed=2))
    assert len(whole.turns) >= 3
    assert not any(turn.forced for turn in whole.turns[:3])
    catalogue = env.catalogue(whole.goal)
    before = policy.replay(whole, catalogue)
    forbidden = next(s.id for s in catalogue if s.id not in whole.turns[0].allowed)
    whole.turns[0] = replace(whole.turns[0], strategy=forbidden)
    whole.turns[1] = replace(whole.turns[1], strategy="")
    after = policy.replay(whole, catalogue)
    expert = after[EXPERT]
    assert len(expert.spans) == len(before[EXPERT].spans) - 2
    text = policy.expert.tokenizer.decode(expert.tokens)
    label = policy.expert.tokenizer.decode([policy.label_ids(catalogue)[forbidden]])
    assert f"<|im_start|>assistant\n{label}<|im_end|>" in text
    assert "<|im_start|>assistant\n<|im_end|>" in text
    assert whole.turns[1].reply in text  # the agent said it: the next decision is taken after it
    written = policy.expert.tokenizer.decode(after[RESPONDER].tokens)
    assert whole.turns[1].reply not in written
    assert len(after[RESPONDER].spans) == len(whole.turns) - 1


def test_a_log_of_the_script_gives_the_scripts_own_files(env, policy, export_logs):
    played = list(demonstrations(env, 6, 0.7, seed=4))
    written, _ = export_logs(*[logged(trajectory, number) for number, trajectory in enumerate(played)])
    expected = [export_sft.messages(trajectory, env, list(policy.labels)) for trajectory in played]
    assert written[EXPERT] == [conversations[EXPERT] for conversations in expected]
    assert written[RESPONDER] == [conversations[RESPONDER] for conversations in expected]
    assert written["both"] == [conversations[role] for conversations in expected for role in (EXPERT, RESPONDER)]
    assert written[SINGLE_LEVEL] == [conversations[SINGLE_LEVEL] for conversations in expected]
    assert len(written["replies"]) == sum(len(trajectory.turns) for trajectory in played)


def test_what_a_warm_start_may_not_imitate_is_left_out_and_counted(env, export_logs):
    one, *_ = (t for t in demonstrations(env, 20, 0.7, seed=2) if len(t.turns) >= 4)
    heldout = env.goals("heldout")[0].id
    written, printed = export_logs(
        logged(one, 0),
        logged(one, 1, goal=heldout),
        logged(one, 2, t1_user="I typed <|im_end|> by hand"),
        logged(one, 3, t0_strategy=None),
        logged(one, 4, t2_strategy=None, t3_reply="<|im_start|>"),
    )
    turns = [sum(m["role"] == "assistant" for m in conversation) for conversation in written[EXPERT]]
    assert turns == [len(one.turns), 2]
    assert printed.splitlines()[1:] == [
        "left out: held-out goal: 1",
        "left out: control token in a text: 1",
        "left out: first turn without a strategy: 1",
        "cut before a turn without a strategy: 1",
    ]


def test_logs_that_cannot_be_used_are_short_errors_and_write_nothing(env, tokenizer, tmp_path, capsys):
    (one,) = demonstrations(env, 1, 1.0, seed=2)
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--env", "shop", "--tokenizer", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    for record, more, expected in (
        (logged(one, 0), ["--skill", "0.5"], "--skill 0.5: steers the script; leave it out with --logs"),
        (logged(one, 0), ["--seed", "0"], "--seed 0: steers the script"),
        (logged(one, 0, t0_strategy="sing"), [], "logs.jsonl:1:turns[0].strategy: 'sing' is not in the catalogue"),
        (logged(one, 0, t0_strategy=None), [], "nothing to imitate (left out: first turn without a strategy: 1)"),
    ):
        (tmp_path / "logs.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(SystemExit) as exit_:
            export_sft.main([*flags, "--logs", str(tmp_path / "logs.jsonl"), *more])
        assert exit_.value.code == 2
        assert expected in capsys.readouterr().err
        assert list((tmp_path / "out").glob("*")) == []


def test_an_unknown_environment_is_a_short_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        export_sft.main(["--env", "nosuch", "--tokenizer", "x", "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "export_sft: error: --gopo.env nosuch" in capsys.readouterr().err


def test_the_quickstart_tokenizer_has_a_usable_template(env):
    """examples/quickstart trains its tokenizer on the exported words; GOPO must accept it."""
    file = Path(__file__).parents[1] / "examples" / "quickstart" / "build_model.py"
    spec = importlib.util.spec_from_file_location("quickstart_build_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    labels = [str(i) for i in range(env.catalogue_size())]
    texts = [m["content"] for c in export_sft.export(env, labels, 20, 0.5, 0) for ms in c.values() for m in ms]
    tokenizer = module.train_tokenizer(texts, 600, 1024)
    policy = TwoLevelPolicy(tokenizer, tokenizer, env.catalogue_size())
    (trajectory,) = demonstrations(env, 1, 0.5, 0)
    exported = export_sft.messages(trajectory, env, list(policy.labels))
    for role, stream in rollout_streams(policy, env, trajectory).items():
        whole = tokenizer.apply_chat_template(exported[role], tokenize=True, return_dict=False)
        assert whole[: len(stream.tokens)] == stream.tokens
