// ai with @ai-sdk/openai-compatible (npm).
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, generateText, streamText, tool } from 'ai';
import { DESCRIPTION, KEY, MODEL, Move, QUESTION, SAMPLING, TOOL, URL, report } from './uses.mjs';

const provider = createOpenAICompatible({ name: 'rtap', baseURL: URL, apiKey: KEY, supportsStructuredOutputs: true });
// Options under the provider's name become fields of the request.
const asked = (rtap) => ({
  model: provider(MODEL),
  prompt: QUESTION,
  temperature: SAMPLING.temperature,
  maxOutputTokens: SAMPLING.max_tokens,
  maxRetries: 0,
  providerOptions: { rtap: { rtap } },
});
const call = { tools: { [TOOL]: tool({ description: DESCRIPTION, inputSchema: Move }) }, toolChoice: 'required' };

function called(calls, finish) {
  const [one, ...others] = calls;
  if (others.length || one.invalid) throw new Error(JSON.stringify(calls));
  return { name: one.toolName, arguments: one.input, finish };
}

// streamText reports an error as a part of the stream.
function streamed(options) {
  let failure;
  const result = streamText({ ...options, onError: ({ error }) => (failure = error) });
  return { result, check: () => { if (failure) throw failure; } };
}

await report({
  async basic(rtap) {
    const { text, finishReason } = await generateText(asked(rtap));
    return { text, finish: finishReason };
  },
  async stream(rtap) {
    const { result, check } = streamed(asked(rtap));
    let text = '';
    for await (const delta of result.textStream) text += delta;
    check();
    return { text, finish: await result.finishReason };
  },
  async structured(rtap) {
    const { output, finishReason } = await generateText({ ...asked(rtap), output: Output.object({ schema: Move }) });
    return { object: output, finish: finishReason };
  },
  async tool(rtap) {
    const { toolCalls, finishReason } = await generateText({ ...asked(rtap), ...call });
    return called(toolCalls, finishReason);
  },
  async streamed_tool(rtap) {
    const { result, check } = streamed({ ...asked(rtap), ...call });
    await result.consumeStream();
    check();
    return called(await result.toolCalls, await result.finishReason);
  },
});
