"""OpenRLHF's ``train_ppo_ray`` unchanged, with the flags' defaults and the Ray cluster that this machine can run."""

import argparse
import sys

from openrlhf_gopo import platform

platform.activate()


def main() -> None:
    platform.forks.start()
    from openrlhf.cli import train_ppo_ray
    from openrlhf.trainer.ray import vllm_engine

    from openrlhf_gopo.runtime.cluster import init_ray
    from openrlhf_gopo.runtime.models import substituted
    from openrlhf_gopo.runtime.restarts import rollout_actor
    from openrlhf_gopo.runtime.upstream.cli import UpstreamCli

    upstream = UpstreamCli.load()
    parser: argparse.ArgumentParser = upstream.parser
    platform.adapt_flags(parser)
    args = upstream.validate(parser.parse_args(sys.argv[1:]))
    init_ray(gpus=3, worker_logs=True)  # actor, reference, engine; its trainer reports from a worker
    # The engine holds weights as the trainer does; upstream's are always bfloat16.
    with substituted(vllm_engine, RolloutRayActor=rollout_actor(0, args.ds.param_dtype)):
        train_ppo_ray.train(args)


if __name__ == "__main__":
    main()
