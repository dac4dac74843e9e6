// One image over HTTP JSON with Node.js alone: node node_fetch.mjs URL REQUEST_JSON FILE
import { writeFile } from "node:fs/promises";

const [url, request, file] = process.argv.slice(2);
const datatypes = {
  prompt: "BYTES", height: "INT32", width: "INT32", num_inference_steps: "INT32",
  guidance_scale: "FP32", seed: "INT64", output_format: "BYTES",
};
const inputs = Object.entries(JSON.parse(request)).map(([name, value]) => (
  { name, datatype: datatypes[name], shape: [1], data: [value] }
));

const response = await fetch(`${url}/v2/models/glm_image/infer`, {
  method: "POST",
  body: JSON.stringify({ inputs, outputs: [{ name: "images_base64" }, { name: "metadata" }] }),
});
const body = await response.json();
if (!response.ok) {
  console.error(`${response.status} ${body.error}`);
  process.exit(1);
}
const outputs = Object.fromEntries(body.outputs.map(({ name, data }) => [name, data[0]]));
await writeFile(file, Buffer.from(outputs.images_base64, "base64"));
console.log(outputs.metadata);
