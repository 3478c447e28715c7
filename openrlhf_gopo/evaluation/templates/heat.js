// Tables of shares, shaded: which strategy follows which, and when dialogues stop.
const MOST_TURNS = 40; // columns of the second; longer dialogues share the last one

// counts: Map from row to Map from column to number. A cell is its share of `whole(row)`.
function heat(corner, rows, columns, counts, whole, tell) {
  const table = make("table", columns.some((column) => column.name.length > 3) ? "heat turned" : "heat");
  const head = table.createTHead().insertRow();
  head.append(make("th", "", corner));
  for (const column of columns) {
    const title = make("th", column.end ? "end" : "");
    title.scope = "col";
    title.append(make("span", "", column.name));
    head.append(title);
  }
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    const name = make("th", "", row.name);
    name.scope = "row";
    name.append(make("small", "", " " + row.total));
    line.append(name);
    for (const column of columns) {
      const count = counts.get(row.key)?.get(column.key) || 0;
      const share = count / whole(row);
      const cell = make("td", column.end ? "end " + column.key : "", count ? percent(share) : "");
      if (count) {
        cell.style.setProperty("--share", Math.round(100 * share) + "%");
        cell.title = tell(row.name, column.name) + ": " + count + " of " + whole(row);
      }
      line.append(cell);
    }
  }
  const scroll = make("div", "scroll");
  scroll.append(table);
  return scroll;
}

const percent = (share) => (share >= 0.005 ? String(Math.round(100 * share)) : "<1");

function count(counts, row, column) {
  if (!counts.has(row)) counts.set(row, new Map());
  counts.get(row).set(column, (counts.get(row).get(column) || 0) + 1);
}

// Strategies in the order in which dialogues reach them on average: the flow then runs down the diagonal.
function inOrder(dialogues) {
  const seen = new Map(); // strategy -> [sum of its turns' numbers, uses]
  for (const { used } of dialogues) {
    used.forEach((strategy, turn) => {
      const [sum, uses] = seen.get(strategy) || [0, 0];
      seen.set(strategy, [sum + turn, uses + 1]);
    });
  }
  const mean = ([, [sum, uses]]) => sum / uses;
  return [...seen].sort((a, b) => mean(a) - mean(b)).map(([strategy]) => strategy);
}

// Row: a strategy. Column: what came next, another strategy or the end of the dialogue. `order` and `ends` are those
// of all the flows drawn, so that two of them can be laid beside each other.
function flow(dialogues, order, ends) {
  const counts = new Map();
  for (const { used, stop } of dialogues) {
    used.forEach((strategy, turn) => {
      count(counts, turn ? used[turn - 1] : "start", strategy);
    });
    count(counts, used.length ? used[used.length - 1] : "start", stop);
  }
  const total = (key) => [...(counts.get(key)?.values() || [])].reduce((a, b) => a + b, 0);
  const name = (strategy) => INDEX.strategies[strategy] || "(none)";
  const rows = [{ key: "start", name: "start", total: total("start") }, ...order.map((strategy) => ({
    key: strategy, name: name(strategy), total: total(strategy),
  }))];
  const columns = order.map((strategy) => ({ key: strategy, name: name(strategy) }))
    .concat(ends.map((stop) => ({ key: stop, name: stop, end: true })));
  return heat("from \\ to", rows, columns, counts, (row) => row.total, (from, to) => from + " \u2192 " + to);
}

// Row: a stop reason. Column: the number of turns after which it came.
function stopsByTurn(dialogues) {
  const counts = new Map();
  const totals = new Map();
  for (const { used, stop } of dialogues) {
    count(counts, stop, Math.min(used.length, MOST_TURNS));
    totals.set(stop, (totals.get(stop) || 0) + 1);
  }
  const rows = INDEX.stops.filter((stop) => totals.has(stop))
    .map((stop) => ({ key: stop, name: stop, total: totals.get(stop) }));
  const turns = [...counts.values()].flatMap((row) => [...row.keys()]);
  const least = Math.min(...turns);
  const columns = Array.from({ length: Math.max(...turns) - least + 1 }, (_, index) => least + index)
    .map((length) => ({ key: length, name: String(length) + (length === MOST_TURNS ? "+" : "") }));
  return heat("stop \\ turns", rows, columns, counts, () => dialogues.length, (stop, turns) => stop + " after " + turns);
}
