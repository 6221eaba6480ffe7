"""
What a model costs, what its loops bring, and what models learn when they are trained side by side.

    python bench.py speed                                   the paper's four models; small on a CPU
    python bench.py speed --preset=gpt2-81m-loop            one model, by any flags of train.py
    python bench.py loops --out_dir=out                     what each loop of out/ckpt.pt brings
    python bench.py compare --what=loops                    1 to 8 loops, equal parameters and data
    python bench.py compare --what=compute                  1 to 6 loops, equal compute
    python bench.py compare --what=paper --scale=small      the paper's pairs, at GPT-2's width
    python bench.py compare --what=readings --n_embd=96     other flags of train.py go to all runs

speed measures each model in a process of its own, with nothing compiled before. start is the time
until the first step is done, the other times are medians. memory is what training adds, MFU the
share of the peak that the maker states.

compare gives every model the same data, for a seed in the same order, and the same evaluation.
--sweep finds each its own learning rate: it tries rates a factor of two apart, with seed 0, until
the best lies between two others. results/SCALE-WHAT.json records every trial. A finished run in
out-compare/ is not repeated, an interrupted one goes on.
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

import train
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

# ---- speed: what a model costs ----

SMALL = ["--n_embd=128", "--n_head=4", "--no-bias", "--residual=sum", "--optimizer=adamw"]


def speed(flags):
    """Print a table of the model that the flags describe, or of the paper's four models."""
    train.get_args(flags)  # a wrong flag, or --help, ends here
    if flags:
        rows = {"these flags": flags}
    elif pick_device("auto").type == "cpu":
        layouts = [(preset["n_layer"], preset["n_loop"]) for preset in train.PRESETS.values()]
        rows = {f"{a} x {n}, small": [*SMALL, *layout(a, n)] for a, n in layouts}
    else:
        rows = {name: [f"--preset={name}"] for name in train.PRESETS}
    first = None
    for name, row_flags in rows.items():
        with tempfile.TemporaryDirectory() as empty:  # nothing compiled before
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
            command = [sys.executable, __file__, "measure", *row_flags]
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, env=env)
        if done.returncode:
            sys.exit(f"{name} could not be measured, see above")
        r = json.loads(done.stdout.splitlines()[-1])
        if first is None:
            first = r["step"]
            print(f"{r['device']}, {r['tokens']:,} tokens a step\n{'model':<14} {'params':>8} "
                  f"{'MFLOPs/token':>12} {'start':>6} {'ms/step':>8} {'tokens/s':>9} {'MFU':>4} "
                  f"{'memory':>8} {'decode':>8} {'time':>6}")
        rate = r["tokens"] / r["step"]
        mfu = f"{rate * r['flops'] / r['peak']:4.0%}" if r["peak"] else "   -"
        print(f"{name:<14} {r['params'] / 1e6:7.2f}M {r['flops'] / 1e6:12,.1f} {r['start']:5.1f}s "
              f"{r['step'] * 1e3:8,.1f} {rate:9,.0f} {mfu} {r['memory'] / 1e6:6,.0f}MB "
              f"{r['decode']:6,.0f}/s {r['step'] / first:5.2f}x", flush=True)


def measure(flags):
    """Print the figures of one model as a line of JSON: one micro-batch a step, then decoding."""
    args = train.get_args(flags)
    device = pick_device(args.device)
    config = train.get_config(args, getattr(args, "vocab_size", 50257 if args.preset else 257))
    torch.manual_seed(args.seed)
    x, y = torch.randint(config.vocab_size, (2, args.batch_size, args.block_size), device=device)
    memory_before, began = peak_memory(device), time.perf_counter()
    model = GPT(config).to(device)
    optimizers = configure_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay)
    autocast, bf16 = train.set_up(model, args, device)
    step = partial(train.train_step, model, optimizers, x, y, args, autocast)
    time_of(step, device)
    start = time.perf_counter() - began
    count = max(5, min(50, int(10 / time_of(step, device))))
    times = [time_of(step, device) for _ in range(count)]
    memory_used = peak_memory(device) - memory_before

    plain = GPT(config).to(device).eval()  # decoding: not compiled, half of the context as a prompt
    if bf16:
        plain.bfloat16()
    count = min(128, args.block_size // 2)
    tokens = generate(plain, x[:1, :args.block_size // 2], count)
    next(tokens)  # reads the prompt
    decoding = [time_of(partial(next, tokens), device) for _ in range(count - 1)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{device.type}, {torch.get_num_threads()} threads")
    print(json.dumps({"params": sum(p.numel() for p in model.parameters()), "start": start,
                      "flops": flops_per_token(config), "step": np.median(times),
                      "memory": memory_used, "tokens": x.numel(), "decode": 1 / np.median(decoding),
                      "peak": train.peak_flops(device) if bf16 else None,
                      "device": f"{name}, {'bf16' if bf16 else 'float32'}"}))


def time_of(work, device):
    """How long work() takes on the device."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def peak_memory(device):
    """The most bytes that were in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- loops: what each loop brings ----

@torch.no_grad()
def loops(flags):
    """Print what a checkpoint predicts after each loop, and in passes of 1 to 2N loops.

    They differ: the readings `mean` and `scaled` divide by the loops of the pass.
    """
    parser = Parser(loops.__doc__)
    parser.prog = "bench.py loops"
    parser.add_argument("--out_dir", default="out", help="where train.py left its ckpt.pt")
    parser.add_argument("--data_dir", default="data", help="what prepare.py wrote")
    parser.add_argument("--windows", type=positive, default=64, help="contexts to read")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps")
    args = parser.parse_args(flags)
    device = pick_device(args.device)
    model, state = load_checkpoint(Path(args.out_dir) / "ckpt.pt", device)
    _, data, meta = load_data(args.data_dir)
    c = model.eval().config
    if meta["vocab_size"] != c.vocab_size or len(data) <= c.block_size:
        sys.exit(f"{args.data_dir} is not what the model was trained on: give its --data_dir")
    after_each, passes = 0, 0
    starts = np.linspace(0, len(data) - 1 - c.block_size, args.windows).astype(int)
    starts -= starts % state["args"]["stride"]
    for start in starts:
        x, y = train.windows(data, [start], c.block_size, c.vocab_size)
        x, y = x.to(device), y.to(device)
        after_each = after_each + per_loop(model, x, y) / args.windows
        losses = [model(x, y, n_loop=n)[1] for n in range(1, 2 * c.n_loop + 1)]
        passes = passes + torch.stack(losses).cpu() / args.windows
    print(f"h[{c.loop_start}:{c.loop_end}] x {c.n_loop} ({c.residual}), {args.windows} windows of "
          f"{c.block_size} tokens\n{'loop':>4} {'val loss':>8} {'KL':>7} {'as final':>8}")
    for n, (loss, kl, same) in enumerate(after_each.tolist(), start=1):
        print(f"{n:4} {loss:8.4f} {kl:7.4f} {same:8.1%}")
    print(f"passes of 1 to {2 * c.n_loop} loops: {' '.join(f'{x:.4f}' for x in passes.tolist())}")
    if meta["dataset"] == "hops":
        x, y = train.windows(data, starts, c.block_size, c.vocab_size)
        print_answers(model, x.to(device), y.to(device))


def per_loop(model, x, y):
    """After each loop of a pass over x (1, T) with the targets y (1, T): (N, 3).

    The loss, KL(p(N) || p(n)) in nats, and the share of best guesses that are those of loop N.
    """
    readouts = [model.readout(state, y) for state in model.states(x)]
    losses = torch.stack([loss for _, loss in readouts])                        # (N,)
    log_p = torch.stack([logits[0] for logits, _ in readouts]).log_softmax(-1)  # (N, T, V)
    last = log_p[-1:].expand_as(log_p)
    kl = F.kl_div(log_p, last, reduction="none", log_target=True).sum(-1).mean(-1)
    same = (log_p.argmax(-1) == last.argmax(-1)).float().mean(-1)
    return torch.stack((losses, kl, same), dim=1).cpu()


def print_answers(model, x, y):
    """Print, after each loop, the share of right answers to questions of 1 to 6 hops.

    x and y (B, 58) are documents of prepare.make_hops and their targets. A question is the number
    of hops, the first letter, and the answer.
    """
    hops = x.roll(1, dims=1) - ord("0")                         # (B, T), where x is first letters
    print(f"right answers to {16 * len(x)} questions of 1 to 6 hops, after each loop:")
    for n, state in enumerate(model.states(x), start=1):
        right = model.readout(state, y)[0].argmax(-1) == y      # (B, T)
        shares = [right[hops == number].float().mean() for number in range(1, 7)]
        print(f"{n:4} " + " ".join(f"{share:6.1%}" for share in shares))


# ---- compare: models trained side by side ----

PAPER = {"12 x 1": 3.12, "6 x 6": 3.11, "1 x 1": 3.98, "1 x 2": 3.67}  # losses, arXiv 2409.14199
SCALES = {  # what all runs share; tiny is for a CPU, small for one GPU, paper is the paper's
    "tiny": ["--n_embd=32", "--n_head=2", "--block_size=128", "--batch_size=8", "--max_steps=1000",
             "--learning_rate=16e-3", "--eval_interval=10000"],
    "small": ["--preset=gpt2-124m", "--batch_size=32", "--gradient_accumulation_steps=1",
              "--max_steps=1200", "--warmup_steps=120", "--eval_iters=20"],
    "paper": ["--preset=gpt2-124m"],
}
BUDGETS = 5  # of compute, each 2.5 times the last; the first is one pass of max_steps


def layout(n_layer, n_loop):
    return [f"--n_layer={n_layer}", f"--n_loop={n_loop}"]


def training_flops(flags, vocab_size):
    """The FLOPs of a whole training."""
    args = train.get_args(flags)
    tokens = args.batch_size * args.gradient_accumulation_steps * args.block_size * args.max_steps
    return flops_per_token(train.get_config(args, vocab_size), train.mean_n_loop(args)) * tokens


def equal_compute(flags, budget, vocab_size):
    """The flags, with as many steps as cost `budget` FLOPs.

    The best rate falls with the steps: the first guess goes as 1 / sqrt(steps), in factors of two.
    """
    args = train.get_args(flags)
    steps = round(args.max_steps * budget / training_flops(flags, vocab_size))
    halvings = round(math.log2(steps / args.max_steps) / 2)
    rate = args.learning_rate / 2 ** halvings
    return [*flags, f"--max_steps={steps}", f"--learning_rate={rate:g}"]


def models_of(what, scale, shared, vocab_size):
    """{label: flags of train.py} of a comparison."""
    if what == "loops":
        return {f"1 x {n}": [*shared, *layout(1, n)] for n in (1, 2, 3, 4, 6, 8)}
    models = {}
    if what == "compute":
        least = training_flops([*shared, *layout(1, 1)], vocab_size)
        for budget in (least * 2.5 ** k for k in range(BUDGETS)):
            for n in (1, 2, 4, 6):
                flags = equal_compute([*shared, *layout(1, n)], budget, vocab_size)
                models[f"1 x {n}, {budget:.1e} FLOPs"] = flags
    if what == "readings":
        for optimizer in OPTIMIZERS:
            for residual in RESIDUALS:
                flags = [f"--optimizer={optimizer}", f"--residual={residual}"]
                models[f"{residual}, {optimizer}"] = [*shared, *layout(1, 6), *flags]
            models[f"one pass, {optimizer}"] = [*shared, *layout(1, 1), f"--optimizer={optimizer}"]
    if what == "paper":
        for plain, n_layer, n_loop in ((4, 2, 3) if scale == "tiny" else (12, 6, 6), (1, 1, 2)):
            one_pass, looped = [*shared, *layout(plain, 1)], [*shared, *layout(n_layer, n_loop)]
            models[f"{plain} x 1"] = one_pass
            models[f"{n_layer} x {n_loop}"] = looped
            # the controls: as deep without sharing, and one pass with the compute of the loops
            models[f"{n_layer * n_loop} x 1, unshared"] = [*shared, *layout(n_layer * n_loop, 1)]
            label = f"{plain} x 1, compute of {n_layer} x {n_loop}"
            budget = training_flops(looped, vocab_size)
            models[label] = equal_compute(one_pass, budget, vocab_size)
    return models


def train_run(label, flags, data_sha256, rate, seed):
    """Return the last line of train.py with these flags, as a dict; None if it diverged."""
    flags = [*flags, f"--learning_rate={rate:g}", f"--seed={seed}"]
    args = train.get_args(flags)
    key = hashlib.sha256(json.dumps([vars(args), data_sha256]).encode()).hexdigest()[:12]
    folder = Path("out-compare") / f"{args.n_layer}x{args.n_loop}-{key}"
    path = folder / "result.json"
    if not path.exists():
        gpus = torch.cuda.device_count() if pick_device(args.device).type == "cuda" else 0
        resumed = (folder / "ckpt.pt").exists()
        result = run_train_py(["--resume"] if resumed else flags, folder, gpus)
        write_json(path, result)
        for checkpoint in folder.glob("*.pt"):
            checkpoint.unlink()  # large, and no longer needed
    result = json.loads(path.read_text())
    outcome = f"{result['val_loss']:.4f}" if result else "diverged"
    print(f"{label:<30} rate {rate:g}, seed {seed}: {outcome}", flush=True)
    return result


def run_train_py(flags, folder, gpus):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    script = str(Path(__file__).with_name("train.py"))
    command = [sys.executable, *(launch if gpus > 1 else []), script, *flags, f"--out_dir={folder}"]
    env = os.environ if gpus else os.environ | {"OMP_NUM_THREADS": "1"}  # a core for each run
    done = subprocess.run(command, text=True, capture_output=True, env=env)
    if "smaller --learning_rate" in done.stderr:  # train.check_finite's message
        return None
    if done.returncode:
        sys.exit(f"the run in {folder} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def study(data_sha256, seeds, sweep, model):
    """Find the learning rate of one model (label, flags), then train all seeds. Return its row.

    The spread is half the distance of the best and the worst seed.
    """
    label, flags = model
    train_at = partial(train_run, label, flags, data_sha256)
    best = train.get_args(flags).learning_rate
    trials = {}  # {rate: loss at seed 0}
    while sweep and len(trials) < 12:  # a limit, if all diverge
        untried = [rate for rate in (best, best / 2, best * 2) if rate not in trials]
        if not untried:
            break
        for rate in untried:
            result = train_at(rate, 0)
            trials[rate] = result["val_loss"] if result else math.inf
        best = min(trials, key=lambda rate: (trials[rate], rate))  # the lowest if all diverged
    runs = [train_at(best, seed) for seed in range(seeds)]
    losses = [result["val_loss"] for result in runs if result]
    return {"learning_rate": best, "runs": runs,
            "mean": sum(losses) / len(losses) if losses else None,
            "spread": (max(losses) - min(losses)) / 2 if losses else None,
            "trials": {f"{rate:g}": loss if math.isfinite(loss) else None
                       for rate, loss in sorted(trials.items())}}


def compare(flags):
    parser = Parser(__doc__)
    parser.prog = "bench.py compare"
    add = parser.add_argument
    add("--what", choices=("paper", "loops", "compute", "readings"), default="paper",
        help="the paper's pairs, loops at equal tokens or compute, readings of the equation")
    add("--scale", choices=SCALES, default="tiny", help="the size of the models")
    add("--seeds", type=positive, default=3, help="how many")
    add("--sweep", action="store_true", help="try learning rates for each model")
    add("--title", help="of the picture")
    args, extra = parser.parse_known_args(flags)
    shared = [*SCALES[args.scale], *extra]
    base = train.get_args(shared)
    _, _, meta = load_data(base.data_dir)
    if args.scale != "tiny" and meta["tokenizer"] != "gpt2":
        sys.exit(f"--scale={args.scale} is for GPT-2's tokens: python prepare.py --tokenizer=gpt2")
    models = models_of(args.what, args.scale, shared, meta["vocab_size"])
    device = pick_device(base.device)
    workers = os.cpu_count() if device.type == "cpu" else 1
    work = partial(study, meta["train"]["sha256"], args.seeds, args.sweep)
    with ThreadPoolExecutor(workers) as pool:
        rows = dict(zip(models, pool.map(work, models.items()), strict=True))

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{workers} CPU cores"
    tokens = f"{meta['train']['tokens']:,} {meta['tokenizer']} tokens"
    head = (f"{meta['dataset']}, {tokens}; {base.n_embd} wide; seeds 0 to {args.seeds - 1}; "
            f"{machine}, torch {torch.__version__}")
    name = "-".join([args.scale, args.what, *(flag.lstrip("-") for flag in extra)])
    path = Path("results") / f"{name.replace('/', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"setting": head, "command": ["bench.py", "compare", *flags], "data": meta,
                      "models": rows})
    print_table(head, rows, args)
    print(f"written: {path}")
    plot(args.what, rows, args.title or head, path.with_suffix(".png"))


def print_table(head, rows, args):
    print(f"\n{head}\n{'model':<26} {'params':>8} {'tokens':>8} {'/param':>6} {'TFLOPs':>9} "
          f"{'minutes':>7} {'rate':>7} {'val loss':>8} {'+-':>6} {'paper':>5}")
    for label, row in rows.items():
        runs = [run for run in row["runs"] if run]
        failed = len(row["runs"]) - len(runs)
        note = f"  {failed} diverged" if failed else ""
        if not runs:
            print(label + note)
            continue
        minutes = sum(run["seconds"] for run in runs) / len(runs) / 60
        params, tokens, flops = (runs[0][name] for name in ("params", "tokens", "flops"))
        paper = PAPER.get(label, "") if args.what == "paper" and args.scale != "tiny" else ""
        print(f"{label:<26} {params / 1e6:7.3f}M {tokens / 1e6:7.2f}M {tokens / params:6.0f} "
              f"{flops / 1e12:9.2f} {minutes:7.1f} {row['learning_rate']:7.2g} "
              f"{row['mean']:8.4f} {row['spread']:6.4f} {paper:>5}{note}")


def plot(what, rows, title, path):
    """Draw the mean of each model, with the spread of its seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no picture {path}: pip install matplotlib")
        return
    rows = {label: row for label, row in rows.items() if row["mean"] is not None}
    means, spreads = ([row[name] for row in rows.values()] for name in ("mean", "spread"))
    runs = [next(run for run in row["runs"] if run) for row in rows.values()]
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    if what == "compute":
        left, right = figure.subplots(1, 2, sharey=True)
        for n in sorted({len(run["loop_losses"]) for run in runs}):
            line = [(run["tokens"] / run["params"], run["flops"], mean, spread)
                    for run, mean, spread in zip(runs, means, spreads, strict=True)
                    if len(run["loop_losses"]) == n]
            tokens, flops, y, yerr = zip(*line, strict=True)
            left.errorbar(tokens, y, yerr, fmt="o-", capsize=3, label=f"n_loop = {n}")
            right.errorbar(flops, y, yerr, fmt="o-", capsize=3, label=f"n_loop = {n}")
        left.set(xscale="log", xlabel="tokens a parameter", ylabel="validation loss, nats")
        right.set(xscale="log", xlabel="FLOPs of training")
        right.tick_params(which="minor", labelbottom=False)
        right.legend()
    elif what == "loops":
        axes = figure.subplots()
        n_loops = [len(run["loop_losses"]) for run in runs]
        axes.errorbar(n_loops, means, spreads, fmt="o-", capsize=3)
        axes.set(xlabel="loops", ylabel="validation loss, nats")
    else:
        axes = figure.subplots()
        axes.errorbar(means, list(rows), xerr=spreads, fmt="o", capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel="validation loss, nats")
    for axes in figure.axes:
        axes.grid(alpha=0.4)
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


COMMANDS = {"speed": speed, "measure": measure, "loops": loops, "compare": compare}


def main():
    command, *flags = sys.argv[1:] or ["speed"]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        COMMANDS[command](flags)
    else:
        sys.exit(f"bench.py has no command {command}: it has {', '.join(COMMANDS)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same compare goes on with the runs that are not finished")
