"""The command as a user sees it: its help, its defaults, and one clear line for whatever cannot work."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

pytest.importorskip("openrlhf")

from openrlhf_gopo.cli import train_gopo
from openrlhf_gopo.config import GopoConfig, JudgeConfig, LlmConfig, PreferenceConfig, flags
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.platform.media import hide_what_cuda_builds_break
from openrlhf_gopo.runtime import checks
from openrlhf_gopo.runtime.upstream.cli import UpstreamCli

hide_what_cuda_builds_break()

CONFIGS = {GopoConfig: "gopo", PreferenceConfig: "gopo.pref", LlmConfig: "gopo.llm", JudgeConfig: "gopo.judge"}
ROOT = Path(__file__).parents[2]
SMALL = {
    "--gopo.env": "shop",
    "--algo.advantage.estimator": "group_norm",
    "--rollout.batch_size": 8,
    "--rollout.n_samples_per_prompt": 8,
    "--train.batch_size": 32,
    "--data.max_len": 1280,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a small ChatML tokenizer and no model: all that a dry run reads."""
    spec = importlib.util.spec_from_file_location(
        "quickstart_model", ROOT / "examples" / "quickstart" / "build_model.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tokenizer")
    module.train_tokenizer(["Customer: hello, I want a refund. Agent: sorry"] * 5, 400, 4096).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(train_gopo.platform, "activate", lambda: None)  # it would change this whole process
    monkeypatch.setenv(train_gopo.forks.SOCKET, "taken")  # pytest, which has threads, forks nothing


@pytest.fixture(autouse=True)
def no_ray():
    """Whatever happens in these tests, Ray does not start."""
    yield
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def command(*extra: object, **changes: object) -> list[str]:
    """SMALL with changes (``None`` removes a flag), then ``extra``. ``gopo__env`` is --gopo.env."""
    given = SMALL | {"--" + name.replace("__", "."): value for name, value in changes.items()}
    return [str(word) for flag, value in given.items() if value is not None for word in (flag, value)] + list(
        map(str, extra)
    )


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run without --gopo.dry_run: the one line on stderr with which the command ends, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        train_gopo.main(argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train_gopo: error: ")
    return lines[0].removeprefix("train_gopo: error: ")


# ------------------------------------------------------------------------------------------------------------ help


def test_help_shows_the_groups_and_our_flags_with_their_defaults(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_gopo.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, what in train_gopo.SECTIONS.items():
        assert f" {name}.*: {what} " in text
    for cls, prefix in CONFIGS.items():
        for f in flags(cls):
            assert f"--{prefix}.{f.name}" in text
            assert f.metadata["help"] in text
    assert "sharpness of the preference: L = -log sigmoid(beta (m_w - m_l)) (default: 1.0)" in text


def test_every_actor_flag_has_an_expert_twin() -> None:
    upstream = UpstreamCli.load().parser
    options = {o: action for action in train_gopo.build_parser(upstream)._actions for o in action.option_strings}
    actor = [o for o in options if o.startswith("--actor.")]
    assert len(actor) > 25
    for name in actor:
        twin = options[name.replace("--actor.", "--expert.")]
        assert twin.help == f"default: the value of {options[name].option_strings[0]}"
        for what in ("type", "nargs", "choices"):
            assert getattr(twin, what) == getattr(options[name], what)


def test_no_flag_of_upstream_is_missing() -> None:
    upstream = {o for action in UpstreamCli.load().parser._actions for o in action.option_strings}
    ours = {o for action in train_gopo.build_parser(UpstreamCli.load().parser)._actions for o in action.option_strings}
    assert upstream <= ours


# --------------------------------------------------------------------------------------------------------- defaults


def test_the_expert_takes_the_actors_values_and_its_own_win(tokenizer) -> None:
    given = ["--actor.adam.lr", "3e-6", "--actor.max_norm", "0.5", "--actor.adam.betas", "0.8", "0.9"]
    own = ["--expert.adam.lr", "2e-5", "--expert.num_gpus_per_node", "2", "--expert.muon.no_nesterov"]
    args, _ = train_gopo.parse(command(*given, *own, actor__model_name_or_path=tokenizer))
    assert (args.actor.adam.lr, args.expert.adam.lr) == (3e-6, 2e-5)
    assert args.expert.max_norm == 0.5
    assert args.expert.adam.betas == [0.8, 0.9]
    assert args.expert.model_name_or_path == args.actor.model_name_or_path == str(tokenizer)
    assert (args.actor.num_gpus_per_node, args.expert.num_gpus_per_node) == (1, 2)
    assert (args.actor.muon.nesterov, args.expert.muon.nesterov) == (True, False)


def test_without_expert_flags_both_roles_are_equal_and_independent() -> None:
    args, _ = train_gopo.parse(command())
    assert vars(args.expert.adam) == vars(args.actor.adam)
    args.expert.adam.lr = 1.0
    assert args.actor.adam.lr != 1.0


@pytest.mark.parametrize(
    ("given", "actor", "expert"),
    [
        ([], (0.2, 0.2), (0.2, 0.2)),
        (["--actor.eps_clip", "0.1"], (0.1, 0.1), (0.1, 0.1)),
        (["--expert.eps_clip", "0.3"], (0.2, 0.2), (0.3, 0.3)),
        (["--actor.eps_clip_low_high", "0.2", "0.28"], (0.2, 0.28), (0.2, 0.28)),
        (["--actor.eps_clip_low_high", "0.2", "0.28", "--expert.eps_clip", "0.1"], (0.2, 0.28), (0.1, 0.1)),
        (["--expert.eps_clip", "0.3", "--expert.eps_clip_low_high", "0.1", "0.4"], (0.2, 0.2), (0.1, 0.4)),
    ],
)
def test_eps_clip_becomes_the_clip_range(given, actor, expert) -> None:
    args, _ = train_gopo.parse(command(*given))
    assert tuple(args.actor.eps_clip_low_high) == actor
    assert tuple(args.expert.eps_clip_low_high) == expert


def test_cpu_defaults_apply_on_cpu_only(monkeypatch) -> None:
    args, _ = train_gopo.parse(command())
    assert (args.actor.num_gpus_per_node, args.vllm.num_engines, args.ds.attn_implementation) == (1, 1, "sdpa")
    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "0")
    args, _ = train_gopo.parse(command())
    assert (args.actor.num_gpus_per_node, args.vllm.num_engines) == (8, None)
    assert args.ds.attn_implementation == "flash_attention_2"


# ------------------------------------------------------------------------------------------------------ a dry run


def test_a_dry_run_says_what_it_checked_and_leaves_nothing(tokenizer, tmp_path, capsys) -> None:
    flags = {"actor__model_name_or_path": tokenizer, "ckpt__output_dir": tmp_path / "out"}
    train_gopo.main(command("--gopo.dry_run", "--data.max_len", 4096, **flags))
    shown = capsys.readouterr()
    said = shown.out.splitlines()
    assert said[:4] == [
        "dry run: shop: 10240 training and 2240 held-out goals, 26 labels, 6 GPUs; everything checked",
        "a step: 8 goals x 8 dialogues = 64; 1280 steps in 1 pass(es) over 10240 goals",
        "  expert: 2 optimizer step(s) of 32 dialogues on 1 rank(s), micro-batch 1, lr 1e-06",
        "  responder: 2 optimizer step(s) of 32 dialogues on 1 rank(s), micro-batch 1, lr 1e-06",
    ]
    assert said[4].startswith(
        "tokens of a stream in 64 scripted dialogues with reference replies (--data.max_len 4096,"
    )
    for line, role in zip(said[5:7], ("expert", "responder"), strict=True):
        found = re.fullmatch(rf"  {role}: median (\d+), 90% (\d+), 99% (\d+), longest (\d+) \(goal shop-[\w-]+\)", line)
        assert found, line
        assert 100 < int(found[1]) < int(found[2]) < int(found[3]) <= int(found[4]) < 4096
    assert said[7:] == [f"GPU memory: unknown, {tokenizer} has no config.json"]
    assert shown.err == ""
    assert not (tmp_path / "out").exists()


def test_the_experts_own_steps_are_not_cut_by_tokens() -> None:
    """Batches by tokens need packing, and so CUDA: the check itself is asked."""
    args, config = train_gopo.parse(command("--gopo.expert_steps", 4, actor__model_name_or_path="m"))
    args.train.dynamic_batch_enable = True
    with pytest.raises(ConfigError, match=r"expert_steps 4: not with --train\.dynamic_batch_enable, .*; drop one"):
        checks.check_flags(args, config)


def test_a_dry_run_tells_of_the_experts_own_steps(tokenizer, capsys) -> None:
    given = ("--gopo.expert_steps", 16, "--gopo.expert_passes", 2)
    train_gopo.main(command("--gopo.dry_run", *given, actor__model_name_or_path=tokenizer))
    said = capsys.readouterr().out.splitlines()
    assert said[2:4] == [
        "  expert: 16 optimizer step(s) of 8 dialogues on 1 rank(s), micro-batch 1, lr 1e-06",
        "  responder: 2 optimizer step(s) of 32 dialogues on 1 rank(s), micro-batch 1, lr 1e-06",
    ]


def test_a_dry_run_tells_of_streams_that_would_not_fit(tokenizer, capsys) -> None:
    train_gopo.main(command("--gopo.dry_run", "--data.max_len", 1800, actor__model_name_or_path=tokenizer))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  expert: median"))
    over = int(re.search(r"; (\d+) would end in max_tokens: raise --data.max_len$", line)[1])
    assert 0 < over < 64


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ("", 6),  # two policies, each with reference and engine
        ("--algo.kl.init_coef 0", 4),
        ("--algo.advantage.estimator gae", 7),
        ("--gopo.sharing shared", 3),
        ("--gopo.policy single_level --data.max_len 2048", 3),
        ("--gopo.policy single_level --data.max_len 2048 --algo.advantage.estimator gae", 4),
        ("--gopo.expert_credit critic=1", 7),  # the expert's own critic
        ("--gopo.expert_credit critic=1,q=1 --algo.advantage.estimator gae", 8),
        ("--train.colocate_actor_ref", 4),
        ("--train.colocate_all --vllm.gpu_memory_utilization 0.4", 1),
        ("--gopo.expert_num_engines 2 --vllm.tensor_parallel_size 2", 10),
        ("--expert.num_gpus_per_node 4 --train.micro_batch_size 8", 9),
    ],
)
def test_gpus_that_a_run_needs(given, gpus, tokenizer, capsys) -> None:
    train_gopo.main(command("--gopo.dry_run", *given.split(), actor__model_name_or_path=tokenizer))
    assert f" {gpus} GPUs;" in capsys.readouterr().out


UPSTREAM_SCRIPT = """
   --actor.model_name_or_path {model}
   --ckpt.load_enable
   --ckpt.output_dir {out}
   --ckpt.path {out}/ckpt
   --ckpt.save_hf
   --ckpt.max_num 3
   --ckpt.save_steps 10
   --train.agent_func_path examples/python/agent_func.py
   --data.prompt_dataset my/prompts
   --data.input_key prompt
   --data.label_key label
   --data.max_len 8192
   --rollout.max_new_tokens 1024
   --data.apply_chat_template
   --ds.packing_samples
   --rollout.batch_size 128
   --rollout.n_samples_per_prompt 8
   --train.batch_size 1024
   --algo.dynamic_filtering_enable
   --algo.dynamic_filtering_range 0.0 1.0
   --train.dynamic_batch_enable
   --train.max_tokens_per_gpu 16192
   --rollout.max_tokens_per_gpu 32768
   --train.micro_batch_size 1
   --rollout.micro_batch_size 8
   --data.max_samples 128000
   --train.max_epochs 1
   --train.num_episodes 1
   --ref.num_nodes 1
   --ref.num_gpus_per_node 4
   --actor.num_nodes 1
   --actor.num_gpus_per_node 4
   --vllm.num_engines 2
   --vllm.tensor_parallel_size 2
   --vllm.gpu_memory_utilization 0.45
   --train.colocate_all
   --vllm.enable_sleep
   --ds.enable_sleep
   --vllm.sync_backend nccl
   --vllm.enforce_eager
   --ds.zero_stage 3
   --actor.gradient_checkpointing_enable
   --ds.param_dtype bf16
   --algo.advantage.estimator reinforce_baseline
   --actor.adam.lr 5e-7
   --actor.entropy_coef 0.0
   --algo.kl.init_coef 1e-5
   --algo.kl.use_loss
   --algo.kl.estimator k2
   --algo.advantage.is_correction_level token
   --logger.logging_steps 1
   --eval.steps -1
"""


def test_an_upstream_multi_turn_script_needs_only_the_environment(tokenizer, tmp_path, monkeypatch, capsys) -> None:
    """The flags of OpenRLHF's own multi-turn recipe, synchronous and without ring attention, and --gopo.env."""
    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "0")
    script = shlex.split(UPSTREAM_SCRIPT.format(model=tokenizer, out=tmp_path / "out"))
    UpstreamCli.load().parser.parse_args(script)  # all of it is upstream's
    train_gopo.main([*script, "--gopo.env", "shop", "--gopo.dry_run"])
    shown = capsys.readouterr()
    assert "4 GPUs; everything checked" in shown.out
    assert shown.err.splitlines() == [
        "--train.agent_func_path examples/python/agent_func.py: replaced by --gopo.env shop",
        "--data.prompt_dataset my/prompts: replaced by --gopo.env shop",
    ]


@pytest.mark.parametrize(
    "given",
    ["--reward.model_name_or_path my/reward", "--reward.remote_url my_reward.py --eval.dataset my/eval"],
)
def test_rewards_and_evaluation_data_of_upstream_are_replaced_aloud(given, capsys) -> None:
    args, _ = train_gopo.parse(command(*given.split(), algo__advantage__estimator="gae"))
    assert args.reward.remote_url == ["agent"]
    assert args.critic.model_name_or_path is None  # the critic starts from the actor, not from a reward model
    assert args.eval.dataset is None
    said = capsys.readouterr().err
    assert [line.endswith(": replaced by --gopo.env shop") for line in said.splitlines()] == [True] * given.count("--")


def test_the_url_of_a_remote_reward_becomes_a_reward(capsys) -> None:
    given = ["--reward.remote_url", "http://a:1/get_reward,http://b:2/get_reward"]
    args, config = train_gopo.parse(command(*given, "--gopo.responder_reward", "gre=1,remote=0.5"))
    assert config.reward == "remote:http://a:1/get_reward,remote:http://b:2/get_reward"
    assert args.reward.remote_url == ["agent"]
    assert capsys.readouterr().err == ""
    _, config = train_gopo.parse(command(*given[:1], "https://a/rm", "--gopo.reward", "my.py:polite"))
    assert config.reward == "my.py:polite,remote:https://a/rm"
    assert "measured and logged as the metric remote, but nobody's reward" in capsys.readouterr().err


POLITE = """
def polite(trajectory):
    return sum("please" in turn.reply for turn in trajectory.turns) / len(trajectory.turns)

def broken(trajectory):
    return trajectory.turns[0].tone
"""


def test_a_reward_of_ones_own_passes_the_dry_run(tokenizer, tmp_path, capsys) -> None:
    (tmp_path / "tone.py").write_text(POLITE)
    given = f"--gopo.reward {tmp_path}/tone.py:polite --gopo.expert_reward tse=1,polite=0.5 --gopo.dry_run"
    train_gopo.main(command(*given.split(), actor__model_name_or_path=tokenizer))
    assert "everything checked" in capsys.readouterr().out


def test_a_reward_that_fails_is_found_before_anything_starts(tokenizer, tmp_path, capsys) -> None:
    (tmp_path / "tone.py").write_text(POLITE)
    given = ["--gopo.reward", f"{tmp_path}/tone.py:broken"]
    said = refused(command(*given, actor__model_name_or_path=tokenizer), capsys)
    assert said.startswith(f"--gopo.reward {tmp_path}/tone.py:broken: AttributeError: 'Turn' object has no")


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # environment and data
        ("--gopo.env nosuch", r"--gopo\.env nosuch: no such environment; choose one of abcd, multiwoz, shop, star, or"),
        ("--gopo.env no/such.py:Env", r"--gopo\.env no/such\.py:Env: no such file: no/such\.py"),
        ("--gopo.env star", r"--gopo\.data None: the environment star needs its data; point --gopo\.data at a clone"),
        ("--gopo.env star --gopo.data no/such/folder", r"--gopo\.data no/such/folder: no such folder"),
        ("--gopo.data folder", r"--gopo\.data folder: the environment shop generates its goals"),
        ("--rollout.batch_size 16384", r"--rollout\.batch_size 16384: shop has 10240 training goals; lower it"),
        ("--data.max_samples 4", r"--rollout\.batch_size 8: shop has 4 training goals; lower it"),
        # users
        (
            "--gopo.user nosuch",
            r"--gopo\.user nosuch: no such user simulator; choose one of agenda, llm:MODEL@URL, or path",
        ),
        ("--gopo.user llm:m@nowhere", r"--gopo\.user llm:m: write llm:MODEL@URL, as in"),
        ("--gopo.user agenda=x,agenda=1", r"--gopo\.user agenda=x: in a mixture every simulator has a weight"),
        (
            "--gopo.user llm:m@http://127.0.0.1:9/v1 --gopo.llm.attempts 1",
            r"--gopo\.user llm:m@http://127\.0\.0\.1:9/v1: ConnectError .* after 1 try",
        ),
        (
            "--gopo.user llm:m@http://127.0.0.1:9/v1 --gopo.user_timeout 5",
            r"--gopo\.llm\.timeout 15\.0: give less than --gopo\.user_timeout 5\.0",
        ),
        ("--gopo.llm.temperature -1", r"--gopo\.llm\.temperature -1\.0: give 0 or more"),
        ("--gopo.llm.extra_body top_p", r"--gopo\.llm\.extra_body top_p: give a JSON object"),
        # tokenizer, labels, context
        (
            "--actor.model_name_or_path /no/such/model",
            r"--actor\.model_name_or_path /no/such/model: no tokenizer",
        ),
        ("--expert.model_name_or_path /no/such/model", r"--expert\.model_name_or_path /no/such/model: no tokenizer"),
        ("--gopo.labels refund_now,B", r"--gopo\.labels 'refund_now': it is \d+ tokens .*, not one; replace it"),
        ("--gopo.labels A,B,C", r"--gopo\.labels: A,B,C gives 3 distinct single-token labels, the catalogue needs 26"),
        ("--data.max_len 128", r"--data\.max_len 128: the expert's first turn of goal \S+ needs \d+ tokens .* raise"),
        (
            "--gopo.reply_max_tokens 1300",
            r"--data\.max_len 1280: the responder's first turn .*max_tokens 1300 incl",
        ),
        # batch arithmetic
        ("--train.batch_size 48", r"--train\.batch_size 48: does not divide the 64 dialogues of one rollout"),
        (
            "--actor.num_gpus_per_node 3",
            r"--rollout\.batch_size 8: goals do not divide over the 3 ranks of --actor",
        ),
        ("--expert.num_gpus_per_node 3", r"--rollout\.batch_size 8: .* over the 3 ranks of --expert\.\*"),
        (
            "--algo.advantage.estimator gae --critic.num_gpus_per_node 3",
            r"--rollout\.batch_size 8: .* over the 3 ranks of --critic\.\*",
        ),
        ("--rollout.micro_batch_size 0", r"--rollout\.micro_batch_size 0: give 1 or more"),
        ("--train.batch_size -8", r"--train\.batch_size -8: give 1 or more"),
        ("--train.num_episodes 0", r"--train\.num_episodes 0: give 1 or more"),
        ("--ds.tensor_parallel_size 0", r"--ds\.tensor_parallel_size 0: give 1 or more"),
        ("--eval.n_samples_per_prompt 0", r"--eval\.n_samples_per_prompt 0: give 1 or more"),
        ("--eval.steps 0", r"--eval\.steps 0: give 1 or more, or -1 for never"),
        ("--ckpt.save_steps 0", r"--ckpt\.save_steps 0: give 1 or more, or -1 for never"),
        ("--rollout.micro_batch_size 7", r"--rollout\.micro_batch_size 7: does not divide the 64 dialogues of a rank"),
        ("--train.micro_batch_size 7", r"--train\.micro_batch_size 7: does not divide the 64 dialogues of a rank"),
        (
            "--expert.num_gpus_per_node 2 --train.micro_batch_size 32",
            r"--train\.batch_size 32: is not a multiple of --train\.micro_batch_size 32 x 2 ranks of --expert\.\*",
        ),
        ("--ds.tensor_parallel_size 2", r"--actor\.num_gpus_per_node 1: fewer than --ds\.tensor_parallel_size 2"),
        ("--rollout.n_samples_per_prompt 1", r"OpenRLHF refuses these flags: group_norm requires n_samples"),
        (
            "--rollout.n_samples_per_prompt 1 --algo.advantage.estimator gae",
            r"--rollout\.n_samples_per_prompt 1: preferences compare trajectories of one goal; give 2 or more",
        ),
        # the objective
        ("--gopo.expert_credit q=0,group=0", r"--gopo\.expert_credit q=0,group=0: no term is left to learn from"),
        (
            "--gopo.expert_credit fame=1",
            r"--gopo\.expert_credit fame=1: give term=weight,\.\.\., each term once, of preference, "
            r"decision_preference, q, group, critic; a weight is 0 or more",
        ),
        ("--gopo.expert_credit q=1,q=2", r"--gopo\.expert_credit q=1,q=2: give term=weight"),
        ("--gopo.expert_credit group=-1", r"--gopo\.expert_credit group=-1: give term=weight"),
        ("--gopo.expert_credit group=nan", r"--gopo\.expert_credit group=nan: give term=weight"),
        ("--gopo.expert_credit group", r"--gopo\.expert_credit group: give term=weight"),
        ("--gopo.schedule_steps 0", r"--gopo\.schedule_steps 0: give 1 or more"),
        (
            "--gopo.expert_credit critic=1 --gopo.sharing shared",
            r"--gopo\.expert_credit critic=1: a model that both roles share has no critic on decisions; use group or q",
        ),
        (
            "--gopo.credit turn --reward.overlong_buffer_len 8",
            r"--reward\.overlong_buffer_len 8\.0: shapes the reward of a trajectory, --gopo\.credit turn has one",
        ),
        # the expert's own steps
        (
            "--gopo.expert_steps 5",
            r"--gopo\.expert_steps 5: --gopo\.expert_passes 1 over the 64 dialogues of a rollout cannot be cut into as "
            r"many equal steps of whole micro-batches \(1 dialogues over all ranks\); "
            r"use one of \[1, 2, 4, 8, 16, 32, 64\]",
        ),
        (  # 5 steps would be whole micro-batches, but not of one pass each
            "--rollout.batch_size 5 --rollout.n_samples_per_prompt 4 --train.batch_size 20 --gopo.expert_steps 5 "
            "--gopo.expert_passes 2",
            r"--gopo\.expert_steps 5: --gopo\.expert_passes 2 over the 20 .* use one of \[2, 4, 8, 10, 20, 40\]",
        ),
        (
            "--gopo.expert_steps 16 --expert.num_gpus_per_node 2 --train.micro_batch_size 4",
            r"--gopo\.expert_steps 16: .* \(8 dialogues over all ranks\); use one of \[1, 2, 4, 8\]",
        ),
        ("--gopo.expert_steps 0", r"--gopo\.expert_steps 0: give 1 or more"),
        ("--gopo.expert_passes 2", r"--gopo\.expert_passes 2: give --gopo\.expert_steps too"),
        (
            "--gopo.expert_steps 4 --gopo.sharing shared",
            r"--gopo\.expert_steps 4: with --gopo\.sharing shared one model",
        ),
        # the roles
        # a single-level policy has no expert, so what is set for one is a mistake
        ("--gopo.policy single_level --gopo.sharing shared", r"--gopo\.sharing shared: .* has no expert; drop it"),
        ("--gopo.policy single_level --gopo.schedule alternate", r"--gopo\.schedule alternate: .* has no expert"),
        ("--gopo.policy single_level --gopo.expert_reward esndcg=1", r"--gopo\.expert_reward esndcg=1: .* no expert"),
        ("--gopo.policy single_level --gopo.pref.beta 2", r"--gopo\.pref\.beta 2\.0: .* has no expert; drop it"),
        ("--gopo.policy single_level --expert.adam.lr 1e-3", r"--expert\.adam\.lr 0\.001: .* has no expert; drop it"),
        (
            "--gopo.sharing shared --expert.adam.lr 1e-3",
            r"--expert\.adam\.lr 0\.001: contradicts --gopo\.sharing shared, .*\(--actor\.adam\.lr 1e-06\); drop it",
        ),
        # placement
        (
            "--train.colocate_all --actor.num_gpus_per_node 2",
            r"--actor\.num_gpus_per_node 2: colocation needs as many ranks as --ref\.\* has \(1\), got 2",
        ),
        (
            "--train.colocate_actor_ref --expert.num_gpus_per_node 2",
            r"--expert\.num_gpus_per_node 2: colocation needs as many ranks as --ref\.\* has \(1\), got 2",
        ),
        (
            "--train.colocate_all --vllm.num_engines 2",
            r"--train\.colocate_all: actor has 1 ranks and 2 engines of 1; they must cover the same GPUs",
        ),
        (
            "--train.colocate_all --gopo.expert_num_engines 2",
            r"--train\.colocate_all: expert has 1 ranks and 2 engines of 1",
        ),
        (
            "--train.colocate_all --algo.kl.init_coef 0 --expert.num_gpus_per_node 2 --gopo.expert_num_engines 2",
            r"--expert\.num_gpus_per_node 2: with --train\.colocate_all every group stands on the 1 GPUs of --actor",
        ),
        (
            "--train.colocate_all --algo.advantage.estimator gae --critic.num_gpus_per_node 2",
            r"--critic\.num_gpus_per_node 2: with --train\.colocate_all every group stands on the 1 GPUs of --actor",
        ),
        ("--train.colocate_all", r"--vllm\.gpu_memory_utilization 0\.95: .* two engines .* ask for 1\.90 of it; lower"),
        (
            "--train.colocate_all --vllm.gpu_memory_utilization 0.3 --gopo.expert_gpu_memory_utilization 0.8",
            r"--vllm\.gpu_memory_utilization 0\.3 and --gopo\.expert_gpu_memory_utilization 0\.8: .* them below 1",
        ),
        ("--vllm.gpu_memory_utilization 0", r"--vllm\.gpu_memory_utilization 0\.0: give a share of the GPU's memory"),
        (
            "--gopo.expert_gpu_memory_utilization 1.5",
            r"--gopo\.expert_gpu_memory_utilization 1\.5: give a share of the GPU's memory, in \(0, 1\]",
        ),
        ("--vllm.num_engines 0", r"--vllm\.num_engines 0: dialogues need vLLM; give 1 or more"),
        ("--vllm.num_engines -1", r"--vllm\.num_engines -1: dialogues need vLLM; give 1 or more"),
        # determinism
        (
            "--train.full_determinism_enable --vllm.enable_prefix_caching",
            r"--vllm\.enable_prefix_caching: with --train\.full_determinism_enable the rounding of a prompt",
        ),
        (
            "--train.full_determinism_enable --gopo.expert_num_engines 2",
            r"--gopo\.expert_num_engines 2: with --train\.full_determinism_enable every engine of the responder needs",
        ),
        # values
        (
            "--gopo.expert_reward tse=1,fame=2",
            r"--gopo\.expert_reward: reward weights 'tse=1,fame=2': unknown reward 'fame'; choose from tse",
        ),
        ("--gopo.reward fame", r"--gopo\.reward fame: no such reward; choose one of judge:MODEL@URL, remote:URL, or "),
        ("--gopo.reward no.py:f", r"--gopo\.reward no\.py:f: no such file"),
        ("--gopo.reward judge:m", r"--gopo\.reward judge:m: write judge:MODEL@URL"),
        ("--gopo.reward judge:m@http://u:pw@h/v1", r"--gopo\.reward judge:m@URL: the URL has a user"),
        ("--gopo.reward remote:h:1", r"--gopo\.reward remote:h:1: not a URL"),
        ("--gopo.reward_timeout 0", r"--gopo\.reward_timeout 0\.0: give a positive number of seconds"),
        ("--gopo.expert_reward judge=1", r"--gopo\.expert_reward: .*unknown reward 'judge'; choose from tse"),
        (
            "--gopo.reward judge:m@http://h/v1 --gopo.reward_timeout 20",
            r"--gopo\.judge\.timeout 25\.0: give less than --gopo\.reward_timeout 20",
        ),
        (
            "--gopo.reward judge:m@http://h/v1 --gopo.judge.rubric no.txt",
            r"--gopo\.judge\.rubric no\.txt: cannot be read as UTF-8 text",
        ),
        (
            "--gopo.responder_reward gre",
            r"--gopo\.responder_reward: reward weights 'gre': gre needs a finite number, as in gre=0\.5",
        ),
        ("--gopo.pref.beta 2", r"--gopo\.pref\.beta 2\.0: changes nothing with --gopo\.pref\.reference sampler"),
        ("--gopo.pref.beta 0", r"--gopo\.pref\.beta 0\.0: give a positive number"),
        ("--gopo.attempts 0", r"--gopo\.attempts 0: give 1 or more"),
        (
            "--gopo.pref.weights some",
            r"argument --gopo\.pref\.weights: invalid choice: 'some' .* --help lists the",
        ),
        ("--gopo.evn shop", r"unrecognized arguments: --gopo\.evn shop; --help lists the flags"),
        (
            "--gopo.pref.reference initial --algo.kl.init_coef 0",
            r"--gopo\.pref\.reference initial: there is no reference model with --algo\.kl\.init_coef 0",
        ),
        # not supported, here or on CPU
        ("--train.async_enable", r"--train\.async_enable: dialogues are older than the weights"),
        (
            "--ds.lora.rank 8 --train.enable_ema",
            r"--train\.enable_ema: not supported with --ds\.lora\.rank 8: OpenRLHF 0\.11\.2 averages into .*; drop one",
        ),
        (
            "--ds.lora.rank 8 --ds.tensor_parallel_size 2",
            r"--ds\.tensor_parallel_size: not supported with --ds\.lora\.rank 8: PEFT's layers are not split",
        ),
        (
            "--ds.lora.rank 8 --ds.lora.target_modules all-linear",
            r"--ds\.lora\.target_modules all-linear: leave the flag out for all linear layers, or name modules",
        ),
        ("--gopo.reply_group 17", r"--gopo\.reply_group 17: give 2 to 16, or 1 to turn it off"),
        (
            "--gopo.reply_group 4 --gopo.responder_reward tse=1",
            r"--gopo\.reply_group 4: --gopo\.responder_reward tse=1 has nothing that scores one reply; add gre",
        ),
        (
            "--gopo.reply_group 4 --gopo.responder_reward gre=1 --gopo.policy single_level",
            r"--gopo\.reply_group 4: with --gopo\.responder_reward gre=1 the decisions of single_level earn nothing",
        ),
        (
            "--gopo.reply_group 4 --gopo.responder_reward gre=1 --algo.advantage.estimator gae",
            r"--gopo\.reply_group 4: with --gopo\.responder_reward gre=1 a critic has nothing to value; add tse",
        ),
        ("--algo.kl.target 6", r"--algo\.kl\.target 6\.0: an adaptive KL coefficient is not supported; drop it"),
        ("--ds.packing_samples", r"--ds\.packing_samples True: on CPU this needs flash-attn and so CUDA; remove it"),
        (
            "--train.colocate_all --vllm.enable_sleep",
            r"--vllm\.enable_sleep True: on CPU this needs vLLM's sleep mode, which is CUDA's alone; remove it",
        ),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, tokenizer, capsys) -> None:
    changes = {"actor__model_name_or_path": tokenizer}
    said = refused(command("--gopo.dry_run", *shlex.split(flags), **changes), capsys)
    assert re.match(message, said), said


def test_a_critic_does_not_learn_from_a_part_of_its_batch(tokenizer, monkeypatch) -> None:
    """Upstream packs dynamic batches, so this is a matter of GPUs."""
    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "0")
    flags = ["--train.dynamic_batch_enable", "--algo.advantage.estimator", "gae", "--vllm.num_engines", "1"]
    args, config = train_gopo.parse(command(*flags, actor__model_name_or_path=tokenizer))
    with pytest.raises(ConfigError, match=r"--ds\.zero_stage 2: with --train\.dynamic_batch_enable upstream's critic"):
        checks.check_flags(args, config)


def test_no_environment(tokenizer, capsys) -> None:
    said = refused(command(gopo__env=None, actor__model_name_or_path=tokenizer), capsys)
    assert said.startswith("--gopo.env None: name an environment: shop, star, abcd, multiwoz, or path/to/file.py")


def test_no_model(capsys) -> None:
    assert refused(command(), capsys).startswith("--actor.model_name_or_path: missing; name a Hugging Face model")


def test_an_adapter_is_no_model(tokenizer, tmp_path, capsys) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    flags = {"actor__model_name_or_path": tokenizer, "expert__model_name_or_path": tmp_path}
    said = refused(command(**flags), capsys)
    assert said.startswith(f"--expert.model_name_or_path {tmp_path}: is a LoRA adapter, not a model; merge it first: ")


@pytest.mark.parametrize("given", ["", "--ds.lora.alpha 32 --ds.lora.dropout 0.1 --ds.lora.target_modules q_proj"])
@pytest.mark.parametrize("sharing", ["separate", "shared"])
def test_lora_is_there_for_both_roles(given, sharing, tokenizer, capsys) -> None:
    lora = ["--ds.lora.rank", 8, *given.split(), "--gopo.sharing", sharing]
    train_gopo.main(command("--gopo.dry_run", *lora, actor__model_name_or_path=tokenizer))
    assert "everything checked" in capsys.readouterr().out


def test_no_chat_template(tokenizer, tmp_path, capsys) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tokenizer)
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    said = refused(command(actor__model_name_or_path=tmp_path), capsys)
    assert said.startswith(f"{tmp_path}: the tokenizer has no chat template; use a chat model, or set chat_template")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("Missing", r"defines no Missing"), ("Thing", r"is not a subclass of openrlhf_gopo\.envs\.Environment")],
)
def test_a_file_without_the_environment(attribute, message, tokenizer, tmp_path, capsys) -> None:
    file = tmp_path / "mine.py"
    file.write_text("Thing = 3\n")
    said = refused(command(gopo__env=f"{file}:{attribute}", actor__model_name_or_path=tokenizer), capsys)
    assert said.startswith(f"--gopo.env {file}:{attribute}: ")
    assert re.search(message, said)


def test_a_bad_switch(monkeypatch, capsys) -> None:
    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "yes")
    assert refused(command(), capsys).startswith("OPENRLHF_GOPO_CPU=yes: use 1 (run on CPU) or 0 (never)")
