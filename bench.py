"""
What a model costs. Every figure that this project tells of speed and memory comes from here.

    python bench.py                                       the paper's four models; on a CPU the same four, small
    python bench.py speed --preset=gpt2-81m-loop          one of them, or any other by train.py's flags
    python bench.py speed --n_layer=36 --n_embd=768 --n_head=12 --checkpoint_loops

Each model is measured in a process of its own and with nothing compiled before: the cold start ends with the
first step (Python's imports apart), the other times are medians of the steps after it. Memory is what training
adds to the imports. MFU is the share of the peak that the GPU's maker states or, where no such figure is known
here, of what a plain matrix product reaches on the spot. The last column sets the time of a step beside the
first row's; the paper reports 150, 177 and 1377 ms, that is 1, 1.18 and 9.2, for its 45M, 45M-loop and 81M-loop.

What was tried on two CPU cores and left out, with the ratio of speeds that it brought:
  tanh-GELU written as a sigmoid           a training step of a small model: 1.07x compiled, 0.8x not
  compiling the whole model, not parts     the same step: 1.02x; 6 blocks x 6 loops start in 77 s instead of 24 s
  bfloat16                                 the same step: 1.0x, casting eats what the products gain
  weights kept transposed for decoding     1.3x, where products in parts (model.py, linear) bring 2x
  decoding compiled, with fixed shapes     2x for a tiny model, 0.5x at 384 wide, where it reads the whole cache for every token
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

import torch

from model import GPT, GPTConfig, pick_device
from prepare import get_tokenizer, run
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


COMMANDS = {"speed": speed, "measure": measure}


def main():
    command = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "speed"
    if command not in COMMANDS:
        raise ValueError(f"{command} is none of its commands, which are {', '.join(COMMANDS)}; see python bench.py --help")
    COMMANDS[command]()


if __name__ == "__main__":
    run(main)
