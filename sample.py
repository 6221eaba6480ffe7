r"""
A model to text: prints what the model writes, token by token.

    python sample.py                                      from nothing, with the model in out/
    python sample.py --prompt="def main():" --num_samples=3
    python sample.py --exit_kl=0.01                       loop until the prediction has settled
    python sample.py --show_loops                         see each loop's guess for each new token
    python sample.py --out_dir=out-arrows --n_loop=12 --max_new_tokens=1 --show_loops \
        --prompt="bfdehgjiklmpnosqrtsta>"                 the puzzle, which needs more loops
    python sample.py --init_from=gpt2 --prompt="Hello"    OpenAI's GPT-2
"""
import codecs
import signal
import sys
import time
from pathlib import Path

import torch

from model import generate, load_pretrained, pick_device, pick_dtype
from prepare import EOT, find_weights, get_tokenizer, make_parser
from train import not_negative, positive


def get_args():
    parser = make_parser("Print what a model writes.")
    add = parser.add_argument
    add("--out_dir", default="out", help="the folder with train.py's ckpt.pt")
    add("--init_from", help="instead: gpt2, gpt2-medium, -large, -xl or a file, as in train.py")
    add("--prompt", default="", help=f"the text to continue; {EOT} if empty")
    add("--num_samples", type=positive, default=1, help="number of texts")
    add("--max_new_tokens", type=positive, default=500, help=f"where a text ends, if not at {EOT}")
    add("--temperature", type=not_negative, default=0.8, help="0 takes the likeliest token")
    add("--top_k", type=positive, help="draw among the k likeliest tokens; None: among all")
    add("--n_loop", type=positive, help="number of loops; None: as in training")
    add("--exit_kl", type=not_negative, help="stop looping for a token once a loop changes its "
        "prediction by less than this KL divergence in nats. The prompt before its last token "
        "takes all loops, and so does a text that is longer than the context")
    add("--show_loops", action="store_true", help="print each loop's best guess for each new "
        "token; the text then ends with the context")
    add("--seed", type=int, default=0, help="random seed for the draws")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    args = parser.parse_args()
    if args.exit_kl is not None and args.show_loops:
        parser.error("--show_loops shows all loops: leave out --exit_kl")
    return args


def load_model(args, device):
    """Return (model, tokenizer), of train.py's checkpoint or of --init_from."""
    path = find_weights(args.init_from) if args.init_from else Path(args.out_dir) / "ckpt.pt"
    model, state = load_pretrained(path)
    tokenizer = get_tokenizer(state["data"]["tokenizer"] if state else "gpt2")
    # each token reads all weights: in bfloat16 they are half the bytes
    dtype = pick_dtype("auto", device, model.config.n_embd)
    return model.to(device, dtype).eval(), tokenizer


# ---- the text ----

def write_sample(model, tokenizer, idx, args, max_new_tokens):
    """Print a text as it is drawn, and its speed. Return its tokens with the prompt: (1, T)."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character can be several tokens
    tokens, taken, began = [idx], [], time.perf_counter()
    for token, loops in generate(model, idx, max_new_tokens, args.temperature, args.top_k,
                                 args.n_loop, args.exit_kl):
        tokens.append(token)
        taken.append(loops)
        if token.item() == tokenizer.eot_token:
            break
        text = decoder.decode(tokenizer.decode_single_token_bytes(token.item()))
        print(text, end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    speed = len(taken) / (time.perf_counter() - began)
    print(f"({len(taken)} tokens, {speed:,.0f} per second, "
          f"{sum(taken) / len(taken):.2f} loops per token)", file=sys.stderr)
    return torch.cat(tokens, dim=1)


# ---- the loops, shown ----

@torch.no_grad()
def show_loops(model, tokenizer, idx, new, n_loop):
    """Print a line for each of the last new tokens of idx (1, T): the guesses after each loop.

    A guess is the likeliest token, with its probability. In a terminal the first loop that makes
    the final guess is coloured.
    """
    states = model.states(idx[:, :-1], n_loop)
    logits = torch.cat([model.logits(state)[:, -new:] for state in states])     # (N, new, V)
    probability, guess = logits.float().softmax(-1).max(-1)                     # (N, new)
    first = (guess == guess[-1]).int().argmax(0)                                # (new,)
    print("\n" + " " * 10 + "".join(f"{f'loop {n + 1}':>14}" for n in range(len(guess))))
    for t, token in enumerate(idx[0, -new:]):
        cells = [f"{token_name(tokenizer, token):>9} {p:4.0%}"
                 for token, p in zip(guess[:, t], probability[:, t], strict=True)]
        if sys.stdout.isatty():
            cells[first[t]] = f"\033[1;32m{cells[first[t]]}\033[0m"
        print(f"{token_name(tokenizer, token):<10}" + "".join(cells))


def token_name(tokenizer, token):
    text = tokenizer.decode_single_token_bytes(token.item()).decode("utf-8", "backslashreplace")
    return repr(text)[:9]


def main():
    args = get_args()
    device = pick_device(args.device)
    model, tokenizer = load_model(args, device)
    block_size = model.config.block_size
    ids = tokenizer.encode(args.prompt, allowed_special={EOT}) or [tokenizer.eot_token]
    if len(ids) > block_size:
        sys.exit(f"the prompt has {len(ids)} tokens, the model sees {block_size}: shorten it")
    idx = torch.tensor([ids], device=device)    # (1, T)
    max_new_tokens = args.max_new_tokens
    if args.show_loops:     # all in one context, which need not read the last token
        max_new_tokens = min(max_new_tokens, block_size + 1 - len(ids))
    torch.manual_seed(args.seed)
    for i in range(args.num_samples):
        if i > 0:
            print("-" * 80)
        print(args.prompt, end="", flush=True)
        tokens = write_sample(model, tokenizer, idx, args, max_new_tokens)
        if args.show_loops:
            show_loops(model, tokenizer, tokens, tokens.size(1) - len(ids), args.n_loop)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)   # with | head, end quietly when head does
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
