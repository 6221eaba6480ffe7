"""
What a model costs, and what its loops gain.

    python bench.py speed                           the paper's four models; small ones on a CPU
    python bench.py speed --preset=gpt2-81m-loop    one model, by any flags of train.py
    python bench.py loops --out_dir=out-arrows      what each loop gains on the puzzle

speed measures each model in a process of its own, with nothing compiled before. start is the time
until the first step is done, the other times are medians. memory is how much training raises that
process's peak. MFU, the model FLOPs utilization, is the share of what a GPU's maker states, or of
what one large matrix product reaches here. decode is in tokens per second.
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

import train
from model import GPT, KVCache, flops_per_token, generate, load_checkpoint, next_logits
from model import pick_device, pick_dtype
from prepare import LETTERS, TEST_CHAINS, follow, make_arrows, make_parser, read_map

# ---- speed: what a model costs ----

SMALL = "--n_embd=128 --n_head=4 --no-bias --optimizer=adamw"   # the paper's layouts, for a CPU
LAYOUTS = {"12 x 1": "--n_layer=12", "6 x 6": "--n_layer=6 --n_loop=6", "1 x 1": "--n_layer=1",
           "1 x 2": "--n_layer=1 --n_loop=2"}


def speed(flags):
    """Print a table of the model that the flags describe, or of the paper's four models."""
    args, *_ = train.get_args(flags)  # a wrong flag, or --help, ends here
    device = pick_device(args.device)
    if flags:
        models = {str(pick_dtype(args.dtype, device, args.n_embd)): flags}
    elif device.type == "cuda":
        models = {name: [f"--preset={name}"] for name in train.PRESETS if name.startswith("gpt2")}
    else:
        models = {f"{name}, small": f"{SMALL} {layout}".split() for name, layout in LAYOUTS.items()}
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{device_name(device)}{threads}, torch {torch.__version__}\n"
          "MFU: the share of what a GPU's maker states, else of what one large product reaches")
    print(f"{'':<14} {'params':>8} {'MFLOPs/token':>12} {'start':>6} {'ms/step':>8} "
          f"{'tokens/s':>9} {'MFU':>4} {'memory':>8} {'decode':>8}", flush=True)
    for name, model_flags in models.items():
        with tempfile.TemporaryDirectory() as empty:  # nothing compiled before
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty}
            command = [sys.executable, __file__, "measure", name, *model_flags]
            if subprocess.run(command, env=env).returncode:
                sys.exit(f"{name} could not be measured, see above")


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
    autocast, dtype = train.use_machine(model, args, device)
    step = partial(train.train_step, model, optimizers, x, y, args, autocast)
    time_of(step, device)
    start = time.perf_counter() - began
    count = max(5, min(50, int(10 / time_of(step, device))))    # about ten seconds
    step_time = np.median([time_of(step, device) for _ in range(count)])
    memory = peak_memory(device) - memory_before

    # decoding: not compiled, half of the context as a prompt
    plain = GPT(config).to(device, dtype).eval()
    count = min(128, args.block_size // 2)
    tokens = generate(plain, x[:1, :args.block_size // 2], count)
    next(tokens)  # reads the prompt
    token_time = np.median([time_of(partial(next, tokens), device) for _ in range(count - 1)])

    params, flops = sum(p.numel() for p in model.parameters()), flops_per_token(config)
    mfu = x.numel() / step_time * flops / peak_flops(device, dtype)
    print(f"{name:<14} {params / 1e6:7.2f}M {flops / 1e6:12,.1f} {start:5.1f}s "
          f"{step_time * 1e3:8,.1f} {x.numel() / step_time:9,.0f} {mfu:4.0%} "
          f"{memory / 1e6:6,.0f}MB {1 / token_time:6,.0f}/s", flush=True)


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


def peak_flops(device, dtype):
    """Operations per second: what a GPU's maker states for bfloat16, else what one product reaches.

    The product is of matrices of 2,048 x 2,048 in the same number format, the best of six.
    """
    peaks = {"H100 80GB HBM3": 989e12, "H200": 989e12, "B200": 2250e12, "A100-SXM4-40GB": 312e12,
             "A100-SXM4-80GB": 312e12, "L40S": 362e12, "L4": 121e12, "GeForce RTX 4090": 165e12}
    stated = peaks.get(device_name(device).removeprefix("NVIDIA "))
    if stated and dtype == torch.bfloat16:
        return stated
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    return 2 * 2048 ** 3 / min(time_of(partial(torch.mm, a, a), device) for _ in range(6))


def device_name(device):
    """The name of a GPU. Of a CPU, the instructions that torch uses: results differ with them."""
    if device.type == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---- loops: what each loop of a checkpoint gains ----

TEST, VALIDATION = 1, 2     # seeds of maps: TEST is reported, study.py chooses by VALIDATION


def loops(flags):
    """Print how a model of the puzzle walks, and how many answers are right after each loop."""
    parser = make_parser(loops.__doc__, "bench.py loops")
    add = parser.add_argument
    add("--out_dir", default="out-arrows", help="the folder with train.py's ckpt.pt")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    args = parser.parse_args(flags)
    model, state = load_checkpoint(Path(args.out_dir) / "ckpt.pt", pick_device(args.device))
    if (state["data"]["dataset"] != "arrows" or not state["args"]["hide_answers"]
            or model.config.block_size < 67):
        sys.exit(f"the model in {args.out_dir} was not trained by --preset=arrows: see its loops "
                 f"with python sample.py --show_loops --out_dir={args.out_dir}")
    print_walks(model.eval())
    table = right_answers(model, n_loop=20)
    print_answers({f"after loop {n}": row for n, row in enumerate(table, start=1)})
    print("loops that --exit_kl=0.01 takes, of 12:")
    print(f"{'':<26} {' '.join(f'{n:5.2f}' for n in loops_to_settle(model))}")
    save_picture(Path(args.out_dir) / "loops.png", draw_answers, table, {})


@torch.no_grad()
def print_walks(model, count=4, n_loop=12):
    """Print what the model answers after each loop to questions of 9 steps, and the right way."""
    print(f"{'map: where a, b, .. t point':<28} question  way         after loop 1, 2, .. {n_loop}")
    for text in make_arrows(count, TEST_CHAINS, TEST):
        way = max((follow(read_map(text), letter) for letter in LETTERS), key=len)
        idx = torch.tensor([list(f"{text[:20]}{way[0]}>".encode())]).to(model.wte.weight.device)
        said = [model.logits(state, last=True).argmax() for state in model.states(idx, n_loop)]
        print(f"{text[:20]:<28} {way[0]}>        {''.join(way)}  {' '.join(map(chr, said))}")


def questions(count, seed):
    """Questions about new maps: inputs and targets (count, 67), steps to answers (count, 16)."""
    texts = list(make_arrows(count, TEST_CHAINS, seed))
    rows = torch.tensor([list(text.encode()) for text in texts])
    x, y = train.inputs_and_targets(rows, torch.device("cpu"), ord(">"), hide=True)
    steps = [[len(follow(read_map(text), letter)) - 1 for letter in text[20::3]] for text in texts]
    return x, y, torch.tensor(steps)


@torch.no_grad()
def right_answers(model, n_loop, seed=TEST):
    """The share of right answers after loop 1 .. n_loop, of 0 .. 9 steps: (n_loop, 10)."""
    x, y, steps = questions(1000, seed)
    guesses = []
    for part in x.to(model.wte.weight.device).split(100):
        logits = [model.logits(state) for state in model.eval().states(part, n_loop)]
        guesses.append(torch.stack(logits).argmax(-1).cpu())
    guesses = torch.cat(guesses, dim=1)             # (n_loop, 1000, 67)
    right = (guesses == y)[:, y >= 0].view(n_loop, *steps.shape)
    return [[one[steps == number].float().mean().item() for number in range(10)] for one in right]


@torch.no_grad()
def loops_to_settle(model, exit_kl=0.01, n_loop=12):
    """The mean number of loops that sample.py's early exit takes for answers of 0 .. 9 steps."""
    x, _, steps = questions(50, TEST)
    taken = []
    for document in x.to(model.wte.weight.device):
        cache = KVCache(len(document))
        for idx in (document[:20], *document[20:].split(1)):    # the map, then token by token
            _, n = next_logits(model, idx[None], n_loop, cache, exit_kl)
            cache.length += len(idx)
            taken.append(n)
    taken = torch.tensor(taken).view(len(x), -1)[:, 2::3].double()      # at a letter's >
    return [taken[steps == number].mean().item() for number in range(10)]


def print_answers(rows):
    """Print rows of right_answers, {label: row (10,)}."""
    print("right answers in %, by the steps from the question to its answer (training: 0 to 4)")
    print(f"{'':<26} {' '.join(f'{steps:5}' for steps in range(10))}")
    for label, row in rows.items():
        print(f"{label:<26} {' '.join(f'{100 * share:5.1f}' for share in row)}")


def draw_answers(axes, table, others):
    """Draw right_answers after loop 1 .. 12 as colours, and the others, {label: row (10,)}."""
    rows = {f"after loop {n}": row for n, row in enumerate(table[:12], start=1)} | others
    shares = 100 * np.array(list(rows.values()))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.figure.colorbar(image, label="right answers in %: a blind guess has 50")
    if others:
        axes.axhline(len(rows) - len(others) - 0.5, color="white", linewidth=8)
    axes.axvline(4.5, color="red")
    axes.text(4.4, 0, "training: 0 to 4 steps", color="red", ha="right", va="center")
    axes.set_xticks(range(10))
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="steps from the question to its answer", title="right answers after each loop")


def save_picture(path, draw, *args):
    """Write the picture that draw(axes, *args) draws, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"no picture {path}: pip install matplotlib")
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw(figure.subplots(), *args)
    figure.savefig(path, dpi=100)
    print(f"written: {path}")


def main():
    command, *flags = sys.argv[1:] or ["speed"]
    commands = {"speed": speed, "measure": measure, "loops": loops}
    if command in ("-h", "--help"):
        return print(__doc__)
    if command not in commands:
        sys.exit(f"bench.py has no command {command}: it has speed and loops")
    commands[command](flags)


if __name__ == "__main__":
    main()
