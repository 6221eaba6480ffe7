"""
GPT-2, and the Loop Neural Network made from it, in one file.

A GPT sends each token through a stack of transformer blocks once. A Loop Neural Network sends it
through the same blocks n_loop times, and each pass adds a residual to the state:

    x(n) = x(n-1) + f(x(n-1)),    n = 1 .. n_loop

The parameters stay the same, the compute grows. In this file that is one `for` in GPT.states, and
the equation itself in GPT.loop.

    model = GPT(GPTConfig(n_layer=6, n_loop=6))     # the paper's 81M model
    logits, loss = model(idx, targets)              # (B, T, V), ()

Sources
    GPT-2       Radford et al., Language Models are Unsupervised Multitask Learners, 2019
    the loop    Ng & Wang, Loop Neural Networks for Parameter Sharing, arXiv 2409.14199
    `scaled`    arXiv 2606.18524
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

RESIDUALS = ("sum", "mean", "outer", "scaled")  # the readings of the equation, see GPT.loop
OPTIMIZERS = ("adamw", "muon")


@dataclass
class GPTConfig:
    """The shape of a model, by default GPT-2's. Raises ValueError if the fields do not fit."""
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_loop: int = 1              # how often the blocks h[loop_start:loop_end] are applied
    loop_start: int = 0
    loop_end: int | None = None  # None: after the last block
    residual: str = "sum"
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
        if self.n_loop < 1:
            raise ValueError(f"n_loop={self.n_loop} must be at least 1")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={self.residual} must be one of {', '.join(RESIDUALS)}")


class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C). Each position reads from itself and from those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, key=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)       # (B, T, 3, nh, hs) -> 3 of (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(key, k, v)         # (B, nh, S, hs), the S >= T positions so far
        dropout = self.dropout if self.training else 0.0
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
    """x -> x + g(x), both (B, T, C): attention, then the MLP, each adds its output to x.

    scale multiplies both outputs. It is a scalar tensor, since torch.compile would compile a block
    again for every new number.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, scale, cache=None, key=None):
        # x + scale * attn(ln_1(x)), then x + scale * mlp(ln_2(x))
        x = torch.addcmul(x, self.attn(self.ln_1(x), cache, key), scale)
        return torch.addcmul(x, self.mlp(self.ln_2(x)), scale)


class GPT(nn.Module):
    """GPT-2 with a loop in it. Parameters have GPT-2's names, and the head is wte itself."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_loops = False  # True: backward recomputes all loops but the last
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # scale the residual projections by 1/sqrt(2 * n_layer), as GPT-2 does
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def blocks(self, start, end, x, scale=1.0, cache=None, n=0):
        """Send a state (B, T, C) through h[start:end]. n tells the cache which loop this is."""
        scale = torch.full((), scale, device=x.device)
        for i in range(start, end):
            x = self.h[i](x, scale, cache, (n, i))
        return x

    def loop(self, x, n, N, cache=None):
        """Loop n of N, counted from 0: a state -> the next one, both (B, T, C).

        One pass through the looped blocks is stack(x) = x + g(x). arXiv 2409.14199 asks for
        x(n) = x(n-1) + f(x(n-1)) and leaves f open. These are the ways to read it.
        """
        c = self.config
        scale = 1 / N if c.residual == "scaled" else 1.0    # of every attention and MLP output
        y = self.blocks(c.loop_start, c.loop_end, x, scale, cache, n)   # stack(x)
        if c.residual == "mean":
            # x(n) = x(n-1) + g(x(n-1)) / N      f = g / N, an Euler step of size 1/N
            return x.lerp(y, 1 / N)
        if c.residual == "outer":
            # x(n) = x(n-1) + stack(x(n-1))      f = stack, the equation to the letter
            return x + y
        # sum
        # x(n) = x(n-1) + g(x(n-1))              f = g, the residual that the blocks have anyway
        # scaled: the same, with every attention and MLP output inside g times 1/N
        return y

    def states(self, idx, n_loop=None, cache=None):
        """Yield the states x(1) .. x(N), each (B, T, C), for the tokens idx (B, T).

        N is n_loop, or else the config's. With a cache, idx continues the positions that it holds.
        """
        c = self.config
        N = c.n_loop if n_loop is None else n_loop
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        assert N >= 1, f"n_loop={N}"
        assert end <= c.block_size, f"{end} positions in a context of {c.block_size}"
        x = self.wte(idx) + self.wpe.weight[start:end]      # (B, T, C)
        x = F.dropout(x, c.dropout, self.training)
        x = self.blocks(0, c.loop_start, x, cache=cache)
        for n in range(N):
            if self.checkpoint_loops and torch.is_grad_enabled() and n < N - 1:
                x = checkpoint(self.loop, x, n, N, cache, use_reentrant=False)
            else:
                x = self.loop(x, n, N, cache)
            yield x

    def readout(self, x, targets=None, cache=None):
        """(logits, loss) from a state (B, T, C), as forward returns them."""
        x = self.blocks(self.config.loop_end, self.config.n_layer, x, cache=cache)
        if targets is None:
            x = x[:, [-1]]  # to sample, only the last position counts
        return self.head(x, targets)

    def head(self, x, targets=None):
        """The end of readout, on its own so that compile_blocks can compile it."""
        logits = F.linear(self.ln_f(x), self.wte.weight)    # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward(self, idx, targets=None, n_loop=None, cache=None):
        """Tokens idx (B, T) -> (logits, loss).

        With targets (B, T): logits (B, T, V) and their mean loss in nats, (). Without: the logits
        of the last position, (B, 1, V), and None. n_loop overrides the config's for this call.
        """
        *_, x = self.states(idx, n_loop, cache)  # only the last state counts
        return self.readout(x, targets, cache)

    def loop_losses(self, idx, targets, n_loop=None):
        """The loss in nats if the model had stopped after loop 1, 2, .. N: (N,)."""
        return torch.stack([self.readout(x, targets)[1] for x in self.states(idx, n_loop)])


# ---- from tokens to more tokens ----

class KVCache:
    """The keys and values of the positions so far, so that a new token costs one position.

    There is one entry for each (loop, block): a looped block sees another state at every loop.
    generate advances length after a pass, when all blocks have stored theirs.
    """

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0     # positions in every entry
        self.entries = {}   # (loop, block): (2, B, nh, max_length, hs)

    def update(self, key, k, v):
        """Append k and v (B, nh, T, hs) to an entry and return all of it, (2, B, nh, S, hs)."""
        B, nh, T, hs = k.shape
        end = self.length + T
        assert end <= self.max_length, f"{end} positions in a cache of {self.max_length}"
        assert T == 1 or self.length == 0, "several positions after cached ones would need a mask"
        if key not in self.entries:
            self.entries[key] = k.new_empty(2, B, nh, self.max_length, hs)
        entry = self.entries[key]
        entry[0, :, :, self.length:end] = k
        entry[1, :, :, self.length:end] = v
        return entry[:, :, :, :end]


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, n_loop=None, forward=None):
    """Continue idx (B, T >= 1) and yield each new token (B, 1) as it is drawn.

    temperature 0 takes the likeliest token, top_k draws among the k likeliest. The model sees its
    last block_size tokens. GPT-2's positions are absolute: once the window slides, every token in
    it has a new position, so nothing can be cached and a token costs the whole window.
    forward is called in place of the model while there is a cache (sample.py exits early there).
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
            cache.length += new.size(1)
        new = draw(logits[:, -1].float(), temperature, top_k)
        idx = torch.cat((idx, new), dim=1)
        yield new


def draw(logits, temperature, top_k):
    """Draw one token for each row of logits: (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -math.inf)
    return torch.multinomial((logits / temperature).softmax(-1), num_samples=1)


# ---- what training needs ----

def configure_optimizers(model, name, learning_rate, weight_decay):
    """Return a list of optimizers: AdamW; or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay is for matrices only. Muon's update is scaled to the size of AdamW's
    (arXiv 2502.16982), so one learning rate serves both.
    """
    assert name in OPTIMIZERS, name
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    decayed = [model.wte.weight, model.wpe.weight]
    if name == "adamw":
        decayed += matrices
    groups = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95),
                              weight_decay=weight_decay, fused=True)
    if name == "adamw":
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay,
                            adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def flops_per_token(config, n_loop=None):
    """Floating-point operations to train on one token of a full context, forward and backward.

    A weight costs 2 forward and 4 backward each time it is used: a looped block N times, the head
    once. Attention adds two products of (T, T, C), counted whole although half is masked, as in
    PaLM (arXiv 2204.02311, appendix B), so that the figure can be set beside others'.
    """
    c = config
    # how many blocks a token passes
    passes = c.n_layer + (c.loop_end - c.loop_start) * ((n_loop or c.n_loop) - 1)
    weights = passes * 12 * c.n_embd ** 2 + c.vocab_size * c.n_embd
    return 6 * weights + 12 * passes * c.block_size * c.n_embd


def compile_blocks(model, **options):
    """Compile each block and the head, which do nearly all the work.

    One block's code serves every block at every loop: 6 x 6 starts as fast as 6 x 1, and a change
    of n_loop compiles nothing. In the compiled head the softmax (B, T, V) never exists in full.
    """
    for block in model.h:
        block.compile(**options)
    model.head = torch.compile(model.head, **options)


def pick_device(name):
    """Return the torch.device of that name, or the best for "auto". Exits if it does not work."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError):
        sys.exit(f"--device={name} does not work here: use --device=cpu")
    return torch.device(name)


# ---- checkpoints, and OpenAI's weights ----

def save_checkpoint(path, model, **state):
    """Write the model, its config and state (tensors, plain values, lists, dicts) to path.

    A temporary file is renamed at the end, so path is always a whole checkpoint.
    """
    part = path.with_name(path.name + ".tmp")
    state |= {"config": asdict(model.config), "model": model.state_dict()}
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either when the disk is full
        sys.exit(f"could not write {path}, what was there before is kept: {error}")
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu"):
    """Return (model, state) as they were saved, the model on device.

    Only tensors and plain values are loaded: no code in the file is ever run.
    """
    if not Path(path).is_file():
        sys.exit(f"no checkpoint {path}: train one with python train.py")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = state.pop("config"), state.pop("model")
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).strip().split("\n")[0][:100]
        sys.exit(f"{path} is no checkpoint ({reason}): train another with python train.py")
    model = GPT(GPTConfig(**config))
    model.load_state_dict(weights)
    return model.to(device), state


def from_pretrained(path, layers=None, **overrides):
    """Return OpenAI's GPT-2 from a model.safetensors, in any loop layout.

    layers are the numbers of the blocks to take, None takes all. overrides are GPTConfig's fields,
    such as n_loop or a shorter block_size. Exits if the file is not a GPT-2 of that shape.
    """
    shape, weights = read_gpt2(path, layers)
    config = GPTConfig(**shape | overrides)
    for name, value in shape.items():
        ours = getattr(config, name)
        if ours != value and not (name == "block_size" and ours < value):
            sys.exit(f"{path} has {name}={value}, not {ours}: leave --{name} out"
                     + (", or choose blocks with --init_layers" if name == "n_layer" else ""))
    model = GPT(config)
    weights["wpe.weight"] = weights["wpe.weight"][:config.block_size]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        sys.exit(f"{path} is not a GPT-2: {' '.join(str(error).split())[:200]}")
    return model


def read_gpt2(path, layers=None):
    """Return (shape, weights): GPTConfig's fields that the file decides, and GPT's state_dict."""
    weights = {}
    for name, t in read_safetensors(path).items():
        name = name.removeprefix("transformer.")
        # leave out the masks, and the head, which is wte
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            # OpenAI's matrices are (in, out), nn.Linear's (out, in)
            weights[name] = t.t() if name.startswith("h.") and t.dim() == 2 else t
    found = sorted({int(name.split(".")[1]) for name in weights if name.startswith("h.")})
    if not found or not {"wte.weight", "wpe.weight"} <= weights.keys():
        sys.exit(f"{path} is not a GPT-2: it lacks h, wte.weight or wpe.weight")
    vocab_size, n_embd = weights["wte.weight"].shape
    if n_embd % 64:
        sys.exit(f"{path} is not a GPT-2: its heads are 64 wide, {n_embd} is no multiple")
    layers = found if layers is None else layers
    if not set(layers) <= set(found):
        sys.exit(f"{path} has the blocks 0 to {found[-1]}, not all of {layers}")
    chosen = {name: t for name, t in weights.items() if not name.startswith("h.")}
    for i, layer in enumerate(layers):
        old, new = f"h.{layer}.", f"h.{i}."
        chosen |= {name.replace(old, new): t for name, t in weights.items() if name.startswith(old)}
    shape = {"vocab_size": vocab_size, "n_embd": n_embd, "n_head": n_embd // 64,
             "block_size": len(weights["wpe.weight"]), "bias": "ln_f.bias" in weights,
             "n_layer": len(layers)}
    return shape, chosen


def read_safetensors(path):
    """Return {name: tensor} of a .safetensors file. Exits if it is damaged.

    The format: 8 bytes with the length of a header, the header in JSON, {name: {dtype, shape,
    data_offsets}}, and the data.
    """
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
              "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}
    size, tensors = os.path.getsize(path), {}
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(start, size) - 8))
        header.pop("__metadata__", None)
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)[start:]
        for name, info in header.items():
            begin, end = info["data_offsets"]
            raw = data[begin:end].clone()  # a copy: another dtype's view must be aligned
            tensors[name] = raw.view(dtypes[info["dtype"]]).view(info["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        sys.exit(f"{path} is no whole .safetensors file ({error}): name gpt2, or another file")
    return tensors
