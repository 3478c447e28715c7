// One dialogue as nodes. Every text reaches the page through textContent: it can never become markup.
const MANY = 14; // longer allowed sets are folded
const BARS = 8; // probabilities shown before the rest is folded

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

function named(turn, id, className) {
  const node = make("span", className, id || "(none)");
  if (Object.hasOwn(turn.relevance, id)) {
    node.append(make("sup", "", turn.relevance[id]));
    node.title = "relevance " + turn.relevance[id] + " of 3";
  }
  return node;
}

// The nodes of `items` in a box, those beyond `most` folded away.
function folded(className, items, most, label) {
  const box = make("div", className);
  box.append(...items.slice(0, most));
  if (items.length <= most) return [box];
  const fold = make("details", "fold");
  const rest = make("div", className);
  rest.append(...items.slice(most));
  fold.append(make("summary", "", (items.length - most) + " " + label), rest);
  return [box, fold];
}

// What the expert could choose and what it chose: bars where its probabilities are known.
function choice(turn) {
  const view = make("div", "choice");
  const unknown = !turn.allowed.length; // a log of human agents
  // A script or an endpoint tells no probability; a sampled choice among several never has log-probability 0.
  const told = turn.expert_logprob !== 0 || Object.keys(turn.probabilities).length;
  const fact = unknown ? "allowed set unknown" : turn.forced ? "forced: the only allowed strategy"
    : (told ? "probability " + number(100 * Math.exp(turn.expert_logprob), 1) + "%, log p " +
      number(turn.expert_logprob, 3) + ", " : "") + turn.allowed.length + " allowed";
  const head = make("div", "chips");
  head.append(named(turn, turn.strategy, "chip chosen"), make("span", "fact", fact));
  view.append(head);
  if (Object.keys(turn.probabilities).length) {
    const share = (id) => (Object.hasOwn(turn.probabilities, id) ? turn.probabilities[id] : 0);
    const order = [...turn.allowed].sort((a, b) => share(b) - share(a));
    view.append(...folded("bars", order.map((id) => bar(turn, id, share(id))), BARS, "less likely"));
  } else {
    const others = turn.allowed.filter((id) => id !== turn.strategy).map((id) => named(turn, id, "chip"));
    if (others.length) view.append(...folded("chips", others, others.length > MANY ? 0 : MANY, "others allowed"));
  }
  return view;
}

function bar(turn, id, share) {
  const row = make("div", id === turn.strategy ? "bar chosen" : "bar");
  row.style.setProperty("--share", (100 * share).toFixed(2) + "%");
  row.append(named(turn, id, ""), make("span", "share", number(100 * share, 1) + "%"));
  return row;
}

// What each turn added to TSE: the weight of the subgoals it completed first, as a share of all that were completed.
function gainedTse(dialogue) {
  const open = new Map(Object.entries(dialogue.goal.subgoals));
  const weights = dialogue.turns.map((turn) => turn.completed.reduce((sum, name) => {
    const weight = open.get(name) || 0;
    open.delete(name);
    return sum + weight;
  }, 0));
  const total = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => (total && typeof dialogue.rewards.tse === "number"
    ? dialogue.rewards.tse * weight / total : null));
}

function turnView(dialogue, turn, index, gained) {
  const view = make("div", "turn");
  view.append(make("div", "number", "Turn " + (index + 1)), says("user", turn.user, "User"));
  if (turn.plan) view.append(make("div", "briefing", "Plan: " + turn.plan));
  view.append(choice(turn));
  if (turn.briefing) view.append(make("div", "briefing", "Briefing: " + turn.briefing));
  view.append(says("reply", turn.reply, turn.reply_cut ? "Reply, cut at its token limit" : "Reply"));
  const facts = turn.completed.map((name) =>
    ["\u2713 " + name, "weight " + number(dialogue.goal.subgoals[name], 3), "done"]);
  if (gained) facts.push(["TSE", "+" + number(gained, 1), "done"]);
  facts.push(["engagement", number(turn.engagement, 2)]);
  facts.push(["on task", turn.on_task ? "yes" : "no", turn.on_task ? "" : "open"]);
  if (turn.events.length) facts.push(["events", turn.events.join(", ")]);
  if (turn.expected.length) facts.push(["a faithful reply contains", turn.expected.join(" | ")]);
  view.append(pairs(facts));
  return view;
}

function dialogueView(dialogue, policy) {
  const goal = dialogue.goal;
  const view = make("article");
  view.append(make("h3", "", policy + ", sample " + dialogue.sample));
  const state = make("div");
  state.append(make("span", "badge " + dialogue.stop, dialogue.stop));
  state.append(make("span", "note", goal.intent + ", goal " + goal.id + ", seed " + dialogue.seed +
    (dialogue.user ? ", user " + dialogue.user : "")));
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
  const gained = gainedTse(dialogue);
  view.append(about, ...dialogue.turns.map((turn, index) => turnView(dialogue, turn, index, gained[index])));
  return view;
}
