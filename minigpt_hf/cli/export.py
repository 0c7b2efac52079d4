"""`minigpt export`: convert a model folder for other programs; the result is verified before it is written."""

import logging
from pathlib import Path

from ..errors import MiniGPTError
from .parser import Parser, quiet

FORMATS = ("native", "gguf", "onnx")
DTYPES = ("float32", "float16", "bfloat16", "q8_0")


def parser() -> Parser:
    """The arguments of the command."""
    parser = Parser("export")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="native: Qwen3 of transformers, with unchanged weights; gguf: llama.cpp and Ollama; onnx: onnxruntime",
    )
    parser.add_argument("--output_dir", type=Path, help="new folder (default: MODEL-FORMAT, next to the model folder)")
    parser.add_argument("--dtype", choices=DTYPES, help="data type of the matrices (default: unchanged)")
    parser.add_argument(
        "--context",
        type=int,
        help="maximum context in tokens, for programs without sliding-window attention; at most the window of the model",
    )
    return parser


def run(argv: list[str]) -> None:
    """Export the model and print where it is and how it was verified."""
    args = parser().parse_args(argv)
    folder = args.model
    out = args.output_dir or folder.resolve().with_name(f"{folder.resolve().name}-{args.to}")
    quiet()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about operators that these models do not use
    try:
        if args.to == "native":
            from ..export.native import export_native

            if args.dtype:
                raise MiniGPTError("--to native copies the weights unchanged: omit --dtype")
            export_native(folder, out, args.context)
            verified = "Qwen3ForCausalLM without custom code; identical weights, bitwise equal logits"
        elif args.to == "gguf":
            from ..export.gguf import export_gguf

            export_gguf(folder, out, args.dtype, args.context)
            (file,) = out.glob("*.gguf")
            verified = f"{file.name} and a Modelfile; transformers reads equal weights and tokens from it"
        else:
            from ..export.onnx import PROMPTS, TOLERANCE, export_onnx

            export_onnx(folder, out, args.dtype, args.context)
            verified = f"onnxruntime's logits are within {TOLERANCE}, and {PROMPTS} prompts have equal continuations"
    except ModuleNotFoundError as error:
        raise MiniGPTError(
            f"--to {args.to} needs {error.name}, which is not installed: pip install {error.name}"
        ) from error
    print(f"the export is in {out}\nverified: {verified}")
    if args.context:
        print(f"maximum context: {args.context} tokens")
