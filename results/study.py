"""
What models learn when they are trained side by side: the tables and pictures of results/.

    python results/study.py default --sweep                     an experiment: see EXPERIMENTS
    python results/study.py "--n_loop=4" "--n_loop=4 --bias"    any models, by train.py's flags
    python results/study.py curves out out-2                    the curves of several runs

Every model gets the same data, with the same seed in the same order, and the same evaluation.
--sweep finds each its own learning rate: it tries rates a factor of two apart, with seed 0, until
the best lies between two others, in at most 12 trials. All trials are recorded.

A run in out-study/ that is finished is not repeated, an interrupted one goes on. Its folder's name
holds a hash of its flags, its data, the weights it starts from and the code.
"""
import json
import os
import queue
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train
from bench import VALIDATION, device_name, draw_answers, print_answers, right_answers, save_picture
from model import load_checkpoint, pick_device
from prepare import find_weights, load_data, make_parser, sha256_of

NARROW = "--n_embd=32"
BLOCKS = "--preset=arrows --n_loop_min=1 --n_loop=1"
FIVE_TO_EIGHT = "--preset=arrows --n_loop_min=5 --n_loop=8"
SHORT = ("--batch_size=32 --gradient_accumulation_steps=1 --max_steps=1200 --warmup_steps=120 "
         "--eval_iters=640 --eval_interval=10000")
CODE = ("model.py", "train.py", "prepare.py", "bench.py")
# {experiment: {label: flags of train.py}}. A last flag --compute_of=LABEL gives a model the compute
# of that label, which stands before it, or so many FLOPs.
EXPERIMENTS = {
    "default": {    # equal data, then equal compute, where lower rates are better
        "1 loop": "--n_loop=1",
        "2 loops": "--n_loop=2",
        "4 loops": "--n_loop=4",
        "6 loops": "--n_loop=6",
        "1 loop, compute of 6": "--n_loop=1 --learning_rate=2e-3 --compute_of='6 loops'",
        "2 loops, compute of 6": "--n_loop=2 --learning_rate=4e-3 --compute_of='6 loops'",
        "4 loops, compute of 6": "--n_loop=4 --compute_of='6 loops'",
    },
    "compute": {    # five budgets
        f"{n} x, {flops} FLOPs": f"{NARROW} --n_loop={n} --compute_of={flops}"
        for flops in ("1.8e11", "4.4e11", "1.1e12", "2.8e12", "6.9e12") for n in (1, 2, 4, 6)
    },
    "variants": {   # of the equation, beside one loop; again with --optimizer=adamw
        "1 loop": "--n_loop=1",
        **{residual: f"--n_loop=6 --residual={residual}" for residual in train.RESIDUALS},
    },
    "optimizers": {     # again with --max_steps=16000, and with --n_embd=128 --n_head=4
        f"{optimizer}, {label}": f"--optimizer={optimizer} {flags}"
        for optimizer in train.OPTIMIZERS
        for label, flags in {"1 block": "--n_loop=1", "1 block x 2": "--n_loop=2",
                             "1 block x 6": "--n_loop=6", "6 blocks": "--n_layer=6"}.items()
    },
    "pairs": {      # the paper's two pairs, small, with both loop orders and controls
        "4 blocks": f"{NARROW} --n_layer=4",
        "2 blocks x 3": f"{NARROW} --n_layer=2 --n_loop=3",
        "2 blocks x 3, each in turn": f"{NARROW} --n_layer=2 --n_loop=3 --loop_order=block",
        "6 blocks": f"{NARROW} --n_layer=6",
        "4 blocks, compute of 2 x 3": f"{NARROW} --n_layer=4 --compute_of='2 blocks x 3'",
        "1 block": f"{NARROW} --n_layer=1",
        "1 block x 2": f"{NARROW} --n_layer=1 --n_loop=2",
        "2 blocks": f"{NARROW} --n_layer=2",
        "1 block, compute of 1 x 2": f"{NARROW} --n_layer=1 --compute_of='1 block x 2'",
    },
    "paper": {      # pairs at GPT-2's width and vocabulary, for one GPU
        "12 blocks": f"--preset=gpt2-124m {SHORT}",
        "6 blocks x 6": f"--preset=gpt2-81m-loop {SHORT}",
        "6 blocks x 6, no gate": f"--preset=gpt2-81m-loop --residual=sum {SHORT}",
        "36 blocks": f"--preset=gpt2-124m --n_layer=36 {SHORT}",
        "1 block": f"--preset=gpt2-45m {SHORT}",
        "1 block x 2": f"--preset=gpt2-45m-loop {SHORT}",
        "1 block x 2, no gate": f"--preset=gpt2-45m-loop --residual=sum {SHORT}",
        "2 blocks": f"--preset=gpt2-45m --n_layer=2 {SHORT}",
    },
    "arrows": {     # the puzzle with a loop, and without one, which learns best at a lower rate
        "the loop": "--preset=arrows",
        "six blocks": f"{BLOCKS} --n_layer=6 --learning_rate=1e-3 --compute_of='the loop'",
    },
    "arrows-controls": {    # the loop with one thing changed, and models without a loop
        "5 to 8 loops": FIVE_TO_EIGHT,
        "no dropout": f"{FIVE_TO_EIGHT} --dropout=0",
        "no gates": f"{FIVE_TO_EIGHT} --residual=sum",
        "six loops in every step":
            f"{FIVE_TO_EIGHT} --n_loop=6 --n_loop_min=6 --compute_of='no dropout'",
        "six blocks, no dropout": f"{BLOCKS} --n_layer=6 --dropout=0 --compute_of='no dropout'",
        "one forward pass": f"{BLOCKS} --compute_of='no dropout'",
    },
}


# ---- one run, one model ----

def get_models(texts, extra):
    """{label: flags} from {label: text}: --compute_of=LABEL becomes --max_steps.

    Exits if two models have the same flags: they would train in the same folder.
    """
    models, labels = {}, {}
    for label, text in texts.items():
        flags = [*shlex.split(text), *extra]
        budget = [flag for flag in flags if flag.startswith("--compute_of=")]
        if budget:
            flags.remove(budget[0])
            budget = budget[0].removeprefix("--compute_of=")
            budget = step_flops(models[budget], whole=True) if budget in models else float(budget)
            flags.append(f"--max_steps={max(1, round(budget / step_flops(flags)))}")
        models[label] = flags
        same = labels.setdefault(str(train.get_args(models[label])[0]), label)
        if same != label:
            sys.exit(f"{same} and {label} are the same model with these flags: name the models "
                     "that you want by their flags")
    return models


def step_flops(flags, whole=False):
    """The FLOPs of a step of training, or of the whole."""
    args, *_ = train.get_args(flags)
    step_tokens, flops = train.get_cost(args, load_data(args.data_dir)[2]["vocab_size"])
    return flops * step_tokens * (args.max_steps if whole else 1)


def train_run(label, flags, places, rate, seed):
    """Return the last record of train.py with these flags. Its val_loss may be None."""
    flags = [*flags, f"--learning_rate={rate:g}", f"--seed={seed}"]
    args, *_ = train.get_args(flags)
    code = [(HERE.parent / name).read_text() for name in CODE]
    weights = sha256_of(find_weights(args.init_from)) if args.init_from else None
    key = json.dumps([vars(args), load_data(args.data_dir)[2], weights, code]).encode()
    folder = Path("out-study") / f"{args.n_layer}x{args.n_loop}-{sha256(key).hexdigest()[:12]}"
    path = folder / "result.json"
    done = path.exists()
    if not done:
        resumed = (folder / "ckpt.pt").exists()
        how = ["--resume"] if resumed else flags
        result = run_train_py([*how, f"--out_dir={folder}"], folder, places)
        if args.preset == "arrows" and result["val_loss"] is not None:
            model, _ = load_checkpoint(folder / "ckpt.pt")
            n_loop = 20 if args.n_loop > 1 else 1
            result["right"] = right_answers(model, n_loop)
            result["right_validation"] = right_answers(model, n_loop, VALIDATION)
        path.with_suffix(".tmp").write_text(json.dumps(result))
        path.with_suffix(".tmp").rename(path)
        for checkpoint in folder.glob("*.pt"):
            checkpoint.unlink()  # large, and no longer needed
    result = json.loads(path.read_text())
    outcome = "diverged" if result["val_loss"] is None else f"{score(result):.4f}"
    print(f"{label:<26} rate {rate:g}, seed {seed}: {outcome}  ({folder}"
          + (", from an earlier run)" if done else ")"), flush=True)
    return result


def run_train_py(flags, folder, places):
    """Run train.py in a process of its own, in a free place. Return the last record of its log.

    What it printed stays in folder/out.txt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, HERE.parent / "train.py", *flags]
    place = places.get()
    with open(folder / "out.txt", "a") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | place)
    places.put(place)
    log = read_log(folder)
    if not log or "val_loss" not in log[-1] or (
            log[-1]["val_loss"] and log[-1]["step"] < train.get_args(flags)[0].max_steps):
        sys.exit(f"the run in {folder} failed, see its out.txt")
    return log[-1]


def read_log(folder):
    """The records of a run's log.jsonl."""
    records, path = [], Path(folder, "log.jsonl")
    for line in open(path) if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            print(f"{path} has a torn line, skipped: {line[:40]!r}", file=sys.stderr)
    return records


def score(run):
    """What decides between learning rates, less is better: None if the run diverged.

    For the puzzle it is the share of wrong answers after loop 12, on maps that the table does not
    use. Its validation loss would not do: it is of 0 to 4 steps, nearly all right at several rates.
    """
    if "right" in run:
        return 1 - np.mean(run["right_validation"][:12][-1])    # one row, if it has one loop
    return run["val_loss"]


def study_model(train_at, flags, seeds, sweep):
    """Find the learning rate of a model, then train all seeds: train_at(rate, seed) is a run.

    The spread is half the distance between the best and the worst seed.
    """
    best = train.get_args(flags)[0].learning_rate
    trials = {}  # {rate: score at seed 0, None if it diverged}
    while sweep and len(trials) < 12:   # a limit, should no rate lie between two worse ones
        untried = [rate for rate in (best, best / 2, best * 2) if rate not in trials]
        if not untried:
            break   # the best lies between two others
        trials[untried[0]] = score(train_at(untried[0], 0))
        finite = [rate for rate in trials if trials[rate] is not None]
        best = min(finite, key=trials.get) if finite else min(trials)
    runs = [train_at(best, seed) for seed in range(seeds)]
    losses = [run["val_loss"] for run in runs if run["val_loss"] is not None]
    return {"flags": shlex.join(flags), "learning_rate": best, "runs": runs,
            "mean": np.mean(losses) if losses else None,
            "spread": (max(losses) - min(losses)) / 2 if losses else None,
            "trials": {f"{rate:g}": trials[rate] for rate in sorted(trials)}}


# ---- many models ----

def get_args(argv):
    """Return (args, experiment, texts, extra): {label: flags}, and the flags for all models."""
    parser = make_parser(f"{__doc__} Experiments: {', '.join(EXPERIMENTS)}", "study.py")
    add = parser.add_argument
    add("--name", help="of the files in results/; None: made of the experiment and the flags")
    add("--seeds", type=train.positive, default=3, help="number of seeds, from 0 on")
    add("--sweep", action="store_true", help="find a learning rate for each model")
    add("--workers", type=train.positive, help="runs at once; None: one for each GPU or core")
    args, rest = parser.parse_known_args(argv)
    if any(re.search(r"(^| )--(seed|out_dir|resume)\b", part) for part in rest):
        parser.error("it chooses --seed, --out_dir and --resume itself, see --seeds")
    experiment = next((part for part in rest if part in EXPERIMENTS), None)
    extra = [part for part in rest if part != experiment]
    if not rest or not all(part.startswith("-") for part in extra):
        parser.error(f"name an experiment ({', '.join(EXPERIMENTS)}) or the flags of models")
    if experiment:
        return args, experiment, EXPERIMENTS[experiment], extra
    shared = set.intersection(*(set(part.split()) for part in extra))   # no need to name these
    labels = [" ".join(flag for flag in part.split() if flag not in shared) for part in extra]
    return args, None, {label or part: part for label, part in zip(labels, extra, strict=True)}, []


def study(argv):
    """Train the models that the command line names. Write their table and picture to results/."""
    args, experiment, texts, extra = get_args(argv)
    name = args.name or experiment or f"models-{sha256(repr(texts).encode()).hexdigest()[:6]}"
    name += "-sweep" if args.sweep else ""
    name += f"-seeds={args.seeds}" if args.seeds != 3 else ""
    name += "" if args.name else "".join(f"-{flag.lstrip('-')}" for flag in extra)
    path = Path("results") / (re.sub(r"[^A-Za-z0-9.=,_-]+", "_", name)[:100] + ".json")
    path.parent.mkdir(exist_ok=True)

    models = get_models(texts, extra)
    base, *_ = train.get_args(next(iter(models.values())))
    meta = load_data(base.data_dir)[2]
    device = pick_device(base.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    workers = args.workers or gpus or torch.get_num_threads()
    places = get_places(workers, gpus)
    print(f"{len(models)} models, {workers} runs at once", flush=True)
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = {label: pool.submit(study_model, partial(train_run, label, flags, places), flags,
                                   args.seeds, args.sweep) for label, flags in models.items()}
        rows = {label: job.result() for label, job in jobs.items()}
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C, start no other model

    setting = (f"{meta['dataset']}, {meta['train']['tokens']:,} {meta['tokenizer']} tokens; "
               f"{workers} x {device_name(device)}, torch {torch.__version__}")
    print_table(setting, rows)
    path.write_text(json.dumps({"setting": setting, "command": ["results/study.py", *argv],
                                "data": meta, "models": rows}, indent=1) + "\n")
    print(f"written: {path}")
    whole = all(finished(row) for row in rows.values())     # no model is missing
    rows = {label: row for label, row in rows.items() if finished(row)}
    gated = {label: row for label, row in rows.items() if finished(row)[0]["gates"]}
    if rows and all("right" in finished(row)[0] for row in rows.values()):
        show_answers(rows, path.with_suffix(".png"))
    elif experiment == "compute" and whole:
        save_picture(path.with_suffix(".png"), draw_differences, rows)
    elif experiment == "optimizers" and whole:
        save_picture(path.with_suffix(".png"), draw_gains, rows)
    elif gated:
        save_picture(path.with_suffix(".png"), draw_gates, gated)


def get_places(workers, gpus):
    """A queue with a GPU or a CPU core for each worker, as environment variables."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    places = queue.Queue()
    for i in range(workers):
        gpu = {"CUDA_VISIBLE_DEVICES": visible.split(",")[i % gpus]} if gpus else {}
        places.put(gpu or {"OMP_NUM_THREADS": "1"})
    return places


def finished(row):
    """The runs of a model that did not diverge."""
    return [run for run in row["runs"] if run["val_loss"] is not None]


# ---- tables and pictures ----

def print_table(setting, rows):
    print(f"\n{setting}\n{'model':<26} {'params':>8} {'tokens':>8} {'/param':>6} {'TFLOPs':>9} "
          f"{'minutes':>7} {'rate':>7} {'val loss':>8} {'+-':>6}")
    for label, row in rows.items():
        runs = finished(row)
        failed = len(row["runs"]) - len(runs)
        note = f"  {failed} diverged" if failed else ""
        if not runs:
            print(label + note)
            continue
        minutes = sum(run["seconds"] for run in runs) / len(runs) / 60
        params, tokens, flops = (runs[0][name] for name in ("params", "tokens", "flops"))
        print(f"{label:<26} {params / 1e6:7.3f}M {tokens / 1e6:7.2f}M {tokens / params:6.0f} "
              f"{flops / 1e12:9.2f} {minutes:7.1f} {row['learning_rate']:7g} "
              f"{row['mean']:8.4f} {row['spread']:6.4f}{note}")


def show_answers(rows, path):
    """Print each model's right answers after loop 12, the mean of its seeds.

    Draw the first model loop by loop, with the others' lines.
    """
    tables = {label: np.mean([run["right"] for run in finished(row)], axis=0)
              for label, row in rows.items()}
    ends = {label: table[:12][-1] for label, table in tables.items()}
    print_answers(ends)
    first, *others = ends
    save_picture(path, draw_answers, tables[first], {label: ends[label] for label in others})


def draw_differences(axes, rows):
    """Draw each loss minus that of one loop with the same compute, which comes before it in rows.

    The bars are the spreads of the seeds.
    """
    lines = {}  # {n_loop: points}
    for row in rows.values():
        run = finished(row)[0]
        n_loop = len(run["loop_losses"])
        if n_loop == 1:
            base, tokens_per_parameter = row["mean"], run["tokens"] / run["params"]
        point = (tokens_per_parameter, row["mean"] - base, row["spread"])
        lines.setdefault(n_loop, []).append(point)
    for n_loop, points in lines.items():
        x, y, spreads = zip(*points, strict=True)
        axes.errorbar(x, y, spreads, fmt="o-", capsize=3, label=f"n_loop = {n_loop}")
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{tokens:,.0f}" for tokens in x])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="tokens per parameter that one loop reads with this compute",
             ylabel="validation loss minus that of one loop, nats",
             title="below the black line, loops are the better use of the compute")
    axes.legend()


def draw_gains(axes, rows):
    """Draw each loss minus the mean of one block with the same optimizer: a dot for each seed."""
    for i, optimizer in enumerate(train.OPTIMIZERS):
        mine = {label: row for label, row in rows.items() if label.startswith(f"{optimizer}, ")}
        base = next(iter(mine.values()))["mean"]
        for place, row in enumerate(mine.values()):
            gains = [run["val_loss"] - base for run in finished(row)]
            name = optimizer if place == 0 else None    # one entry in the legend
            axes.plot([place + i / 5] * len(gains), gains, "o", color=f"C{i}", label=name)
            axes.plot(place + i / 5, row["mean"] - base, "_", color=f"C{i}", markersize=25)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(mine)), [label.split(", ")[1] for label in mine])
    axes.set(ylabel="validation loss minus that of one block with the same optimizer, nats",
             title="what depth gains with each optimizer: lower is better, a dot for each seed")
    axes.legend()


def draw_gates(axes, rows):
    """Draw the gates over the loops: a colour for each model, a line for each seed and group."""
    for i, (label, row) in enumerate(rows.items()):
        lines = [gates for run in finished(row) for gates in run["gates"]]
        for gates in lines:
            name = label if gates is lines[0] else None     # one entry in the legend
            axes.plot(range(1, len(gates) + 1), gates, "o-", color=f"C{i}", label=name)
    axes.set(xlabel="loop", ylabel="gate, mean over the channels", title="the gates after training")
    axes.legend()


def draw_curves(axes, folders):
    """Draw the training loss as a line, the validation loss as dots: a colour for each folder."""
    for i, folder in enumerate(folders):
        records = {record["step"]: record for record in read_log(folder)}   # resumed: some twice
        for name, style in (("loss", ".-"), ("val_loss", "o")):
            points = [(step, record[name]) for step, record in records.items() if name in record]
            label = folder if name == "val_loss" else None      # one entry in the legend
            axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
    axes.set(xlabel="step", ylabel="loss, nats", title="line: training, dots: validation")
    axes.legend()


def main():
    command, *folders = sys.argv[1:] or ["--help"]
    if command == "curves":
        missing = [folder for folder in folders if not Path(folder, "log.jsonl").exists()]
        if missing or not folders:
            sys.exit(f"no log.jsonl in {', '.join(missing)}: name folders that train.py wrote")
        return save_picture("curves.png", draw_curves, folders)
    try:
        study(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on where it was")


if __name__ == "__main__":
    main()
