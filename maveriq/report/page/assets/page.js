"use strict";
// Draws the charts of a report from the JSON in #data, and serves its controls. No chart decides anything: figures,
// names and downsampled points come from maveriq; this file turns them into pixels. On a live page it asks the server
// for the data again and again.
(() => {
  // Colours that the colour-blind tell apart (after Okabe and Ito), each with 3:1 contrast on its ground. Dashes and
  // markers differ too, so that black and white is enough.
  const THEMES = {
    light: {
      ground: "#ffffff", text: "#1b1f24", quiet: "#515963", grid: "#dfe3e8", target: "#a8201a",
      lines: ["#1b1f24", "#0072b2", "#c44e00", "#00805d", "#a64d87", "#7a5200", "#4b4fb0"],
      heat: [[238, 243, 250], [130, 178, 222], [8, 48, 107]],
    },
    dark: {
      ground: "#14171a", text: "#e8eaed", quiet: "#b1b8c0", grid: "#333a42", target: "#ff9a8f",
      lines: ["#e8eaed", "#56b4e9", "#f28e4a", "#2bc596", "#e59acb", "#e6c35c", "#a3a8ff"],
      heat: [[28, 36, 46], [52, 108, 166], [190, 222, 255]],
    },
  };
  const DASHES = [[], [8, 3], [3, 2], [9, 3, 3, 3], [9, 3, 3, 3, 3, 3], [14, 3]];
  const MARKERS = ["circle", "triangle", "square", "diamond", "inverted_triangle", "cross"];
  const HEIGHT = 300;
  const CLOCK_FORMATS = {seconds: "%H:%M:%S", minsec: "%H:%M:%S", minutes: "%H:%M", hourmin: "%H:%M", hours: "%H:%M", days: "%F"};
  const root = document.documentElement;
  let data = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set(); // models that the reader has switched off
  // What each chart offers: {id, figure, paint, filter, range, home, isTime, rescale, update}. `update` shows new data and
  // returns whether it could: it cannot where lines or rows have come or gone.
  const drawn = [];
  const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
  const isTouch = window.matchMedia("(pointer: coarse)").matches;
  const isNarrow = () => window.innerWidth < 600;

  function themeName() {
    return root.dataset.theme || (darkScheme.matches ? "dark" : "light");
  }
  const theme = () => THEMES[themeName()];
  const colour = (style) => theme().lines[style === 0 ? 0 : 1 + ((style - 1) % 6)];
  const dash = (style) => (style === 0 ? [] : DASHES[(style - 1 + Math.floor((style - 1) / 6)) % DASHES.length]);
  const isShown = (part) => !hidden.has(part.model);
  const sameNames = (a, b) => a.length === b.length && a.every((part, at) => (part.name ?? part) === (b[at].name ?? b[at]));

  function shortened(text) {
    const most = isNarrow() ? 12 : 24;
    return text.length <= most ? text : `${text.slice(0, most - 7)}…${text.slice(-6)}`;
  }

  // ---- figures and axes ------------------------------------------------------------------------------------------

  function makeFigure(options) {
    const figure = Bokeh.Plotting.figure({
      sizing_mode: "stretch_width", height: HEIGHT, toolbar_location: null, tools: [], min_border_right: 12, ...options,
    });
    figure.toolbar.logo = null;
    return figure;
  }

  // Axes of the time of day count milliseconds since 1970.
  const onAxis = (axis) => (axis.epoch === null ? (value) => value : (value) => (axis.epoch + value) * 1000);
  const typeOf = (axis) => (axis.epoch !== null ? "datetime" : axis.log ? "log" : "linear");
  const unitOf = (axis) => (axis.epoch === null ? ", s" : "");
  const hoverTime = (axis, field, plain = "0,0.0") => `${field}{${axis.epoch === null ? plain : "%H:%M:%S"}}`;

  function addTools(figure, tooltips, renderers, times = []) {
    const formatters = Object.fromEntries(times.map((field) => [field, "datetime"]));
    const tools = [new Bokeh.HoverTool({tooltips, renderers, line_policy: "nearest", formatters})];
    const zoom = new Bokeh.BoxZoomTool({dimensions: "width"});
    if (!isTouch) tools.push(zoom); // on a touch screen, a drag scrolls the page
    figure.add_tools(...tools);
    if (!isTouch) figure.toolbar.active_drag = zoom;
  }

  function axesOf(figure) {
    return [...figure.below, ...figure.left];
  }

  function paintFrame(figure) {
    const t = theme();
    figure.background_fill_color = t.ground;
    figure.border_fill_color = t.ground;
    figure.outline_line_color = t.grid;
    for (const axis of axesOf(figure)) {
      axis.axis_label_text_color = t.text;
      axis.major_label_text_color = t.text;
      axis.axis_line_color = t.quiet;
      axis.major_tick_line_color = t.quiet;
      axis.minor_tick_line_color = null;
      axis.axis_label_text_font_style = "normal";
      axis.axis_label_text_font_size = "12px";
      axis.major_label_text_font_size = "11px";
    }
    for (const part of figure.center) if ("grid_line_color" in part.attributes) part.grid_line_color = t.grid;
  }

  function styleAxis(axis, spec) {
    axis.axis_label = spec.label;
    if (spec.epoch !== null) {
      axis.ticker.desired_num_ticks = isNarrow() ? 3 : 6;
      axis.formatter = new Bokeh.DatetimeTickFormatter(Object.fromEntries(
        ["seconds", "minsec", "minutes", "hourmin", "hours", "days"].map((unit) => [unit, CLOCK_FORMATS[unit]])));
    } else if (spec.log) {
      axis.ticker = new Bokeh.LogTicker({mantissas: [1, 2, 5], desired_num_ticks: isNarrow() ? 4 : 7});
      axis.formatter = new Bokeh.BasicTickFormatter({use_scientific: false});
    } else {
      axis.ticker.desired_num_ticks = isNarrow() ? 4 : 7;
      axis.formatter = new Bokeh.NumeralTickFormatter({format: "0,0.[0000]"});
    }
  }

  function nameRows(axis, names, height) {
    const every = Math.max(1, Math.ceil((names.length * 14) / (height - 60)));
    const ticks = names.map((_, at) => at).filter((at) => at % every === 0);
    axis.ticker = new Bokeh.FixedTicker({ticks, minor_ticks: []});
    axis.major_label_overrides = new Map(ticks.map((at) => [at, shortened(names[at])]));
  }

  function rowsRange(count) {
    return new Bokeh.Range1d({start: count - 0.4, end: -0.6});
  }

  // The range of all axes of time together.
  function timeHome(axis) {
    const end = Math.max(1e-6, ...Object.values(data).filter((c) => c.time).map((c) => {
      if (c.kind === "lines") return Math.max(...c.series.map((s) => s.x[s.x.length - 1] || 0));
      return c.kind === "heat" ? c.edges[c.edges.length - 1] : Math.max(0, ...c.spans.map((s) => s.to));
    }));
    return [0, end].map(onAxis(axis));
  }

  // Moves a range that the reader has not zoomed to where the data are now.
  function moveHome(chart, home) {
    const isHome = chart.range.start === chart.home[0] && chart.range.end === chart.home[1];
    chart.home = home;
    if (isHome) setRange(chart, ...home);
  }

  // ---- kinds of charts -------------------------------------------------------------------------------------------

  function steps(x, y, low) {
    const xs = [], ys = [], lows = [];
    for (let at = 0; at < x.length; at++) {
      if (at > 0) {
        xs.push(x[at]);
        ys.push(y[at - 1] ?? NaN);
        if (low) lows.push(low[at - 1] ?? NaN);
      }
      xs.push(x[at]);
      ys.push(y[at] ?? NaN);
      if (low) lows.push(low[at] ?? NaN);
    }
    return {x: xs, y: ys, low: lows};
  }

  function pointsOf(series, axis) {
    const x = series.x.map(onAxis(axis)), y = series.y.map((v) => v ?? NaN);
    return series.step ? steps(x, y, series.low) : {x, y, low: series.low || []};
  }

  function homeOfLines(spec) {
    if (spec.time) return timeHome(spec.x);
    const all = spec.series.flatMap((s) => s.x);
    const first = spec.x.low ?? Math.min(...all), last = spec.x.high ?? Math.max(...all);
    const margin = spec.x.log ? Math.max(Math.pow(last / first, 0.02) || 1, 1.01) : (last - first) * 0.02;
    const home = spec.x.log ? [first / margin, last * margin] : [first - margin, last + margin];
    if (!(home[0] < home[1])) home[1] = home[0] + 1;
    return home;
  }

  function drawLines(spec) {
    const home = homeOfLines(spec);
    const range = new Bokeh.Range1d({start: home[0], end: home[1]});
    const yRange = new Bokeh.Range1d({start: spec.y.low ?? 0, end: 1});
    const figure = makeFigure({x_range: range, y_range: yRange, x_axis_type: typeOf(spec.x),
      y_axis_type: spec.y.log ? "log" : "linear"});
    const parts = spec.series.map((series) => {
      const points = pointsOf(series, spec.x), sources = {line: new Bokeh.ColumnDataSource({data: {}})}, renderers = [];
      if (series.low) {
        sources.area = new Bokeh.ColumnDataSource({data: {}});
        renderers.push(figure.varea({field: "x"}, {field: "y1"}, {field: "y2"}, {source: sources.area, fill_alpha: 0.25}));
      }
      const line = figure.line({field: "x"}, {field: "y"}, {
        source: sources.line, name: series.name, line_width: series.style === 0 ? 2.6 : 1.8, line_dash: dash(series.style)});
      renderers.push(line);
      if (series.markers) {
        sources.marks = new Bokeh.ColumnDataSource({data: {}});
        renderers.push(figure.scatter({field: "x"}, {field: "y"}, {
          source: sources.marks, name: series.name, size: 5, marker: {value: MARKERS[Math.max(0, series.style - 1) % 6]}}));
      }
      return {series, points, sources, renderers, line};
    });
    const fill = () => {
      for (const {series, points, sources} of parts) {
        sources.line.data = {x: points.x, y: points.y};
        if (sources.area) sources.area.data = {x: points.x, y1: points.low, y2: series.high || points.y};
        if (sources.marks) sources.marks.data = {x: series.x.map(onAxis(spec.x)), y: series.y.map((v) => v ?? NaN)};
      }
    };
    fill();
    if (spec.target !== null) {
      figure.add_layout(new Bokeh.Span({location: spec.target, dimension: "width", line_color: theme().target,
        line_dash: [4, 4], line_width: 1.5}));
    }
    styleAxis(figure.below[0], spec.x);
    styleAxis(figure.left[0], spec.y);
    const tooltips = [["", "$name"], [spec.x.label, hoverTime(spec.x, "@x", "0,0.[0000]")], [spec.y.label, "@y{0,0.[00]}"]];
    addTools(figure, tooltips, parts.map((part) => part.line), spec.x.epoch === null ? [] : ["@x"]);
    const rescale = () => {
      if (spec.y.high !== null) {
        yRange.end = spec.y.high * 1.02;
        return;
      }
      let top = 0;
      for (const {series, points} of parts) {
        if (!isShown(series)) continue;
        for (let at = 0; at < points.x.length; at++) {
          const most = Math.max(points.y[at], series.step ? -Infinity : series.high?.[at] ?? -Infinity);
          if (points.x[at] >= range.start && points.x[at] <= range.end && most > top) top = most;
        }
      }
      yRange.end = (Math.max(top, spec.target ?? 0) || 1) * 1.06;
    };
    rescale();
    const paint = () => {
      paintFrame(figure);
      for (const {series, renderers} of parts) {
        for (const {glyph} of renderers) {
          if ("line_color" in glyph.attributes) glyph.line_color = colour(series.style);
          if ("fill_color" in glyph.attributes) glyph.fill_color = colour(series.style);
        }
      }
    };
    const filter = () => {
      for (const {series, renderers} of parts) for (const renderer of renderers) renderer.visible = isShown(series);
      rescale();
    };
    const chart = {figure, paint, filter, range, home, isTime: spec.time, rescale};
    chart.update = (fresh) => {
      if (!sameNames(fresh.series, spec.series) || fresh.target !== spec.target) return false;
      spec = fresh;
      fresh.series.forEach((series, at) => Object.assign(parts[at], {series, points: pointsOf(series, spec.x)}));
      fill();
      moveHome(chart, homeOfLines(spec));
      rescale();
      return true;
    };
    return chart;
  }

  function drawBars(spec) {
    const names = spec.bars.map((bar) => bar.name);
    const height = Math.min(640, 90 + 26 * names.length);
    const range = new Bokeh.Range1d({start: 0, end: 1});
    const rescale = () => {
      const ends = spec.bars.flatMap((bar) => [bar.value ?? 0, bar.high ?? 0]);
      const start = spec.x.low ?? Math.min(0, ...spec.bars.map((bar) => bar.low ?? bar.value ?? 0));
      const high = spec.x.high ?? Math.max(spec.target ?? 0, ...ends) * 1.15;
      range.setv({start, end: (high || 1) * (spec.x.high ? 1.12 : 1)});
    };
    rescale();
    const figure = makeFigure({height, x_range: range, y_range: rowsRange(names.length)});
    const source = new Bokeh.ColumnDataSource({data: {y: [], value: [], name: [], label: [], colour: [], at: []}});
    const bars = figure.hbar({field: "y"}, 0.62, {field: "value"}, 0, {source, fill_color: {field: "colour"},
      line_color: {field: "colour"}, fill_alpha: 0.85, hatch_pattern: {field: "hatch"}, hatch_alpha: 0.5});
    const labels = figure.text({field: "at"}, {field: "y"}, {field: "label"}, {source, text_font_size: "11px",
      text_baseline: "middle", x_offset: 5});
    const whiskers = figure.segment({field: "low"}, {field: "y"}, {field: "high"}, {field: "y"}, {source, line_width: 2});
    if (spec.target !== null) {
      figure.add_layout(new Bokeh.Span({location: spec.target, dimension: "height", line_color: theme().target,
        line_dash: [4, 4], line_width: 1.5}));
    }
    styleAxis(figure.below[0], spec.x);
    nameRows(figure.left[0], names, height);
    figure.add_tools(new Bokeh.HoverTool({tooltips: [["", "@name"], [spec.x.label, "@label"]], renderers: [bars]}));
    const fill = () => {
      const shown = spec.bars.map((bar, at) => ({...bar, at})).filter(isShown).filter((bar) => bar.value !== null);
      source.data = {
        y: shown.map((bar) => bar.at), value: shown.map((bar) => bar.value), name: shown.map((bar) => bar.name),
        label: shown.map((bar) => bar.value.toLocaleString("en", {maximumSignificantDigits: 4})),
        colour: shown.map((bar) => colour(bar.style)), low: shown.map((bar) => bar.low ?? NaN),
        high: shown.map((bar) => bar.high ?? NaN), at: shown.map((bar) => Math.max(bar.value, bar.high ?? 0, 0)),
        hatch: shown.map((bar) => [" ", "/", "\\", "-", "|", "x", "."][bar.style === 0 ? 0 : (bar.style - 1) % 7]),
      };
    };
    const paint = () => {
      paintFrame(figure);
      labels.glyph.text_color = theme().text;
      whiskers.glyph.line_color = theme().text;
      bars.glyph.hatch_color = theme().ground;
      fill();
    };
    const update = (fresh) => {
      if (!sameNames(fresh.bars, spec.bars) || fresh.target !== spec.target) return false;
      spec = fresh;
      rescale();
      fill();
      return true;
    };
    return {figure, paint, filter: fill, range: null, home: null, isTime: false, rescale: () => {}, update};
  }

  function heatColour(share) {
    const [low, middle, high] = theme().heat;
    const [from, to, part] = share < 0.5 ? [low, middle, share * 2] : [middle, high, share * 2 - 1];
    return `rgb(${from.map((value, at) => Math.round(value + (to[at] - value) * part)).join(",")})`;
  }

  function cellsOf(spec) {
    const cells = {left: [], right: [], top: [], bottom: [], row: [], value: []}, edges = spec.edges.map(onAxis(spec.x));
    spec.values.forEach((row, at) => row.forEach((value, column) => {
      if (value === null) return;
      cells.left.push(edges[column]);
      cells.right.push(edges[column + 1]);
      cells.top.push(at - 0.5);
      cells.bottom.push(at + 0.5);
      cells.row.push(spec.rows[at]);
      cells.value.push(value);
    }));
    return cells;
  }

  function drawHeat(spec) {
    const height = Math.max(170, Math.min(440, 100 + 22 * spec.rows.length)), home = timeHome(spec.x);
    const range = new Bokeh.Range1d({start: home[0], end: home[1]});
    const figure = makeFigure({height, x_range: range, y_range: rowsRange(spec.rows.length), x_axis_type: typeOf(spec.x)});
    let cells = cellsOf(spec);
    const source = new Bokeh.ColumnDataSource({data: {...cells, colour: cells.value.map(() => "#888888")}});
    const quads = figure.quad({field: "left"}, {field: "right"}, {field: "bottom"}, {field: "top"}, {
      source, fill_color: {field: "colour"}, line_color: {field: "colour"}});
    styleAxis(figure.below[0], spec.x);
    nameRows(figure.left[0], spec.rows, height);
    const tooltips = [["", "@row"], [`from${unitOf(spec.x)}`, hoverTime(spec.x, "@left")], [spec.unit, "@value{0,0.[00]}"]];
    addTools(figure, tooltips, [quads], spec.x.epoch === null ? [] : ["@left"]);
    const fill = () => {
      source.data = {...cells, colour: cells.value.map((value) => heatColour(Math.min(1, value / spec.top)))};
    };
    const paint = () => {
      paintFrame(figure);
      fill();
    };
    const chart = {figure, paint, filter: () => {}, range, home, isTime: true, rescale: () => {}};
    chart.update = (fresh) => {
      if (!sameNames(fresh.rows, spec.rows) || fresh.top !== spec.top) return false;
      spec = fresh;
      cells = cellsOf(spec);
      fill();
      moveHome(chart, timeHome(spec.x));
      return true;
    };
    return chart;
  }

  function drawGantt(spec) {
    const height = Math.max(150, Math.min(700, 90 + 26 * spec.rows.length)), home = timeHome(spec.x);
    const range = new Bokeh.Range1d({start: home[0], end: home[1]});
    const figure = makeFigure({height, x_range: range, y_range: rowsRange(spec.rows.length), x_axis_type: typeOf(spec.x)});
    const source = new Bokeh.ColumnDataSource({data: {left: []}});
    const bars = figure.quad({field: "left"}, {field: "right"}, {field: "bottom"}, {field: "top"}, {
      source, fill_color: {field: "colour"}, fill_alpha: {field: "alpha"}, line_color: {field: "colour"},
      hatch_pattern: {field: "hatch"}, hatch_color: {field: "colour"}, hatch_alpha: 0.9});
    styleAxis(figure.below[0], spec.x);
    nameRows(figure.left[0], spec.rows, height);
    const unit = unitOf(spec.x), isClock = spec.x.epoch !== null;
    const tooltips = [["", "@row"], ["", "@text"], [`from${unit}`, hoverTime(spec.x, "@left")], [`to${unit}`, hoverTime(spec.x, "@right")]];
    addTools(figure, tooltips, [bars], isClock ? ["@left", "@right"] : []);
    const fill = () => {
      const shown = spec.spans.filter(isShown), place = onAxis(spec.x);
      source.data = {
        left: shown.map((s) => place(s.from)), right: shown.map((s) => place(s.to)), top: shown.map((s) => s.row - 0.32),
        bottom: shown.map((s) => s.row + 0.32), row: shown.map((s) => spec.rows[s.row]), text: shown.map((s) => s.text),
        colour: shown.map((s) => colour(s.style)), alpha: shown.map((s) => (s.pale ? 0.1 : 0.85)),
        hatch: shown.map((s) => (s.pale ? "/" : " ")),
      };
    };
    const paint = () => {
      paintFrame(figure);
      fill();
    };
    const chart = {figure, paint, filter: fill, range, home, isTime: true, rescale: () => {}};
    chart.update = (fresh) => {
      if (!sameNames(fresh.rows, spec.rows)) return false;
      spec = fresh;
      fill();
      moveHome(chart, timeHome(spec.x));
      return true;
    };
    return chart;
  }

  const KINDS = {lines: drawLines, bars: drawBars, heat: drawHeat, gantt: drawGantt};

  // ---- zoom ------------------------------------------------------------------------------------------------------

  let isFollowing = false;
  function setRange(chart, start, end) {
    if (start < end) chart.range.setv({start, end});
  }
  function follow(chart) {
    if (isFollowing) return;
    isFollowing = true;
    for (const other of drawn) {
      if (other !== chart && chart.isTime && other.isTime) setRange(other, chart.range.start, chart.range.end);
      other.rescale();
    }
    isFollowing = false;
  }
  function zoom(chart, factor, shift, isLog) {
    const to = isLog ? Math.log : (v) => v, from = isLog ? Math.exp : (v) => v;
    const start = to(chart.range.start), end = to(chart.range.end);
    const middle = (start + end) / 2 + shift * (end - start), half = ((end - start) / 2) * factor;
    setRange(chart, from(middle - half), from(middle + half));
  }
  function addButtons(place, chart, isLog) {
    const buttons = [
      ["+", "Zoom in", () => zoom(chart, 0.5, 0, isLog)], ["−", "Zoom out", () => zoom(chart, 2, 0, isLog)],
      ["←", "Move left", () => zoom(chart, 1, -0.25, isLog)], ["→", "Move right", () => zoom(chart, 1, 0.25, isLog)],
      ["Reset", "Reset", () => setRange(chart, ...chart.home)],
    ];
    for (const [text, label, act] of buttons) {
      const button = document.createElement("button");
      button.type = "button";
      const sign = document.createElement("span"), name = document.createElement("span");
      sign.setAttribute("aria-hidden", "true");
      sign.textContent = text;
      name.className = "visually-hidden";
      name.textContent = label;
      button.append(sign, name);
      button.title = label;
      button.addEventListener("click", act);
      place.append(button);
    }
  }

  // ---- legends ---------------------------------------------------------------------------------------------------

  function paintSwatch(svg) {
    const line = svg.querySelector("line"), style = Number(svg.dataset.style);
    line.setAttribute("stroke", colour(style));
    line.setAttribute("stroke-dasharray", dash(style).join(" "));
  }
  function addLegend(list, spec) {
    const entries = spec.kind === "lines" ? spec.series : [];
    list.replaceChildren();
    if (spec.kind === "heat") {
      const item = document.createElement("li"), ramp = document.createElement("span");
      ramp.className = "ramp";
      item.append("0", ramp, `${spec.top.toLocaleString("en", {maximumSignificantDigits: 3})} ${spec.unit}`);
      list.append(item);
    }
    for (const series of entries) {
      const item = document.createElement("li");
      item.dataset.model = series.model;
      item.innerHTML = '<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true"><line x1="0" y1="6" x2="28" y2="6"/></svg>';
      item.querySelector("svg").dataset.style = series.style;
      item.append(series.name);
      list.append(item);
    }
    list.hidden = !list.children.length;
  }

  function paintLegends() {
    document.querySelectorAll("svg.swatch").forEach(paintSwatch);
    document.querySelectorAll(".ramp").forEach((ramp) => {
      ramp.style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map(heatColour).join(",")})`;
    });
  }

  function paintAll() {
    const name = themeName();
    root.dataset.drawn = name;
    document.getElementById("theme").setAttribute("aria-pressed", String(name === "dark"));
    for (const chart of drawn) chart.paint();
    paintLegends();
  }

  // ---- the page's controls ---------------------------------------------------------------------------------------

  const announce = (text) => { document.getElementById("status").textContent = text; };

  function filterModels() {
    hidden.clear();
    for (const box of document.querySelectorAll(".models input")) if (!box.checked) hidden.add(box.value);
    for (const chart of drawn) chart.filter();
    for (const item of document.querySelectorAll(".legend li")) item.hidden = hidden.has(item.dataset.model);
    const count = document.querySelectorAll(".models input:checked").length;
    announce(`${count} models are shown in the charts`);
  }

  async function copy(button) {
    const place = document.getElementById(button.dataset.copy);
    const selection = window.getSelection();
    selection.selectAllChildren(place);
    let isDone = false;
    try {
      await navigator.clipboard.writeText(place.textContent);
      isDone = true;
    } catch {
      isDone = document.execCommand("copy"); // where a file may not use the clipboard
    }
    announce(isDone ? "Copied" : "Selected; press Ctrl+C to copy");
    button.textContent = isDone ? "Copied" : "Press Ctrl+C";
    window.setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = themeName() === "dark" ? "light" : "dark";
    paintAll();
  });
  const PRINT_WIDTH = 680; // CSS pixels between the margins of a page of A4
  const fitPrint = () => {
    for (const place of document.querySelectorAll(".chart")) {
      place.style.setProperty("--print-zoom", Math.min(1, PRINT_WIDTH / Math.max(1, place.clientWidth)).toFixed(3));
    }
  };
  window.addEventListener("resize", () => { if (!isPrinting) fitPrint(); });
  let isPrinting = false;
  window.addEventListener("beforeprint", () => { isPrinting = true; });
  window.addEventListener("afterprint", () => { isPrinting = false; });
  darkScheme.addEventListener("change", () => { if (!isPrinting && !root.dataset.theme) paintAll(); });
  // On the document: a live page replaces these elements.
  document.addEventListener("change", (event) => { if (event.target.matches(".models input")) filterModels(); });
  document.addEventListener("click", (event) => {
    const models = event.target.closest("[data-models]"), copied = event.target.closest("[data-copy]");
    if (copied) copy(copied);
    if (!models) return;
    for (const box of document.querySelectorAll(".models input")) box.checked = models.dataset.models === "all";
    filterModels();
  });

  // ---- drawing ---------------------------------------------------------------------------------------------------

  const find = (name, id) => document.querySelector(`.${name}[data-chart="${CSS.escape(id)}"]`);

  async function draw(place) {
    const id = place.dataset.chart, spec = data[id], chart = KINDS[spec.kind](spec);
    chart.id = id;
    chart.paint();
    if (hidden.size) chart.filter();
    addLegend(find("legend", id), spec);
    paintLegends();
    const tools = find("tools", id);
    tools.replaceChildren();
    tools.hidden = !chart.range;
    if (chart.range) {
      addButtons(tools, chart, spec.kind === "lines" && spec.x.log);
      chart.range.change.connect(() => follow(chart));
    }
    drawn.push(chart);
    place.style.minHeight = `${chart.figure.height}px`;
    chart.view = await Bokeh.Plotting.show(chart.figure, place);
    place.dataset.state = "drawn";
  }

  // Draws charts one after the other, so that the page stays responsive.
  async function drawAll(places) {
    for (const place of places) {
      try {
        await draw(place);
      } catch (error) {
        place.textContent = "This chart could not be drawn. Its numbers are in the table below.";
        console.error(error);
      }
      await new Promise((resolve) => { window.setTimeout(resolve, 0); });
    }
    if (hidden.size) filterModels();
    fitPrint();
    root.dataset.state = "drawn";
  }

  function remove(chart) {
    drawn.splice(drawn.indexOf(chart), 1);
    chart.view?.remove();
    find("chart", chart.id)?.replaceChildren();
  }

  // ---- a live page -----------------------------------------------------------------------------------------------

  const LONGEST_WAIT_S = 60;
  let structure = "", isPaused = false, isAsking = false, timer = 0, failures = 0;

  async function update() {
    window.clearTimeout(timer);
    if (isPaused || isAsking || document.hidden) return;
    isAsking = true;
    let waitS = 5;
    try {
      // From the location without the user and the password that it may have: fetch refuses those.
      const url = new URL(root.dataset.live, `${location.origin}${location.pathname}`);
      const answer = await fetch(url, {cache: "no-store", signal: AbortSignal.timeout(30000)});
      if (!answer.ok) throw new Error(`The server answers ${answer.status}`);
      const fresh = await answer.json();
      waitS = fresh.every_s;
      failures = 0;
      if (!isPaused) await show(fresh);
      if (!isPaused) say(`Updated ${fresh.time}, each ${waitS} s`, "");
    } catch (error) {
      failures += 1;
      waitS = Math.min(LONGEST_WAIT_S, 5 * 2 ** (failures - 1));
      const why = error.message.startsWith("The server") ? error.message : "The server does not answer";
      if (!isPaused) say(`${why}; the next try is in ${waitS} s`, "poor");
    }
    isAsking = false;
    if (!isPaused) timer = window.setTimeout(update, waitS * 1000);
  }

  function say(text, tone) {
    const place = document.getElementById("updated");
    place.textContent = text;
    if (place.className !== tone) announce(text); // readers of the screen hear changes only
    place.className = tone;
  }

  async function show(fresh) {
    const parsed = document.createElement("template");
    parsed.innerHTML = fresh.main; // maveriq has escaped every name in it, and the policy of the page runs no script of it
    data = fresh.charts;
    document.getElementById("subtitle").textContent = fresh.subtitle;
    if (fresh.structure !== structure) {
      structure = fresh.structure;
      await rebuild(parsed.content, fresh.links);
      return;
    }
    for (const part of parsed.content.querySelectorAll("[data-live]")) {
      const place = document.getElementById(part.id);
      if (place.innerHTML !== part.innerHTML) place.replaceChildren(...part.childNodes);
    }
    const lost = drawn.filter((chart) => !chart.update(data[chart.id]));
    const places = lost.map((chart) => find("chart", chart.id));
    lost.forEach(remove);
    await drawAll(places);
  }

  // Replaces all parts; what the reader has opened, switched off and focused stays so.
  async function rebuild(content, links) {
    const main = document.getElementById("main");
    const opened = [...main.querySelectorAll("details[open]")].map((details) => details.closest("figure").id);
    const focused = main.contains(document.activeElement) ? document.activeElement.id || "main" : "";
    const scrolled = window.scrollY;
    [...drawn].forEach(remove);
    main.replaceChildren(content);
    document.getElementById("links").innerHTML = links;
    for (const id of opened) document.getElementById(id)?.querySelector("details").setAttribute("open", "");
    for (const box of main.querySelectorAll(".models input")) box.checked = !hidden.has(box.value);
    if (focused) document.getElementById(focused)?.focus({preventScroll: true});
    await drawAll(main.querySelectorAll(".chart"));
    if (opened.length || scrolled) window.scrollTo({top: scrolled, behavior: "instant"});
  }

  function startLive() {
    const pause = document.getElementById("pause");
    pause.addEventListener("click", () => {
      isPaused = !isPaused;
      pause.setAttribute("aria-pressed", String(isPaused));
      if (isPaused) window.clearTimeout(timer);
      if (isPaused) say("Paused", "");
      else update();
    });
    document.addEventListener("visibilitychange", update);
    update();
  }

  Bokeh.set_log_level("error");
  paintAll();
  if (root.dataset.live) startLive();
  else drawAll(document.querySelectorAll(".chart"));
})();
