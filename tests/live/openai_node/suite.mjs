// The official `openai` package for Node, unchanged, against a running server: prints what came of each call as JSON.
//
//     npm ci && node suite.mjs http://127.0.0.1:8471/v1
//
// tests/live/test_openai_packages.py runs it, and the same calls by the package for Python, and compares both.

import OpenAI from "openai";

const baseURL = process.argv[2];
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Who is there?" }];
const drawn = { model, temperature: 0.8, seed: 11 };
const told = {};

const nameOf = async (promise) => {
  try {
    await promise;
    return "none";
  } catch (error) {
    return error.constructor.name;
  }
};

told.models = [model, (await client.models.retrieve(model)).id];

const chat = await client.chat.completions.create({ ...drawn, messages, max_completion_tokens: 24 });
told.chat = [chat.choices[0].message.content, chat.choices[0].finish_reason, chat.usage.total_tokens];

let text = "";
let usage = null;
const chunks = await client.chat.completions.create({
  ...drawn,
  messages,
  max_completion_tokens: 24,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of chunks) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
told.stream = [text, usage.total_tokens];

const completion = await client.completions.create({ ...drawn, prompt: ["ROMEO:\n", "JULIET:\n"], max_tokens: 12 });
told.completion = completion.choices.map((choice) => choice.text);

const several = await client.chat.completions.create({ ...drawn, messages, max_completion_tokens: 8, n: 3 });
told.n = several.choices.map((choice) => choice.message.content);

const stopped = await client.chat.completions.create({ ...drawn, messages, max_completion_tokens: 24, stop: ["e"] });
told.stop = [stopped.choices[0].message.content, stopped.choices[0].finish_reason];

const probable = await client.chat.completions.create({
  ...drawn,
  messages,
  max_completion_tokens: 4,
  logprobs: true,
  top_logprobs: 2,
});
told.logprobs = probable.choices[0].logprobs.content.map((entry) => [
  entry.bytes,
  Number(entry.logprob.toFixed(4)),
  entry.top_logprobs.length,
]);

told.errors = [
  await nameOf(client.chat.completions.create({ model, messages, temperature: -1 })),
  await nameOf(client.chat.completions.create({ model, messages, nonsense: 1 })),
  await nameOf(client.chat.completions.create({ model: "another", messages })),
  await nameOf(client.completions.create({ model, prompt: "x", max_tokens: 200, ignore_eos: true }, { timeout: 20 })),
];

const crowd = (options) =>
  Array.from({ length: 24 }, () =>
    client.completions.create({ model, prompt: "x", max_tokens: 16, ignore_eos: true, seed: 1 }, options),
  );
const refused = await Promise.all(crowd({ maxRetries: 0 }).map(nameOf));
told.refused = [...new Set(refused)].sort();
const patient = await Promise.all(crowd({ maxRetries: 20 }));
told.patient = new Set(patient.map((answer) => answer.choices[0].text)).size;

console.log(JSON.stringify(told));
