"use strict";
// The dialogues: an index of all of them, and chunks that are unpacked when they are needed.
const BLOBS = document.querySelectorAll("script.blob");
const KEPT = 12; // unpacked chunks in memory
const chunks = new Map(); // number of a chunk -> promise of its dialogues; the last used is the last
let INDEX = null;
let searchable = null; // promise of every dialogue's text in lower case

async function unpack(blob) {
  const binary = atob(BLOBS[blob].textContent);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// An entry per dialogue: {at, policy, key, goal, intent, sample, stop, tse, used}: `key` is the goal's number (an id may
// stand for two goals, of different environments), `used` the strategies by number.
async function openIndex() {
  INDEX = await unpack(0);
  INDEX.dialogues = INDEX.dialogues.map(([policy, goal, sample, stop, tse, used], at) => ({
    at, policy, key: goal, goal: INDEX.goals[goal][0], intent: INDEX.goals[goal][1], sample,
    stop: INDEX.stops[stop], tse, used,
  }));
  INDEX.byGoal = grouped(INDEX.dialogues);
}

function grouped(dialogues) {
  const groups = new Map();
  for (const dialogue of dialogues) {
    if (!groups.has(dialogue.key)) groups.set(dialogue.key, []);
    groups.get(dialogue.key).push(dialogue);
  }
  return groups;
}

// The whole dialogue of an entry.
async function whole(entry) {
  const number = Math.floor(entry.at / INDEX.chunk);
  const found = chunks.get(number) || unpack(1 + number);
  chunks.delete(number);
  chunks.set(number, found);
  if (chunks.size > KEPT) chunks.delete(chunks.keys().next().value);
  return (await found)[entry.at % INDEX.chunk];
}

// All texts, for the search: built once, when the first search asks for them.
function texts(progress) {
  searchable ||= (async () => {
    const found = [];
    for (let blob = 1; blob < BLOBS.length; blob++) {
      for (const dialogue of await unpack(blob)) found.push(text(dialogue));
      progress(found.length);
    }
    return found;
  })();
  return searchable;
}

function text(dialogue) {
  const { id, intent, context, facts, persona } = dialogue.goal;
  const parts = [id, intent, context, JSON.stringify(facts), JSON.stringify(persona), dialogue.error || ""];
  for (const turn of dialogue.turns) {
    parts.push(turn.user, turn.strategy, turn.reply, turn.briefing, turn.plan, ...turn.events, ...turn.completed);
  }
  return parts.join("\n").toLowerCase();
}

// The dialogue of another policy about the same goal: the same sample, or the first there is.
function counterpart(entry, policy) {
  const same = INDEX.byGoal.get(entry.key).filter((other) => other.policy === policy && other !== entry);
  return same.find((other) => other.sample === entry.sample) || same[0] || null;
}
