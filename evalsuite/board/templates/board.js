"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { columns, backbones } = data;
  const cells = backbones.map(() => new Map());
  for (const [column, row, ...rest] of data.cells) cells[row].set(column, rest);
  const form = document.getElementById("filters");
  const table = document.getElementById("scores");
  const more = document.getElementById("more");
  const PAGE = 100;
  let sort = { column: 0, descending: columns[0].higher, name: false };
  let shown = PAGE;

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const choices = {
    task: columns.map((c) => c.task), protocol: columns.map((c) => c.protocol), engine: columns.map((c) => c.engine),
    method: backbones.map((b) => b.method), arch: backbones.map((b) => b.arch),
  };
  for (const [name, values] of Object.entries(choices)) {
    const known = [...new Set(values.filter(Boolean))].sort();
    form.elements[name].append(...known.map((value) => element("option", { value, textContent: value })));
    form.elements[name].parentElement.hidden = known.length < 2;
  }
  const range = columns.map((_, column) => {
    const found = cells.flatMap((row) => (row.has(column) ? [row.get(column)] : []));
    const ends = found.flatMap(([value, low, high]) => [value, low ?? value, high ?? value]);
    const low = ends.reduce((a, b) => Math.min(a, b), Infinity), high = ends.reduce((a, b) => Math.max(a, b), -Infinity);
    return [low, high - low || 1];
  });

  const wanted = (name) => form.elements[name].value;
  const visible = () => {
    const kept = columns.map((_, i) => i).filter((i) =>
      ["task", "protocol", "engine"].every((name) => !wanted(name) || columns[i][name] === wanted(name)));
    const words = wanted("text").toLowerCase().split(/\s+/).filter(Boolean);
    const rows = backbones.map((_, i) => i).filter((i) => {
      const b = backbones[i], all = `${b.label} ${b.arch} ${b.method}`.toLowerCase();
      return words.every((word) => all.includes(word)) && (!wanted("method") || b.method === wanted("method"))
        && (!wanted("arch") || b.arch === wanted("arch")) && kept.some((column) => cells[i].has(column));
    });
    return [kept, rows];
  };
  const ordered = (rows) => {
    const sign = sort.descending ? -1 : 1;
    if (sort.name) return rows.sort((a, b) => sign * backbones[a].label.localeCompare(backbones[b].label));
    const value = (row) => cells[row].get(sort.column)?.[0];
    return rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (x - y) || backbones[a].label.localeCompare(backbones[b].label);
    });
  };
  const whisker = (column, [value, low, high]) => {
    const [start, width] = range[column], at = (x) => `${(100 * (x - start)) / width}%`;
    const bar = element("span", { className: "whisker" });
    if (low !== null) {
      const half = element("i");
      half.style.left = at(low);
      half.style.width = `${(100 * (high - low)) / width}%`;
      bar.append(half);
    }
    const mark = element("b");
    mark.style.left = at(value);
    bar.append(mark);
    return bar;
  };
  const cell = (row, column) => {
    const found = cells[row].get(column);
    if (!found) return element("td");
    const [value, low, high, rank, best, worst, tied] = found;
    const bounds = best === null ? "" : ` (${best}–${worst})`;
    const title = low === null ? "no interval" : `${low.toFixed(4)} to ${high.toFixed(4)}`;
    return element("td", { className: tied ? "tied" : "", title }, value.toFixed(4), whisker(column, found),
      element("small", { textContent: `rank ${rank}${bounds}` }));
  };
  const heading = (text, small, active, link, pick) => {
    const arrow = active ? (sort.descending ? " ▼" : " ▲") : "";
    const head = element("th", { scope: "col" }, element("button", { type: "button", textContent: text + arrow, onclick: pick }));
    head.ariaSort = active ? (sort.descending ? "descending" : "ascending") : "none";
    if (small) head.append(element("small", {}, element("a", { href: link, textContent: small })));
    return head;
  };
  const draw = () => {
    const [kept, rows] = visible();
    if (!sort.name && !kept.includes(sort.column) && kept.length) {
      sort = { column: kept[0], descending: columns[kept[0]].higher, name: false };
    }
    const pickName = () => { sort = { ...sort, name: true, descending: sort.name && !sort.descending }; draw(); };
    const pick = (column) => () => {
      const again = !sort.name && sort.column === column;
      sort = { column, name: false, descending: again ? !sort.descending : columns[column].higher };
      draw();
    };
    table.tHead.replaceChildren(element("tr", {}, heading("Backbone", "", sort.name, "", pickName),
      ...kept.map((i) => heading(columns[i].title, columns[i].metric, !sort.name && sort.column === i, columns[i].link, pick(i)))));
    const some = ordered(rows).slice(0, shown);
    table.tBodies[0].replaceChildren(...some.map((row) => element("tr", {},
      element("th", { scope: "row" }, element("a", { href: backbones[row].link, textContent: backbones[row].label }),
        element("small", { textContent: [backbones[row].arch, backbones[row].method].filter(Boolean).join(", ") })),
      ...kept.map((column) => cell(row, column)))));
    more.hidden = rows.length <= shown;
    document.getElementById("count").textContent = `${rows.length} of ${backbones.length}`;
  };
  form.addEventListener("input", () => { shown = PAGE; draw(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { shown += PAGE; draw(); });
  draw();
})();
