// Shows on its node how a training goes (the state that nodes/live.py sends), the text that a node ends with,
// what a preset of the Memory node sets, and why a node of ours refuses its inputs.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const EVENT = "vader.training";
const ROUTE = "/vader/trainings";
const STYLE = "display:flex; flex-direction:column; gap:6px; overflow:auto; font:11px sans-serif; color:var(--input-text)";
const CURVES = [["rewards", "reward", "#6cf"], ["held_out", "held-out reward", "#fc6"]];

function element(kind, style = "", parent = null) {
    const made = document.createElement(kind);
    made.style.cssText = style;
    parent?.append(made);
    return made;
}

function panel(node) {
    if (node.vaderPanel) return node.vaderPanel;
    const root = element("div", STYLE);
    const parts = {
        root,
        text: element("div", "", root),
        chart: element("div", "", root),
        video: element("video", "width:100%; display:none", root),
        report: element("pre", "margin:0; white-space:pre-wrap; user-select:text", root),
    };
    Object.assign(parts.video, { autoplay: true, loop: true, muted: true, controls: true });
    const widget = node.addDOMWidget("progress", "vader", root, { serialize: false, hideOnZoom: false, getMinHeight: () => height(parts) });
    widget.serialize = false;
    return (node.vaderPanel = parts);
}

function height({ chart, video, report }) {
    const lines = report.textContent ? report.textContent.split("\n").length + 1 : 0;
    return 24 + (chart.innerHTML ? 130 : 0) + (video.style.display === "none" ? 0 : 150) + 15 * lines;
}

function fit(node) {
    const [width, wanted] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], wanted)]);
    node.setDirtyCanvas(true, true);
}

function chart(state) {
    const points = CURVES.flatMap(([key]) => state[key]);
    if (!points.length) return "";
    const values = points.map(([, value]) => value);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const place = ([step, value]) => [
        (300 * step) / Math.max(1, state.total),
        high > low ? 95 - (90 * (value - low)) / (high - low) : 50,
    ];
    const lines = CURVES.map(([key, name, color]) => {
        const path = state[key].map((point) => place(point).map((v) => v.toFixed(1)).join(",")).join(" ");
        return `<polyline points="${path}" fill="none" stroke="${color}" stroke-width="1.5" vector-effect="non-scaling-stroke"><title>${name}</title></polyline>`;
    });
    const legend = CURVES.filter(([key]) => state[key].length).map(([, name, color]) => `<span style="color:${color}">${name}</span>`);
    return `<div style="display:flex; justify-content:space-between"><span>${high.toPrecision(4)}</span><span style="display:flex; gap:10px">${legend.join("")}</span></div>
        <svg viewBox="0 0 300 100" preserveAspectRatio="none" style="width:100%; height:80px; background:#0003">${lines.join("")}</svg>
        <div style="display:flex; justify-content:space-between"><span>${low.toPrecision(4)}</span><span>step ${state.total}</span></div>`;
}

// A node in a subgraph has the ids of all that it stands in: "12:5".
function find(path) {
    const root = app.rootGraph ?? app.graph;
    return String(path).split(":").reduce((graph, id) => (graph?.subgraph ?? graph)?.getNodeById?.(Number(id)), root);
}

function show(state) {
    const node = find(state.node);
    if (!node || node.comfyClass !== "VaderTrainLoRA" || state.workflow !== (app.rootGraph ?? app.graph).id) return;
    const parts = panel(node);
    parts.text.textContent = state.text;
    parts.chart.innerHTML = chart(state);
    parts.report.textContent = state.report ?? "";
    if (state.preview) {
        const source = api.apiURL(`/view?${new URLSearchParams(state.preview)}`);
        if (parts.video.getAttribute("src") !== source) parts.video.setAttribute("src", source);
    } else parts.video.removeAttribute("src");
    parts.video.style.display = state.preview ? "" : "none";
    fit(node);
}

// ComfyUI lists a refusal once per input, its reason out of sight: say the reason, once.
function tellRefusals(errors) {
    for (const { class_type: kind, errors: found } of Object.values(errors ?? {})) {
        if (!kind?.startsWith("Vader")) continue;
        const reasons = found.filter(({ type }) => type === "custom_validation_failed").map(({ details }) => details.replace(/^\w+ - /, ""));
        for (const detail of new Set(reasons)) {
            const summary = LiteGraph.registered_node_types[kind]?.title ?? kind;
            app.extensionManager?.toast?.add({ severity: "error", summary, detail, life: 20000 });
        }
    }
}

const queuePrompt = api.queuePrompt;
api.queuePrompt = async function () {
    try {
        const answer = await queuePrompt.apply(this, arguments);
        tellRefusals(answer?.node_errors); // the other branches run
        return answer;
    } catch (error) {
        tellRefusals(error.response?.node_errors);
        throw error;
    }
};

// A preset fills in the other widgets of its node; one that is changed to something else makes it "custom".
function followPreset(node, presets) {
    const preset = node.widgets.find(({ name }) => name === "preset");
    const settings = node.widgets.filter(({ name }) => name in presets[preset.value]);
    const fill = () => {
        for (const widget of settings) widget.value = presets[preset.value]?.[widget.name] ?? widget.value;
    };
    const compare = (widget) => {
        if (widget.value !== presets[preset.value]?.[widget.name]) preset.value = "custom";
    };
    const listen = (widget, react) => {
        const before = widget.callback;
        widget.callback = function () {
            before?.apply(this, arguments);
            react(widget);
            node.setDirtyCanvas(true, true);
        };
    };
    fill();
    setTimeout(() => { // by then a workflow that is being opened has set the widgets, one after another
        listen(preset, fill);
        for (const widget of settings) listen(widget, compare);
    });
}

app.registerExtension({
    name: "vader.progress",
    setup() {
        api.addEventListener(EVENT, ({ detail }) => show(detail));
    },
    async afterConfigureGraph() {
        const answer = await api.fetchApi(ROUTE);
        if (answer.ok) (await answer.json()).forEach(show);
    },
    beforeRegisterNodeDef(nodeType, definition) {
        if (!definition.name.startsWith("Vader")) return;
        const presets = definition.input?.required?.preset?.[1]?.vader_presets;
        if (presets) {
            const created = nodeType.prototype.onNodeCreated;
            nodeType.prototype.onNodeCreated = function () {
                created?.apply(this, arguments);
                followPreset(this, presets);
            };
        }
        const before = nodeType.prototype.onExecuted;
        nodeType.prototype.onExecuted = function (output) {
            before?.apply(this, arguments);
            if (!output?.text) return;
            panel(this).report.textContent = output.text.join("\n");
            fit(this);
        };
    },
});
