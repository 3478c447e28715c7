"""How much memory of a GPU a run would take: an estimate from flags and ``config.json`` alone.

Per parameter of a model in bf16 under ZeRO (arXiv 1910.02054): 2 bytes of weights, 2 of gradients, 12 of Adam's fp32
copy and moments. Per token of a micro-batch and layer, what the backward pass of a Llama-like layer keeps (counted in
transformers 5.15 with a fused attention): 20 h + 4 k + 8 i bytes for hidden size h, keys k = KV heads x head size, and
MLP size i; with gradient checkpointing 2 h, and one whole layer. Per action (a token that is trained on) 10 bytes for
each word of the vocabulary: logits in bf16 and fp32, and their gradient. An engine takes its share of the GPU, whole.

Left out: buffers of communication and of ZeRO-3's gathered layers, fragmentation, the expert's critic heads, the merged
weight that LoRA sends to vLLM, MoE models' experts that rest, and host memory, which every offload moves things to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig

GIB = 2**30
CONTEXT = GIB // 2  # of CUDA and its libraries, per process (our assumption, not measured)
WEIGHTS, GRADIENTS, ADAM = 2, 2, 12  # bytes a parameter
HEAD = 10  # bytes a logit


@dataclass(frozen=True)
class Shape:
    """A model's sizes. ``linear``: (name, inputs + outputs) of each linear layer that LoRA can adapt."""

    parameters: int
    layers: int
    hidden: int
    keys: int
    mlp: int
    vocabulary: int
    linear: tuple[tuple[str, int], ...] = ()

    @classmethod
    def read(cls, path: str) -> Shape | None:
        """From the model's config.json, without weights; None where there is none."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            return None
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        text = config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        head = model.get_output_embeddings()
        linear = [
            (name, module.in_features + module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        ]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * size,
            mlp=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocabulary=text.vocab_size,
            linear=tuple(linear),
        )

    def adapters(self, lora: SimpleNamespace) -> int:
        """Parameters of LoRA's adapters; ``lora``: rank, and target_modules as the flag gives them."""
        targets = lora.target_modules
        names = (
            []
            if targets in (None, "all-linear", ["all-linear"])
            else [targets]
            if isinstance(targets, str)
            else targets
        )
        ends = tuple(f".{name}" for name in names)
        return lora.rank * sum(size for name, size in self.linear if not ends or f".{name}".endswith(ends))

    def activations(self, tokens: float, actions: float, checkpointing: bool) -> float:
        """Bytes that the backward pass of one micro-batch keeps."""
        layer = 20 * self.hidden + 4 * self.keys + 8 * self.mlp
        kept = 2 * self.hidden * self.layers + layer if checkpointing else layer * self.layers
        return tokens * kept + actions * HEAD * self.vocabulary


@dataclass(frozen=True)
class Part:
    """What one process holds on its GPU, in bytes. ``weights`` stay; ``states`` (gradients, optimizer) may leave while
    others work; ``learning`` is there during a micro-batch; ``engine`` is vLLM's share."""

    name: str
    weights: float = 0.0
    states: float = 0.0
    learning: float = 0.0
    engine: float = 0.0
    note: str = ""


@dataclass
class Gpu:
    """The processes of one GPU. ``states_leave``: --ds.enable_sleep, which does nothing with --ds.adam_offload
    (deepspeed_utils.py:156 of OpenRLHF 0.11.2). ``engines_leave``: --vllm.enable_sleep."""

    name: str
    parts: list[Part] = field(default_factory=list)
    states_leave: bool = False
    engines_leave: bool = False

    @property
    def peak(self) -> float:
        """Bytes at the worse of the two: the roles learn, one after the other if they share the GPU, or they play."""
        always = sum(CONTEXT + part.weights for part in self.parts)
        states, engines = sum(part.states for part in self.parts), sum(part.engine for part in self.parts)
        awake = 0.0 if self.states_leave else states
        learn = max(part.learning + (part.states if self.states_leave else 0.0) for part in self.parts)
        return always + awake + max(learn + (0.0 if self.engines_leave else engines), engines)


def gpus(
    args: SimpleNamespace,
    config: GopoConfig,
    shapes: dict[str, Shape],
    tokens: dict[str, float],
    share: dict[str, float],
) -> list[Gpu]:
    """One GPU of every kind that the placement makes.

    Args:
        shapes: by role; with one model for both roles that of the responder.
        tokens: by role, of one training micro-batch.
        share: by role, actions / tokens of a stream.
    """
    roles = config.roles if config.own_expert else (RESPONDER,)
    memory = (config.gpu_memory_gb or 0.0) * GIB
    asleep = args.ds.enable_sleep and not args.ds.adam_offload
    together = Gpu("every GPU of --actor.*", [], asleep, args.vllm.enable_sleep)
    apart: list[Gpu] = []
    for role in roles:
        where = args.expert if role == EXPERT else args.actor
        trainer = _trainer(args, where, shapes[role], role, tokens[role], share[role])
        part_of_gpu = _engine_share(args, config, role)
        engine = Part(f"{role}'s engine", engine=part_of_gpu * memory, note=f"{part_of_gpu:.0%} of the GPU")
        reference = list(_reference(args, where, shapes[role], role))
        critic = list(_critic(args, config, shapes, role, tokens[role]))
        if args.train.colocate_all:
            together.parts += [trainer, *reference, *critic]
            if args.train.async_enable:  # engines play while the roles learn, on GPUs of their own
                apart.append(Gpu(engine.name, [engine]))
            else:
                together.parts.append(engine)
            continue
        stay = args.train.colocate_actor_ref
        apart.append(
            Gpu(role + (" with its reference" if stay and reference else ""), [trainer, *(reference if stay else [])])
        )
        apart += [Gpu(part.name, [part]) for part in (*([] if stay else reference), *critic, engine)]
    return ([together] if together.parts else []) + apart


def _trainer(
    args: SimpleNamespace, where: SimpleNamespace, shape: Shape, role: str, tokens: float, share: float
) -> Part:
    copies = where.num_nodes * where.num_gpus_per_node // args.ds.tensor_parallel_size
    split, stage, tp = max(copies, 1), args.ds.zero_stage, args.ds.tensor_parallel_size
    learns = shape.adapters(args.ds.lora) if args.ds.lora.rank > 0 else shape.parameters
    held = shape.parameters + (learns if args.ds.lora.rank > 0 else 0)
    weights = WEIGHTS * held / tp / (split if stage == 3 else 1)
    states = GRADIENTS * learns / tp / (split if stage >= 2 else 1)
    states += 0.0 if args.ds.adam_offload else ADAM * learns / tp / (split if stage >= 1 else 1)
    working = shape.activations(tokens, share * tokens, where.gradient_checkpointing_enable) / tp
    rank = args.ds.lora.rank
    note = f"{shape.parameters / 1e6:,.1f} M parameters, ZeRO {stage} over {copies} rank(s)"
    if rank > 0:
        note += f", LoRA {rank}: {learns / 1e6:,.1f} M learn"
    return Part(role, weights, states, working, note=note)


def _reference(args: SimpleNamespace, where: SimpleNamespace, shape: Shape, role: str) -> Iterator[Part]:
    if args.algo.kl.init_coef <= 0:
        return
    ranks = args.ref.num_nodes * args.ref.num_gpus_per_node // args.ds.tensor_parallel_size
    split = max(ranks, 1) if args.ds.zero_stage == 3 else 1
    weights = 0.0 if args.ref.offload else WEIGHTS * shape.parameters / args.ds.tensor_parallel_size / split
    yield Part(f"{role}'s reference", weights, note="offloaded" if args.ref.offload else "")


def _critic(
    args: SimpleNamespace, config: GopoConfig, shapes: dict[str, Shape], role: str, tokens: float
) -> Iterator[Part]:
    has = config.expert_has_critic if role == EXPERT else bool(args.critic.model_name_or_path)
    if has:
        where = SimpleNamespace(**{**vars(args.critic), "gradient_checkpointing_enable": _checkpoints(args, role)})
        yield _trainer(args, where, shapes[role], f"{role}'s critic", tokens, 0.0)


def _checkpoints(args: SimpleNamespace, role: str) -> bool:
    return (args.expert if role == EXPERT else args.actor).gradient_checkpointing_enable


def _engine_share(args: SimpleNamespace, config: GopoConfig, role: str) -> float:
    own = config.expert_gpu_memory_utilization if role == EXPERT else None
    return own or args.vllm.gpu_memory_utilization


def engines_too_small(args: SimpleNamespace, config: GopoConfig, shapes: dict[str, Shape]) -> Iterator[str]:
    """Engines whose share does not hold their weights and the keys and values of one dialogue of --data.max_len."""
    for role in config.roles if config.own_expert else (RESPONDER,):
        shape, tp = shapes[role], args.vllm.tensor_parallel_size
        needs = (WEIGHTS * shape.parameters + 4 * shape.keys * shape.layers * args.data.max_len) / tp
        given = _engine_share(args, config, role) * (config.gpu_memory_gb or 0.0) * GIB
        if needs > given:
            own = role == EXPERT and config.expert_gpu_memory_utilization
            flag = "--gopo.expert_gpu_memory_utilization" if own else "--vllm.gpu_memory_utilization"
            yield (
                f"{role}'s engine needs {needs / GIB:.1f} GiB of weights and one dialogue's keys and values, its share "
                f"is {given / GIB:.1f} GiB: raise {flag} or --vllm.tensor_parallel_size"
            )


def report(args: SimpleNamespace, config: GopoConfig, lengths: dict[str, int], share: dict[str, float]) -> list[str]:
    """The dry run's lines. ``lengths``: by role, tokens of the longest stream that may come."""
    roles = config.roles if config.own_expert else (RESPONDER,)
    paths = {role: (args.expert if role == EXPERT else args.actor).model_name_or_path for role in roles}
    read = {path: Shape.read(path) for path in dict.fromkeys(paths.values())}
    for path, shape in read.items():
        if shape is None:
            return [f"GPU memory: unknown, {path} has no config.json"]
    shapes = {role: read[path] for role, path in paths.items()}
    if not config.own_expert:  # one model may learn from the streams of both roles
        lengths, share = {RESPONDER: max(lengths.values())}, {RESPONDER: max(share.values())}
    batch = args.train.micro_batch_size
    tokens: dict[str, float] = {
        role: args.train.max_tokens_per_gpu if args.train.dynamic_batch_enable else batch * lengths[role]
        for role in roles
    }
    found = gpus(args, config, shapes, tokens, share)
    lines = ["GPU memory, estimated in GiB (docs/migration.md says how, and what is left out):"]
    for gpu in found:
        lines += [f"  {gpu.name}: {gpu.peak / GIB:.1f} at its peak" + _fit(gpu.peak, config.gpu_memory_gb)]
        lines += [f"    {_describe(part)}" for part in gpu.parts]
    if config.gpu_memory_gb is not None:
        lines += [f"  {text}" for text in engines_too_small(args, config, shapes)]
    return lines


def _fit(peak: float, memory: float | None) -> str:
    if memory is None:
        return ""
    return f", {'fits' if peak <= memory * GIB else 'DOES NOT FIT'} --gopo.gpu_memory_gb {memory:g}"


def _describe(part: Part) -> str:
    found = {"weights": part.weights, "states": part.states, "activations": part.learning, "engine": part.engine}
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.items() if size)
    return f"{part.name}: " + (sizes or "nothing") + (f" ({part.note})" if part.note else "")
