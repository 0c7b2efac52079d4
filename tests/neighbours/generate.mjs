// Greedy continuations with transformers.js: prompts as JSON on stdin, texts as JSON on stdout.
//     node generate.mjs HOST MODEL DTYPE NEW_TOKENS CACHE_FOLDER

import { readFileSync } from "node:fs";
import { env, pipeline } from "@huggingface/transformers";

const [host, model, dtype, tokens, cache] = process.argv.slice(2);
env.remoteHost = host;
env.allowLocalModels = false;
env.cacheDir = cache;
const generator = await pipeline("text-generation", model, { dtype });
const options = { max_new_tokens: Number(tokens), do_sample: false, return_full_text: false };
const texts = [];
for (const prompt of JSON.parse(readFileSync(0, "utf8"))) {
  texts.push((await generator(prompt, options))[0].generated_text);
}
process.stdout.write(JSON.stringify(texts));
