// Numbers, bytes and seconds as people read them; and the one helper that makes elements.

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && typeof value !== "string") made[name] = value;
    else if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Sets an element's text, but only if that changes anything: what did not change is not read out again. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) {
    count /= 1024;
    at += 1;
  }
  return `${at && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[at]}`;
}

export function seconds(value) {
  if (value < 0.0995) return `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 10) return `${Number(value.toFixed(value < 1 ? 2 : 1))} s`;
  if (value < 100) return `${value.toFixed(0)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}

export const integer = (value) => Math.round(value).toLocaleString("en");

export const dollars = (value) => `$${value.toFixed(value < 10 ? 2 : 0)}`;

export const plural = (count, noun) => `${integer(count)} ${noun}${count === 1 ? "" : "s"}`;

export const shape = (text) => text.replaceAll("x", "\u00d7");

export const clock = (time) => new Date(time * 1000).toLocaleTimeString("en", { hour12: false });
