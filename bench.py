"""
What a model costs, what it learns, and what its loops bring. The project's figures of speed, memory and loss come from here.

    python bench.py                                       the paper's four models; on a CPU the same four, small
    python bench.py speed --preset=gpt2-81m-loop          one of them, or any other by train.py's flags
    python bench.py speed --n_layer=36 --n_embd=768 --n_head=12 --checkpoint_loops
    python bench.py loops                                 what each loop of out/ckpt.pt brings, and longer thinking
    python bench.py loops --exit --plot=exit.png          what leaving the loop early costs and saves
    python bench.py compare                               the paper's pairs of models, trained side by side: one table
    python bench.py compare --what=residual               the readings of its equation; --what=loops: 1 to 8 loops
    python bench.py compare --sweep                       find each model's learning rate first
    python bench.py compare --scale=small --batch_size=8  any flag of train.py, for all of its runs

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
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, KVCache, OPTIMIZERS, RESIDUALS, load_checkpoint, pick_device
from prepare import get_tokenizer, load_data, one_line_errors, run
from sample import positive, pyplot
from train import PRESETS, RECIPE, TrainConfig, peak_flops, prepare_device, read_flags, train_step, windows

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


# ---- what the loops bring ----

THRESHOLDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of --exit_kl, in nats


def per_loop(model, x, y, n_loop, final):
    """Of each loop of a pass over x (B, T), targets y (B, T), (n_loop, 5): loss and KL(final || p(n)) in nats, norm of the state and of
    its update, share of top choices that are those of final (B * T, V), log-probabilities."""
    rows, inputs = [], []
    hook = model.h[model.config.loop_start].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))  # x(n-1)
    for state in model.states(x, n_loop):
        logits, loss = model.readout(state, y)
        p = logits.flatten(0, 1).log_softmax(-1)
        rows.append(torch.stack((loss, F.kl_div(p, final, reduction="batchmean", log_target=True), state.norm(dim=-1).mean(),
                                 (state - inputs[-1]).norm(dim=-1).mean(), (p.argmax(-1) == final.argmax(-1)).float().mean())))
    hook.remove()
    return torch.stack(rows).cpu()


def leaving_early(model, x, y, exit_kl):
    """(loss, mean loops a token) over windows x (B, T) read token by token, each by the rule of GPT.settle but the first, a prompt."""
    cache, losses, loops = KVCache(x.size(1), x.device), [], []
    for t in range(x.size(1)):
        if t == 0:
            logits, took = model(x[:, :1], cache=cache)[0], torch.full_like(x[:, 0], model.config.n_loop)
        else:
            logits, took = model.settle(x[:, t:t + 1], cache, exit_kl)
        cache.advance(1)
        losses.append(F.cross_entropy(logits[:, 0], y[:, t]))
        loops.append(took.float().mean())
    return torch.stack((torch.stack(losses).mean(), torch.stack(loops).mean())).cpu()


@torch.no_grad()
def loops():
    """What each loop brings; with --exit, what it brings to leave the loop early."""
    parser = one_line_errors(argparse.ArgumentParser("bench.py loops", description=loops.__doc__, allow_abbrev=False))
    parser.add_argument("--checkpoint", default="out/ckpt.pt", help="a model of train.py (default: %(default)s)")
    parser.add_argument("--data_dir", default="data", help="what prepare.py wrote (default: %(default)s)")
    parser.add_argument("--windows", type=positive, default=64, help="contexts to read, spread over the validation split (default: %(default)s)")
    parser.add_argument("--exit", action="store_true", help="compare tokens that leave early with all tokens looping as often as those do on average")
    parser.add_argument("--plot", metavar="FILE.png", help="draw that comparison")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default: %(default)s)")
    args = parser.parse_args()
    if args.plot and not args.exit:
        parser.error("--plot draws what --exit measures; give both")
    plt, device = pyplot() if args.plot else None, pick_device(args.device)
    model, _ = load_checkpoint(args.checkpoint, device)
    _, data, meta = load_data(args.data_dir)
    c, N, T = model.eval().config, model.config.n_loop, model.config.block_size
    if meta["vocab_size"] != c.vocab_size or len(data) <= T:
        raise ValueError(f"{args.data_dir} has {len(data)} tokens of {meta['vocab_size']} to validate with, the model sees {T} of {c.vocab_size}; "
                         "give the --data_dir that it was trained on")
    x, y = windows(data, np.linspace(0, len(data) - 1 - T, args.windows).astype(int), T)
    size = max(1, 2 ** 22 // (T * c.vocab_size))  # windows at once, by what their logits need

    def mean(work):
        return sum(work(part.to(device), targets.to(device)) * (len(part) / args.windows) for part, targets in zip(x.split(size), y.split(size)))

    print(f"h[{c.loop_start}:{c.loop_end}] x {N} ({c.residual}), {args.windows} windows of {T} tokens")
    if args.exit:
        fixed = [mean(lambda x, y: model(x, y, n)[1]).item() for n in range(1, N + 1)]
        print("loops of all tokens, val loss: " + ", ".join(f"{n} {loss:.4f}" for n, loss in enumerate(fixed, start=1)))
        print(f"{'exit_kl':>7} {'loops a token':>13} {'val loss':>8} {'of that many':>12} {'gain':>7}")
        curve = []
        for exit_kl in THRESHOLDS:
            loss, took = mean(lambda x, y: leaving_early(model, x, y, exit_kl)).tolist()
            curve.append((took, loss))
            line = np.interp(took, range(1, N + 1), fixed)
            print(f"{exit_kl:7} {took:13.2f} {loss:8.4f} {line:12.4f} {line - loss:+7.4f}", flush=True)
        if plt:
            figure, axes = plt.subplots(layout="constrained")
            axes.plot(range(1, N + 1), fixed, "o-", label="all tokens loop as often")
            axes.plot(*zip(*curve), "s-", label="each until it has settled (--exit_kl)")
            axes.set(xlabel="mean loops a token", ylabel="validation loss, nats")
            axes.legend()
            figure.savefig(args.plot, dpi=120)
        return

    def table(title, rows):
        print(f"{title}\n{'loop':>4} {'val loss':>8} {'bits/byte':>9} {'KL':>7} {'|x|':>8} {'|update|':>8} {'as final':>8}")
        for n, (loss, kl, norm, update, same) in enumerate(rows.tolist(), start=1):
            print(f"{n:4} {loss:8.4f} {loss / math.log(2) * meta['val']['tokens'] / meta['val']['bytes']:9.3f} {kl:7.4f} {norm:8.2f} {update:8.2f} {same:8.1%}")

    def final(x):
        return model(x, x)[0].flatten(0, 1).log_softmax(-1)
    if c.residual in ("mean", "scaled"):  # a loop depends on how many there are
        table(f"a pass of {N} loops, after each:", mean(lambda x, y: per_loop(model, x, y, N, final(x))))
        rows = mean(lambda x, y: torch.stack([per_loop(model, x, y, n, final(x))[-1] for n in range(1, 2 * N + 1)]))
    else:
        rows = mean(lambda x, y: per_loop(model, x, y, 2 * N, final(x)))
    table(f"passes of 1 to {2 * N} loops, at their end; final is still what {N} say:", rows)


# ---- compare ----

PAPER = {(12, 1): 3.12, (6, 6): 3.11, (1, 1): 3.98, (1, 2): 3.67}  # OpenWebText validation losses, arXiv 2409.14199
PAIRS_OF_PAPER = (((12, 1), (6, 6)), ((1, 1), (1, 2)))  # layouts (n_layer, n_loop), without loops and with
# What all runs of a scale share, the learning rate around which to look for the best, and its pairs. The
# tiny scale has the paper's proportions, not its sizes.
NANOGPT = {name: RECIPE[name] for name in ("n_head", "n_embd", "block_size", "bias", "optimizer", "residual", "weight_decay", "grad_clip")}
SCALES = {
    "tiny": (dict(n_embd=64, n_head=2, max_steps=1200, eval_interval=200, log_interval=100), 8e-3, ((4, 1), (2, 3)), ((1, 1), (1, 2))),
    "small": (NANOGPT | dict(batch_size=32, max_steps=1200, warmup_steps=120, eval_interval=200, eval_iters=20, log_interval=40), RECIPE["learning_rate"],
              *PAIRS_OF_PAPER),
    "paper": (dict(preset="gpt2-124m"), RECIPE["learning_rate"], *PAIRS_OF_PAPER),
}


def models_to_compare(what, pairs):
    """{name: (flags, steps as a multiple of everybody's)}."""
    if what == "loops":
        return {f"1 x {n}": (dict(n_layer=1, n_loop=n), 1) for n in (1, 2, 3, 4, 6, 8)}
    if what == "residual":
        rows = {f"{residual}, {optimizer}": (dict(n_layer=1, n_loop=6, residual=residual, optimizer=optimizer), 1)
                for optimizer in OPTIMIZERS for residual in RESIDUALS}
        return rows | {f"one pass, {optimizer}": (dict(n_layer=1, n_loop=1, optimizer=optimizer), 1) for optimizer in OPTIMIZERS}
    rows = {}
    for (plain, _), (n_layer, n_loop) in pairs:
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
    """The result of train.py with these flags, from folder if it is there; a run that was stopped goes on. None if it diverged.

    It gets that many threads, or all GPUs if threads is None. Its output goes into a pipe: should we be killed, it ends with
    the next line it writes, and before it saves anything beside a successor of ours.
    """
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    arguments = ["--resume", f"--data_dir={flags['data_dir']}"] if (folder / "ckpt.pt").exists() else [
        f"--{name}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{name}" for name, value in flags.items()]
    gpus = 0 if threads else torch.cuda.device_count()
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
    args, sys.argv[1:] = parser.parse_known_args()
    given = read_flags(__doc__)  # the rest is for train.py
    base, middle, *pairs = SCALES[args.scale]
    models = models_to_compare(args.what, pairs)
    taken = {"preset", "learning_rate", "seed", "out_dir", "resume", "init_from"}.union(*(flags for flags, _ in models.values()))
    if args.seeds < 1 or given.keys() & taken:
        raise ValueError(f"compare needs --seeds of 1 or more, and sets itself {', '.join(f'--{name}' for name in sorted(taken))}; leave those out")
    base = base | {"data_dir": TrainConfig.data_dir} | given

    def config_of(flags):
        return TrainConfig(**{**PRESETS.get(base.get("preset"), {}), **base, **flags})
    config = config_of({})
    *_, meta = load_data(config.data_dir)
    if args.scale != "tiny" and meta["tokenizer"] != "gpt2":
        raise ValueError(f"--scale={args.scale} is for GPT-2's vocabulary, {config.data_dir} has {meta['tokenizer']} tokens; run python prepare.py --tokenizer=gpt2")
    scale = args.scale + "".join(f"-{name}={value}" for name, value in given.items() if name != "data_dir")
    name = scale + ("" if args.what == "paper" else f"-{args.what}")
    results, rates_file = Path("results"), Path("results") / f"{scale}-rates.json"
    rates = json.loads(rates_file.read_text()) if rates_file.exists() else {}
    device = pick_device(config.device)
    on_cpu = device.type == "cpu"  # there each run gets a core of its own, which is the best use of them
    workers = os.cpu_count() if on_cpu else 1

    def shape(flags):
        c = config_of(flags)
        with torch.device("meta"):
            return GPT(GPTConfig(vocab_size=meta["vocab_size"], **{f: getattr(c, f) for f in GPTConfig.__dataclass_fields__ if hasattr(c, f)}))

    def go(label, rate, seed):
        flags, longer = models[label]
        if longer != 1:  # as many steps as make it cost what that layout costs
            longer = shape(dict(n_layer=longer[0], n_loop=longer[1])).flops_per_token() / shape(flags).flops_per_token()
        flags = base | flags | {"learning_rate": rate, "seed": seed, "max_steps": round(config.max_steps * longer)}
        c = config_of(flags)
        key = hashlib.sha256(json.dumps([asdict(c), meta["train"]["sha256"]]).encode()).hexdigest()[:12]
        began = time.time()
        result = train_run(flags, Path("out-compare") / f"{c.n_layer}x{c.n_loop}-{key}", 1 if on_cpu else None)
        loss = result["val_loss"] if result else math.inf
        print(f"{label:<32} learning rate {rate:.2g}, seed {seed}: {loss:.4f}{'' if result else ' (diverged)'} ({time.time() - began:.0f} s)", flush=True)
        return result

    def tuned(label):  # the longer runs take the rate of the model that they are
        own = next(other for other in models if models[other][0] == models[label][0])
        trials = rates.get(own, {})
        return own, trials, float(min(trials, key=lambda rate: (trials[rate] is None, trials[rate], float(rate)))) if trials else middle

    with ThreadPoolExecutor(workers) as pool:
        def parallel(jobs):
            return list(pool.map(lambda job: go(*job), jobs))

        def untried():  # at a factor of two, until the best lies between two others
            for label in models:
                own, trials, best = tuned(label)
                yield from ((own, rate, 0) for rate in (best / 2, best, 2 * best) if own == label and f"{rate:g}" not in trials)
        while args.sweep and (jobs := list(untried())):
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
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {workers} cores"
    print(f"\n{meta['dataset']}, {meta['train']['tokens']:,} {meta['tokenizer']} tokens; {config.max_steps:,} steps of {config.batch_size * config.gradient_accumulation_steps * config.block_size:,} "
          f"tokens; seeds 0 to {args.seeds - 1}; {config.n_embd} wide; {machine}")
    print(f"{'model':<32} {'params':>8} {'depth':>5} {'MFLOPs/token':>12} {'tokens':>8} {'minutes':>7} {'rate':>7} {'val loss':>8} {'+-':>6} {'bits/byte':>9} {'paper':>5}")
    for label, row in runs.items():
        model, finished = shape(models[label][0]), [run for run in row["runs"] if run]
        c = model.config
        row |= {"params": sum(p.numel() for p in model.parameters()), "depth": c.n_layer * c.n_loop, "flops": model.flops_per_token(),
                "mean": None, "spread": None}
        diverged = f", {failed} diverged" if (failed := len(row["runs"]) - len(finished)) else ""
        if finished:
            losses = [run["val_loss"] for run in finished]
            row |= {"mean": sum(losses) / len(losses), "spread": (max(losses) - min(losses)) / 2}
            paper = PAPER.get((c.n_layer, c.n_loop)) if models[label][1] == 1 and args.what == "paper" and args.scale != "tiny" else None
            print(f"{label:<32} {row['params'] / 1e6:7.2f}M {row['depth']:5} {row['flops'] / 1e6:12,.1f} {finished[0]['tokens'] / 1e6:7.1f}M "
                  f"{sum(run['seconds'] for run in finished) / len(finished) / 60:7.1f} {row['learning_rate']:7.2g} {row['mean']:8.4f} {row['spread']:6.4f} "
                  f"{row['mean'] / math.log(2) * meta['val']['tokens'] / meta['val']['bytes']:9.3f} {paper or '':>5}{diverged}")
        else:
            print(label + diverged)
    if args.what == "paper":
        for (plain, loop), theirs in zip(pairs, PAIRS_OF_PAPER):
            ours = [runs[f"{n_layer} x {n_loop}"]["mean"] for n_layer, n_loop in (plain, loop)]
            print("{} x 1 minus {} x {}: ".format(plain[0], *loop) + (f"{ours[0] - ours[1]:+.4f}" if None not in ours else "diverged") +
                  "; in the paper, {} x 1 minus {} x {}: {:+.2f}".format(theirs[0][0], *theirs[1], PAPER[theirs[0]] - PAPER[theirs[1]]))
    write_json(results / f"{name}.json", {"scale": scale, "steps": config.max_steps, "data": meta, "torch": torch.__version__,
                                          "machine": machine, "models": runs})
    plot(runs, results / f"{name}.png")


def plot(runs, path):
    """Validation loss against tokens and against compute, a line a model, the mean of its seeds."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
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
    left.set(xlabel="tokens", ylabel="validation loss, nats")
    right.set(xlabel="FLOPs of training", xscale="log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:.0e}")
    right.tick_params(axis="x", which="minor", labelbottom=False)
    if left.lines:
        left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"results in {path.with_suffix('.json')} and {path}")


COMMANDS = {"speed": speed, "loops": loops, "compare": compare, "measure": measure}


def main():
    command = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "speed"
    if command not in COMMANDS:
        raise ValueError(f"{command} is none of its commands, which are {', '.join(COMMANDS)}; see python bench.py --help")
    COMMANDS[command]()


if __name__ == "__main__":
    run(main)
