// Filters, the list of dialogues found, and one or two of them side by side. The address keeps the state.
const PAGE = 100; // list entries per "show more"
const byId = (id) => document.getElementById(id);
const controls = Object.fromEntries(
  ["policy", "beside", "intent", "stop", "strategy", "sort", "query"].map((id) => [id, byId(id)]));
let found = [];
let listed = 0;
let current = null;
let latest = 0; // number of the newest search: an older one that ends later is dropped

const SORTS = {
  "as evaluated": null,
  "TSE, lowest first": (entry) => entry.tse ?? Infinity,
  "TSE, highest first": (entry) => -(entry.tse ?? -Infinity),
  "furthest behind the one beside": (entry) => gap(entry),
  "furthest ahead of the one beside": (entry) => -gap(entry),
};

// TSE of an entry minus that of the dialogue beside it; 0 where there is none to compare.
function gap(entry) {
  const other = controls.beside.value === "" ? null : counterpart(entry, Number(controls.beside.value));
  return other && entry.tse !== null && other.tse !== null ? entry.tse - other.tse : 0;
}

async function show(entry) {
  current = entry;
  for (const button of byId("list").children) {
    button.setAttribute("aria-current", String(found[Number(button.dataset.index)] === entry));
  }
  remember();
  if (!entry) { byId("columns").replaceChildren(); return; }
  const views = [dialogueView(await whole(entry), INDEX.policies[entry.policy])];
  const beside = controls.beside.value;
  if (beside !== "") {
    const other = counterpart(entry, Number(beside));
    if (other) views.push(dialogueView(await whole(other), INDEX.policies[other.policy]));
    else if (Number(beside) !== entry.policy) {
      views.push(make("article", "none", INDEX.policies[beside] + " has no dialogue about goal " + entry.goal + "."));
    }
  }
  if (current === entry) byId("columns").replaceChildren(...views);
}

function grow() {
  const end = Math.min(listed + PAGE, found.length);
  for (; listed < end; listed++) {
    const entry = found[listed];
    const button = make("button", "", entry.intent);
    button.type = "button";
    button.dataset.index = listed;
    button.setAttribute("aria-current", String(entry === current));
    const place = [entry.goal, "sample " + entry.sample, INDEX.policies[entry.policy]];
    const result = [entry.stop, "TSE " + number(entry.tse, 1), entry.used.length + (entry.used.length === 1 ? " turn" : " turns")];
    button.append(make("small", "", place.join(", ")), make("small", "", result.join(", ")));
    button.addEventListener("click", () => show(entry));
    byId("list").append(button);
  }
  byId("more").hidden = listed >= found.length;
}

// The dialogues that pass every filter but the policy's.
async function passing() {
  const { intent, stop, strategy } = controls;
  const term = controls.query.value.trim().toLowerCase();
  const say = (done) => { byId("count").textContent = "searching " + done + " of " + INDEX.dialogues.length; };
  const all = term ? await texts(say) : null;
  return INDEX.dialogues.filter((entry) =>
    (intent.value === "" || entry.intent === intent.value) && (stop.value === "" || entry.stop === stop.value) &&
    (strategy.value === "" || entry.used.includes(Number(strategy.value))) && (!all || all[entry.at].includes(term)));
}

async function filter() {
  const mine = ++latest;
  const passed = await passing();
  if (mine !== latest) return;
  const { policy, beside, sort } = controls;
  found = passed.filter((entry) => policy.value === "" || entry.policy === Number(policy.value));
  const key = SORTS[sort.value];
  if (key) found = found.map((entry) => [key(entry), entry]).sort((a, b) => a[0] - b[0]).map(([, entry]) => entry);
  byId("count").textContent = found.length + " of " + INDEX.dialogues.length + " dialogues";
  byId("list").replaceChildren();
  listed = 0;
  const besides = beside.value === "" || beside.value === policy.value ? []
    : [[INDEX.policies[beside.value], passed.filter((entry) => entry.policy === Number(beside.value))]];
  draw([[policy.value === "" ? "all policies" : INDEX.policies[policy.value], found], ...besides]);
  const next = found.includes(current) ? current : found[0] || null;
  current = next;
  grow();
  await show(next);
}

// Flow and stops of the dialogues found; drawn when opened, for they can be large.
function draw(groups) {
  const all = groups.flatMap(([, entries]) => entries);
  const order = inOrder(all);
  const ends = INDEX.stops.filter((stop) => all.some((entry) => entry.stop === stop));
  const views = { flow: (entries) => flow(entries, order, ends), stops: stopsByTurn };
  for (const [id, view] of Object.entries(views)) {
    const fold = byId(id);
    const fill = () => {
      if (!fold.open || fold.drawn === groups) return;
      fold.drawn = groups;
      const parts = groups.map(([name, entries]) => {
        const part = make("figure");
        part.append(make("figcaption", "", name + ", " + entries.length + " dialogues"));
        if (entries.length) part.append(view(entries));
        return part;
      });
      fold.querySelector(".drawing").replaceChildren(...parts);
    };
    fold.ontoggle = fill;
    fill();
  }
}

function remember() {
  const state = new URLSearchParams();
  for (const [id, control] of Object.entries(controls)) if (control.value !== "") state.set(id, control.value);
  if (current) state.set("at", current.at);
  for (const id of ["flow", "stops"]) if (byId(id).open) state.set(id, "open");
  history.replaceState(null, "", "#" + state);
}

function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const [id, control] of Object.entries(controls)) {
    const value = state.get(id);
    if (value === null) { if (location.hash.length > 1) control.value = control.options?.[0].value ?? ""; continue; }
    control.value = value;
    if (control.options && control.selectedIndex < 0) control.selectedIndex = 0;
  }
  for (const id of ["flow", "stops"]) byId(id).open = state.get(id) === "open";
  current = INDEX.dialogues[Number(state.get("at") ?? -1)] || null;
}

function options(select, none, values) {
  select.append(...(none === null ? [] : [new Option(none, "")]), ...values.map(([label, value]) => new Option(label, value)));
  select.addEventListener("change", filter);
}

async function start() {
  await openIndex();
  const numbered = (names) => names.map((name, index) => [name || "(none)", index]);
  const plain = (values) => values.map((value) => [value, value]);
  const present = new Set(INDEX.dialogues.map((entry) => entry.stop));
  options(controls.policy, "all", numbered(INDEX.policies));
  options(controls.beside, "none", numbered(INDEX.policies));
  options(controls.intent, "all", plain([...new Set(INDEX.dialogues.map((entry) => entry.intent))].sort()));
  options(controls.stop, "all", plain(INDEX.stops.filter((stop) => present.has(stop))));
  const byName = (a, b) => (a[0] < b[0] ? -1 : 1);
  options(controls.strategy, "any", numbered(INDEX.strategies).sort(byName));
  options(controls.sort, null, plain(Object.keys(SORTS)));
  if (INDEX.policies.length) controls.policy.value = "0";
  if (INDEX.policies.length > 1) controls.beside.value = String(INDEX.policies.length - 1);
  recall();
  let typing = 0;
  controls.query.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(filter, 200); });
  for (const id of ["flow", "stops"]) byId(id).addEventListener("toggle", remember);
  byId("more").addEventListener("click", grow);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  await filter();
  document.documentElement.dataset.ready = Math.round(performance.now()); // milliseconds; tests wait for it
}

start().catch((error) => { // an old browser, or a page cut while it was copied
  byId("count").textContent = "The dialogues cannot be unpacked (" + error.message + "): use a browser of 2023 or newer, " +
    "and check that the file is whole.";
});
