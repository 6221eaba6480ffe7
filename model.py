"""
GPT-2, and the Loop Neural Network made from it, in one file.

A GPT sends each token through its blocks once. A Loop Neural Network sends it through the same
blocks n_loop times. Each loop adds a predicted residual to the state, through a learned gate a_n:

    x(n) = x(n-1) + a_n * f(x(n-1)),    n = 1 .. n_loop

We take f for what the blocks add to the state. a_n has a number for each channel. The parameters
stay the same, the compute grows. The loop is in GPT.states, the equation in GPT.loop.

    model = GPT(GPTConfig(n_layer=6, n_loop=6))     # the paper's 81M model
    logits = model(idx)                             # (B, T) -> (B, T, V)
    loss = model(idx, targets)                      # (B, T) and (B, T) -> (), in nats

GPT-2 is Radford et al., Language Models are Unsupervised Multitask Learners, 2019. The loop is
Ng & Wang, Loop Neural Networks for Parameter Sharing, arXiv 2409.14199; the gate is in version 3.
"""
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

RESIDUALS = ("gated", "sum", "mean", "outer")    # the variants of the equation, see GPT.loop
NOT_GPT2 = {"outer"}                            # those that differ from GPT-2 even with one loop
LOOP_ORDERS = ("stack", "block")                # see GPT.states
MATRICES = {"wte", "wpe", "c_attn", "c_proj", "c_fc"}   # GPT-2's layers that have a matrix
NORMS_AND_GATES = {"ln_1", "ln_2", "ln_f", "gates"}     # the other parameters that we have


@dataclass
class GPTConfig:
    """The shape of a model, by default GPT-2's. Raises ValueError if numbers don't fit together."""
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_loop: int = 1              # how often the blocks h[loop_start:loop_end] are applied
    loop_start: int = 0
    loop_end: int | None = None  # None: after the last block
    loop_order: str = "stack"
    residual: str = "gated"
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self):
        if self.loop_end is None:
            self.loop_end = self.n_layer
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if not 0 <= self.loop_start < self.loop_end <= self.n_layer:
            raise ValueError(f"loop_start={self.loop_start}, loop_end={self.loop_end} must satisfy "
                             f"0 <= loop_start < loop_end <= n_layer={self.n_layer}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        assert self.n_loop >= 1, self.n_loop
        assert self.residual in RESIDUALS, self.residual
        assert self.loop_order in LOOP_ORDERS, self.loop_order


class KVCache:
    """The keys and values of the positions so far, so that only a new token is computed.

    Each (loop, block) has an entry of its own: a looped block sees another state in every loop.
    """

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0     # positions in every entry; the caller advances it
        self.slot = None    # the (loop, block) that computes now; GPT.blocks sets it
        self.entries = {}   # (loop, block): (2, B, nh, max_length, hs)

    def update(self, k, v):
        """Append k and v (B, nh, T, hs) to the entry. Return all of it, (2, B, nh, S, hs)."""
        B, nh, T, hs = k.shape
        end = self.length + T
        assert end <= self.max_length, f"{end} positions in a cache of {self.max_length}"
        assert T == 1 or self.length == 0, "several positions after cached ones would need a mask"
        if self.slot not in self.entries:
            self.entries[self.slot] = k.new_empty(2, B, nh, self.max_length, hs)
        entry = self.entries[self.slot]
        entry[0, :, :, self.length:end] = k
        entry[1, :, :, self.length:end] = v
        return entry[:, :, :, :end]

    def skip(self, n, N, blocks):
        """Copy the newest position's keys and values from loop n to the skipped ones n + 1 .. N."""
        for i in blocks:
            last = self.entries[n, i]
            for skipped in range(n + 1, N + 1):
                if (skipped, i) not in self.entries:
                    self.entries[skipped, i] = torch.empty_like(last)
                self.entries[skipped, i][:, :, :, self.length] = last[:, :, :, self.length]


class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C). Each position reads from itself and from those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)       # (B, T, 3, nh, hs) -> 3 of (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(k, v)              # of all S >= T positions: (B, nh, S, hs)
        dropout = self.dropout if self.training else 0.0
        # T > 1: nothing was cached yet, see update, so a T x T mask. T = 1: it sees all S, no mask
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)     # (B, nh, T, hs) -> (B, T, C), heads side by side
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C). Each position on its own."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")    # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """(B, T, C) -> (B, T, C). Attention, then the MLP, and each adds its output to x."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


def layer_of(name):
    """The layer that a parameter belongs to: "c_fc" for h.0.mlp.c_fc.weight."""
    return name.split(".")[-2] if "." in name else name


class GPT(nn.Module):
    """GPT-2 with a loop in it. Parameters have GPT-2's names, and wte is the head's matrix too."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.checkpoint_loops = False  # True: backward recomputes all loops but the last
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd, bias=c.bias)
        # the groups of blocks that loop together: the whole stack, or each block on its own
        self.groups = [(c.loop_start, c.loop_end)]
        if c.loop_order == "block":
            self.groups = [(i, i + 1) for i in range(c.loop_start, c.loop_end)]
        # a gate for each group, loop and channel; a model of one loop has none, it is GPT-2
        self.gates = None
        if c.residual == "gated" and c.n_loop > 1:
            self.gates = nn.Parameter(torch.ones(len(self.groups), c.n_loop, c.n_embd))
        self.init_weights()

    def init_weights(self):
        """GPT-2's start: its matrices normal, their biases 0. What a block adds starts smaller.

        Parameters of a fork stay as the fork made them.
        """
        for name, p in self.named_parameters():
            if layer_of(name) not in MATRICES:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(p)
                continue
            std = 0.02
            if layer_of(name) == "c_proj":
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(p, std=std * self.loop_scale(name))

    def loop_scale(self, name):
        """The factor on a parameter's initial standard deviation, and on its learning rate.

        What a looped block's c_proj.weight puts out is added to x in each of N loops: so its factor
        is 1/N. It is 1 for all others, and in mean, which divides by N itself.
        """
        c = self.config
        if layer_of(name) != "c_proj" or name.endswith("bias") or c.residual == "mean":
            return 1
        block = int(name.split(".")[1])     # h.0.attn.c_proj.weight
        return 1 / c.n_loop if c.loop_start <= block < c.loop_end else 1

    def forward(self, idx, targets=None, n_loop=None):
        """Tokens idx (B, T) -> logits (B, T, V), or with targets (B, T) the loss, ()."""
        for state in self.states(idx, n_loop):
            x = state   # keep only the last state
        return self.logits(x) if targets is None else self.loss(x, targets)

    def states(self, idx, n_loop=None, cache=None):
        """Yield the states x(1) .. x(N), each (B, T, C), for the tokens idx (B, T).

        N is n_loop, or else the config's. loop_order="stack" sends x through all looped blocks N
        times. "block" sends it through each of them N times before the next, and the states are
        those of the last one. With a cache, idx continues the positions that it holds.
        """
        N = self.config.n_loop if n_loop is None else n_loop
        assert N >= 1, f"n_loop={N}"
        x = self.embed(idx, 0 if cache is None else cache.length)
        x = self.blocks(0, self.config.loop_start, x, cache)
        for group in range(len(self.groups)):
            x0 = x
            for n in range(1, N + 1):
                if self.checkpoint_loops and torch.is_grad_enabled() and n < N:
                    x = checkpoint(self.loop, x, x0, group, n, N, cache, use_reentrant=False)
                else:
                    x = self.loop(x, x0, group, n, N, cache)
                if group == len(self.groups) - 1:
                    yield x

    def loop(self, x, x0, group, n, N, cache=None):
        """Loop n of 1 .. N through a group of blocks: (B, T, C) -> (B, T, C).

        The group computes blocks(x) = x + g(x). The reviews of the paper leave open whether its f
        is g or blocks. In gated, sum and mean it is g, in outer it is blocks. x0 is the state
        before the first loop: these four do not need it, a variant of yours may.
        """
        start, end = self.groups[group]
        y = self.blocks(start, end, x, cache, n)    # y = x + g(x)
        residual = self.config.residual
        if self.gates is not None:                  # gated
            last = self.config.n_loop               # more loops use the last gate again
            a = self.gates[group, min(n, last) - 1]     # (C,)
            return x.lerp(y, a)                     # x + a * g(x), exact at a = 0 and a = 1
        if residual in ("sum", "gated"):            # a model of one loop has no gates
            return y                                # x + g(x)
        if residual == "mean":
            return x.lerp(y, 1 / N)                 # x + g(x) / N
        assert residual == "outer", f"GPT.loop has no equation for residual={residual}"
        return x + y                                # x + blocks(x)

    def embed(self, idx, start=0):
        """Tokens idx (B, T), the first of them at position start -> x(0), (B, T, C)."""
        end = start + idx.size(1)
        assert end <= self.config.block_size, f"{end} positions in {self.config.block_size}"
        x = self.wte(idx) + self.wpe.weight[start:end]
        return F.dropout(x, self.config.dropout, self.training)

    def blocks(self, start, end, x, cache=None, n=1):
        """Send a state (B, T, C) through h[start:end]. n tells the cache which loop this is."""
        for i in range(start, end):
            if cache is not None:
                cache.slot = n, i
            x = self.h[i](x, cache)
        return x

    def logits(self, x, cache=None, last=False):
        """A state (B, T, C) -> logits (B, T, V), or only those of the last position, (B, 1, V)."""
        x = self.blocks(self.config.loop_end, self.config.n_layer, x, cache)
        if last:
            x = x[:, [-1]]
        return F.linear(self.ln_f(x), self.wte.weight)

    def loss(self, x, targets):
        """A state (B, T, C) -> the mean loss in nats, (). Targets (B, T) of -1 do not count."""
        x = self.blocks(self.config.loop_end, self.config.n_layer, x)
        return self.head_loss(x, targets)

    def head_loss(self, x, targets):
        """The last norm, the logits and the loss: on its own so that train.py can compile it."""
        logits = F.linear(self.ln_f(x), self.wte.weight)    # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                               reduction="sum")
        return loss / (targets >= 0).sum().clamp(min=1)     # 0 if no target counts

    def loop_losses(self, idx, targets, n_loop=None):
        """The loss of the states after loop 1, 2, .. N: (N,)."""
        return torch.stack([self.loss(x, targets) for x in self.states(idx, n_loop)])


# ---- from tokens to more tokens ----

@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, n_loop=None, exit_kl=None):
    """Continue idx (B, T >= 1): yield each new token (B, 1), and how many loops it took.

    The prompt but its last token is read with all loops. From there on each token may stop early,
    see next_logits. The model sees the last block_size tokens. GPT-2's positions are absolute: once
    the window slides, every token in it has a new position. Then nothing is cached or skipped.
    """
    N = model.config.n_loop if n_loop is None else n_loop
    block_size = model.config.block_size
    cache, new = KVCache(block_size), idx
    if 1 < idx.size(1) <= block_size:
        next_logits(model, idx[:, :-1], N, cache)
        cache.length, new = idx.size(1) - 1, idx[:, -1:]
    for _ in range(max_new_tokens):
        if idx.size(1) > block_size:
            cache, new = None, idx[:, -block_size:]
        onednn = torch.backends.mkldnn.enabled
        if new.numel() == 1 and model.wte.weight.dtype == torch.bfloat16:
            torch.backends.mkldnn.enabled = False   # repacking a matrix takes longer than using it
        try:
            logits, loops = next_logits(model, new, N, cache, exit_kl)
        finally:
            torch.backends.mkldnn.enabled = onednn
        if cache is not None:
            cache.length += 1
        new = sample_token(logits[:, -1].float(), temperature, top_k)
        idx = torch.cat((idx, new), dim=1)
        yield new, loops


def next_logits(model, idx, N, cache=None, exit_kl=None):
    """Return the logits (B, 1, V) after idx (B, T), and the number of loops taken: N, or fewer.

    With a cache and exit_kl, a single token stops looping once KL(p(n) || p(n-1)) < exit_kl for the
    predictions p after loop n and the one before. Skipped loops get the keys and values of the last
    one taken. With loop_order="block" only the loops of the last block can be skipped.
    """
    may_exit = exit_kl is not None and cache is not None
    last_log_p = None
    for n, x in enumerate(model.states(idx, N, cache), start=1):
        if n < N and not may_exit:
            continue    # only the last state is needed
        # the blocks after the loop overwrite their keys and values each time
        logits = model.logits(x, cache, last=True)
        if may_exit:
            log_p = logits.float().log_softmax(-1)
            if n > 1:
                kl = F.kl_div(last_log_p, log_p, reduction="none", log_target=True).sum(-1)
                if kl.max().clamp(min=0) < exit_kl:     # rounding can make it negative
                    cache.skip(n, N, range(*model.groups[-1]))
                    break
            last_log_p = log_p
    return logits, n


def sample_token(logits, temperature, top_k=None):
    """Draw one token for each row of logits, among the top_k likeliest: (B, V) -> (B, 1)."""
    if temperature < 1e-5:  # 0, or nearly: the division would overflow
        return logits.argmax(-1, keepdim=True)
    tokens = None           # None: all, in their order
    if top_k is not None:
        logits, tokens = logits.topk(min(top_k, logits.size(-1)))
    probs = (logits / temperature).softmax(-1)
    if probs.device.type == "mps":  # where multinomial of torch 2.13 draws impossible tokens
        probs = probs.cpu()
    drawn = torch.multinomial(probs, num_samples=1).to(logits.device)
    return drawn if tokens is None else tokens.gather(-1, drawn)


# ---- what the scripts share ----

def flops_per_token(config, n_loop=None):
    """Floating-point operations to train on one token of a full context, forward and backward.

    A weight costs 2 forward and 4 backward each time it is used: a looped block N times, the head
    once. Attention adds two products of (T, T, C), counted whole although half is masked, as in
    PaLM (arXiv 2204.02311, appendix B), so that the figure can be set beside others'. The gates,
    which are no matrices, are left out like the norms.
    """
    c = config
    N = c.n_loop if n_loop is None else n_loop
    depth = c.n_layer + (c.loop_end - c.loop_start) * (N - 1)   # blocks on a token's way
    # a block has 12 matrices of C x C: 3 + 1 in attention, 4 + 4 in the MLP
    weights = depth * 12 * c.n_embd ** 2 + c.vocab_size * c.n_embd
    return 6 * weights + 12 * depth * c.block_size * c.n_embd


def pick_device(name):
    """Return the torch.device of that name, or the best for "auto". Exits if it does not work."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError):
        sys.exit(f"--device={name} does not work here: use --device=cpu")
    return torch.device(name)


def pick_dtype(name, device, n_embd):
    """Return the torch.dtype of that name. auto is bfloat16 where that is faster, else float32.

    bfloat16 is faster where the hardware computes in it, and the model is at least 256 wide.
    Narrower models gain little, and the puzzle's, which must be exact, is 128 wide.
    """
    if name != "auto":
        return getattr(torch, name)
    faster = False
    if n_embd >= 256 and device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    elif n_embd >= 256 and device.type == "cpu":
        has = torch.cpu.get_capabilities()      # the processor's; torch may be told to use less
        on_x86 = has.get("avx512_bf16") or has.get("amx_bf16")
        faster = has.get("bf16") or (on_x86 and torch.backends.cpu.get_cpu_capability() == "AVX512")
    return torch.bfloat16 if faster else torch.float32


def save_checkpoint(path, model, **state):
    """Write the model, its config and state (tensors, plain values, lists, dicts) to path.

    It is written beside path and renamed, so path is always a whole checkpoint.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(state | {"config": asdict(model.config), "model": model.state_dict()}, part)
    os.replace(part, path)


def load_checkpoint(path, device="cpu"):
    """Return (model, state) as they were saved, the model on device. Exits if path is none.

    Only tensors and plain values are loaded: no code in the file is ever run.
    """
    if not Path(path).is_file():
        folder = Path(path).parent
        sys.exit(f"no checkpoint {path}: train one with python train.py --out_dir={folder}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "config" not in state:
        sys.exit(f"{path} is not a checkpoint: name a ckpt.pt of train.py")
    model = GPT(GPTConfig(**state.pop("config")))
    model.load_state_dict(state.pop("model"))
    return model.to(device), state


# ---- weights from elsewhere ----

def load_pretrained(path):
    """Return (model, state) of our own ckpt.pt, or (model, None) of a model.safetensors.

    A model.safetensors is one of OpenAI's four or of their architecture: attention heads 64 wide,
    scores scaled by 1/sqrt(64) in every block, gelu by tanh, the GPT-2 vocabulary. The file does
    not state the first three, so they are assumed. Exits if it is something else.
    """
    if Path(path).suffix == ".pt":
        return load_checkpoint(path)
    weights = {}
    masks = (".attn.bias", ".attn.masked_bias")     # causal masks, despite their name
    for name, t in read_safetensors(path).items():
        name = name.removeprefix("transformer.")
        if not name.endswith(masks):
            # OpenAI's matrices are (in, out), nn.Linear's (out, in)
            weights[name] = t.t() if name.startswith("h.") and t.dim() == 2 else t
    usage = ("name a ckpt.pt of train.py, or a model.safetensors of OpenAI's architecture (heads "
             "64 wide, 50257 tokens, the head tied to wte)")
    wte, wpe = weights.get("wte.weight"), weights.get("wpe.weight")
    blocks = {name.split(".")[1] for name in weights if name.startswith("h.")}
    if wte is None or wpe is None or not blocks or wte.size(1) % 64:
        sys.exit(f"{path} is not a GPT-2: {usage}")
    if torch.equal(weights.get("lm_head.weight", wte), wte):    # tied, as it must be
        weights.pop("lm_head.weight", None)
    model = GPT(GPTConfig(block_size=len(wpe), n_layer=len(blocks), n_head=wte.size(1) // 64,
                          n_embd=wte.size(1), bias="ln_f.bias" in weights))
    known = MATRICES | NORMS_AND_GATES
    own = {name: p for name, p in model.state_dict().items() if layer_of(name) not in known}
    try:
        model.load_state_dict(own | weights)    # what a fork added starts as the fork made it
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        sys.exit(f"{path} is not a GPT-2 ({reason}): {usage}")
    return model, None


def change_layout(model, config):
    """Return a model of another config with the weights of model: more loops, a shorter context.

    New gates start at 1 for the first loop and at 0 for the others, so with them a looped GPT-2
    starts as GPT-2 exactly.
    """
    weights = model.state_dict()
    weights["wpe.weight"] = weights["wpe.weight"][:config.block_size]
    model = GPT(config)
    if model.gates is not None and "gates" not in weights:
        weights["gates"] = torch.zeros_like(model.gates)
        weights["gates"][:, 0] = 1
    model.load_state_dict(weights)
    return model


def read_safetensors(path):
    """Return {name: tensor}. The file: 8 bytes with the length of a header, the header, the data.

    The header is JSON, {name: {dtype, shape, data_offsets}}, the offsets count from its end.
    Returns {} for a file of another kind.
    """
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "U8": torch.uint8, "BOOL": torch.bool}
    file = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
    start = 8 + int.from_bytes(file[:8].numpy().tobytes(), "little")
    if start > len(file):
        return {}
    header = json.loads(file[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    if any(info["dtype"] not in dtypes for info in header.values()):
        return {}
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        raw = file[start + begin:start + end].clone()   # a copy, since a view must be aligned
        tensors[name] = raw.view(dtypes[info["dtype"]]).view(info["shape"])
    return tensors
