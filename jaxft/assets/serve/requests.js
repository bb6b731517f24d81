// The request that makes a job like another, for programs.

export function body(job) {
  const { config } = job.jaxft;
  const out = { model: job.model, training_file: job.training_file };
  if (job.validation_file) out.validation_file = job.validation_file;
  if (job.jaxft.suffix) out.suffix = job.jaxft.suffix;
  out.seed = job.seed;
  out.method = job.method;
  if (Object.keys(job.metadata ?? {}).length) out.metadata = job.metadata;
  return [out, Object.keys(config).length ? { jaxft: { config } } : null];
}

export function python(job, origin) {
  const [fields, ours] = body(job);
  if (ours) fields.extra_body = ours;
  const lines = Object.entries(fields).map(([name, value]) => `    ${name}=${literal(value)},\n`);
  return `import os

from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=os.environ["JAXFT_KEY"])
job = client.fine_tuning.jobs.create(
${lines.join("")})
`;
}

function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function curl(job, origin) {
  const [fields, ours] = body(job);
  const text = JSON.stringify({ ...fields, ...ours }, null, 2).replaceAll("'", "'\\''");
  return `curl ${origin}/v1/fine_tuning/jobs \\
  -H "Authorization: Bearer $JAXFT_KEY" -H "Content-Type: application/json" \\
  -d '${text}'
`;
}
