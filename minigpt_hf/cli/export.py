"""`minigpt export`: a model folder -> the same model in the words of other programs, verified before it is there."""

import logging
from pathlib import Path

from ..errors import MiniGPTError
from .parser import Parser, quiet

FORMATS = ("native", "gguf", "onnx")
DTYPES = ("float32", "float16", "bfloat16", "q8_0")


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser("export")
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="native: Qwen3 of transformers, the weights untouched; gguf: llama.cpp and Ollama; onnx: onnxruntime",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="a folder that is not there yet (default: MODEL-FORMAT, beside it)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the matrices (default: what they are in; nothing is cast unasked)"
    )
    parser.add_argument(
        "--context",
        type=int,
        help="the longest text in tokens, for programs that know no sliding windows; at most the model's window",
    )
    return parser


def run(argv: list[str]) -> None:
    """Write the export, or say why it cannot be, and where it is."""
    args = parser().parse_args(argv)
    folder = args.model
    out = args.output_dir or folder.resolve().with_name(f"{folder.resolve().name}-{args.to}")
    quiet()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of operators that no model here has
    try:
        if args.to == "native":
            from ..export.native import export_native

            if args.dtype:
                raise MiniGPTError("--to native keeps the weights as they are, byte by byte: leave --dtype out")
            export_native(folder, out, args.context)
            said = "Qwen3ForCausalLM with no code of ours; the same weights, and the same logits bit for bit"
        elif args.to == "gguf":
            from ..export.gguf import export_gguf

            export_gguf(folder, out, args.dtype, args.context)
            (file,) = out.glob("*.gguf")
            said = f"{file.name} and a Modelfile; transformers reads the model's weights and tokens from it"
        else:
            from ..export.onnx import PROMPTS, TOLERANCE, export_onnx

            export_onnx(folder, out, args.dtype, args.context)
            said = f"onnxruntime's logits are within {TOLERANCE}, and {PROMPTS} prompts go on by the same tokens"
    except ModuleNotFoundError as error:
        raise MiniGPTError(
            f"--to {args.to} needs {error.name}, which is not installed: pip install {error.name}"
        ) from error
    print(f"the export is in {out}\nverified: {said}")
    if args.context:
        print(f"it is for texts of at most {args.context} tokens")
