/** A request as code. The code reads the API key from the variable RTAP_API_KEY. */

const SHELL_KEY = '  -H "Authorization: Bearer $RTAP_API_KEY" \\\n';

/** Write `body` as `language` ("curl", "python", "typescript") for the server at `base` (".../v1/"). */
export function snippet(language, body, base, { withKey = false } = {}) {
  return { curl, python, typescript }[language](body, base.replace(/\/$/, ""), withKey);
}

function curl(body, base, withKey) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -s ${base}/chat/completions \\\n${withKey ? SHELL_KEY : ""}`
    + `  -H "Content-Type: application/json" \\\n  -d '${json}'\n`;
}

function python(body, base, withKey) {
  const { rtap, ...rest } = body;
  const values = Object.entries(rest).map(([name, value]) => `    ${name}=${pythonOf(value)},\n`).join("");
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${pythonOf(base)}, api_key=${withKey ? 'os.environ["RTAP_API_KEY"]' : '"none"'})
reply = client.chat.completions.create(
${values}    extra_body={"rtap": ${pythonOf(rtap)}},
)
print(reply.choices[0].message.content)
print(reply.rtap["stop_reason"], reply.rtap["confidence"])
`;
}

/** Write a JSON value as a Python literal. Strings and numbers are the same in both. */
function pythonOf(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonOf).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${pythonOf(v)}`).join(", ")}}`;
}

function typescript(body, base, withKey) {
  const { rtap, ...rest } = body;
  const values = Object.entries(rest).map(([name, value]) => `  ${name}: ${JSON.stringify(value)},\n`).join("");
  return `import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${JSON.stringify(base)}, apiKey: ${withKey ? "process.env.RTAP_API_KEY" : '"none"'} });
const reply = await client.chat.completions.create({
${values}  // @ts-expect-error: the SDK sends this field but has no type for it
  rtap: ${JSON.stringify(rtap)},
});
console.log(reply.choices[0].message.content);
`;
}
