"use strict";
// Every text of a dialogue reaches the page through textContent: it can never become markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 100; // list entries per "show more"
const MANY = 14; // longer allowed sets are folded
const byId = (id) => document.getElementById(id);
const controls = Object.fromEntries(["phase", "intent", "stop", "query", "compare"].map((id) => [id, byId(id)]));
let found = [];
let listed = 0;
let current = null;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) highlight(node, String(text));
  return node;
}

// Set the text of a node, with the search term marked.
function highlight(node, text) {
  const term = controls.query.value.trim().toLowerCase();
  const lower = text.toLowerCase();
  // lower-casing can change the length of a text; then positions mean nothing
  if (!term || lower.length !== text.length) { node.textContent = text; return; }
  let from = 0;
  for (let at = lower.indexOf(term); at >= 0; at = lower.indexOf(term, from)) {
    const mark = document.createElement("mark");
    mark.textContent = text.slice(at, at + term.length);
    node.append(text.slice(from, at), mark);
    from = at + term.length;
  }
  node.append(text.slice(from));
}

const number = (value, digits) => (typeof value === "number" ? String(Number(value.toFixed(digits))) : "n/a");

// Pairs of label and value on one wrapping line; a value may carry a class.
function pairs(entries) {
  const list = make("ul", "pairs");
  for (const [label, value, className] of entries) {
    const item = make("li", className);
    item.append(make("b", "", label), " ", make("span", "", value));
    list.append(item);
  }
  return list;
}

function says(who, text, tag) {
  const bubble = make("div", "says " + who);
  const body = make("span", "", text);
  body.dir = "auto"; // right-to-left text stays inside its own bubble
  bubble.append(make("span", "who", tag), body);
  return bubble;
}

function choice(turn) {
  const chips = make("div", "chips");
  const others = turn.allowed.filter((id) => id !== turn.strategy);
  const chip = (id, chosen) => {
    const node = make("span", chosen ? "chip chosen" : "chip", id);
    if (Object.hasOwn(turn.relevance, id)) {
      const grade = make("sup", "", turn.relevance[id]);
      node.append(grade);
      node.title = "relevance " + turn.relevance[id] + " of 3";
    }
    return node;
  };
  chips.append(chip(turn.strategy, true));
  const logprob = turn.expert_logprob;
  const odds = typeof logprob === "number" ? number(logprob, 3) + " (p " + number(Math.exp(logprob), 3) + ")" : "n/a";
  chips.append(make("span", "fact", turn.forced ? "forced: the only allowed strategy"
    : "log p " + odds + " of " + turn.allowed.length + " allowed:"));
  if (others.length <= MANY) {
    chips.append(...others.map((id) => chip(id, false)));
    return chips;
  }
  const fold = make("details");
  const rest = make("div", "chips");
  rest.append(...others.map((id) => chip(id, false)));
  fold.append(make("summary", "", others.length + " other allowed strategies"), rest);
  const both = make("div");
  both.append(chips, fold);
  return both;
}

function turnView(turn, index) {
  const view = make("div", "turn");
  view.append(make("div", "number", "Turn " + (index + 1)), says("user", turn.user, "User"));
  if (turn.plan) view.append(make("div", "briefing", "Plan: " + turn.plan));
  view.append(choice(turn));
  if (turn.briefing) view.append(make("div", "briefing", "Briefing: " + turn.briefing));
  view.append(says("reply", turn.reply, turn.reply_cut ? "Reply, cut at its token limit" : "Reply"));
  const facts = [["engagement", number(turn.engagement, 2)]];
  facts.push(["on task", turn.on_task ? "yes" : "no", turn.on_task ? "" : "open"]);
  if (turn.completed.length) facts.unshift(["completed", turn.completed.join(", "), "done"]);
  if (turn.events.length) facts.push(["events", turn.events.join(", ")]);
  if (turn.expected.length) facts.push(["a faithful reply contains", turn.expected.join(" | ")]);
  view.append(pairs(facts));
  return view;
}

function dialogueView(dialogue) {
  const goal = dialogue.goal;
  const view = make("article");
  view.append(make("h3", "", DATA.phases[dialogue.phase] + ", sample " + dialogue.sample));
  const state = make("div");
  state.append(make("span", "badge " + dialogue.stop, dialogue.stop));
  state.append(make("span", "note", goal.intent + ", goal " + goal.id + ", seed " + dialogue.seed));
  view.append(state);
  if (dialogue.error) view.append(make("p", "error", dialogue.error));
  view.append(pairs(Object.entries(dialogue.rewards).map(([name, value]) => [name, number(value, 3)])));
  const about = make("details");
  about.open = true;
  about.append(make("summary", "", "Goal"), make("div", "", goal.context));
  about.append(pairs(Object.entries(goal.subgoals).map(([name, weight]) => {
    const done = dialogue.done.includes(name);
    return [(done ? "\u2713 " : "\u2717 ") + name, number(weight, 3), done ? "done" : "open"];
  })));
  const known = [...Object.entries(goal.facts), ...Object.entries(goal.persona).map(([k, v]) => ["persona " + k, v])];
  about.append(pairs(known.map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : value])));
  view.append(about, ...dialogue.turns.map(turnView));
  return view;
}

// The dialogue of each other phase about the same goal: the same sample, or the first there is.
function counterparts(dialogue) {
  return DATA.phases.flatMap((_, phase) => {
    if (phase === dialogue.phase) return [dialogue];
    const same = DATA.dialogues.filter((other) => other.phase === phase && other.goal.id === dialogue.goal.id);
    return same.length ? [same.find((other) => other.sample === dialogue.sample) || same[0]] : [];
  });
}

function show(dialogue) {
  current = dialogue;
  const chosen = !dialogue ? [] : controls.compare.checked ? counterparts(dialogue) : [dialogue];
  byId("columns").replaceChildren(...chosen.map(dialogueView));
  for (const button of byId("list").children) {
    button.setAttribute("aria-current", String(found[Number(button.dataset.index)] === dialogue));
  }
}

function text(dialogue) {
  if (dialogue.text === undefined) { // built on the first search only
    const { id, intent, context, facts, persona } = dialogue.goal;
    const parts = [id, intent, context, JSON.stringify(facts), JSON.stringify(persona), dialogue.error || ""];
    for (const turn of dialogue.turns) {
      parts.push(turn.user, turn.strategy, turn.reply, turn.briefing, ...turn.events, ...turn.completed);
    }
    dialogue.text = parts.join("\n").toLowerCase();
  }
  return dialogue.text;
}

function grow() {
  const end = Math.min(listed + PAGE, found.length);
  for (; listed < end; listed++) {
    const dialogue = found[listed];
    const button = make("button", "", dialogue.goal.intent);
    button.type = "button";
    button.dataset.index = listed;
    const place = [dialogue.goal.id, "sample " + dialogue.sample, DATA.phases[dialogue.phase]];
    const result = [dialogue.stop, "TSE " + number(dialogue.rewards.tse, 1), dialogue.turns.length + " turns"];
    button.append(make("small", "", place.join(", ")), make("small", "", result.join(", ")));
    button.addEventListener("click", () => show(dialogue));
    byId("list").append(button);
  }
  byId("more").hidden = listed >= found.length;
}

function filter() {
  const term = controls.query.value.trim().toLowerCase();
  const { phase, intent, stop } = controls;
  found = DATA.dialogues.filter((dialogue) =>
    (phase.value === "" || DATA.phases[dialogue.phase] === phase.value) &&
    (intent.value === "" || dialogue.goal.intent === intent.value) &&
    (stop.value === "" || dialogue.stop === stop.value) && (term === "" || text(dialogue).includes(term)));
  byId("count").textContent = found.length + " of " + DATA.dialogues.length + " dialogues";
  byId("list").replaceChildren();
  listed = 0;
  grow();
  show(found.includes(current) ? current : found[0] || null);
}

function choices(select, values) {
  select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
  select.addEventListener("change", filter);
}

const present = new Set(DATA.dialogues.map((dialogue) => dialogue.stop));
choices(controls.phase, DATA.phases);
choices(controls.intent, [...new Set(DATA.dialogues.map((dialogue) => dialogue.goal.intent))].sort());
choices(controls.stop, DATA.stops.filter((stop) => present.has(stop)));
let typing = 0;
controls.query.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(filter, 150); });
controls.compare.addEventListener("change", () => show(current));
byId("more").addEventListener("click", () => { grow(); show(current); });
byId("filters").addEventListener("submit", (event) => event.preventDefault());
filter();
