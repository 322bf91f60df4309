"""What was measured, as Markdown, from the committed results files alone: a number that none of them holds is not told.

`page` is docs/speed.md, `chosen_rows`, `likelihoods` and `demo` are tables of the README.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from _markdown import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SWAPS = "swap-cpu.json"
SWAPPED = ("nflows", "normflows", "zuko", "FrEIA", "pythae")
PEERS = ("nflows", "normflows", "FrEIA", "zuko", "torchdeq", "torch")
LEVEL = 1.05  # another provider within so many times our time is as fast as ours, or faster

#: The README's rows: case, shape, dtype, direction. To these comes the worst row of all, found by looking.
CHOSEN = (
    ("affine_coupling/exp", "64×48×32×32", "float32", "forward+backward"),
    ("masked_conv/3x3B", "16×64×32×32×64", "float32", "forward+backward"),
    ("spectral_norm/critic", "8×2934464", "float32", "forward+backward"),
    ("log_det_series/cnn", "32×12×16×16×5", "float32", "forward+backward"),
    ("invertible_residual/mixed", "512×64", "float32", "inverse"),
    ("gradient_penalty/convolutional step", "16×3×32×32", "float32", "step"),
    ("upfirdn2d/up", "8×32×64×64", "float32", "forward+backward"),
    ("bias_leaky_relu/images", "16×64×64×64", "float32", "forward+backward"),
    ("batch_norm_leaky_relu/images", "16×64×64×64", "float32", "forward+backward"),
    ("elementary_flows/planar", "4096×2×16", "float32", "forward+backward"),
    ("rational_quadratic_spline/nflows", "4096×16×8", "float32", "forward+backward"),
    ("made/affine", "100×784×1024×1024", "float32", "inverse"),
    ("autoregressive_sampling/plain", "16×1×28×28", "float32", "sample"),
    ("logistic_mixture/rgb", "16×100×32×32", "float32", "forward+backward"),
    ("importance_bound/bound", "4096×50", "float32", "forward+backward"),
)

_INSTRUCTIONS = {"avx512": " with AVX-512", "avx2": " with AVX2"}

_INTRODUCTION = (
    "Every number here comes from a committed results file, which is named beside it and also holds the 20 and 80 % "
    "quantiles, the peak memory and the versions. `genkernels bench` measures them anew on any machine.",
    "Each provider passed a gate against the fp64 reference first (drawn integers: against the fp32 reference, all of "
    "them); 'wrong' means that it did not pass, and no speed is told. Providers take turns, inputs rotate beyond the "
    "last-level cache, times are medians. 'Of peak': bytes/s or flop/s as a share of the copy or the product in the "
    "same run, whichever bounds the case. 'Passes': the time in units of the case's yardstick, which its file in "
    "`genkernels/benchmarks/cases` names: one forward pass of the same network, the same step or pass without what is "
    "measured, or the formula as it is mostly written. "
    "'× eager' and '× compiled': how many times as fast as eager PyTorch and as `torch.compile` of it.",
)


# --- a results file -----------------------------------------------------------------------------------------------


def measured(results: Path) -> dict[tuple[str, str, str, str], dict[str, dict]]:
    """Rows of an operator's results file by case, shape, dtype and direction, then by provider."""
    rows: dict[tuple, dict] = {}
    for row in json.loads(results.read_text())["rows"]:
        key = row["case"], "×".join(map(str, row["shape"])), row["dtype"], row["direction"]
        rows.setdefault(key, {})[row["provider"]] = row
    return rows


def operator_files(operator: str | None = None) -> list[Path]:
    """Results files of one operator or of all: the first machine's first, then those on others."""
    from genkernels.ops import OPERATORS

    names = OPERATORS if operator is None else (operator,)
    return [file for name in names for file in sorted(RESULTS.glob(f"{name}-*.json"), key=lambda f: len(f.name))]


def ours(found: dict[str, dict]) -> dict:
    """The fastest of our own providers."""
    rows = [found[name] for name in ("cpu", "triton", "cuda") if name in found and found[name]["gate"] == "pass"]
    return min(rows, key=lambda row: row["median_s"])


def others(found: dict[str, dict]) -> dict[str, float]:
    """By how much we are faster than each other provider whose values are right; below 1 it is the faster one."""
    mine = ours(found)["median_s"]
    names = [name for name in ("reference", "compiled", *PEERS) if name in found and found[name]["gate"] == "pass"]
    return {name: found[name]["median_s"] / mine for name in names}


def conditions(machine: dict) -> str:
    device = machine["device"] + _INSTRUCTIONS.get(machine.get("cpu_variant"), "")
    if machine["device_type"] == "cpu":
        device = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)} of {device}"
    return f"{device}, torch {machine['versions']['torch']}, {machine['date'][:10]}, commit {machine['commit']}"


def _ratio(value: float) -> str:
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _time(row: dict | None) -> str:
    if row is None:
        return ""
    if row["gate"] == "fail":
        return "wrong"
    milliseconds = row["median_s"] * 1e3
    return f"{milliseconds:,.{2 if milliseconds < 100 else 0}f}"


_WORDS = {"reference": "eager PyTorch", "compiled": "torch.compile"}


# --- docs/speed.md ------------------------------------------------------------------------------------------------


def page() -> str:
    parts = ["# Speed", *_INTRODUCTION, "## Operators"]
    parts += [part for file in operator_files() for part in _operator(file)]
    parts += _level_rows()
    if (RESULTS / SWAPS).exists():
        parts += ["## Models of other libraries", swaps("../")]
    parts += _training_steps()
    parts += ["## Likelihood for the same training time", likelihoods("../")]
    parts += ["## Training, fused and reference", demo("../")]
    return "\n\n".join(parts) + "\n"


def _operator(results: Path) -> list[str]:
    """One file's heading, conditions and table, and its picture where there is one."""
    machine = json.loads(results.read_text())["machine"]
    rows = measured(results)
    present = {provider for found in rows.values() for provider in found}
    peers = [name for name in PEERS if name in present]
    shapes = {shape for _, shape, *_ in rows}
    passes = "one pass" in present
    lines = []
    for (case, shape, dtype, direction), found in rows.items():
        what = ", ".join([case.partition("/")[2], *([shape] if len(shapes) > 1 else []), dtype, direction])
        mine, faster = ours(found), others(found)
        cells = [what, _time(found.get("reference")), _time(found.get("compiled")), f"**{_time(mine)}**"]
        cells += [_ratio(faster[name]) if name in faster else "" for name in ("reference", "compiled")]
        cells.append("" if mine["share_of_peak"] is None else f"{100 * mine['share_of_peak']:.0f} %")
        if passes:
            cells.append(_ratio(mine["median_s"] / found["one pass"]["median_s"]) if "one pass" in found else "")
        lines.append([*cells, *(_time(found.get(peer)) for peer in peers)])
    header = ["ms, median", "eager", "compiled", "genkernels", "× eager", "× compiled", "of peak"]
    name = next(iter(rows))[0].partition("/")[0]
    variant = results.stem.removeprefix(f"{name}-")
    product = machine["product_flops_per_s"].get("float32", 0) / 1e9
    text = (
        f"`genkernels bench {name}`, {f'{next(iter(shapes))}, ' if len(shapes) == 1 else ''}{conditions(machine)}; in "
        f"the same run copy {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s, fp32 product {product:.0f} Gflop/s "
        f"([{results.name}](../benchmarks/results/{results.name}))."
    )
    if results.with_suffix(".png").exists():
        text += f" [As a picture](../benchmarks/results/{results.stem}.png)."
    title = f"### {name}" if variant == "cpu" else f"### {name}, {variant}"
    return [title, text, table(lines, [*header, *(["passes"] if passes else []), *peers])]


def _level_rows() -> list[str]:
    lines = []
    for file in operator_files():
        for (case, shape, dtype, direction), found in measured(file).items():
            for name, ratio in others(found).items():
                if ratio < LEVEL:
                    what = ", ".join((case.replace("/", ": "), shape, dtype, direction))
                    lines.append([what, _WORDS.get(name, name), _ratio(ratio), file.name])
    lines.sort(key=lambda line: float(line[2].replace(",", "")))
    text = (
        "Every row of the tables above in which another provider was faster than genkernels or no more than "
        f"{100 * LEVEL - 100:.0f} % slower."
    )
    header = ["row", "other provider", "its time / ours", "results file"]
    return ["### Lost or level", text, table(lines, header) if lines else "None."]


def _training_steps() -> list[str]:
    """Whole training steps, once they are measured."""
    files = sorted(RESULTS.glob("training_step-*.json"), key=lambda file: len(file.name))
    if not files:
        return []
    from genkernels.benchmarks.report import PARTED, training_step_table

    parts = [
        "## Training steps",
        "`genkernels bench training_step`: loss, backward, clipping and optimiser of every model at its presets. "
        "'same': the fused step is the eager one, operation by operation and bit for bit, and both have the samples of "
        "both.",
    ]
    for file in files:
        data = json.loads(file.read_text())
        parts.append(f"{conditions(data['machine'])} ([{file.name}](../benchmarks/results/{file.name})).")
        if runs := data.get("runs"):  # a case is compared within its run
            parts.append("Cases that were measured at another time name their run:")
            parts.append(table([[key, conditions(machine)] for key, machine in runs.items()], ("run", "measured on")))
        parted = [row for row in data["rows"] if row.get("parted")]
        if parted:
            told = (
                f"{row['provider']} of {row['case'].split('/', 1)[1]} ({row['parted'].split(':')[0]})" for row in parted
            )
            parts.append(f"{PARTED}: {', '.join(told)}.")
        parts.append(training_step_table(data).strip())
    return parts


def training_steps(base: str = "") -> str:
    """Whole training steps in a few lines, and their picture."""
    from genkernels.benchmarks.report import PRECISIONS

    file = RESULTS / "training_step-cpu.json"
    found: dict[tuple, dict[str, dict]] = {}
    for row in json.loads(file.read_text())["rows"]:
        found.setdefault((row["dtype"], row["case"]), {})[row["provider"]] = row
    ratios: dict[tuple, tuple[list, list]] = {}
    for (dtype, case), rows in found.items():
        eager, compiled = ratios.setdefault((dtype, case.rsplit("/", 1)[1].removeprefix("two_")), ([], []))
        times = {name: row["median_s"] for name, row in rows.items() if row["median_s"]}
        for kept, base_name, ours in ((eager, "reference", "fused"), (compiled, "compiled", "fused compiled")):
            if base_name in times and ours in times:
                kept.append(times[base_name] / times[ours])
    lines = [
        [preset, PRECISIONS[dtype], str(len(eager)), *_three(eager), *_three(compiled)]
        for (dtype, preset), (eager, compiled) in ratios.items()
    ]
    each = ("lowest", "median", "highest")
    header = ["preset", "precision", "models", *(f"× eager, {w}" for w in each), *(f"× compiled, {w}" for w in each)]
    picture = f"![Speed of whole training steps, a line a model]({base}benchmarks/results/{file.stem}.png)"
    return f"{table(lines, header)}\n\n{picture}"


def _three(ratios: list[float]) -> list[str]:
    return [_ratio(f(ratios)) for f in (min, statistics.median, max)] if ratios else ["", "", ""]


def swaps(base: str = "", libraries: tuple[str, ...] = ()) -> str:
    """Models of other libraries before and after `swap_`, those rows too in which nothing was won; of all libraries or
    of some, by the words with which their cases begin."""
    file = RESULTS / SWAPS
    data = json.loads(file.read_text())
    lines = []
    for row in data["rows"]:
        if libraries and row["case"].split()[0] not in libraries:
            continue
        times = (f"{1e3 * row[name]:,.{2 if row[name] < 0.1 else 0}f}" for name in ("before_s", "after_s"))
        told = row["gate"] == "pass"
        ratio = _ratio(row["speedup"]) if told else "wrong"
        lines.append([f"{row['case']}, {row['call']}", *(times if told else ("", "")), f"**{ratio}**"])
    versions = data["machine"]["versions"].items()
    told_of = [f"{name} {version}" for name, version in versions if name in (libraries or SWAPPED) and name != "torch"]
    text = (
        "`genkernels bench swap`: the same model before and after `gk.swap_`, in one process, in turns; a training "
        "step (loss, backward, Adam), the loss without a graph, and a call that draws samples; the fastest of each, "
        "and the median speed-up of pairs in a row. "
        f"{'; '.join([conditions(data['machine']), ', '.join(told_of)]) if told_of else conditions(data['machine'])} "
        f"([{file.name}]({base}benchmarks/results/{file.name}))."
    )
    text += "".join(f" {note[0].upper()}{note[1:]}." for note in data["machine"].get("notes", ()))
    return f"{text}\n\n{table(lines, ['ms', 'before', 'after', '×'])}"


# --- the README's -------------------------------------------------------------------------------------------------


def chosen_rows() -> str:
    """At most ten rows, one of them the worst there is, with a line of conditions for each machine and date."""
    found = {
        key: (file, row)
        for file in operator_files()
        if file.stem.endswith("-cpu")
        for key, row in measured(file).items()
    }
    if missing := [key for key in CHOSEN if key not in found]:
        raise SystemExit(f"tools/_speed.py: CHOSEN names rows that no results file holds: {missing}")
    worst = min(found, key=lambda key: min(others(found[key][1]).values()))
    lines, files = [], []
    for key in dict.fromkeys((*CHOSEN, worst)):
        file, row = found[key]
        case, shape, dtype, direction = key
        faster = others(row)
        best_peer = min((name for name in PEERS if name in faster), key=lambda name: faster[name], default=None)
        lines.append(
            [
                f"{case.replace('/', ': ')}, {shape}, {dtype}, {direction}",
                *(_time(row.get(name)) for name in ("reference", "compiled")),
                f"{_time(row[best_peer])} ({best_peer})" if best_peer else "",
                f"**{_time(ours(row))}**",
                *(_ratio(faster[name]) if name in faster else "" for name in ("reference", "compiled")),
                _ratio(faster[best_peer]) if best_peer else "",
            ]
        )
        files.append(file)
    header = ["ms, median", "eager", "compiled", "best library", "genkernels", "× eager", "× compiled", "× library"]
    places: dict[str, list[str]] = {}
    for file in dict.fromkeys(files):
        places.setdefault(conditions(json.loads(file.read_text())["machine"]), []).append(
            f"[{file.name}](benchmarks/results/{file.name})"
        )
    text = "; ".join(f"{where}: {', '.join(names)}" for where, names in places.items())
    return f"{table(lines, header)}\n\nMeasured on {text}."


def likelihoods(base: str = "") -> str:
    """Held-out likelihoods of models that trained for the same time."""
    data = json.loads((RESULTS / "likelihoods-cpu.json").read_text())
    rows = [
        [
            row["model"],
            f"{row['bits_per_dim']:.3f} ± {row['standard_error']:.3f}",
            f"{row['training_seconds']:.0f}",
            f"{row['steps']:,}",
            f"{row['images_per_second']:,.0f}",
        ]
        for row in data["rows"]
    ]
    config = data["rows"][0]["config"]
    text = (
        f"`python tools/likelihoods.py`: models on the digits at their presets, Adam at {config['lr']:g} with a "
        f"{config['schedule']} schedule, one seed; {conditions(data['machine'])} "
        f"([likelihoods-cpu.json]({base}benchmarks/results/likelihoods-cpu.json))."
    )
    return f"{text}\n\n{table(rows, ['model', 'held-out bits/dim', 'seconds', 'steps', 'images/s'])}"


def demo(base: str = "") -> str:
    """Glow on the fused and on the reference path: on small images, where everything counts, and on larger ones."""
    digits = json.loads((RESULTS / "demo-cpu.json").read_text())
    photos = json.loads((RESULTS / "photos32-cpu.json").read_text())
    rows = []
    for what, file, both in (
        (f"8×8 digits, `{digits['command']}`", "demo-cpu.json", (digits["fused"], digits["reference"])),
        ("32×32 photographs", "photos32-cpu.json", (photos["auto"], photos["reference"])),
    ):
        fused, reference = both
        bits = [run["held_out"]["bits_per_dim"]["value"] if "held_out" in run else run["bits_per_dim"] for run in both]
        rows.append(
            [
                f"{what} ([{file}]({base}benchmarks/results/{file}))",
                f"{fused['steps']:,}",
                *(f"{value:.3f}" for value in bits[::-1]),
                f"{reference['images_per_second']:,.0f}",
                f"**{fused['images_per_second']:,.0f}**",
                _ratio(fused["images_per_second"] / reference["images_per_second"]),
            ]
        )
    header = ["Glow on", "steps", "bits/dim, reference", "fused", "images/s, reference", "fused", "×"]
    machines = dict.fromkeys(conditions(data["machine"]) for data in (digits, photos))
    return f"{table(rows, header)}\n\nThe same seed on both paths; {'; '.join(machines)}."
