// Two pictures of an answer's entropy: step by step, and how often which. Invariant: both have the same scale for every
// answer, so that answers can be compared; what lies above it is drawn at its end.

const TOP = 5; // nats, the end of the scale
const BIN = 0.25; // nats
const BINS = TOP / BIN;
const LEVELS = 8; // shades, half a nat each: the same in the text, the legend and the histogram
const HEIGHT = 84;
const EDGE = { left: 12, right: 12, top: 8, bottom: 16 };
const FEWEST = 48; // steps that a picture has room for at least, so that short answers are not stretched

const levelOf = (entropy) => Math.min(LEVELS, Math.floor(entropy * 2));

/** The steps of one answer, added up. */
class Totals {
  constructor() {
    this.entropies = [];
    this.fired = [];
    this.flips = [];
    this.bins = Array(BINS).fill(0);
    this.firedCount = this.flipCount = 0;
    this.sum = this.kl = 0;
  }

  add(receipt) {
    this.entropies.push(receipt.entropy);
    this.fired.push(receipt.fired);
    this.flips.push(receipt.flip);
    this.bins[Math.min(BINS - 1, Math.floor(receipt.entropy / BIN))] += 1;
    this.firedCount += receipt.fired;
    this.flipCount += receipt.flip;
    this.sum += receipt.entropy;
    this.kl += receipt.kl;
  }

  get steps() {
    return this.entropies.length;
  }

  get mean() {
    return this.steps ? this.sum / this.steps : 0;
  }
}

/** Entropy step by step. tau: null where the gate looks at something else. */
function stripOf(totals, tau, width) {
  const x0 = EDGE.left;
  const step = (width - EDGE.left - EDGE.right) / Math.max(FEWEST, totals.steps);
  const bar = Math.max(0.5, step - (step > 3 ? 1 : 0));
  const paths = { calm: "", fired: "" };
  totals.entropies.forEach((entropy, i) => {
    const x = (x0 + i * step).toFixed(2);
    paths[totals.fired[i] ? "fired" : "calm"] += `M${x} ${yOf(0)}V${yOf(Math.max(entropy, 0.04))}h${bar.toFixed(2)}V${yOf(0)}z`;
  });
  const dots = totals.flips.flatMap((flip, i) => (flip ? [drawn("circle", { cx: x0 + i * step + bar / 2, cy: 4, r: 2.2 })] : []));
  const name = `Entropy step by step: ${tell(totals)}`;
  const picture = drawn("svg", { role: "img", "aria-label": name, width, height: HEIGHT, class: "strip" });
  picture.append(...yAxis(width), drawn("path", { class: "calm", d: paths.calm }), drawn("path", { class: "fired", d: paths.fired }));
  picture.append(drawn("g", { class: "flips" }, ...dots));
  if (tau !== null) {
    const y = yOf(Math.min(tau, TOP));
    picture.append(drawn("path", { class: "tau", d: `M${x0} ${y}H${width - EDGE.right}` }));
    picture.append(drawn("text", { class: "tau-name", x: 1, y: y + 3.5 }, "τ"));
  }
  picture.append(drawn("text", { x: x0, y: HEIGHT - 3, class: "x" }, totals.steps === 1 ? "1 step" : `${totals.steps} steps`));
  return picture;
}

/** Which step lies at x of a strip. */
const stepAt = (totals, width, x) =>
  Math.floor((x - EDGE.left) / ((width - EDGE.left - EDGE.right) / Math.max(FEWEST, totals.steps)));

const yOf = (entropy) => round(EDGE.top + (1 - Math.min(entropy, TOP) / TOP) * (HEIGHT - EDGE.top - EDGE.bottom));
const round = (value) => Number(value.toFixed(2));

function yAxis(width) {
  const end = width - EDGE.right;
  return [0, 2, 4].flatMap((at) => [
    drawn("path", { class: "grid", d: `M${EDGE.left} ${yOf(at)}H${end}` }),
    drawn("text", { x: end + 13, y: yOf(at) + 3.5 }, String(at)),
  ]);
}

/** How many steps had which entropy. */
function histogramOf(totals, tau, width) {
  const plot = width - 8;
  const most = Math.max(1, ...totals.bins);
  const xOf = (value) => round((Math.min(value, TOP) / TOP) * plot);
  const base = HEIGHT - EDGE.bottom;
  const bars = totals.bins.map((count, i) => {
    const height = round((count / most) * (base - EDGE.top));
    const x = xOf(i * BIN);
    return drawn("rect", { "data-u": levelOf(i * BIN), x, y: base - height, width: round(plot / BINS - 1), height });
  });
  const name = `Histogram of the entropy, in nats: ${tellBins(totals)}${tau === null ? "" : `; tau at ${number(tau)}`}`;
  const picture = drawn("svg", { role: "img", "aria-label": name, width, height: HEIGHT, class: "histogram" });
  picture.append(...bars, drawn("path", { class: "axis", d: `M0 ${base}H${plot}` }));
  for (const at of [0, 2, 4]) picture.append(drawn("text", { x: xOf(at), y: HEIGHT - 3, class: "x" }, at ? String(at) : "0 nats"));
  picture.append(drawn("text", { x: width, y: HEIGHT - 3 }, `${TOP}+`));
  if (tau !== null) {
    picture.append(drawn("path", { class: "tau", d: `M${xOf(tau)} ${EDGE.top - 2}V${base}` }));
    picture.append(drawn("text", { class: "tau-name", x: xOf(tau) + 3, y: EDGE.top + 5 }, `τ ${number(tau)}`));
  }
  return picture;
}

/** The totals in words. */
function tell(totals) {
  const { steps, firedCount, flipCount, mean } = totals;
  const share = steps ? ` (${percent(firedCount / steps)})` : "";
  return `${steps} steps, mean ${nats(mean)}; fired at ${firedCount}${share}, flips ${flipCount}`;
}

function tellBins(totals) {
  const told = totals.bins.map((count, i) => {
    const to = i === BINS - 1 ? "and more" : `to ${number((i + 1) * BIN)}`;
    return count ? `${number(i * BIN)} ${to}: ${count}` : null;
  });
  return told.filter(Boolean).join(", ") || "no steps yet";
}
