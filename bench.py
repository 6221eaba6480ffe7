"""
What a model costs, what its loops bring, and what models learn when they are trained side by side.

    python bench.py speed                                    the paper's four models; small on a CPU
    python bench.py speed --preset=gpt2-81m-loop             one model, by any flags of train.py
    python bench.py loops --out_dir=out                      what each loop of out/ckpt.pt brings
    python bench.py compare                                  the paper's pairs, trained side by side
    python bench.py compare --what=loops --scale=small       1 to 8 loops; at GPT-2's width
    python bench.py compare --what=readings --max_steps=500  any flag of train.py, for all runs

speed measures each model in a process of its own with nothing compiled before. The cold start ends
with the first step, the other times are medians. MFU is the share of the peak that the GPU's maker
states, or else of what a plain matrix product reaches here. Memory is what training adds.

compare gives every model the same data in the same order and the same evaluation. Each takes
the learning rate that is best for it at seed 0: --sweep tries rates a factor of two apart until the
best lies between two others. results/NAME.json records every trial, and later calls take the best.
A finished run in out-compare/ is not repeated, an interrupted one goes on.
"""
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from model import (
    GPT,
    OPTIMIZERS,
    RESIDUALS,
    configure_optimizers,
    flops_per_token,
    generate,
    load_checkpoint,
    pick_device,
)
from prepare import Parser, load_data, positive, write_json
from train import PRESETS, get_args, get_config, peak_flops, set_up, train_step, windows

# ---- speed: what a model costs ----

SMALL = ["--n_embd=128", "--n_head=4", "--no-bias", "--residual=sum", "--optimizer=adamw"]
ORDER = ("gpt2-45m", "gpt2-45m-loop", "gpt2-81m-loop", "gpt2-124m")  # by cost


def speed(flags):
    """Print a table of the model that the flags describe, or of the paper's four models."""
    rows = {"these flags": flags}
    if not flags and pick_device("auto").type == "cpu":
        layouts = [(PRESETS[name]["n_layer"], PRESETS[name]["n_loop"]) for name in ORDER]
        rows = {f"{n_layer} x {n_loop}, small": [*SMALL, *layout(n_layer, n_loop)]
                for n_layer, n_loop in layouts}
    elif not flags:
        rows = {name: [f"--preset={name}"] for name in ORDER}
    first = None
    for name, row_flags in rows.items():
        with tempfile.TemporaryDirectory() as empty:  # nothing compiled before
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
            command = [sys.executable, __file__, "measure", *row_flags]
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, env=env)
        if done.returncode:
            sys.exit(f"{name} could not be measured, see above")
        r = json.loads(done.stdout.splitlines()[-1])
        rate = r["tokens"] / r["step"]
        if first is None:
            first = rate
            print(f"{r['device']}, {r['tokens']:,} tokens a step, "
                  f"peak {r['peak'] / 1e12:.2f} TFLOP/s")
            print(f"{'model':<14} {'params':>8} {'MFLOPs/token':>12} {'start':>6} {'ms/step':>8} "
                  f"{'tokens/s':>9} {'MFU':>4} {'memory':>8} {'decode':>8} {'step':>6}")
        print(f"{name:<14} {r['params'] / 1e6:7.2f}M {r['flops'] / 1e6:12,.1f} {r['cold']:5.1f}s "
              f"{r['step'] * 1e3:8,.1f} {rate:9,.0f} {rate * r['flops'] / r['peak']:4.0%} "
              f"{r['memory'] / 1e6:6,.0f}MB {r['decode']:6,.0f}/s {first / rate:5.2f}x", flush=True)


def measure(flags):
    """Print all figures of one model as a line of JSON: one micro-batch a step, then decoding."""
    args = get_args(flags)
    device = pick_device(args.device)
    config = get_config(args, getattr(args, "vocab_size", 50257 if args.preset else 257))
    torch.manual_seed(args.seed)
    x, y = torch.randint(config.vocab_size, (2, args.batch_size, args.block_size), device=device)
    before, began = memory(device), time.perf_counter()
    model = GPT(config).to(device)
    betas = (args.beta1, args.beta2)
    optimizers = configure_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                      betas)
    autocast, bf16 = set_up(model, args, device)
    step = partial(train_step, model, optimizers, x, y, args, autocast)
    seconds(step, device)
    cold = time.perf_counter() - began
    count = max(5, min(50, int(10 / seconds(step, device))))
    times = [seconds(step, device) for _ in range(count)]
    used = memory(device) - before

    plain = GPT(config).to(device).eval()  # decoding: not compiled, half of the context as a prompt
    if bf16:
        plain.bfloat16()
    count = min(128, args.block_size // 2)
    tokens = generate(plain, x[:1, :args.block_size // 2], count)
    next(tokens)  # reads the prompt
    decoding = [seconds(partial(next, tokens), device) for _ in range(count - 1)]
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    product = min(seconds(partial(torch.matmul, a, a), device) for _ in range(8))
    peak = bf16 and peak_flops(device) or 2 * size ** 3 / product
    name = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{device.type}, {torch.get_num_threads()} threads")
    print(json.dumps({"params": sum(p.numel() for p in model.parameters()), "cold": cold,
                      "flops": flops_per_token(config), "step": np.median(times), "memory": used,
                      "tokens": x.numel(), "peak": peak, "decode": 1 / np.median(decoding),
                      "device": f"{name}, {'bf16' if bf16 else 'float32'}"}))


def seconds(work, device):
    """How long work() takes on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def memory(device):
    """The most bytes that were in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- loops: what each loop brings ----

@torch.no_grad()
def loops(flags):
    """Print tables of a checkpoint: after each loop of a pass, and of passes of 1 to 2N loops."""
    parser = Parser(loops.__doc__)
    parser.prog = "bench.py loops"
    parser.add_argument("--out_dir", default="out", help="where train.py left its ckpt.pt")
    parser.add_argument("--data_dir", default="data", help="what prepare.py wrote")
    parser.add_argument("--windows", type=positive, default=64, help="contexts to read")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps")
    args = parser.parse_args(flags)
    model, _ = load_checkpoint(Path(args.out_dir) / "ckpt.pt", pick_device(args.device))
    _, data, meta = load_data(args.data_dir)
    c = model.eval().config
    if meta["vocab_size"] != c.vocab_size or len(data) <= c.block_size:
        sys.exit(f"{args.data_dir} is not what the model was trained on: give its --data_dir")
    starts = np.linspace(0, len(data) - 1 - c.block_size, args.windows).astype(int)
    print(f"h[{c.loop_start}:{c.loop_end}] x {c.n_loop} ({c.residual}), {args.windows} windows of "
          f"{c.block_size} tokens")
    sums, ends = 0, 0
    for start in starts:
        x, y = windows(data, [start], c.block_size, c.vocab_size)
        x, y = x.to(model.wte.weight.device), y.to(model.wte.weight.device)
        final = model(x, x)[0][0].log_softmax(-1)    # (T, V)
        sums = sums + per_loop(model, x, y, c.n_loop, final)
        ends = ends + torch.stack([per_loop(model, x, y, n, final)[-1]
                                   for n in range(1, 2 * c.n_loop + 1)])
    bits = meta["val"]["tokens"] / meta["val"]["bytes"] / math.log(2)
    for title, rows in ((f"a pass of {c.n_loop} loops, after each:", sums),
                        (f"passes of 1 to {2 * c.n_loop} loops, at their end:", ends)):
        print(f"{title}\n{'loop':>4} {'val loss':>8} {'bits/byte':>9} {'KL':>7} {'|x|':>8} "
              f"{'|update|':>8} {'as final':>8}")
        for n, row in enumerate((rows / args.windows).tolist(), start=1):
            loss, kl, norm, update, same = row
            print(f"{n:4} {loss:8.4f} {loss * bits:9.3f} {kl:7.4f} {norm:8.2f} {update:8.2f} "
                  f"{same:8.1%}")


def per_loop(model, x, y, n_loop, final):
    """After each loop of a pass over x (1, T) with the targets y (1, T): (n_loop, 5).

    Loss and KL(final || p(n)) in nats, length of the state and of its update, share of the best
    guesses that are those of final (T, V), log-probabilities.
    """
    rows, inputs = [], []
    first = model.h[model.config.loop_start]
    hook = first.register_forward_pre_hook(lambda block, args: inputs.append(args[0]))  # x(n-1)
    for state in model.states(x, n_loop):
        logits, loss = model.readout(state, y)
        p = logits[0].log_softmax(-1)
        rows.append(torch.stack((
            loss, F.kl_div(p, final, reduction="batchmean", log_target=True),
            state.norm(dim=-1).mean(), (state - inputs[-1]).norm(dim=-1).mean(),
            (p.argmax(-1) == final.argmax(-1)).float().mean())))
    hook.remove()
    return torch.stack(rows).cpu()


# ---- compare: models trained side by side ----

PAPER = {"12 x 1": 3.12, "6 x 6": 3.11, "1 x 1": 3.98, "1 x 2": 3.67}  # losses, arXiv 2409.14199
PAIRS = {"tiny": ((4, 2, 3), (1, 1, 2)),    # blocks of one pass; blocks and loops of its partner
         "small": ((12, 6, 6), (1, 1, 2)), "paper": ((12, 6, 6), (1, 1, 2))}
SCALES = {  # what all runs share; tiny is for a CPU, small for one GPU, paper is the paper's
    "tiny": ["--n_embd=64", "--n_head=2", "--max_steps=1200", "--learning_rate=8e-3"],
    "small": ["--preset=gpt2-124m", "--batch_size=32", "--gradient_accumulation_steps=1",
              "--max_steps=1200", "--warmup_steps=120", "--eval_iters=20"],
    "paper": ["--preset=gpt2-124m"],
}


def layout(n_layer, n_loop):
    return [f"--n_layer={n_layer}", f"--n_loop={n_loop}"]


def flops_of(flags, vocab_size):
    return flops_per_token(get_config(get_args(flags), vocab_size))


def models_of(what, scale, shared, vocab_size):
    """{label: flags of train.py} of a comparison."""
    if what == "loops":
        return {f"1 x {n}": [*shared, *layout(1, n)] for n in (1, 2, 3, 4, 6, 8)}
    if what == "readings":
        models = {}
        for optimizer in OPTIMIZERS:
            flags = [*shared, f"--optimizer={optimizer}"]
            models[f"one pass, {optimizer}"] = [*flags, *layout(1, 1)]
            for residual in RESIDUALS:
                looped = [*flags, *layout(1, 6), f"--residual={residual}"]
                models[f"{residual}, {optimizer}"] = looped
        return models
    models = {}
    for plain, n_layer, n_loop in PAIRS[scale]:
        one_pass, looped = [*shared, *layout(plain, 1)], [*shared, *layout(n_layer, n_loop)]
        models[f"{plain} x 1"] = one_pass
        models[f"{n_layer} x {n_loop}"] = looped
        # the controls: as deep without sharing, and one pass with the compute of the loops
        models[f"{n_layer * n_loop} x 1, unshared"] = [*shared, *layout(n_layer * n_loop, 1)]
        ratio = flops_of(looped, vocab_size) / flops_of(one_pass, vocab_size)
        steps = round(get_args(shared).max_steps * ratio)
        label = f"{plain} x 1, compute of {n_layer} x {n_loop}"
        models[label] = [*one_pass, f"--max_steps={steps}"]
    return models


def train_run(flags, data_sha256, rate, seed):
    """Return the last line of train.py with these flags, as a dict; None if it diverged."""
    flags = [*flags, f"--learning_rate={rate:g}", f"--seed={seed}"]
    args = get_args(flags)
    key = hashlib.sha256(json.dumps([vars(args), data_sha256]).encode()).hexdigest()[:12]
    folder = Path("out-compare") / f"{args.n_layer}x{args.n_loop}-{key}"
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    if (folder / "ckpt.pt").exists():
        flags = ["--resume"]
    gpus = torch.cuda.device_count() if pick_device(args.device).type == "cuda" else 0
    launch = []
    if gpus > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    script = str(Path(__file__).with_name("train.py"))
    command = [sys.executable, *launch, script, *flags, f"--out_dir={folder}"]
    env = os.environ if gpus else os.environ | {"OMP_NUM_THREADS": "1"}  # a core for each run
    done = subprocess.run(command, text=True, capture_output=True, env=env)
    diverged = "smaller --learning_rate" in done.stderr
    if done.returncode and not diverged:
        sys.exit(f"the run in {folder} failed:\n{done.stderr}")
    result = None if diverged else json.loads(done.stdout.splitlines()[-1])
    write_json(folder / "result.json", result)
    for path in folder.glob("*.pt"):
        path.unlink()  # large, and no longer needed
    return result


def best_rate(trials, first):
    """The rate of the lowest loss in {rate: loss}; the lowest rate if all diverged."""
    return min(trials, key=lambda rate: (trials[rate], rate)) if trials else first


def untried(trials, first):
    """The rates to try next: the best so far, its half and its double."""
    best = best_rate(trials, first)
    return [rate for rate in (best / 2, best, 2 * best) if rate not in trials]


def sweep(models, trials, first, train, pool):
    """Fill trials {label: {rate: loss}} until each model's best rate lies between two others."""
    while True:
        jobs = [(label, rate) for label in models for rate in untried(trials[label], first)]
        if not jobs:
            return
        for (label, rate), result in zip(jobs, pool.map(train, jobs), strict=True):
            trials[label][rate] = math.inf if result is None else result["val_loss"]


def compare(flags):
    parser = Parser(__doc__)
    parser.prog = "bench.py compare"
    parser.add_argument("--what", choices=("paper", "loops", "readings"), default="paper",
                        help="the paper's pairs, 1 to 8 loops, or the readings of the equation")
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="the size of the models")
    parser.add_argument("--seeds", type=positive, default=3, help="how many")
    parser.add_argument("--sweep", action="store_true", help="try learning rates for each model")
    parser.add_argument("--title", help="of the picture")
    args, extra = parser.parse_known_args(flags)
    shared = [*SCALES[args.scale], *extra]
    base = get_args(shared)
    _, _, meta = load_data(base.data_dir)
    if args.scale != "tiny" and meta["tokenizer"] != "gpt2":
        sys.exit(f"--scale={args.scale} is for GPT-2's tokens: python prepare.py --tokenizer=gpt2")
    models = models_of(args.what, args.scale, shared, meta["vocab_size"])
    changed = [flag.lstrip("-") for flag in extra if not flag.startswith("--data_dir")]
    name = "-".join([args.scale, args.what, *changed]).replace("/", "_")
    path = Path("results") / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    trials = {label: {} for label in models}
    earlier = json.loads(path.read_text()) if path.exists() else {"data": None}
    if earlier["data"] == meta:
        for label, row in earlier["models"].items():
            trials[label] = {float(rate): math.inf if loss is None else loss
                             for rate, loss in row["trials"].items()}
    device = pick_device(base.device)
    workers = os.cpu_count() if device.type == "cpu" else 1

    with ThreadPoolExecutor(workers) as pool:
        train = partial(train_job, models, meta["train"]["sha256"])
        if args.sweep:
            sweep(models, trials, base.learning_rate, train, pool)
        best = {label: best_rate(trials[label], base.learning_rate) for label in models}
        jobs = [(label, best[label], seed) for seed in range(args.seeds) for label in models]
        results = list(pool.map(train, jobs))

    rows = {}
    for label in models:
        runs = [run for (name, *_), run in zip(jobs, results, strict=True) if name == label]
        rows[label] = summary(runs, best[label], trials[label])
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{workers} CPU cores"
    tokens = f"{meta['train']['tokens']:,} {meta['tokenizer']} tokens"
    head = (f"{meta['dataset']}, {tokens}; {base.n_embd} wide; seeds 0 to {args.seeds - 1}; "
            f"{machine}, torch {torch.__version__}")
    write_json(path, {"setting": head, "command": ["bench.py", "compare", *flags], "data": meta,
                      "models": rows})
    print_table(head, rows, args)
    plot_rows(rows, args.title or head, path.with_suffix(".png"))


def train_job(models, data_sha256, job):
    """train_run for a job (label, rate) or (label, rate, seed), with a line of progress."""
    label, rate, seed = (*job, 0)[:3]
    began = time.time()
    result = train_run(models[label], data_sha256, rate, seed)
    outcome = "diverged" if result is None else f"{result['val_loss']:.4f}"
    took = f"{time.time() - began:.0f} s"
    print(f"{label:<30} rate {rate:g}, seed {seed}: {outcome} ({took})", flush=True)
    return result


def summary(runs, rate, trials):
    """What the JSON keeps of a model. The spread is half the distance of best and worst seed."""
    losses = [run["val_loss"] for run in runs if run]
    return {"learning_rate": rate, "runs": runs,
            "mean": sum(losses) / len(losses) if losses else None,
            "spread": (max(losses) - min(losses)) / 2 if losses else None,
            "trials": {f"{rate:g}": None if math.isinf(loss) else loss
                       for rate, loss in trials.items()}}


def print_table(head, rows, args):
    print(f"\n{head}\n{'model':<26} {'params':>8} {'tokens':>8} {'PFLOPs':>8} {'minutes':>7} "
          f"{'rate':>7} {'val loss':>8} {'+-':>6} {'paper':>5}")
    for label, row in rows.items():
        runs = [run for run in row["runs"] if run]
        failed = len(row["runs"]) - len(runs)
        note = f"  {failed} diverged" if failed else ""
        if not runs:
            print(label + note)
            continue
        minutes = sum(run["seconds"] for run in runs) / len(runs) / 60
        paper = PAPER.get(label, "") if args.what == "paper" and args.scale != "tiny" else ""
        print(f"{label:<26} {runs[0]['params'] / 1e6:7.2f}M {runs[0]['tokens'] / 1e6:7.2f}M "
              f"{runs[0]['flops'] / 1e15:8.4f} {minutes:7.1f} {row['learning_rate']:7.2g} "
              f"{row['mean']:8.4f} {row['spread']:6.4f} {paper:>5}{note}")


def plot_rows(rows, title, path):
    """A line for each model: the mean of its seeds and how far they lie apart."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no picture {path}: pip install matplotlib")
        return
    rows = {label: row for label, row in rows.items() if row["mean"] is not None}
    figure = Figure(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.errorbar([row["mean"] for row in rows.values()], list(rows), fmt="o", capsize=4,
                  xerr=[row["spread"] for row in rows.values()])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set(xlabel="validation loss, nats", title=title)
    figure.savefig(path, dpi=120)
    print(f"written: {path.with_suffix('.json')} and {path}")


COMMANDS = {"speed": speed, "measure": measure, "loops": loops, "compare": compare}


def main():
    command, flags = "speed", sys.argv[1:]
    if flags in (["-h"], ["--help"]):
        print(__doc__)
        return
    if flags and not flags[0].startswith("-"):
        command, *flags = flags
    if command not in COMMANDS:
        sys.exit(f"bench.py has no command {command}: it has {', '.join(COMMANDS)}")
    if command == "speed":
        get_args(flags)  # a wrong flag, or --help, ends here
    COMMANDS[command](flags)


if __name__ == "__main__":
    main()
