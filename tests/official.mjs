// OpenAI's own client for Node along its ordinary paths: a script for any version of it. See official.py.
//
// TRIMTAB_BASE_URL=... TRIMTAB_API_KEY=... node official.mjs  ->  {"version": "7.57.0", "chats": "ok", ...}

import assert from "node:assert/strict";
import OpenAI from "openai";
import { VERSION } from "openai/version";

const client = new OpenAI({
  baseURL: process.env.TRIMTAB_BASE_URL,
  apiKey: process.env.TRIMTAB_API_KEY ?? "none",
  maxRetries: 0,
});
const model = process.env.TRIMTAB_MODEL || (await client.models.list()).data[0].id;
const schema = {
  type: "object",
  properties: { rain: { type: "boolean" }, sky: { enum: ["grey", "blue"] } },
  required: ["rain", "sky"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "look", description: "Look up.", parameters: schema } }];
const chat = { model, messages: [{ role: "user", content: "Is it raining in Ulm?" }], max_tokens: 12, seed: 1 };

const paths = {
  async models() {
    const ids = [];
    for await (const entry of client.models.list()) ids.push(entry.id);
    assert(ids.includes(model));
    assert.equal((await client.models.retrieve(ids.at(-1))).id, ids.at(-1));
  },
  async chats() {
    const answer = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 2 });
    assert(["stop", "length"].includes(answer.choices[0].finish_reason));
    assert(answer.choices[0].logprobs.content.every((entry) => entry.top_logprobs.length === 2));
    assert(answer.usage.completion_tokens > 0);
  },
  async stream() {
    const whole = await client.chat.completions.create(chat);
    const asked = { ...chat, stream: true, stream_options: { include_usage: true } };
    let text = "";
    let last;
    for await (last of await client.chat.completions.create(asked)) text += last.choices[0]?.delta.content ?? "";
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual(last.usage, whole.usage);
  },
  async stream_helper() {
    const final = await client.chat.completions.stream(chat).finalChatCompletion();
    assert.equal(final.choices[0].message.role, "assistant");
  },
  async completions() {
    const asked = { model, prompt: ["It rains", "It snows"], max_tokens: 8, seed: 1, n: 2 };
    const answer = await client.completions.create({ ...asked, logprobs: 2 });
    const texts = ["", "", "", ""];
    for await (const chunk of await client.completions.create({ ...asked, stream: true }))
      for (const choice of chunk.choices) texts[choice.index] += choice.text;
    assert.deepEqual(texts, answer.choices.map((choice) => choice.text));
  },
  async errors() {
    const failed = client.chat.completions.create({ ...chat, model: "no-such-model" });
    await assert.rejects(failed, (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
  },
  async json_schema() {
    const response_format = { type: "json_schema", json_schema: { name: "weather", schema, strict: true } };
    const answer = await client.chat.completions.create({ ...chat, max_tokens: 400, response_format });
    assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)).sort(), ["rain", "sky"]);
  },
  async tools() {
    const asked = { ...chat, max_tokens: 600, tools };
    const required = { tool_choice: "required", parallel_tool_calls: false };
    const answer = await client.chat.completions.create({ ...asked, ...required });
    const { message, finish_reason } = answer.choices[0];
    assert.equal(finish_reason, "tool_calls");
    assert.equal(message.tool_calls[0].function.name, "look");
    assert.deepEqual(Object.keys(JSON.parse(message.tool_calls[0].function.arguments)).sort(), ["rain", "sky"]);
    const back = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "It pours." };
    const messages = [...chat.messages, message, back];
    assert((await client.chat.completions.create({ ...asked, messages, tool_choice: "none" })).choices.length);
  },
  async tools_auto() {
    const { finish_reason, message } = (await client.chat.completions.create({ ...chat, tools })).choices[0];
    assert.equal(finish_reason === "tool_calls", Boolean(message.tool_calls?.length));
  },
  async tools_stream() {
    const asked = { ...chat, max_tokens: 600, tools, tool_choice: { type: "function", function: { name: "look" } } };
    const whole = await client.chat.completions.create(asked);
    const joined = await client.chat.completions.stream(asked).finalChatCompletion();
    const [call] = joined.choices[0].message.tool_calls;
    assert.equal(call.function.arguments, whole.choices[0].message.tool_calls[0].function.arguments);
  },
  async responses() {
    const asked = { model, input: "Is it raining?", instructions: "Be brief.", max_output_tokens: 16 };
    const answer = await client.responses.create(asked);
    assert(["completed", "incomplete"].includes(answer.status));
    assert(answer.usage.output_tokens > 0);
    assert.equal(typeof answer.output_text, "string");
  },
  async responses_stream() {
    const kinds = [];
    let text = "";
    let whole;
    const asked = { model, input: "Is it raining?", max_output_tokens: 16, stream: true };
    for await (const event of await client.responses.create(asked)) {
      kinds.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
      if (event.response?.output.length) whole = event.response.output[0].content[0].text;
    }
    assert.equal(kinds[0], "response.created");
    assert(["response.completed", "response.incomplete"].includes(kinds.at(-1)));
    assert.equal(whole, text);
  },
  async responses_json_schema() {
    const text = { format: { type: "json_schema", name: "weather", schema, strict: true } };
    const answer = await client.responses.create({ model, input: "Is it raining?", max_output_tokens: 400, seed: 1, text });
    assert.deepEqual(Object.keys(JSON.parse(answer.output_text)).sort(), ["rain", "sky"]);
  },
  async responses_tools() {
    const tool = { type: "function", name: "look", parameters: schema, strict: true };
    const asked = { model, input: "Is it raining?", max_output_tokens: 600, seed: 1, tools: [tool], tool_choice: "required" };
    const call = (await client.responses.create(asked)).output.find((item) => item.type === "function_call");
    assert.deepEqual(Object.keys(JSON.parse(call.arguments)).sort(), ["rain", "sky"]);
  },
};

const told = { version: VERSION };
for (const [name, path] of Object.entries(paths)) {
  try {
    await path();
    told[name] = "ok";
  } catch (error) {
    told[name] = `${error.name}: ${error.message}`.slice(0, 300);
  }
}
console.log(JSON.stringify(told));
