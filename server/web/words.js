// Numbers and tokens as people read them.

const number = (value, digits = 2) => String(Number(value.toFixed(digits)));
const nats = (value) => `${value.toFixed(2)} nats`;
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

/** A share in percent: small ones keep a digit that tells them from nothing. */
function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.01) return "<0.01 %";
  const digits = value >= 99.95 || value === 0 ? 0 : value < 0.1 ? 2 : 1;
  return `${value.toFixed(digits)} %`;
}

const chance = (logprob) => percent(Math.exp(logprob));

/** A token's text, where it would show nothing in words. */
function visible(token) {
  if (token === "") return "∅";
  const text = token.replaceAll("\r", "").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return text.trim() === "" ? text.replaceAll(" ", "␣") : text;
}

/** A token in a box; its spaces are kept. */
const chip = (token) => make("span", { class: "chip" }, visible(token));

/** When a gate opens, in words. */
function gateWords(gate) {
  const { kind, tau, ceiling } = gate;
  if (kind === "always") return "at every step";
  if (kind === "random") return `at a random ${percent(1 - tau)} of steps`;
  const upper = ceiling === null || ceiling === undefined ? "" : ` and at most ${number(ceiling)}`;
  if (kind === "margin") return `where the two best tokens are nearer than ${number(-tau)}${upper && " (with a ceiling)"}`;
  return `where the ${kind} is above ${number(tau)}${upper} ${kind === "entropy" ? "nats" : "nats²"}`;
}
