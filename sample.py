"""
A model to text: prints what the model writes, token by token.

    python sample.py                                      from nothing, with the model in out/
    python sample.py --prompt="def main():" --num_samples=3
    python sample.py --n_loop=12                          loop more often than in training
    python sample.py --exit_kl=0.01                       loop until the prediction has settled
    python sample.py --show_loops                         see each loop's guess for each token
    python sample.py --init_from=gpt2 --prompt="Hello"    OpenAI's GPT-2
"""
import codecs
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from model import from_pretrained, generate, load_checkpoint, pick_device, read_gpt2
from prepare import EOT, find_gpt2, get_tokenizer, make_parser
from train import natural, not_negative, positive


def get_args():
    parser = make_parser("Print what a model writes.")
    add = parser.add_argument
    add("--out_dir", default="out", help="the folder with train.py's ckpt.pt")
    add("--init_from", help="instead: gpt2, gpt2-medium, -large, -xl or a model.safetensors")
    add("--prompt", default="", help=f"the text to continue; {EOT} if empty")
    add("--num_samples", type=positive, default=1, help="number of texts")
    add("--max_new_tokens", type=positive, default=500, help=f"where a text ends, if not at {EOT}")
    add("--temperature", type=not_negative, default=0.8, help="0 takes the likeliest token")
    add("--top_k", type=positive, help="draw among the k likeliest tokens; None: among all")
    add("--n_loop", type=positive, help="number of loops; None: as in training")
    add("--exit_kl", type=not_negative, help="stop looping for a token once a loop changes its "
        "prediction by less than this KL divergence in nats, while the text fits the context")
    add("--show_loops", action="store_true", help="print each loop's best guess for each token")
    add("--seed", type=natural, default=0, help="random seed for the draws")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    args = parser.parse_args()
    if args.exit_kl is not None and args.show_loops:
        parser.error("--show_loops shows all loops: leave out --exit_kl")
    return args


# ---- early exit ----

def exit_early(model, exit_kl, taken, idx, n_loop=None, cache=None):
    """Like model(idx, n_loop=n_loop, cache=cache), but a new token, idx (1, 1), may stop looping.

    It stops after its second loop at the earliest, if KL(p(n) || p(n-1)) < exit_kl for the
    predictions p after loop n and the one before. Skipped loops get the keys and values of the last
    loop taken. The number of loops taken is appended to the list taken. A prompt, idx (1, T), takes
    all. With loop_order="block" only the loops of the last block can be skipped.
    """
    N = n_loop or model.config.n_loop
    if idx.size(1) > 1 or cache.length == 0:
        taken.append(N)
        return model(idx, n_loop=N, cache=cache)
    last_log_p = None
    for n, x in enumerate(model.states(idx, N, cache)):
        # (1, 1, V); the blocks after the loop overwrite their keys and values each time
        logits, _ = model.predict(x, cache=cache)
        log_p = logits.float().log_softmax(-1)
        if n > 0:
            kl = F.kl_div(last_log_p, log_p, reduction="sum", log_target=True)
            if kl.clamp(min=0) < exit_kl:   # rounding can make it negative
                break
        last_log_p = log_p
    taken.append(n + 1)
    for i in range(*model.groups[-1]):
        last = cache.entries[n, i][:, :, :, cache.length]
        for skipped in range(n + 1, N):
            cache.entries[skipped, i][:, :, :, cache.length] = last
    return logits, None


# ---- the loops, shown ----

@torch.no_grad()
def best_guesses(model, idx, n_loop=None):
    """Each loop's likeliest token for idx[:, 1:], seeing the tokens before it: idx (1, T + 1).

    Returns the tokens and their probabilities, (N, T) each.
    """
    # with targets, predict returns the logits of all positions
    x, y = idx[:, :-1], idx[:, 1:]
    logits = [model.predict(state, y)[0][0] for state in model.states(x, n_loop)]   # N of (T, V)
    probability, guess = torch.stack(logits).float().softmax(-1).max(-1)
    return guess.cpu(), probability.cpu()


def show_loops(tokenizer, tokens, guess, probability):
    """Print a line for each token: the token, then each loop's guess and its probability.

    tokens is a list of T, guess and probability are (N, T). In a terminal the first loop that
    makes the final guess is coloured.
    """
    N, T = guess.shape
    first = (guess == guess[-1]).int().argmax(0)    # (T,)
    print("\n" + " " * 10 + "".join(f"{f'loop {n}':>14}" for n in range(1, N + 1)))
    for t, token in enumerate(tokens):
        cells = [f"{token_name(tokenizer, guess[n, t].item()):>9} {probability[n, t]:4.0%}"
                 for n in range(N)]
        if sys.stdout.isatty():
            cells[first[t]] = f"\033[1;32m{cells[first[t]]}\033[0m"
        print(f"{token_name(tokenizer, token):<10}" + "".join(cells))
    equal = (guess == guess[-1]).sum(1).tolist()
    print(f"guesses equal to the last loop's, of {T}, by loop: {' '.join(map(str, equal))}")


def token_name(tokenizer, token):
    text = tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
    return repr(text)[:9]


# ---- the text ----

def load_model(args, device):
    """Return (model, tokenizer), of train.py's checkpoint or of OpenAI's."""
    if args.init_from:
        model = from_pretrained(*read_gpt2(find_gpt2(args.init_from))).to(device)
        tokenizer = get_tokenizer("gpt2")
    else:
        model, state = load_checkpoint(Path(args.out_dir) / "ckpt.pt", device)
        tokenizer = get_tokenizer(state["data"]["tokenizer"])
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        model.bfloat16()  # half the bytes to read for each token
    return model.eval(), tokenizer


def write_sample(model, tokenizer, idx, args, max_new):
    """Print a text as it is drawn, and its speed. Return its tokens with the prompt: (1, T)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character can be several tokens
    taken, tokens, began = [], [idx], time.perf_counter()
    forward = None if args.exit_kl is None else partial(exit_early, model, args.exit_kl, taken)
    for token in generate(model, idx, max_new, args.temperature, args.top_k, args.n_loop, forward):
        tokens.append(token)
        if token.item() == tokenizer.eot_token:
            break
        text = decoder.decode(tokenizer.decode_single_token_bytes(token.item()))
        print(text, end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    new, N = len(tokens) - 1, args.n_loop or model.config.n_loop
    taken += [N] * (new - len(taken))   # beyond the context, each takes all
    mean = "" if args.exit_kl is None else f", {sum(taken) / new:.2f} loops per token"
    speed = new / (time.perf_counter() - began)
    print(f"({new} tokens, {speed:,.0f} per second{mean})", file=sys.stderr)
    return torch.cat(tokens, dim=1)


def main():
    args = get_args()
    sys.stdout.reconfigure(errors="replace")    # for a terminal that is not UTF-8
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # with | head, end quietly when head does
    device = pick_device(args.device)
    model, tokenizer = load_model(args, device)
    block_size = model.config.block_size
    ids = tokenizer.encode(args.prompt, allowed_special={EOT}) or [tokenizer.eot_token]
    if len(ids) > block_size:
        sys.exit(f"the prompt has {len(ids)} tokens, the model sees {block_size}: shorten it")
    idx = torch.tensor([ids], device=device)    # (1, T)
    max_new = args.max_new_tokens
    if args.show_loops:
        max_new = min(max_new, block_size + 1 - len(ids))  # all of it in one context
    torch.manual_seed(args.seed)
    for i in range(args.num_samples):
        if i > 0:
            print("-" * 80)
        print(args.prompt, end="", flush=True)
        tokens = write_sample(model, tokenizer, idx, args, max_new)
        if args.show_loops:
            guess, probability = best_guesses(model, tokens, args.n_loop)
            show_loops(tokenizer, tokens[0, 1:].tolist(), guess, probability)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
