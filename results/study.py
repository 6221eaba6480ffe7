"""
Many models side by side: trains them, adds a row a run to results/runs.csv, and draws from it.

    python results/study.py text --sweep                        an experiment: see EXPERIMENTS
    python results/study.py "--n_loop=4" "--n_loop=4 --no-bias"     any models, by train.py's flags
    python results/study.py tables                              what results/README.md shows of them
    python results/study.py pictures                            its pictures

Every model gets the same data, with the same seed in the same order, and the same evaluation.
--sweep finds each its own learning rate: it tries rates a factor of two apart, with seed 0, until
the best lies between two others, in at most 12 trials. Trials have rows too.

The code is copied to out-study/ first, and every run trains from the copy. A run that is finished
is not repeated, an interrupted one goes on. Its folder's name holds a hash of all that decides its
loss: flags, data, weights to start from, code, torch, and the processor's instructions.
"""
import csv
import fcntl
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train
from bench import SCORING, draw_answers, right_answers, save_picture
from model import load_checkpoint, pick_device, pick_dtype
from prepare import find_weights, load_data, make_parser, sha256_of

running = []    # the processes that train, to be ended with this one
CODE = ("model.py", "train.py", "prepare.py", "bench.py")
RUNS, ANSWERS = HERE / "runs.csv", HERE / "arrows.csv"
# trial: yes for a rate that was tried and not chosen; right: of a puzzle's validation answers;
# copied: see copied(); tokens: read in training; threads: of one run; data: the start of
# train.bin's sha256
COLUMNS = ("study", "label", "flags", "rate", "seed", "trial", "val_loss", "right", "copied",
           "params", "tokens", "flops", "flops_ratio", "seconds", "cpu", "torch", "threads",
           "dtype", "data", "code")
STEPS = [str(steps) for steps in range(10)]     # of arrows.csv: the share of right answers
SHAPES = {"1 block": "--n_layer=1", "1 block x 2": "--n_loop=2", "1 block x 6": "--n_loop=6",
          "2 blocks": "--n_layer=2", "6 blocks": "--n_layer=6"}
LONGER = "1 block, compute of x 2"
HEADS = {32: 2, 64: 2, 128: 4, 256: 4, 512: 8, 768: 12}
BLOCK = {width: f"--n_embd={width} --n_head={heads}" for width, heads in HEADS.items()}
BUDGETS = ("1.8e11", "4.4e11", "1.1e12", "2.8e12", "6.9e12")     # FLOPs
# {study: {label: flags of train.py}}. --compute_of=LABEL gives a model the compute of that label,
# which stands before it, or so many FLOPs.
EXPERIMENTS = {
    "arrows": {
        "the loop": "--preset=arrows",
        "without dropout": "--preset=arrows --dropout=0",
        "without gates": "--preset=arrows --residual=sum",
        "six separate blocks": "--preset=arrows --n_loop_min=1 --n_loop=1 --n_layer=6 "
                               "--learning_rate=1e-3 --compute_of='the loop'",
    },
    "text": {       # equal data, then equal compute, where lower rates are better
        "1 loop": "--n_loop=1",
        "2 loops": "--n_loop=2",
        "4 loops": "--n_loop=4",
        "6 loops": "--n_loop=6",
        "1 loop, compute of 6": "--n_loop=1 --learning_rate=2e-3 --compute_of='6 loops'",
        "2 loops, compute of 6": "--n_loop=2 --learning_rate=4e-3 --compute_of='6 loops'",
        "4 loops, compute of 6": "--n_loop=4 --compute_of='6 loops'",
        **{residual: f"--n_loop=6 --residual={residual}" for residual in train.RESIDUALS[1:]},
    },
    "widths": {     # what loops gain, and blocks, on wider and wider models
        f"{width}, {optimizer}, {label}":
            f"{BLOCK[width]} --optimizer={optimizer} {shape}"
            f" --learning_rate={'4e-3' if optimizer == 'muon' else '2e-3'}"
        for width in HEADS for optimizer in train.OPTIMIZERS for label, shape in {
            **SHAPES, LONGER: f"--compute_of='{width}, {optimizer}, 1 block x 2'"}.items()
    },
    "long": {       # four times the steps
        f"{width}, {optimizer}, {label}":
            f"{BLOCK[width]} --optimizer={optimizer} --learning_rate=4e-3 --max_steps=16000 "
            f"{SHAPES[label]}"
        for width in (64, 128, 256) for optimizer in train.OPTIMIZERS
        for label in ("1 block", "1 block x 2", "1 block x 6", "2 blocks")
    },
    "copying": {    # when does it begin? The same training, ended early
        f"{label}, {steps} steps":
            f"{BLOCK[256]} --learning_rate=4e-3 --decay_steps=4000 --max_steps={steps} {shape}"
        for label, shape in SHAPES.items() if "6" not in label for steps in range(800, 4000, 800)
    },
    "compute": {    # five budgets
        f"{n} x, {flops} FLOPs": f"--n_embd=32 --n_loop={n} --compute_of={flops}"
        for flops in BUDGETS for n in (1, 2, 4, 6)
    },
    "pairs": {      # the paper's second pair, small, and controls
        f"{width}, {label}": f"{BLOCK[width]} {shape.format(width=width)}"
        for width in (32, 256) for label, shape in {
            "4 blocks": "--n_layer=4",
            "2 blocks x 3": "--n_layer=2 --n_loop=3",
            "2 blocks x 3, each in turn": "--n_layer=2 --n_loop=3 --loop_order=block",
            "6 blocks": "--n_layer=6",
            "6 blocks x 2": "--n_layer=6 --n_loop=2",
            "4 blocks, compute of 2 x 3": "--n_layer=4 --compute_of='{width}, 2 blocks x 3'",
        }.items()
    },
}


# ---- one run ----

def copy_code():
    """Copy the code to out-study/. Return the folder, and the code's last commit or else its hash.

    Edits after this do not matter to the study.
    """
    texts = {name: (HERE.parent / name).read_bytes() for name in CODE}
    digest = sha256(json.dumps([text.decode() for text in texts.values()]).encode()).hexdigest()
    folder = Path("out-study", f"code-{digest[:12]}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    commit = subprocess.run(["git", "log", "-1", "--format=%h", "--abbrev=12", "--", *CODE],
                            cwd=HERE.parent, capture_output=True, text=True).stdout.strip()
    edits = subprocess.run(["git", "status", "--porcelain", *CODE], cwd=HERE.parent,
                           capture_output=True, text=True).stdout
    return folder, commit if commit and not edits else f"hash {digest[:12]}"


def step_flops(flags, whole=False):
    """The FLOPs of a step of training, or of all its steps."""
    args, *_ = train.get_args(flags)
    step_tokens, flops = train.get_cost(args, load_data(args.data_dir)[2]["vocab_size"])
    return flops * step_tokens * (args.max_steps if whole else 1)


def get_models(texts, extra):
    """{label: flags} from {label: text}: --compute_of becomes --max_steps.

    Exits if two models are the same.
    """
    models, labels = {}, {}
    for label, text in texts.items():
        flags = [*shlex.split(text), *extra]
        for flag in [flag for flag in flags if flag.startswith("--compute_of=")]:
            flags.remove(flag)
            other = flag.removeprefix("--compute_of=")
            if other not in models and not re.fullmatch(r"[\d.]+(e\d+)?", other):
                sys.exit(f"{flag} names none of the models before it: {', '.join(models)}")
            budget = step_flops(models[other], whole=True) if other in models else float(other)
            flags.append(f"--max_steps={max(1, round(budget / step_flops(flags)))}")
        args, *_ = train.get_args(flags)
        same = labels.setdefault(str(args), label)
        if same != label:
            sys.exit(f"{same} and {label} are the same model with these flags: name the models "
                     "that you want by their flags")
        models[label] = flags
    return models


def train_run(code, places, study, label, flags, rate, seed):
    """Train a model, or find it trained. Return its row of runs.csv and its rows of arrows.csv."""
    folder, version = code
    flags = [*flags, f"--learning_rate={rate:g}", f"--seed={seed}"]
    args, *_ = train.get_args(flags)
    source, device = sources(args), pick_device(args.device)
    cpu = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        cpu = torch.cuda.get_device_name(device)
    dtype = str(pick_dtype(args.dtype, device, args.n_embd)).removeprefix("torch.")
    machine = {"cpu": cpu, "torch": torch.__version__, "threads": 1, "dtype": dtype}
    key = sha256(json.dumps([vars(args), source, folder.name, machine]).encode()).hexdigest()
    out = Path("out-study", f"{args.n_layer}x{args.n_loop}-{key[:12]}")
    done = (out / "result.json").exists()
    if not done:
        record = run_train_py(folder, flags, out, places)
        result = measure(record, out, args, source, device)
        (out / "result.tmp").write_text(json.dumps(result))
        (out / "result.tmp").rename(out / "result.json")
    record, answers = json.loads((out / "result.json").read_text())
    print(f"{label:<32} rate {rate:g}, seed {seed}: {record['val_loss'] or 'diverged'}  ({out}"
          + (", from an earlier run)" if done else ")"), flush=True)
    text = shlex.join(flag for flag in flags[:-2] if not flag.startswith("--learning_rate="))
    row = {"study": study, "label": label, "flags": text, "rate": f"{rate:g}", "seed": seed,
           "data": source[0]["train"]["sha256"][:12], "code": version} | machine
    return row | {name: record[name] for name in COLUMNS if name in record}, [
        {"study": study, "label": label, "seed": seed, "loop": n}
        | {steps: round(share, 4) for steps, share in zip(STEPS, shares, strict=True)}
        for n, shares in enumerate(answers, start=1)]


def measure(record, out, args, source, device):
    """Add to the record of a finished training what its model copies. Return it and its answers.

    Exits if the training read something else than source.
    """
    model = state = None
    if record["val_loss"] is not None:      # it did not diverge
        model, state = load_checkpoint(out / "ckpt.pt", device)
    if sources(args) != source or (state and state["data"] != source[0]):
        sys.exit(f"{args.data_dir} or {args.init_from} changed during this study")
    if model is None:
        return record, []
    if source[0].get("puzzle") == SCORING:
        return record, right_answers(model, 20 if args.n_loop > 1 else 1)
    if "puzzle" not in source[0]:
        record["copied"] = copied(model, load_data(args.data_dir)[1])
    return record, []


@torch.no_grad()
def copied(model, val):
    """How much lower the loss is where a text is shown a second time, in nats.

    The texts are 400 pieces of the validation data, as long as half of the context. What is gained
    comes from copying: finding what followed last time (arXiv 2209.11895).
    """
    half, losses = model.config.block_size // 2, []
    starts = np.linspace(0, len(val) - half, 400).astype(int)
    texts = train.windows(val, starts, half - 1).repeat(1, 2).to(model.wte.weight.device)
    for part in texts.split(8):
        logits = model.eval()(part)[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    first, second = torch.cat(losses).mean(0).split((half, half - 1))
    return (first[:-1].mean() - second.mean()).item()   # the second's first token has no past


def sources(args):
    """What a run reads: meta.json with the data's sha256, and the sha256 of weights."""
    weights = sha256_of(find_weights(args.init_from)) if args.init_from else None
    return load_data(args.data_dir)[2], weights


def run_train_py(code, flags, out, places):
    """Run train.py in a process of its own, in a free place. Return the last record of its log.

    What it printed stays in out/out.txt. The lock on that file is the process's, so it lasts as
    long as the training, even if this study is killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    how = ["--resume"] if (out / "ckpt.pt").exists() else flags
    with open(out / "out.txt", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"a training in {out} is still running")
        place = places.get()
        process = subprocess.Popen([sys.executable, code / "train.py", *how, f"--out_dir={out}"],
                                   stdout=file, stderr=subprocess.STDOUT, env=os.environ | place)
        running.append(process)
        process.wait()
        places.put(place)
    log = out / "log.jsonl"
    record = json.loads(log.read_text().splitlines()[-1]) if log.exists() else {}
    if process.returncode and record.get("val_loss", 0) is not None:    # None: it diverged
        sys.exit(f"the training in {out} failed, see its out.txt")
    return record


# ---- many models ----

def score(row):
    """What decides between learning rates, less is better; None if the run diverged.

    For a puzzle it is the share of wrong answers on validation maps, which are of training's kind.
    """
    return 1 - row["right"] if row.get("right") is not None else row["val_loss"]


def study_model(train_at, rate, seeds, sweep):
    """Find a model's learning rate, beginning with rate, then train all seeds.

    train_at(rate, seed) is a run. Return the model's rows of runs.csv and of arrows.csv.
    """
    best, trials = rate, {}     # {rate: score at seed 0, None if it diverged}
    while sweep and len(trials) < 12:   # a limit, should no rate lie between two worse ones
        untried = [rate for rate in (best, best / 2, best * 2) if rate not in trials]
        if not untried:
            break   # the best lies between two others
        trials[untried[0]] = score(train_at(untried[0], 0)[0])
        finite = [rate for rate in trials if trials[rate] is not None]
        best = min(finite, key=trials.get) if finite else min(trials)
    others = [train_at(rate, 0)[0] | {"trial": "yes"} for rate in sorted(trials) if rate != best]
    rows, answers = zip(*[train_at(best, seed) for seed in range(seeds)], strict=True)
    return others + list(rows), sum(answers, [])


def get_args(argv):
    """Return (args, study, texts, extra): {label: flags}, and the flags for all models."""
    parser = make_parser(f"{__doc__} Experiments: {', '.join(EXPERIMENTS)}", "study.py")
    add = parser.add_argument
    add("--name", help="of the study in runs.csv; None: the experiment's, or own")
    add("--only", type=re.compile, default="", help="a pattern (re.search) that a label must have")
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
        return args, args.name or experiment, EXPERIMENTS[experiment], extra
    extra = [re.sub(r"(--\w+) +(?!--)", r"\1=", text) for text in extra]  # --n_loop 4: --n_loop=4
    # a label is what a model has beside the flags that all begin with
    shared = os.path.commonprefix([f"{text} " for text in extra]).rfind(" ") + 1
    labels = extra if len(extra) == 1 else [text[shared:] or "with no other" for text in extra]
    return args, args.name or "own", dict(zip(labels, extra, strict=True)), []


def study(argv):
    """Train the models that the command line names. Add their rows to the CSV files."""
    args, name, texts, extra = get_args(argv)
    code = copy_code()
    models = get_models(texts, extra)
    models = {label: flags for label, flags in models.items() if args.only.search(label)}
    if not models:
        sys.exit(f"no model has {args.only.pattern} in its label: name one of {', '.join(texts)}")
    gpus = torch.cuda.device_count()
    # the cores that this process may use, where the system (macOS does not) can say
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.workers or gpus or cores
    places = get_places(workers, gpus)
    print(f"{len(models)} models, {workers} runs at once", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: the same command goes on"))
    pool, table, failed = ThreadPoolExecutor(workers), [], 0
    try:
        jobs = {}
        for label, flags in models.items():
            train_at = partial(train_run, code, places, name, label, flags)
            rate = train.get_args(flags)[0].learning_rate
            jobs[label] = pool.submit(study_model, train_at, rate, args.seeds, args.sweep)
        for label, job in jobs.items():
            if error := job.exception():
                failed += 1
                print(f"{label}: {error}", file=sys.stderr)
                if not isinstance(error, SystemExit):   # a bug keeps its traceback
                    traceback.print_exception(error)
            else:
                rows, answers = job.result()
                table += rows
                append(RUNS, COLUMNS, rows)
                append(ANSWERS, ("study", "label", "seed", "loop", *STEPS), answers)
    finally:    # after Ctrl-C or SIGTERM, end what trains and start no other model
        for process in running:
            process.terminate()
        pool.shutdown(cancel_futures=True)
    print_table(table)
    sys.exit(f"{failed} of {len(models)} models failed, see above" if failed else 0)


def get_places(workers, gpus):
    """A queue with a GPU or a CPU core for each worker, as environment variables."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    places = queue.Queue()
    for i in range(workers):
        gpu = {"CUDA_VISIBLE_DEVICES": visible.split(",")[i % gpus]} if gpus else {}
        places.put({"OMP_NUM_THREADS": "1"} | gpu)
    return places


# ---- the CSV files ----

def append(path, columns, rows):
    """Add rows to a CSV file, but for those that it has."""
    known = {tuple(row.values()) for row in read(path)}
    new = [{name: "" if row.get(name) is None else str(row[name]) for name in columns}
           for row in rows]
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not known:
            writer.writeheader()
        writer.writerows(row for row in new if tuple(row.values()) not in known)


def read(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def runs_of(study, label):
    """The rows of a model, a row a seed. One code, one machine and one rate made them all."""
    rows = [row for row in read(RUNS) if (row["study"], row["label"]) == (study, label)]
    rows = [row for row in rows if not row["trial"]]
    kinds = {tuple(row[name] for name in ("flags", "rate", "cpu", "torch", "dtype", "data", "code"))
             for row in rows}
    seeds = [row["seed"] for row in rows]
    if len(kinds) != 1 or len(set(seeds)) < len(seeds):
        sys.exit(f"{study}, {label}: {len(rows)} rows of {len(kinds)} kinds in runs.csv, seeds "
                 f"{' '.join(seeds)}: one run a seed, by one code on one machine, may stay")
    return rows


def losses(study, label, column="val_loss"):
    """The validation losses of a model's seeds, or another column, without those that diverged."""
    return np.array([float(row[column]) for row in runs_of(study, label) if row[column]])


# ---- tables ----

def print_table(rows):
    """Print a line for each model of rows: means over its seeds, +- half of their range."""
    print(f"\n{'model':<32} {'params':>8} {'tokens':>8} {'TFLOPs':>8} {'minutes':>7} {'rate':>7} "
          f"{'val loss':>8} {'+-':>6}")
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label and not row.get("trial")]
        good = [row for row in mine if row["val_loss"] is not None]
        note = f"  {len(mine) - len(good)} diverged" if len(good) < len(mine) else ""
        if not good:
            print(label + note)
            continue
        first, found = good[0], [row["val_loss"] for row in good]
        if abs(first["flops_ratio"] - 1) > 0.02:
            note += f"  takes {first['flops_ratio']:.2f} times these FLOPs"
        minutes = np.mean([row["seconds"] for row in good]) / 60
        print(f"{label:<32} {first['params'] / 1e6:7.3f}M {first['tokens'] / 1e6:7.2f}M "
              f"{first['flops'] / 1e12:8.2f} {minutes:7.1f} {first['rate']:>7} "
              f"{np.mean(found):8.4f} {np.ptp(found) / 2:6.4f}{note}")


def cell(study, label, column="val_loss", digits=3):
    """A model's validation loss as the pages show it: mean±half of the range of several seeds."""
    found = losses(study, label, column) if has(study, label) else []
    if len(found) < 2:
        return "".join(f"{loss:.{digits}f}" for loss in found)
    return f"{found.mean():.{digits}f}±{np.ptp(found) / 2:.{digits}f}"


def answers_of(label, loop):
    """Right answers of the puzzle after a loop, by seed and steps: (seeds, 10)."""
    rows = [row for row in read(ANSWERS)
            if (row["study"], row["label"], row["loop"]) == ("arrows", label, str(loop))]
    assert len(rows) == len({row["seed"] for row in rows}), f"{label}: a seed has two runs"
    return np.array([[float(row[steps]) for steps in STEPS] for row in rows])


def percent(share):
    return f"{100 * share:.1f}".replace("100.0", "100")


def markdown(head, rows):
    """A table as Markdown, from its first line and its rows of cells."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    lines = [re.sub(" +", " ", line) for line in lines]     # where a cell is empty
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def gains(study, label, base):
    """How much lower a model's seeds end than the mean of base, maybe of other code or machine."""
    return losses(study, base).mean() - losses(study, label)


def gain_cell(study, label, base):
    """The mean of gains, as the pages show it."""
    return f"{gains(study, label, base).mean():.3f}" if has(study, label, base) else ""


def has(study, *labels):
    """Whether each of the models has a run that is no trial."""
    rows = [row for row in read(RUNS) if row["study"] == study and not row["trial"]]
    return set(labels) <= {row["label"] for row in rows}


def tables():
    """Yield the tables and the sentences with numbers of results/README.md and README.md."""
    yield from puzzle_tables()
    models = ["1 loop", "2 loops", "4 loops", "6 loops"]
    same = [*(f"{model}, compute of 6" for model in models[:3]), models[3]]
    yield markdown(["64 wide", *models], [
        ["4,000 steps", *(cell("text", model) for model in models)],
        ["the compute of six loops", *(cell("text", model) for model in same)]])
    one, two, _, six = (f"{losses('text', label).mean():.3f}" for label in same)
    yield f"two loops end lowest: {two}, one loop at {one}, six at {six}."
    names = {"gated": "6 loops", "sum": "sum", "mean": "mean", "outer": "outer"}
    found = [f"`{name}` at {cell('text', label)}" for name, label in names.items()]
    yield f"Six loops end, with {', '.join(found)}."

    yield from width_tables()
    rows = []
    both = [width for width in HEADS if has("widths", f"{width}, adamw, 1 block")]
    for study, width in [*(("widths", width) for width in both), ("long", 64), ("long", 256)]:
        row = [f"{width}, 16,000 steps" if study == "long" else str(width)]
        for base in (f"{width}, muon, 1 block", f"{width}, adamw, 1 block"):
            row += [cell(study, base), *(gain_cell(study, f"{base} x {n}", base) for n in (2, 6))]
        rows.append(row)
    yield markdown(["width", "Muon: 1 block", "x 2", "x 6", "AdamW: 1 block", "x 2", "x 6"], rows)
    found = [gain_cell("widths", f"64, {optimizer}, 6 blocks", f"64, {optimizer}, 1 block")
             for optimizer in ("muon", "adamw")]
    yield f"Six blocks of their own gain {' and '.join(found)} at 64 wide."
    middle, wide = (gain_cell("widths", f"{width}, adamw, 1 block x 2", f"{width}, adamw, 1 block")
                    for width in (256, 768))
    yield f"With AdamW a loop gains less: {middle} at 256, {wide} at 768 wide"

    shapes = dict.fromkeys(label.split(", ", 1)[1] for label in EXPERIMENTS["pairs"])
    rows = [[shape, *(cell("pairs", f"{width}, {shape}") for width in (32, 256))]
            for shape in shapes]
    yield markdown(["validation loss", "32 wide", "256 wide"], rows)
    rows = []
    for flops in BUDGETS:
        labels = [f"{n} x, {flops} FLOPs" for n in (1, 2, 6)]
        one = runs_of("compute", labels[0])[0]
        ratio = float(one["tokens"]) / float(one["params"])
        rows.append([f"{ratio:,.0f}", *(cell("compute", label) for label in labels)])
    yield markdown(["tokens per parameter", "1 loop", "2 loops", "6 loops"], rows)


def width_tables():
    shapes = ["1 block", LONGER, "1 block x 2", "2 blocks"]
    rows, copies = [], []
    for width in HEADS:
        one, longer, two, deeper = labels = [f"{width}, muon, {shape}" for shape in shapes]
        if has("widths", one, two, deeper):
            rows.append([str(width), *(cell("widths", label) for label in labels),
                         gain_cell("widths", two, one), gain_cell("widths", deeper, one)])
            copied_by = [cell("widths", label, "copied", 2) for label in (one, two, deeper)]
            copies.append([str(width), *copied_by])
    yield markdown(["width", *shapes, "a second loop gains", "a second block"], rows)
    yield ", ".join(f"{row[5]} at {row[0]}" for row in rows) + " wide"
    yield "A second block gains " + ", ".join(row[6] for row in rows)
    yield markdown(["width", *shapes[:1], *shapes[2:]], copies[2:])     # narrower ones don't copy
    grown = cell("growing", "256, muon, 1 block, then x 2")
    yield f"With one loop first ([fork](forks/growing.patch)) two end higher at 256: {grown}."


def puzzle_tables():
    head = ["4 steps", *map(str, range(5, 10))]
    rows = []
    for loop in (8, 12, 20):
        runs = [answers_of(label, loop)[:, 4:] for label in ("the loop", "the loop, AVX2")]
        lowest = np.concatenate(runs).min(0)    # of ten seeds and machines
        rows.append([f"after loop {loop}", *map(percent, lowest)])
    yield markdown(["lowest of 10 runs", *head], rows)
    rows = []
    for label in EXPERIMENTS["arrows"]:
        runs = answers_of(label, 1 if "separate" in label else 12)[:, 4:]
        rows.append([label, str(len(runs)), *map(percent, runs.mean(0))])
    yield markdown(["after loop 12", "seeds", *head], rows)
    yield (f"Six separate blocks are right in {rows[-1][2]}% at 4 steps, {rows[-1][4]}% at 6 and "
           f"{rows[-1][7]}% at 9")


# ---- pictures ----

def draw_widths(axes):
    """Draw how much lower a model ends than another, by width: a dot for each seed."""
    for i, (optimizer, shape, base, name) in enumerate([
            ("muon", "2 blocks", "1 block", "a second block (Muon)"),
            ("muon", "1 block x 2", "1 block", "a second loop (Muon)"),
            ("muon", "1 block x 2", LONGER, "a second loop at equal compute (Muon)"),
            ("adamw", "1 block x 2", "1 block", "a second loop (AdamW)")]):
        x, means = [], []
        for width in HEADS:
            labels = [f"{width}, {optimizer}, {each}" for each in (shape, base)]
            if has("widths", *labels):
                dots = gains("widths", *labels)
                axes.plot([width] * len(dots), dots, "o", color=f"C{i}", alpha=0.6)
                x.append(width)
                means.append(dots.mean())
        axes.plot(x, means, "-", color=f"C{i}", label=name)
    axes.plot(768, 0.31, "*", color="black", markersize=14,
              label="a second loop in the paper: other text, longer context, more steps")
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(list(HEADS), list(HEADS))
    axes.set_xticks([], minor=True)
    axes.set(xlabel="width of the block", ylabel="how much lower the validation loss is, nats",
             ylim=(None, 0.4), title="what one block gains from a second loop")
    axes.legend()


def draw_copying(axes):
    """Draw what seed 0 gains by copying, see copied(), over its training; others at its end."""
    for i, shape in enumerate(label for label in SHAPES if "6" not in label):
        points = []
        for label in EXPERIMENTS["copying"]:
            if label.startswith(f"{shape}, "):
                points.append((int(label.split()[-2]), losses("copying", label, "copied")[0]))
        ends = losses("widths", f"256, muon, {shape}", "copied")
        axes.plot(*zip(*points, (4000, ends[0]), strict=True), "o-", color=f"C{i}", label=shape)
        axes.plot([4000] * len(ends), ends, "o", color=f"C{i}", alpha=0.6)
    axes.axhline(0, color="black", linewidth=1)
    axes.set(xlabel="step of training", title="256 wide: when copying begins (pale: other seeds)",
             ylabel="how much lower the loss is on a text shown again, nats")
    axes.legend()


def pictures():
    save_picture(HERE / "widths.png", draw_widths)
    if has("copying", *EXPERIMENTS["copying"]):
        save_picture(HERE / "copying.png", draw_copying)
    table = [answers_of("the loop", loop).mean(0) for loop in range(1, 13)]
    ends = {"six separate blocks": answers_of("six separate blocks", 1).mean(0)}
    save_picture(HERE / "arrows.png", draw_answers, table, ends)


def main():
    command = " ".join(sys.argv[1:])
    if command == "tables":
        return print("\n\n".join(tables()))
    if command == "pictures":
        return pictures()
    try:
        study(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on where it was")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # with | head, end quietly when head does
    main()
