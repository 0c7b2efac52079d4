"""`minigpt import`: nanoGPT's checkpoint -> a GPT-2 folder that every verb here and all of transformers load."""

from pathlib import Path

from .parser import Parser, quiet


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser("import")
    parser.add_argument("checkpoint", type=Path, help="the ckpt.pt that nanoGPT's train.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write; it must not exist")
    parser.add_argument("--meta", type=Path, help="for a model of characters: the meta.pkl of nanoGPT's data folder")
    parser.add_argument("--tokenizer", help="for a model of GPT-2's tokens: a folder or Hub id that holds them")
    return parser


def run(argv: list[str]) -> None:
    """Convert, check, and say where it is."""
    args = parser().parse_args(argv)

    from ..integrations.nanogpt import import_checkpoint, vocabulary_for

    quiet()
    vocabulary = vocabulary_for(args.checkpoint, args.meta, args.tokenizer)
    difference = import_checkpoint(args.checkpoint, args.output_dir, vocabulary)
    print(f"the model is in {args.output_dir}; its logits differ from nanoGPT's by at most {difference:.1e}")
