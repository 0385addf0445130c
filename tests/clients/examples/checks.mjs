// What the examples in JavaScript share: a check fails by throwing, and its outcome is a line of JSON.
export const url = process.env.PEREGRINE_URL ?? "http://127.0.0.1:8000";
export const model = process.env.PEREGRINE_MODEL ?? "smollm2-135m-instruct";
export const key = process.env.PEREGRINE_KEY ?? "none";
export const weather = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
export const bird = {
  type: "object",
  properties: { name: { type: "string", maxLength: 20 }, legs: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["name", "legs"],
  additionalProperties: false,
};
export const question = "What is the weather in Paris?";

export function insist(value, message) {
  if (!value) throw new Error(message ?? "it is not so");
}

export async function run(checks) {
  for (const [check, act] of Object.entries(checks)) {
    let detail = "";
    try {
      await act();
    } catch (error) {
      detail = `${error.name}: ${error.message}`.slice(0, 300);
      console.error(error);
    }
    console.log(JSON.stringify({ check, ok: !detail, detail }));
  }
}
