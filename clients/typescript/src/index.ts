export { DEFAULT_URL, RTAP, RtapChat, RtapCompletions } from './client.js';
export { events, IncompleteStream, type DoneEvent, type RtapEvent } from './streams.js';
export type * from './types.js';
