"""
Tokens to a model: trains GPT-2 or a Loop Neural Network on what prepare.py wrote.

    python train.py --n_loop=6                                       the default, small enough for two CPU cores
    python train.py --resume                                         go on with out/ckpt.pt, exactly where it was
    python train.py --preset=gpt2-81m-loop                           a model of the paper, on one GPU
    torchrun --nproc_per_node=8 train.py --preset=gpt2-81m-loop      the same training on eight

The same flags give the same training on any number of processes: they share out the sequences of a step.
"""
import argparse
import csv
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig, OPTIMIZERS, RESIDUALS, load_checkpoint, pick_device, save_checkpoint
from prepare import load_data, one_line_errors, run


# ---- the flags ----

def flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


# The paper's four models. Width, context and vocabulary are GPT-2's, the recipe is the one that nanoGPT
# publishes for its 124M model: 12 x 40 sequences of 1024, about half a million tokens a step.
RECIPE = dict(n_head=12, n_embd=768, block_size=1024, bias=False, batch_size=12, gradient_accumulation_steps=40,
              max_steps=600_000, warmup_steps=2000, eval_interval=1000, eval_iters=200, log_interval=10,
              learning_rate=6e-4, min_lr=6e-5, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
              residual="sum", optimizer="adamw")
PRESETS = {
    "gpt2-124m": dict(n_layer=12, n_loop=1, **RECIPE),
    "gpt2-81m-loop": dict(n_layer=6, n_loop=6, **RECIPE),
    "gpt2-45m": dict(n_layer=1, n_loop=1, **RECIPE),
    "gpt2-45m-loop": dict(n_layer=1, n_loop=2, **RECIPE),
}


@dataclass
class TrainConfig:
    preset: str | None = flag(None, "a model of the paper with its recipe; other flags win over it", [*PRESETS])
    data_dir: str = flag("data", "what prepare.py wrote")
    out_dir: str = flag("out", "where ckpt.pt (the last), best.pt and log.csv go")
    resume: bool = flag(False, "go on with ckpt.pt of out_dir")
    init_from: str = flag("scratch", "or gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the path of a model.safetensors")
    init_layers: str | None = flag(None, "with init_from: the pretrained block that each block starts from, such as 0,2,4,6,8,10; all if not given")
    # model
    n_layer: int = flag(1, "blocks")
    n_head: int = flag(3, "attention heads")
    n_embd: int = flag(96, "width")
    block_size: int = flag(256, "context, in tokens")
    n_loop: int = flag(1, "how often the looped blocks are applied")
    n_loop_min: int | None = flag(None, "draw that anew at each step, from n_loop_min to n_loop, so that the model serves every depth")
    loop_start: int = flag(0, "the first looped block")
    loop_end: int | None = flag(None, "the block before which the loop ends; all the rest if not given")
    residual: str = flag("scaled", "how the paper's equation is read, see model.py", RESIDUALS)
    dropout: float = flag(0.0, "share of activations dropped")
    bias: bool = flag(True, "biases in the linear layers and norms")
    # training
    batch_size: int = flag(4, "sequences that a process computes at once")
    gradient_accumulation_steps: int = flag(1, "times batch_size: the sequences of a step, over all processes")
    max_steps: int = flag(2600, "steps, each of batch_size * gradient_accumulation_steps * block_size tokens")
    optimizer: str = flag("muon", "muon is for the blocks' matrices, the rest stays with adamw", OPTIMIZERS)
    learning_rate: float = flag(7e-3, "the highest, after the warm-up")
    min_lr: float | None = flag(None, "where the cosine ends; a tenth of learning_rate if not given")
    warmup_steps: int = flag(100, "of linear warm-up")
    weight_decay: float = flag(0.1, "on matrices")
    beta1: float = flag(0.9, "of AdamW")
    beta2: float = flag(0.95, "of AdamW")
    grad_clip: float = flag(1.0, "highest norm of the gradient; 0 does not clip")
    seed: int = flag(0, "of initial weights, batches and dropout")
    # reporting and machine
    eval_interval: int = flag(650, "steps between evaluations, each followed by a checkpoint")
    eval_iters: int = flag(100, "batches of batch_size sequences in an evaluation, spread over the validation split")
    log_interval: int = flag(130, "steps between lines of progress")
    device: str = flag("auto", "cpu, cuda, mps, ...; auto takes the best that is found")
    dtype: str = flag("auto", "of the computation; auto is bfloat16 where the GPU has it", ("auto", "float32", "bfloat16"))
    compile: bool | None = flag(None, "torch.compile; if not given, on CUDA where Triton is installed")
    checkpoint_loops: bool = flag(False, "compute each loop again going backward: memory for one loop, a third more time")

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        for name in ("max_steps", "warmup_steps", "learning_rate", "weight_decay", "grad_clip", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name}={getattr(self, name)} must not be negative or infinite")
        if self.init_layers is not None and self.init_from == "scratch":
            raise ValueError("--init_layers says which pretrained blocks to take; say of which model with --init_from")
        if self.n_loop_min is not None and not 1 <= self.n_loop_min <= self.n_loop:
            raise ValueError(f"--n_loop_min={self.n_loop_min} must be from 1 to --n_loop={self.n_loop}")


def read_flags(description=__doc__):
    """The flags that were given, {name: value}; defaults are left out, so that a preset or a checkpoint can differ."""
    parser = one_line_errors(argparse.ArgumentParser(description=description, allow_abbrev=False,
                                                     formatter_class=argparse.RawDescriptionHelpFormatter))
    for f in fields(TrainConfig):
        kind = next(t for t in (bool, int, float, str) if f.type in (t, t | None))
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {f.default})", **how)
    return vars(parser.parse_args())


# ---- batches, schedule, evaluation ----

def windows(data, starts, T):
    """The T tokens from each of the starts on, and the same one token later, (n, T) each."""
    rows = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def get_batch(data, config, step, rank=0, world=1):
    """The sequences on which process `rank` trains at this step, and the same one token later, (n, T) each.

    They depend on nothing but seed and step, which makes any run repeatable and resumable, and together the
    processes draw what one alone would.
    """
    T = config.block_size
    starts = np.random.default_rng((config.seed, step)).integers(
        len(data) - T, size=config.batch_size * config.gradient_accumulation_steps)[rank::world]
    return windows(data, starts, T)


def get_n_loop(config, step):
    """How often to loop at this step, on every process: n_loop, or with n_loop_min a draw that depends on seed and step alone."""
    low = config.n_loop if config.n_loop_min is None else config.n_loop_min
    return int(np.random.default_rng((config.seed, step, 1)).integers(low, config.n_loop, endpoint=True))


def get_lr(config, step):
    """The learning rate of the update number step, counted from 0: linear warm-up, then half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    low = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def evaluate(model, data, config, device, rank=0, world=1):
    """Mean validation loss after loop 1, 2, ... N in nats, over the same windows every time; the last is the model's."""
    T = config.block_size
    count = min(config.eval_iters * config.batch_size, (len(data) - 1) // T)
    starts = np.linspace(0, len(data) - 1 - T, count).astype(int)[rank::world]
    total = torch.zeros(model.config.n_loop, dtype=torch.float64)
    model.eval()
    for i in range(0, len(starts), config.batch_size):
        x, y = (part.to(device) for part in windows(data, starts[i:i + config.batch_size], T))
        total += len(x) * model.loop_losses(x, y).cpu()
    model.train()
    if world > 1:
        dist.all_reduce(total)
    return (total / count).tolist()


def train_step(net, optimizers, x, y, config, autocast, n_loop=None):
    """One update on the sequences x, y (n, T), batch_size at a time: the loss and the gradient's norm, both () on the device.

    n_loop, if given, is the depth of this step.
    """
    loss = torch.zeros((), device=x.device)
    for i in range(0, len(x), config.batch_size):
        micro_x, micro_y = x[i:i + config.batch_size], y[i:i + config.batch_size]
        net.require_backward_grad_sync = i + config.batch_size >= len(x)  # DDP: exchange gradients once a step
        with autocast:
            part = net(micro_x, micro_y, n_loop)[1] * (len(micro_x) / len(x))
        part.backward()
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


def prepare_device(model, config, device):
    """Set precision, compilation and checkpointing as config asks or the device suggests; (autocast, whether it is bfloat16)."""
    torch.set_float32_matmul_precision("high")  # TF32 where there is one
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    if config.compile or (config.compile is None and device.type == "cuda" and find_spec("triton")):
        model.compile_parts()
    model.checkpoint_loops = config.checkpoint_loops
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext(), bf16


def peak_flops(device):
    """Dense bfloat16 operations per second that the maker states, or None if the device is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12,
             "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
    return next((peak for key, peak in peaks.items() if key in name), None)


def check_finite(step, value):
    if not math.isfinite(value):
        raise ValueError(f"the loss or its gradient is {value} at step {step}; the last checkpoint is from before. "
                         "Start anew with a smaller --learning_rate")


# ---- the run ----

def make_model(config, given, meta, resumed):
    """The model to train: the resumed checkpoint's, a new one, or a pretrained one.

    Where a file decides its shape, config learns it. Raises ValueError if flags, file and data contradict each other.
    """
    shape = [f.name for f in fields(GPTConfig) if hasattr(config, f.name)]
    if resumed:
        model, state = resumed
        config.loop_end = config.loop_end or config.n_layer
        for name, before in (asdict(model.config) | {"optimizer": state["train"]["optimizer"]}).items():
            if (asked := getattr(config, name, before)) != before:
                raise ValueError(f"--{name}={asked} cannot be resumed into, the checkpoint in {config.out_dir} has {before}; "
                                 "leave the flag out, or start anew without --resume")
        if any(state["data"][split]["sha256"] != meta[split]["sha256"] for split in ("train", "val")):
            raise ValueError(f"{config.data_dir} holds {meta['dataset']} in {meta['tokenizer']} tokens, other data than the checkpoint's, "
                             f"{state['data']['dataset']} in {state['data']['tokenizer']} tokens; prepare that again, or start anew without --resume")
        if state["step"] > config.max_steps:
            raise ValueError(f"the checkpoint has {state['step']} steps behind it, more than --max_steps={config.max_steps}; give more")
    elif config.init_from == "scratch":
        vocabulary = {} if config.preset else {"vocab_size": meta["vocab_size"]}
        model = GPT(GPTConfig(**{name: getattr(config, name) for name in shape}, **vocabulary))
    else:
        try:
            layers = None if config.init_layers is None else [int(i) for i in config.init_layers.split(",")]
        except ValueError:
            raise ValueError(f"--init_layers={config.init_layers} must be numbers of blocks with commas between, such as 0,2,4") from None
        model = GPT.from_pretrained(config.init_from, layers, **{name: given[name] for name in shape if name in given})
    for name in shape:
        setattr(config, name, getattr(model.config, name))
    if model.config.vocab_size != meta["vocab_size"]:
        raise ValueError(f"the model has a vocabulary of {model.config.vocab_size} tokens and {config.data_dir} one of {meta['vocab_size']}; "
                         f"run python prepare.py --tokenizer={'byte' if model.config.vocab_size == 257 else 'gpt2'}")
    return model


def main():
    # who we are
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *args, **kwargs: None
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

    # what is asked for
    given = read_flags()
    resumed = load_checkpoint(Path(given.get("out_dir", TrainConfig.out_dir)) / "ckpt.pt") if given.get("resume") else None
    defaults = resumed[1]["train"] if resumed else PRESETS.get(given.get("preset"), {})
    config = TrainConfig(**{**defaults, **given})
    device = pick_device(config.device)
    train_data, val_data, meta = load_data(config.data_dir)
    torch.manual_seed(config.seed)
    model = make_model(config, given, meta, resumed)
    for split, data in (("train", train_data), ("val", val_data)):
        if len(data) <= config.block_size:
            raise ValueError(f"{config.data_dir}/{split}.bin has {len(data)} tokens, too few for block_size={config.block_size}; "
                             "use a smaller --block_size or run python prepare.py on more text")
    if (sequences := config.batch_size * config.gradient_accumulation_steps) % world:
        raise ValueError(f"{world} processes cannot share {sequences} sequences a step; change --batch_size or --gradient_accumulation_steps")

    # model, optimizer and machine
    model.to(device)
    optimizers = model.configure_optimizer(config.optimizer, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    start, seconds, best, last_eval = 0, 0.0, math.inf, {"step": None}
    if resumed:
        state = resumed[1]
        start, seconds, best, last_eval = (state[name] for name in ("step", "seconds", "best_val_loss", "last_eval"))
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    autocast, bf16 = prepare_device(model, config, device)
    net = model
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    signals = []  # Ctrl-C and SIGTERM take effect between two steps
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))

    # files
    out = Path(config.out_dir)
    columns = ["step", "tokens", "seconds", "lr", "train_loss", "grad_norm", "val_loss", "bits_per_byte", "loop_losses"]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        if resumed and (out / "log.csv").exists():  # what came after the checkpoint will come again
            with open(out / "log.csv", newline="") as f:
                rows = [row for row in csv.reader(f) if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= start]
        with open(out / "log.csv.tmp", "w", newline="") as f:
            csv.writer(f).writerows([columns, *rows])
        os.replace(out / "log.csv.tmp", out / "log.csv")
        log = open(out / "log.csv", "a", newline="")

    params = sum(p.numel() for p in model.parameters())
    flops = model.flops_per_token(config.n_loop if config.n_loop_min is None else (config.n_loop_min + config.n_loop) / 2)  # of a mean step
    step_tokens, peak = sequences * config.block_size, peak_flops(device) if bf16 else None
    bytes_per_token = meta["val"]["bytes"] / meta["val"]["tokens"]
    say(f"n_layer={config.n_layer}, h[{config.loop_start}:{config.loop_end}] x {config.n_loop} ({config.residual}), {params:,} parameters, "
        f"{flops / 1e6:.1f} MFLOPs per token | {meta['dataset']}, {len(train_data):,} {meta['tokenizer']} tokens | "
        f"{config.max_steps} steps of {step_tokens:,} | {world} x {device.type}, {'bfloat16' if bf16 else 'float32'}", flush=True)

    # the loop: report, evaluate, save, stop, then train; so what is saved is what was reported
    began, interval_began, interval_step = time.time() - seconds, time.time(), start
    for step in range(start, config.max_steps + 1):  # step: the number of updates done
        stop = torch.tensor(max(signals, default=0))
        if world > 1:  # whoever got the signal, all stop at the same step
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        evaluating = (step % config.eval_interval == 0 or step == config.max_steps) and step != last_eval["step"]
        logging = evaluating or (step % config.log_interval == 0 and step > start)
        row, line = {"step": step, "tokens": step * step_tokens}, f"step {step}/{config.max_steps}"

        if (logging or stop) and step > start:
            told = torch.stack((loss, norm)).cpu().double()
            if world > 1:
                dist.all_reduce(told)
            train_loss, grad_norm = (told / world).tolist()
            check_finite(step, train_loss + grad_norm)
            speed = (step - interval_step) * step_tokens / (time.time() - interval_began)
            row |= {"lr": lr, "train_loss": train_loss, "grad_norm": grad_norm}
            line += f" | loss {train_loss:.4f} | lr {lr:.1e} | norm {grad_norm:.2f} | {speed:,.0f} tokens/s"
            line += f" | MFU {flops * speed / (peak * world):.1%}" if peak else ""
            line += f" | {timedelta(seconds=int((config.max_steps - step) * step_tokens / speed))} left"
        if evaluating:
            with autocast:
                loop_losses = evaluate(model, val_data, config, device, rank, world)
            check_finite(step, loop_losses[-1])
            last_eval = {"step": step, "val_loss": loop_losses[-1], "loop_losses": loop_losses,
                         "bits_per_byte": loop_losses[-1] / math.log(2) / bytes_per_token}
            better, best = loop_losses[-1] < best, min(best, loop_losses[-1])
            row |= last_eval | {"loop_losses": " ".join(map(str, loop_losses))}
            line += f" | val {last_eval['val_loss']:.4f}, {last_eval['bits_per_byte']:.3f} bits per byte"
            line += f", after each loop {' '.join(f'{x:.3f}' for x in loop_losses)}" if config.n_loop > 1 else ""
        seconds = time.time() - began
        if logging and rank == 0:
            print(line, flush=True)
            csv.DictWriter(log, columns).writerow(row | {"seconds": round(seconds, 1)})
            log.flush()
        if (evaluating or stop) and rank == 0:
            known = dict(step=step, seconds=seconds, best_val_loss=best, last_eval=last_eval, train=asdict(config), data=meta)
            if evaluating and better:
                save_checkpoint(out / "best.pt", model, **known)
            save_checkpoint(out / "ckpt.pt", model, **known, optimizers=[optimizer.state_dict() for optimizer in optimizers])
        if logging:
            interval_began, interval_step = time.time(), step
        if stop or step == config.max_steps:
            break

        lr = get_lr(config, step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        torch.manual_seed((config.seed * 1_000_003 + step) * world + rank)  # dropout depends on seed and step alone
        batch = get_batch(train_data, config, step, rank, world)
        if device.type == "cuda":  # from pinned memory the copy, and all that follows, is queued while the GPU is still at the last step
            batch = (part.pin_memory() for part in batch)
        x, y = (part.to(device, non_blocking=True) for part in batch)
        loss, norm = train_step(net, optimizers, x, y, config, autocast, get_n_loop(config, step))

    if world > 1:
        time.sleep(0.1)  # gloo's threads need the GIL to free their last tensors; its destructor waits for them and holds it
        dist.destroy_process_group()
    if stop:
        say(f"stopped at step {step} and saved; go on with: python train.py --resume --out_dir={config.out_dir}", flush=True)
        sys.exit(128 + int(stop))
    say(json.dumps({"val_loss": last_eval["val_loss"], "best_val_loss": best, "bits_per_byte": last_eval["bits_per_byte"],
                    "loop_losses": last_eval["loop_losses"], "params": params, "steps": step, "tokens": step * step_tokens,
                    "seconds": round(seconds, 1), "tokens_per_second": round(step * step_tokens / seconds)}))


if __name__ == "__main__":
    run(main)
