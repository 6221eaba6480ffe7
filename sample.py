"""
A model to text: prints what the model writes, token by token.

    python sample.py                                      from nothing, with the model in out/
    python sample.py --prompt="def main():" --num_samples=3
    python sample.py --n_loop=12                          loop more often than in training
    python sample.py --exit_kl=0.01                       loop until the prediction has settled
    python sample.py --show_loops --plot=loops.png        see each loop's guess, as text and picture
    python sample.py --init_from=gpt2 --prompt="Hello"    OpenAI's GPT-2
"""
import codecs
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn import functional as F

from model import from_pretrained, generate, load_checkpoint, pick_device
from prepare import EOT, Parser, find_gpt2, get_tokenizer, natural, not_negative, positive


def get_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out_dir", default="out", help="where train.py left its ckpt.pt")
    add("--init_from", help="instead: gpt2, gpt2-medium, -large, -xl or a model.safetensors")
    add("--prompt", default="", help=f"the text to continue; {EOT} if empty")
    add("--num_samples", type=positive, default=1, help="how many texts")
    add("--max_new_tokens", type=positive, default=500, help=f"where a text ends, if not at {EOT}")
    add("--temperature", type=not_negative, default=0.8, help="0 takes the likeliest token")
    add("--top_k", type=positive, help="draw among the k likeliest tokens; all if not given")
    add("--n_loop", type=positive, help="how often to loop; as in training if not given")
    add("--exit_kl", type=not_negative, help="stop looping for a token once a loop changes its "
        "prediction by less than this KL divergence in nats, while the text fits the context")
    add("--show_loops", action="store_true", help="print each loop's best guess for each token")
    add("--plot", metavar="FILE.png", help="draw these guesses, of the last sample")
    add("--seed", type=natural, default=0, help="of the draws")
    add("--device", default="auto", help="cpu, cuda, mps; auto takes the best that is there")
    args = parser.parse_args()
    if args.exit_kl is not None and (args.show_loops or args.plot):
        parser.error("--show_loops and --plot show all loops, leave out --exit_kl")
    if args.plot and not (args.plot.endswith(".png") and Path(args.plot).parent.is_dir()):
        parser.error(f"--plot={args.plot} must be a .png in a folder that exists")
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


# ---- early exit ----

def exit_early(model, exit_kl, loops, idx, n_loop=None, cache=None):
    """Like model(idx, n_loop, cache), but one token, idx (1, 1), stops looping once it has settled.

    It stops after loop n >= 1, counted from 0, if KL(p(n) || p(n-1)) < exit_kl for its predictions
    p. Skipped loops get the keys and values of the last loop taken. The number of loops taken is
    appended to the list loops. A prompt, idx (1, T), takes all.
    """
    c, last_log_p = model.config, None
    N = n_loop or c.n_loop
    if idx.size(1) > 1 or cache.length == 0:
        loops.append(N)
        return model(idx, n_loop=N, cache=cache)
    for n, x in enumerate(model.states(idx, N, cache)):
        logits, _ = model.readout(x, cache=cache)   # (1, 1, V)
        log_p = logits.float().log_softmax(-1)
        if n > 0 and F.kl_div(last_log_p, log_p, reduction="sum", log_target=True) < exit_kl:
            break
        last_log_p = log_p
    loops.append(n + 1)
    for skipped in range(n + 1, N):
        for i in range(c.loop_start, c.loop_end):
            last, entry = cache.entries[n, i], cache.entries[skipped, i]
            entry[:, :, :, cache.length] = last[:, :, :, cache.length]
    return logits, None


# ---- the loops, shown ----

@torch.no_grad()
def best_guesses(model, idx, n_loop=None):
    """After each loop, the likeliest token at each place of idx (1, T + 1) but the first.

    Returns the tokens and their probabilities, (N, T) each.
    """
    states = model.states(idx[:, :-1], n_loop)
    # with targets, the logits are those of all places
    logits = torch.stack([model.readout(x, idx[:, 1:])[0][0] for x in states])    # (N, T, V)
    probability, guess = logits.float().softmax(-1).max(-1)
    return guess.cpu(), probability.cpu()


def first_final(guess):
    """The first loop, from 0, whose guess is the last loop's: (N, T) -> (T,)."""
    return (guess == guess[-1]).int().argmax(0)


def show_loops(names, guess, probability):
    """Print a line for each token: the token, then each loop's guess and its probability.

    names (1 + N, T) are the tokens and the guesses as text. In a terminal, the loop that is the
    first to make the final guess is coloured.
    """
    N, T = guess.shape
    first = first_final(guess)
    print("\n" + " " * 10 + "".join(f"{f'loop {n}':>14}" for n in range(1, N + 1)))
    for t in range(T):
        cells = [f"{names[1 + n][t]:>9} {probability[n, t]:4.0%}" for n in range(N)]
        if sys.stdout.isatty():
            cells[first[t]] = f"\033[1;32m{cells[first[t]]}\033[0m"
        print(f"{names[0][t]:<10}" + "".join(cells))
    equal = (guess == guess[-1]).sum(1).tolist()
    print(f"equal to the final guess after each loop, of {T}: {' '.join(map(str, equal))}")


def plot_loops(path, names, guess, probability):
    """Draw the same as a heat map, tokens x loops."""
    from matplotlib.figure import Figure
    N, T = guess.shape
    first = first_final(guess)
    figure = Figure(figsize=(2 + N, 1 + 0.22 * T), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(probability.T, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    style = {"fontsize": 8, "family": "monospace", "parse_math": False}
    for t in range(T):
        for n in range(N):
            axes.text(n, t, names[1 + n][t], ha="center", va="center", **style,
                      weight="bold" if n == first[t] else "normal",
                      color="white" if probability[n, t] > 0.5 else "black")
    axes.set_xticks(range(N), [f"loop {n}" for n in range(1, N + 1)])
    axes.set_yticks(range(T), names[0], **style)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    label = "probability of the best guess; bold: the first loop with the final guess"
    figure.colorbar(image, label=label, location="bottom", aspect=40, pad=1 / T)
    figure.savefig(path, dpi=120)


def token_name(tokenizer, token):
    text = tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace")
    return repr(text)[:9]


# ---- the text ----

def load_model(args, device):
    """Return (model, tokenizer), of train.py's checkpoint or of OpenAI's."""
    if args.init_from:
        model, name = from_pretrained(find_gpt2(args.init_from)).to(device), "gpt2"
    else:
        model, state = load_checkpoint(Path(args.out_dir) / "ckpt.pt", device)
        name = state["data"]["tokenizer"]
    tokenizer = get_tokenizer(name)
    if tokenizer.n_vocab != model.config.vocab_size:
        sys.exit(f"the model has {model.config.vocab_size} tokens, its tokenizer {name} has "
                 f"{tokenizer.n_vocab}: sample another with --out_dir or --init_from")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        model.bfloat16()  # half the bytes to read for each token
    return model.eval(), tokenizer


def write_sample(model, tokenizer, idx, args, room):
    """Print a text as it is drawn, and its speed. Return its tokens, idx included: (1, T)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character can be several tokens
    loops, tokens, began = [], [idx], time.time()
    forward = None if args.exit_kl is None else partial(exit_early, model, args.exit_kl, loops)
    for token in generate(model, idx, room, args.temperature, args.top_k, args.n_loop, forward):
        tokens.append(token)
        if token.item() == tokenizer.eot_token:
            break
        text = decoder.decode(tokenizer.decode_single_token_bytes(token.item()))
        print(text, end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    new, N = len(tokens) - 1, args.n_loop or model.config.n_loop
    loops += [N] * (new - len(loops))  # beyond the context, each takes all
    mean = "" if args.exit_kl is None else f", {sum(loops) / new:.2f} loops a token"
    print(f"({new} tokens, {new / (time.time() - began):,.0f} a second{mean})", file=sys.stderr)
    return torch.cat(tokens, dim=1)


def main():
    args = get_args()
    device = pick_device(args.device)
    model, tokenizer = load_model(args, device)
    block_size = model.config.block_size
    ids = tokenizer.encode(args.prompt, allowed_special={EOT}) or [tokenizer.eot_token]
    if len(ids) > block_size:
        sys.exit(f"the prompt has {len(ids)} tokens, the model sees {block_size}: shorten it")
    idx = torch.tensor([ids], device=device)    # (1, T)
    room = args.max_new_tokens
    if args.show_loops or args.plot:
        room = min(room, block_size + 1 - len(ids))  # all of it in one context
    torch.manual_seed(args.seed)
    for i in range(args.num_samples):
        if i > 0:
            print("-" * 80)
        print(args.prompt, end="", flush=True)
        tokens = write_sample(model, tokenizer, idx, args, room)
        if args.show_loops or args.plot:
            guess, probability = best_guesses(model, tokens, args.n_loop)
            rows = [tokens[0, 1:].tolist(), *guess.tolist()]
            names = [[token_name(tokenizer, token) for token in row] for row in rows]
        if args.show_loops:
            show_loops(names, guess, probability)
    if args.plot:
        plot_loops(args.plot, names, guess, probability)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
