// openai (npm): chat completions, with zod's schemas.
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { KEY, MESSAGES, MODEL, Move, SAMPLING, TOOL, URL, report } from './uses.mjs';

const client = new OpenAI({ baseURL: URL, apiKey: KEY, maxRetries: 0 });
const call = { tools: [zodFunction({ name: TOOL, parameters: Move })], tool_choice: 'required' };
const asked = (rtap) => ({ model: MODEL, messages: MESSAGES, rtap, ...SAMPLING });

function called(choice) {
  const [one, ...others] = choice.message.tool_calls;
  if (others.length) throw new Error('more than one call');
  return { name: one.function.name, arguments: one.function.parsed_arguments, finish: choice.finish_reason };
}

await report({
  async basic(rtap) {
    const choice = (await client.chat.completions.create(asked(rtap))).choices[0];
    return { text: choice.message.content, finish: choice.finish_reason };
  },
  async stream(rtap) {
    const stream = client.chat.completions.stream(asked(rtap));
    let text = '';
    stream.on('content', (delta) => (text += delta));
    const choice = (await stream.finalChatCompletion()).choices[0];
    if (text !== choice.message.content) throw new Error(`${text} is not ${choice.message.content}`);
    return { text, finish: choice.finish_reason };
  },
  async structured(rtap) {
    const format = { response_format: zodResponseFormat(Move, 'move') };
    const choice = (await client.chat.completions.parse({ ...asked(rtap), ...format })).choices[0];
    return { object: choice.message.parsed, finish: choice.finish_reason };
  },
  async tool(rtap) {
    return called((await client.chat.completions.parse({ ...asked(rtap), ...call })).choices[0]);
  },
  async streamed_tool(rtap) {
    const stream = client.chat.completions.stream({ ...asked(rtap), ...call });
    return called((await stream.finalChatCompletion()).choices[0]);
  },
});
