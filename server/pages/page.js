// The page at /: gauges that are asked for every second, and a chat that streams.
import { askForKey, withKey } from "./key.js";

const $ = (id) => document.getElementById(id);
const POINTS = 60; // of a line: a minute

// ---- what is served, and how it goes

const lines = { output: [], prompt: [], running: [] };
let status = null;

function seconds(value) {
  if (value === null) return "–";
  return value < 1 ? `${(1000 * value).toFixed(value < 0.1 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}

function count(value) {
  return value === null || value === undefined ? "–" : Number(value).toLocaleString("en");
}

function percent(value) {
  return value === null ? "–" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
}

function draw(name, value) {
  const values = lines[name];
  values.push(value);
  if (values.length > POINTS) values.shift();
  const highest = Math.max(...values, 1e-9);
  const points = values.map((v, i) => `${(120 * (i + POINTS - values.length)) / (POINTS - 1)},${30 - (28 * v) / highest}`);
  const svg = $(`${name}-line`);
  const line = svg.firstElementChild || svg.appendChild(document.createElementNS(svg.namespaceURI, "polyline"));
  line.setAttribute("points", points.join(" "));
}

const SHORT = {
  "device.name": "device",
  "device.kernels": "kernels",
  "model.dtype": "dtype",
  "scheduler.max_num_seqs": "at once",
  "kv_cache.dtype": "KV dtype",
};

function parameters(number) {
  return number < 1e7 ? count(number) : `${count(Math.round(number / 1e6))} million`;
}

function showFacts() {
  const { model, version, uptime_seconds: uptime, num_restarts: restarts } = status;
  const facts = {
    model: model.names.join(", "),
    architecture: model.architecture,
    parameters: model.parameters && parameters(model.parameters),
    context: model.max_model_len && `${count(model.max_model_len)} tokens`,
    "KV cache": model.kv_cache_tokens && `${count(model.kv_cache_tokens)} tokens`,
    ...Object.fromEntries(Object.entries(model.settings).map(([name, value]) => [SHORT[name] || name, value])),
    fingerprint: model.fingerprint,
    version,
    uptime: uptime < 5400 ? `${(uptime / 60).toFixed(0)} minutes` : `${(uptime / 3600).toFixed(1)} hours`,
    "engine restarts": restarts,
  };
  const list = $("fact-list");
  list.replaceChildren();
  for (const [name, value] of Object.entries(facts)) {
    if (value === null || value === undefined) continue;
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    text.textContent = String(value);
    list.append(term, text);
  }
}

function show() {
  const { load, latency, speculation, model, state, detail } = status;
  $("state").textContent = state === "starting" ? `starting: ${detail}` : state;
  $("state").className = `pill ${state}`;
  $("model-name").textContent = model.names[0];
  $("output-rate").textContent = load.output_tokens_per_second.toFixed(0);
  $("prompt-rate").textContent = load.prompt_tokens_per_second.toFixed(0);
  $("running").textContent = count(load.requests_running);
  $("waiting").textContent = count(load.requests_waiting);
  $("kv-usage").textContent = percent(load.kv_cache_usage);
  $("kv-meter").value = load.kv_cache_usage;
  $("first-token").textContent = seconds(latency.time_to_first_token_median);
  $("per-token").textContent = seconds(latency.seconds_per_token_median);
  $("latency-requests").textContent = count(latency.requests);
  $("acceptance").textContent = percent(speculation.acceptance);
  $("method").textContent = speculation.method;
  draw("output", load.output_tokens_per_second);
  draw("prompt", load.prompt_tokens_per_second);
  draw("running", load.requests_running);
  showFacts();
}

async function watch() {
  try {
    const response = await fetch("v1/server/status", { headers: withKey() });
    if (response.status === 401) {
      $("state").textContent = "a key is needed";
      askForKey($("key-form"), watch);
      return;
    }
    status = await response.json();
    if (response.ok) show();
  } catch {
    $("state").textContent = "out of reach";
    $("state").className = "pill failed";
  }
  setTimeout(watch, 1000);
}

// ---- the chat

const talk = []; // messages so far, as the API takes them
let running = null; // AbortController of the answer that streams

function showEnd() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function addMessage(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.append(document.createTextNode(text));
  $("messages").append(item);
  showEnd();
  return item;
}

function requestOf(text) {
  const common = {
    model: status.model.names[0],
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  if (status.model.has_chat_template) return ["v1/chat/completions", { ...common, messages: talk }];
  return ["v1/completions", { ...common, prompt: text }]; // a model that was not taught to chat goes on with the text
}

// The data of server-sent events, one by one, as they come.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      if (piece.startsWith("data: ") && piece !== "data: [DONE]") yield JSON.parse(piece.slice(6));
    }
  }
}

async function explain(item, id) {
  const response = await fetch(`v1/requests/${id}/explain`, { headers: withKey() });
  const body = await response.json();
  const line = document.createElement("span");
  line.className = "figures";
  line.textContent = response.ok ? body.sentence : body.error.message;
  item.append(line);
}

function addFigures(item, id, asked, first, usage) {
  const line = document.createElement("span");
  line.className = "figures";
  const now = performance.now();
  const tokens = usage ? usage.completion_tokens : 0;
  const parts = [`${tokens} tokens`];
  if (first) parts.push(`${seconds((first - asked) / 1000)} to the first`);
  if (tokens > 1 && now > first) parts.push(`${((1000 * (tokens - 1)) / (now - first)).toFixed(0)} tokens/s`);
  line.textContent = `${parts.join(", ")} `;
  const why = document.createElement("button");
  why.type = "button";
  why.textContent = "Why so long?";
  why.onclick = () => {
    why.disabled = true;
    explain(item, id);
  };
  line.append(why);
  item.append(line);
}

async function answer(text) {
  const item = addMessage("assistant", "");
  const id = `page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
  const [path, body] = requestOf(text);
  const asked = performance.now();
  let [first, usage, said] = [0, null, ""];
  const mine = (running = new AbortController());
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: withKey({ "Content-Type": "application/json", "X-Request-Id": id }),
      body: JSON.stringify(body),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      const choice = event.choices[0];
      const piece = choice ? (choice.delta ? choice.delta.content : choice.text) || "" : "";
      if (!piece) continue;
      first ||= performance.now();
      said += piece;
      item.firstChild.appendData(piece);
      showEnd();
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      item.classList.add("problem");
      item.firstChild.appendData(`${said ? "\n" : ""}${error.message}`);
    }
  }
  if (running !== mine) return; // a new chat was begun
  running = null;
  if (said) talk.push({ role: "assistant", content: said });
  else talk.pop(); // what was not answered is not part of the talk
  addFigures(item, id, asked, first, usage);
  showEnd();
}

async function send(event) {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running || !status) return;
  $("prompt").value = "";
  addMessage("user", text);
  talk.push({ role: "user", content: text });
  $("send").disabled = true;
  $("stop").hidden = false;
  await answer(text);
  if (running) return;
  $("send").disabled = false;
  $("stop").hidden = true;
  $("prompt").focus();
}

$("chat-form").onsubmit = send;
$("stop").onclick = () => running && running.abort();
$("clear").onclick = () => {
  if (running) running.abort();
  running = null;
  talk.length = 0;
  $("messages").replaceChildren();
};
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
};

watch();
