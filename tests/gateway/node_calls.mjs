// Calls of OpenAI's library for Node against a gateway: node_calls.mjs URL LIBRARY
import assert from "node:assert/strict";

const { default: OpenAI, toFile } = await import(process.argv[3]);
const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none" });
const model = "glm-image";
const small = { model, prompt: "A red fox", size: "64x64", num_inference_steps: 2, seed: 7 };

const answer = await client.images.generate(small);
const base64 = answer.data[0].b64_json;
assert.ok(Buffer.from(base64, "base64").subarray(1, 4).equals(Buffer.from("PNG")));
assert.ok(answer.usage.total_tokens > 0);
assert.deepEqual(answer.seeds, [7]);

const streamed = { ...small, num_inference_steps: 40, stream: true, partial_images: 2 };
const types = [];
for await (const event of await client.images.generate(streamed)) types.push(event.type);
assert.equal(types.at(-1), "image_generation.completed");
assert.deepEqual([...new Set(types.slice(0, -1))], ["image_generation.partial_image"]);

const file = await toFile(Buffer.from(base64, "base64"), "a.png", { type: "image/png" });
const edit = await client.images.edit({ ...small, image: [file, file], prompt: "Snow" });
assert.ok(edit.usage.input_tokens_details.image_tokens > 0);

const messages = [{ role: "user", content: "A red fox" }];
const chat = await client.chat.completions.create({ ...small, prompt: undefined, messages });
assert.equal(chat.choices[0].message.content[0].image_url.url, `data:image/png;base64,${base64}`);
const chunks = await client.chat.completions.create({ ...small, prompt: undefined, messages, stream: true });
const parts = [];
for await (const chunk of chunks) parts.push(...(chunk.choices[0]?.delta?.content || []));
assert.equal(parts[0].image_url.url, `data:image/png;base64,${base64}`);

await assert.rejects(client.images.generate({ ...small, prompt: " " }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.deepEqual([error.code, error.param], ["invalid_value", "prompt"]);
  assert.ok(error.requestID);
  return true;
});
console.log("done");
