"""
What a model costs, and what its loops gain.

    python bench.py speed                           the paper's four models; small ones on a CPU
    python bench.py speed --preset=gpt2-81m-loop    one model, by any flags of train.py
    python bench.py loops --out_dir=out-arrows      what each loop gains on the puzzle

speed measures each model in a process of its own, with nothing compiled before. start is the time
until the first step is done, the other times are medians. memory is what training adds. MFU, the
model FLOPs utilization, is the share of the peak that the device's maker states. decode is in
tokens per second.
"""
import math
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None   # the tables need no matplotlib, the pictures do

import train
from model import GPT, KVCache, flops_per_token, generate, load_checkpoint, next_logits, pick_device
from prepare import make_arrows, make_parser

# ---- speed: what a model costs ----

SMALL = "--n_embd=128 --n_head=4 --no-bias --optimizer=adamw"   # the paper's layouts, for a CPU
LAYOUTS = {"12 x 1": "--n_layer=12", "6 x 6": "--n_layer=6 --n_loop=6", "1 x 1": "--n_layer=1",
           "1 x 2": "--n_layer=1 --n_loop=2"}


def speed(flags):
    """Print a table of the model that the flags describe, or of the paper's four models."""
    args, *_ = train.get_args(flags)  # a wrong flag, or --help, ends here
    device = pick_device(args.device)
    if flags:
        models = {"these flags": flags}
    elif device.type == "cuda":
        models = {name: [f"--preset={name}"] for name in train.PRESETS if name.startswith("gpt2")}
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
    args, *_ = train.get_args(flags)
    device = pick_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = train.get_config(args, 257)    # tokens: GPT-2's in its presets, else bytes
    torch.manual_seed(args.seed)
    x, y = torch.randint(config.vocab_size, (2, args.batch_size, args.block_size), device=device)
    memory_before, began = peak_memory(device), time.perf_counter()
    model = GPT(config).to(device)
    optimizers = train.configure_optimizers(model, args)
    autocast, bf16 = train.use_machine(model, args, device)
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

BLIND = [1 / 4] * 5 + [1 / 2] * 5   # right answers of a guess that names one of the 4 or 2 ends


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


def questions(x):
    """(where, answers): in documents x (B, 68), a > at 21, 24, .. and after it the answer."""
    return slice(21, None, 3), x[:, 22::3]


@torch.no_grad()
def right_answers(model, n_loop):
    """The share of right answers after loop 1 .. n_loop to questions of 0 .. 9 steps: (n_loop, 10).

    0 to 4 steps are of 4 chains. 5 to 9, which training never has, are of 2 chains.
    """
    table = np.zeros((n_loop, 10))
    for chains, columns in ((4, range(5)), (2, range(5, 10))):
        x, right = puzzles(chains), []
        for part in x.to(model.wte.weight.device).split(100):
            where, answers = questions(part)
            guesses = [model.logits(state)[:, where].argmax(-1)
                       for state in model.eval().states(part, n_loop)]
            right.append(torch.stack(guesses) == answers)
        right = torch.cat(right, dim=1).cpu()       # (n_loop, B, 16)
        for steps in columns:
            table[:, steps] = right[:, steps_to_answer(x) == steps].float().mean(-1)
    return table.tolist()


@torch.no_grad()
def loops_to_settle(model, exit_kl=0.01, count=50):
    """The mean number of loops that sample.py's early exit takes for answers of 0 to 4 steps."""
    x, used = puzzles(4, count), []
    for document in x.to(model.wte.weight.device):
        cache, taken = KVCache(68), []
        for idx in (document[:20], *document[20:67].split(1)):  # the map, then token by token
            _, n = next_logits(model.eval(), idx[None], model.config.n_loop, cache, exit_kl)
            cache.length += len(idx)
            taken.append(n)
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


def save_picture(path, draw, *args):
    """Write the picture that draw(axes, *args) draws, if matplotlib is installed."""
    if Figure is None:
        print(f"no picture {path}: pip install matplotlib")
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw(figure.subplots(), *args)
    figure.savefig(path, dpi=100)
    print(f"written: {path}")


COMMANDS = {"speed": speed, "measure": measure, "loops": loops}


def main():
    command, *flags = sys.argv[1:] or ["speed"]
    if command in ("-h", "--help"):
        print(__doc__)
    elif command in COMMANDS:
        COMMANDS[command](flags)
    else:
        sys.exit(f"bench.py has no command {command}: it has speed and loops")


if __name__ == "__main__":
    main()
