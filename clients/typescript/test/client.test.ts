/** The client against a real server with the bundled models, at RTAP_URL or on this machine. */

import assert from 'node:assert/strict';
import { createServer, type IncomingMessage } from 'node:http';
import type { AddressInfo } from 'node:net';
import { readFile, readdir } from 'node:fs/promises';
import { test } from 'node:test';

import { build } from 'esbuild';
import OpenAI from 'openai';

import { apiUrl, DEFAULT_URL } from '../src/client.js';
import { events, IncompleteStream, RTAP, type RtapEvent } from '../src/index.js';

const client = new RTAP();
const messages = [{ role: 'user' as const, content: 'make 82 from 3, 7, 25' }];
const THREE_CYCLES = { threshold: 1, max_cycles: 3 };

/** A series of the server's /metrics, summed over labels. */
async function metric(name: string): Promise<number> {
  const headers = { authorization: `Bearer ${client.apiKey}` };
  const text = await (await fetch(new URL('/metrics', client.baseURL), { headers })).text();
  const samples = text.split('\n').filter((line) => line.startsWith(`${name} `) || line.startsWith(`${name}{`));
  return samples.reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0);
}

async function until(condition: () => Promise<boolean>): Promise<void> {
  for (const end = Date.now() + 10_000; !(await condition()); ) {
    assert.ok(Date.now() < end, 'the condition was not met within 10 s');
    await new Promise((done) => setTimeout(done, 50));
  }
}

test('a reply is typed and has a trajectory', async () => {
  const reply = await client.chat.completions.create({
    model: 'rtap',
    messages,
    seed: 9,
    rtap: { ...THREE_CYCLES, return_cycles: true },
  });
  const { rtap, choices } = reply;
  assert.ok(rtap);
  assert.deepEqual([rtap.policy, rtap.stop_reason, rtap.cycles.length], ['confidence', 'max_cycles', 3]);
  const accepted = rtap.cycles.find((cycle) => cycle.accepted);
  assert.ok(accepted?.think);
  assert.equal(choices[0]?.message.content, accepted.answer);
  assert.ok(choices[0]?.message.reasoning?.includes(accepted.think));
});

test('events of a stream, of this client and of the plain one', async () => {
  const plain = new OpenAI({ baseURL: client.baseURL, apiKey: 'none' });
  const body = { model: 'rtap', messages, seed: 9, stream: true, stream_options: { include_usage: true } } as const;
  for (const stream of [
    await client.chat.completions.create({ ...body, rtap: THREE_CYCLES }),
    await plain.chat.completions.create({ ...body, rtap: THREE_CYCLES } as typeof body),
  ]) {
    const received: RtapEvent[] = [];
    for await (const event of events(stream)) received.push(event);
    const cycles = received.filter((event) => event.type === 'cycle');
    const done = received.at(-1);
    assert.deepEqual(cycles.map((event) => event.cycle.index), [0, 1, 2]);
    assert.ok(received.some((event) => event.type === 'thinking'));
    assert.ok(done?.type === 'done');
    assert.equal(done.text, done.rtap?.cycles.find((cycle) => cycle.accepted)?.answer);
    assert.equal(done.finishReason, 'stop');
    assert.equal(done.usage?.completion_tokens, done.rtap?.cycles.reduce((sum, cycle) => sum + cycle.tokens, 0));
  }
});

test('drafts show an answer before it is judged', async () => {
  const body = { model: 'rtap', messages, seed: 9, stream: true, rtap: { ...THREE_CYCLES, drafts: true } } as const;
  const received: RtapEvent[] = [];
  for await (const event of events(await client.chat.completions.create(body))) received.push(event);
  const drafts = received.flatMap((event) => (event.type === 'draft' ? [event.draft] : []));
  const done = received.at(-1);
  assert.ok(done?.type === 'done');
  for (const { index, answer } of done.rtap?.cycles ?? [])
    if (answer !== null)
      assert.equal(drafts.filter((draft) => draft.index === index).map((draft) => draft.text).join(''), answer);
  assert.ok(drafts.length > 3);
});

test('with n above 1 every choice has its own trajectory', async () => {
  const body = { model: 'rtap', messages, seed: 5, n: 2, rtap: THREE_CYCLES } as const;
  const reply = await client.chat.completions.create(body);
  assert.deepEqual(reply.choices.map((choice) => choice.rtap?.cycles.length), [3, 3]);
  let trajectories = 0;
  for await (const event of events(await client.chat.completions.create({ ...body, stream: true })))
    if (event.type === 'done') trajectories = event.trajectories.length;
  assert.equal(trajectories, 2);
});

test('leaving a stream early stops the server', async () => {
  const before = await metric('rtap_requests_total');
  const rtap = { threshold: 1, max_cycles: 16 };
  for await (const event of events(await client.chat.completions.create({ model: 'rtap', messages, rtap, stream: true })))
    if (event.type === 'cycle') break;
  await until(async () => (await metric('rtap_in_flight')) === 0 && (await metric('rtap_requests_total')) > before);
  const text = await (await fetch(new URL('/metrics', client.baseURL))).text();
  assert.match(text, /rtap_requests_total\{[^}]*stop_reason="abandoned"[^}]*\} [1-9]/);
});

test('score, feedback and config', async () => {
  const config = await client.config();
  assert.ok(config.models.includes('rtap'));
  assert.equal(config.defaults.policy, 'confidence');
  const question = 'make 82 from 3, 7, 25';
  const right = await client.score({ question, think: '25*3=75 75+7=82', answer: '25*3+7' });
  const wrong = await client.score({ question, think: '25+7=32 32*3=96', answer: '(25+7)*3' });
  assert.ok(right.confidence > wrong.confidence);
  const reply = await client.chat.completions.create({ model: 'rtap', messages });
  const feedback = await client.feedback({ request_id: reply.id, correct: true });
  assert.equal(feedback.confidence, reply.rtap?.confidence);
  assert.ok(feedback.verdicts >= 1);
});

test('a wrong value is an error that names the field; a wrong literal does not compile', async () => {
  const wrong = client.chat.completions.create({ model: 'rtap', messages, rtap: { threshold: 2 } });
  await assert.rejects(wrong, (error) => error instanceof OpenAI.BadRequestError && /rtap\.threshold/.test(error.message));
  // @ts-expect-error - a policy that does not exist
  const unknown = client.chat.completions.create({ model: 'rtap', messages, rtap: { policy: 'sure' } });
  await assert.rejects(unknown, OpenAI.BadRequestError);
});

test('a retry honours Retry-After', async () => {
  const requests: IncomingMessage[] = [];
  const server = createServer((request, response) => {
    requests.push(request);
    const fails = requests.length === 1;
    response.writeHead(fails ? 503 : 200, { 'content-type': 'application/json', 'retry-after': '1' });
    response.end(JSON.stringify(fails ? { error: { message: 'full' } } : { id: 'x', choices: [] }));
  });
  await new Promise<void>((listening) => server.listen(0, '127.0.0.1', listening));
  const began = Date.now();
  const local = new RTAP({ baseURL: `http://127.0.0.1:${(server.address() as AddressInfo).port}` });
  await local.chat.completions.create({ model: 'rtap', messages });
  server.close();
  server.closeAllConnections();
  assert.ok(Date.now() - began >= 1000);
  // The server refuses this header.
  assert.deepEqual(requests.map((request) => request.headers['idempotency-key']), [undefined, undefined]);
});

test('an incomplete stream is an error', async () => {
  const chunk = { id: 'x', choices: [{ index: 0, delta: { content: '4' }, finish_reason: null }] };
  const fetch = async () =>
    new Response(`data: ${JSON.stringify(chunk)}\n\n`, { headers: { 'content-type': 'text/event-stream' } });
  const cut = new RTAP({ baseURL: DEFAULT_URL, fetch });
  const received = events(await cut.chat.completions.create({ model: 'rtap', messages, stream: true }));
  assert.equal((await received.next()).value?.type, 'answer');
  await assert.rejects(received.next(), IncompleteStream);
});

test('/v1 is optional in an address', () => {
  assert.equal(apiUrl('http://h:1/'), 'http://h:1/v1');
  assert.equal(apiUrl('https://h/rtap/v1'), 'https://h/rtap/v1');
});

test('the sources import no module of Node, so that a browser can load them', async () => {
  const files = await readdir('src');
  assert.ok(files.includes('index.ts'));
  for (const file of files) assert.doesNotMatch(await readFile(`src/${file}`, 'utf8'), /from '(?!openai|\.\/)/, file);
  // Bundling for browsers fails on any import of a Node module, in the SDK as well.
  const bundle = await build({ entryPoints: ['src/index.ts'], bundle: true, platform: 'browser', write: false });
  assert.equal(bundle.errors.length, 0);
});
