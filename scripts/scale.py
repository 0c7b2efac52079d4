"""Compute the plan of a training run on 10¹² tokens from stated inputs, as the tables of docs/scale.md.

    python scripts/scale.py                                 # all tables, in Markdown
    python scripts/scale.py compute --gpus 64 --model 124m  # one table, with other inputs
    python scripts/scale.py --help                          # the inputs, their defaults and sources

Nothing is measured here: `benchmark.py loading` and `benchmark.py checkpoint` measure, and `simulate_data.py` verifies the
data plane. `scripts/docs.py` writes the tables into the document.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache

# hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads; the first two are recipes.
SHAPES = {
    "124m": (768, 12, 12, 12),
    "350m": (1024, 24, 16, 16),
    "1b": (2048, 24, 16, 8),
    "6b": (4096, 32, 32, 8),
}


def _input(default, description: str):
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class Inputs:
    """The assumptions of a plan."""

    tokens: int = _input(10**12, "training tokens, one epoch")
    model: str = _input("6b", f"shape of the model: {', '.join(SHAPES)}")
    vocab_size: int = _input(50304, "vocabulary")
    block_size: int = _input(4096, "tokens per sequence")
    batch_tokens: int = _input(2**22, "tokens per optimizer step")
    gpus: int = _input(512, "GPUs")
    gpus_per_node: int = _input(8, "GPUs per node")
    peak_flops: float = _input(989e12, "FLOP/s of a GPU; default: H100 SXM, bfloat16, dense")
    utilisation: float = _input(0.40, "share of the peak that is reached; Llama 3: 0.38 to 0.43 (arXiv:2407.21783)")
    gpu_memory: float = _input(80e9, "bytes of memory of a GPU")
    node_link: float = _input(450e9, "bytes/s of a GPU to the others of its node, one direction; default: NVLink 4")
    network_link: float = _input(50e9, "bytes/s of a GPU to other nodes; default: 400 Gb/s")
    storage_link: float = _input(2e9, "bytes/s at which a node copies shards from storage")
    shard_tokens: int = _input(2**30, "tokens per shard")
    document_tokens: int = _input(1000, "tokens per document")
    shuffle_window: int = _input(2**21, "--shuffle_window: sequences that are permuted together")
    writer_rate: float = _input(0.2e9, "bytes/s at which one process writes, hashes and synchronizes a checkpoint")
    cache_rate: float = _input(
        0.26e9, "bytes/s at which it writes to the page cache; --async_checkpoints waits for this"
    )
    copy_rate: float = _input(20e9, "bytes/s at which a GPU copies its state to the memory of its node")
    interruptions: float = _input(
        419 / (16384 * 54), "unplanned interruptions per GPU and day; default: Llama 3, 419 on 16,384 GPUs in 54 days"
    )
    restart_seconds: float = _input(600, "seconds from an interruption to the first step after it")

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def token_bytes(self) -> int:
        """Bytes per token in the stream."""
        return 2 if self.vocab_size <= 2**16 else 4

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.tokens // self.batch_tokens

    @property
    def sequences_per_step(self) -> int:
        """Number of sequences in an optimizer step, over all GPUs."""
        return self.batch_tokens // self.block_size

    @property
    def stream_bytes(self) -> int:
        """Bytes of all tokens."""
        return self.tokens * self.token_bytes


@dataclass(frozen=True)
class Model:
    """Size and cost of a model.

    Args:
        parameters: Number of parameters.
        flops: Floating-point operations per training token, forward and backward.
    """

    parameters: int
    flops: int

    def tokens_per_second(self, inputs: Inputs) -> float:
        """Training throughput of all GPUs."""
        return inputs.gpus * inputs.peak_flops * inputs.utilisation / self.flops

    def step_seconds(self, inputs: Inputs) -> float:
        """Seconds per optimizer step."""
        return inputs.batch_tokens / self.tokens_per_second(inputs)


@lru_cache
def model_of(name: str, inputs: Inputs) -> Model:
    """Count the parameters of a shape, without allocating them, and the operations per token.

    A multiplication by a matrix takes 2 operations per weight and token in the forward pass, and twice as many in the
    backward pass. Causal attention has T/2 keys per query on average, so QKᵀ and AV take 4 · T/2 · (heads · head dimension)
    operations per layer in the forward pass. Recomputed activations are not counted.
    """
    import torch

    from minigpt_hf import MiniGPTConfig, MiniGPTForCausalLM

    hidden_size, layers, heads, key_value_heads = SHAPES[name]
    config = MiniGPTConfig(
        vocab_size=inputs.vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=inputs.block_size,
    )
    with torch.device("meta"):
        model = MiniGPTForCausalLM(config)
    # The embedding is tied: as an embedding it takes no multiplication, as the head it does.
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    attention = 2 * layers * heads * config.head_dim * inputs.block_size
    return Model(model.num_parameters(), 6 * matrices + 3 * attention)


# -- the tables -------------------------------------------------------------------------------------------------------


def inputs_table(inputs: Inputs) -> str:
    """The inputs on which the other tables are based."""
    rows = [
        [f"`--{each.name}`", shown(getattr(inputs, each.name)), each.metadata["help"].replace("|", "\\|")]
        for each in fields(inputs)
    ]
    return table(["input", "value", ""], rows)


def compute_table(inputs: Inputs) -> str:
    """Parameters, operations, GPU hours and duration, by model."""
    rows = []
    for name in SHAPES:
        model = model_of(name, inputs)
        seconds = inputs.tokens / model.tokens_per_second(inputs)
        rows.append(
            [
                name,
                f"{model.parameters:,}",
                quantity(model.flops, "FLOP"),
                f"{model.flops * inputs.tokens:.2e}",
                f"{seconds * inputs.gpus / 3600:,.0f}",
                f"{seconds / 86400:.2f}",
                f"{model.tokens_per_second(inputs) / inputs.gpus:,.0f}",
                f"{model.step_seconds(inputs):.3f}",
            ]
        )
    header = ["model", "parameters", "per token", "FLOP in total", "GPU hours", f"days on {inputs.gpus:,} GPUs"]
    header += ["tokens/s per GPU", "seconds per step"]
    return f"{inputs.steps:,} steps of {inputs.batch_tokens:,} tokens.\n\n{table(header, rows)}"


def stream_table(inputs: Inputs) -> str:
    """Bytes of the stream, and how shards reach the nodes."""
    model = model_of(inputs.model, inputs)
    shard = inputs.shard_tokens * inputs.token_bytes
    sizes = table(
        ["part of the stream", "size"],
        [
            ["`tokens.bin`", f"{quantity(inputs.stream_bytes, 'B')}, {inputs.token_bytes} bytes per token"],
            ["`documents.npy`", f"{quantity(inputs.tokens // inputs.document_tokens * 8, 'B')}, 8 bytes per document"],
            ["shards", f"{-(-inputs.tokens // inputs.shard_tokens):,} of {quantity(shard, 'B')}"],
        ],
    )
    per_node = inputs.stream_bytes / inputs.nodes
    seconds = inputs.tokens / model.tokens_per_second(inputs)
    copy, size = inputs.stream_bytes / inputs.storage_link, quantity(inputs.stream_bytes, "B")
    rate = inputs.stream_bytes / seconds
    window = inputs.shuffle_window * inputs.block_size * inputs.token_bytes
    window_seconds = inputs.shuffle_window / inputs.sequences_per_step * model.step_seconds(inputs)
    cache = (-(-window // shard) + 1) * shard
    rows = [
        ["a shared file system, read in place", "0", quantity(per_node, "B"), quantity(per_node / seconds, "B/s"), "0"],
        ["a complete copy", size, size, "0", f"{copy / 3600:.2f} hours"],
        ["`--shuffle_window`, copies on demand", quantity(cache, "B"), size, quantity(rate, "B/s"), "0"],
    ]
    header = ["shards reach a node by", "its disk", "it reads", "rate in training", "before step 1"]
    share = copy / seconds
    return (
        f"{sizes}\nModel {inputs.model}, {inputs.nodes:,} nodes:\n\n{table(header, rows)}\n"
        f"A window has {quantity(window, 'B')} and lasts {window_seconds / 60:,.1f} minutes, "
        f"{inputs.shuffle_window // inputs.sequences_per_step:,} steps. Copies are made when a shard is first needed, and "
        f"training waits for them: {share:.1%} of the time at {quantity(inputs.storage_link, 'B/s')} per node.\n"
    )


def traffic_table(inputs: Inputs) -> str:
    """Bytes on the links per step and their times at the speed of the links, by strategy."""
    rows = []
    for name in SHAPES:
        model = model_of(name, inputs)
        step = model.step_seconds(inputs)
        for strategy, (in_node, between, memory) in traffic(model.parameters, inputs).items():
            seconds = in_node / inputs.node_link, between / inputs.network_link
            rows.append(
                [
                    name,
                    strategy,
                    *(
                        f"{quantity(size, 'B')}, {digits(1000 * time)} ms"
                        for size, time in zip((in_node, between), seconds, strict=True)
                    ),
                    f"{1000 * step:,.0f} ms",
                    f"{sum(seconds) / step:.0%}",
                    quantity(memory, "B") + ("" if memory < inputs.gpu_memory else ", does not fit"),
                ]
            )
    return table(["model", "strategy", "within the node", "between nodes", "step", "at most", "state per GPU"], rows)


def traffic(parameters: int, inputs: Inputs) -> dict[str, tuple[float, float, float]]:
    """Return, by strategy: bytes per step that a GPU sends within its node, and to other nodes; bytes of its state.

    Weights and gradients are in float32; FSDP gathers in bfloat16, for the forward and for the backward pass. A ring of n
    ranks sends (n - 1) / n of an array per rank in an all-gather or a reduce-scatter, and both in an all-reduce. A ring
    over all GPUs passes through those of a node before it leaves the node, and each of its GPUs connects one of as many
    rings to other nodes: its link carries a share of what it sends within the node. In HSDP, weights are sharded within
    the node, and the shards of the gradients are all-reduced between nodes.

    The state is that of AdamW: weights, gradients and two moments in float32.
    """
    n, nodes, local = inputs.gpus, inputs.nodes, min(inputs.gpus, inputs.gpus_per_node)
    gradients, gathered, state = 4 * parameters, 2 * parameters, 16 * parameters
    ring, inner, outer = (n - 1) / n, (local - 1) / local, (nodes - 1) / nodes
    between = ring / local if nodes > 1 else 0
    return {
        "DDP": (ring * 2 * gradients, between * 2 * gradients, state),
        "FSDP": (ring * (gradients + 2 * gathered), between * (gradients + 2 * gathered), state / n),
        "HSDP": (inner * (gradients + 2 * gathered), outer * 2 * gradients / local, state / local),
    }


def checkpoints_table(inputs: Inputs) -> str:
    """Size of a checkpoint, and its interval by Young (1974) and Daly (2006)."""
    model = model_of(inputs.model, inputs)
    size, step = 12 * model.parameters, model.step_seconds(inputs)
    rows, steps = [], []
    for gpus in dict.fromkeys((8, inputs.gpus, 16384)):
        mean_time = 86400 / (inputs.interruptions * gpus)
        whole, cached, nodes = size / inputs.writer_rate, size / inputs.cache_rate, -(-gpus // inputs.gpus_per_node)
        for way, cost, background in (
            ("one writer", whole, 0.0),
            ("one writer, `--async_checkpoints`", cached, whole - cached),
            ("a writer per node", whole / nodes, 0.0),
            ("a writer per node, after a copy to memory", size / inputs.copy_rate / gpus, whole / nodes),
        ):
            interval = max(daly(cost, mean_time), background)
            lost = cost / interval + (interval / 2 + inputs.restart_seconds) / mean_time
            row = [f"{gpus:,}", f"{digits(mean_time / 3600)} h", way, f"{digits(cost)} s"]
            row += [f"{digits(seconds / 60)} min" for seconds in (young(cost, mean_time), interval)]
            rows.append([*row, f"{lost:.2%}"])
            if gpus == inputs.gpus:
                steps.append(f"{max(1, round(interval / step)):,} steps ({way})")
    header = ["GPUs", "between interruptions", "save", "blocks", "Young", "Daly", "time lost"]
    return (
        f"A checkpoint of model {inputs.model} has {quantity(size, 'B')}: weights and two moments in float32, "
        f"3 · 4 · {model.parameters:,} bytes.\n\n{table(header, rows)}\n"
        f"On {inputs.gpus:,} GPUs the intervals are {'; '.join(steps)}.\n"
    )


def young(cost: float, mean_time: float) -> float:
    """Interval between checkpoints that cost `cost` seconds, with `mean_time` seconds between interruptions (Young 1974)."""
    return math.sqrt(2 * cost * mean_time)


def daly(cost: float, mean_time: float) -> float:
    """The same to higher order (Daly 2006, equation 37), without the time of the checkpoint itself."""
    if cost >= 2 * mean_time:
        return mean_time
    ratio = cost / (2 * mean_time)
    return young(cost, mean_time) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def loading_table(inputs: Inputs) -> str:
    """Rate at which sequences must be read."""
    rows = []
    for name in SHAPES:
        tokens = model_of(name, inputs).tokens_per_second(inputs)
        rows.append(
            [
                name,
                f"{tokens / inputs.block_size:,.0f}",
                f"{tokens / inputs.block_size / inputs.nodes:,.1f}",
                f"{required_rate(name, inputs):,.2f}",
                f"{tokens / inputs.gpus:,.0f}",
                quantity(tokens / inputs.nodes * inputs.token_bytes, "B/s"),
            ]
        )
    header = ["model", "sequences/s", "per node", "per GPU", "tokens/s per GPU", "read per node"]
    return table(header, rows)


def required_rate(name: str, inputs: Inputs) -> float:
    """Sequences per second that the data loader of a GPU must supply."""
    return model_of(name, inputs).tokens_per_second(inputs) / inputs.block_size / inputs.gpus


def addresses_table(inputs: Inputs) -> str:
    """The largest integers in the addresses of the data."""
    largest = {
        "position of a token in the stream": inputs.tokens,
        "position of a byte of all shards": inputs.stream_bytes,
        "position of a byte in a shard": inputs.shard_tokens * inputs.token_bytes,
        "number of a sequence in its epoch": inputs.tokens // inputs.block_size,
        "number of a document": inputs.tokens // inputs.document_tokens,
    }
    rows = [
        [name, f"{value:,}", str(value.bit_length()), "yes" if value >= 2**31 else "no", f"{2**63 / value:.0e}"]
        for name, value in largest.items()
    ]
    return table(["largest", "value", "bits", "beyond 2³¹", "2⁶³ divided by it"], rows)


TABLES: dict[str, Callable[[Inputs], str]] = {
    "inputs": inputs_table,
    "compute": compute_table,
    "stream": stream_table,
    "traffic": traffic_table,
    "checkpoints": checkpoints_table,
    "loading": loading_table,
    "addresses": addresses_table,
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    head, *body = ("| " + " | ".join(line) + " |\n" for line in (header, *rows))
    return (head + "|---" * len(header) + "|\n" + "".join(body)).replace("|  |", "| |")


def shown(value) -> str:
    """A value of an input."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else value


def digits(value: float) -> str:
    """A number with at least three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def quantity(value: float, unit: str) -> str:
    """A number with a decimal prefix: 2,000,000,000,000 B is 2.00 TB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{digits(value)} {prefix}{unit}"


def parser() -> argparse.ArgumentParser:
    """The arguments: which table, and the inputs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("table", nargs="?", choices=TABLES, help="print one table (default: all)")
    for each in fields(Inputs):
        kind = {"model": str}.get(each.name, type(each.default))
        choices = list(SHAPES) if each.name == "model" else None
        text = f"{each.metadata['help']} ({shown(each.default)})".replace("%", "%%")
        parser.add_argument(f"--{each.name}", type=kind, default=each.default, choices=choices, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables. Returns the exit code."""
    arguments = parser()
    given = vars(arguments.parse_args(argv))
    chosen = given.pop("table")
    if invalid := [name for name, value in given.items() if name != "model" and value <= 0]:
        arguments.error(f"--{invalid[0]} {given[invalid[0]]}: must be positive")
    if given["batch_tokens"] < given["block_size"]:
        arguments.error(
            f"--batch_tokens {given['batch_tokens']}: less than one sequence of --block_size {given['block_size']}"
        )
    inputs = Inputs(**given)
    for name, text_of in TABLES.items():
        if chosen in (None, name):
            print(f"## {name}\n\n{text_of(inputs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
