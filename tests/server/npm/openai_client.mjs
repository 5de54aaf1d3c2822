// The official npm client against a server with the tests' model. SERVER_URL says where it is.
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.SERVER_URL}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "hello" }];
const tools = [{ type: "function", function: { name: "get_weather", parameters: { type: "object" } } }];
const chat = (more = {}) => client.chat.completions.create({ model: "fake", messages, seed: 1, ...more });

test("chat", async () => {
  const answer = await chat();
  assert.equal(answer.object, "chat.completion");
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.match(answer.choices[0].message.content, /^Once .*\.$/);
  assert.equal(answer.usage.prompt_tokens, 5);
  assert.equal(answer.usage.total_tokens, 5 + answer.usage.completion_tokens);
  assert.ok(answer.usage.completion_tokens_details.denoising_steps > 0);
  assert.match(answer._request_id, /^req_/);
});

test("seed", async () => {
  const [one, again, other] = await Promise.all([chat(), chat(), chat({ seed: 2 })]);
  assert.equal(one.choices[0].message.content, again.choices[0].message.content);
  assert.notEqual(one.choices[0].message.content, other.choices[0].message.content);
});

test("stream and usage", async () => {
  const whole = await chat();
  let text = "", usage = null, reasons = [];
  for await (const chunk of await chat({ stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? "";
    if (chunk.choices[0]?.finish_reason) reasons.push(chunk.choices[0].finish_reason);
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage, whole.usage);
  assert.deepEqual(reasons, ["stop"]);
});

test("stop, n and a budget", async () => {
  const answer = await chat({ n: 2, stop: [" fox", " hill"], max_completion_tokens: 500 });
  const whole = await Promise.all([chat(), chat({ seed: 2 })]);
  answer.choices.forEach((choice, index) => {
    assert.equal(choice.index, index);
    assert.equal(choice.message.content, whole[index].choices[0].message.content.split(/ fox| hill/)[0]);
  });
  const short = await chat({ max_completion_tokens: 3 });
  assert.equal(short.choices[0].finish_reason, "length");
  assert.equal(short.usage.completion_tokens, 3);
});

test("log-probabilities", async () => {
  const { logprobs, message } = (await chat({ logprobs: true, top_logprobs: 2, max_tokens: 6 })).choices[0];
  assert.equal(logprobs.content.map(({ token }) => token).join(""), message.content);
  assert.ok(logprobs.content.every(({ top_logprobs }) => top_logprobs.length === 2));
});

test("thoughts are apart", async () => {
  const { message } = (await chat({ reasoning_effort: "high" })).choices[0];
  assert.equal(message.reasoning_content, "I think about 5 letters.");
  assert.match(message.content, /^Once/);
});

test("tools", async () => {
  const asked = { messages: [{ role: "user", content: "WEATHER" }], tools };
  const { message, finish_reason } = (await chat(asked)).choices[0];
  assert.equal(finish_reason, "tool_calls");
  assert.equal(message.tool_calls[0].function.name, "get_weather");
  assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: "Oslo" });
  const final = await client.chat.completions.stream({ model: "fake", ...asked }).finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.name, "get_weather");
  const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "rain" };
  assert.ok((await chat({ messages: [...asked.messages, message, result] })).choices[0].message.content);
});

test("errors", async () => {
  const say = (content) => ({ messages: [{ role: "user", content }] });
  const refused = async (more, kind, param, code) => {
    const error = await chat(more).then(() => assert.fail("it was not refused"), (caught) => caught);
    assert.ok(error instanceof kind, String(error));
    assert.equal(error.param, param);
    assert.equal(error.code, code);
  };
  await refused({ temperature: 5 }, OpenAI.BadRequestError, "temperature", "invalid_value");
  await refused({ nonsense: 1 }, OpenAI.BadRequestError, "nonsense", "unknown_parameter");
  await refused({ presence_penalty: 1 }, OpenAI.BadRequestError, "presence_penalty", "unsupported_value");
  await refused({ model: "other" }, OpenAI.NotFoundError, "model", "model_not_found");
  await refused(say("FULL"), OpenAI.RateLimitError, null, "rate_limit_exceeded");
  await refused(say("TOOLONG"), OpenAI.BadRequestError, "messages", "context_length_exceeded");
  await refused(say("DRAINING"), OpenAI.InternalServerError, null, "draining");
  const cut = async () => { for await (const _ of await chat({ ...say("NAN"), stream: true })); };
  await assert.rejects(cut, (error) => error instanceof OpenAI.APIError && error.code === "generation_failed");
});

test("cancellation", async () => {
  const running = async () => {
    const text = await (await fetch(`${process.env.SERVER_URL}/metrics`)).text();
    return Number(/^dgemma_requests_running (.*)$/m.exec(text)[1]);
  };
  const idle = async () => {
    for (let tries = 0; tries < 400; tries += 1) {
      if ((await running()) === 0) return;
      await new Promise((resolve) => setTimeout(resolve, 25));
    }
    assert.fail("the place was not freed");
  };
  const long = { model: "fake", messages: [{ role: "user", content: "LONG" }] };
  const stream = await client.chat.completions.create({ ...long, stream: true });
  let chunks = 0;
  for await (const _ of stream) if ((chunks += 1) === 3) break;
  await idle();
  const abort = new AbortController();
  setTimeout(() => abort.abort(), 300);
  await assert.rejects(client.chat.completions.create(long, { signal: abort.signal }), OpenAI.APIUserAbortError);
  await idle();
});

test("completions and models", async () => {
  const answer = await client.completions.create({ model: "fake", prompt: ["a", "b"], seed: 1, logprobs: 1, max_tokens: 4 });
  assert.deepEqual(answer.choices.map(({ index }) => index), [0, 1]);
  assert.equal(answer.choices[0].logprobs.tokens.join(""), answer.choices[0].text);
  assert.deepEqual((await client.models.list()).data.map(({ id }) => id), ["fake"]);
  assert.equal((await client.models.retrieve("fake")).object, "model");
});

test("responses", async () => {
  const own = { diffusion: { seed: 1 } };
  const first = await client.responses.create({ model: "fake", input: "hello", ...own });
  assert.equal(first.output_text, (await chat()).choices[0].message.content);
  assert.equal(first.status, "completed");
  const stream = client.responses.stream({ model: "fake", input: "hello", reasoning: { effort: "high" }, ...own });
  const kinds = [];
  let text = "";
  for await (const event of stream) {
    kinds.push(event.type);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  const final = await stream.finalResponse();
  assert.equal(kinds[0], "response.created");
  assert.equal(kinds.at(-1), "response.completed");
  assert.equal(text, first.output_text);
  assert.equal(final.output_text, first.output_text);
  assert.deepEqual(final.output.map(({ type }) => type), ["reasoning", "message"]);
  const next = await client.responses.create({ model: "fake", input: "and?", previous_response_id: first.id });
  assert.equal(next.previous_response_id, first.id);
  assert.equal((await client.responses.retrieve(first.id)).output_text, first.output_text);
  await client.responses.delete(first.id);
  await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
});

test("tools of responses", async () => {
  const flat = [{ type: "function", name: "get_weather", parameters: { type: "object" }, strict: false }];
  const first = await client.responses.create({ model: "fake", input: "WEATHER", tools: flat });
  const call = first.output.find(({ type }) => type === "function_call");
  assert.equal(call.name, "get_weather");
  const result = { type: "function_call_output", call_id: call.call_id, output: "rain" };
  const next = await client.responses.create({ model: "fake", input: [result], previous_response_id: first.id });
  assert.match(next.output_text, /^Once/);
});
