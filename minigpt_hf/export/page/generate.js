"use strict";
/* The view "Generate": a text that the model continues, or a conversation. Each generated token is shaded by its probability;
selecting one shows the alternatives, and the text can be continued from another one. */

const sampling = { temperature: 0, topK: 0, topP: 1, repetitionPenalty: 1, maxNewTokens: 200 };

function generateView() {
  const { sampling: initial, chat } = page;
  const [prompt, button, seed, status] = ["prompt", "generate", "seed", "generation-status"].map(byId);
  let job = null; // of the running generation
  let promptIds = [];
  let messages = []; // of the conversation, without the reply in progress
  let isChat = false;
  const list = new TokenList(byId("output"), "Text, token by token", showAlternatives);

  byId("sampling").append(
    slider("Temperature", sampling, "temperature", {
      min: 0,
      max: 2,
      step: 0.05,
      value: initial.temperature,
      format: (x) => (x === 0 ? "0, greedy" : x.toFixed(2)),
    }),
    slider("Top-k", sampling, "topK", {
      min: 0,
      max: Math.min(200, page.config.vocab_size),
      step: 1,
      value: initial.temperature === 0 ? 0 : initial.top_k, // a greedy model has top_k 1, which would exclude sampling
      format: (k) => (k === 0 ? "off" : k),
    }),
    slider("Top-p", sampling, "topP", {
      min: 0.05,
      max: 1,
      step: 0.01,
      value: initial.top_p,
      format: (p) => (p === 1 ? "off" : p.toFixed(2)),
    }),
    slider("Repetition penalty", sampling, "repetitionPenalty", {
      min: 1,
      max: 2,
      step: 0.05,
      value: initial.repetition_penalty,
      format: (x) => (x === 1 ? "off" : x.toFixed(2)),
    }),
    slider("New tokens", sampling, "maxNewTokens", { min: 10, max: 1000, step: 10, value: 200, format: integer }),
  );
  prompt.value = page.prompt;

  byId("modes").hidden = !chat;
  byId("no-chat").hidden = !page.hasTemplate || Boolean(chat);
  byId("mode-chat").addEventListener("change", () => setMode(true));
  byId("mode-continue").addEventListener("change", () => setMode(false));

  function setMode(value) {
    isChat = value;
    byId(isChat ? "mode-chat" : "mode-continue").checked = true;
    prompt.value = isChat ? "" : page.prompt;
    prompt.placeholder = isChat ? page.prompt : "Empty: a new document";
    byId("prompt-label").textContent = isChat ? "Your message" : "Prompt";
    byId("clear").textContent = isChat ? "New conversation" : "Clear";
    byId("chat-note").hidden = !isChat;
    byId("system-note").hidden = !isChat || !page.hasOtherSystems;
    byId("result").classList.toggle("reply", isChat);
    byId("output-empty").textContent =
      `The ${isChat ? "answer" : "text"} appears here, shaded by how surprising each token is to the model.`;
    byId("text-column").append(...(isChat ? ["result", "composer"] : ["composer", "result"]).map(byId)); // a reply is above
    reset();
  }

  function reset() {
    if (job !== null) engine.stop(job);
    messages = [];
    promptIds = [];
    byId("conversation").replaceChildren();
    byId("alternatives").hidden = true;
    list.set([]);
    showState();
  }

  function showState(text = "") {
    button.textContent = job !== null ? "Stop" : isChat ? "Send" : "Generate";
    button.classList.toggle("stop", job !== null);
    byId("output-empty").hidden = list.tokens.length > 0 || job !== null;
    byId("output-role").hidden = !isChat || !byId("output-empty").hidden;
    status.textContent = text;
  }

  // The earlier turns of the conversation, as plain text.
  function showConversation() {
    const turn = ({ role, content }) =>
      element(`div.turn.${role === "user" ? "user" : "reply"}`, {}, element("span.role", {}, role), content);
    byId("conversation").replaceChildren(...messages.map(turn));
  }

  function begin() {
    if (job !== null) return engine.stop(job);
    const text = prompt.value;
    if (isChat) {
      const reply = tokenizer.decode(list.tokens.filter((token) => !token.isPrompt).map((token) => token.id));
      const conversation = [
        ...messages,
        ...(list.tokens.length ? [{ role: "assistant", content: reply }] : []),
        { role: "user", content: text },
      ];
      try {
        clearError();
        promptIds = chatPrompt(tokenizer, chat, conversation);
      } catch (error) {
        return reportError(error);
      }
      messages = conversation;
      showConversation();
      prompt.value = "";
      list.set([]);
    } else {
      const ids = encoded(text);
      if (ids === null) return undefined;
      promptIds = ids;
      list.set(text === "" ? [] : ids.map((id) => ({ id, isPrompt: true })));
    }
    return continueText(Number(seed.value));
  }

  // Generate from the prompt and the tokens that are shown.
  function continueText(randomSeed) {
    const ids = [...promptIds, ...list.tokens.filter((token) => !token.isPrompt).map((token) => token.id)];
    byId("alternatives").hidden = true;
    const running = engine.run(
      "generate",
      { ids, options: { ...sampling, seed: randomSeed } },
      ({ tokens, tokensPerSecond }) => {
        if (job !== running.job) return;
        const isAtEnd = list.node.scrollTop + list.node.clientHeight > list.node.scrollHeight - 40;
        list.append(tokens);
        if (isAtEnd) list.node.scrollTop = list.node.scrollHeight;
        showState(speed(tokensPerSecond));
      },
    );
    job = running.job;
    showState();
    return running.then(
      ({ stopped, tokensPerSecond }) => {
        if (job !== running.job) return;
        job = null;
        showState(`${stopped ? "Stopped. " : "Finished. "}${speed(tokensPerSecond)}`);
      },
      (error) => {
        job = null;
        showState();
        reportError(error);
      },
    );
  }

  function speed(tokensPerSecond) {
    const generated = list.tokens.filter((token) => !token.isPrompt && token.p !== undefined);
    const mean = generated.reduce((sum, token) => sum + bits(token.p), 0) / generated.length;
    const surprise = generated.length ? ` · ${mean.toFixed(2)} bits per token` : "";
    return `${integer(generated.length)} tokens · ${integer(Math.round(tokensPerSecond))} tokens/s${surprise}`;
  }

  function showAlternatives(index, token) {
    const panel = byId("alternatives");
    panel.hidden = false;
    if (!token.top) {
      panel.replaceChildren(
        element(
          "p.note",
          {},
          `“${tokenLabel(token.id)}” (id ${token.id}) is part of the prompt; the model did not choose it.`,
        ),
      );
      return;
    }
    const rows = token.top.map(([id, p]) =>
      probabilityRow(id, p, {
        isChosen: id === token.id,
        onclick: () => continueFrom(index, id, p, token.top),
      }),
    );
    if (!token.top.some(([id]) => id === token.id)) rows.push(probabilityRow(token.id, token.p, { isChosen: true }));
    panel.replaceChildren(
      element("h3", {}, `Token ${index + 1}: “${tokenLabel(token.id)}”`),
      element(
        "p.note",
        {},
        `${percent(token.p)}, ${bits(token.p).toFixed(2)} bits. Choose a token to continue the text from it.`,
      ),
      element("div.probabilities", {}, rows),
    );
  }

  function continueFrom(index, id, p, top) {
    if (job !== null) engine.stop(job);
    job = null;
    list.set([...list.tokens.slice(0, index), { id, p, top }]);
    list.node.focus();
    continueText(Number(seed.value) + index + 1);
  }

  button.addEventListener("click", begin);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (isChat && !event.shiftKey))) {
      event.preventDefault();
      begin();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && job !== null) engine.stop(job);
  });
  byId("clear").addEventListener("click", reset);
  byId("new-seed").addEventListener("click", () => {
    seed.value = Math.floor(Math.random() * 2 ** 31);
  });
  setMode(Boolean(chat));

  // For the other views: the text, its last question, and the ids of a text or of a question.
  const currentIds = () => [...promptIds, ...list.tokens.filter((token) => !token.isPrompt).map((token) => token.id)];
  const lastQuestion = () => messages.at(-1)?.content ?? "";
  function idsOf(text) {
    if (!isChat) return encoded(text);
    try {
      clearError();
      return chatPrompt(tokenizer, chat, [{ role: "user", content: text }]);
    } catch (error) {
      reportError(error);
      return null;
    }
  }
  return { show() {}, currentIds, lastQuestion, idsOf, isChat: () => isChat };
}
