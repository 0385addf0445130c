// The @anthropic-ai/sdk package for JavaScript: messages.
import Anthropic from "@anthropic-ai/sdk";
import { bird, insist, key, model, question, run, url, weather } from "./checks.mjs";

const client = new Anthropic({ baseURL: url, apiKey: key, maxRetries: 0, timeout: 300000 });
const messages = [{ role: "user", content: "Name a bird." }];
const tools = [{ name: "weather", description: "tells the weather of a city", input_schema: weather }];

await run({
  async text() {
    const answer = await client.messages.create({ model, messages, max_tokens: 20 });
    insist(answer.content[0].text);
    const counted = await client.messages.countTokens({ model, messages });
    insist(counted.input_tokens === answer.usage.input_tokens + answer.usage.cache_read_input_tokens);
  },
  async streaming() {
    const whole = await client.messages.create({ model, messages, max_tokens: 20, temperature: 0 });
    const final = await client.messages.stream({ model, messages, max_tokens: 20, temperature: 0 }).finalMessage();
    insist(final.content[0].text === whole.content[0].text);
  },
  async history() {
    const first = await client.messages.create({ model, messages, max_tokens: 20 });
    const said = [...messages, { role: "assistant", content: first.content }, { role: "user", content: "Another." }];
    insist((await client.messages.create({ model, messages: said, max_tokens: 20 })).content[0].text);
  },
  async tools() {
    const said = [{ role: "user", content: question }];
    const request = { model, max_tokens: 100, tools };
    const stream = client.messages.stream({ ...request, messages: said, tool_choice: { type: "any" } });
    const answer = await stream.finalMessage();
    const call = answer.content.find((block) => block.type === "tool_use");
    insist(answer.stop_reason === "tool_use" && call.input.city);
    const result = { type: "tool_result", tool_use_id: call.id, content: "sunny" };
    said.push({ role: "assistant", content: answer.content }, { role: "user", content: [result] });
    insist((await client.messages.create({ ...request, messages: said })).content.length);
  },
  async "structured output"() {
    const output_config = { format: { type: "json_schema", schema: bird } };
    const answer = await client.messages.create({ model, messages, max_tokens: 100, output_config });
    insist(Number.isInteger(JSON.parse(answer.content[0].text).legs));
  },
  async errors() {
    const error = await client.messages
      .create({ model: "nothing-like-it", messages, max_tokens: 5 })
      .catch((error) => error);
    insist(error instanceof Anthropic.NotFoundError, String(error));
  },
});
