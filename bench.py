"""
What a model costs, and what its loops gain.

    python bench.py speed                           the paper's four models; small ones on a CPU
    python bench.py speed --preset=gpt2-81m-loop    one model, by any flags of train.py
    python bench.py loops --out_dir=out-arrows      what each loop gains on the puzzle

Times are medians. MFU, the model FLOPs utilization, is the share of what a GPU's maker states, or
of what one large matrix product reaches here. memory is the most that a step holds on a GPU. decode
is the speed of writing a text.
"""
import io
import itertools
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train
from model import GPT, flops_per_token, generate, load_checkpoint, pick_device, pick_dtype
from prepare import LETTERS, PUZZLES, TEST_CHAINS, TRAINING_CHAINS
from prepare import follow, make_arrows, make_parser, read_map

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
    print(f"{'':<14} {'params':>8} {'MFLOPs/token':>12} {'ms/step':>8} {'tokens/s':>9} {'MFU':>4} "
          f"{'memory':>8} {'decode':>14}", flush=True)
    for name, model_flags in models.items():
        measure(name, model_flags)


def measure(name, flags):
    """Print one row of the table: batch_size sequences a step, then decoding."""
    args, *_ = train.get_args(flags)
    device = pick_device(args.device)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
    config = train.get_config(args, 257)    # tokens: GPT-2's in its presets, else bytes
    torch.manual_seed(args.seed)
    x, y = torch.randint(config.vocab_size, (2, args.batch_size, args.block_size), device=device)
    model = GPT(config).to(device)
    optimizers = train.configure_optimizers(model, args)
    torch._dynamo.reset()   # each model compiles anew
    autocast, dtype = train.use_machine(model, args, device)
    step = partial(train.train_step, model, optimizers, x, y, args, autocast)
    time_of(step, device)   # compiles
    count = max(5, min(50, int(10 / time_of(step, device))))    # about ten seconds
    step_time = np.median([time_of(step, device) for _ in range(count)])
    memory = f"{torch.cuda.max_memory_allocated() / 1e6:,.0f}MB" if on_cuda else ""
    decode = decoding_speed(GPT(config).to(device, dtype).eval(), x[:1], device)

    params = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(config)
    mfu = x.numel() / step_time * flops / peak_flops(device, dtype)
    print(f"{name:<14} {params / 1e6:7.2f}M {flops / 1e6:12,.1f} {step_time * 1e3:8,.1f} "
          f"{x.numel() / step_time:9,.0f} {mfu:4.0%} {memory:>8} {decode:6,.0f} tokens/s",
          flush=True)


def decoding_speed(model, idx, device):
    """New tokens per second after half a context, of idx (1, T). Nothing is compiled."""
    half = max(1, idx.size(1) // 2)
    count = min(128, half)
    tokens = generate(model, idx[:, :half], count + 1)
    next(tokens)    # reads the prompt
    return 1 / np.median([time_of(partial(next, tokens), device) for _ in range(count)])


def time_of(work, device):
    """How long work() takes on the device, in seconds."""
    module = torch.get_device_module(device)
    module.synchronize()
    began = time.perf_counter()
    work()
    module.synchronize()
    return time.perf_counter() - began


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


# ---- loops: what each loop gains on the puzzle ----

TEST = 1    # the seed of maps that no model has seen
LOOPS = 12  # of a walk: nine steps, and some to settle
STEPS = range(max(TEST_CHAINS))     # to an answer
SCORING = PUZZLES["arrows"]["scoring"]
# a model trained by --preset=arrows
SHIPPED = Path(__file__).parent / "results" / "arrows"
LONGEST = max(TRAINING_CHAINS) - 1  # steps to an answer in training


def loops(flags):
    """Show how a model of the puzzle walks, and how many answers are right after each loop.

    Writes loops.png and walk.gif beside the model, or here if it is the one that comes with us.
    """
    parser = make_parser(loops.__doc__, "bench.py loops")
    add = parser.add_argument
    add("--out_dir", help="the folder with train.py's ckpt.pt; None: out-arrows if it has one, "
        "else the model that comes with this code")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    args = parser.parse_args(flags)
    trained = args.out_dir or Path("out-arrows", "ckpt.pt").exists()
    folder = Path(args.out_dir or "out-arrows") if trained else Path(os.path.relpath(SHIPPED))
    print(f"the model in {folder}" if trained else f"the model that comes with this code, {folder}")
    model, state = load_checkpoint(folder / "ckpt.pt", pick_device(args.device))
    # a document but its EOT and its last answer, which nothing follows
    fits = model.config.block_size >= SCORING["document_length"] - 2
    if state["data"].get("puzzle") != SCORING or not fits:
        sys.exit(f"the model in {folder} was not trained by --preset=arrows: see its loops "
                 f"with python sample.py --show_loops --out_dir={folder}")
    walks = [walk(model.eval(), text) for text in make_arrows(4, TEST_CHAINS, TEST)]
    print(f"map: where a, b, .. t point  question  way         after loop 1, 2, .. {LOOPS}")
    for text, way, said in walks:
        print(f"{text:<28} {way[0]}>        {''.join(way)}  {' '.join(said)}")
    table = right_answers(model, n_loop=20)
    print_answers({f"after loop {n}": row for n, row in enumerate(table, start=1)})
    print(f"loops that --exit_kl=0.01 takes, of {LOOPS}:")
    print(f"{'':<26} {' '.join(f'{n:5.2f}' for n in loops_to_settle(model))}")
    here = folder if trained else Path()
    save_picture(here / "loops.png", draw_answers, table, {})
    save_walk(here / "walk.gif", *walks[0])


@torch.no_grad()
def walk(model, text, n_loop=LOOPS):
    """Ask where the longest way of a map ends. Return the map, the way and the model's answers.

    There is an answer after each loop: a letter each.
    """
    points_to = read_map(text)
    way = max((follow(points_to, letter) for letter in LETTERS), key=len)
    text = text[:len(LETTERS)]
    idx = torch.tensor([[*f"{text}{way[0]}>".encode()]], device=model.wte.weight.device)
    said = [model.logits(state, last=True).argmax() for state in model.states(idx, n_loop)]
    return text, way, [chr(letter) for letter in said]


def questions(count, seed):
    """Questions about new maps: inputs and targets (count, T), steps to answers (count, 16)."""
    texts = list(make_arrows(count, TEST_CHAINS, seed))
    rows = torch.tensor([list(text.encode()) for text in texts])
    x, y = train.inputs_and_targets(rows, torch.device("cpu"), SCORING)
    steps = [[len(follow(read_map(text), letter)) - 1 for letter in text[len(LETTERS)::3]]
             for text in texts]
    return x, y, torch.tensor(steps)


@torch.no_grad()
def right_answers(model, n_loop, seed=TEST):
    """The share of right answers after loop 1 .. n_loop, of 0, 1, .. steps: a row for each loop."""
    x, y, steps = questions(1000, seed)
    guesses = []
    for part in x.to(model.wte.weight.device).split(100):
        logits = [model.logits(state) for state in model.eval().states(part, n_loop)]
        guesses.append(torch.stack(logits).argmax(-1).cpu())
    guesses = torch.cat(guesses, dim=1)             # (n_loop, 1000, T)
    right = (guesses == y)[:, y >= 0]               # (n_loop, 16000): 16 answers a map
    right = right.view(n_loop, *steps.shape)        # (n_loop, 1000, 16), in the order of steps
    return [[one[steps == number].float().mean().item() for number in STEPS] for one in right]


def loops_to_settle(model, exit_kl=0.01, n_loop=LOOPS):
    """The mean number of loops that sample.py --exit_kl takes for answers of 0, 1, .. steps."""
    taken = [[] for _ in STEPS]
    for text in make_arrows(20, TEST_CHAINS, TEST):
        for letter in text[len(LETTERS)::3]:
            idx = torch.tensor([[*f"{text[:len(LETTERS)]}{letter}>".encode()]])
            idx = idx.to(model.wte.weight.device)
            _, n = next(generate(model, idx, 1, n_loop=n_loop, exit_kl=exit_kl))
            taken[len(follow(read_map(text), letter)) - 1].append(n)
    return [np.mean(each) for each in taken]


def print_answers(rows):
    """Print rows of right_answers, {label: row}."""
    print("right answers in %, by the steps from the question to its answer "
          f"(training: 0 to {LONGEST})")
    print(f"{'':<26} {' '.join(f'{steps:5}' for steps in STEPS)}")
    for label, row in rows.items():
        print(f"{label:<26} {' '.join(f'{100 * share:5.1f}' for share in row)}")


def draw_answers(axes, table, others):
    """Draw right_answers after loop 1 .. LOOPS as colours, and the others, {label: row}."""
    rows = {f"after loop {n}": row for n, row in enumerate(table[:LOOPS], start=1)} | others
    shares = 100 * np.array(list(rows.values()))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.figure.colorbar(image, label="right answers in %: a blind guess has 50")
    if others:
        axes.axhline(len(rows) - len(others) - 0.5, color="white", linewidth=8)
    axes.axvline(LONGEST + 0.5, color="red")
    axes.text(LONGEST + 0.4, 0, f"training: 0 to {LONGEST} steps", color="red", ha="right",
              va="center")
    axes.set_xticks(STEPS)
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


def save_walk(path, text, way, said):
    """Write a moving picture of walk's answers, a frame a loop, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
        from PIL import Image   # which matplotlib brings
    except ImportError:
        return print(f"no picture {path}: pip install matplotlib")
    frames = []
    for n in range(len(said) + 1):
        figure, file = Figure(figsize=(8, 2.3)), io.BytesIO()
        draw_walk(figure.add_axes((0, 0, 1, 1)), read_map(text), way, said[:n])
        figure.savefig(file, dpi=100)
        frames.append(Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=32))
    times = [1500] + [600] * (len(said) - 1) + [2500]   # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)
    print(f"written: {path}")


def draw_walk(axes, points_to, way, said):
    """Draw the letters with their arrows as arcs, and what the model has said so far."""
    from matplotlib.patches import Arc
    answers = [way[0], *said]
    taken = {(a, b) for a, b in itertools.pairwise(answers) if points_to[a] == b}
    for a, b in points_to.items():
        x, width = (LETTERS.index(a) + LETTERS.index(b)) / 2, LETTERS.index(b) - LETTERS.index(a)
        color, line = ("tab:blue", 4) if (a, b) in taken else ("lightgrey", 2)
        axes.add_patch(Arc((x, 0.7), width, 1.2 * width ** 0.7, theta2=180, color=color, lw=line))
        if a == b:      # an end
            axes.plot(x, 0, "o", markersize=27, markerfacecolor="none", color="grey")
    axes.plot(LETTERS.index(answers[-1]), 0, "o", markersize=28, color="tab:blue")
    for x, letter in enumerate(LETTERS):
        axes.text(x, -0.05, letter, ha="center", va="center", fontsize=18,
                  color="white" if letter == answers[-1] else "black")
    title = (f"after loop {len(said)} the model says {said[-1]}" if said else
             f"the question: where do the arrows from {way[0]} end?")
    axes.text(len(LETTERS) / 2 - 0.5, 4.2, title, ha="center", fontsize=18)
    axes.set(xlim=(-1, len(LETTERS)), ylim=(-1, 5), aspect="equal")
    axes.axis("off")


def main():
    command, *flags = sys.argv[1:] or ["speed"]
    commands = {"speed": speed, "loops": loops}
    if command in ("-h", "--help"):
        return print(__doc__)
    if command not in commands:
        sys.exit(f"bench.py has no command {command}: it has speed and loops")
    commands[command](flags)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # with | head, end quietly when head does
    main()
