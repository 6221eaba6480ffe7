"""
What a model costs, what its loops gain, and what models learn when they are trained side by side.

    python bench.py speed                           the paper's four models; small ones on a CPU
    python bench.py speed --preset=gpt2-81m-loop    one model, by any flags of train.py
    python bench.py loops --out_dir=out-arrows      what each loop gains on the puzzle
    python bench.py compare --what=default --sweep  an experiment: see EXPERIMENTS

speed measures each model in a process of its own, with nothing compiled before. start is the time
until the first step is done, the other times are medians. memory is what training adds. MFU, the
model FLOPs utilization, is the share of the peak that the device's maker states. decode is in
tokens per second.

compare gives every model the same data, with the same seed in the same order, and the same
evaluation. --sweep finds each its own learning rate: it tries rates a factor of two apart, with
seed 0, until the best lies between two others, in at most 12 trials. The best has the lowest
validation loss; for the puzzle, the fewest wrong answers in the table, after 8 loops. All trials
are recorded in results/, in a file named by the flags. A finished run in out-compare/ is not
repeated, an interrupted one goes on: delete the folder if you change the code.
"""
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None   # the tables need no matplotlib, the pictures do

import train
from model import GPT, KVCache, flops_per_token, generate, load_checkpoint, pick_device
from prepare import load_data, make_arrows, make_parser
from sample import exit_early
from train import positive

# ---- speed: what a model costs ----

SMALL = "--n_embd=128 --n_head=4 --no-bias --optimizer=adamw"   # the paper's layouts, for a CPU
LAYOUTS = {"12 x 1": "--n_layer=12", "6 x 6": "--n_layer=6 --n_loop=6", "1 x 1": "--n_layer=1",
           "1 x 2": "--n_layer=1 --n_loop=2"}


def speed(flags):
    """Print a table of the model that the flags describe, or of the paper's four models."""
    args, _ = train.get_args(flags)  # a wrong flag, or --help, ends here
    device = pick_device(args.device)
    if flags:
        models = {"these flags": flags}
    elif device.type == "cuda":
        models = {name: [f"--preset={name}"] for name in train.PRESETS if name != "arrows"}
    else:
        models = {f"{name}, small": f"{SMALL} {layout}".split() for name, layout in LAYOUTS.items()}
    print(f"{'':<14} {'params':>8} {'MFLOPs/token':>12} {'start':>6} {'ms/step':>8} "
          f"{'tokens/s':>9} {'MFU':>4} {'memory':>8} {'decode':>8}", flush=True)
    for name, model_flags in models.items():
        with tempfile.TemporaryDirectory() as empty:  # nothing compiled before
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
            command = [sys.executable, __file__, "measure", name, *model_flags]
            if subprocess.run(command, env=env).returncode:
                sys.exit(f"{name} could not be measured, see above")
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"device: {device_name(device)}{threads}, torch {torch.__version__}")


def measure(flags):
    """Print one row of the table: batch_size sequences a step, then decoding."""
    name, *flags = flags
    args, _ = train.get_args(flags)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for_gpt2 = (args.preset or "").startswith("gpt2")
    # --init_from sets vocab_size, a preset of GPT-2's size means its tokens
    config = train.get_config(args, getattr(args, "vocab_size", 50257 if for_gpt2 else 257))
    torch.manual_seed(args.seed)
    x, y = torch.randint(config.vocab_size, (2, args.batch_size, args.block_size), device=device)
    memory_before, began = peak_memory(device), time.perf_counter()
    model = GPT(config).to(device)
    optimizers = train.configure_optimizers(model, args)
    autocast, bf16 = train.set_up(model, args, device)
    step = partial(train.train_step, model, optimizers, x, y, args, autocast)
    time_of(step, device)
    start = time.perf_counter() - began
    count = max(5, min(50, int(10 / time_of(step, device))))
    step_time = np.median([time_of(step, device) for _ in range(count)])
    memory = peak_memory(device) - memory_before

    plain = GPT(config).to(device).eval()  # decoding: not compiled, half of the context as a prompt
    if bf16:
        plain.bfloat16()
    count = min(128, args.block_size // 2)
    tokens = generate(plain, x[:1, :args.block_size // 2], count)
    next(tokens)  # reads the prompt
    token_time = np.median([time_of(partial(next, tokens), device) for _ in range(count - 1)])

    params, flops = sum(p.numel() for p in model.parameters()), flops_per_token(config)
    peak = peak_flops(device) if bf16 else None
    mfu = f"{x.numel() / step_time * flops / peak:4.0%}" if peak else "   -"
    print(f"{name:<14} {params / 1e6:7.2f}M {flops / 1e6:12,.1f} {start:5.1f}s "
          f"{step_time * 1e3:8,.1f} {x.numel() / step_time:9,.0f} {mfu} {memory / 1e6:6,.0f}MB "
          f"{1 / token_time:6,.0f}/s", flush=True)


def time_of(work, device):
    """How long work() takes on the device, in seconds."""
    module = torch.get_device_module(device)
    module.synchronize()
    began = time.perf_counter()
    work()
    module.synchronize()
    return time.perf_counter() - began


def peak_memory(device):
    """The most bytes that were in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device):
    """Dense bf16 operations per second that the maker states, or None for a device not listed."""
    peaks = {"H100 80GB HBM3": 989e12, "H200": 989e12, "B200": 2250e12, "A100-SXM4-40GB": 312e12,
             "A100-SXM4-80GB": 312e12, "L40S": 362e12, "L4": 121e12, "GeForce RTX 4090": 165e12}
    return peaks.get(device_name(device).removeprefix("NVIDIA "))


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---- loops: what each loop of a checkpoint gains ----

def loops(flags):
    """Print and draw how many answers to the puzzle are right after each loop."""
    parser = make_parser(loops.__doc__, "bench.py loops")
    add = parser.add_argument
    add("--out_dir", default="out-arrows", help="the folder with train.py's ckpt.pt")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    args = parser.parse_args(flags)
    model, state = load_checkpoint(Path(args.out_dir) / "ckpt.pt", pick_device(args.device))
    if state["data"]["dataset"] != "arrows":
        sys.exit(f"{args.out_dir} is not of the puzzle: there, train.py prints the loss after each "
                 "loop, and sample.py --show_loops the guesses")
    table, used = right_answers(model, n_loop=16), loops_to_settle(model)
    print_answers({f"after loop {n}": row for n, row in enumerate(table, start=1)})
    print(f"loops that --exit_kl=0.01 takes, of {model.config.n_loop}:")
    print(f"{'':<26} {' '.join(f'{n:5.2f}' for n in used)}")
    others = {"a blind guess": BLIND}
    save_picture(Path(args.out_dir) / "loops.png", draw_answers, table, model.config.n_loop, others)


BLIND = [1 / 4] * 5 + [1 / 2] * 5   # right answers of a guess that names one of the 4 or 2 ends


def puzzles(chains, count=1000):
    """New documents of 4 or 2 chains, as tokens (count, 68): 20 of the map, then 16 times c>i.

    In the maps of training, most letters lead to the same end, and to name it would answer most of
    the longest questions. With equal chains all ends are equally likely.
    """
    return torch.tensor([list(text.encode()) for text in make_arrows(count, chains, seed=1)])


def steps_to_answer(x):
    """How many arrows lead from each question of the documents x (B, 68) to its end: (B, 16)."""
    points_to = x[:, :20] - ord("a")
    letter = x[:, 20::3] - ord("a")
    steps = torch.zeros_like(letter)
    for _ in range(9):
        target = points_to.gather(1, letter)
        steps += target != letter
        letter = target
    return steps


@torch.no_grad()
def right_answers(model, n_loop):
    """The share of right answers after loop 1 .. n_loop to questions of 0 .. 9 steps: (n_loop, 10).

    0 to 4 steps are of 4 chains. 5 to 9, which training never has, are of 2 chains.
    """
    table = np.zeros((n_loop, 10))
    for chains, columns in ((4, range(5)), (2, range(5, 10))):
        x, right = puzzles(chains), []
        for part in x.to(model.wte.weight.device).split(100):
            states = model.eval().states(part, n_loop)
            # > is at 21, 24, .. predict returns all positions only with targets, whatever they are
            logits = (model.predict(state, part)[0][:, 21::3] for state in states)
            right.append(torch.stack([guess.argmax(-1) == part[:, 22::3] for guess in logits]))
        right = torch.cat(right, dim=1).cpu()       # (n_loop, B, 16)
        for steps in columns:
            table[:, steps] = right[:, steps_to_answer(x) == steps].float().mean(-1)
    return table.tolist()


@torch.no_grad()
def loops_to_settle(model, exit_kl=0.01, count=50):
    """The mean number of loops that sample.py's early exit takes for answers of 0 to 4 steps."""
    x, used = puzzles(4, count), []
    for document in x.to(model.wte.weight.device):
        taken, cache = [], KVCache(model.config.block_size)
        for idx in (document[:20], *document[20:67].split(1)):  # the map, then token by token
            exit_early(model.eval(), exit_kl, taken, idx[None], cache=cache)
            cache.advance(len(idx))
        used.append(taken[2::3])    # at each >, where the model predicts an answer
    used, steps = torch.tensor(used).double(), steps_to_answer(x)
    return [used[steps == number].mean().item() for number in range(5)]


def print_answers(rows):
    """Print rows of right_answers, {label: row (10,)}."""
    print("right answers in %, by the steps from the question to its answer (training: 0 to 4)")
    print(f"{'':<26} {' '.join(f'{steps:5}' for steps in range(10))}")
    for label, row in rows.items():
        print(f"{label:<26} {' '.join(f'{100 * share:5.1f}' for share in row)}")


def draw_answers(axes, table, trained_loops, others):
    """Draw right_answers after loop 1 to 12, and below them the others, {label: row (10,)}."""
    rows = [*table[:12], [math.nan] * 10, *others.values()]
    axes.figure.set_size_inches(8, 0.9 + 0.32 * len(rows))
    axes.imshow(rows, aspect="auto", cmap="YlGnBu", vmin=0, vmax=1.1)
    for n, row in enumerate(rows):
        for steps, share in enumerate(row):
            if not math.isnan(share):
                axes.text(steps, n, f"{100 * share:.0f}", ha="center", va="center",
                          color="white" if share > 0.6 else "black")
    shown = len(table[:12])
    axes.plot([4.5, 4.5], [-0.5, shown - 0.5], "r", linewidth=2)
    axes.plot([-0.5, 9.5], [min(trained_loops, shown) - 0.5] * 2, "r", linewidth=2)
    axes.set_xticks(range(10))
    axes.set_yticks([*range(shown), *range(shown + 1, len(rows))],
                    [*(f"after loop {n + 1}" for n in range(shown)), *others])
    axes.set(xlabel="steps from the question to its answer",
             title=f"right answers in %; training ended at the red lines, 4 steps, "
                   f"{trained_loops} loops")


# ---- compare: models trained side by side ----

AS_6_LOOPS = "--target_flops=1.007e13"  # the compute of the default run with six loops
NARROW = "--n_embd=32"
GPT2 = ("--batch_size=32 --gradient_accumulation_steps=1 --max_steps=1200 --warmup_steps=120 "
        "--eval_iters=20 --eval_interval=10000")
EXPERIMENTS = {     # {label: flags of train.py}
    "default": {    # equal data, then equal compute, where lower rates are better
        "1 loop": "--n_loop=1",
        "2 loops": "--n_loop=2",
        "4 loops": "--n_loop=4",
        "6 loops": "--n_loop=6",
        "1 loop, compute of 6": f"--n_loop=1 --learning_rate=2e-3 {AS_6_LOOPS}",
        "2 loops, compute of 6": f"--n_loop=2 --learning_rate=4e-3 {AS_6_LOOPS}",
        "4 loops, compute of 6": f"--n_loop=4 {AS_6_LOOPS}",
    },
    "compute": {    # five budgets
        f"{n} x, {flops} FLOPs": f"{NARROW} --n_loop={n} --target_flops={flops}"
        for flops in ("1.8e11", "4.4e11", "1.1e12", "2.8e12", "6.9e12") for n in (1, 2, 4, 6)
    },
    "compute-largest": {    # the last budget again, its two best, for --seeds=5
        f"{n} x, 6.9e12 FLOPs": f"{NARROW} --n_loop={n} --target_flops=6.9e12" for n in (1, 2)
    },
    "variants": {   # of the equation, beside one loop; again with --optimizer=adamw
        "1 loop": "--n_loop=1",
        **{residual: f"--n_loop=6 --residual={residual}" for residual in train.RESIDUALS},
    },
    "pairs": {      # the paper's two pairs, small, with both loop orders and controls
        "4 blocks": f"{NARROW} --n_layer=4",
        "2 blocks x 3": f"{NARROW} --n_layer=2 --n_loop=3",
        "2 blocks x 3, each in turn": f"{NARROW} --n_layer=2 --n_loop=3 --loop_order=block",
        "6 blocks": f"{NARROW} --n_layer=6",
        "4 blocks, compute of 2 x 3": f"{NARROW} --n_layer=4 --target_flops=3.222e12",
        "1 block": f"{NARROW} --n_layer=1",
        "1 block x 2": f"{NARROW} --n_layer=1 --n_loop=2",
        "2 blocks": f"{NARROW} --n_layer=2",
        "1 block, compute of 1 x 2": f"{NARROW} --n_layer=1 --target_flops=1.209e12",
    },
    "paper": {      # pairs at GPT-2's width and vocabulary, for one GPU
        "12 blocks": f"--preset=gpt2-124m {GPT2}",
        "6 blocks x 6": f"--preset=gpt2-81m-loop {GPT2}",
        "6 blocks x 6, no gate": f"--preset=gpt2-81m-loop --residual=sum {GPT2}",
        "36 blocks": f"--preset=gpt2-124m --n_layer=36 {GPT2}",
        "1 block": f"--preset=gpt2-45m {GPT2}",
        "1 block x 2": f"--preset=gpt2-45m-loop {GPT2}",
        "1 block x 2, no gate": f"--preset=gpt2-45m-loop --residual=sum {GPT2}",
        "2 blocks": f"--preset=gpt2-45m --n_layer=2 {GPT2}",
    },
    "arrows": {     # the puzzle, and its controls with equal compute, at good rates
        "six loops": "--preset=arrows",
        "six blocks": "--preset=arrows --n_layer=6 --n_loop=1 --learning_rate=8e-3",
        "one forward pass": "--preset=arrows --n_loop=1 --target_flops=1.143e13",
    },
    "arrows-sum": {     # the puzzle without a gate, then with loops drawn from 1 to 6
        "no gate": "--preset=arrows --residual=sum",
        "no gate, 1 to 6": "--preset=arrows --residual=sum --n_loop_min=1 --max_steps=8000",
    },
}


def train_run(label, flags, data_sha256, rate, seed):
    """Return the last line of train.py with these flags, as a dict. Its val_loss may be None."""
    flags = [*flags, f"--learning_rate={rate:g}", f"--seed={seed}"]
    args, _ = train.get_args(flags)
    key = hashlib.sha256(json.dumps([vars(args), data_sha256]).encode()).hexdigest()[:12]
    folder = Path("out-compare") / f"{args.n_layer}x{args.n_loop}-{key}"
    path = folder / "result.json"
    if not path.exists():
        device = pick_device(args.device)
        resumed = (folder / "ckpt.pt").exists()
        result = run_train_py(["--resume"] if resumed else flags, folder, device)
        if args.preset == "arrows" and result["val_loss"] is not None:
            model, _ = load_checkpoint(folder / "ckpt.pt", device)
            n_loop = 16 if args.n_loop > 1 else 1
            result["right"] = right_answers(model, n_loop)
        path.with_suffix(".tmp").write_text(json.dumps(result))
        path.with_suffix(".tmp").rename(path)
        for checkpoint in folder.glob("*.pt"):
            checkpoint.unlink()  # large, and no longer needed
    result = json.loads(path.read_text())
    outcome = "diverged" if result["val_loss"] is None else f"{score(result):.4f}"
    print(f"{label:<26} rate {rate:g}, seed {seed}: {outcome}", flush=True)
    return result


def after_loop_8(table):
    """The row of right_answers that a model is judged by. A model without a loop has one only."""
    return table[:8][-1]


def score(run):
    """What decides between learning rates, less is better: None if the run diverged.

    The puzzle's validation loss would not do. It is of 0 to 4 steps, which are nearly all right at
    several rates. So there it is the share of wrong answers of 0 to 9 steps.
    """
    return 1 - np.mean(after_loop_8(run["right"])) if "right" in run else run["val_loss"]


def run_train_py(flags, folder, device):
    """Run train.py in a process of its own, on all GPUs or on one CPU core. Return its last line.

    That line is JSON also if the training diverged.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    script = str(Path(__file__).with_name("train.py"))
    command = [sys.executable, *(launch if gpus > 1 else []), script, *flags, f"--out_dir={folder}"]
    env = os.environ if gpus else os.environ | {"OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, text=True, capture_output=True, env=env)
    if not done.stdout.endswith("}\n"):
        sys.exit(f"the run in {folder} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def study(data_sha256, seeds, sweep, model):
    """Find the learning rate of one model (label, flags), then train all seeds. Return its row.

    The spread is half the distance between the best and the worst seed.
    """
    label, flags = model
    train_at = partial(train_run, label, flags, data_sha256)
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
    return {"flags": " ".join(flags), "learning_rate": best, "runs": runs,
            "mean": np.mean(losses) if losses else None,
            "spread": (max(losses) - min(losses)) / 2 if losses else None,
            "trials": {f"{rate:g}": trials[rate] for rate in sorted(trials)}}


def compare(flags):
    """Train the models of an experiment. Any other flags go to train.py, for all of them."""
    parser = make_parser(compare.__doc__, "bench.py compare")
    add = parser.add_argument
    add("--what", choices=EXPERIMENTS, default="default", help="the experiment")
    add("--seeds", type=positive, default=3, help="number of seeds, from 0 on")
    add("--sweep", action="store_true", help="find a learning rate for each model")
    args, extra = parser.parse_known_args(flags)
    models = {label: text.split() + extra for label, text in EXPERIMENTS[args.what].items()}
    base, _ = train.get_args(next(iter(models.values())))
    _, _, meta = load_data(base.data_dir)
    device = pick_device(base.device)
    workers = os.cpu_count() if device.type == "cpu" else 1
    work = partial(study, meta["train"]["sha256"], args.seeds, args.sweep)
    with ThreadPoolExecutor(workers) as pool:
        rows = dict(zip(models, pool.map(work, models.items()), strict=True))

    parts = [args.what] + ["sweep"] * args.sweep
    if args.seeds != parser.get_default("seeds"):
        parts.append(f"seeds={args.seeds}")
    parts += [flag.lstrip("-").replace("/", "_") for flag in extra]
    path = Path("results") / f"{'-'.join(parts)}.json"
    path.parent.mkdir(exist_ok=True)
    setting = (f"{meta['dataset']}, {meta['train']['tokens']:,} {meta['tokenizer']} tokens; "
               f"{workers} x {device_name(device)}, torch {torch.__version__}")
    path.write_text(json.dumps({"setting": setting, "command": ["bench.py", "compare", *flags],
                                "data": meta, "models": rows}, indent=1) + "\n")
    print_table(setting, rows)
    print(f"written: {path}")
    rows = {label: row for label, row in rows.items() if finished(row)}
    gated = {label: row for label, row in rows.items() if finished(row)[0]["gates"]}
    if rows and base.preset == "arrows":
        show_answers(rows, base.n_loop, path.with_suffix(".png"))
    elif args.what.startswith("compute"):
        save_picture(path.with_suffix(".png"), draw_differences, rows)
    elif gated:
        save_picture(path.with_suffix(".png"), draw_gates, gated)


def finished(row):
    """The runs of a model that did not diverge."""
    return [run for run in row["runs"] if run["val_loss"] is not None]


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


def show_answers(rows, trained_loops, path):
    """Print each model's right answers after loop 8, the mean of its seeds.

    Draw the first model loop by loop, and the others' rows below it.
    """
    tables = {label: np.mean([run["right"] for run in finished(row)], axis=0)
              for label, row in rows.items()}
    ends = {f"{label}, loop 8" if len(table) > 1 else label: after_loop_8(table)
            for label, table in tables.items()}
    print_answers(ends)
    others = list(ends)[1:]
    below = {label: ends[label] for label in others} | {"a blind guess": BLIND}
    save_picture(path, draw_answers, tables[next(iter(rows))], trained_loops, below)


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


def draw_gates(axes, rows):
    """Draw the gates over the loops: a colour for each model, a line for each seed and group."""
    for i, (label, row) in enumerate(rows.items()):
        lines = [gates for run in finished(row) for gates in run["gates"]]
        for gates in lines:
            name = label if gates is lines[0] else None     # one entry in the legend
            axes.plot(range(1, len(gates) + 1), gates, "o-", color=f"C{i}", label=name)
    axes.set(xlabel="loop", ylabel="gate, mean over the channels", title="the gates after training")
    axes.legend()


def save_picture(path, draw, *args):
    """Write the picture that draw(axes, *args) draws, if matplotlib is installed."""
    if Figure is None:
        print(f"no picture {path}: pip install matplotlib")
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw(figure.subplots(), *args)
    figure.savefig(path, dpi=100)
    print(f"written: {path}")


COMMANDS = {"speed": speed, "measure": measure, "loops": loops, "compare": compare}


def main():
    command, *flags = sys.argv[1:] or ["speed"]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        COMMANDS[command](flags)
    else:
        sys.exit(f"bench.py has no command {command}: it has speed, loops and compare")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: compare goes on where it was")
