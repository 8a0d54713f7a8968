// The conversation: what is sent, streamed, stopped and told. Invariant: at most one turn is under way; whatever ends it,
// the page is ready for the next.

const EXAMPLES = [
  'Write one short sentence about the sea that contains the word "lantern".',
  "What is the capital of France? Answer in one sentence.",
  "Explain what an anchor does, and end with the word “harbour”.",
];
const NEAR = 60; // pixels from the end within which the view follows what is written
const LATER = [1000, 2000, 4000, 8000]; // ms between looks at a server that is gone

const chat = { turns: [], base: null, running: null };

// Start

async function start() {
  try {
    const [models, corrections] = (await Promise.all(["/v1/models", "/v1/corrections"].map(askJson))).map((list) => list.data);
    chat.base = models.find((model) => !model.parent);
    find("model").textContent = `${chat.base.id} · ${chat.base.max_model_len} tokens`;
    settings.offer(corrections);
    listCorrections(corrections);
    find("key-form").hidden = true;
    tellTrouble(null);
  } catch (error) {
    cannotStart(error);
  }
}

function cannotStart(error) {
  if (error.status === 401) return askKey(error.message);
  tellTrouble(error.message, ...(error.status ? [again("Try again", start)] : []));
  if (!error.status) lookAgain();
}

function askKey(message) {
  find("key-told").textContent = message;
  find("key-form").hidden = false;
  openSide(true);
  find("key").focus();
}

/** Look for a server that is gone until it is back. */
async function lookAgain() {
  if (chat.looking) return;
  chat.looking = true;
  for (let i = 0; ; i++) {
    const wait = LATER[Math.min(i, LATER.length - 1)];
    tellTrouble(`The server cannot be reached. Is it still running? Looking again in ${wait / 1000} s.`);
    await new Promise((resolve) => setTimeout(resolve, wait));
    if (await fetch("/health", { cache: "no-store" }).then((response) => response.ok, () => false)) break;
  }
  chat.looking = false;
  await start();
  if (!find("trouble").textContent) say("The server is back.");
}

// A turn

async function send(text) {
  if (chat.running || !text.trim()) return;
  const controller = new AbortController();
  const turn = { text, sides: sides(), answers: {} };
  showTurn(turn);
  setRunning(controller);
  say("Answering");
  const bodies = turn.sides.map((side) => bodyOf(turn, side)); // settings may change while it is answered
  chat.turns.push(turn);
  await Promise.all(turn.sides.map((side, i) => stream(turn, side, bodies[i], controller)));
  setRunning(null);
  say(turn.sides.map((side) => `${turn.answers[side].node.ariaLabel}: ${tell(turn.answers[side].totals)}.`).join(" "));
}

const sides = () => (settings.beside ? ["base", "steered"] : [settings.correction ? "steered" : "base"]);

function showTurn(turn) {
  find("welcome").hidden = true;
  const answers = turn.sides.map((side) => {
    const steered = side === "steered";
    const title = steered ? settings.correction.id : "base";
    turn.answers[side] = new Answer(title, steered ? settings.how() : "the model alone", steered ? settings.entropyTau : undefined);
    return turn.answers[side].node;
  });
  const beside = make("div", { class: answers.length > 1 ? "answers two" : "answers" }, ...answers);
  const name = `Turn ${chat.turns.length + 1}`;
  turn.node = make("section", { class: "turn", "aria-label": name }, make("p", { class: "asked" }, turn.text), beside);
  find("turns").append(turn.node);
  turn.node.scrollIntoView({ block: "start" });
}

function bodyOf(turn, side) {
  const steered = side === "steered";
  const messages = [...historyOf(side), { role: "user", content: turn.text }];
  return { model: chat.base?.id, messages, stream: true, ...settings.sampling(), steering: settings.steering(steered) };
}

/** What was said so far, as this side remembers it; turns without an answer are left out. */
function historyOf(side) {
  return chat.turns.flatMap((turn) => {
    const answer = turn.answers[side] ?? Object.values(turn.answers)[0];
    if (!answer.text) return [];
    return [{ role: "user", content: turn.text }, { role: "assistant", content: answer.text }];
  });
}

async function stream(turn, side, body, controller) {
  const answer = turn.answers[side];
  let reason = "stop";
  try {
    for await (const chunk of chunksOf(body, controller.signal)) {
      const part = chunk.choices[0];
      if (part.finish_reason) reason = part.finish_reason;
      else follow(() => answer.take(part));
    }
    answer.finish(reason);
  } catch (error) {
    if (error.name === "AbortError") answer.finish("stopped");
    else answer.fail(error.message, ...adviceFor(error, turn));
  }
}

/** What can be done about it. */
function adviceFor(error, turn) {
  if (error.status === 401) askKey(error.message);
  if (error.status === 0) lookAgainSoon();
  const wait = error.wait ? ` (the server asks for ${error.wait} s)` : "";
  const worthIt = error.status === 0 || error.status === 401 || error.status === 429 || error.status >= 500;
  return worthIt ? [again(`Ask again${wait}`, () => askAgain(turn))] : [];
}

/** After a broken stream: is the server still there? */
async function lookAgainSoon() {
  const well = await fetch("/health", { cache: "no-store" }).then((response) => response.ok, () => false);
  if (!well) lookAgain();
}

function askAgain(turn) {
  if (chat.running) return;
  chat.turns = chat.turns.filter((other) => other !== turn);
  turn.node.remove();
  send(turn.text);
}

function again(text, act) {
  const button = make("button", { type: "button", class: "quiet" }, text);
  button.addEventListener("click", act);
  return button;
}

function setRunning(controller) {
  chat.running = controller;
  find("send").hidden = controller !== null;
  find("stop").hidden = controller === null;
}

const stop = () => chat.running?.abort();

/** Do what lengthens the page; stay at its end if the reader is there. */
function follow(act) {
  act();
  if (chat.following) return;
  const talk = find("talk");
  const near = talk.scrollHeight - talk.scrollTop - talk.clientHeight < NEAR;
  chat.following = requestAnimationFrame(() => {
    chat.following = 0;
    if (near) talk.scrollTop = talk.scrollHeight;
  });
}

// What is told

/** For those who do not see it. */
function say(text) {
  find("status").textContent = text;
}

function tellTrouble(message, ...advice) {
  find("trouble").hidden = message === null;
  find("trouble").replaceChildren(...(message === null ? [] : [make("p", {}, message), ...advice]));
}

// What one can do

function submit() {
  const message = find("message");
  if (chat.running || !message.value.trim()) return;
  send(message.value);
  message.value = "";
}

function openSide(open) {
  find("side").classList.toggle("open", open);
  find("open-side").setAttribute("aria-expanded", String(open));
}

find("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
find("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  hideTip();
  if (!find("report").open) stop();
});
find("stop").addEventListener("click", stop);
find("clear").addEventListener("click", () => {
  stop();
  chat.turns = [];
  find("turns").replaceChildren();
  find("welcome").hidden = false;
  find("message").focus();
});
find("open-side").addEventListener("click", () => {
  openSide(!find("side").classList.contains("open"));
});
find("close-side").addEventListener("click", () => {
  openSide(false);
  find("open-side").focus();
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("key").value.trim());
  find("key").value = "";
  start();
});
addEventListener("resize", () => {
  for (const turn of chat.turns) for (const answer of Object.values(turn.answers)) answer.draw();
});

for (const text of EXAMPLES) find("examples").append(make("li", {}, again(text, () => send(text))));
requestAnimationFrame(() => setTimeout(start)); // once the page is painted
