"""Bad input is reported in one line that names the input, the reason and the remedy, with exit code 2; no file is changed.

`BAD` lists the cases. MODEL, RUN, RECIPE and LETTERS are replaced by paths; the other files are created by `things`.
"""

import gzip
import io
import os
import re
import shutil
import sys
import time

import datasets
import pytest
from transformers import LlamaConfig

from minigpt_hf.cli import main

TRAIN = ["train", "--recipe", "RECIPE", "--data", "text.txt", "--output_dir", "new"]


def train(*flags: str) -> list[str]:
    """Append flags to a valid command; the last occurrence of a flag takes precedence."""
    return [*TRAIN, *flags]


def data(name: str, *flags: str) -> list[str]:
    return train("--data", name, *flags)


# Command and message; … matches anything.
BAD: dict[str, dict[str, tuple[list[str], str]]] = {
    "texts": {
        "no such file": (data("absent.txt"), "absent.txt: no such file or folder; specify a text file"),
        "a folder without text": (data("pictures"), "pictures: no text file or table in this folder"),
        "an empty file": (data("empty.txt"), "empty.txt: contains no text"),
        "too short to train on": (
            ["train", "--data", "short.txt", "--output_dir", "new"],
            "short.txt: the training split has … tokens (4 characters), but more than 128 tokens are required",
        ),
        "shorter than a sequence": (data("short.txt", "--tokenizer", "bytes"), "a sequence with its labels needs 33"),
        "not UTF-8": (data("latin.txt"), "latin.txt: not utf-8 text: byte 0xe9 at position 3 … --encoding latin-1"),
        "UTF-16 read as UTF-8": (data("utf16.txt"), "utf16.txt: not utf-8 text: byte 0xff at position 0"),
        "an unknown encoding": (train("--encoding", "utf-9"), "encoding 'utf-9' is unknown; try utf-8"),
        "an unknown error handler": (
            train("--encoding_errors", "guess"),
            "encoding_errors is 'guess': it must be one of strict",
        ),
        "an unsupported file extension": (
            data("thesis.pdf"),
            "thesis.pdf: .pdf files are not supported; known extensions",
        ),
        "an archive": (data("texts.zip"), "texts.zip: .zip files are not supported"),
        "text and tables in one folder": (
            data("mixed"),
            "mixed: contains 1 text files and 1 tables (.jsonl, .txt) … --data_format text",
        ),
        "a pattern that matches nothing": (data("*.docx"), "*.docx: no such file or folder"),
        "invalid gzip data": (data("broken.txt.gz"), "broken.txt.gz: cannot be read: … "),
        "a truncated .gz": (data("half.txt.gz"), "half.txt.gz: cannot be read: … "),
        "a truncated .xz": (data("half.txt.xz"), "half.txt.xz: cannot be read: … "),
        "a truncated parquet file": (data("half.parquet"), "half.parquet: cannot be read: … "),
        "an invalid line of JSON": (data("broken.jsonl"), "broken.jsonl: line 2 is not JSON: … "),
        "a file as a folder": (data("text.txt/"), "text.txt/: is a file, not a folder; remove the trailing /"),
        "a text of one character": (
            data("one.txt"),
            "one.txt: no text is left to train on: it has 0 training characters",
        ),
        "a table of one character for a new BPE tokenizer": (
            data("one.csv", "--tokenizer", "bpe", "--vocab_size", "300"),
            "one.csv: no text is left to train on: it has 0 training characters",
        ),
        "a validation fraction that leaves no training text": (
            data("short.txt", "--validation_fraction", "0.99"),
            "short.txt: no text is left to train on: … 5 characters held out",
        ),
        "a max_tokens that leaves no training text": (
            data("text.txt", "--max_tokens", "1"),
            "text.txt: no text is left to train on: … max_tokens is 1;",
        ),
        "a table without text": (data("numbers.csv"), "numbers.csv: no column contains text … --data_format text"),
        "two columns of text": (
            data("two.csv"),
            "two.csv: several columns contain text; choose one with --text_column … a, b",
        ),
        "no such column": (data("two.csv", "--text_column", "c"), "--text_column c: there is no such column … a, b"),
        "a column of numbers": (
            data("numbers.jsonl", "--text_column", "n"),
            "--text_column n: contains values that are not text",
        ),
        "a row with more fields than columns": (
            data("comma.csv"),
            "comma.csv: the row that ends on line 2 has 2 fields and the header 1; quote fields",
        ),
        "an unclosed quote in csv": (data("quote.csv"), "quote.csv: line 2: unexpected end of data"),
        "an empty name": (data(""), "data is ''"),
        "a blank name in a mixture": (data(" :0.5,text.txt:0.5"), "data is ' ', which is empty"),
        "a duplicate component of a mixture": (
            data("text.txt:0.5,text.txt:0.5"),
            "text.txt occurs twice in this mixture",
        ),
        "a device": (data("/dev/zero"), "/dev/zero: is a device, not a regular file"),
        "a named pipe": (data("pipe.txt"), "pipe.txt: is a named pipe, not a regular file"),
        "a link to nothing": (data("link.txt"), "link.txt: cannot be read: … No such file"),
        "a split of a file": (
            data("text.txt", "--data_split", "train"),
            "--data_split train: only datasets have splits",
        ),
        "a codec that does not decode text": (
            train("--encoding", "rot13"),
            "encoding 'rot13' does not decode bytes to text; try utf-8",
        ),
        "unknown line ends": (train("--newline", "unix"), "argument --newline … invalid choice: 'unix'"),
        "an unknown format": (
            train("--data_format", "yaml"),
            "data_format is 'yaml': it must be one of text, json, csv",
        ),
        "a mixture without a share": (data("text.txt:0.5,two.csv"), "'two.csv' is not a valid component of a mixture"),
        "a share of 0": (data("text.txt:0,two.csv:1"), "each share of a mixture must be positive and finite"),
        "a mixture with a missing part": (data("text.txt:1,absent.txt:1"), "absent.txt: no such file or folder"),
        "a file, streamed": (data("text.txt", "--streaming", "--max_tokens", "9"), "requires a dataset of the Hub"),
        "streaming without max_tokens": (data("u/n", "--streaming"), "streaming requires max_tokens"),
        "a Hub dataset while offline": (
            data("user/name"),
            "user/name: no such file or folder, and it cannot be loaded",
        ),
        "a URL that does not answer": (
            data("http://127.0.0.1:9/a.txt"),
            "http://127.0.0.1:9/a.txt: cannot be read: … ",
        ),
        "an unsupported URL scheme": (data("ftp://host/a.txt"), "ftp://host/a.txt: no such file or folder"),
        "no such split": (data("saved", "--data_split", "test"), "saved: has no split 'test' … train"),
        "a damaged saved dataset": (data("half-saved"), "half-saved: cannot be read: … "),
        "an incomplete prepared text": (
            data("half-prepared"),
            "half-prepared: this prepared text has no settings ('settings'): create it again with",
        ),
        "a prepared text of an earlier format": (
            data("old-prepared"),
            "old-prepared: this prepared text has format 1, and 3 is required: create it again with",
        ),
        "an empty standard input": (data("-"), "-: contains no text"),
        "a file name that is too long": (data("x" * 300), "File name too long"),
        "a name with a null character": (data("a\0b"), "no such file or folder"),
        "a validation share of 2": (
            train("--validation_fraction", "2"),
            "validation_fraction is 2.0: it must be in [0, 1)",
        ),
        "no validation characters": (train("--validation_characters", "0"), "validation_characters is 0"),
        "no tokens": (train("--max_tokens", "0"), "max_tokens is 0: it must be at least 1"),
        "no processes": (train("--num_proc", "0"), "num_proc is 0: it must be at least 1"),
    },
    "recipes": {
        "unknown recipe": (train("--recipe", "shakespear-char"), "unknown recipe 'shakespear-char'; did you mean"),
        "no such recipe file": (train("--recipe", "absent.yaml"), "recipe absent.yaml: no such file"),
        "unknown recipe key": (
            train("--recipe", "typo.yaml"),
            "unknown setting 'hiden_size'; did you mean hidden_size",
        ),
        "invalid YAML": (train("--recipe", "broken.yaml"), "recipe broken.yaml: invalid YAML"),
        "a recipe that is a list": (
            train("--recipe", "list.yaml"),
            "recipe list.yaml: expected lines of `key: value`, found a list",
        ),
        "an empty recipe": (train("--recipe", "empty.yaml"), "recipe empty.yaml: is empty: expected lines of"),
        "a binary recipe": (train("--recipe", "binary.yaml"), "recipe binary.yaml: invalid YAML"),
        "a word for a number": (train("--recipe", "word.yaml"), "invalid int value: 'many'"),
        "a list for a number": (train("--recipe", "list-value.yaml"), "hidden_size … [1, 2]"),
        "no name of a recipe": (["recipes", "show"], "recipes show: name a recipe: "),
        "no such recipe to show": (["recipes", "show", "dmeo"], "unknown recipe 'dmeo'; did you mean demo"),
    },
    "settings": {
        "unknown flag": (train("--hiden_size", "8"), "unknown argument --hiden_size; did you mean hidden_size"),
        "checkpoints without optimizer state": (
            train("--save_only_model", "true"),
            "save_only_model is not supported: such checkpoints cannot be resumed from … --save_total_limit",
        ),
        "checkpoints of the best scores without evaluations": (
            train("--save_strategy", "best", "--validation_fraction", "0"),
            "save_strategy best: checkpoints are saved after evaluations, and there are none with … validation_fraction 0",
        ),
        "a mode of compilation": (
            train("--torch_compile_mode", "fast"),
            "torch_compile_mode is 'fast': expected … reduce-overhead",
        ),
        "another handler of SIGTERM": (
            train("--enable_jit_checkpoint"),
            "enable_jit_checkpoint is not supported: a checkpoint is saved on SIGTERM in any case; omit it",
        ),
        "a value of the wrong type": (train("--max_steps", "many"), "argument --max_steps … invalid int value: 'many'"),
        "a flag without its value": (train("--max_steps"), "argument --max_steps … expected one argument"),
        "a width that is not a multiple of the heads": (
            train("--hidden_size", "30", "--num_attention_heads", "4"),
            "`hidden_size` 30 does not divide into 4 heads",
        ),
        "heads of the recipe that do not divide the width, before the text": (
            data("absent.txt", "--hidden_size", "30"),
            "`hidden_size` 30 does not divide into 4 heads",
        ),
        "a width without fitting heads, before the text": (
            [
                "train",
                "--data",
                "absent.txt",
                "--hidden_size",
                "90",
                "--num_key_value_heads",
                "7",
                "--output_dir",
                "new",
            ],
            "hidden_size 90 does not divide into a number of heads that is a multiple of num_key_value_heads 7",
        ),
        "zero heads": (train("--num_attention_heads", "0"), "`num_attention_heads` is 0"),
        "negative layers": (train("--num_hidden_layers", "-1"), "`num_hidden_layers` is -1"),
        "a model larger than memory": (train("--hidden_size", "1000000"), "parameters, which need about"),
        "too many layers": (train("--num_hidden_layers", "300000"), "parameters, which need about"),
        "a dropout of 7": (
            train("--attention_dropout", "7"),
            "`attention_dropout` is 7.0: a dropout probability must be in [0, 1)",
        ),
        "no steps": (train("--max_steps", "0"), "max_steps is 0: give a number of steps"),
        "no batch": (train("--per_device_train_batch_size", "0"), "per_device_train_batch_size is 0"),
        "no accumulation": (
            train("--gradient_accumulation_steps", "0"),
            "gradient_accumulation_steps is 0: it must be",
        ),
        "a negative learning rate": (train("--learning_rate", "-1"), "learning_rate is -1.0: it must be at least 0"),
        "a NaN learning rate": (
            train("--learning_rate", "nan"),
            "learning_rate is nan: it must be at least 0",
        ),
        "an infinite learning rate": (train("--muon_learning_rate", "inf"), "muon_learning_rate is inf: it must be"),
        "an unknown schedule": (train("--lr_scheduler_type", "triangle"), "triangle"),
        "an unknown optimizer": (train("--no_muon", "--optim", "sgdd"), "sgdd"),
        "an unknown metric": (
            train("--metric_for_best_model", "accuracy"),
            "metric_for_best_model accuracy: unknown metric; available: loss, perplexity, bits_per_byte",
        ),
        "greater_is_better": (
            train("--metric_for_best_model", "perplexity", "--greater_is_better", "true"),
            "greater_is_better is true: lower is better",
        ),
        "ignore_data_skip": (train("--ignore_data_skip"), "ignore_data_skip is not supported"),
        "auto_find_batch_size": (train("--auto_find_batch_size"), "auto_find_batch_size is not supported"),
        "remove_unused_columns": (train("--remove_unused_columns"), "remove_unused_columns is not supported"),
        "split of the standard library": (
            train("--data", "stdlib", "--data_split", "train"),
            "--data_split train: only datasets have splits, and stdlib is not one",
        ),
        "data_seed": (train("--data_seed", "3"), "data_seed 3 is not supported: seed determines"),
        "save_steps that are not a multiple of eval_steps": (
            train("--eval_steps", "3", "--save_steps", "4", "--load_best_model_at_end", "true"),
            "save_steps is 4 and must be a multiple of eval_steps, which is 3; use --save_steps 3",
        ),
        "an architecture setting with init_from": (
            train("--init_from", "MODEL", "--recipe", "finetune", "--no_tie_word_embeddings"),
            "tie_word_embeddings is determined by the model of init_from",
        ),
        "bytes that are not text in the encoding": (
            train("--sample_prompt", "caf\udce9"),
            "argument 'caf\\udce9': not valid text in the encoding of this system",
        ),
        "LoRA without a model": (train("--lora_rank", "2", "--no_muon"), "there is no pretrained model to start from"),
        "fine-tuning without a model": (train("--recipe", "finetune"), "there is no pretrained model to start from"),
        "an abbreviated flag": (train("--max_step", "5"), "unknown argument --max_step; did you mean max_steps"),
        "a number of 64 bits": (train("--recipe", "large.yaml"), "seed is an integer of 64 bits: at most 63 bits"),
        "optim without no_muon": (train("--optim", "sgd"), "optim sgd has no effect with Muon: add --no_muon"),
        "a language in words": (
            train("--language", "English"),
            "language 'English': expected an ISO 639 code such as en",
        ),
        "a language that YAML reads as false": (
            train("--recipe", "norwegian.yaml"),
            "write Norwegian as 'no' in quotes",
        ),
        "a license in words": (
            train("--license", "My own"),
            "license 'My own': expected a license identifier of the Hub",
        ),
        "a token on the command line": (train("--hub_token", "hf_secret"), "hub_token is not accepted: log in with"),
        "a push of pickles": (
            train("--push_to_hub", "--hub_strategy", "checkpoint"),
            "hub_strategy checkpoint would upload opt",
        ),
        "no minutes": (train("--minutes", "0"), "minutes is 0.0: it must be more than 0 and finite"),
        "minutes and steps": (
            train("--minutes", "3", "--max_steps", "9"),
            "minutes and max_steps both determine the length of training: omit one of them",
        ),
        "an infinite size": (
            ["train", "--size", "1e400", "--data", "absent.txt"],
            "size 1e400: not a number of parameters",
        ),
        "minutes and a size": (
            ["train", "--size", "1m", "--minutes", "3", "--data", "absent.txt"],
            "minutes and size both determine the model",
        ),
        "a size in words": (
            ["train", "--size", "small", "--data", "text.txt"],
            "size small: not a number of parameters",
        ),
        "fp16 without an accelerator": (train("--fp16", "true"), "fp16 requires an accelerator"),
        "a report_to integration that is not installed": (
            train("--report_to", "comet_ml"),
            "report_to comet_ml: unknown or not installed",
        ),
        "a negative block size": (train("--block_size", "-3"), "block_size is -3"),
        "too small a vocabulary": (train("--vocab_size", "5"), "vocab_size is 5: byte-level BPE needs at least 258"),
        "no such tokenizer": (train("--tokenizer", "absent"), "absent: no tokenizer can be loaded from it"),
        "a maximum length below the block size": (train("--max_position_embeddings", "8"), "less than block_size 32"),
        "optim_args without no_muon": (
            train("--optim_args", "foo=1"),
            "optim_args has no effect with Muon: add --no_muon",
        ),
        "optim_target_modules without no_muon": (
            train("--optim_target_modules", "all-linear"),
            "optim_target_modules has no effect with Muon",
        ),
        "another sampling strategy": (
            train("--train_sampling_strategy", "sequential"),
            "train_sampling_strategy sequential is not supported",
        ),
        "an unordered data loader": (
            train("--dataloader_num_workers", "2", "--dataloader_in_order", "false"),
            "dataloader_in_order false is not supported",
        ),
        "a schedule with an unknown argument": (
            train("--lr_scheduler_kwargs", '{"num_cycles": 3}'),
            "lr_scheduler_type linear with lr_scheduler_kwargs {'num_cycles': 3}: … unexpected keyword argument",
        ),
        "a schedule without a required argument": (
            train("--lr_scheduler_type", "warmup_stable_decay"),
            "lr_scheduler_type warmup_stable_decay with lr_scheduler_kwargs None: … num_decay_steps",
        ),
        "an optimizer that is not installed": (
            train("--no_muon", "--optim", "adamw_8bit"),
            "these settings cannot be used: … bitsandbytes",
        ),
        "persistent workers without workers": (
            train("--dataloader_persistent_workers"),
            "these settings cannot be used: persistent_workers",
        ),
        "kernels of Liger": (train("--use_liger_kernel"), "use_liger_kernel is not supported"),
        "batches split by accelerate": (
            train("--accelerator_config", '{"split_batches": true}'),
            "split_batches is not supported; use --per_device_train_batch_size",
        ),
        "batches dispatched by accelerate": (
            train("--accelerator_config", '{"dispatch_batches": true}'),
            "dispatch_batches is not supported: each process reads its own batches",
        ),
        "gradient accumulation of accelerate": (
            train("--accelerator_config", '{"gradient_accumulation_kwargs": {"num_steps": 4}}'),
            "gradient_accumulation_kwargs is not supported; use --gradient_accumulation_steps",
        ),
        "no epochs": (
            train("--num_train_epochs", "0", "--max_steps", "-1"),
            "num_train_epochs is 0.0: it must be more than 0",
        ),
        "label_names": (train("--label_names", "foo"), "label_names ['foo'] is not supported"),
        **{
            f"an empty {name}": (train(f"--{name}", ""), f"{name} is empty: give a")
            for name in (
                *("recipe", "output_dir", "init_from", "resume_from_checkpoint", "text_column", "data_split"),
                "cache_dir",
            )
        },
        "a new run that continues a checkpoint": (
            train("--fresh", "--resume_from_checkpoint", "x"),
            "fresh starts at step 0, and resume_from_checkpoint x continues a run: omit one",
        ),
        "a missing checkpoint": (train("--resume_from_checkpoint", "x"), "there is no run to resume in new"),
    },
    "folders": {
        "another run": (
            train("--output_dir", "taken"),
            "taken: contains a run with another architecture … use another folder, or --fresh",
        ),
        "a folder with other files": (train("--output_dir", "used"), "used: neither empty nor a run folder"),
        "a file as output_dir": (train("--output_dir", "text.txt"), "text.txt: this is a file; give a folder"),
        "an output_dir that cannot be written": (train("--output_dir", "/proc/new"), "/proc/new"),
        "a cache that is a file": (train("--cache_dir", "text.txt"), "text.txt"),
        "tokenize without output_dir": (
            ["tokenize", "--recipe", "RECIPE", "--data", "text.txt"],
            "--output_dir FOLDER",
        ),
        "tokenize into an existing folder": (
            ["tokenize", "--recipe", "RECIPE", "--data", "text.txt", "--output_dir", "used"],
            "used: already exists",
        ),
        **{
            f"{argv[0]} into {place}": (
                [*argv, "--output_dir", folder],
                f"{folder}: cannot be created … lost is a symbolic link to absent/folder, which does not exist; create",
            )
            for place, folder in (("a broken link", "lost"), ("a folder below a broken link", "lost/a/b"))
            for argv in (
                ["train", "--recipe", "RECIPE", "--data", "text.txt"],
                ["tokenize", "--recipe", "RECIPE", "--data", "text.txt"],
                ["export", "LETTERS", "--to", "native"],
                ["import", "text.txt", "--tokenizer", "LETTERS"],
            )
        },
        **{
            f"export into {folder}": (
                ["export", "LETTERS", "--to", to, "--output_dir", folder],
                f"{folder}: {relation} the model folder letters/model; choose an --output_dir outside of it",
            )
            for relation, folder, to in (
                ("is inside", "letters/model/new", "native"),
                ("is inside", "letters/model/figures/a/b", "gguf"),
                ("is", "letters/../letters/model", "onnx"),
                ("contains", "letters", "native"),
            )
        },
        "plot of a missing run": (["plot", "absent"], "absent: not a run folder"),
        "plot to an unsupported format": (["plot", "RUN", "--output", "a.docx"], "a.docx: the format must be .png"),
        "plot to a missing folder": (["plot", "RUN", "--output", "absent/a.png"], "absent/a.png"),
    },
    "models": {
        "no such model": (["generate", "absent"], "absent: no model can be loaded"),
        "a run folder instead of a model folder": (["generate", "RUN"], "this is a run folder; its model folder is"),
        "a model folder without weights": (["generate", "half-model"], "half-model: no model can be loaded"),
        "truncated weights": (["generate", "cut-model"], "cut-model: no model can be loaded"),
        "another architecture as init_from": (train("--init_from", "llama", "--recipe", "finetune"), "this is a llama"),
        "finetune without init_from": (train("--recipe", "finetune"), "give a folder or a Hub id with --init_from"),
        "a missing init_from": (
            train("--init_from", "absent", "--recipe", "finetune"),
            "absent: no model can be",
        ),
        "truncated weights as init_from": (
            train("--init_from", "cut-model", "--recipe", "finetune", "--block_size", "32"),
            "cut-model",
        ),
        "another width than the model's": (
            train("--init_from", "MODEL", "--recipe", "finetune", "--hidden_size", "8"),
            "hidden_size is determined by the model of init_from",
        ),
        "a rank below 0": (train("--init_from", "MODEL", "--recipe", "lora", "--lora_rank", "-2"), "lora_rank is -2"),
    },
    "prompts and evaluations": {
        "an unknown command": (["trian"], "unknown command 'trian'; available: train"),
        "an unknown option": (["generate", "MODEL", "--top_kk", "5"], "no option 'top_kk'; did you mean top_k"),
        "an unexpected argument": (["generate", "MODEL", "stray"], "unexpected argument 'stray'"),
        "a temperature below 0": (["generate", "MODEL", "--temperature", "-1"], "temperature"),
        "a word for max_new_tokens": (
            ["generate", "MODEL", "--max_new_tokens", "many"],
            "many: must be an integer of at least 1",
        ),
        "an option of a wrong type": (
            ["generate", "MODEL", "--top_k", "many"],
            "`top_k` has to be a strictly positive integer",
        ),
        "a word for max_cache_len": (
            ["generate", "MODEL", "--fast", "--max_cache_len", "x"],
            "--max_cache_len x: must be an integer",
        ),
        "an unknown character": (["generate", "LETTERS", "--prompt", "a→b"], "does not know: '→' (U+2192); remove it"),
        "a prompt longer than the context": (
            ["generate", "MODEL", "--prompt", "x y " * 2000],
            "tokens and the context of the model is",
        ),
        "a tokenizer with more tokens than the model": (
            ["generate", "other-tokenizer", "--prompt", "deflated"],
            "exceeds the vocabulary of the model",
        ),
        "evaluation with such a tokenizer": (
            ["evaluate", "other-tokenizer", "--data", "text.txt"],
            "exceeds the vocabulary of the model",
        ),
        "nothing to evaluate": (["evaluate", "MODEL"], "give either --data, a text to score, or --tasks"),
        "no such text": (["evaluate", "MODEL", "--data", "absent.txt"], "absent.txt: no such file or folder"),
        "a window longer than the model's": (
            ["evaluate", "MODEL", "--data", "text.txt", "--block_size", "9999"],
            "block_size is 9999: this model supports windows of 1 to",
        ),
        "no stride": (["evaluate", "MODEL", "--data", "text.txt", "--stride", "0"], "stride is 0"),
        "a batch size of 0": (["evaluate", "MODEL", "--data", "text.txt", "--batch_size", "0"], "batch_size is 0"),
        "max_characters of 0": (
            ["evaluate", "MODEL", "--data", "text.txt", "--max_characters", "0"],
            "max_characters is 0: it must be at least 1",
        ),
        "no validation split": (
            ["evaluate", "MODEL", "--data", "text.txt", "--split", "validation", "--validation_fraction", "0"],
            "text.txt has no validation split",
        ),
        "an impossible split": (
            ["evaluate", "MODEL", "--data", "text.txt", "--validation_fraction", "2"],
            "validation_fraction is 2.0: it must be in [0, 1)",
        ),
    },
}
CASES = [(group, case) for group, cases in BAD.items() for case in cases]


@pytest.fixture(scope="session")
def things(tmp_path_factory, text, run_folder, recipe_file):
    """A folder with all files of the table, created once."""
    here = tmp_path_factory.mktemp("things")

    def write(name: str, content: bytes | str) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content.encode() if isinstance(content, str) else content)

    write("pictures/picture.png", b"\x89PNG")
    write("empty.txt", "")
    write("short.txt", "short")
    write("one.txt", "1")
    write("one.csv", "text\na\n")
    write("latin.txt", "caf\xe9".encode("latin-1"))
    write("utf16.txt", b"\xff\xfe" + "text".encode("utf-16-le"))
    write("text.txt", text[:20_000])
    write("thesis.pdf", b"%PDF-1.7")
    write("texts.zip", b"PK\x03\x04")
    write("mixed/a.txt", "text")
    write("mixed/b.jsonl", '{"text": "text"}')
    write("broken.txt.gz", "not gzip")
    write("half.txt.gz", gzip.compress(text.encode())[:5000])
    write("half.txt.xz", __import__("lzma").compress(text.encode())[:5000])
    write("broken.jsonl", '{"text": "one"}\n{"text": \n')
    write("numbers.csv", "n,m\n1,2\n3,4\n")
    write("numbers.jsonl", '{"n": 1, "t": "text"}')
    write("comma.csv", "text\nhello, world\n")
    write("quote.csv", 'text\n"hello')
    os.mkfifo(here / "pipe.txt")
    (here / "link.txt").symlink_to("absent")
    (here / "lost").symlink_to("absent/folder")
    write("two.csv", "a,b\nx,y\nz,w\n")
    rows = datasets.Dataset.from_dict({"text": [text[:500], text[500:1000]]})
    rows.to_parquet(here / "half.parquet")
    write("half.parquet", (here / "half.parquet").read_bytes()[:-100])
    rows.save_to_disk(here / "saved")
    shutil.copytree(here / "saved", here / "half-saved")
    (here / "half-saved" / "data-00000-of-00001.arrow").write_bytes(b"\0" * 100)
    write("half-prepared/prepared.json", '{"version": 3, "name": "x", "cut": "y", "kind": "bpe"}')
    write("old-prepared/prepared.json", '{"name": "x", "cut": "y", "kind": "bpe"}')
    write("typo.yaml", "hiden_size: 8\n")
    write("broken.yaml", "hidden_size: [8\n")
    write("list.yaml", "- a\n- b\n")
    write("empty.yaml", "# hidden_size: 64\n")
    write("binary.yaml", b"\x00\xff\xfe\x01")
    write("norwegian.yaml", "language: [no]\n")
    write("large.yaml", "seed: 9223372036854775808\n")
    write("word.yaml", "hidden_size: many\n")
    write("list-value.yaml", "hidden_size: [1, 2]\n")
    write("taken/fingerprint.json", '{"seed": 7}')
    write("used/thesis.docx", "content")
    model = run_folder / "model"
    shutil.copytree(model, here / "half-model")
    (here / "half-model" / "model.safetensors").unlink()
    shutil.copytree(model, here / "cut-model")
    (here / "cut-model" / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1000])
    LlamaConfig().save_pretrained(here / "llama")
    short = (
        "--max_steps 1 --eval_strategy no --save_strategy no --load_best_model_at_end false --sample_tokens 0".split()
    )
    for name, flags in (("letters", ["--tokenizer", "characters"]), ("large", ["--vocab_size", "900"])):
        argv = ["train", "--recipe", str(recipe_file), "--data", str(here / "text.txt"), *flags, *short]
        assert main([*argv, "--output_dir", str(here / name)]) == 0
    shutil.copytree(model, here / "other-tokenizer")
    shutil.copy(here / "large" / "model" / "tokenizer.json", here / "other-tokenizer")
    return here


@pytest.fixture
def workshop(things, monkeypatch):
    """The shared folder; every test checks that it is unchanged."""
    monkeypatch.chdir(things)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    return things


def content(folder) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(("group", "case"), CASES, ids=[case for _, case in CASES])
def test_bad_input_is_reported_in_one_line_and_changes_nothing(group, case, workshop, run_folder, recipe_file, capfd):
    argv, message = BAD[group][case]
    places = {"MODEL": run_folder / "model", "RUN": run_folder, "RECIPE": recipe_file, "LETTERS": "letters/model"}
    before, began = content(workshop), time.perf_counter()
    code = main([str(places.get(word, word)) for word in argv])
    seconds = time.perf_counter() - began
    _, err = capfd.readouterr()
    messages = [line for line in err.splitlines() if line.startswith("minigpt")]
    assert code == 2, err
    assert len(messages) == 1, err
    assert "Traceback" not in err
    assert re.search(".*".join(map(re.escape, message.split(" … "))), messages[0]), messages[0]
    assert seconds < 10
    assert content(workshop) == before


def test_debug_shows_the_traceback(workshop):
    with pytest.raises(ValueError, match="no such file"):
        main(["train", "--data", "absent.txt", "--output_dir", "new", "--debug"])
