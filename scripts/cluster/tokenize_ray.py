"""Tokenize a text on a Ray cluster, one task per shard, and merge the shards.

    pip install ray
    python scripts/cluster/tokenize_ray.py --data DATA --tokenizer FOLDER --output_dir OUTPUT_DIR --shards 128 [FLAGS]

Every node needs this package, and access to the data, the tokenizer and the output folder under the same paths. Further flags
are those of `minigpt tokenize`. A task that fails is repeated; complete shards are not written again.
"""

import argparse
import subprocess
import sys


def main() -> int:
    """Run all tasks, then merge. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--shards", type=int, required=True, help="number of shards")
    parser.add_argument("--cpus", type=int, default=4, help="cores per task (default: 4)")
    parser.add_argument("--address", help="address of the Ray cluster (default: that of RAY_ADDRESS, or a local one)")
    parser.add_argument("--num_cpus", type=int, help="cores of a local cluster (default: all)")
    args, flags = parser.parse_known_args()
    try:
        import ray
    except ImportError:
        print("tokenize_ray.py requires Ray: pip install ray", file=sys.stderr)
        return 2

    @ray.remote(num_cpus=args.cpus, max_retries=3, retry_exceptions=True)
    def tokenize(number: int) -> None:
        argv = [*flags, "--output_dir", args.output_dir, "--shard", f"{number}/{args.shards}"]
        subprocess.run(
            [sys.executable, "-m", "minigpt_cli", "tokenize", "--num_proc", str(args.cpus), *argv], check=True
        )

    ray.init(address=args.address, num_cpus=args.num_cpus, include_dashboard=False)
    ray.get([tokenize.remote(number) for number in range(args.shards)])
    ray.shutdown()
    return subprocess.run([sys.executable, "-m", "minigpt_cli", "tokenize", "--merge", args.output_dir]).returncode


if __name__ == "__main__":
    sys.exit(main())
