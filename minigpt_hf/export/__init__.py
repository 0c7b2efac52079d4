"""Convert a model folder to the formats of other programs.

`FORMATS` is the registry. A format NAME is a module NAME.py in this package that defines

    export_NAME(folder, out, dtype, context) -> Path     writes the folder `out` atomically, after verifying its content
    VERIFIED                                             one line: what has been verified

Each module reads the model with `conversion.load_model` and rejects what its format cannot represent. Modules are imported
only when their format is requested, because some need optional packages.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ..errors import MiniGPTError


@dataclass(frozen=True)
class ExportFormat:
    """Entry of the registry.

    Args:
        help: What the format is for, in a few words.
        dtypes: Values of `dtype` that the format supports; none if weights are always stored unchanged.
    """

    help: str
    dtypes: tuple[str, ...] = ()


FORMATS = {
    "native": ExportFormat("Qwen3 of transformers, weights unchanged"),
    "gguf": ExportFormat("llama.cpp and Ollama", ("float32", "float16", "bfloat16", "q8_0")),
    "onnx": ExportFormat("onnxruntime and transformers.js", ("float32",)),
    "html": ExportFormat("a page for browsers", ("float32", "float16", "int8")),
}


def export_model(
    folder: Path, out: Path, to: str, dtype: str | None = None, context: int | None = None, **options: object
) -> str:
    """Export a model folder, and return what has been verified about the result.

    Args:
        folder: Model folder.
        out: Target folder; it must not exist.
        to: Key of `FORMATS`.
        dtype: Precision of the matrices. Default: that of the weights.
        context: Maximum context in tokens, for programs without sliding windows.
        options: Further arguments of `export_NAME`.

    Raises:
        MiniGPTError: if the format, its options or the model are not supported, a package is missing, or `out` exists.
    """
    if to not in FORMATS:
        raise MiniGPTError(f"unknown export format {to!r}: choose one of {', '.join(FORMATS)}")
    dtypes = FORMATS[to].dtypes
    if dtype is not None and dtype not in dtypes:
        remedy = f": use {', '.join(dtypes)}" if dtypes else ", which stores the weights unchanged: omit --dtype"
        raise MiniGPTError(f"--dtype {dtype} is not supported by --to {to}{remedy}")
    try:
        module = import_module(f".{to}", __name__)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MiniGPTError(f"--to {to} needs {package}, which is not installed: pip install {package}") from error
    getattr(module, f"export_{to}")(folder, out, dtype, context, **options)
    return module.VERIFIED
