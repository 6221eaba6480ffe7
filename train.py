"""
Tokens to a model: trains GPT-2 or a Loop Neural Network on what prepare.py wrote.

    python train.py --n_loop=6                                     six loops, for two CPU cores
    python train.py --resume                                       go on from out/ckpt.pt, exactly
    python train.py --preset=arrows                                the puzzle of prepare.py arrows
    python train.py --preset=gpt2-81m-loop                         a model of the paper, on one GPU
    torchrun --nproc_per_node=8 train.py --preset=gpt2-81m-loop    the same training on eight

Any number of processes gives the same training, up to rounding and dropout. Reports go to the
terminal, and as JSON lines to out/log.jsonl, whose last line is the result. Two trainings at once
on one CPU need OMP_NUM_THREADS=1 each: with more threads than cores they crawl.
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, LOOP_ORDERS, MATRICES, NORMS_AND_GATES, NOT_GPT2, RESIDUALS, GPTConfig
from model import change_layout, flops_per_token, layer_of, load_checkpoint, load_pretrained
from model import pick_device, pick_dtype, save_checkpoint
from prepare import SPLITS, find_weights, load_data, make_folder, make_parser

# The paper's four models have GPT-2's width, context and vocabulary. The recipe is the one that
# nanoGPT publishes for 124M: 12 x 40 sequences of 1024, about half a million tokens a step.
RECIPE = dict(n_head=12, n_embd=768, block_size=1024, vocab_size=50257, bias=False, batch_size=12,
              gradient_accumulation_steps=40, max_steps=600_000, optimizer="adamw",
              learning_rate=6e-4, warmup_steps=2000, weight_decay=0.1, grad_clip=1.0,
              eval_interval=1000, eval_iters=2400, log_interval=10)
PRESETS = {
    "gpt2-124m": dict(n_layer=12, n_loop=1, **RECIPE),
    "gpt2-81m-loop": dict(n_layer=6, n_loop=6, **RECIPE),
    "gpt2-45m": dict(n_layer=1, n_loop=1, **RECIPE),
    "gpt2-45m-loop": dict(n_layer=1, n_loop=2, **RECIPE),
    # One document of the puzzle at a time. Loops are drawn: then answers stay right for more loops
    # than training has. Dropout, and a rate that ends at 0, help to make each step exact.
    "arrows": dict(data_dir="data-arrows", out_dir="out-arrows", n_loop=10, n_loop_min=6, n_head=4,
                   n_embd=128, dropout=0.1, block_size=68, max_steps=2500, learning_rate=2e-3,
                   min_lr=0.0),
}
OPTIMIZERS = ("adamw", "muon")


# ---- the flags ----

# The types of flags. For a wrong value, argparse prints the type's name.
def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text):
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def whole(text):
    if not 0 <= int(text) < 2 ** 31:
        raise ValueError
    return int(text)


def make_flags():
    """Return (parser, fixed): fixed are the names of flags that a resumed run can't change."""
    parser = make_parser("Train GPT-2 or a Loop Neural Network on what prepare.py wrote.")
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    # what a resumed run can't change
    add("--preset", choices=PRESETS, help="a model with its recipe; other flags override it")
    add("--init_from", help="weights: gpt2, gpt2-medium, -large, -xl, or a file: see find_weights; "
        "the default optimizer is then adamw at 3e-5")
    add("--n_layer", type=positive, default=1, help="number of blocks")
    add("--n_head", type=positive, default=2, help="number of attention heads")
    add("--n_embd", type=positive, default=64, help="width of the model")
    add("--block_size", type=positive, default=128, help="length of the context in tokens")
    add("--vocab_size", type=positive, help="number of tokens, which the data must have; None: any")
    add("--n_loop", type=positive, default=GPTConfig.n_loop,
        help="how often the looped blocks are applied")
    add("--n_loop_min", type=positive, help="draw each step's loops from here to n_loop")
    add("--loop_start", type=whole, default=GPTConfig.loop_start, help="the first looped block")
    add("--loop_end", type=positive, help="the block after the last looped one; None: to the end")
    add("--loop_order", choices=LOOP_ORDERS, default=GPTConfig.loop_order, help="see GPT.states")
    add("--residual", choices=RESIDUALS, default=GPTConfig.residual, help="equation: see GPT.loop")
    add("--dropout", type=not_negative, default=GPTConfig.dropout,
        help="share of activations dropped")
    add("--bias", action=switch, default=GPTConfig.bias, help="biases in linear layers and norms")
    add("--batch_size", type=positive, default=8, help="sequences that a process computes at once")
    add("--gradient_accumulation_steps", type=positive, default=1, help="batches in a step, in all")
    add("--optimizer", choices=OPTIMIZERS, default="muon", help="muon is for the blocks' matrices")
    add("--learning_rate", type=not_negative, default=8e-3, help="the peak")
    add("--min_lr", type=not_negative, help="the rate at the end; None: a tenth of the peak")
    add("--decay_steps", type=positive, help="where the rate reaches its end; None: at max_steps")
    add("--warmup_steps", type=whole, default=100, help="steps over which the rate rises")
    add("--weight_decay", type=not_negative, default=0.1, help="weight decay of matrices")
    add("--grad_clip", type=not_negative, default=1.0, help="largest gradient norm; 0: no limit")
    add("--seed", type=whole, default=0, help="random seed for weights, batches and dropout")
    add("--eval_iters", type=positive, default=800, help="sequences in an evaluation")
    fixed = list(vars(parser.parse_args([])))   # the flags so far
    # what it can
    add("--data_dir", default="data", help="the folder that prepare.py wrote")
    add("--out_dir", default="out", help="the folder for ckpt.pt, written at each evaluation")
    add("--resume", action="store_true", help="go on from ckpt.pt in out_dir. With more max_steps "
        "than before, the added steps keep the rate of the end")
    add("--max_steps", type=whole, default=4000, help="number of updates of the weights")
    add("--eval_interval", type=positive, default=1000, help="steps between evaluations and saves")
    add("--log_interval", type=positive, default=200, help="steps between lines of progress; a "
        "twentieth of max_steps at most")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of products; auto: see pick_dtype")
    add("--compile", action=switch, help="use torch.compile; None: on a GPU that can")
    add("--checkpoint_loops", action=switch, help="save memory: recompute all loops but the last")
    return parser, fixed


def get_args(argv=None):
    """Return (args, model, state). model and state are what --init_from or --resume names, or None.

    A flag's value is what was typed, else what the checkpoint or the weights say, else the
    preset's, else the default. argparse takes what the Namespace knows in place of its defaults.
    """
    parser, fixed = make_flags()
    known = PRESETS.get(parser.parse_args(argv).preset, {})
    args = parser.parse_args(argv, argparse.Namespace(**known))
    model, state, must_match = None, None, ()
    if args.resume:
        model, state = load_checkpoint(Path(args.out_dir) / "ckpt.pt")
        known = state["args"]
        if other := known.keys() ^ vars(args).keys():
            sys.exit(f"{args.out_dir}/ckpt.pt is of other code, which differs in the flags "
                     f"{', '.join(sorted(other))}: use that code")
        known = known | {"out_dir": args.out_dir}   # the folder may have moved
        must_match = fixed
    elif args.init_from:
        model, _ = load_pretrained(find_weights(args.init_from))
        shape = asdict(model.config)
        if model.config.n_loop == 1 and model.config.residual not in NOT_GPT2:
            for name in ("n_loop", "loop_start", "loop_end", "loop_order", "residual"):
                del shape[name]     # it is a GPT-2, and can be looped in any way
        known = known | shape | {"optimizer": "adamw", "learning_rate": 3e-5}
        must_match = shape.keys() - {"block_size", "dropout"}
    args = parser.parse_args(argv, argparse.Namespace(**known))
    for name in must_match:
        if getattr(args, name) != known[name]:
            parser.error(f"--{name}={getattr(args, name)} does not fit what it starts from, which "
                         f"has {known[name]}: leave it out")
    if model and args.block_size > model.config.block_size:
        parser.error(f"--block_size={args.block_size} is above {model.config.block_size}, the "
                     "context of what it starts from: leave it out")
    if args.n_loop_min and args.n_loop_min > args.n_loop:
        parser.error(f"--n_loop_min={args.n_loop_min} must not be above --n_loop={args.n_loop}")
    args.decay_steps = args.decay_steps or args.max_steps
    return args, model, state


def get_config(args, vocab_size):
    """Return the GPTConfig that the flags describe. Exits if they do not fit together."""
    values = {field.name: getattr(args, field.name) for field in fields(GPTConfig)}
    try:
        return GPTConfig(**values | {"vocab_size": args.vocab_size or vocab_size})
    except ValueError as error:
        sys.exit(f"train.py: {error}")


# ---- batches and schedule, which depend on the flags and the step alone ----

def windows(data, starts, T):
    """The T + 1 tokens from each start on, (n, T + 1): T to read, each with the one to predict."""
    return torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))


def get_batch(data, args, step, stride=1, rank=0, world=1):
    """The windows of a step that this process trains on, (n, T + 1).

    They start at multiples of stride. Together the processes take what one process would.
    """
    count = args.batch_size * args.gradient_accumulation_steps
    rng = np.random.default_rng((args.seed, step))
    places = (len(data) - args.block_size - 1) // stride + 1
    starts = rng.integers(places, size=count)[rank::world] * stride
    return windows(data, starts, args.block_size)


def get_n_loop(args, step):
    """The loops of a step: n_loop, or with n_loop_min a draw."""
    low = args.n_loop_min or args.n_loop
    rng = np.random.default_rng((args.seed, step, 1))   # 1: other draws than get_batch's
    return int(rng.integers(low, args.n_loop, endpoint=True))


def mean_n_loop(args):
    """The mean of get_n_loop over the training, from a thousand of its steps."""
    steps = np.linspace(0, max(0, args.max_steps - 1), 1000, dtype=int)
    return np.mean([get_n_loop(args, step) for step in steps])


def get_cost(args, vocab_size):
    """Return (the tokens of a step, the mean FLOPs to train on one of them)."""
    step_tokens = args.batch_size * args.gradient_accumulation_steps * args.block_size
    return step_tokens, flops_per_token(get_config(args, vocab_size), mean_n_loop(args))


def get_lr(args, step):
    """The learning rate of a step, counted from 0: a linear warm-up, half a cosine, then level."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    low = args.learning_rate / 10 if args.min_lr is None else args.min_lr
    done = (step - args.warmup_steps) / max(1, args.decay_steps - args.warmup_steps)
    return low + (args.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1, done)))


# ---- one step, and one evaluation ----

def inputs_and_targets(rows, device, scoring=None):
    """Windows (n, T + 1) -> tokens and targets on the device, (n, T) each.

    A puzzle has a scoring, see PUZZLES in prepare.py: only the tokens of answers are targets. The
    others are -1, and the loss ignores them. Where answers are hidden, the inputs have answer_after
    in their place.
    """
    if device.type == "cuda":  # the CPU need not wait for a copy from pinned memory
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    x, y = rows[:, :-1], rows[:, 1:]
    if scoring is not None:
        mark = ord(scoring["answer_after"])     # the tokens of a puzzle are bytes
        answers = torch.zeros_like(rows, dtype=torch.bool)  # cut like x and y below
        for i in range(1, scoring["answer_length"] + 1):
            answers[:, i:] |= rows[:, :-i] == mark
        y = y.masked_fill(~answers[:, 1:], -1)
        if scoring["hide_answers"]:
            x = x.masked_fill(answers[:, :-1], mark)
    return x, y


def train_step(net, optimizers, x, y, args, autocast, n_loop=None):
    """One update on x and y (n, T), in parts of batch_size: the loss and the gradient's norm."""
    loss = torch.zeros((), device=x.device)
    for i in range(0, len(x), args.batch_size):
        part_x, part_y = x[i:i + args.batch_size], y[i:i + args.batch_size]
        # DDP averages the gradients of all processes, once a step; a plain model ignores this
        net.require_backward_grad_sync = i + args.batch_size >= len(x)
        with autocast:
            part = net(part_x, part_y, n_loop) * (len(part_x) / len(x))
        part.backward()
        loss += part.detach()
    for name, p in net.named_parameters():
        assert p.grad is not None or not p.requires_grad, f"the loss does not depend on {name}"
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), args.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


def flops_ratio(model, x, y, args, n_loop):
    """The FLOPs that torch counts in train_step on x and y (n, T), over those of flops_per_token.

    Where it is not 1, a fork computes something else than flops_per_token knows of.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        train_step(model, [], x, y, args, nullcontext(), n_loop)
    model.zero_grad()
    return counter.get_total_flops() / x.numel() / flops_per_token(model.config, n_loop)


@torch.no_grad()
def evaluate(model, data, args, device, scoring=None, rank=0, world=1):
    """What a record says of the validation data, from the same windows every time.

    loop_losses are the mean losses after loop 1, 2, .. N in nats, val_loss is the last. For a
    puzzle, right is the share of answers that are right in all their tokens.
    """
    T, B = args.block_size, args.batch_size
    count = min(args.eval_iters, (len(data) - 1) // T)
    starts = np.linspace(0, len(data) - 1 - T, count).astype(int)[rank::world]
    if scoring is not None:
        starts -= starts % scoring["document_length"]
    # the sum of the losses after each loop, the number of targets, and of right answers
    losses, targets, right = torch.zeros(model.config.n_loop, dtype=torch.float64), 0, 0
    model.eval()
    for i in range(0, len(starts), B):
        x, y = inputs_and_targets(windows(data, starts[i:i + B], T), device, scoring)
        # a smaller batch at the end would compile anew: fill it up with targets that don't count
        empty = (0, 0, 0, B - len(x))
        x, y = F.pad(x, empty), F.pad(y, empty, value=-1)
        counted = (y >= 0).sum().item()
        losses += counted * model.loop_losses(x, y).cpu()
        targets += counted
        if scoring is not None:
            hits = (model(x).argmax(-1) == y)[y >= 0].view(-1, scoring["answer_length"])
            right += hits.all(dim=1).sum().item()
    model.train()
    sums = mean_over_processes(torch.tensor([*losses, targets, right]), device).tolist()
    *losses, targets, right = sums
    losses = [loss / targets for loss in losses]
    record = {"val_loss": losses[-1], "loop_losses": losses}
    return record | ({"right": right * scoring["answer_length"] / targets} if scoring else {})


def mean_over_processes(x, device):
    """The mean of x over all processes: x itself if there is one."""
    if dist.is_initialized():
        x = x.to(device)
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


# ---- the optimizers ----

class Muon(torch.optim.Optimizer):
    """Momentum, but the update of a matrix is made orthogonal: each direction moves equally far.

    After Keller Jordan et al., Muon, 2024. The update has the size of AdamW's (arXiv 2502.16982),
    so one learning rate serves both. torch.optim.Muon computes the same in bfloat16 everywhere,
    which most CPUs only emulate. This one does so only where it is faster, whatever --dtype says.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
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
    x = g.to(pick_dtype("auto", g.device, min(g.shape)))
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
    return x.to(g.dtype)


def configure_optimizers(model, args):
    """Return a list of optimizers: AdamW; or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay is for GPT-2's matrices only, not for biases, norms and gates. What a fork adds is
    AdamW's, without weight decay. For the scale of the rate see GPT.loop_scale.
    """
    groups = {}     # {what a group's parameters have in common: its parameters}
    for name, p in model.named_parameters():
        is_matrix = layer_of(name) in MATRICES and name.endswith("weight")
        in_blocks = is_matrix and name.startswith("h.")
        kind = in_blocks, args.weight_decay * is_matrix, model.loop_scale(name)
        groups.setdefault(kind, []).append(p)
    matrices, rest = [], []
    for (in_blocks, decay, scale), params in groups.items():
        group = {"params": params, "weight_decay": decay, "lr_scale": scale}
        (matrices if in_blocks else rest).append(group)
    adamw = dict(lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(matrices + rest, **adamw)]
    assert args.optimizer == "muon", f"configure_optimizers has no {args.optimizer}"
    return [Muon(matrices, args.learning_rate, args.weight_decay),
            torch.optim.AdamW(rest, **adamw)]


# ---- the machine ----

def use_machine(model, args, device):
    """Apply --compile, --checkpoint_loops and --dtype. Return (autocast, the dtype)."""
    # high: TF32, on a GPU that has it
    torch.set_float32_matmul_precision("highest" if args.dtype == "float32" else "high")
    on_cuda = device.type == "cuda"
    # torch.compile needs triton for a GPU, and triton needs a C compiler
    can_compile = find_spec("triton") and (shutil.which(os.environ.get("CC", "gcc"))
                                           or shutil.which("clang"))
    if args.compile or (args.compile is None and on_cuda and can_compile):
        compile_blocks(model)
    model.checkpoint_loops = args.checkpoint_loops
    dtype = pick_dtype(args.dtype, device, args.n_embd)
    # no cache: each loop casts a weight anew, so that its gradients are summed in float32
    enabled = dtype == torch.bfloat16
    return torch.autocast(device.type, dtype, enabled, cache_enabled=False), dtype


def compile_blocks(model, **options):
    """Compile each block and the head, which do nearly all the work.

    One block's code serves every block at every loop: 6 blocks looped 6 times compile as fast as 6
    blocks, and another n_loop compiles nothing. If a fork tells a block which loop it is, pass a
    tensor: each new number compiles anew, and after 8 of them nothing is compiled any more.
    """
    torch._dynamo.config.optimize_ddp = False   # or DDP would cut a block in two
    for block in model.h:
        block.compile(dynamic=False, **options)
    model.head_loss = torch.compile(model.head_loss, dynamic=False, **options)


def join_processes(args):
    """Return (device, rank, world): under torchrun this is process rank of world, else 0 of 1."""
    if not dist.is_torchelastic_launched():
        return pick_device(args.device), 0, 1
    local, name = int(os.environ["LOCAL_RANK"]), args.device
    if torch.cuda.is_available() and name != "cpu":
        if local >= torch.cuda.device_count():
            sys.exit(f"more processes than the {torch.cuda.device_count()} GPUs: use as many")
        torch.cuda.set_device(local)
        name = "cuda"   # the device just set, whatever --device says
    device = pick_device(name)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


# ---- mistakes ----

def check(args, train_data, val_data, meta, world, state):
    """Exit in one line if flags, data, processes and a checkpoint do not fit together."""
    if min(len(train_data), len(val_data)) <= args.block_size:
        sys.exit(f"{args.data_dir} is too short for block_size={args.block_size}: "
                 "use a smaller --block_size, or run python prepare.py on more text")
    if args.vocab_size not in (None, meta["vocab_size"]):
        other = "gpt2" if meta["tokenizer"] == "byte" else "byte"
        sys.exit(f"{args.data_dir} has {meta['vocab_size']} {meta['tokenizer']} tokens, the model "
                 f"{args.vocab_size}: run python prepare.py {meta['dataset']} --tokenizer={other}")
    length = meta["puzzle"]["document_length"] if "puzzle" in meta else 1
    if (args.block_size + 1) % length:
        sys.exit(f"--block_size={args.block_size} cuts the documents of {args.data_dir} in two: "
                 f"use --block_size={length - 1}")
    if args.batch_size * args.gradient_accumulation_steps % world:
        sys.exit(f"{world} processes cannot share the sequences of a step equally: "
                 "change --batch_size or --gradient_accumulation_steps")
    if state is not None and any(state["data"][split] != meta[split] for split in SPLITS):
        sys.exit(f"{args.data_dir} is not the data of the checkpoint, {state['data']['dataset']} "
                 f"in {state['data']['tokenizer']} tokens: give its --data_dir, or start anew")
    if state is not None and state["step"] > args.max_steps:
        sys.exit(f"the checkpoint has {state['step']} steps: give more --max_steps")


# ---- the training ----

def start_folder(out, resumed):
    """Make the folder of a run. A new run renames what an earlier one left there."""
    make_folder(out, "--out_dir")
    log = out / "log.jsonl"
    for path in () if resumed else (log, out / "ckpt.pt"):
        if path.exists():
            os.replace(path, out / f"old-{path.name}")
            print(f"{path} is of an earlier run: it is old-{path.name} now", flush=True)
    if log.exists() and not log.read_bytes().endswith(b"\n"):
        with open(log, "a") as file:
            file.write("\n")    # a full disk tore the last line


def describe(record, args, step_tokens):
    """The line that the terminal shows of a record of log.jsonl."""
    line = f"step {record['step']}/{args.max_steps}"
    if "loss" in record:
        speed = record["tokens_per_second"]
        left = timedelta(seconds=int((args.max_steps - record["step"]) * step_tokens / speed))
        line += (f" | loss {record['loss']:.4f} | lr {record['lr']:.1e} | norm {record['norm']:.2f}"
                 f" | {speed:,.0f} tokens/s | {left} left")
    if "val_loss" in record:
        line += f" | val {record['val_loss']:.4f}"
    if "right" in record:
        line += f", {record['right']:.1%} right"
    if len(record.get("loop_losses", [])) > 1:
        line += ", after each loop " + " ".join(f"{loss:.3f}" for loss in record["loop_losses"])
    return line


def train(args, model=None, state=None):
    # the machine and the data
    device, rank, world = join_processes(args)
    train_data, val_data, meta = load_data(args.data_dir)
    check(args, train_data, val_data, meta, world, state)
    scoring = meta.get("puzzle")
    stride = scoring["document_length"] if scoring else 1

    # the model and its optimizers
    config = get_config(args, meta["vocab_size"])
    torch.manual_seed(args.seed)
    if model is None:
        model = GPT(config)
    elif state is None:
        model = change_layout(model, config)
    model.to(device)
    optimizers = configure_optimizers(model, args)
    start, seconds = 0, 0.0
    if state is not None:
        start, seconds = state["step"], state["seconds"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    x, y = inputs_and_targets(get_batch(train_data, args, start, stride)[:1], device, scoring)
    ratio = flops_ratio(model, x, y, args, get_n_loop(args, start))
    autocast, dtype = use_machine(model, args, device)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    # what is reported
    out = Path(args.out_dir)
    step_tokens, flops = get_cost(args, meta["vocab_size"])
    params = sum(p.numel() for p in model.parameters())
    if rank == 0:
        print(f"n_layer={config.n_layer}, h[{config.loop_start}:{config.loop_end}] x "
              f"{config.n_loop} ({config.residual}), {params:,} parameters, "
              f"{flops / 1e6:.1f} MFLOPs per token\n"
              f"{meta['dataset']}, {len(train_data):,} {meta['tokenizer']} tokens, "
              f"{args.max_steps} steps of {step_tokens:,}, {world} x {device.type}, "
              f"{dtype}, {' and '.join(type(each).__name__ for each in optimizers)}", flush=True)
        names = [name for name, _ in model.named_parameters()]
        if own := [name for name in names if layer_of(name) not in MATRICES | NORMS_AND_GATES]:
            print(f"not GPT-2's, so AdamW's and without weight decay: {', '.join(own)}")
        if abs(ratio - 1) > 0.02:
            print(f"a step takes {ratio:.2f} times the FLOPs that flops_per_token says")
        start_folder(out, args.resume)

    # report, evaluate, save, then train: a checkpoint holds exactly the reported model
    loss = norm = lr = None
    log_interval = max(1, min(args.log_interval, args.max_steps // 20))     # twenty lines at least
    interval_began, interval_step = time.perf_counter(), start
    began = interval_began - seconds
    for step in range(start, args.max_steps + 1):  # step: the number of updates done
        last = step == args.max_steps
        evaluating = last or step % args.eval_interval == 0
        logging = evaluating or step % log_interval == 0
        record = {"step": step}
        if logging and step > start:
            loss, norm = mean_over_processes(torch.stack((loss, norm)), device).tolist()
            speed = (step - interval_step) * step_tokens / (time.perf_counter() - interval_began)
            record |= {"loss": loss, "lr": lr, "norm": norm, "tokens_per_second": speed}
        if evaluating:
            with autocast:
                record |= evaluate(model, val_data, args, device, scoring, rank, world)
            gates = None if model.gates is None else model.gates.mean(-1).tolist()
            record |= {"gates": gates, "params": params, "tokens": step * step_tokens,
                       "flops": step * step_tokens * flops, "flops_ratio": ratio,
                       "seconds": round(time.perf_counter() - began, 1)}
        numbers = [record.get(name, 0) for name in ("loss", "norm", "val_loss")]
        diverged = not all(map(math.isfinite, numbers))
        if logging and rank == 0:
            print(describe(record, args, step_tokens), flush=True)
            with open(out / "log.jsonl", "a") as log:
                result = {"step": step, "val_loss": None} if diverged else record
                log.write(json.dumps(result) + "\n")
        if diverged:
            sys.exit(f"the loss or its gradient is not finite at step {step}: start anew with a "
                     "smaller --learning_rate")
        # the first step has nothing new, but every run ends with a checkpoint
        if evaluating and rank == 0 and (step > start or last):
            save_checkpoint(out / "ckpt.pt", model, step=step, args=vars(args), data=meta,
                            seconds=time.perf_counter() - began,
                            optimizers=[optimizer.state_dict() for optimizer in optimizers])
        if logging:
            interval_began, interval_step = time.perf_counter(), step
        if last:
            break

        lr = get_lr(args, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
        # for dropout: another number for each seed, step and process
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        rows = get_batch(train_data, args, step, stride, rank, world)
        x, y = inputs_and_targets(rows, device, scoring)
        loss, norm = train_step(net, optimizers, x, y, args, autocast, get_n_loop(args, step))

    if world > 1:
        time.sleep(0.1)  # or, on a busy CPU, gloo's threads may still run, and abort the process
        dist.destroy_process_group()


def main():
    args, model, state = get_args()
    try:
        train(args, model, state)
    except KeyboardInterrupt:
        if dist.is_initialized() and dist.get_rank() > 0:
            sys.exit(1)  # the first process prints the message
        sys.exit(f"stopped; python train.py --resume --out_dir={args.out_dir} "
                 "goes on from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()
