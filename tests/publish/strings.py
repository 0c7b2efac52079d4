"""Strings on which different tokenizers give different tokens, and tokenizers of every type that GGUF can represent."""

import json
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minigpt_hf.data.encoding import PATTERN
from minigpt_hf.data.tokenizer import END_OF_TEXT, PAD, byte_level_bpe, byte_tokenizer, character_tokenizer

# Strings separated by ¦, which occurs in none of them.
SCRIPTS = (
    "naïve café, Straße, Ǆ ŀ ﬁ¦nai\u0308ve cafe\u0301 (decomposed)¦Ἐν ἀρχῇ ἦν ὁ λόγος¦Съешь ещё этих мягких булок¦"
    "السلام عليكم ١٢٣¦שָׁלוֹם עוֹלָם¦नमस्ते दुनिया १२३¦สวัสดีชาวโลก¦你好，世界。三千年¦日本語のテキスト、カタカナ¦안녕하세요 세계¦"
    "ਪੰਜਾਬੀ ਅਤੇ தமிழ்¦😀 😃👍🏽 👩‍👩‍👧‍👦 🇩🇪¦𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚¦½ ⅓ ² ³ Ⅷ ① ㊿¦€100 £20 ¥3 ₿¦← → ⇒ ∀x∈ℝ: ⌈x⌉¦“quotes” ‘single’ —dash– …¦"
    "it’s, we'll, I'M, you'RE, 'tis, o'clock¦ſ 'ſ K Å ı İ ß ẞ¦a\u200bb\u200cc\u200dd\ufeffe¦\u202ertl\u202c \u00adsoft¦á̂̃̄̅ z̷͎̽¦"
    "ꙮ ⵣ ᚠᛇᚻ 𓀀 𐍈¦\ufffd \ufffc \ue000 \U000f0000¦ÀÁ ÿþ Ġ Ċ ĉ Ń"
)
CODE = (
    "def f(x):\n    return x  # note¦for (int i=0;i<10;++i) {\n\tsum += a[i];\n}¦x = {'a': 1, \"b\": [2, 3]}¦"
    "if (a&&b) || !c: pass¦SELECT * FROM t WHERE id='7';¦<div class=\"x\">&nbsp;</div>¦https://a.b/c?d=e&f=%20#g¦"
    "\\begin{eq} \\frac{1}{2} \\end{eq}¦$HOME/bin:$PATH¦a.b.c->d::e<f>¦snake_case CamelCase kebab-case __init__¦"
    '"""doc\n\nstring"""¦1e-5, 0xFF, 0b101, 1_000¦//////======//////¦lambda *a, **k: (a, k)¦\r\n@decorator\r\nclass A(B):\r\n'
)
DIGITS = (
    "0¦7¦12¦123¦1234¦12345678901234567890¦3.14159¦-42¦+1 (555) 010-9999¦2024-02-29T23:59:60Z¦1,234,567.89¦١٢٣٤٥¦१२३¦"
    "１２３¦1st 2nd 3rd¦v2.0.1¦99 bottles¦a1b2c3¦007"
)
SPECIALS = (
    f"{END_OF_TEXT}¦{PAD}¦a{END_OF_TEXT}b¦{END_OF_TEXT}{END_OF_TEXT}¦ {END_OF_TEXT} ¦\n{PAD}\n¦{PAD}{END_OF_TEXT}\n\nx¦"
    "<|endoftext¦<|endoftext >|¦<endoftext>¦<|ENDOFTEXT|>¦<|end oftext|>¦<|pad¦|pad|>¦<pad>¦</s>¦<s>¦<unk>¦[INST] x [/INST]¦"
    "<|im_start|>user¦<|im_end|>¦<|eot_id|>¦<EOT>¦_<EOT>¦[EOS]¦[PAD]¦<eos>¦<0x0A>¦[unused3]¦▁a¦<｜end▁of▁sentence｜>"
)
BLANKS = " ¦  ¦   ¦\t¦\n¦\r¦\r\n¦\n\n¦\n \n¦\u00a0¦\u2003¦\u3000¦\u0085¦\u2028¦\u2029¦\x0b¦\x0c¦\x1c¦\x1f¦\u1680¦\u180e"


def strings() -> list[str]:
    """200 strings: scripts, code, digits, special tokens and similar text, white space, and mixtures of them."""
    source = random.Random(0)
    kinds = [part.split("¦") for part in (SCRIPTS, CODE, DIGITS, SPECIALS, BLANKS)]
    found = dict.fromkeys(text for kind in kinds for text in kind)
    while len(found) < 200:
        pieces = [source.choice(source.choice(kinds)) for _ in range(source.randint(2, 6))]
        found[source.choice(["", " ", "\n", "'s", "  "]).join(pieces)] = None
    return list(found)


def adversarial_tokenizer(texts: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Merges trained across words, digits and lines, in random order, with the pre-tokenizer of Qwen2.

    The tokens change if an engine splits words differently or merges in another order. The training texts contain no
    brackets, because GGUF cannot represent an ordinary token `<eos>` or `[EOS]`.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = texts or [text for text in strings() if not {"<", "["} & set(text)]
    trained.train_from_iterator(texts * 2, trainer)

    learned = json.loads(trained.model.__getstate__())
    merges = [tuple(pair) for pair in learned["merges"]]
    random.Random(1).shuffle(merges)
    tokenizer = Tokenizer(models.BPE(vocab=learned["vocab"], merges=merges))
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True), AddedToken(PAD, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD
    )


def words_of_gpt2() -> PreTrainedTokenizerFast:
    """BPE of this package with the pre-tokenizer of GPT-2."""
    tokenizer = byte_level_bpe(strings() * 2, 600)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


# Name -> function that creates a tokenizer, for each type that GGUF can represent.
TOKENIZERS = {
    "bpe": lambda: byte_level_bpe(strings() * 2, 600),
    "bytes": byte_tokenizer,
    "gpt-2": words_of_gpt2,
    "adversarial": adversarial_tokenizer,
    "characters": lambda: character_tokenizer(strings()),
}
