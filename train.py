"""
Tokens to a model: trains GPT-2 or a Loop Neural Network on what prepare.py wrote.

    python train.py --n_loop=6                                     six loops, for two CPU cores
    python train.py --resume                                       go on from out/ckpt.pt, exactly
    python train.py --preset=gpt2-81m-loop                         a model of the paper, on one GPU
    torchrun --nproc_per_node=8 train.py --preset=gpt2-81m-loop    the same training on eight

Several processes share the sequences of a step. So the same flags give the same training on any
number of them, but for rounding and the draws of dropout.
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import (
    GPT,
    OPTIMIZERS,
    RESIDUALS,
    GPTConfig,
    compile_blocks,
    configure_optimizers,
    flops_per_token,
    from_pretrained,
    load_checkpoint,
    pick_device,
    read_gpt2,
    save_checkpoint,
)
from prepare import Parser, find_gpt2, fraction, load_data, natural, not_negative, positive

# The paper's four models. Width, context and vocabulary are GPT-2's. The recipe is the one nanoGPT
# publishes for 124M: 12 x 40 sequences of 1024, about half a million tokens a step.
RECIPE = dict(n_head=12, n_embd=768, block_size=1024, bias=False, residual="sum", batch_size=12,
              gradient_accumulation_steps=40, max_steps=600_000, optimizer="adamw",
              learning_rate=6e-4, warmup_steps=2000, weight_decay=0.1, grad_clip=1.0,
              eval_interval=1000, eval_iters=200, log_interval=10)
PRESETS = {
    "gpt2-124m": dict(n_layer=12, n_loop=1, **RECIPE),
    "gpt2-81m-loop": dict(n_layer=6, n_loop=6, **RECIPE),
    "gpt2-45m": dict(n_layer=1, n_loop=1, **RECIPE),
    "gpt2-45m-loop": dict(n_layer=1, n_loop=2, **RECIPE),
}
# A resumed run may change these flags. The others must be the checkpoint's.
MAY_CHANGE = {"data_dir", "out_dir", "resume", "max_steps", "eval_interval", "log_interval",
              "device", "dtype", "compile", "checkpoint_loops"}


# ---- the flags ----

def make_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add("--preset", choices=PRESETS, help="a model of the paper with its recipe; flags override it")
    add("--data_dir", default="data", help="what prepare.py wrote")
    add("--out_dir", default="out", help="ckpt.pt goes there at each evaluation, over an older one")
    add("--resume", action="store_true", help="go on from ckpt.pt of out_dir")
    add("--init_from", help="start from gpt2, gpt2-medium, -large, -xl or a model.safetensors")
    add("--init_layers", type=comma_separated_numbers, help="the blocks to take, such as 0,2,4")
    # the model
    add("--n_layer", type=positive, default=1, help="blocks")
    add("--n_head", type=positive, default=2, help="attention heads")
    add("--n_embd", type=positive, default=64, help="width")
    add("--block_size", type=positive, default=128, help="context, in tokens")
    add("--n_loop", type=positive, default=1, help="how often the looped blocks are applied")
    add("--n_loop_min", type=positive, help="draw each step's loops between this and n_loop")
    add("--loop_start", type=natural, default=0, help="the first looped block")
    add("--loop_end", type=positive, help="the block after the last looped one; if not given: all")
    add("--residual", choices=RESIDUALS, default="scaled", help="reading of the equation")
    add("--dropout", type=fraction, default=0.0, help="share of activations dropped")
    add("--bias", action=switch, default=True, help="biases in linear layers and norms")
    # the training
    add("--batch_size", type=positive, default=8, help="sequences that a process computes at once")
    add("--gradient_accumulation_steps", type=positive, default=1, help="batches of a step, in all")
    add("--stride", type=positive, default=1, help="sequences start at multiples of it")
    add("--max_steps", type=natural, default=6000, help="updates of the weights")
    add("--optimizer", choices=OPTIMIZERS, default="muon", help="muon: for the blocks' matrices")
    add("--learning_rate", type=not_negative, default=8e-3, help="the peak; it falls to a tenth")
    add("--warmup_steps", type=natural, default=100, help="steps of linear warm-up")
    add("--weight_decay", type=not_negative, default=0.1, help="of matrices")
    add("--grad_clip", type=not_negative, default=1.0, help="clip gradients to this norm; 0: never")
    add("--seed", type=natural, default=0, help="of weights, batches and dropout")
    # reports and the machine
    add("--eval_interval", type=positive, default=1500, help="steps between evaluations and saves")
    add("--eval_iters", type=positive, default=100, help="batches in an evaluation")
    add("--log_interval", type=positive, default=300, help="steps between lines of progress")
    add("--device", default="auto", help="cpu, cuda, mps; auto takes the best that is there")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="to compute in")
    add("--compile", action=switch, help="torch.compile; if not given, on CUDA with Triton")
    add("--checkpoint_loops", action=switch, default=False, help="recompute loops to save memory")
    return parser


def comma_separated_numbers(text):
    return [int(number) for number in text.split(",")]


def get_args(argv=None):
    """Return the flags, over the defaults of a preset, a pretrained model or a checkpoint."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
    if args.init_from:
        shape, _ = read_gpt2(find_gpt2(args.init_from), args.init_layers)
        parser.set_defaults(**shape, optimizer="adamw", learning_rate=3e-5)
    if args.resume:
        _, state = load_checkpoint(Path(args.out_dir) / "ckpt.pt")
        parser.set_defaults(**state["args"] | {"out_dir": args.out_dir})  # it may have moved
    args = parser.parse_args(argv)
    if args.resume:
        for name, saved in state["args"].items():
            if name not in MAY_CHANGE and getattr(args, name) != saved:
                parser.error(f"--{name}={getattr(args, name)} cannot be resumed into, the "
                             f"checkpoint has {saved}: leave out the flag, or --resume")
    if args.n_loop_min and args.n_loop_min > args.n_loop:
        parser.error(f"--n_loop_min={args.n_loop_min} must not be above --n_loop={args.n_loop}")
    if args.init_layers and not args.init_from:
        parser.error("--init_layers names pretrained blocks: say of which model with --init_from")
    return args


def get_config(args, vocab_size):
    """Return the GPTConfig that the flags describe."""
    names = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]
    try:
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(args, name) for name in names})
    except ValueError as error:
        sys.exit(f"train.py: {error}")


# ---- batches, schedule, evaluation, one step ----

def windows(data, starts, T, vocab_size):
    """The T tokens from each start on, and the same one token later: (n, T) each."""
    rows = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))
    if rows.max() >= vocab_size:
        sys.exit(f"the data holds a token {rows.max()}, beyond the vocabulary of {vocab_size}: "
                 "write it again with python prepare.py")
    return rows[:, :-1], rows[:, 1:]


def get_batch(data, args, vocab_size, step, rank=0, world=1):
    """The sequences on which this process trains, and the same one token later: (n, T) each.

    They depend on seed and step alone, so that any run can be repeated and resumed. Together the
    processes take what one process would.
    """
    count = args.batch_size * args.gradient_accumulation_steps
    rng = np.random.default_rng((args.seed, step))
    places = (len(data) - args.block_size - 1) // args.stride + 1
    starts = rng.integers(places, size=count)[rank::world] * args.stride
    return windows(data, starts, args.block_size, vocab_size)


def get_n_loop(args, step):
    """The loops of a step: n_loop, or with n_loop_min a draw by seed and step alone."""
    if args.n_loop_min is None:
        return args.n_loop
    rng = np.random.default_rng((args.seed, step, 1))
    return int(rng.integers(args.n_loop_min, args.n_loop, endpoint=True))


def mean_n_loop(args):
    return ((args.n_loop_min or args.n_loop) + args.n_loop) / 2


def get_lr(args, step):
    """The learning rate of a step, counted from 0: a linear warm-up, then half a cosine."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    low = args.learning_rate / 10
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return low + (args.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def evaluate(model, data, args, device, rank=0, world=1):
    """The mean validation loss after loop 1, 2, .. N in nats, over the same windows every time."""
    T = args.block_size
    count = min(args.eval_iters * args.batch_size, (len(data) - 1) // T)
    starts = np.linspace(0, len(data) - 1 - T, count).astype(int)[rank::world]
    starts -= starts % args.stride
    total = torch.zeros(model.config.n_loop, dtype=torch.float64)
    model.eval()
    for i in range(0, len(starts), args.batch_size):
        x, y = windows(data, starts[i:i + args.batch_size], T, model.config.vocab_size)
        total += len(x) * model.loop_losses(x.to(device), y.to(device)).cpu()
    model.train()
    if world > 1:
        dist.all_reduce(total)
    return (total / count).tolist()


def train_step(net, optimizers, x, y, args, autocast, n_loop=None):
    """One update on the sequences x and y (n, T): the loss and the gradient's norm, both ()."""
    loss = torch.zeros((), device=x.device)
    for i in range(0, len(x), args.batch_size):
        part_x, part_y = x[i:i + args.batch_size], y[i:i + args.batch_size]
        # DDP exchanges gradients once a step, a plain model ignores this
        net.require_backward_grad_sync = i + args.batch_size >= len(x)
        with autocast:
            part = net(part_x, part_y, n_loop)[1] * (len(part_x) / len(x))
        part.backward()
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


# ---- set-up ----

def set_up(model, args, device):
    """Set compilation, checkpointing and precision. Return (autocast, whether it is bf16)."""
    torch.set_float32_matmul_precision("highest" if args.dtype == "float32" else "high")  # TF32
    on_cuda = device.type == "cuda"
    if args.compile or (args.compile is None and on_cuda and find_spec("triton")):
        compile_blocks(model)
    model.checkpoint_loops = args.checkpoint_loops
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and has_bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16), bf16


def peak_flops(device):
    """Dense bf16 operations per second that the maker states, or None for a device not listed."""
    peaks = {"H100 80GB HBM3": 989e12, "H200": 989e12, "B200": 2250e12, "A100-SXM4-40GB": 312e12,
             "A100-SXM4-80GB": 312e12, "L40S": 362e12, "L4": 121e12, "GeForce RTX 4090": 165e12}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return peaks.get(name.removeprefix("NVIDIA "))


def check(args, train_data, val_data, meta, world):
    """Exit in one line if flags, data and processes do not fit together."""
    tokens = f"{args.data_dir} has a vocabulary of {meta['vocab_size']} {meta['tokenizer']} tokens"
    if min(len(train_data), len(val_data)) <= args.block_size:
        sys.exit(f"{args.data_dir} is too short for block_size={args.block_size}: "
                 "use a smaller --block_size, or run python prepare.py on more text")
    if args.preset and meta["tokenizer"] != "gpt2":
        sys.exit(f"{tokens}, presets are for GPT-2's: run python prepare.py openwebtext, or "
                 "another text with --tokenizer=gpt2")
    if args.init_from and args.vocab_size != meta["vocab_size"]:
        sys.exit(f"{tokens}, {args.init_from} has {args.vocab_size}: run python prepare.py "
                 "openwebtext, or another text with --tokenizer=gpt2")
    if Path(args.out_dir).is_file():
        sys.exit(f"--out_dir={args.out_dir} is a file: name a folder")
    if args.batch_size * args.gradient_accumulation_steps % world:
        sys.exit(f"{world} processes cannot share the sequences of a step equally: "
                 "change --batch_size or --gradient_accumulation_steps")


def check_resumed(args, meta, state):
    """Exit in one line if a checkpoint's state is not of this data, or beyond the last step."""
    data = state["data"]
    if any(data[split] != meta[split] for split in ("train", "val")):
        sys.exit(f"{args.data_dir} is not the data of the checkpoint, {data['dataset']} in "
                 f"{data['tokenizer']} tokens: give its --data_dir, or start anew")
    if state["step"] > args.max_steps:
        sys.exit(f"the checkpoint has {state['step']} steps: give more --max_steps")


def check_finite(step, value):
    if not math.isfinite(value):
        sys.exit(f"the loss or its gradient is {value} at step {step}: "
                 "start anew with a smaller --learning_rate")


# ---- the training ----

def train(args):
    # the machine: under torchrun this is one process of `world`, otherwise the only one
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = pick_device(args.device)
    out = Path(args.out_dir)

    # the data, the model, its optimizers
    train_data, val_data, meta = load_data(args.data_dir)
    check(args, train_data, val_data, meta, world)
    c = get_config(args, meta["vocab_size"])
    torch.manual_seed(args.seed)
    start, seconds = 0, 0.0
    if args.resume:
        model, state = load_checkpoint(out / "ckpt.pt")
        check_resumed(args, meta, state)
        start, seconds = state["step"], state["seconds"]
    elif args.init_from:
        model = from_pretrained(find_gpt2(args.init_from), args.init_layers, **asdict(c))
    else:
        model = GPT(c)
    model.to(device)
    optimizers = configure_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay)
    if args.resume:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    autocast, bf16 = set_up(model, args, device)
    net = model
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # what is reported
    params = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(c, mean_n_loop(args))
    step_tokens = args.batch_size * args.gradient_accumulation_steps * args.block_size
    peak = peak_flops(device) if bf16 else None
    bytes_per_token = meta["val"]["bytes"] / meta["val"]["tokens"]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        print(f"n_layer={c.n_layer}, h[{c.loop_start}:{c.loop_end}] x {c.n_loop} ({c.residual}), "
              f"{params:,} parameters, {flops / 1e6:.1f} MFLOPs per token\n"
              f"{meta['dataset']}, {len(train_data):,} {meta['tokenizer']} tokens, "
              f"{args.max_steps} steps of {step_tokens:,}, {world} x {device.type}, "
              f"{'bf16' if bf16 else 'float32'}", flush=True)

    # report, evaluate, save, then train: a checkpoint holds exactly the reported model
    loss, norm, lr = None, None, None
    run_began, interval_began, interval_step = time.time() - seconds, time.time(), start
    for step in range(start, args.max_steps + 1):  # step: the number of updates done
        last = step == args.max_steps
        evaluating = last or step % args.eval_interval == 0
        logging = evaluating or step % args.log_interval == 0
        line = f"step {step}/{args.max_steps}"
        if logging and step > start:
            sums = torch.stack((loss, norm)).cpu().double()
            if world > 1:
                dist.all_reduce(sums)
            train_loss, grad_norm = (sums / world).tolist()
            check_finite(step, train_loss + grad_norm)
            speed = (step - interval_step) * step_tokens / (time.time() - interval_began)
            left = timedelta(seconds=int((args.max_steps - step) * step_tokens / speed))
            line += f" | loss {train_loss:.4f} | lr {lr:.1e} | norm {grad_norm:.2f}"
            line += f" | {speed:,.0f} tokens/s"
            line += f" | MFU {flops * speed / (peak * world):.1%}" if peak else ""
            line += f" | {left} left"
        if evaluating:
            with autocast:
                loop_losses = evaluate(model, val_data, args, device, rank, world)
            val_loss = loop_losses[-1]
            check_finite(step, val_loss)
            bits_per_byte = val_loss / math.log(2) / bytes_per_token
            line += f" | val {val_loss:.4f}, {bits_per_byte:.3f} bits per byte"
            if c.n_loop > 1:
                line += ", after each loop " + " ".join(f"{value:.3f}" for value in loop_losses)
        if logging and rank == 0:
            print(line, flush=True)
        if evaluating and rank == 0:
            seconds = time.time() - run_began
            states = [optimizer.state_dict() for optimizer in optimizers]
            save_checkpoint(out / "ckpt.pt", model, step=step, seconds=seconds, args=vars(args),
                            data=meta, optimizers=states)
        if logging:
            interval_began, interval_step = time.time(), step
        if last:
            break

        lr = get_lr(args, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        # for dropout: another number for each seed, step and process
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        x, y = get_batch(train_data, args, c.vocab_size, step, rank, world)
        if device.type == "cuda":  # from pinned memory the copy waits for nothing
            x, y = x.pin_memory(), y.pin_memory()
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        loss, norm = train_step(net, optimizers, x, y, args, autocast, get_n_loop(args, step))

    if world > 1:
        time.sleep(0.1)  # lets gloo's threads end: they could hang in the next line
        dist.destroy_process_group()
    if rank == 0:
        tokens = args.max_steps * step_tokens
        print(json.dumps({"step": step, "val_loss": val_loss, "bits_per_byte": bits_per_byte,
                          "loop_losses": loop_losses, "params": params, "tokens": tokens,
                          "flops": flops * tokens, "seconds": round(seconds, 1)}))


def main():
    args = get_args()
    try:
        train(args)
    except KeyboardInterrupt:
        path = Path(args.out_dir) / "ckpt.pt"
        if int(os.environ.get("RANK", 0)) > 0:
            sys.exit(1)  # the first process speaks
        if not path.exists():
            sys.exit("stopped before the first checkpoint")
        _, state = load_checkpoint(path)
        sys.exit(f"stopped; {path} is of step {state['step']}: go on with "
                 f"python train.py --resume --out_dir={args.out_dir}")


if __name__ == "__main__":
    main()
