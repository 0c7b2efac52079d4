"""`minigpt evaluate`: any causal LM and a text -> loss, perplexity, bits per byte."""

import json
from pathlib import Path

from .parser import Parser, quiet


def parser() -> Parser:
    """What this verb takes."""
    parser = Parser("evaluate")
    parser.add_argument("model", help="a model folder or Hub id")
    parser.add_argument("--data", required=True, help="a text file, a folder, a URL, or `stdlib`")
    parser.add_argument(
        "--split", choices=["all", "train", "validation"], default="all", help="which part of it, as training cuts it"
    )
    parser.add_argument(
        "--validation_fraction", type=float, help="how it is cut (default: as the model's training did)"
    )
    parser.add_argument("--encoding", help="of the text (default: as the model's training, or utf-8)")
    parser.add_argument(
        "--max_characters", type=int, help="score no more (default: of the validation part as many as training did)"
    )
    parser.add_argument("--block_size", type=int, help="inputs in a window (default: what the model was trained on)")
    parser.add_argument("--stride", type=int, help="tokens scored in a window (default: block_size)")
    parser.add_argument("--batch_size", type=int, default=16, help="windows at a time (default: 16)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model brings along")
    return parser


def run(argv: list[str]) -> None:
    """Score and print."""
    args = parser().parse_args(argv)

    from ..data.corpus import load_corpus
    from ..evaluation import evaluate_texts
    from ..generation import load

    quiet()
    model, tokenizer = load(args.model, args.trust_remote_code)
    recipe = _recipe_of(args.model)
    fraction = args.validation_fraction
    if fraction is None:
        fraction = recipe.get("validation_fraction", 0.1)
    encoding = args.encoding or recipe.get("encoding", "utf-8")
    corpus = load_corpus(args.data, 0.0 if args.split == "all" else fraction, encoding)
    texts = corpus.validation if args.split == "validation" else corpus.train
    if not len(texts):
        raise ValueError(f"nothing of {args.data} is held out for validation; say how much with --validation_fraction")
    most = args.max_characters
    if most is None and args.split == "validation":
        most = recipe.get("validation_characters")
    if most is not None:
        texts = texts.head(most)
    block_size = recipe.get("block_size") if args.block_size is None else args.block_size
    score = evaluate_texts(model, tokenizer, texts, block_size, args.stride, args.batch_size).to_dict()
    if args.json:
        print(json.dumps({"model": args.model, "data": args.data, "split": args.split, **score}))
        return
    print(
        f"loss            {score['loss']:.4f} nats per token\n"
        f"perplexity      {score['perplexity']:.3f}\n"
        f"bits per byte   {score['bits_per_byte']:.4f}\n"
        f"scored          {score['tokens']:,} tokens, {score['bytes']:,} bytes, {score['documents']:,} documents, "
        "end-of-text tokens left out\n"
        f"windows         {score['block_size']} inputs, {score['stride']} scored in each"
    )


def _recipe_of(folder: str) -> dict:
    """What `minigpt.json` says of how a model folder was trained; nothing, if it is not one of ours."""
    file = Path(folder) / "minigpt.json"
    return json.loads(file.read_text(encoding="utf-8"))["recipe"] if file.is_file() else {}
