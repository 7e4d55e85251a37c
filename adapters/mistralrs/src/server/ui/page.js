"use strict";

// The page of the server: two models side by side, and how sure each is. No libraries, nothing from elsewhere.

const at = (id) => document.getElementById(id);
const sides = ["left", "right"].map((side) => ({ model: at(`${side}-model`), answers: at(`${side}-answer`) }));
let models = [];
let key = sessionStorage.getItem("key") || "";
let asking = null;

/** An element with a class, a text, and children. */
function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function headers() {
  const found = { "content-type": "application/json" };
  if (key) found.authorization = `Bearer ${key}`;
  return found;
}

/** What went wrong, as a client is told. */
async function fault(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function megabytes(bytes) {
  return `${Math.round(bytes / (1 << 20))} MiB`;
}

function say(text) {
  at("status").textContent = text;
}

// ---- the list of models

/** Reads what is served; says what is wrong where something is. */
async function load() {
  try {
    await refresh();
  } catch (error) {
    say(`The list of models cannot be read: ${error.message}`);
  }
}

async function refresh() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401 || response.status === 403) {
    const isRefused = Boolean(key);
    key = "";
    sessionStorage.removeItem("key");
    at("key-form").hidden = false;
    at("key").value = "";
    at("key").focus();
    throw new Error(isRefused ? "this server does not accept that key; give another" : "this server needs a key");
  }
  if (!response.ok) throw new Error(await fault(response));
  at("key-form").hidden = true;
  models = (await response.json()).data;
  const chosen = sides.map((side) => side.model.value);
  const isAdapter = (model) => model.parent && !model.id.includes("@draw-");
  const adapter = models.find(isAdapter);
  const first = adapter ? models.find((model) => model.id === adapter.parent) : models[0];
  const usual = [first, adapter || models[1] || models[0]];
  sides.forEach((side, index) => {
    side.model.replaceChildren(...models.map((model) => {
      const option = element("option", "", model.parent ? `${model.id} (on ${model.parent})` : `${model.id} (base)`);
      option.value = model.id;
      return option;
    }));
    const known = models.some((model) => model.id === chosen[index]);
    side.model.value = known ? chosen[index] : usual[index].id;
  });
  showLoaded();
  say(`${models.length} models are served. Nothing is sent before you ask.`);
}

/** For which questions a model is calibrated. */
function calibratedFor(sure) {
  if (!sure) return "";
  if (!sure.calibrated) return "no";
  const kind = sure.calibrated_for === "choices" ? "for choices" : "for answers in its own words";
  return sure.target_error === null ? kind : `${kind}; stays silent when too unsure (aim: at most ${percent(sure.target_error)} wrong)`;
}

function showLoaded() {
  const bases = models.filter((model) => !model.id.includes("@draw-"));
  at("loaded").replaceChildren(...bases.map((model) => {
    const sure = model.uncertainty;
    const cells = [
      model.id,
      calibratedFor(sure),
      sure ? String(sure.draws) : "not scored",
      model.parent || "",
      megabytes(model.weight_bytes),
      model.generation,
    ];
    const row = element("tr", "");
    cells.forEach((text, index) => {
      const cell = element(index ? "td" : "th", "", text);
      if (!index) cell.scope = "row";
      row.append(cell);
    });
    return row;
  }));
  const sum = bases.reduce((all, model) => all + model.weight_bytes, 0);
  at("memory").textContent = `${megabytes(sum)} for weights in all; each adapter has a copy of its base.`;
}

// ---- asking

/** The question as it goes to a model: a conversation, or a text where the model has no chat template. */
function asked(model) {
  const question = at("question").value;
  if (!model.has_chat_template) return { prompt: question };
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  return { messages: [...messages, { role: "user", content: question }] };
}

function choices() {
  return at("choices").value.split("\n").map((line) => line.replace(/\r$/, "")).filter((line) => line.trim());
}

/** The data of each event of a stream, until it is done. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer was cut: the server ended it, or what is between.");
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** A token, shaded by its probability; several where a character has more than one. */
function token(text, p) {
  const made = element("span", p < 0.5 ? "token low" : "token", text);
  made.style.setProperty("--doubt", String(1 - p));
  made.title = percent(p);
  return made;
}

/** An answer as it grows. Text is shown at once, and shaded when the scores of its tokens are there. */
class Answer {
  constructor(said) {
    this.said = said;
    this.plain = document.createTextNode("");
    said.append(this.plain);
    this.tokens = [];
  }

  add(text, tokens) {
    this.plain.data += text;
    this.tokens.push(...tokens);
    for (let n = 1; n <= this.tokens.length; ) {
      const group = this.tokens.slice(0, n);
      const text = textOf(group);
      const rest = this.plain.data;
      // White space before the first token may be cut off, and a special token has no text.
      const shown = [text, text.trimStart()].find((candidate) => candidate !== null && rest.startsWith(candidate));
      if (shown === undefined && n < 4) {
        n += 1;
        continue;
      }
      this.tokens.splice(0, n);
      n = 1;
      if (shown) {
        this.plain.before(token(shown, Math.exp(group.reduce((sum, part) => sum + part.logprob, 0))));
        this.plain.data = rest.slice(shown.length);
      }
    }
  }
}

/** The text of tokens that may each be a part of a character; null if they are not whole. */
function textOf(tokens) {
  if (!tokens.every((part) => part.bytes)) return tokens.map((part) => part.token).join("");
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(tokens.flatMap((part) => part.bytes)));
  } catch {
    return "\u0000";
  }
}

/** Shows the answer as it comes; which generation gave it, and why it ended. */
async function chat(model, said, signal) {
  const maxTokens = Number(at("max-tokens").value) || 128;
  const body = { model: model.id, ...asked(model), stream: true, temperature: 0, max_tokens: maxTokens };
  const isChat = model.has_chat_template;
  Object.assign(body, isChat ? { logprobs: true } : { logprobs: 0 });
  const response = await fetch(isChat ? "v1/chat/completions" : "v1/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await fault(response));
  const answer = new Answer(said);
  const found = { generation: "", reason: null };
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    found.generation = chunk.system_fingerprint;
    for (const choice of chunk.choices) {
      found.reason = choice.finish_reason || found.reason;
      const logprobs = choice.logprobs;
      const tokens = !logprobs ? [] : isChat
        ? logprobs.content
        : logprobs.tokens.map((token, index) => ({ token, logprob: logprobs.token_logprobs[index] }));
      answer.add(isChat ? choice.delta.content || "" : choice.text, tokens);
    }
  }
  if (!found.reason) throw new Error("The answer was cut: the server ended it, or what is between.");
  return found;
}

/** The tokens of an answer with their numbers, for who does not point at them. */
function tokenList(said) {
  const tokens = [...said.querySelectorAll(".token")];
  if (!tokens.length) return null;
  const items = tokens.map((shown) => element("li", "", element("code", "", JSON.stringify(shown.textContent)), ` ${shown.title}`));
  return element("details", "tokens", element("summary", "", `${tokens.length} tokens with their probabilities`), element("ol", "", ...items));
}

const WORDS = [[0.95, "very sure"], [0.8, "sure"], [0.5, "not sure"], [0, "guessing"]];

/** How sure a score is, in the words of `monteclora predict`. */
function verdict(score) {
  const p = score.p_correct;
  if (score.finish_reason === "length") {
    return element("p", "verdict unchecked", "cut at the most tokens that were allowed: it is not known how sure the whole answer would be");
  }
  if (score.abstain) return element("p", "verdict unsure", `too unsure to answer: ${percent(p)} likely to be right`);
  if (!score.calibrated) {
    const text = score.choices ? `not calibrated: the model gives it ${percent(p)}` : `not calibrated: ${percent(p)} is the model's probability of exactly this text`;
    return element("p", "verdict unchecked", text);
  }
  const word = WORDS.find(([least]) => p >= least)[1];
  return element("p", `verdict ${p >= 0.8 ? "sure" : "unsure"}`, `${word}: ${percent(p)} likely to be right`);
}

function details(score) {
  const parts = [];
  const found = score.uncertainty;
  if (score.calibration_not_used) parts.push(`the calibration ${score.calibration_not_used}`);
  if (found) {
    const number = (value) => value.toFixed(4);
    const agreeing = Math.round(found.agreement * found.draws);
    parts.push(`${agreeing === found.draws ? "all" : `${agreeing} of`} ${found.draws} draws say the same`);
    parts.push(`entropy ${number(found.predictive_entropy)} nats = ${number(found.expected_entropy)} within a draw + ${number(found.mutual_information)} between draws`);
  }
  const calibration = score.calibration;
  if (calibration) {
    parts.push(`temperature ${calibration.temperature.toFixed(3)} from ${calibration.rows} rows`);
    if (calibration.threshold !== null) parts.push(`silent below ${percent(calibration.threshold)}`);
  }
  parts.push(`generation ${score.generation}`);
  return element("p", "note", parts.join("; "));
}

function bars(score) {
  const best = score.choices.reduce((a, b) => (b.probability > a.probability ? b : a));
  return element("ul", "choices", ...score.choices.map((choice) => {
    const name = element(choice === best ? "strong" : "span", "", choice.text.trim());
    const range = choice.q05 === null ? "" : ` (draws ${(100 * choice.q05).toFixed(1)} to ${(100 * choice.q95).toFixed(1)})`;
    const spread = choice.std === null ? "" : ` ± ${(100 * choice.std).toFixed(1)}${range}`;
    const fill = element("i", "");
    fill.style.width = `${100 * choice.probability}%`;
    const bar = element("div", "bar", fill);
    if (choice.q05 !== null) {
      const line = element("u", "");
      line.style.left = `${100 * choice.q05}%`;
      line.style.width = `${100 * (choice.q95 - choice.q05)}%`;
      bar.append(line);
    }
    bar.setAttribute("aria-hidden", "true");
    return element("li", "", element("div", "choice-head", name, element("b", "", percent(choice.probability) + spread)), bar);
  }));
}

async function score(model, signal) {
  const list = choices();
  const body = { model: model.id, ...asked(model) };
  if (list.length) body.choices = list;
  else body.max_tokens = Number(at("max-tokens").value) || 128;
  const response = await fetch("v1/monteclora/score", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await fault(response));
  return response.json();
}

/** Puts "I would rather not say" in the place of an answer that is too unsure; what is held back can be opened. */
function withhold(said, ...more) {
  const kept = said.cloneNode(true);
  kept.hidden = false;
  const opened = element("details", "", element("summary", "", "Show the answer that is held back"), kept, ...more);
  said.replaceWith(element("div", "withheld", element("p", "said", "I would rather not say."), opened));
}

/** Whether answers in the model's own words may be held back, so that they are not shown before they are scored. */
function mayAbstain(model) {
  const sure = model.uncertainty;
  return sure && sure.calibrated_for === "answers" && sure.target_error !== null;
}

async function askOpen(model, box, said, isScored, signal) {
  const isHeld = isScored && mayAbstain(model);
  let isScoredNow = false;
  const wait = element("p", "note", isHeld ? "The answer is shown when it is known how sure it is." : "");
  said.hidden = isHeld;
  box.append(wait);
  try {
    const answered = await chat(model, said, signal);
    const list = tokenList(said);
    const more = list ? [list] : [];
    if (answered.reason === "length") more.push(element("p", "note", "The answer ends at the most tokens that were asked for."));
    if (!isScored) {
      box.append(...more);
      return;
    }
    if (!isHeld) wait.textContent = "Asking how sure that is\u2026";
    const found = await score(model, signal);
    isScoredNow = true;
    if (found.generation !== answered.generation) {
      if (isHeld) withhold(said);
      box.append(...more, element("p", "error", "The model was replaced between the answer and its score. Ask again."));
      return;
    }
    if (found.answer.trim() !== said.textContent.trim()) {
      more.push(element("p", "note", `What is scored is this answer, of weights of another type: ${found.answer.trim()}`));
    }
    if (found.abstain) withhold(said, ...more);
    else {
      said.hidden = false;
      box.append(...more);
    }
    box.append(verdict(found), details(found));
  } catch (error) {
    // What may have to be held back is, as long as nobody knows how sure it is.
    if (isHeld && !isScoredNow && said.textContent) withhold(said);
    throw error;
  } finally {
    wait.remove();
  }
}

async function askChoices(model, box, said, signal) {
  said.textContent = "\u2026";
  const found = await score(model, signal);
  said.textContent = found.answer.trim();
  if (found.abstain) withhold(said);
  box.append(verdict(found), bars(found), details(found));
}

/** Why choices cannot be asked of a model; nothing if they can. */
function notScored(model) {
  if (model.id.includes("@draw-")) return "A posterior draw by itself has no score. Ask its adapter.";
  if (!model.uncertainty) return "Choices are scored, and this model's answers are not: serve.toml needs [models.uncertainty] with enabled = true.";
  return at("sure").checked ? "" : "Choices are scored: tick \u201cSay how sure an answer is\u201d.";
}

/** What was asked, above its answer. */
function head(model) {
  const question = at("question").value.trim().replace(/\s+/g, " ");
  const parts = [`${model.id}: ${question.length > 160 ? `${question.slice(0, 159)}\u2026` : question}`];
  if (at("system").value.trim()) parts.push("with a system message");
  const count = choices().length;
  if (count) parts.push(`${count} choices`);
  return parts.join("; ");
}

async function ask(side, signal) {
  const model = models.find((candidate) => candidate.id === side.model.value);
  if (!model) return true;
  const said = element("p", "said");
  const box = element("article", "answer", element("p", "note", head(model)), said);
  side.answers.prepend(box);
  side.answers.setAttribute("aria-busy", "true");
  if (!model.has_chat_template && at("system").value.trim()) {
    box.append(element("p", "note", "This model continues texts: the system message is not sent."));
  }
  try {
    const why = notScored(model);
    if (!choices().length) await askOpen(model, box, said, !why, signal);
    else if (why) throw new Error(why);
    else await askChoices(model, box, said, signal);
    return true;
  } catch (error) {
    box.append(element("p", "error", error.name === "AbortError" ? "Stopped." : error.message));
    return false;
  } finally {
    side.answers.setAttribute("aria-busy", "false");
  }
}

/** What keeps the form from being sent, with its field; nothing if it can be sent. */
function wrongField() {
  const tokens = at("max-tokens");
  if (choices().length === 1) {
    at("more").open = true;
    return [at("choices"), "Give two choices or more, one per line, or none."];
  }
  if (!at("question").value.trim()) return [at("question"), "Write a question first."];
  if (!tokens.checkValidity() || !tokens.value) {
    at("more").open = true;
    return [tokens, `“Most tokens” takes ${tokens.min} to ${tokens.max}.`];
  }
  return null;
}

async function askBoth() {
  if (!models.length || asking) return;
  const wrong = wrongField();
  if (wrong) {
    say(wrong[1]);
    wrong[0].focus();
    return;
  }
  asking = new AbortController();
  const { signal } = asking;
  at("stop").disabled = false;
  // Who pressed the button by keyboard goes on from the next one; a disabled button cannot have the focus.
  if (document.activeElement === at("send")) at("stop").focus();
  at("send").disabled = true;
  say("Asking.");
  // On a small window the answers are below.
  if (at("left-answer").getBoundingClientRect().top > window.innerHeight) {
    at("left-title").scrollIntoView({ block: "start" });
  }
  let said = "Done.";
  try {
    const ended = await Promise.all(sides.map((side) => ask(side, signal)));
    if (signal.aborted) said = "Stopped.";
    else if (ended.includes(false)) said = "Done, with errors; they are below the question of each model.";
    // What is loaded may have changed meanwhile.
    await refresh();
  } catch (error) {
    said = `The list of models cannot be read: ${error.message}`;
  } finally {
    asking = null;
    at("send").disabled = false;
    if (document.activeElement === at("stop")) at("send").focus();
    at("stop").disabled = true;
    say(said);
  }
}

// ---- examples that the server brings along

async function loadExamples() {
  const response = await fetch("ui/examples.json");
  if (!response.ok) return;
  const examples = await response.json();
  at("examples").replaceChildren(...examples.map((example) => {
    const button = element("button", "", example.title);
    button.type = "button";
    button.addEventListener("click", () => {
      at("question").value = example.question;
      at("system").value = example.system || "";
      at("choices").value = (example.choices || []).join("\n");
      if (example.max_tokens) at("max-tokens").value = String(example.max_tokens);
      // What is sent with the question is to be seen.
      at("more").open = Boolean(example.system || (example.choices || []).length);
      at("question").focus();
    });
    return button;
  }));
  at("examples").hidden = !examples.length;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  askBoth();
});
at("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    askBoth();
  }
});
at("stop").addEventListener("click", () => asking && asking.abort());
at("clear").addEventListener("click", () => {
  if (!asking) sides.forEach((side) => side.answers.replaceChildren());
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  sessionStorage.setItem("key", key);
  load();
});
load();
loadExamples().catch(() => {});
