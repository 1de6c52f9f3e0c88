"use strict";
// The leaderboard: one table and one plot of the chosen model and task. All state is in the address.
(() => {
  const INDEX = window.HARNESS.index, GROUPS = window.HARNESS.groups = {};
  const find = (id) => document.getElementById(id);
  const FIELDS = ["group", "task", "setting", "method", "search", "significant"];
  let table = null;

  // --- the address ---------------------------------------------------------------------------------------------
  const state = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const remember = () => {
    const words = new URLSearchParams();
    for (const name of FIELDS) {
      const field = find(name), value = field.type === "checkbox" ? (field.checked ? "1" : "") : field.value;
      if (value) words.set(name, value);
    }
    if (table) {
      const order = table.order();
      if (order.length) words.set("order", order.map(([column, way]) => `${column}:${way}`).join(","));
    }
    history.replaceState(null, "", "#" + words);
  };

  // --- data ----------------------------------------------------------------------------------------------------
  // A page opened from a disk may not fetch; a script that hands its data over may be loaded.
  window.HARNESS.take = (key, group) => { GROUPS[key] = group; };
  const load = (key) => new Promise((resolve, reject) => {
    if (GROUPS[key]) { resolve(GROUPS[key]); return; }
    const script = document.createElement("script");
    script.src = `data/${key}.js`;
    script.onload = () => resolve(GROUPS[key]);
    script.onerror = () => reject(new Error(`data/${key}.js is missing`));
    document.head.append(script);
  });

  const options = (select, values, all) => {
    select.replaceChildren();
    if (all) select.append(new Option(all, ""));
    for (const value of values) select.append(Array.isArray(value) ? new Option(value[1], value[0]) : new Option(value, value));
  };

  // --- the table -----------------------------------------------------------------------------------------------
  const digits = (value) => {
    if (value === null || value === undefined) return "";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1000) return Number(value.toPrecision(4)).toString();
    return value.toFixed(size >= 10 ? 2 : size >= 1 ? 3 : 4);
  };
  const element = (tag, text, classes) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (classes) made.className = classes;
    return made;
  };
  const signed = (text) => (text.startsWith("-") ? "−" + text.slice(1) : "+" + text);
  const difference = (row) => {
    if (row.difference === null) return "";
    if (!row.relative) return signed(digits(row.difference));
    return row.difference >= 9 ? `× ${(1 + row.difference).toPrecision(4)}` : `${signed((100 * row.difference).toFixed(2))} %`;
  };
  // A long name breaks between its options, not within a word.
  const broken = (parent, text) => {
    text.split(/(?<=:)/).forEach((part, at) => { if (at) parent.append(document.createElement("wbr")); parent.append(part); });
    return parent;
  };
  // Names are text: elements are built, never markup.
  const columns = [
    { title: "method", data: "method", render: { display: (value, _, row) => {
      const link = broken(document.createElement("a"), value), isolated = document.createElement("bdi");
      link.href = row.page; isolated.append(link); return isolated;
    }, _: (value) => value } },
    { title: "setting", data: "setting", render: { display: (value) => element("bdi", value), _: (value) => value } },
    { title: "bits/weight", data: "bits", className: "number", render: { display: digits, _: (value) => value } },
    { title: "value", data: "value", className: "number", render: { display: (value, _, row) =>
      value === null ? element("span", row.status, "word") : element("span", digits(value), row.mark), _: (value) => value } },
    { title: "95% interval", data: "low", className: "number", render: { display: (value, _, row) =>
      value === null ? "" : `${digits(row.low)} to ${digits(row.high)}`, _: (value) => value } },
    { title: "vs full precision", data: "difference", className: "number", render: { display: (_, __, row) => difference(row),
      _: (value) => value } },
    { title: "recovery", data: "kept", className: "number", defaultContent: "", render: { display: (value) =>
      value === null ? "" : `${(100 * value).toFixed(1)} %`, _: (value) => value } },
    { title: "verdict", data: "verdict", render: { display: (value) => value ? element("span", value, `verdict ${value}`) : "", _: (value) => value } },
    { title: "n", data: "n", className: "number", defaultContent: "" },
    { title: "quantize (s)", data: "seconds", className: "number", render: { display: digits, _: (value) => value } },
    { title: "memory (GB)", data: "memory", className: "number", render: { display: digits, _: (value) => value } },
  ];

  const KEPT = columns.findIndex((column) => column.data === "kept");

  const rows = (group, task) => {
    const at = group.tasks.indexOf(task), numbers = group.numbers[at];
    // What is kept of full precision: of scores that are better when higher, and 0 when nothing is right.
    const whole = group.baseline === null || !group.metrics[at].up ? null : numbers[group.baseline].value;
    return group.cells.map((cell, index) => ({ ...cell, ...numbers[index],
      kept: whole && numbers[index].value !== null ? numbers[index].value / whole : null }));
  };

  const choose = async (wanted) => {
    const group = await load(find("group").value);
    options(find("task"), group.tasks);
    if (wanted.task && group.tasks.includes(wanted.task)) find("task").value = wanted.task;
    options(find("setting"), [...new Set(group.cells.map((cell) => cell.setting))], "all");
    options(find("method"), [...new Set(group.cells.map((cell) => cell.method))], "all");
    for (const name of ["setting", "method", "search"]) if (wanted[name]) find(name).value = wanted[name];
    find("significant").checked = wanted.significant === "1";
    show(group, wanted.order);
  };

  const show = (group, order) => {
    const task = find("task").value, found = rows(group, task), about = group.metrics[group.tasks.indexOf(task)];
    if (table) { table.clear(); table.rows.add(found); }
    else {
      table = new DataTable("#board", {
        data: found, columns, pageLength: 25, lengthMenu: [10, 25, 100, 500], deferRender: true, autoWidth: false,
        order: [], orderMulti: false, layout: { topStart: null, topEnd: null, bottomStart: ["info", "pageLength"], bottomEnd: "paging" },
        language: { emptyTable: "no cell", zeroRecords: "no cell passes the filters", lengthMenu: "_MENU_ a page",
          info: "_START_ to _END_ of _TOTAL_ cells", infoEmpty: "no cells", infoFiltered: "(of _MAX_)" },
      });
      table.on("order.dt", remember);
    }
    table.column(KEPT).visible(found.some((row) => row.kept !== null));
    if (order) table.order(order.split(",").map((part) => part.split(":")).map(([column, way]) => [Number(column), way]));
    find("what").textContent = `${group.title}: ${task}${about.metric ? ` ${about.metric}` : ""}` +
      (about.up === null ? "" : about.up ? " (higher is better)" : " (lower is better)");
    find("terms").textContent = group.terms;
    filter();
  };

  const filter = () => {
    const setting = find("setting").value, method = find("method").value, significant = find("significant").checked;
    table.search.fixed("choice", (_, row) =>
      (!setting || row.setting === setting) && (!method || row.method === method) &&
      (!significant || row.verdict === "better" || row.verdict === "worse"));
    table.search(find("search").value).draw();
    remember();
    plot();
  };

  // --- what is shown, to take along ----------------------------------------------------------------------------
  const place = (value) => {  // no text is a formula
    const text = value === null || value === undefined ? "" : typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? "'" + value : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = () => {
    const task = find("task").value, names = ["method", "setting", "bits", "value", "low", "high", "difference", "relative",
      "verdict", "kept", "mark", "n", "seconds", "memory", "status"];
    const lines = table.rows({ search: "applied" }).data().toArray().map((row) => [task, ...names.map((name) => row[name])]);
    return [["task", ...names], ...lines].map((line) => line.map(place).join(",")).join("\n") + "\n";
  };
  const said = (button, words) => {
    const before = button.textContent;
    button.textContent = words;
    setTimeout(() => { button.textContent = before; }, 1500);
  };
  const copy = async (button, text) => {
    try { await navigator.clipboard.writeText(text); said(button, "copied"); }
    catch {  // a browser that keeps the clipboard from pages of a disk
      const area = document.createElement("textarea");
      area.value = text; document.body.append(area); area.select();
      const done = document.execCommand("copy");
      area.remove(); said(button, done ? "copied" : "not allowed here");
    }
  };

  // --- the plot ------------------------------------------------------------------------------------------------
  const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a"];
  const MARKS = ["circle", "square", "diamond", "triangle-up", "cross", "star", "x"];
  const plain = (text) => text.replace(/[&<>]/g, (char) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[char]);
  const front = (points, up) => {
    const sorted = [...points].sort((a, b) => a.bits - b.bits || (up ? b.value - a.value : a.value - b.value));
    const kept = [];
    for (const point of sorted) if (!kept.length || (up ? point.value > kept.at(-1).value : point.value < kept.at(-1).value)) kept.push(point);
    return kept;
  };
  const plot = () => {
    const group = GROUPS[find("group").value], task = find("task").value, about = group.metrics[group.tasks.indexOf(task)];
    const shown = table.rows({ search: "applied" }).data().toArray().filter((row) => row.value !== null && row.bits !== null);
    const points = shown.filter((row) => !row.baseline), whole = shown.find((row) => row.baseline);
    const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--ink").trim(),
      line = style.getPropertyValue("--line").trim(), soft = style.getPropertyValue("--soft").trim();
    const names = [...new Set(points.map((row) => row.method.split(":")[0]))];
    const few = points.length <= 30, labelled = [];  // more would cover one another
    const label = (row) => {  // once for points of a setting that lie together
      const near = labelled.some((other) => other.setting === row.setting && Math.abs(Math.log(other.bits / row.bits)) < 0.05 &&
        Math.abs(Math.log(other.value / row.value)) < 0.4);
      if (!near) labelled.push(row);
      return near ? "" : plain(row.setting);
    };
    const traces = names.map((name, at) => {
      const those = points.filter((row) => row.method.split(":")[0] === name);
      return { name: plain(name.length > 24 ? name.slice(0, 23) + "…" : name), x: those.map((row) => row.bits), y: those.map((row) => row.value),
        mode: few ? "markers+text" : "markers", text: few ? those.map(label) : undefined, textposition: "middle right", cliponaxis: false,
        textfont: { size: 10, color: soft }, type: "scatter",
        marker: { color: COLOURS[at % 7], symbol: MARKS[at % 7], size: 10, line: { color: ink, width: 1 } },
        error_y: { type: "data", symmetric: false, thickness: 1, width: 0, color: soft, visible: few,
          array: those.map((row) => (row.high === null ? 0 : row.high - row.value)),
          arrayminus: those.map((row) => (row.low === null ? 0 : row.value - row.low)) },
        customdata: those.map((row) => row.page), hovertext: those.map((row) =>
          `${plain(row.method)}<br>${plain(row.setting)}<br>${digits(row.value)}` +
          (row.low === null ? "" : ` (${digits(row.low)} to ${digits(row.high)})`)), hoverinfo: "text" };
    });
    const best = front(points, about.up), bits = points.map((row) => row.bits);
    if (whole && points.length) traces.push({ name: "full precision", x: [Math.min(...bits), Math.max(...bits)], y: [whole.value, whole.value],
      mode: "lines", type: "scatter", line: { color: ink, dash: "dash", width: 1 }, hoverinfo: "skip" });
    traces.push({ name: "Pareto front", x: best.map((row) => row.bits), y: best.map((row) => row.value), mode: "lines",
      type: "scatter", line: { color: soft, dash: "dot", shape: "hv" }, hoverinfo: "skip" });
    const values = shown.map((row) => row.value), least = Math.min(...values), most = Math.max(...values);
    const logarithmic = !about.up && least > 0 && most > 5 * least;
    const steps = [];
    for (let power = Math.floor(Math.log10(least)); logarithmic && power <= Math.ceil(Math.log10(most)); power++)
      for (const digit of most > 1e4 * least ? [1] : [1, 2, 5]) steps.push(digit * 10 ** power);
    const axis = { gridcolor: line, linecolor: soft, zeroline: false, tickfont: { color: ink }, titlefont: { color: ink } };
    Plotly.react("plot", traces, { margin: { t: 10, r: 56, b: 50, l: 60 }, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink }, legend: { orientation: "h", y: -0.2 },
      xaxis: { ...axis, title: { text: "bits per weight" }, type: "log", tickvals: [2, 2.25, 2.5, 3, 3.5, 4, 4.25, 4.5, 5, 6, 8, 12, 16, 32] },
      yaxis: { ...axis, title: { text: plain(about.metric || task), standoff: 12 }, automargin: true,
        ...(logarithmic ? { type: "log", tickvals: steps, ticktext: steps.map((step) => step.toLocaleString("en", { maximumSignificantDigits: 2 })) } : { type: "linear" }) } },
      { responsive: true, displayModeBar: false });
    const plotted = find("plot");
    plotted.setAttribute("aria-label", `${points.length} cells by bits per weight and ${about.metric || task}; on the ` +
      `Pareto front: ${best.map((row) => `${row.method} ${row.setting}`).join(", ") || "none"}. The table has all numbers.`);
    plotted.removeAllListeners("plotly_click");
    plotted.on("plotly_click", (event) => { const page = event.points[0].customdata; if (page) location.href = page; });
  };

  // --- light and dark ------------------------------------------------------------------------------------------
  window.HARNESS.recolour = () => { if (table) plot(); };

  window.addEventListener("DOMContentLoaded", async () => {
    options(find("group"), INDEX.map((entry) => [entry.key, entry.title]));
    const wanted = state();
    if (INDEX.some((entry) => entry.key === wanted.group)) find("group").value = wanted.group;
    find("group").addEventListener("change", () => choose({}));
    find("task").addEventListener("change", () => show(GROUPS[find("group").value]));
    for (const name of ["setting", "method", "significant"]) find(name).addEventListener("change", filter);
    document.querySelector("form.controls").addEventListener("submit", (event) => event.preventDefault());
    find("search").addEventListener("input", filter);
    find("copy-csv").addEventListener("click", (event) => copy(event.target, csv()));
    find("copy-link").addEventListener("click", (event) => copy(event.target, location.href));
    window.addEventListener("hashchange", () => { const now = state(); if (now.group) find("group").value = now.group; choose(now); });
    await choose(wanted);
    document.body.dataset.ready = "yes";
  });
})();
