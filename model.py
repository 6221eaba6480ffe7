"""
GPT-2, and the Loop Neural Network made from it, in one file.

A GPT sends each token through a stack of blocks once. A Loop Neural Network sends it through the same
blocks n_loop times, each pass adding a residual to the state: x(n) = x(n-1) + f(x(n-1)). Parameters stay
the same, compute grows. In this file that is one field of GPTConfig and one `for` in GPT.states.

    model = GPT(GPTConfig(n_layer=6, n_loop=6))     # the paper's 81M model
    logits, loss = model(idx, targets)              # (B, T, V), ()
    model = GPT.from_pretrained("gpt2", n_loop=2)   # OpenAI's weights, looped

Sources
  GPT-2    Radford et al., Language Models are Unsupervised Multitask Learners, 2019
  looping  Ng & Wang, Loop Neural Networks for Parameter Sharing, arXiv 2409.14199
  scaled   arXiv 2606.18524, on why a shared branch wants the factor 1/n_loop
"""
import json
import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

RESIDUALS = ("sum", "mean", "outer", "scaled")  # the readings of the paper's equation, see GPT.loop
OPTIMIZERS = ("adamw", "muon")


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2's. Raises ValueError for a shape that cannot be."""
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_loop: int = 1             # how often blocks h[loop_start:loop_end] are applied
    loop_start: int = 0
    loop_end: int | None = None  # None: the last block
    residual: str = "sum"
    dropout: float = 0.0
    bias: bool = True

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_loop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.loop_end is None:
            self.loop_end = self.n_layer
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if not 0 <= self.loop_start < self.loop_end <= self.n_layer:
            raise ValueError(f"loop_start={self.loop_start}, loop_end={self.loop_end} must satisfy "
                             f"0 <= loop_start < loop_end <= n_layer={self.n_layer}")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={self.residual!r} must be one of {', '.join(RESIDUALS)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")


class KVCache:
    """The keys and values of the positions seen so far, so that a new token costs one position.

    One entry for each (loop, block): a looped block sees another state at every loop, so its keys differ too.
    With fixed_shapes a token attends to all max_length positions under a mask, so that every token runs the same
    kernels on the same addresses: what a CUDA graph needs.
    """

    def __init__(self, max_length, device, fixed_shapes=False):
        self.max_length = max_length
        self.length = 0  # positions that every entry holds
        self.entries = {}
        self.fixed_shapes = fixed_shapes
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the next token, for fixed shapes
        self.all_positions = torch.arange(max_length, device=device)

    def advance(self, T):
        self.length += T
        self.position.fill_(self.length)

    def positions(self, T):
        """Where the next T tokens stand, (T,)."""
        if self.fixed_shapes and T == 1:
            return self.position
        return self.all_positions[self.length:self.length + T]

    def update(self, entry, kv):
        """Append keys and values kv (2, B, nh, T, hs) to an entry; return all of it, (2, B, nh, S, hs), and its mask."""
        T = kv.size(3)
        if entry not in self.entries:
            self.entries[entry] = kv.new_zeros(*kv.shape[:3], self.max_length, kv.size(4))
            if self.fixed_shapes:
                torch._dynamo.mark_static_address(self.entries[entry])
        held = self.entries[entry]
        if self.fixed_shapes and T == 1:
            held.index_copy_(3, self.position, kv)
            return held, self.all_positions[None] <= self.position  # mask: (1, S)
        end = self.length + T
        assert end <= self.max_length, f"{end} positions in a cache of {self.max_length}"
        assert T == 1 or self.length == 0, f"{T} new positions over {self.length} cached ones would need a mask"
        held[:, :, :, self.length:end] = kv
        return held[:, :, :, :end], None

    def fill(self, loops, N, blocks):
        """Where the newest token left after loops (B,) of N, its keys and values at the loops it skipped are those of its last."""
        for n in range(int(loops.min()), N):
            left = (loops <= n)[:, None, None]
            for i in blocks:
                last, held = self.entries[n - 1, i][:, :, :, self.length], self.entries[n, i][:, :, :, self.length]  # (2, B, nh, hs)
                held.copy_(torch.where(left, last, held))


def linear(x, weight, bias=None):
    """F.linear, x (B, T, I) and weight (O, I) -> (B, T, O), but for a few tokens on a CPU as a batch of products.

    A matrix that meets few tokens costs its reading from memory. MKL reads a single one with one core and at a
    third of the speed that it has for a batch: 124M decodes 2x as fast so.
    """
    tokens, (O, I) = x.size(0) * x.size(1), weight.shape
    if tokens > 4 or O * I < 100_000 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    parts = max(2, torch.get_num_threads())
    rows = O // parts  # of a part; what is left over comes apart
    y = torch.bmm(weight[:parts * rows].view(parts, rows, I), x.reshape(1, tokens, I).mT.expand(parts, -1, -1))
    y = y.permute(2, 0, 1).reshape(*x.shape[:2], parts * rows)  # (parts, rows, B * T) -> (B, T, parts * rows)
    if parts * rows < O:
        y = torch.cat((y, F.linear(x, weight[parts * rows:])), dim=-1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    """(B, T, C) -> (B, T, C), each position from itself and those before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None, entry=None):
        B, T, C = x.shape
        # (B, T, 3C) -> (3, B, nh, T, hs)
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, kv, mask = qkv[0], qkv[1:], None
        if cache is not None:
            kv, mask = cache.update(entry, kv)  # (2, B, nh, S, hs), S >= T
        k, v = kv
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1, dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), each position on its own."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """x (B, T, C) -> x + g(x): attention and MLP add their outputs to the residual stream, times scale if given.

    scale is a tensor (): a number would have the block compiled again for each of its values.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, scale=None, cache=None, entry=None):
        y = self.attn(self.ln_1(x), cache, entry)
        x = x + y if scale is None else torch.addcmul(x, y, scale)
        y = self.mlp(self.ln_2(x))
        return x + y if scale is None else torch.addcmul(x, y, scale)


class GPT(nn.Module):
    """GPT-2 with a loop in it. Parameters carry GPT-2's names; the head is wte itself (tied)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.compiled = False
        self.decode = None  # forward for one token, if compile_decoding made one
        self.checkpoint_loops = False  # backward recomputes each loop: less memory, more time
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # what is added to the residual stream 2 n_layer times starts smaller by the root of that
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def loop(self, x, N, n, cache=None):
        """x(n-1) -> x(n), both (B, T, C), of N loops; n counts from 0 and names the cache's entries."""
        # stack(y) = y + g(y) is one pass through the looped blocks. arXiv 2409.14199 asks for
        # x(n) = x(n-1) + f(x(n-1)) and leaves open what f is, so here are the ways to read it:
        c, y = self.config, x
        # scaled: as sum, but each attention and MLP output joins the stream times 1/N
        scale = torch.full((), 1 / N, device=x.device) if c.residual == "scaled" else None
        for i in range(c.loop_start, c.loop_end):
            y = self.h[i](y, scale, cache, (n, i))
        if c.residual == "mean":
            # mean:   x(n) = x(n-1) + g(x(n-1)) / N     f = g/N, an Euler step: N of them make one time unit
            return x.lerp(y, 1 / N)
        if c.residual == "outer":
            # outer:  x(n) = x(n-1) + stack(x(n-1))     f = stack, the equation to the letter
            return x + y
        # sum:    x(n) = x(n-1) + g(x(n-1))         f = g, the residual that the blocks already are
        return y

    def states(self, idx, n_loop=None, cache=None):
        """Yield the state after each loop, x(1), x(2), ... x(N), each (B, T, C), for tokens idx (B, T).

        N is n_loop, or the config's. With a cache, idx continues the positions that it holds.
        """
        c, T = self.config, idx.size(1)
        N = c.n_loop if n_loop is None else n_loop
        if N < 1:
            raise ValueError(f"n_loop={N} must be at least 1")
        assert T <= c.block_size, f"{T} positions do not fit block_size={c.block_size}"
        x = self.wte(idx) + self.wpe(cache.positions(T) if cache is not None else torch.arange(T, device=idx.device))  # (B, T, C)
        x = F.dropout(x, c.dropout, self.training)
        for i in range(c.loop_start):
            x = self.h[i](x, None, cache, (0, i))
        for n in range(N):
            if self.checkpoint_loops and torch.is_grad_enabled() and n < N - 1:
                # keep x alone and compute the rest again when going backward; not for the last, which is needed at once
                x = checkpoint(self.loop, x, N, n, use_reentrant=False)
            else:
                x = self.loop(x, N, n, cache)
            yield x

    def readout(self, x, targets=None, cache=None):
        """From a state (B, T, C) to forward's (logits, loss): the blocks after the loop, then the head."""
        for i in range(self.config.loop_end, self.config.n_layer):
            x = self.h[i](x, None, cache, (0, i))
        return self.head(x if targets is not None else x[:, [-1]], targets)

    def head(self, x, targets=None):
        logits = linear(self.ln_f(x), self.wte.weight)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward(self, idx, targets=None, n_loop=None, cache=None):
        """Tokens idx (B, T) -> (logits, loss).

        With targets (B, T): the logits of all positions (B, T, V) and their mean loss in nats. Without: the
        logits of the last position (B, 1, V) and None. n_loop, if given, is the depth of this call.
        Raises ValueError if n_loop < 1.
        """
        for x in self.states(idx, n_loop, cache):
            pass  # here only the last state counts
        return self.readout(x, targets, cache)

    def loop_losses(self, idx, targets, n_loop=None):
        """The loss had the model stopped after loop 1, 2, ... N, in nats: (N,). The last one is forward's."""
        return torch.stack([self.readout(x, targets)[1] for x in self.states(idx, n_loop)])

    def settle(self, idx, cache, exit_kl, n_loop=None):
        """forward for one token of each sequence, idx (B, 1), that loops only until its prediction has settled.

        A token leaves after loop n >= 2 if KL(p(n) || p(n-1)) < exit_kl, in nats. At the loops it skipped, later tokens
        find the keys and values of its last. Returns its logits (B, 1, V) and how many loops it took (B,).
        """
        loops, going = torch.zeros_like(idx[:, 0]), torch.ones_like(idx[:, 0], dtype=torch.bool)
        for n, y in enumerate(self.states(idx, n_loop, cache), start=1):
            x = y if n == 1 else torch.where(going[:, None, None], y, x)  # of a batch, those that left stay as they were
            logits = self.readout(x, cache=cache)[0]  # the blocks after the loop overwrite their entries, so the last x's remain
            p = logits.float().log_softmax(-1)
            loops += going
            if n > 1:
                going &= F.kl_div(before, p, reduction="none", log_target=True).sum((1, 2)) >= exit_kl
                if not going.any():
                    break
            before = p
        c = self.config
        cache.fill(loops, c.n_loop if n_loop is None else n_loop, range(c.loop_start, c.loop_end))
        return logits, loops

    def compile_parts(self, **options):
        """torch.compile for a block and for the head, which is nearly all there is.

        One block's code serves every block at every loop, so that 6 x 6 starts as fast as 6 x 1 and a change of
        n_loop compiles nothing. In the compiled head the softmax of the loss never exists in full (B, T, V).
        """
        self.compiled = True
        for block in self.h:
            block.compile(**options)
        self.head = torch.compile(self.head, **options)

    def compile_decoding(self, **options):
        """torch.compile for a token of stream; on a GPU its kernels then run as one CUDA graph, without Python between."""
        self.compiled = True
        self.decode = torch.compile(self.forward, **(options or dict(mode="reduce-overhead", fullgraph=True)))

    # ---- from tokens to more tokens ----

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_loop=None, exit_kl=None, loops=None):
        """Continue idx (B, T >= 1) and yield each new token as it is drawn, (B, 1).

        temperature 0 takes the likeliest token; top_k draws among the k likeliest. The context is the last
        block_size tokens. As long as all fit, a new token costs one position. Beyond that the window slides:
        GPT-2's positions are absolute, so each token in it changes place, no key or value can be kept, and a
        token costs the whole window, as it would without a cache. Call eval() first if the model has dropout.
        With exit_kl each token loops until it has settled, except where many positions are computed at once: the
        prompt, and the sliding window, go through all loops. A list `loops` is given how many each token took, (B,).
        """
        cache, new = KVCache(self.config.block_size, idx.device, fixed_shapes=self.decode is not None), idx
        for _ in range(max_new_tokens):
            if idx.size(1) > self.config.block_size:
                cache, new = None, idx[:, -self.config.block_size:]
            compiled = self.decode is not None and cache is not None and cache.length > 0
            # what was compiled for training is not for lengths that change all the time
            with torch.compiler.set_stance("default" if compiled else "force_eager") if self.compiled else nullcontext():
                if exit_kl is not None and cache is not None and cache.length > 0:
                    logits, took = self.settle(new, cache, exit_kl, n_loop)
                else:
                    logits, _ = (self.decode if compiled else self)(new, n_loop=n_loop, cache=cache)
                    took = torch.full_like(idx[:, 0], self.config.n_loop if n_loop is None else n_loop)
            logits = logits[:, -1].float()  # (B, V)
            if loops is not None:
                loops.append(took)
            if cache is not None:
                cache.advance(new.size(1))
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                new = torch.multinomial((logits / temperature).softmax(-1), num_samples=1)
            idx = torch.cat((idx, new), dim=1)
            yield new

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_loop=None, exit_kl=None):
        """idx (B, T) -> (B, T + max_new_tokens); see stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, n_loop, exit_kl)], dim=1)

    # ---- what training needs ----

    def configure_optimizer(self, name, learning_rate, weight_decay, betas):
        """The list of optimizers to step together: AdamW, or Muon for the blocks' matrices and AdamW for the rest.

        Weight decay is for matrices only. Muon's update is scaled to the size that AdamW's would have
        (arXiv 2502.16982), so one learning rate serves both.
        """
        assert name in OPTIMIZERS, name
        embeddings = [self.wte.weight, self.wpe.weight]
        matrices = [p for p in self.h.parameters() if p.dim() == 2]
        vectors = [p for p in self.parameters() if p.dim() == 1]
        decayed = embeddings if name == "muon" else embeddings + matrices
        fused = self.wte.weight.device.type in ("cpu", "cuda", "mps")
        optimizers = [torch.optim.AdamW([dict(params=decayed), dict(params=vectors, weight_decay=0.0)],
                                        lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused)]
        if name == "muon":
            optimizers.append(torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay,
                                               adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def flops_per_token(self, n_loop=None):
        """Floating-point operations to train on one token of a full context, forward and backward.

        Each weight of a matrix costs 2 forward and 4 backward each time it is used: a looped block n_loop
        times, the head once. Attention adds 2 products of (T, T, C), counted whole though half is masked, as
        in PaLM (arXiv 2204.02311, appendix B), so that the figure can be set beside others'.
        """
        c = self.config
        looped = c.loop_end - c.loop_start
        passes = c.n_layer + looped * ((c.n_loop if n_loop is None else n_loop) - 1)  # through a block
        block = sum(p.numel() for p in self.h[0].parameters() if p.dim() == 2)
        return 6 * (passes * block + self.wte.weight.numel()) + 12 * passes * c.block_size * c.n_embd

    # ---- weights from elsewhere ----

    @classmethod
    def from_pretrained(cls, name_or_path, layers=None, **overrides):
        """OpenAI's GPT-2, by name (downloaded once) or as the path of a model.safetensors.

        The file says all sizes but the number of heads, which are 64 wide unless n_head is given. layers are the
        numbers of the blocks to take, [0, 2, 4] makes three; None takes all. overrides are GPTConfig's fields:
        any loop layout, dropout, or a shorter block_size. Raises ValueError for a file that is damaged or not a
        GPT-2 and for layers or overrides that contradict it, OSError if it cannot be had.
        """
        if name_or_path in GPT2_WEIGHTS:
            from prepare import download  # here, so that a fork can take model.py alone
            revision, sha256 = GPT2_WEIGHTS[name_or_path]
            path = download(GPT2_URL.format(name=name_or_path, revision=revision), sha256,
                            "without a network give the path of a model.safetensors that you have")
        else:
            path = name_or_path
        tensors = {name.removeprefix("transformer."): t for name, t in read_safetensors(path).items()
                   if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))}  # masks; tied head
        try:
            vocab_size, n_embd = tensors["wte.weight"].shape
            block_size, _ = tensors["wpe.weight"].shape
        except (KeyError, ValueError):
            raise ValueError(f"{path}: not a GPT-2, it lacks a matrix wte.weight or wpe.weight") from None
        n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
        if layers is not None:
            if not layers or not set(layers) <= set(range(n_layer)):
                raise ValueError(f"init_layers={','.join(map(str, layers))} must name blocks of {path}, which has 0 to {n_layer - 1}")
            n_layer = len(layers)
            taken = {f"h.{i}.{name.split('.', 2)[2]}": t for i, layer in enumerate(layers) for name, t in tensors.items() if name.startswith(f"h.{layer}.")}
            tensors = {name: t for name, t in tensors.items() if not name.startswith("h.")} | taken
        sizes = dict(vocab_size=vocab_size, n_embd=n_embd, bias="ln_f.bias" in tensors, n_layer=n_layer)
        for key in sizes.keys() & overrides.keys():
            if overrides[key] != sizes[key]:
                raise ValueError(f"{key}={overrides[key]} contradicts {path}, which has {key}={sizes[key]}")
        config = GPTConfig(**{"block_size": block_size, "n_head": max(1, n_embd // 64), **sizes, **overrides})
        if config.block_size > block_size:
            raise ValueError(f"block_size={config.block_size} is more than the {block_size} positions of {path}")
        tensors["wpe.weight"] = tensors["wpe.weight"][:config.block_size]

        model = cls(config)
        parameters = dict(model.named_parameters())
        if odd := parameters.keys() ^ tensors.keys():
            raise ValueError(f"{path}: not a GPT-2 of {config.n_layer} layers, see {min(odd)}")
        with torch.no_grad():
            for name, p in parameters.items():
                t = tensors[name]
                if name.startswith("h.") and p.dim() == 2 and t.dim() == 2:
                    t = t.t()  # OpenAI keeps the blocks' matrices as (in, out), nn.Linear as (out, in)
                if t.shape != p.shape:
                    raise ValueError(f"{path}: {name} is {tuple(t.shape)}, expected {tuple(p.shape)}")
                p.copy_(t)
        return model


# ---- files ----

GPT2_URL = "https://huggingface.co/openai-community/{name}/resolve/{revision}/model.safetensors"
GPT2_WEIGHTS = {  # name: (revision, sha256)
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e", "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da", "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519", "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2", "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file, mapped into memory and not yet read.

    The format: 8 bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, and
    the data without a gap. Raises ValueError if anything in it does not add up, OSError if there is no file.
    """
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
              "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if not 8 < start <= min(size, 8 + 100_000_000):
                raise ValueError("its header does not fit")
            header = json.loads(f.read(start - 8))
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        tensors, end = {}, start
        header.pop("__metadata__", None)
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = dtypes[info["dtype"]], info["shape"]
            begin, end_before = start + info["data_offsets"][0], end
            end = start + info["data_offsets"][1]
            if begin != end_before or end - begin != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                raise ValueError(f"{name} has the wrong place or size")
            raw = data[begin:end] if begin % dtype.itemsize == 0 else data[begin:end].clone()  # views must be aligned
            tensors[name] = raw.view(dtype).view(shape)
        if end != size:
            raise ValueError(f"it has {size} bytes where its header tells of {end}")
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}; name a model.safetensors, or one of {', '.join(GPT2_WEIGHTS)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole .safetensors file ({error}); download it again") from None
    return tensors


def save_checkpoint(path, model, **state):
    """Write model, config and state (tensors, numbers, strings, lists and dicts of them) to path.

    It is written beside and then renamed, so that path is at any moment a whole checkpoint, the old one or the
    new. Raises OSError, with nothing left behind, if it cannot be written.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as f:
            torch.save({"config": asdict(model.config), "model": model.state_dict(), **state}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # on a full disk torch.save raises either
        beside.unlink(missing_ok=True)
        raise OSError(f"could not write {path}, any older one is kept ({error}); make room there or use --out_dir") from None


def load_checkpoint(path, device="cpu"):
    """(model, state) as save_checkpoint got them, the model on device.

    Only tensors and plain values are loaded: a file that holds code is refused and nothing in it is run.
    Raises FileNotFoundError if there is none, ValueError if it is not a whole checkpoint of this program.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**state.pop("config")))
        model.load_state_dict(state.pop("model"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint {path}: train one with python train.py") from None
    except Exception as error:  # a damaged file can fail anywhere in there
        reason = str(error).strip().split("\n")[0][:160]
        raise ValueError(f"{path} is damaged, or no checkpoint of this program ({reason}); "
                         f"train one with python train.py") from None
    return model.to(device), state


def pick_device(name):
    """torch.device for "auto" (the best there is) or a name. Raises ValueError if there is no such device here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device={name} is not to be had here; use --device=cpu") from None
