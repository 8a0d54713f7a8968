// The corrections, and what is known of them. Invariant: what a correction does not beat is said in words, and alone
// where its report is against serving it; a correction without a report is called never evaluated.

const OWN = "correction"; // what a report calls the correction itself

/** The panel's entry for each. */
function listCorrections(corrections) {
  const none = make("p", { class: "note" }, "This server has none.");
  find("corrections").replaceChildren(...(corrections.length ? corrections.map(entryOrWhy) : [none]));
}

/** Reports are whoever's who made them: one that cannot be shown keeps nobody from the others. */
function entryOrWhy(correction) {
  try {
    return entry(correction);
  } catch (error) {
    const why = make("p", { class: "verdict unknown" }, `Its report cannot be shown (${error.message}).`);
    return make("article", { class: "correction", "aria-label": correction.id }, make("h3", {}, correction.id), why);
  }
}

function entry(correction) {
  const { id, tier, slots, report } = correction;
  const where = `${tier}, ${slots === 1 ? "one slot" : "two slots"} an answer`;
  const about = make("article", { class: "correction", "aria-label": id }, make("h3", {}, id), make("p", { class: "note" }, where));
  about.append(verdictOf(correction));
  if (report) {
    const open = make("button", { type: "button", class: "quiet" }, "Full report");
    open.addEventListener("click", () => showReport(correction));
    about.append(forest("over", ownDifferences(report), ({ against }) => against), open);
  }
  return about;
}

/** Whether it has a report, and that is against serving it. */
const discouraged = ({ report }) => Boolean(report) && !report.verdict?.ship;

function verdictOf(correction) {
  const { tier, report } = correction;
  if (!report) {
    const why = tier === "contrast" ? "Nothing was learned for it, and it was never evaluated." : "Never evaluated: it has no report.";
    return make("p", { class: "verdict unknown" }, why);
  }
  const beats = Object.entries(report.verdict?.beats ?? {});
  const [won, lost] = [true, false].map((better) => beats.flatMap(([name, is]) => (is === better ? [name] : [])).join(", "));
  if (discouraged(correction)) return verdict("lost", "✕ ", `Does not beat ${lost || "its controls"}.`);
  return verdict("won", "✓ ", `Beats ${won}${lost && `; does not beat ${lost}`}.`);
}

const verdict = (kind, sign, words) => make("p", { class: `verdict ${kind}` }, make("span", { "aria-hidden": "true" }, sign), words);

const ownDifferences = (report) => (report.differences ?? []).filter(({ policy }) => policy === OWN);

/** Differences with their intervals, as a table with a picture in each row. */
function forest(head, differences, nameOf) {
  const reach = Math.max(0.05, ...differences.flatMap(({ low, high }) => [Math.abs(low), Math.abs(high)]));
  const rows = differences.map((one) => [nameOf(one), interval(one, reach), gainOf(one)]);
  const made = table("Gain in pass@1, with its 95 % interval", [head, "", "gain"], rows);
  made.className = "forest";
  return made;
}

const gainOf = ({ mean, low, high }) => make("span", {}, signed(mean), make("span", { class: "bounds" }, ` [${signed(low)}, ${signed(high)}]`));

/** A line from low to high, a dot at the mean, and where 0 is. The numbers beside it say the same. */
function interval({ mean, low, high }, reach) {
  const xOf = (value) => round(48 + (value / reach) * 44);
  const side = low > 0 ? "above" : high < 0 ? "below" : "around";
  return drawn(
    "svg", { width: 96, height: 14, viewBox: "0 0 96 14", class: `interval ${side}`, "aria-hidden": "true" },
    drawn("path", { class: "zero", d: "M48 0V14" }),
    drawn("path", { class: "span", d: `M${xOf(low)} 7H${xOf(high)}` }),
    drawn("circle", { cx: xOf(mean), cy: 7, r: 3 }),
  );
}

// The full report

function showReport(correction) {
  const { id, report } = correction;
  const shut = make("button", { type: "button", class: "quiet" }, "Close");
  shut.addEventListener("click", () => find("report").close());
  const head = make("div", { class: "head" }, make("h2", { id: "report-title" }, id), shut);
  const differences = forest("policies", report.differences ?? [], ({ policy, against }) => `${policy} − ${against}`);
  find("report").replaceChildren(head, verdictOf(correction), make("p", {}, report.verdict?.summary ?? ""), setUp(correction),
    scroller("Policies", policyTable(report.policies ?? [])), scroller("Differences", differences));
  find("report").showModal();
}

function setUp({ tier, gate, strength, report, provenance, version }) {
  const { sampling = {} } = report;
  const asked = `${report.problems} ${report.split} problems of ${report.task}, ${sampling.samples} samples each, temperature ${sampling.temperature}, top_p ${sampling.top_p}, at most ${sampling.max_tokens} tokens`;
  const strengths = Object.entries(report.strengths ?? {}).map(([name, value]) => `${name} ${number(value)}`);
  return facts({
    acts: `${tier}, strength ${number(strength)} ${gateWords(gate)}`,
    asked,
    interval: report.interval,
    strengths: strengths.join(", "),
    hardware: report.hardware,
    made: provenance?.method,
    version,
  });
}

// Nothing where nothing measured it: a LoRA that runs alone has no base beside it to compare with.
function known(figure, words) {
  return figure === null ? "" : words(figure);
}

function policyTable(policies) {
  const heads = ["policy", "pass@1", "95 % interval", "tokens", "cut off", "fired", "flips", "KL a token"];
  const rows = policies.map((one) => [
    one.policy, one.pass_at_1.toFixed(3), `[${one.low.toFixed(3)}, ${one.high.toFixed(3)}]`, one.length.toFixed(1),
    percent(one.truncated), percent(one.fired), known(one.flips, percent), known(one.kl_token, (kl) => kl.toFixed(3)),
  ]);
  return table("How often each policy was right", heads, rows);
}
