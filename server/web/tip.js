// One tooltip for every token, by pointer and by keyboard. Invariant: it describes the token that was reached last, by
// either; Escape takes it away, and the pointer may rest on it.

const tip = find("tip");
const SHUT_AFTER = 120; // ms, in which the pointer can cross from the token into the tooltip
let shutting = 0;
let described = null;

function showTip(node, content) {
  clearTimeout(shutting);
  described?.removeAttribute("aria-describedby");
  described = node;
  node.setAttribute("aria-describedby", "tip");
  tip.replaceChildren(content);
  tip.hidden = false;
  placeTip(node);
}

function hideTip() {
  clearTimeout(shutting);
  described?.removeAttribute("aria-describedby");
  described = null;
  tip.hidden = true;
}

function hideTipSoon() {
  clearTimeout(shutting);
  shutting = setTimeout(hideTip, SHUT_AFTER);
}

/** Below the token, or above where there is no room; always inside the window. */
function placeTip(node) {
  const gap = 6;
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const below = at.bottom + gap + height < innerHeight;
  const left = Math.max(gap, Math.min(at.left, innerWidth - width - gap));
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${below ? at.bottom + gap : Math.max(gap, at.top - gap - height)}px`);
}

tip.addEventListener("pointerenter", () => clearTimeout(shutting));
tip.addEventListener("pointerleave", hideTipSoon);
addEventListener("scroll", followToken, { capture: true, passive: true });

/** A token that has the focus keeps its tooltip when it is scrolled; another loses it. */
function followToken() {
  if (described === null) return;
  if (described === document.activeElement) placeTip(described);
  else hideTip();
}

/** What the steps behind one piece of text did. */
function describe(receipts, first) {
  const nodes = receipts.map((receipt, i) => describeStep(receipt, first + i));
  return fill(document.createDocumentFragment(), {}, nodes);
}

function describeStep(receipt, step) {
  const { fired, flip, token, base_token, steered_token } = receipt;
  const did = fired ? `fired at strength ${number(receipt.strength)}` : receipt.open ? "open, not fired" : "gate shut";
  const after = fired ? ` → ${chance(receipt.steered_logprob)}` : "";
  const lines = [line("drawn", chip(token), ` ${chance(receipt.base_logprob)}${after}`)];
  const base = [chip(base_token), ` ${chance(receipt.base_token_logprob)}`];
  const steered = [chip(steered_token), ` ${chance(receipt.steered_token_logprob)}`];
  lines.push(flip ? line("flip", ...base, " → ", ...steered) : line("most likely", ...base));
  if (fired) lines.push(line("moved by", `${receipt.kl.toFixed(3)} nats (KL)`));
  const head = make("p", { class: "head" }, `Step ${step} · entropy ${nats(receipt.entropy)} · ${did}`);
  return make("div", { class: flip ? "step flips" : "step" }, head, ...lines);
}

function line(name, ...content) {
  return make("p", {}, make("span", { class: "name" }, name), " ", ...content);
}
