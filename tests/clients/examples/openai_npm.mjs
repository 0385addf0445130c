// The openai package for JavaScript: chat, responses and embeddings.
import OpenAI from "openai";
import { bird, insist, key, model, question, run, url, weather } from "./checks.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 300000 });
const messages = [{ role: "user", content: "Name a bird." }];
const parameters = { name: "weather", description: "tells the weather of a city", parameters: weather };

await run({
  async text() {
    const chat = await client.chat.completions.create({ model, messages, max_tokens: 20 });
    insist(chat.choices[0].message.content);
    insist((await client.responses.create({ model, input: "Name a bird.", max_output_tokens: 20 })).output_text);
  },
  async streaming() {
    const request = { model, input: "Name a bird.", max_output_tokens: 20, temperature: 0 };
    const whole = await client.responses.create(request);
    const stream = client.responses.stream(request);
    let text = "";
    for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
    insist(text === whole.output_text, `${text} is not ${whole.output_text}`);
    insist((await stream.finalResponse()).status);
    const chat = client.chat.completions.stream({ model, messages, max_tokens: 20 });
    insist(await chat.finalContent());
  },
  async history() {
    const first = await client.responses.create({ model, input: "Name a bird.", max_output_tokens: 20 });
    const input = [...messages, ...first.output, { role: "user", content: "Another." }];
    insist((await client.responses.create({ model, input, max_output_tokens: 20 })).output_text);
  },
  async tools() {
    const chat = await client.chat.completions.create({
      model, messages: [{ role: "user", content: question }], max_tokens: 100, tool_choice: "required",
      tools: [{ type: "function", function: parameters }],
    });
    insist(JSON.parse(chat.choices[0].message.tool_calls[0].function.arguments).city);
    const stream = client.responses.stream({
      model, input: question, max_output_tokens: 100, tool_choice: "required",
      tools: [{ type: "function", strict: true, ...parameters }],
    });
    const { output } = await stream.finalResponse();
    const call = output.find((item) => item.type === "function_call");
    insist(JSON.parse(call.arguments).city);
  },
  async "structured output"() {
    const format = { type: "json_schema", name: "bird", schema: bird, strict: true };
    const answer = await client.responses.create({
      model, input: "Name a bird.", text: { format }, max_output_tokens: 100,
    });
    insist(Number.isInteger(JSON.parse(answer.output_text).legs));
  },
  async embeddings() {
    const { data } = await client.embeddings.create({ model, input: ["a bird", "a plane"] });
    insist(Math.abs(data[0].embedding.reduce((sum, value) => sum + value * value, 0) - 1) < 1e-4);
  },
  async errors() {
    const error = await client.responses.create({ model: "nothing-like-it", input: "x" }).catch((error) => error);
    insist(error instanceof OpenAI.NotFoundError, String(error));
  },
});
