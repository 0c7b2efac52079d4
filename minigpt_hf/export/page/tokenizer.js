"use strict";
/* Text <-> token ids: byte-level BPE, bytes or characters, as defined by the `tokenizer.json` of the model; conversations.

Special tokens in a text, such as <|endoftext|>, are ordinary text, as during training. */

// Words of byte-level BPE, with an optional space or other character before them. `\p{White_Space}` is `\s` of `tokenizers`.
const PATTERNS = {
  qwen2: new RegExp(
    "'(?:[sSſ]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" +
      "| ?[^\\p{White_Space}\\p{L}\\p{N}]+[\\r\\n]*|\\p{White_Space}*[\\r\\n]+" +
      "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
    "gu",
  ),
  "gpt-2": new RegExp(
    "'(?:s|t|re|ve|m|ll|d)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+" +
      "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+",
    "gu",
  ),
};

// Byte-level BPE writes each byte as a printable character: its own if it has one, otherwise U+0100, U+0101, …
const BYTE_OF = new Map();
const CHARACTER_OF = [];
for (let byte = 0, substitute = 0x100; byte < 256; byte++) {
  const isPrintable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  CHARACTER_OF[byte] = String.fromCharCode(isPrintable ? byte : substitute++);
  BYTE_OF.set(CHARACTER_OF[byte], byte);
}

/* Text <-> token ids. Byte-level BPE starts from the bytes of a word and repeatedly merges the adjacent pair of lowest rank;
   without merges it is a byte tokenizer. A character tokenizer has one token per character. */
class Tokenizer {
  // kind: "bpe" or "characters"; tokens: by id, null for an unused id; merges: [left id, right id, merged id] by rank;
  // added: ids of tokens that are matched before all others; special: ids that ordinary text never contains.
  constructor({ kind, pattern, nfc, tokens, merges, added, special }) {
    Object.assign(this, { kind, pattern: PATTERNS[pattern], nfc, tokens });
    this.special = new Set(special);
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map(([left, right, id], rank) => [left * tokens.length + right, { rank, id }]));
    const matched = added.map((id) => tokens[id]).sort((a, b) => b.length - a.length); // the longest match wins
    const escaped = matched.map((token) => token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.added = matched.length ? new RegExp(`(${escaped.join("|")})`, "u") : null;
    this.cache = new Map(); // ids of words
  }

  encode(text) {
    if (this.nfc) text = text.normalize("NFC");
    const parts = this.added ? text.split(this.added) : [text]; // odd parts are the matches
    return parts.flatMap((part, i) => (i % 2 ? [this.ids.get(part)] : this.encodeOrdinary(part)));
  }

  encodeOrdinary(text) {
    if (this.kind === "characters") return Array.from(text, (character) => this.characterId(character));
    return (text.match(this.pattern) ?? []).flatMap((word) => {
      if (!this.cache.has(word)) {
        if (this.cache.size >= 10_000) this.cache.clear();
        this.cache.set(word, this.merge(word));
      }
      return this.cache.get(word);
    });
  }

  characterId(character) {
    const id = this.ids.get(character);
    if (id !== undefined && !this.special.has(id)) return id;
    const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    throw new Error(`the model does not know the character ${JSON.stringify(character)} (U+${code}); remove it`);
  }

  merge(word) {
    const ids = Array.from(new TextEncoder().encode(word), (byte) => this.ids.get(CHARACTER_OF[byte]));
    const merged = (i) => this.ranks.get(ids[i] * this.tokens.length + ids[i + 1]);
    for (;;) {
      let best = { rank: Infinity };
      for (let i = 0; i + 1 < ids.length; i++) if (merged(i)?.rank < best.rank) best = merged(i);
      if (best.rank === Infinity) return ids;
      // Merge the occurrences from left to right, until a new pair has a lower rank.
      for (let i = 0, lower = false; i + 1 < ids.length && !lower; i++) {
        if (merged(i) !== best) continue;
        ids.splice(i, 2, best.id);
        lower = merged(i - 1)?.rank < best.rank || merged(i)?.rank < best.rank;
      }
    }
  }

  // The UTF-8 bytes of a token; a character may be divided among several tokens.
  bytes(id) {
    const characters = Array.from(this.tokens[id] ?? "");
    const isByteLevel = this.kind === "bpe" && characters.every((character) => BYTE_OF.has(character));
    return isByteLevel
      ? Uint8Array.from(characters, (c) => BYTE_OF.get(c))
      : new TextEncoder().encode(this.tokens[id] ?? "");
  }

  // The text of ids without special tokens; invalid UTF-8 becomes U+FFFD.
  decode(ids) {
    const bytes = ids.filter((id) => !this.special.has(id)).flatMap((id) => Array.from(this.bytes(id)));
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  }
}

// The ids of a conversation in ChatML, up to the reply: <|im_start|>role, line feed, content, <|im_end|>, line feed, …
function chatPrompt(tokenizer, { start, end, system }, messages) {
  const hasSystem = system === null || messages[0]?.role === "system";
  const all = hasSystem ? messages : [{ role: "system", content: system }, ...messages];
  const turn = ({ role, content }) => [
    start,
    ...tokenizer.encode(`${role}\n${content}`),
    end,
    ...tokenizer.encode("\n"),
  ];
  return [...all.flatMap(turn), start, ...tokenizer.encode("assistant\n")];
}

if (typeof module !== "undefined") module.exports = { Tokenizer, chatPrompt };
