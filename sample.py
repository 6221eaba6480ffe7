"""
A model to text: prints what the model writes, token by token as it is drawn.

    python sample.py                                        from nothing, with the model that train.py left in out/
    python sample.py --prompt="def main():" --num_samples=3
    python sample.py --n_loop=12                            think longer than it was trained to
    python sample.py --exit_kl=0.01                         think about each token until its prediction has settled
    python sample.py --show_loops --plot=loops.png          watch it think, in the terminal and as a picture
    python sample.py --init_from=gpt2 --prompt="Hello"      OpenAI's GPT-2
"""
import argparse
import codecs
import sys
import time
from pathlib import Path

import torch

from model import GPT, load_checkpoint, pick_device
from prepare import EOT, get_tokenizer, one_line_errors, run


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text):
    if not 0 <= float(text) < float("inf"):
        raise ValueError
    return float(text)


def read_flags():
    parser = one_line_errors(argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                                     formatter_class=argparse.RawDescriptionHelpFormatter))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", default="out/ckpt.pt", help="a model of train.py (default: %(default)s)")
    source.add_argument("--init_from", help="instead: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the path of a model.safetensors")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help=f"what to continue (default: nothing, that is {EOT})")
    prompt.add_argument("--prompt_file", help="a text file to continue")
    parser.add_argument("--num_samples", type=positive, default=1, help="default: %(default)s")
    parser.add_argument("--max_new_tokens", type=positive, default=500, help=f"a sample ends there or at {EOT} (default: %(default)s)")
    parser.add_argument("--temperature", type=not_negative, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    parser.add_argument("--top_k", type=positive, help="draw among the k likeliest tokens (default: all)")
    parser.add_argument("--n_loop", type=positive, help="how often to loop (default: as often as in training)")
    parser.add_argument("--exit_kl", type=not_negative, help="stop looping for a token as soon as the KL divergence of its prediction "
                        "from the previous loop's is smaller, in nats; prompts and full contexts take all loops (default: never)")
    parser.add_argument("--show_loops", action="store_true", help="show, below the text, the best guess for each token and its probability after each loop; "
                        "a sample ends with the model's context")
    parser.add_argument("--plot", metavar="FILE.png", help="draw that, of the last sample")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="compile decoding first; on a GPU a token's kernels then run as one CUDA graph")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default: %(default)s)")
    args = parser.parse_args()
    if args.exit_kl is not None and (args.show_loops or args.plot):
        parser.error("--show_loops and --plot show all loops; leave out --exit_kl")
    return args


# ---- the loops, seen ----

@torch.no_grad()
def guesses(model, idx, n_loop=None):
    """The best guess for each token of idx (1, T + 1) but the first, after each loop, and its probability: (N, T) each."""
    logits = [model.readout(x, idx[:, 1:])[0][0] for x in model.states(idx[:, :-1], n_loop)]
    probability, guess = torch.stack(logits).float().softmax(-1).max(-1)
    return guess.cpu(), probability.cpu()


def reached(guess):
    """Of guesses (N, T): the loop, from 0, that first made the last loop's guess (T,); how many guesses are from each loop on the last's (N,)."""
    final = (guess == guess[-1]).int()
    return final.argmax(0), final.flip(0).cumprod(0).flip(0).sum(1)


def show_loops(names, guess, probability):
    """A line for each token: what came, and what each loop guessed, in colour where it was the last's for the first time.

    names (1 + N, T): the token as text, then the guesses.
    """
    first, settled = reached(guess)
    print("\n" + " " * 10 + "".join(f"{f'loop {n}':>14}" for n in range(1, len(guess) + 1)))
    for t, (token, *row) in enumerate(zip(*names)):
        cells = [f"{name:>9} {p:4.0%}" for name, p in zip(row, probability[:, t].tolist())]
        if sys.stdout.isatty():
            cells[first[t]] = f"\033[1;32m{cells[first[t]]}\033[0m"
        print(f"{token:<10}" + "".join(cells))
    print(f"settled after each loop, of {guess.size(1)} tokens: {' '.join(map(str, settled.tolist()))}")


def plot_loops(path, names, guess, probability):
    """The same as a heat map, tokens x loops."""
    plt, (N, T), (first, _) = pyplot(), guess.shape, reached(guess)
    figure, axes = plt.subplots(figsize=(2 + N, 1 + 0.22 * T), layout="constrained")
    image = axes.imshow(probability.T.tolist(), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for t in range(T):
        for n in range(N):
            axes.text(n, t, names[1 + n][t], ha="center", va="center", fontsize=8, family="monospace", parse_math=False,
                      weight="bold" if n == first[t] else None, color="white" if probability[n, t] > 0.5 else "black")
    axes.set_xticks(range(N), [f"loop {n}" for n in range(1, N + 1)])
    axes.set_yticks(range(T), names[0], family="monospace", fontsize=8, parse_math=False)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    figure.colorbar(image, label="probability of the best guess; bold where it is first the last loop's", location="bottom", aspect=40, pad=1 / T)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pyplot():
    """matplotlib, for pictures in files. Raises ValueError if there is none."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def main():
    args = read_flags()
    device = pick_device(args.device)
    if args.init_from:
        model, name = GPT.from_pretrained(args.init_from).to(device), "gpt2"
    else:
        model, state = load_checkpoint(args.checkpoint, device)
        name = state["data"]["tokenizer"]
    model.eval()
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        model.bfloat16()  # half the bytes to read for each token
    if args.compile:
        model.compile_decoding()
    tokenizer = get_tokenizer(name)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise ValueError(f"the model has {model.config.vocab_size} tokens, its tokenizer {name} has {tokenizer.n_vocab}; "
                         "sample from another one with --checkpoint or --init_from")

    prompt = args.prompt
    if args.prompt_file:
        try:
            prompt = Path(args.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{args.prompt_file} is not text in UTF-8; give another --prompt_file") from None
    ids = tokenizer.encode(prompt, allowed_special={EOT}) or [tokenizer.eot_token]
    if len(ids) > model.config.block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens and the model sees {model.config.block_size}; give a shorter --prompt")
    idx, room = torch.tensor([ids], device=device), args.max_new_tokens  # idx: (1, T)
    if args.plot:
        pyplot()  # now rather than after the work
    if args.show_loops or args.plot:
        room = min(room, model.config.block_size + 1 - len(ids))

    def text_of(token):
        return repr(tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace"))[:9]

    torch.manual_seed(args.seed)
    for i in range(args.num_samples):
        print("-" * 80 + "\n" if i else "", prompt, sep="", end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character can be several tokens
        began, new, loops = time.time(), [], []
        for token in model.stream(idx, room, args.temperature, args.top_k, args.n_loop, args.exit_kl, loops):
            new.append(token)
            if token.item() == tokenizer.eot_token:
                break
            print(decoder.decode(tokenizer.decode_single_token_bytes(token.item())), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)
        thought = "" if args.exit_kl is None else f", {torch.cat(loops).float().mean():.2f} loops a token"
        print(f"({len(new)} tokens, {len(new) / (time.time() - began):,.0f} a second{thought})", file=sys.stderr)
        if args.show_loops or args.plot:
            whole = torch.cat((idx, *new), dim=1)
            guess, probability = guesses(model, whole, args.n_loop)
            names = [[text_of(token) for token in row] for row in (whole[0, 1:].tolist(), *guess.tolist())]
            if args.show_loops:
                show_loops(names, guess, probability)
            if args.plot:
                plot_loops(args.plot, names, guess, probability)


if __name__ == "__main__":
    run(main)
