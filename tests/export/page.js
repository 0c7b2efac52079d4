/* Runs the code of an exported page under node: `node page.js PAGE.html` reads a list of requests as JSON from standard input
and writes the list of results. The code is taken from the page itself. */
const fs = require("fs");
const vm = require("vm");

const html = fs.readFileSync(process.argv[2], "utf8");
const block = (id) => html.match(new RegExp(`<script[^>]* id="${id}">([^]*?)</script>`))[1];
const names =
  "Tokenizer, chatPrompt, Cache, GPT, matmul, distribution, randomNumbers, draw, generate, decodeWeights, createBackend, headScores, headLabel";
const code = ["tokenizer", "gpt", "weights", "kernel", "heads"].map((name) => block(`code-${name}`)).join("\n");
const page = vm.runInThisContext(`(() => { ${code}\nreturn { ${names} }; })()`);
const data = JSON.parse(block("data"));
const tokenizer = new page.Tokenizer(data.tokenizer);

function load(backendName) {
  const capacity = data.parameters + page.GPT.workspace(data.config) + 4 * data.tensors.length;
  const plain = { matmul: page.matmul, allocate: (size) => new Float32Array(size) };
  const backend = backendName === "JavaScript" ? plain : page.createBackend(capacity);
  if (backendName === "WebAssembly" && backend.name !== "WebAssembly") throw new Error("no WebAssembly");
  return new page.GPT(data.config, page.decodeWeights(block("weights"), data.tensors, backend.allocate), backend);
}

const models = {};
const model = (name = "WebAssembly") => (models[name] ??= load(name));
const requests = {
  data: () => data,
  encode: ({ texts }) => texts.map((text) => tokenizer.encode(text)),
  decode: ({ sequences }) => sequences.map((ids) => tokenizer.decode(ids)),
  error: ({ text }) => {
    try {
      return tokenizer.encode(text);
    } catch (error) {
      return error.message;
    }
  },
  // Logits at every position; the ids are appended to the cache in parts of the given lengths.
  logits: ({ ids, parts, backend, ablated = [] }) => {
    const [cache, logits] = [new page.Cache(data.config), []];
    for (const length of parts ?? [ids.length]) {
      const options = { ablated: new Set(ablated), observe: { logits: (_, values) => logits.push(Array.from(values)) } };
      model(backend).forward(ids.slice(cache.length, cache.length + length), cache, options);
    }
    return logits;
  },
  attention: ({ ids }) => {
    const weights = data.config.layer_types.map(() => Array.from({ length: data.config.num_attention_heads }, () => []));
    const record = (layer, head, position, first, values) => {
      weights[layer][head].push([...Array(first).fill(0), ...values, ...Array(ids.length - 1 - position).fill(0)]);
    };
    model().forward(ids, new page.Cache(data.config), { observe: { attention: record } });
    return weights;
  },
  generate: ({ ids, options }) => Array.from(page.generate(model(), ids, { stop: data.stop, ...options }), ({ id }) => id),
  distribution: ({ logits, options, previous }) => Array.from(page.distribution(logits, options, previous)),
  frequencies: ({ probabilities, draws }) => {
    const [random, counts] = [page.randomNumbers(0), probabilities.map(() => 0)];
    for (let i = 0; i < draws; i++) counts[page.draw(probabilities, random)]++;
    return counts.map((count) => count / draws);
  },
  head: ({ weights, ids }) => {
    const scores = page.headScores(weights.flat(), ids);
    return [page.headLabel(scores), scores[0].score];
  },
  chat: ({ messages }) => page.chatPrompt(tokenizer, data.chat, messages),
};
const results = JSON.parse(fs.readFileSync(0, "utf8")).map(({ request, ...rest }) => requests[request](rest));
process.stdout.write(JSON.stringify(results));
