// The server, asked. Invariant: whatever goes wrong is a Trouble whose message says so in words, the server's where it
// has some. The key stays in this tab.

const KEY = "trimtab-api-key";

class Trouble extends Error {
  /** status: 0 when there was no answer, or only a part of one. wait: seconds that the server asks for. */
  constructor(message, status = 0, wait = 0) {
    super(message);
    this.status = status;
    this.wait = wait;
  }
}

/** A response that is well. Raises Trouble, and lets an abort through. */
async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const message = messageOf(await response.text().catch(() => ""));
  const wait = Number(response.headers.get("Retry-After")) || 0;
  throw new Trouble(message ?? `The server answered ${response.status} ${response.statusText}`, response.status, wait);
}

const askJson = async (path) => (await ask(path)).json();

function messageOf(text) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return null;
  }
}

/** The chunks of a streamed chat. Raises Trouble where the stream says so, or breaks off. */
async function* chunksOf(body, signal) {
  const response = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of dataOf(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Trouble(chunk.error.message);
    yield chunk;
  }
  throw new Trouble("The connection broke in the middle of the answer. What had come is kept.");
}

/** The data of a stream's events: this server writes each as one line. */
async function* dataOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch(gone);
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6).trimEnd();
  }
}

/** What a broken read means: an abort is the reader's wish, all else an end without [DONE]. */
function gone(error) {
  if (error.name === "AbortError") throw error;
  return { done: true };
}
