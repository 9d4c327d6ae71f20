// The same as uses.py, for Node.
import { z } from 'zod';

export const SERVER = process.argv[2];
export const URL = `${SERVER}/v1`;
export const MODEL = 'rtap';
export const KEY = 'none';
export const QUESTION = 'make 82 from 3, 7, 25';
export const MESSAGES = [{ role: 'user', content: QUESTION }];
export const SAMPLING = { temperature: 0, max_tokens: 400 };
export const TOOL = 'look_up';
export const DESCRIPTION = 'Look up a number.';
export const Move = z.object({ operation: z.enum(['sum', 'product']), number: z.literal([7, 82]) });

const POLICIES = {
  single: { policy: 'single' },
  confidence: { policy: 'confidence', threshold: 1, max_cycles: 2, drafts: true },
};
const WRONG = { treshold: 0.5 };

const ancestors = (error) => {
  const names = [];
  for (let type = error.constructor; type?.name; type = Object.getPrototypeOf(type)) names.push(type.name);
  return [error.name, ...names];
};

// Run every use under every policy, and two with a wrong field; print one JSON line.
export async function report(uses) {
  const results = { single: {}, confidence: {}, wrong: {} };
  const rows = Object.entries(POLICIES).flatMap(([policy, rtap]) =>
    Object.entries(uses).map(([name, use]) => [policy, name, use, rtap]),
  );
  for (const name of ['basic', 'stream']) rows.push(['wrong', name, uses[name], WRONG]);
  for (const [policy, name, use, rtap] of rows) {
    const began = performance.now();
    let result;
    try {
      result = await use(rtap);
    } catch (error) {
      result = { error: ancestors(error), message: String(error.message).slice(0, 2000), traceback: error.stack };
    }
    results[policy][name] = { ...result, seconds: Math.round(performance.now() - began) / 1000 };
  }
  console.log(JSON.stringify(results));
}
