"""
A model to text: prints what the model writes, token by token as it is drawn.

    python sample.py                                        from nothing, with the model that train.py left in out/
    python sample.py --prompt="def main():" --num_samples=3
    python sample.py --n_loop=12                            think longer than it was trained to
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
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, ... (default: %(default)s)")
    return parser.parse_args()


def main():
    args = read_flags()
    device = pick_device(args.device)
    if args.init_from:
        model, name = GPT.from_pretrained(args.init_from).to(device), "gpt2"
    else:
        model, state = load_checkpoint(args.checkpoint, device)
        name = state["data"]["tokenizer"]
    model.eval()
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
    idx = torch.tensor([ids], device=device)  # (1, T)

    torch.manual_seed(args.seed)
    for i in range(args.num_samples):
        print("-" * 80 + "\n" if i else "", prompt, sep="", end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character can be several tokens
        began, count = time.time(), 0
        for count, token in enumerate(model.stream(idx, args.max_new_tokens, args.temperature, args.top_k, args.n_loop), start=1):
            if token.item() == tokenizer.eot_token:
                break
            print(decoder.decode(tokenizer.decode_single_token_bytes(token.item())), end="", flush=True)
        print(decoder.decode(b"", final=True), flush=True)
        print(f"({count} tokens, {count / (time.time() - began):,.0f} a second)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
