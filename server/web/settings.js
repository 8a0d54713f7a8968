// What is asked for besides the message. Invariant: strength and tau are the chosen correction's own, to the last digit,
// until their slider is moved; another choice goes back to them.

// Of each gate: how far tau goes. Nothing is compared where it is always open.
const TAU_RANGES = {
  entropy: { min: 0, max: 4, step: 0.05 },
  varentropy: { min: 0, max: 8, step: 0.1 },
  margin: { min: -1, max: 0, step: 0.01 },
  random: { min: 0, max: 1, step: 0.01 },
};

const settings = {
  corrections: new Map(), // name -> what /v1/corrections/{name} says

  /** The chosen correction, or null. */
  get correction() {
    return this.corrections.get(find("correction").value) ?? null;
  },

  moved: new Set(), // of the two sliders

  get strength() {
    return this.moved.has("strength") ? valueOf("strength") : this.correction.strength;
  },

  get tau() {
    return this.moved.has("tau") ? valueOf("tau") : this.correction.gate.tau;
  },

  /** tau, where it is compared with the entropy; undefined without a correction. */
  get entropyTau() {
    if (!this.correction) return undefined;
    return this.correction.gate.kind === "entropy" ? this.tau : null;
  },

  get beside() {
    return this.correction !== null && find("beside").checked;
  },

  /** The sampling's part of a body. */
  sampling() {
    const whole = (id, least) => Math.max(least, Math.round(valueOf(id) || 0));
    return { temperature: valueOf("temperature"), max_tokens: whole("max-tokens", 1), seed: whole("seed", 0) };
  },

  /** The body's `steering`: a receipt for each token, and the correction where one is wanted. */
  steering(steered) {
    const report = { report: "tokens" };
    if (!steered) return report;
    const { id, gate } = this.correction;
    return { ...report, correction: id, strength: this.strength, ...(gate.kind in TAU_RANGES ? { tau: this.tau } : {}) };
  },

  /** How the correction acts, in words. */
  how() {
    const gate = { ...this.correction.gate, tau: this.tau };
    return `strength ${number(this.strength)}, ${gateWords(gate)}`;
  },

  /** Offer these, in the order given, and none; what was chosen stays so. */
  offer(corrections) {
    const before = find("correction").value;
    this.corrections = new Map(corrections.map((correction) => [correction.id, correction]));
    const named = corrections.map((one) => make("option", { value: one.id }, discouraged(one) ? `${one.id} (see its report)` : one.id));
    find("correction").replaceChildren(...named, make("option", { value: "" }, "none: the base alone"));
    if (this.corrections.has(before)) find("correction").value = before;
    else this.reset();
  },

  /** The chosen correction's own values. */
  reset() {
    this.moved.clear();
    const { correction } = this;
    const range = TAU_RANGES[correction?.gate.kind];
    find("strength").disabled = find("beside").disabled = !correction;
    find("tau").disabled = !range;
    if (correction) set("strength", { min: 0, max: Math.max(2, 2 * correction.strength), step: 0.05 }, correction.strength);
    if (range) set("tau", { ...range, max: Math.max(range.max, correction.gate.tau) }, correction.gate.tau);
    this.show();
  },

  /** Beside each slider, its value; below it, whose it is. */
  show() {
    const { correction } = this;
    const gate = correction?.gate;
    find("temperature-is").value = number(valueOf("temperature")) + (valueOf("temperature") ? "" : ", greedy");
    find("strength-is").value = correction ? number(this.strength) : "–";
    find("tau-is").value = gate?.kind in TAU_RANGES ? number(this.tau) : "–";
    find("strength-own").textContent = correction ? `its own: ${number(correction.strength)}; 0 is the base` : "";
    find("tau-own").textContent = gate ? `its own: ${gateWords(gate)}` : "";
  },
};

const valueOf = (id) => Number(find(id).value);

function set(id, range, value) {
  Object.assign(find(id), range);
  find(id).value = value;
}

find("correction").addEventListener("change", () => settings.reset());
find("settings").addEventListener("input", (event) => {
  settings.moved.add(event.target.id);
  settings.show();
});
find("settings").addEventListener("submit", (event) => event.preventDefault());
find("new-seed").addEventListener("click", () => {
  find("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
