"""
GPT-2, and the Loop Neural Network made from it, in one file.

A GPT sends each token through its blocks once. A Loop Neural Network sends it through the same
blocks n_loop times. Each loop adds a predicted residual to the state, through a learned gate a_n:

    x(n) = x(n-1) + a_n * f(x(n-1)),    n = 1 .. n_loop

f is what the blocks add to the state, and a_n has a number for each channel. The parameters stay
the same, the compute grows. In this file that is one `for` in GPT.states, and the equation itself
in GPT.loop.

    model = GPT(GPTConfig(n_layer=6, n_loop=6))     # the paper's 81M model
    logits, loss = model(idx, targets)              # (B, T, V), ()

GPT-2 is Radford et al., Language Models are Unsupervised Multitask Learners, 2019. The loop is
Ng & Wang, Loop Neural Networks for Parameter Sharing, arXiv 2409.14199. Version 3 of the paper adds
the gate. We know that version from published reviews only.
"""
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

RESIDUALS = ("gated", "sum", "mean", "outer")   # variants of the equation, see GPT.loop
LOOP_ORDERS = ("stack", "block")                # see GPT.states


@dataclass
class GPTConfig:
    """The shape of a model, by default GPT-2's. ValueError: the numbers do not fit together."""
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

    @property
    def times_added(self):
        """How often a block's output is added in all: n_loop times, but mean adds 1/n_loop each."""
        return 1 if self.residual == "mean" else self.n_loop


class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C). Each position reads from itself and from those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, slot=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)       # (B, T, 3, nh, hs) -> 3 of (B, nh, T, hs)
        if cache is not None:
            # a KVCache, below: its slot (loop, block) has all S >= T positions, (B, nh, S, hs)
            k, v = cache.update(slot, k, v)
        dropout = self.dropout if self.training else 0.0
        # T > 1 comes with no cache or an empty one: S = T, a causal mask fits. T = 1 needs no mask
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

    def forward(self, x, cache=None, slot=None):
        x = x + self.attn(self.ln_1(x), cache, slot)
        x = x + self.mlp(self.ln_2(x))
        return x


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
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # what a block adds to x starts small: by 1/sqrt(2 * n_layer) as in GPT-2, and by
                # 1/times_added, since the loops add it again. Blocks outside are treated alike.
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer) / c.times_added)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

        # the groups of blocks that loop together: the whole stack, or each block on its own
        self.groups = [(c.loop_start, c.loop_end)]
        if c.loop_order == "block":
            self.groups = [(i, i + 1) for i in range(c.loop_start, c.loop_end)]
        # a gate for each group, loop and channel; a single loop has none, it is GPT-2
        self.gates = None
        if c.residual == "gated" and c.n_loop > 1:
            self.gates = nn.Parameter(torch.ones(len(self.groups), c.n_loop, c.n_embd))

    def forward(self, idx, targets=None, n_loop=None, cache=None):
        """Tokens idx (B, T) -> (logits, loss).

        With targets (B, T): logits (B, T, V) and the mean loss in nats, (), over the targets that
        are not -1. Without: the logits of the last position, (B, 1, V), and None. A KVCache holds
        the positions before idx. The caller advances it.
        """
        for state in self.states(idx, n_loop, cache):
            x = state   # the last one counts
        return self.predict(x, targets, cache)

    def states(self, idx, n_loop=None, cache=None):
        """Yield the states x(1) .. x(N), each (B, T, C), for the tokens idx (B, T).

        N is n_loop, or else the config's. loop_order="stack" sends x through all looped blocks N
        times. "block" sends it through each of them N times before the next, and the states are
        those of the last one. With a cache, idx continues the positions that it holds.
        """
        c = self.config
        N = c.n_loop if n_loop is None else n_loop
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        assert N >= 1, f"n_loop={N}"
        assert end <= c.block_size, f"{end} positions in a context of {c.block_size}"
        x = self.wte(idx) + self.wpe.weight[start:end]      # (B, T, C)
        x = F.dropout(x, c.dropout, self.training)
        x = self.blocks(0, c.loop_start, x, cache)
        for group in range(len(self.groups)):
            for n in range(N):
                if self.checkpoint_loops and torch.is_grad_enabled() and n < N - 1:
                    x = checkpoint(self.loop, x, group, n, N, cache, use_reentrant=False)
                else:
                    x = self.loop(x, group, n, N, cache)
                if group == len(self.groups) - 1:
                    yield x

    def loop(self, x, group, n, N, cache=None):
        """Loop n of N, counted from 0, through a group of blocks: (B, T, C) -> (B, T, C).

        The group computes blocks(x) = x + g(x). arXiv 2409.14199 leaves open whether its f is g or
        blocks. In gated, sum and mean it is g, in outer it is blocks.
        """
        start, end = self.groups[group]
        y = self.blocks(start, end, x, cache, n)    # blocks(x) = x + g(x)
        if self.gates is not None:                  # gated: x + a * g(x)
            last = self.gates.size(1) - 1           # extra loops use the last gate again
            a = self.gates[group, min(n, last)]     # (C,)
            return x.lerp(y, a)                     # lerp is exact at a = 0 and at a = 1
        if self.config.residual == "mean":
            return x.lerp(y, 1 / N)                 # x + g(x) / N
        if self.config.residual == "outer":
            return x + y                            # x + blocks(x)
        return y                                    # sum, or gated with one loop: x + g(x)

    def blocks(self, start, end, x, cache=None, n=0):
        """Send a state (B, T, C) through h[start:end]. n tells the cache which loop this is."""
        for i in range(start, end):
            x = self.h[i](x, cache, (n, i))
        return x

    def predict(self, x, targets=None, cache=None):
        """From a state (B, T, C), through the blocks after the loop, to (logits, loss)."""
        x = self.blocks(self.config.loop_end, self.config.n_layer, x, cache)
        if targets is None:
            x = x[:, [-1]]  # to sample, only the last position counts
        return self.head(x, targets)

    def head(self, x, targets=None):
        """The last norm, the logits and the loss: on its own so that train.py can compile it."""
        logits = F.linear(self.ln_f(x), self.wte.weight)    # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                               reduction="sum")
        return logits, loss / (targets >= 0).sum().clamp(min=1)     # 0 if no target counts

    def loop_losses(self, idx, targets, n_loop=None):
        """The loss in nats of the states after loop 1, 2, .. N: (N,)."""
        return torch.stack([self.predict(x, targets)[1] for x in self.states(idx, n_loop)])


# ---- from tokens to more tokens ----

class KVCache:
    """The keys and values of the positions so far, so that a new token costs one position.

    There is one entry for each (loop, block): a looped block sees another state at every loop.
    """

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0     # positions in every entry
        self.entries = {}   # (loop, block): (2, B, nh, max_length, hs)

    def update(self, slot, k, v):
        """Append k and v (B, nh, T, hs) to an entry and return all of it, (2, B, nh, S, hs)."""
        B, nh, T, hs = k.shape
        end = self.length + T
        assert end <= self.max_length, f"{end} positions in a cache of {self.max_length}"
        assert T == 1 or self.length == 0, "several positions after cached ones would need a mask"
        if slot not in self.entries:
            self.entries[slot] = k.new_empty(2, B, nh, self.max_length, hs)
        entry = self.entries[slot]
        entry[0, :, :, self.length:end] = k
        entry[1, :, :, self.length:end] = v
        return entry[:, :, :, :end]

    def advance(self, T):
        """Count T more positions, once all entries have them."""
        self.length += T


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, n_loop=None, forward=None):
    """Continue idx (B, T >= 1) and yield each new token (B, 1) as it is drawn.

    The model sees its last block_size tokens. GPT-2's positions are absolute: once the window
    slides, every token in it has a new position, so nothing can be cached and a token costs the
    whole window. Until then, forward replaces the model if given: sample.py's exits early.
    """
    block_size = model.config.block_size
    forward = forward or model
    cache = KVCache(block_size)
    new = idx
    for _ in range(max_new_tokens):
        if idx.size(1) > block_size:
            logits, _ = model(idx[:, -block_size:], n_loop=n_loop)
        else:
            logits, _ = forward(new, n_loop=n_loop, cache=cache)
            cache.advance(new.size(1))
        new = sample_token(logits[:, -1].float(), temperature, top_k)
        idx = torch.cat((idx, new), dim=1)
        yield new


def sample_token(logits, temperature, top_k=None):
    """Draw one token for each row of logits, among the top_k likeliest: (B, V) -> (B, 1).

    A temperature of 0, or so small that the division would overflow, takes the likeliest.
    """
    if temperature < 1e-5:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = (logits / temperature).softmax(-1)
    if probs.device.type == "mps":  # where multinomial of torch 2.13 draws impossible tokens
        probs = probs.cpu()
    return torch.multinomial(probs, num_samples=1).to(logits.device)


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


def save_checkpoint(path, model, **state):
    """Write the model, its config and state (tensors, plain values, lists, dicts) to path.

    It is written beside path and renamed, so path is always a whole checkpoint.
    """
    part = path.with_name(path.name + ".tmp")
    torch.save(state | {"config": asdict(model.config), "model": model.state_dict()}, part)
    for _ in range(20):
        try:
            return os.replace(part, path)
        except PermissionError:  # on Windows, while another process reads path
            time.sleep(0.1)
    os.replace(part, path)


def load_checkpoint(path, device="cpu"):
    """Return (model, state) as they were saved, the model on device. Exits if there is no file.

    Only tensors and plain values are loaded: no code in the file is ever run.
    """
    if not Path(path).is_file():
        sys.exit(f"no checkpoint {path}: train one with python train.py")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**state.pop("config")))
    model.load_state_dict(state.pop("model"))
    return model.to(device), state


# ---- OpenAI's weights ----

def from_pretrained(shape, weights, **overrides):
    """Return the GPT-2 that read_gpt2 has read, in any loop layout.

    overrides are GPTConfig's fields, such as n_loop or a shorter block_size. Gates start at 1 for
    the first loop and at 0 for the others, so with them a looped GPT-2 starts as GPT-2 exactly.
    """
    model = GPT(GPTConfig(**(shape | overrides)))
    weights = weights | {"wpe.weight": weights["wpe.weight"][:model.config.block_size]}
    if model.gates is not None:
        weights["gates"] = torch.zeros_like(model.gates)
        weights["gates"][:, 0] = 1
    model.load_state_dict(weights)
    return model


def read_gpt2(path):
    """Return (shape, weights) of a model.safetensors: GPTConfig's fields, and GPT's state_dict.

    It is meant for OpenAI's four and for models of their architecture: attention heads 64 wide,
    scores scaled by 1/sqrt(64) in every block, gelu by tanh. The file does not state these, so
    they are assumed. Exits if there is an lm_head.weight other than wte.weight.
    """
    weights = {}
    masks = (".attn.bias", ".attn.masked_bias")     # causal masks, despite their name
    for name, t in read_safetensors(path).items():
        name = name.removeprefix("transformer.")
        if not name.endswith(masks):
            # OpenAI's matrices are (in, out), nn.Linear's (out, in)
            weights[name] = t.t() if name.startswith("h.") and t.dim() == 2 else t
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, weights["wte.weight"]):
        sys.exit(f"{path} has an lm_head.weight other than wte.weight: it is not a GPT-2")
    vocab_size, n_embd = weights["wte.weight"].shape
    n_layer = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("h."))
    shape = dict(vocab_size=vocab_size, n_embd=n_embd, n_head=n_embd // 64, n_layer=n_layer,
                 block_size=len(weights["wpe.weight"]), bias="ln_f.bias" in weights)
    return shape, weights


def read_safetensors(path):
    """Return {name: tensor}. The file: 8 bytes with the length of a header, the header, the data.

    The header is JSON, {name: {dtype, shape, data_offsets}}, the offsets count from its end.
    """
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "U8": torch.uint8, "BOOL": torch.bool}
    file = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
    start = 8 + int.from_bytes(file[:8].numpy().tobytes(), "little")
    header = json.loads(file[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        raw = file[start + begin:start + end].clone()   # a copy, since a view must be aligned
        tensors[name] = raw.view(dtypes[info["dtype"]]).view(info["shape"])
    return tensors
