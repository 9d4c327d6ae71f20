/** Elements and number formats. Text is always set as text, never as markup. */

/** Create an element. `class`, `role` and names with a dash are attributes, other names are DOM properties. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class" || name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set text only if it differs, so that screen readers and selections are not disturbed. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export const byId = (id) => document.getElementById(id);

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export const isText = (value) => typeof value === "string";

/** 1234 -> "1,234"; not a number -> "–". */
export const count = (value) => (isNumber(value) ? value.toLocaleString("en") : "–");

/** "1 cycle", "3 cycles". */
export const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

/** Format a confidence with two digits, rounded down: 0.7599 must not look like 0.76. */
export function confidence(value) {
  return isNumber(value) ? (Math.floor(value * 100 + 1e-9) / 100).toFixed(2) : "–";
}

/** 0.0421 -> "42 ms"; 3.21 -> "3.2 s"; 75 -> "1 min 15 s". */
export function seconds(value) {
  if (!isNumber(value)) return "–";
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 59.95) return `${value.toFixed(1)} s`;
  return `${Math.floor(Math.round(value) / 60)} min ${Math.round(value) % 60} s`;
}
