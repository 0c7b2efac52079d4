"""`minigpt import`: convert a nanoGPT checkpoint to a GPT-2 model folder."""

from pathlib import Path

from .parser import Parser, quiet, raising_on_sigterm


def parser() -> Parser:
    """The arguments of the command."""
    parser = Parser("import")
    parser.add_argument("checkpoint", type=Path, help="ckpt.pt written by nanoGPT's train.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")
    parser.add_argument("--meta", type=Path, help="meta.pkl of nanoGPT's data folder, for a character-level model")
    parser.add_argument("--tokenizer", help="folder or Hub id of GPT-2's tokenizer, for a model that uses it")
    return parser


def run(argv: list[str]) -> None:
    """Convert the checkpoint and compare its logits with nanoGPT's."""
    args = parser().parse_args(argv)

    from ..atomic import check_new_folder
    from ..integrations.nanogpt import import_checkpoint, vocabulary_for

    quiet()
    check_new_folder(args.output_dir)
    with raising_on_sigterm():
        vocabulary = vocabulary_for(args.checkpoint, args.meta, args.tokenizer)
        difference = import_checkpoint(args.checkpoint, args.output_dir, vocabulary)
    print(f"the model is in {args.output_dir}; its logits differ from nanoGPT's by at most {difference:.1e}")
