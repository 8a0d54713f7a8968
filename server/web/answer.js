// One answer as it grows: its tokens, its totals, its pictures, its table.
// Invariant: what is shown is only ever added to, a few dozen times a second, however fast chunks come; every step of the answer is
// behind exactly one piece of text, and one piece is what the arrow keys reach.

const PACE = 30; // ms between two additions to the text: each lays a line out and paints it, and a frame has 16 ms for all
const REDRAW = 120; // ms between two looks of the figures, which would flicker otherwise

class Answer {
  /** title: whose it is. tau: what the gate compares the entropy with, or null. */
  constructor(title, how, tau) {
    this.title = title;
    this.tau = tau;
    this.text = "";
    this.steps = [];
    this.pieces = []; // {node, first, receipts}
    this.totals = new Totals();
    this._queue = [];
    this._frame = 0;
    this._began = this._shown = this._drawn = 0;
    this._current = 0;
    this._build(title, how);
  }

  _build(title, how) {
    this._tokens = make("div", { class: "tokens" });
    this._plain = make("p", { class: "sr" });
    this._told = make("dl", { class: "told" });
    this._strip = make("div", { class: "picture" });
    this._histogram = make("div", { class: "picture" });
    this._pictures = make("div", { class: "pictures" }, this._strip, this._histogram);
    this._toggle = make("button", { type: "button", class: "quiet", "aria-expanded": "false" }, "Receipts as a table");
    this._receipts = make("div", { hidden: true });
    this._outcome = make("div", { class: "outcome", hidden: true }, this._told, this._pictures, this._toggle, this._receipts);
    this._trouble = make("div", { class: "trouble", role: "alert", hidden: true });
    const head = make("h3", {}, title, make("span", { class: "how" }, how));
    this.node = make("article", { class: "answer", "aria-label": title, "aria-busy": "true" });
    this.node.append(head, this._tokens, this._plain, this._trouble, this._outcome);
    this._listen();
  }

  /** A choice's part of a chunk. */
  take(part) {
    this._began ||= performance.now();
    this._queue.push(part);
    this._frame ||= requestAnimationFrame((now) => this._tick(now));
  }

  /** No more comes. reason: the server's, or "stopped". */
  finish(reason) {
    if (this._queue.length) this._flush();
    this.node.removeAttribute("aria-busy");
    this._plain.textContent = this.text;
    this._reason = reason;
    this._summarise();
  }

  /** Say what went wrong; what had come is kept. */
  fail(message, ...advice) {
    this.finish("error");
    this._trouble.replaceChildren(make("p", {}, message), ...advice);
    this._trouble.hidden = false;
  }

  _tick(now) {
    if (now - this._shown < PACE) this._frame = requestAnimationFrame((later) => this._tick(later));
    else this._flush();
  }

  _flush() {
    cancelAnimationFrame(this._frame);
    this._frame = 0;
    this._shown = performance.now();
    const fresh = document.createDocumentFragment();
    for (const part of this._queue.splice(0)) this._read(part, fresh);
    this._tokens.append(fresh);
    if (this.pieces.length) fill(this._tokens, { role: "listbox", "aria-label": `Tokens: ${this.title}` }, []); // an empty one is a fault
    if (performance.now() - this._drawn > REDRAW) this._summarise();
  }

  _read(part, fresh) {
    const text = part.delta?.content ?? "";
    const receipts = part.steering?.tokens ?? [];
    this.text += text;
    for (const [piece, behind] of divide(text, receipts)) {
      this.pieces.push({ first: this.steps.length + 1, receipts: behind, node: this._piece(piece, behind) });
      fresh.append(this.pieces.at(-1).node);
      for (const receipt of behind) this._count(receipt);
    }
  }

  _piece(text, receipts) {
    const index = this.pieces.length;
    const flags = [["fired", "fired"], ["flip", "flip"]].filter(([key]) => receipts.some((receipt) => receipt[key]));
    const kind = text === "" ? ["end"] : text.trim() === "" ? ["blank"] : [];
    const node = make("span", { class: ["token", ...flags.map(([, name]) => name), ...kind].join(" "), role: "option" });
    node.dataset.i = index;
    node.dataset.u = levelOf(Math.max(0, ...receipts.map((receipt) => receipt.entropy)));
    node.tabIndex = index ? -1 : 0;
    node.textContent = text === "" ? "■" : text;
    if (kind.length) node.setAttribute("aria-label", text === "" ? "end of the answer" : text.includes("\n") ? "new line" : "space");
    return node;
  }

  _count(receipt) {
    this.steps.push(receipt);
    this.totals.add(receipt);
    if (this._rows) this._rows.append(receiptRow(receipt, this.steps.length));
  }

  _summarise() {
    this._outcome.hidden = !this.steps.length;
    if (!this.steps.length) return;
    this._drawn = performance.now();
    this._told.replaceChildren(...this._totals().childNodes);
    this.draw();
  }

  _totals() {
    const { steps, firedCount, flipCount, mean, kl } = this.totals;
    const seconds = (performance.now() - this._began) / 1000;
    const steered = this.tau !== undefined;
    const often = make("span", {}, percent(firedCount / steps), make("span", { class: "also" }, ` ${firedCount} of ${steps}`));
    return facts({
      fired: steered ? often : null,
      tokens: steered ? null : String(steps),
      flips: steered ? String(flipCount) : null,
      "mean entropy": nats(mean),
      "KL a step": steered ? nats(kl / steps).replace(" nats", "") : null,
      "tokens/s": this._reason ? this._rate : (this._rate = seconds > 0.2 ? String(Math.round(steps / seconds)) : null),
      ended: this._reason ? ENDINGS[this._reason] ?? this._reason : null,
    });
  }

  /** Draw both pictures as wide as they may be. */
  draw() {
    const tau = this.tau ?? null;
    const width = this._pictures.clientWidth;
    if (!width || !this.steps.length) return;
    const side = width < 380 ? Math.floor(width * 0.38) : 170;
    this._strip.replaceChildren(stripOf(this.totals, tau, width - side - 12));
    this._histogram.replaceChildren(histogramOf(this.totals, tau, side));
  }

  // What one can do with it

  _listen() {
    const listen = (type, act) => this._tokens.addEventListener(type, (event) => act(event));
    listen("pointerover", (event) => this._point(event.target));
    listen("pointerout", hideTipSoon);
    listen("focusin", (event) => this._focused(event.target));
    listen("focusout", hideTip);
    listen("click", (event) => this._indexOf(event.target) !== null && event.target.focus());
    listen("keydown", (event) => this._key(event));
    this._strip.addEventListener("click", (event) => this._pick(event));
    this._toggle.addEventListener("click", () => this._toggleTable());
  }

  _indexOf(node) {
    return node.dataset?.i === undefined ? null : Number(node.dataset.i);
  }

  _point(node) {
    const index = this._indexOf(node);
    if (index !== null) showTip(node, describe(this.pieces[index].receipts, this.pieces[index].first));
  }

  _focused(node) {
    const index = this._indexOf(node);
    if (index === null) return;
    this.pieces[this._current].node.tabIndex = -1;
    this._current = index;
    node.tabIndex = 0;
    this._point(node);
  }

  _key(event) {
    const to = this._target(event.key);
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.focus(to);
  }

  /** The piece that a key leads to, from the current one. */
  _target(key) {
    const at = this._current;
    const flips = this.pieces.flatMap((piece, i) => (piece.receipts.some((receipt) => receipt.flip) ? [i] : []));
    switch (key) {
      case "ArrowRight": return Math.min(at + 1, this.pieces.length - 1);
      case "ArrowLeft": return Math.max(at - 1, 0);
      case "ArrowDown": return flips.find((i) => i > at) ?? at;
      case "ArrowUp": return flips.findLast((i) => i < at) ?? at;
      case "Home": return 0;
      case "End": return this.pieces.length - 1;
    }
  }

  focus(index) {
    const { node } = this.pieces[index];
    node.scrollIntoView({ block: "nearest" });
    node.focus({ preventScroll: true });
  }

  /** A click on a bar goes to its token. */
  _pick(event) {
    const width = this._strip.firstChild.clientWidth;
    const step = stepAt(this.totals, width, event.clientX - this._strip.getBoundingClientRect().left) + 1;
    const index = this.pieces.findLastIndex((piece) => piece.first <= step);
    if (step >= 1 && step <= this.steps.length) this.focus(index);
  }

  _toggleTable() {
    const open = this._receipts.hidden;
    this._receipts.hidden = !open;
    this._toggle.setAttribute("aria-expanded", String(open));
    if (!open || this._rows) return;
    const made = table("What each step did; probabilities at temperature 1", RECEIPT_HEADS, []);
    this._rows = made.tBodies[0];
    this._rows.append(...this.steps.map((receipt, i) => receiptRow(receipt, i + 1)));
    this._receipts.append(scroller("Receipts", made));
  }
}

const ENDINGS = { stop: "by itself", length: "at its token limit", stopped: "by you", error: "by an error" };
const RECEIPT_HEADS = ["step", "token", "entropy", "did", "base’s first", "steered’s first", "p of token, base", "steered", "KL"];

function receiptRow(receipt, step) {
  const did = receipt.flip ? "fired, flip" : receipt.fired ? "fired" : "–";
  const base = [chip(receipt.base_token), ` ${chance(receipt.base_token_logprob)}`];
  const steered = [chip(receipt.steered_token), ` ${chance(receipt.steered_token_logprob)}`];
  const both = [base, steered].map((nodes) => make("span", { class: "whole" }, ...nodes));
  const cells = [String(step), chip(receipt.token), receipt.entropy.toFixed(2), did, ...both];
  const made = row([...cells, chance(receipt.base_logprob), chance(receipt.steered_logprob), receipt.kl.toFixed(3)]);
  if (receipt.flip) made.className = "flips";
  return made;
}

/** Which piece of a chunk's text is whose: a token each, or one piece for all where a character spans tokens. */
function divide(text, receipts) {
  if (!receipts.length) return text ? [[text, []]] : [];
  const shown = receipts.map((receipt) => receipt.token);
  if (receipts.length > 1 && shown.join("") === text) return receipts.map((receipt, i) => [shown[i], [receipt]]);
  return [[text, receipts]];
}
