"""
Text to tokens: data/train.bin and data/val.bin (uint16, nothing else in them) and data/meta.json.

    python prepare.py                            the source of the Python that runs it; needs no network
    python prepare.py shakespeare                tinyshakespeare, downloaded
    python prepare.py book.txt.xz                a file of yours (.txt, .gz, .xz, any text in UTF-8)
    python prepare.py notes/ --tokenizer=gpt2    all text files in a folder, in GPT-2's tokens

`<|endoftext|>` separates documents: the files of a folder, and wherever it stands in a text. The last tenth of
the characters is the validation split, moved to the nearest end of a document if one is near.
"""
import argparse
import gzip
import hashlib
import itertools
import json
import lzma
import os
import re
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests
import tiktoken

EOT = "<|endoftext|>"
TOKENIZERS = ("byte", "gpt2")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def get_tokenizer(name):
    """A tiktoken.Encoding: "byte" (256 bytes and <|endoftext|>) or "gpt2" (50257 tokens, downloaded once).

    Raises OSError if GPT-2's vocabulary is neither cached nor to be had.
    """
    if name == "byte":  # nothing to merge, so any pieces will do; these are quick
        return tiktoken.Encoding("byte", pat_str=r"[\s\S]{1,64}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    assert name == "gpt2", name
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network; or not the vocabulary that tiktoken knows
        raise OSError(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}); "
                      "without a network use bytes: python prepare.py --tokenizer=byte") from None


# ---- from a source to blocks of text ----

def download(url, sha256, otherwise):
    """The path of the file at url, downloaded once into ~/.cache/loop-gpt2 (or $XDG_CACHE_HOME) and checked.

    A transfer that breaks off goes on where it was, now or when called again. Raises OSError if the server
    does not give the file, ValueError if it gives another; `otherwise` is the way out that the message names.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loop-gpt2" / f"{sha256[:12]}-{Path(url).name}"
    if path.exists():
        return path
    print(f"downloading {url} to {path}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for wait in (1, 2, 4, 8, None):
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        response = None
        try:
            response = requests.get(url, headers=headers, stream=True, timeout=30)
            if response.status_code != 416:  # 416: there is nothing beyond what we have
                response.raise_for_status()
                with open(part, "ab" if response.status_code == 206 else "wb") as f:
                    for block in response.iter_content(1 << 16):
                        f.write(block)
            break
        except requests.RequestException as error:
            refused = response is not None and not response.ok
            reason = f"HTTP {response.status_code}" if refused else type(error).__name__
            hopeless = response is None or refused and response.status_code not in (429, 500, 502, 503, 504)
            if hopeless or wait is None:  # no network, or not there; a busy server and a lost connection may mend
                raise OSError(f"{url} could not be downloaded ({reason}); {otherwise}") from None
            time.sleep(wait)
    with open(part, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise ValueError(f"{url} is not the file it was (sha256 {found[:12]}..., expected {sha256[:12]}...); {otherwise}")
    os.replace(part, path)
    return path


def find_files(source):
    """The files of a source. Those of a folder come in an order fixed by their names but unrelated to them,
    so that the end of the list, the validation split, is a fair sample."""
    if source == "shakespeare":
        return [download(SHAKESPEARE_URL, SHAKESPEARE_SHA256, "without a network use: python prepare.py pystdlib")]
    folder = Path(sysconfig.get_path("stdlib") if source == "pystdlib" else source)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise FileNotFoundError(f"{source} is neither a file nor a folder; without one use: python prepare.py pystdlib")
    names = [path.relative_to(folder) for path in folder.rglob("*.py" if source == "pystdlib" else "*") if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    if source == "pystdlib":  # without its tests, which not every installation has, and what pip installed
        names = [name for name in names if not {"test", "tests", "idle_test", "site-packages", "dist-packages"} & {*name.parts}]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    files = [folder / name for name in names if is_text(folder / name)]
    if not files:
        raise FileNotFoundError(f"{source} has no text files in it")
    return files


def open_text(path):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8", newline="")


def is_text(path):
    try:
        with open_text(path) as f:
            return all("\0" not in block for block in iter(lambda: f.read(1 << 20), ""))
    except (OSError, EOFError, UnicodeError, lzma.LZMAError, zlib.error):
        return False


def read_blocks(files, size=1 << 20):
    """The text of the files with EOT between them, in blocks of about `size` characters.

    A block ends where GPT-2's tokenizer would begin a new token anyway, before a space or a newline that
    follows anything else, so that block by block the tokens are those of the whole text.
    """
    for i, path in enumerate(files):
        text = EOT if i else ""
        try:
            with open_text(path) as f:
                while new := f.read(size):
                    if "\0" in new:
                        raise UnicodeError
                    text += new
                    if match := re.match(r".*\S(?=[ \n])", text, re.DOTALL):
                        end = match.end()
                    else:  # a text without spaces: anywhere, only not inside of an EOT
                        end = text.rfind("<", -len(EOT)) if "<" in text[-len(EOT):] else len(text)
                    yield text[:end]
                    text = text[end:]
        except UnicodeError:
            raise ValueError(f"{path} is not text in UTF-8; convert it, or name another file") from None
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} cannot be unpacked ({error}); get it again, or name another file") from None
        yield text


def clip(blocks, start, stop):
    """The characters start..stop of the blocks."""
    at = 0
    for block in blocks:
        yield block[max(0, start - at):max(0, stop - at)]
        at += len(block)


def find_split(files):
    """(end of train, start of val), in characters: at 90%, or at the end of the document nearest to it."""
    total, ends = 0, []
    for block in read_blocks(files):
        ends += [total + match.start() for match in re.finditer(re.escape(EOT), block)]
        total += len(block)
    cut = total * 9 // 10
    nearest = min(ends, key=lambda end: abs(end - cut), default=total)
    if abs(nearest - cut) <= total // 20:
        return nearest, nearest + len(EOT)
    return cut, cut


# ---- from text to files of tokens, and back into memory ----

def write_tokens(path, texts, tokenizer):
    """Tokenize texts on all cores into path, a few blocks at a time; return what meta.json says of a split."""
    def encode(text):
        return tokenizer.encode_to_numpy(text, allowed_special={EOT}).astype(np.uint16)

    tokens, size, sha256, workers = 0, 0, hashlib.sha256(), os.cpu_count() or 1
    with open(path, "wb") as f, ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(texts, 4 * workers)):
            size += sum(len(text.replace(EOT, "").encode()) for text in batch)
            for ids in pool.map(encode, batch):
                f.write(ids)
                sha256.update(ids)
                tokens += len(ids)
    return {"tokens": tokens, "bytes": size, "sha256": sha256.hexdigest()}


def load_data(data_dir):
    """(train, val, meta): the tokens as read-only arrays of uint16 that stay on disk, and meta.json.

    Raises FileNotFoundError if there is no data yet, ValueError if it is damaged.
    """
    folder, again = Path(data_dir), f"run python prepare.py --data_dir={data_dir}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = []
        for split in ("train", "val"):
            path, expected = folder / f"{split}.bin", meta[split]["tokens"]
            size = path.stat().st_size
            if size != 2 * expected or not size:
                raise ValueError(f"{path} has {size} bytes and should have {2 * expected}; {again}")
            splits.append(np.memmap(path, dtype=np.uint16, mode="r"))
            if (top := int(splits[-1].max())) >= meta["vocab_size"]:
                raise ValueError(f"{path} has a token {top}, beyond its vocabulary of {meta['vocab_size']}; {again}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no data yet, {error.filename} is missing; {again}") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{folder / 'meta.json'} is damaged; {again}") from None
    return *splits, meta


# ---- the command line ----

def one_line_errors(parser):
    """argparse, but a mistake costs its user one line and not a page of usage."""
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see python {parser.prog} --help\n")
    return parser


def run(main):
    """Call main. What its user can mend (a flag, a file, the disk, the network) ends in one line; a bug of
    ours keeps its traceback."""
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = one_line_errors(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False))
    parser.add_argument("source", nargs="?", default="pystdlib", help="pystdlib, shakespeare, a text file or a folder (default: %(default)s)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="byte", help="default: %(default)s")
    parser.add_argument("--data_dir", default="data", help="where to write (default: %(default)s)")
    args = parser.parse_args()

    tokenizer = get_tokenizer(args.tokenizer)
    files = find_files(args.source)
    train_end, val_start = find_split(files)
    folder = Path(args.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    names = {split: folder / f"{split}.bin" for split in ("train", "val")} | {"meta": folder / "meta.json"}
    beside = {name: path.with_name(path.name + ".tmp") for name, path in names.items()}
    try:
        meta = {"dataset": args.source, "tokenizer": args.tokenizer, "vocab_size": tokenizer.n_vocab}
        for split, start, stop in (("train", 0, train_end), ("val", val_start, sys.maxsize)):
            began = time.time()
            meta[split] = write_tokens(beside[split], clip(read_blocks(files), start, stop), tokenizer)
            mb = meta[split]["bytes"] / 1e6
            print(f"{names[split]}: {meta[split]['tokens']:,} tokens of {mb:.1f} MB of text, {mb / (time.time() - began):.1f} MB/s")
            if meta[split]["tokens"] < 2:
                raise ValueError(f"{args.source} is too short, its {split} split has {meta[split]['tokens']} tokens; name another source")
        beside["meta"].write_text(json.dumps(meta, indent=1) + "\n")
        for name in names:
            os.replace(beside[name], names[name])
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
