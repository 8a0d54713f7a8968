// OpenAI's client for Node, steered: keys it does not know are sent as they are.
//
//     npm install openai && TRIMTAB_BASE_URL=http://127.0.0.1:8000/v1 node openai_node.mjs

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.TRIMTAB_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.TRIMTAB_API_KEY ?? "none", // the client insists on one
});
const models = (await client.models.list()).data;
const base = models[0].id; // a server lists its base first
const correction = models.find((model) => model.parent).id;

const answer = await client.chat.completions.create({
  model: correction, // a correction's name is a model's name
  messages: [{ role: "user", content: "Write one short sentence about the sea." }],
  max_tokens: 40,
});
console.log(answer.choices[0].message.content);

const stream = await client.chat.completions.create({
  model: base,
  messages: [{ role: "user", content: "And one about the moon." }],
  max_tokens: 40,
  stream: true,
  steering: { correction, strength: 0.5, report: "tokens" },
});
let steps = 0;
let fired = 0;
for await (const chunk of stream) {
  for (const choice of chunk.choices) {
    process.stdout.write(choice.delta.content ?? "");
    for (const receipt of choice.steering?.tokens ?? []) {
      steps += 1;
      fired += receipt.fired;
    }
  }
}
console.log(`\n${steps} steps; ${correction} acted at ${fired} of them`);
