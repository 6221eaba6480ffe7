"""
What a model costs, and what it learns. The project's figures of speed, memory and comparisons come from here.

    python bench.py                                       the paper's four models; on a CPU the same four, small
    python bench.py speed --preset=gpt2-81m-loop          one of them, or any other by train.py's flags
    python bench.py speed --n_layer=36 --n_embd=768 --n_head=12 --checkpoint_loops

    python bench.py compare                               the paper's pairs of models, trained side by side: one table
    python bench.py compare --what=residual               the readings of its equation; --what=loops: 1 to 8 loops
    python bench.py compare --sweep                       find each model's learning rate first

speed. Each model is measured in a process of its own and with nothing compiled before: the cold start ends with the
first step (Python's imports apart), the other times are medians of the steps after it. Memory is what training
adds to the imports. MFU is the share of the peak that the GPU's maker states or, where no such figure is known
here, of what a plain matrix product reaches on the spot. The last column sets the time of a step beside the
first row's; the paper reports 150, 177 and 1377 ms, that is 1, 1.18 and 9.2, for its 45M, 45M-loop and 81M-loop.

compare. All models of a table see the same data in the same order and are evaluated on the same windows, each with
the learning rate that was best for it at seed 0 (results/SCALE-rates.json has every trial). --scale=tiny is for a CPU,
small for a GPU, paper is the paper's. The runs lie in out-compare/; whatever stops the command, it goes on with them.

What was tried on two CPU cores and left out, with the ratio of speeds that it brought:
  tanh-GELU written as a sigmoid           a training step of a small model, compiled: 1.07x; not compiled it is slower
  compiling the whole model, not parts     the same step: 1.06x; 6 blocks x 6 loops start in 77 s instead of 24 s
  bfloat16                                 the same step: 1.0x, casting eats what the products gain
  weights kept transposed for decoding     1.3x, where products in parts (model.py, linear) bring 2x
  decoding compiled, with fixed shapes     2x for a tiny model, 0.5x at 384 wide, where it reads the whole cache for every token
"""
import argparse
import csv
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
from importlib.util import find_spec
from pathlib import Path

import torch

from model import GPT, GPTConfig, OPTIMIZERS, RESIDUALS, pick_device
from prepare import get_tokenizer, load_data, one_line_errors, run
from train import PRESETS, TrainConfig, peak_flops, prepare_device, read_flags, train_step

# the paper's models in the order of their cost; and the same depths, but of bytes and narrow, for a CPU
ROWS = {name: [f"--preset={name}"] for name in ("gpt2-45m", "gpt2-45m-loop", "gpt2-81m-loop", "gpt2-124m")}
SMALL = ["--n_embd=128", "--n_head=4", "--no-bias", "--residual=sum", "--optimizer=adamw"]
SMALL_ROWS = {f"{n_layer} x {n_loop}, small": [f"--n_layer={n_layer}", f"--n_loop={n_loop}", *SMALL]
              for n_layer, n_loop in ((PRESETS[name]["n_layer"], PRESETS[name]["n_loop"]) for name in ROWS)}


def matmul_flops(device, dtype):
    """Operations per second of a large matrix product, the best of several."""
    n = 2048 if device.type == "cpu" else 8192
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(8):
        best = max(best, 2 * n ** 3 / seconds(lambda: a @ a, device))
    return best


def seconds(work, device):
    """How long work() takes, on whatever device it runs."""
    def wait():
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def median(times):
    return sorted(times)[len(times) // 2]


def measure():
    """All figures of the one model that the flags describe, as a line of JSON."""
    given = read_flags(__doc__)
    config = TrainConfig(**{**PRESETS.get(given.get("preset"), {}), **given})
    device = pick_device(config.device)
    shape = {name: getattr(config, name) for name in GPTConfig.__dataclass_fields__ if hasattr(config, name)}
    vocab_size = GPTConfig.vocab_size if "preset" in given else get_tokenizer("byte").n_vocab

    def memory():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    # training: one micro-batch a step
    torch.manual_seed(config.seed)
    x, y = torch.randint(vocab_size, (2, config.batch_size, config.block_size), device=device)
    imports, began = memory(), time.perf_counter()
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape)).to(device)
    optimizers = model.configure_optimizer(config.optimizer, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    autocast, bf16 = prepare_device(model, config, device)

    def step():
        return seconds(lambda: train_step(model, optimizers, x, y, config, autocast), device)
    step()
    cold = time.perf_counter() - began
    times = [step() for _ in range(3)]
    times = [step() for _ in range(max(5, min(50, int(10 / median(times)))))]
    training = memory() - imports

    # decoding: as many tokens as the context holds after a long prompt
    del optimizers
    model.eval().zero_grad()
    if device.type == "cuda":
        if bf16:
            model.bfloat16()
        if find_spec("triton"):
            model.compile_decoding()
    new = min(128, config.block_size // 2)
    for _ in range(2):  # the first time is for warming up
        stream, decoding = model.stream(x[:1, :config.block_size - new], new), []
        for _ in range(new):
            decoding.append(seconds(lambda: next(stream), device))

    peak = peak_flops(device) if bf16 else None
    flops = model.flops_per_token()
    print(json.dumps({
        "parameters": sum(p.numel() for p in model.parameters()), "depth": config.n_layer + (model.config.loop_end - config.loop_start) * (config.n_loop - 1),
        "flops": flops, "cold": cold, "step": median(times), "tokens": x.numel(), "memory": training,
        "peak": peak or matmul_flops(device, torch.bfloat16 if bf16 else torch.float32), "stated": bool(peak),
        "first": decoding[0], "decode": 1 / median(decoding[1:]), "device": torch.cuda.get_device_name() if device.type == "cuda" else
        f"{device.type}, {torch.get_num_threads()} threads", "dtype": "bfloat16" if bf16 else "float32"}))


def speed():
    """The table of the models that the flags describe, or of the paper's."""
    flags = sys.argv[1:]
    given, first = read_flags(__doc__), None
    if given.keys() - {"device", "dtype", "compile"}:
        rows = {given.get("preset", "these flags"): []}
    else:
        rows = SMALL_ROWS if pick_device(given.get("device", "auto")).type == "cpu" else ROWS
    for name, row_flags in rows.items():
        with tempfile.TemporaryDirectory() as nothing_compiled:
            done = subprocess.run([sys.executable, __file__, "measure", *row_flags, *flags], text=True, capture_output=True,
                                  env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": nothing_compiled, "TRITON_CACHE_DIR": nothing_compiled})
        if done.returncode:
            raise ValueError(f"{name} could not be measured: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}")
        r = json.loads(done.stdout.splitlines()[-1])
        if first is None:
            first = r["step"] / r["tokens"]
            print(f"{r['device']}, {r['dtype']}, {r['tokens']:,} tokens a step; peak {r['peak'] / 1e12:,.2f} TFLOP/s, "
                  f"{'as its maker states' if r['stated'] else 'that of a matrix product here'}")
            print(f"{'model':<15} {'params':>8} {'depth':>5} {'MFLOPs/token':>12} {'start':>7} {'ms/step':>8} {'tokens/s':>10} {'TFLOP/s':>8} "
                  f"{'MFU':>5} {'memory':>8} {'1st token':>9} {'decode':>8} {'step':>6}")
        rate = r["tokens"] / r["step"]
        print(f"{name:<15} {r['parameters'] / 1e6:7.2f}M {r['depth']:5} {r['flops'] / 1e6:12,.1f} {r['cold']:6.1f}s {r['step'] * 1e3:8,.1f} {rate:10,.0f} "
              f"{rate * r['flops'] / 1e12:8.2f} {rate * r['flops'] / r['peak']:5.0%} {r['memory'] / 1e6:6,.0f}MB {r['first'] * 1e3:7,.0f}ms "
              f"{r['decode']:6,.0f}/s {1 / (rate * first):5.2f}x", flush=True)


# ---- compare ----

# What all runs of a scale share, the learning rate around which to look for the best, and the layouts (n_layer, n_loop)
# of its pairs: without loops and with. The tiny scale has the paper's proportions, not its sizes.
NANOGPT = dict(n_head=12, n_embd=768, block_size=1024, bias=False, optimizer="adamw", residual="sum", weight_decay=0.1, grad_clip=1.0)
SCALES = {
    "tiny": (dict(n_embd=64, n_head=2, max_steps=1200, eval_interval=200, log_interval=100), 8e-3, ((4, 1), (2, 3)), ((1, 1), (1, 2))),
    "small": (NANOGPT | dict(batch_size=32, max_steps=1500, warmup_steps=150, eval_interval=250, eval_iters=20, log_interval=50), 6e-4,
              ((12, 1), (6, 6)), ((1, 1), (1, 2))),
    "paper": (dict(preset="gpt2-124m"), 6e-4, ((12, 1), (6, 6)), ((1, 1), (1, 2))),
}
PAPER = {(12, 1): 3.12, (6, 6): 3.11, (1, 1): 3.98, (1, 2): 3.67}  # OpenWebText validation losses, arXiv 2409.14199
PAIRS_OF_PAPER = (((12, 1), (6, 6)), ((1, 1), (1, 2)))


def models_to_compare(what, pairs):
    """{name: (flags, steps as a multiple of everybody's)}."""
    if what == "loops":
        return {f"1 x {n}": (dict(n_layer=1, n_loop=n), 1) for n in (1, 2, 3, 4, 6, 8)}
    if what == "residual":
        rows = {f"{residual}, {optimizer}": (dict(n_layer=1, n_loop=6, residual=residual, optimizer=optimizer), 1)
                for optimizer in OPTIMIZERS for residual in RESIDUALS}
        return rows | {f"one pass, {optimizer}": (dict(n_layer=1, n_loop=1, optimizer=optimizer), 1) for optimizer in OPTIMIZERS}
    rows = {}
    for (plain, once), (n_layer, n_loop) in pairs:
        rows |= {f"{plain} x 1": (dict(n_layer=plain, n_loop=1), 1), f"{n_layer} x {n_loop}": (dict(n_layer=n_layer, n_loop=n_loop), 1)}
        # the controls: as deep without sharing, and one pass with the loop's compute
        rows[f"{n_layer * n_loop} x 1, unshared"] = (dict(n_layer=n_layer * n_loop, n_loop=1), 1)
        rows[f"{plain} x 1, compute of {n_layer} x {n_loop}"] = (dict(n_layer=plain, n_loop=1), (n_layer, n_loop))
    return rows


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def train_run(flags, folder, threads):
    """The result of train.py with these flags, from folder if it is there; a run that was stopped goes on. None if it diverged."""
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    arguments = ["--resume", f"--data_dir={flags['data_dir']}"] if (folder / "ckpt.pt").exists() else [
        f"--{name}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{name}" for name, value in flags.items()]
    gpus = torch.cuda.device_count()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    done = subprocess.run([sys.executable, *launch, str(Path(__file__).with_name("train.py")), *arguments, f"--out_dir={folder}"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    if done.returncode and "smaller --learning_rate" not in done.stderr:
        raise ValueError(f"the run in {folder} stopped: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")
    result = None
    if not done.returncode:
        with open(folder / "log.csv", newline="") as f:
            curve = [(int(row["tokens"]), float(row["val_loss"])) for row in csv.DictReader(f) if row["val_loss"]]
        result = json.loads(done.stdout.splitlines()[-1]) | {"curve": curve}
    write_json(folder / "result.json", result)
    for path in folder.glob("*.pt"):
        path.unlink()  # large, and no longer needed
    return result


def compare():
    parser = one_line_errors(argparse.ArgumentParser(prog="bench.py compare", description=__doc__, allow_abbrev=False,
                                                     formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--what", choices=("paper", "residual", "loops"), default="paper", help="default: %(default)s")
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="try learning rates for each model, and keep the best")
    parser.add_argument("--max_steps", type=int, help="instead of the scale's own")
    parser.add_argument("--data_dir", default="data", help="what prepare.py wrote (default: %(default)s)")
    args = parser.parse_args()
    if args.seeds < 1 or (args.max_steps or 1) < 1:
        parser.error("--seeds and --max_steps must be at least 1")
    *_, meta = load_data(args.data_dir)
    base, middle, *pairs = SCALES[args.scale]
    config = TrainConfig(**{**PRESETS.get(base.get("preset"), {}), **base})
    steps = args.max_steps or config.max_steps
    base = base | {"data_dir": args.data_dir}
    models = models_to_compare(args.what, pairs)
    name = args.scale + ("" if args.what == "paper" else f"-{args.what}")
    results, rates_file = Path("results"), Path("results") / f"{args.scale}-rates.json"
    rates = json.loads(rates_file.read_text()) if rates_file.exists() else {}
    on_cpu = pick_device("auto").type == "cpu"  # there each run gets a core of its own, which is the best use of them
    workers = os.cpu_count() if on_cpu else 1

    def shape(flags):
        c = TrainConfig(**{**PRESETS.get(base.get("preset"), {}), **base, **flags})
        with torch.device("meta"):
            return GPT(GPTConfig(vocab_size=meta["vocab_size"], **{f: getattr(c, f) for f in GPTConfig.__dataclass_fields__ if hasattr(c, f)}))

    def go(label, rate, seed):
        flags, longer = models[label]
        if longer != 1:  # as many steps as make it cost what that layout costs
            longer = shape(dict(n_layer=longer[0], n_loop=longer[1])).flops_per_token() / shape(flags).flops_per_token()
        flags = base | flags | {"learning_rate": rate, "seed": seed, "max_steps": round(steps * longer)}
        key = hashlib.sha256(json.dumps([flags, meta["train"]["sha256"]], sort_keys=True).encode()).hexdigest()[:12]
        began = time.time()
        result = train_run(flags, Path("out-compare") / f"{label.replace(' ', '')}-{rate:g}-{seed}-{key}", 1 if on_cpu else None)
        loss = result["val_loss"] if result else math.inf
        print(f"{label:<32} learning rate {rate:.2g}, seed {seed}: {loss:.4f}{'' if result else ' (diverged)'} ({time.time() - began:.0f} s)", flush=True)
        return result

    def tuned(label):  # the longer runs take the rate of the model that they are
        own = next(other for other in models if models[other][0] == models[label][0])
        trials = rates.get(own, {})
        return own, trials, float(min(trials, key=lambda rate: (trials[rate] is None, trials[rate]))) if trials else middle

    with ThreadPoolExecutor(workers) as pool:
        def parallel(jobs):
            return list(pool.map(lambda job: go(*job), jobs))
        if args.sweep:
            for _ in range(3):  # at a factor of two, and on where the best is at the edge
                jobs = []
                for label in models:
                    own, trials, best = tuned(label)
                    jobs += [(own, rate, 0) for rate in (best / 2, best, 2 * best) if own == label and f"{rate:g}" not in trials]
                for (label, rate, _), result in zip(jobs, parallel(jobs)):
                    rates.setdefault(label, {})[f"{rate:g}"] = result["val_loss"] if result else None
                write_json(rates_file, rates)
        untuned = [label for label in models if not tuned(label)[1]]
        if untuned:
            print(f"no learning rates recorded for {', '.join(untuned)}: taking {middle:g}; --sweep finds better ones")
        jobs = [(label, tuned(label)[2], seed) for seed in range(args.seeds) for label in models]
        runs = {}
        for (label, rate, _), result in zip(jobs, parallel(jobs)):
            runs.setdefault(label, {"learning_rate": rate, "runs": []})["runs"].append(result)

    # the table
    print(f"\n{meta['dataset']}, {meta['train']['tokens']:,} {meta['tokenizer']} tokens; {steps:,} steps of {config.batch_size * config.gradient_accumulation_steps * config.block_size:,} "
          f"tokens; seeds 0 to {args.seeds - 1}; {config.n_embd} wide")
    print(f"{'model':<32} {'params':>8} {'depth':>5} {'MFLOPs/token':>12} {'tokens':>8} {'minutes':>7} {'rate':>7} {'val loss':>8} {'+-':>6} {'bits/byte':>9} {'paper':>5}")
    for label, row in runs.items():
        model, finished = shape(models[label][0]), [run for run in row["runs"] if run]
        c = model.config
        row |= {"params": sum(p.numel() for p in model.parameters()), "depth": c.n_layer * c.n_loop, "flops": model.flops_per_token(),
                "mean": math.nan, "spread": math.nan, "diverged": len(row["runs"]) - len(finished)}
        if finished:
            losses = [run["val_loss"] for run in finished]
            row |= {"mean": sum(losses) / len(losses), "spread": (max(losses) - min(losses)) / 2}
            paper = PAPER.get((c.n_layer, c.n_loop)) if models[label][1] == 1 and args.what == "paper" and args.scale != "tiny" else None
            print(f"{label:<32} {row['params'] / 1e6:7.2f}M {row['depth']:5} {row['flops'] / 1e6:12,.1f} {finished[0]['tokens'] / 1e6:7.1f}M "
                  f"{sum(run['seconds'] for run in finished) / len(finished) / 60:7.1f} {row['learning_rate']:7.2g} {row['mean']:8.4f} {row['spread']:6.4f} "
                  f"{row['mean'] / math.log(2) * meta['val']['tokens'] / meta['val']['bytes']:9.3f} {paper or '':>5}")
    if args.what == "paper":
        for ((a, _), (b, n)), (theirs, loop) in zip(pairs, PAIRS_OF_PAPER):
            print(f"{a} x 1 minus {b} x {n}: {runs[f'{a} x 1']['mean'] - runs[f'{b} x {n}']['mean']:+.4f}; in the paper, "
                  f"{theirs[0]} x 1 minus {loop[0]} x {loop[1]}: {PAPER[theirs] - PAPER[loop]:+.2f}")
    write_json(results / f"{name}.json", {"scale": args.scale, "steps": steps, "data": meta, "torch": torch.__version__,
                                          "device": pick_device("auto").type, "models": runs})
    plot(runs, results / f"{name}.png")


def plot(runs, path):
    """Validation loss against tokens and against compute, a line a model, the mean of its seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"no picture: {path} wants matplotlib (pip install matplotlib)")
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for label, row in runs.items():
        curves = [run["curve"] for run in row["runs"] if run]
        if curves:
            tokens = [t for t, _ in curves[0]][1:]  # without the untrained model
            losses = [sum(curve[i + 1][1] for curve in curves) / len(curves) for i in range(len(tokens))]
            left.plot(tokens, losses, label=label, marker=".")
            right.plot([t * row["flops"] for t in tokens], losses, marker=".")
    left.set(xlabel="tokens", ylabel="validation loss, nats", xscale="log")
    right.set(xlabel="FLOPs of training", xscale="log")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"results in {path.with_suffix('.json')} and {path}")


COMMANDS = {"speed": speed, "compare": compare, "measure": measure}


def main():
    command = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "speed"
    if command not in COMMANDS:
        raise ValueError(f"{command} is none of its commands, which are {', '.join(COMMANDS)}; see python bench.py --help")
    COMMANDS[command]()


if __name__ == "__main__":
    run(main)
