"""
Tokens to a model: trains GPT-2 or a Loop Neural Network on what prepare.py wrote.

    python train.py --n_loop=6                                     six loops, for two CPU cores
    python train.py --resume                                       go on from out/ckpt.pt, exactly
    python train.py --preset=arrows                                the puzzle of prepare.py arrows
    python train.py --preset=gpt2-81m-loop                         a model of the paper, on one GPU
    torchrun --nproc_per_node=8 train.py --preset=gpt2-81m-loop    the same training on eight

Several processes share the sequences of a step. So any number of them gives the same training, up
to rounding and dropout.
"""
import argparse
import json
import math
import os
import shutil
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

from model import GPT, LOOP_ORDERS, RESIDUALS, GPTConfig, flops_per_token, pick_device
from model import from_pretrained, load_checkpoint, read_gpt2, save_checkpoint
from prepare import find_gpt2, get_tokenizer, load_data, make_parser

# The paper's four models have GPT-2's width, context and vocabulary. The recipe is the one that
# nanoGPT publishes for 124M: 12 x 40 sequences of 1024, about half a million tokens a step.
RECIPE = dict(n_head=12, n_embd=768, block_size=1024, bias=False, batch_size=12,
              gradient_accumulation_steps=40, max_steps=600_000, optimizer="adamw",
              learning_rate=6e-4, warmup_steps=2000, weight_decay=0.1, grad_clip=1.0,
              eval_interval=1000, eval_iters=200, log_interval=10)
PRESETS = {
    "gpt2-124m": dict(n_layer=12, n_loop=1, **RECIPE),
    "gpt2-81m-loop": dict(n_layer=6, n_loop=6, **RECIPE),
    "gpt2-45m": dict(n_layer=1, n_loop=1, **RECIPE),
    "gpt2-45m-loop": dict(n_layer=1, n_loop=2, **RECIPE),
    # A document of the puzzle has 69 tokens with its end, and only the answers can be predicted.
    "arrows": dict(data_dir="data-arrows", out_dir="out-arrows", n_loop=6, n_head=4, block_size=68,
                   stride=69, score_after=">", batch_size=16, max_steps=4816, learning_rate=4e-3),
}
OPTIMIZERS = ("adamw", "muon")
# A resumed run may change these flags. The others must be the checkpoint's.
MAY_CHANGE = {"data_dir", "out_dir", "resume", "max_steps", "target_flops", "eval_interval",
              "log_interval", "device", "dtype", "compile", "checkpoint_loops"}


# ---- the flags ----

# The types of flags. For a wrong value, argparse prints the type's name.
def positive(text):
    return in_range(int(text), 1)


def natural(text):
    return in_range(int(text), 0, 2 ** 31)  # small enough for a seed


def not_negative(text):
    return in_range(float(text), 0)


def in_range(value, low, high=math.inf):
    if not low <= value < high:
        raise ValueError
    return value


def make_flags():
    parser = make_parser("Train GPT-2 or a Loop Neural Network on what prepare.py wrote.")
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add("--preset", choices=PRESETS, help="a model with its recipe; other flags override it")
    add("--data_dir", default="data", help="the folder that prepare.py wrote")
    add("--out_dir", default="out", help="the folder for ckpt.pt, written at each evaluation")
    add("--resume", action="store_true", help="go on from ckpt.pt in out_dir")
    add("--init_from", help="start from gpt2, gpt2-medium, -large, -xl or a model.safetensors")
    # the model
    add("--n_layer", type=positive, default=1, help="number of blocks")
    add("--n_head", type=positive, default=2, help="number of attention heads")
    add("--n_embd", type=positive, default=64, help="width of the model")
    add("--block_size", type=positive, default=128, help="length of the context in tokens")
    add("--n_loop", type=positive, default=1, help="how often the looped blocks are applied")
    add("--n_loop_min", type=positive, help="draw each step's loops from here to n_loop")
    add("--loop_start", type=natural, default=0, help="the first looped block")
    add("--loop_end", type=positive, help="the block after the last looped one; None loops all")
    add("--loop_order", choices=LOOP_ORDERS, default=GPTConfig.loop_order,
        help="loop the whole stack, or each block before the next")
    add("--residual", choices=RESIDUALS, default=GPTConfig.residual,
        help="variant of the loop's equation")
    add("--dropout", type=not_negative, default=0.0, help="share of activations dropped")
    add("--bias", action=switch, default=True, help="biases in linear layers and norms")
    # the training
    add("--batch_size", type=positive, default=8, help="sequences that a process computes at once")
    add("--gradient_accumulation_steps", type=positive, default=1,
        help="batches in a step, over all processes")
    add("--stride", type=positive, default=1, help="sequences start at multiples of it; "
        "set it to the length of the documents to keep them whole")
    add("--score_after", help="the loss counts only tokens that follow this one, such as answers")
    add("--max_steps", type=natural, default=4000, help="number of updates of the weights")
    add("--target_flops", type=not_negative, help="set max_steps so that training costs this")
    add("--optimizer", choices=OPTIMIZERS, default="muon",
        help="muon is for the blocks' matrices, with AdamW for the rest")
    add("--learning_rate", type=not_negative, default=8e-3, help="the peak; it falls to a tenth")
    add("--warmup_steps", type=natural, default=100, help="steps over which the rate rises")
    add("--weight_decay", type=not_negative, default=0.1, help="weight decay of matrices")
    add("--grad_clip", type=not_negative, default=1.0, help="largest gradient norm; 0: no limit")
    add("--seed", type=natural, default=0, help="random seed for weights, batches and dropout")
    # reports and the machine
    add("--eval_interval", type=positive, default=1000, help="steps between evaluations and saves")
    add("--eval_iters", type=positive, default=100, help="batches in an evaluation")
    add("--log_interval", type=positive, default=200, help="steps between lines of progress")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="number format of activations; auto is bfloat16 where a GPU has it")
    add("--compile", action=switch, help="use torch.compile; None: on a GPU that can")
    add("--checkpoint_loops", action=switch, default=False,
        help="save memory: recompute all loops but the last in the backward pass")
    return parser


def get_args(argv=None):
    """Return (args, loaded): the flags, and what --init_from or --resume names, read once.

    A preset, a pretrained model and a checkpoint set the defaults of flags.
    """
    parser = make_flags()
    preset = parser.parse_args(argv).preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(argv)
    loaded, fixed, source = None, {}, args.init_from
    if args.init_from:
        loaded = read_gpt2(find_gpt2(args.init_from))
        fixed = loaded[0]
        parser.set_defaults(**fixed, optimizer="adamw", learning_rate=3e-5)
    if args.resume:
        loaded = load_checkpoint(Path(args.out_dir) / "ckpt.pt")
        state = loaded[1]
        parser.set_defaults(**(state["args"] | {"out_dir": args.out_dir}))  # it may have moved
        fixed = {name: x for name, x in state["args"].items() if name not in MAY_CHANGE}
        source = "the checkpoint"
    args = parser.parse_args(argv)
    for name, value in fixed.items():
        ours = getattr(args, name)
        # a pretrained model's context may be cut
        shorter = name == "block_size" and not args.resume and ours < value
        if ours != value and not shorter:
            parser.error(f"--{name}={ours} does not fit {source}, which has {value}: leave it out")
    if args.n_loop_min and args.n_loop_min > args.n_loop:
        parser.error(f"--n_loop_min={args.n_loop_min} must not be above --n_loop={args.n_loop}")
    return args, loaded


def get_config(args, vocab_size):
    """Return the GPTConfig that the flags describe. Exits if they do not fit together."""
    names = [field.name for field in fields(GPTConfig) if field.name != "vocab_size"]
    try:
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(args, name) for name in names})
    except ValueError as error:
        sys.exit(f"train.py: {error}")


# ---- batches and schedule, which depend on the flags and the step alone ----

def windows(data, starts, T):
    """The T + 1 tokens from each start on, (n, T + 1): T to read, each with the one to predict."""
    return torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))


def get_batch(data, args, step, rank=0, world=1):
    """The windows of a step that this process trains on, (n, T + 1).

    Together the processes take what one process would.
    """
    count = args.batch_size * args.gradient_accumulation_steps
    rng = np.random.default_rng((args.seed, step))
    places = (len(data) - args.block_size - 1) // args.stride + 1
    starts = rng.integers(places, size=count)[rank::world] * args.stride
    return windows(data, starts, args.block_size)


def get_n_loop(args, step):
    """The loops of a step: n_loop, or with n_loop_min a draw."""
    if args.n_loop_min is None:
        return args.n_loop
    rng = np.random.default_rng((args.seed, step, 1))   # 1: other draws than get_batch's
    return int(rng.integers(args.n_loop_min, args.n_loop, endpoint=True))


def get_lr(args, step):
    """The learning rate of a step, counted from 0: a linear warm-up, then half a cosine."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    low = args.learning_rate / 10
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return low + (args.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * done))


# ---- one step, and one evaluation ----

def inputs_and_targets(rows, score_token, device):
    """Windows (n, T + 1) -> tokens and targets on the device, (n, T) each.

    With a score_token, targets that do not directly follow one are -1: the loss ignores them.
    """
    if device.type == "cuda":  # the CPU need not wait for a copy from pinned memory
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    x, y = rows[:, :-1], rows[:, 1:]
    if score_token is not None:
        y = y.masked_fill(x != score_token, -1)
    return x, y


def train_step(net, optimizers, x, y, args, autocast, n_loop=None):
    """One update on x and y (n, T), in parts of batch_size: the loss and the gradient's norm."""
    loss = torch.zeros((), device=x.device)
    # targets per process on average: DDP averages gradients too, so all targets weigh the same
    counted = mean_over_processes((y >= 0).sum().float()).clamp(min=1e-6)   # not 0 / 0
    for i in range(0, len(x), args.batch_size):
        part_x, part_y = x[i:i + args.batch_size], y[i:i + args.batch_size]
        # DDP averages the gradients of all processes, once a step; a plain model ignores this
        net.require_backward_grad_sync = i + args.batch_size >= len(x)
        with autocast:
            part = net(part_x, part_y, n_loop)[1] * (part_y >= 0).sum() / counted
        part.backward()
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


@torch.no_grad()
def evaluate(model, data, args, score_token, device, rank=0, world=1):
    """The mean validation loss after loop 1, 2, .. N in nats, over the same windows every time."""
    T = args.block_size
    count = min(args.eval_iters * args.batch_size, (len(data) - 1) // T)
    starts = np.linspace(0, len(data) - 1 - T, count).astype(int)[rank::world]
    starts -= starts % args.stride
    # the sum of the losses after each loop, and then the number of targets
    sums = torch.zeros(model.config.n_loop + 1, dtype=torch.float64)
    model.eval()
    for i in range(0, len(starts), args.batch_size):
        rows = windows(data, starts[i:i + args.batch_size], T)
        x, y = inputs_and_targets(rows, score_token, device)
        counted = (y >= 0).sum().item()
        sums[:-1] += counted * model.loop_losses(x, y).cpu()
        sums[-1] += counted
    model.train()
    sums = mean_over_processes(sums)
    if not sums[-1]:
        sys.exit(f"no validation target follows {args.score_after!r}: give more --eval_iters")
    return (sums[:-1] / sums[-1]).tolist()


def mean_over_processes(x):
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


# ---- the optimizers ----

class Muon(torch.optim.Optimizer):
    """Momentum, but the update of a matrix is made orthogonal: each direction moves equally far.

    After Keller Jordan et al., Muon, 2024. The update has the size of AdamW's (arXiv 2502.16982),
    so one learning rate serves both. torch.optim.Muon computes the same in bfloat16, which most
    CPUs only emulate. Here bfloat16 is for GPUs.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - momentum)
                update = orthogonal(p.grad.lerp(average, momentum))     # Nesterov's momentum
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * 0.2 * math.sqrt(max(p.shape)))


def orthogonal(g):
    """The nearest orthogonal matrix to g (m, n), roughly: its singular values become 0.7 to 1.2.

    A Newton-Schulz iteration: x -> 3.4445 x - 4.775 (x x') x + 2.0315 (x x')^2 x, where x' is the
    transpose, acts on the singular values alone, and drives all between 0 and 1 towards 1.
    """
    if g.size(0) > g.size(1):
        return orthogonal(g.T).T    # so that x x' is the smaller product
    x = g.bfloat16() if g.is_cuda else g
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
    return x.to(g.dtype)


def configure_optimizers(model, args):
    """Return a list of optimizers: AdamW; or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay is for matrices only, not for biases, norms and gates. The output of a c_proj is
    added to the state times_added times. So it moves that much slower than the other matrices.
    """
    slower = 1 / model.config.times_added
    matrices = {name: p for name, p in model.h.named_parameters() if p.dim() == 2}
    adding = [p for name, p in matrices.items() if name.endswith("c_proj.weight")]
    others = [p for name, p in matrices.items() if not name.endswith("c_proj.weight")]
    blocks = [{"params": others}, {"params": adding, "lr_scale": slower}]
    rest = [{"params": [model.wte.weight, model.wpe.weight]},
            {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    how = dict(lr=args.learning_rate, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(blocks + rest, betas=(0.9, 0.95), fused=True, **how)]
    return [Muon(blocks, **how), torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True, **how)]


# ---- the machine ----

def set_up(model, args, device):
    """Set compilation, recomputation and precision. Return (autocast, whether it is bfloat16)."""
    # high: TF32, on a GPU that has it
    torch.set_float32_matmul_precision("highest" if args.dtype == "float32" else "high")
    on_cuda = device.type == "cuda"
    # torch.compile needs triton for a GPU, and triton needs a C compiler
    can_compile = find_spec("triton") and (shutil.which(os.environ.get("CC", "gcc"))
                                           or shutil.which("clang"))
    if args.compile or (args.compile is None and on_cuda and can_compile):
        compile_blocks(model)
    model.checkpoint_loops = args.checkpoint_loops
    has_bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and has_bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16), bf16


def compile_blocks(model, **options):
    """Compile each block and the head, which do nearly all the work.

    One block's code serves every block at every loop: 6 blocks looped 6 times compile as fast as 6
    blocks, and another n_loop compiles nothing. In the compiled head the softmax (B, T, V) never
    exists in full.
    """
    for block in model.h:
        block.compile(**options)
    model.head = torch.compile(model.head, **options)


# ---- mistakes ----

def check(args, train_data, val_data, meta, world, loaded):
    """Exit in one line if flags, data, processes and a checkpoint do not fit together."""
    if min(len(train_data), len(val_data)) <= args.block_size:
        sys.exit(f"{args.data_dir} is too short for block_size={args.block_size}: "
                 "use a smaller --block_size, or run python prepare.py on more text")
    source = args.init_from or args.preset
    if source not in (None, "arrows") and meta["tokenizer"] != "gpt2":
        sys.exit(f"{args.data_dir} has {meta['tokenizer']} tokens, {source} needs GPT-2's: run "
                 "python prepare.py openwebtext, or another text with --tokenizer=gpt2")
    if args.batch_size * args.gradient_accumulation_steps % world:
        sys.exit(f"{world} processes cannot share the sequences of a step equally: "
                 "change --batch_size or --gradient_accumulation_steps")
    if args.resume:
        _, state = loaded
        data = state["data"]
        if any(data[split] != meta[split] for split in ("train", "val")):
            sys.exit(f"{args.data_dir} is not the data of the checkpoint, {data['dataset']} in "
                     f"{data['tokenizer']} tokens: give its --data_dir, or start anew")


def get_score_token(args, meta, val_data):
    """The token that --score_after names, or None. Exits if it is not one token of the data."""
    if args.score_after is None:
        return None
    ids = get_tokenizer(meta["tokenizer"]).encode_ordinary(args.score_after)
    if len(ids) != 1 or ids[0] not in val_data:
        sys.exit(f"--score_after={args.score_after!r} is not one {meta['tokenizer']} token that "
                 f"{args.data_dir}/val.bin has: name another")
    return ids[0]


def check_finite(step, value, rank):
    """Exit if the training has diverged. The last line on stdout is JSON even then."""
    if not math.isfinite(value):
        if rank == 0:
            print(json.dumps({"step": step, "val_loss": None}))
        sys.exit(f"the loss or its gradient is {value} at step {step}: "
                 "start anew with a smaller --learning_rate")


# ---- the training ----

def progress(loss, norm, lr, speed, tokens_left):
    """The part of a line that says how the training goes; speed is in tokens per second."""
    left = timedelta(seconds=int(tokens_left / speed))
    return (f" | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f} | {speed:,.0f} tokens/s"
            f" | {left} left")


def keep_old(path):
    """Rename the checkpoint of the last run, so that this one does not replace it."""
    old = path.with_suffix(".old.pt")
    if path.exists():
        os.replace(path, old)
        print(f"{path} was there from an earlier run: it is {old} now", flush=True)


def train(args, loaded=None):
    # the machine: under torchrun this is one process of `world`, otherwise the only one
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and args.device != "cpu":
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            sys.exit(f"more processes than the {torch.cuda.device_count()} GPUs: use as many")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        args.device = "cuda"    # the device just set, whatever --device says
    device = pick_device(args.device)
    out = Path(args.out_dir)

    # the data and the cost
    train_data, val_data, meta = load_data(args.data_dir)
    check(args, train_data, val_data, meta, world, loaded)
    score_token = get_score_token(args, meta, val_data)
    c = get_config(args, meta["vocab_size"])
    mean_n_loop = ((args.n_loop_min or args.n_loop) + args.n_loop) / 2
    flops = flops_per_token(c, mean_n_loop)
    step_tokens = args.batch_size * args.gradient_accumulation_steps * args.block_size
    if args.target_flops is not None:
        args.max_steps = max(1, round(args.target_flops / (flops * step_tokens)))
        args.target_flops = None  # a resumed run goes by max_steps

    # the model and its optimizers
    torch.manual_seed(args.seed)
    start, seconds = 0, 0.0
    if args.resume:
        model, state = loaded
        start, seconds = state["step"], state["seconds"]
        if start > args.max_steps:
            sys.exit(f"the checkpoint has {start} steps: give more --max_steps or --target_flops")
    elif args.init_from:
        model = from_pretrained(*loaded, **asdict(c))
    else:
        model = GPT(c)
    model.to(device)
    optimizers = configure_optimizers(model, args)
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
    if rank == 0:
        print(f"n_layer={c.n_layer}, h[{c.loop_start}:{c.loop_end}] x {c.n_loop} ({c.residual}), "
              f"{params:,} parameters, {flops / 1e6:.1f} MFLOPs per token\n"
              f"{meta['dataset']}, {len(train_data):,} {meta['tokenizer']} tokens, "
              f"{args.max_steps} steps of {step_tokens:,}, {world} x {device.type}, "
              f"{'bf16' if bf16 else 'float32'}", flush=True)
        out.mkdir(parents=True, exist_ok=True)
        if not args.resume:
            keep_old(out / "ckpt.pt")

    # report, evaluate, save, then train: a checkpoint holds exactly the reported model
    loss = norm = lr = None
    began = interval_began = time.perf_counter()
    interval_step = start
    for step in range(start, args.max_steps + 1):  # step: the number of updates done
        last = step == args.max_steps
        evaluating = last or step % args.eval_interval == 0
        logging = evaluating or step % args.log_interval == 0
        line = f"step {step}/{args.max_steps}"
        if logging and step > start:
            train_loss, grad_norm = mean_over_processes(torch.stack((loss, norm))).tolist()
            check_finite(step, train_loss + grad_norm, rank)
            speed = (step - interval_step) * step_tokens / (time.perf_counter() - interval_began)
            tokens_left = (args.max_steps - step) * step_tokens
            line += progress(train_loss, grad_norm, lr, speed, tokens_left)
        if evaluating:
            with autocast:
                loop_losses = evaluate(model, val_data, args, score_token, device, rank, world)
            val_loss = loop_losses[-1]
            check_finite(step, val_loss, rank)
            line += f" | val {val_loss:.4f}"
            if c.n_loop > 1:
                line += ", after each loop " + " ".join(f"{value:.3f}" for value in loop_losses)
        if logging and rank == 0:
            print(line, flush=True)
        # the first step has nothing new, but every run ends with a checkpoint
        if evaluating and rank == 0 and (step > start or last):
            states = [optimizer.state_dict() for optimizer in optimizers]
            save_checkpoint(out / "ckpt.pt", model, step=step, args=vars(args), data=meta,
                            seconds=seconds + time.perf_counter() - began, optimizers=states)
        if logging:
            interval_began, interval_step = time.perf_counter(), step
        if last:
            break

        lr = get_lr(args, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1)
        # for dropout: another number for each seed, step and process
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        rows = get_batch(train_data, args, step, rank, world)
        x, y = inputs_and_targets(rows, score_token, device)
        loss, norm = train_step(net, optimizers, x, y, args, autocast, get_n_loop(args, step))

    if world > 1:
        time.sleep(0.1)  # lets gloo's threads end: they could hang in the next line
        dist.destroy_process_group()
    if rank == 0:
        tokens = args.max_steps * step_tokens
        bits = val_loss / math.log(2) * meta["val"]["tokens"] / meta["val"]["bytes"]
        print(json.dumps({
            "step": step, "val_loss": val_loss, "loop_losses": loop_losses,
            "bits_per_byte": bits if score_token is None else None,
            "gates": None if model.gates is None else model.gates.mean(-1).tolist(),
            "params": params, "tokens": tokens, "flops": flops * tokens,
            "seconds": round(seconds + time.perf_counter() - began, 1)}))


def main():
    args, loaded = get_args()
    try:
        train(args, loaded)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) > 0:
            sys.exit(1)  # the first process prints the message
        sys.exit(f"stopped; python train.py --resume --out_dir={args.out_dir} "
                 "goes on from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()
