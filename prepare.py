"""
Text to tokens: writes data/train.bin and data/val.bin (bare uint16 tokens) and data/meta.json.

    python prepare.py                            the source of Python's library; needs no network
    python prepare.py shakespeare                tinyshakespeare, downloaded
    python prepare.py notes/ --tokenizer=gpt2    a text file or all of a folder, as GPT-2's tokens
    python prepare.py hops                       a puzzle whose answers take steps, see make_hops
    python prepare.py openwebtext                the paper's data: 13 GB, 9 billion tokens
    python prepare.py fineweb --shards=1         100 million tokens a shard, and one for validation

Every source is a stream of documents. A file is one document, or several with <|endoftext|> between
them. The hash of a document's text decides its split: one in ten is for validation, one in 2,000 of
OpenWebText. A source of fewer than 100 documents is too small for that: each document is cut at 90%
instead.

Documents are tokenized side by side, 16 million characters at a time, so a source may be larger
than memory. One document is held whole, and at the start the first 100. Downloads are kept in
~/.cache/loop-gpt2: after an interruption the same command completes them, and tokenizes again.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import sysconfig
import tarfile
import time
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import requests
import tiktoken

EOT = "<|endoftext|>"
TOKENIZERS = ("byte", "gpt2")
SPLITS = ("train", "val")

# ---- from documents to tokens ----

def get_tokenizer(name):
    """Return a tiktoken.Encoding: "byte" (256 bytes and EOT) or "gpt2" (50257 tokens)."""
    assert name in TOKENIZERS, name
    if name == "byte":  # a token is a byte: nothing is merged, so any short pieces will do
        return tiktoken.Encoding("byte", pat_str=r"[\s\S]{1,64}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a damaged download
        sys.exit(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): "
                 "connect once, or train on bytes: python prepare.py --tokenizer=byte")


def split_documents(documents, one_in):
    """Yield (split, text), the text with its EOTs; one document in `one_in` is for validation."""
    documents = (text for text in documents if text.strip())
    first = list(itertools.islice(documents, 100))
    if len(first) < 100:
        yield "train", EOT.join(text[:len(text) * 9 // 10] for text in first)
        yield "val", EOT.join(text[len(text) * 9 // 10:] for text in first)
        return
    for text in itertools.chain(first, documents):
        number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
        yield "val" if number % one_in == 0 else "train", text + EOT


def slabs(pairs, size=1 << 24):
    """Group (split, text) pairs into lists of about `size` characters."""
    slab, length = [], 0
    for split, text in pairs:
        slab.append((split, text))
        length += len(text)
        if length >= size:
            yield slab
            slab, length = [], 0
    yield slab


def token_stream(source, tokenizer, shards):
    """Yield (split, ids) for all of a source, ids (n,) in uint16."""
    if source == "fineweb":  # its files hold tokens already
        yield from read_fineweb(shards)
        return
    if source == "openwebtext":
        documents = read_openwebtext(shards)
    elif source == "hops":
        documents = make_hops()
    else:
        documents = read_files(source)
    pairs = split_documents(documents, one_in=2000 if source == "openwebtext" else 10)
    encode = partial(tokenizer.encode_to_numpy, allowed_special={EOT})
    with ThreadPool() as pool:  # threads suffice, because tiktoken releases Python's lock
        for slab in slabs(pairs):
            encoded = pool.map(encode, [text for _, text in slab])
            for (split, _), ids in zip(slab, encoded, strict=True):
                yield split, ids.astype(np.uint16)


def write_data(folder, source, tokenizer, shards):
    """Write a source's tokens to folder, in temporary files, renamed at the end."""
    parts = {split: folder / f"{split}.bin.tmp" for split in SPLITS}
    meta = {"dataset": source, "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab}
    meta |= {split: {"tokens": 0, "bytes": 0} for split in SPLITS}
    sha256 = {split: hashlib.sha256() for split in SPLITS}
    lengths = np.zeros(tokenizer.n_vocab, np.int64)  # of each token in bytes; EOT is no text
    lengths[:tokenizer.eot_token] = [len(tokenizer.decode_single_token_bytes(i))
                                     for i in range(tokenizer.eot_token)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(parts["train"], "wb") as train, open(parts["val"], "wb") as val:
            files = {"train": train, "val": val}
            for split, ids in token_stream(source, tokenizer, shards):
                files[split].write(ids.tobytes())
                sha256[split].update(ids.tobytes())
                meta[split]["tokens"] += len(ids)
                meta[split]["bytes"] += int(lengths[ids].sum())
        for split in SPLITS:
            meta[split]["sha256"] = sha256[split].hexdigest()
            if meta[split]["tokens"] < 2:
                sys.exit(f"{source} has too little text for a {split} split: name a longer one")
        for split in SPLITS:
            os.replace(parts[split], folder / f"{split}.bin")
        write_json(folder / "meta.json", meta)
    except OSError as error:  # a full disk, a file that may not be read
        sys.exit(f"{folder} was not written: {error}")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return meta


def write_json(path, content):
    """Write content to path, beside it first."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def load_data(data_dir):
    """Return (train, val, meta): read-only uint16 arrays that stay on disk, and meta.json."""
    folder, remedy = Path(data_dir), f"run python prepare.py --data_dir={data_dir}"
    arrays = []
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for split in SPLITS:
            path, size = folder / f"{split}.bin", 2 * meta[split]["tokens"]
            if path.stat().st_size != size:
                sys.exit(f"{path} has {path.stat().st_size} bytes, not {size}: "
                         f"run python prepare.py {meta['dataset']} --data_dir={data_dir}")
            arrays.append(np.memmap(path, dtype=np.uint16, mode="r"))
    except (FileNotFoundError, NotADirectoryError) as error:
        sys.exit(f"no data yet, {error.filename} is missing: {remedy}")
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{folder / 'meta.json'} is damaged: {remedy}")
    return *arrays, meta


# ---- where documents come from ----

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HUB = "https://huggingface.co/"
OPENWEBTEXT = ("datasets/Skylion007/openwebtext/resolve/f3808c30e817981b845ec549c43e82bb467d8144/"
               "subsets/urlsf_subset{:02}.tar")  # 0 to 20
FINEWEB = ("datasets/kjj0/fineweb10B-gpt2/resolve/889765ea1f903759787add96995d81171b632d0c/"
           "fineweb_{}_{:06}.bin")  # val 0, train 1 to 103
SHARDS = {"openwebtext": 21, "fineweb": 103}
GPT2 = "openai-community/{}/resolve/{}/model.safetensors"
GPT2_FILES = {  # name: (revision, sha256)
    "gpt2": ("607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": ("6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": ("32b71b12589c2f8d625668d2335a01cac3249519",
                   "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": ("15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
BACKOFF = (1, 2, 4, 8, 16, 32)  # seconds between attempts to download


def find_files(source):
    """Return the sorted files of a source: a download, Python's library, a file or a folder."""
    if source == "shakespeare":
        hint = "without a network use python prepare.py"
        return [download(SHAKESPEARE, SHAKESPEARE_SHA256, hint)]
    folder, pattern, skipped = Path(source), "*", set()
    if source == "pystdlib":  # without its tests and what pip installed
        folder, pattern = Path(sysconfig.get_path("stdlib")), "*.py"
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        sys.exit(f"{source} is neither a file nor a folder: for Python's library name none")
    files = []
    for path in sorted(folder.rglob(pattern)):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and not skipped & set(parts):
            files.append(path)
    return files


def read_files(source):
    """Yield the documents of a file, or of a folder without the files that are no text."""
    files, left_out = find_files(source), 0
    for path in files:
        try:
            yield from read_documents(path)
        except UnicodeError as error:
            if len(files) == 1:
                sys.exit(f"{path} is no text in UTF-8 ({error}): convert it, or name another file")
            left_out += 1
    if left_out:
        print(f"left out {left_out} files that are no text in UTF-8", file=sys.stderr)


def read_documents(path):
    """Yield what stands between the EOTs of a text file."""
    rest = ""  # the start of a document that goes on in the next block
    with open(path, encoding="utf-8", newline="") as file:
        while block := file.read(1 << 24):
            if "\0" in block:
                raise UnicodeError("it holds a zero byte")
            *documents, rest = (rest + block).split(EOT)
            yield from documents
    yield rest


def make_hops(count=60_000, letters="abcdefghij"):
    """Yield documents of 58 characters: a map of 10 letters, then 16 questions about it.

    The map says to which letter a, b, .. j lead. All lie on one circle. A question is the number of
    hops, 1 to 6 (the more, the rarer), the letter to start from, and the answer, from which the
    next question starts.
    """
    rng, numbers = random.Random(0), range(1, 7)
    for _ in range(count):
        circle, start = rng.sample(letters, 10), rng.randrange(10)
        text = "".join(circle[(circle.index(letter) + 1) % 10] for letter in letters)
        for hops in rng.choices(numbers, [number ** -1.5 for number in numbers], k=16):
            end = (start + hops) % 10
            text += f"{hops}{circle[start]}{circle[end]}"
            start = end
        yield text


def read_openwebtext(shards):
    """Yield the documents of its tars, which hold .xz files that are tars of .txt files."""
    for i in range(shards):
        path = download(HUB + OPENWEBTEXT.format(i))
        print(f"reading {path.name}, {i + 1} of {shards}", file=sys.stderr)
        with tarfile.open(path, "r:") as subset:
            for member in subset:
                if not member.isfile() or not member.name.endswith(".xz"):
                    continue
                with tarfile.open(fileobj=subset.extractfile(member), mode="r:xz") as archive:
                    for document in archive:
                        if document.isfile() and document.name.endswith(".txt"):
                            text = archive.extractfile(document).read().decode()
                            yield re.sub("\n\n\n+", "\n\n", text).strip()


def read_fineweb(shards):
    """Yield (split, ids). A file: 256 int32, the third is the count, then the tokens in uint16."""
    for split, number in [("val", 0)] + [("train", i + 1) for i in range(shards)]:
        path = download(HUB + FINEWEB.format(split, number))
        header = np.fromfile(path, "<i4", 256)
        tokens = np.memmap(path, "<u2", mode="r", offset=1024)
        if header[:3].tolist() != [20240520, 1, len(tokens)]:
            sys.exit(f"{path} holds no GPT-2 tokens: delete it and run the same command again")
        for start in range(0, len(tokens), 1 << 22):
            yield split, tokens[start:start + (1 << 22)]


def find_gpt2(name_or_path):
    """Return the path of a model.safetensors: OpenAI's by name, downloaded, or the path itself."""
    if name_or_path not in GPT2_FILES:
        if not Path(name_or_path).is_file():
            sys.exit(f"no file {name_or_path}: name a model.safetensors or {', '.join(GPT2_FILES)}")
        return Path(name_or_path)
    revision, sha256 = GPT2_FILES[name_or_path]
    hint = "without a network name a model.safetensors that you have"
    return download(HUB + GPT2.format(name_or_path, revision), sha256, hint)


def download(url, sha256=None, hint="run the same command again to go on"):
    """Return the path of the file at url, downloaded once into the cache and checked by its sha256.

    A broken connection is resumed, now or by the next call. Hugging Face states the sha256 if none
    is given. Exits with one line, which ends in hint, if the file is unavailable or differs.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loop-gpt2"
    path = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(url).name}"
    part = path.with_name(path.name + ".part")
    while int(os.environ.get("LOCAL_RANK", 0)) > 0 and not path.exists():
        time.sleep(1)  # under torchrun, only the first process downloads
    if path.exists():
        return path
    print(f"downloading {url} to {path}", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    for wait in (*BACKOFF, None):
        try:
            stated = fetch(url, part)
            break
        except requests.RequestException as error:
            status = None if error.response is None else error.response.status_code
            reason = f"HTTP {status}" if status else type(error).__name__
            offline = status is None and not part.exists()
            refused = status not in (None, 429, 500, 502, 503, 504)
            if offline or refused or wait is None:  # or the last attempt
                sys.exit(f"{url} could not be downloaded ({reason}): {hint}")
            print(f"{reason}, once more in {wait} s", file=sys.stderr)
            time.sleep(wait)
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != (sha256 or stated):
        part.unlink()
        sys.exit(f"{url} has the sha256 {found}, expected {sha256 or stated}: {hint}")
    os.replace(part, path)
    return path


def fetch(url, part):
    """Request url once and append what part lacks. Return the sha256 Hugging Face states, or "".

    The address of the file itself expires, so every attempt starts from url, which redirects to it.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    if url.startswith(HUB) and os.environ.get("HF_TOKEN"):  # requests drops it on other hosts
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        answers = (*response.history, response)  # one of the redirects states it
        stated = "".join(answer.headers.get("X-Linked-Etag", "") for answer in answers).strip('"')
        if response.status_code == 416:  # nothing is missing
            return stated
        response.raise_for_status()
        resumed = response.status_code == 206
        if not resumed:  # a server without ranges starts again
            have = 0
        total, shown = have + int(response.headers.get("Content-Length", 0)), time.time()
        with open(part, "ab" if resumed else "wb") as file:
            for block in response.iter_content(1 << 16):
                file.write(block)
                have += len(block)
                if time.time() - shown > 5:
                    shown = time.time()
                    print(f"{have / 1e6:,.0f} of {total / 1e6:,.0f} MB", file=sys.stderr)
    return stated


# ---- the command line ----

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show each default, and a script's docstring as it stands."""


class Parser(argparse.ArgumentParser):
    """argparse with a one-line error in place of a page of usage."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see python {self.prog} --help\n")


def flag_number(text, kind, low, high=math.inf):
    """The value of a flag, an int or a float: low <= value < high."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan  # which fails every comparison
    if not low <= value < high:
        what = "a whole number" if kind is int else "a number"
        below = f" and below {high}" if high < math.inf else ""
        raise argparse.ArgumentTypeError(f"{text} must be {what} of at least {low}{below}")
    return value


natural = partial(flag_number, kind=int, low=0)
positive = partial(flag_number, kind=int, low=1)
not_negative = partial(flag_number, kind=float, low=0)
fraction = partial(flag_number, kind=float, low=0, high=1)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", nargs="?", default="pystdlib",
        help="pystdlib, shakespeare, hops, openwebtext, fineweb, a text file or a folder")
    add("--tokenizer", choices=TOKENIZERS, help="gpt2 for openwebtext and fineweb, else byte")
    add("--shards", type=positive, help="how many files of openwebtext (21) or fineweb (103)")
    add("--data_dir", default="data", help="where to write")
    args = parser.parse_args()
    shards = SHARDS.get(args.source)
    if args.shards and not (shards and args.shards <= shards):
        parser.error(f"--shards={args.shards}: 1 to 21 for openwebtext, to 103 for fineweb")
    if Path(args.data_dir).is_file():
        parser.error(f"--data_dir={args.data_dir} is a file: name a folder")
    if args.source == "fineweb" and args.tokenizer == "byte":
        parser.error("fineweb comes in GPT-2's tokens, leave out --tokenizer=byte")
    tokenizer = get_tokenizer(args.tokenizer or ("gpt2" if shards else "byte"))
    meta = write_data(Path(args.data_dir), args.source, tokenizer, args.shards or shards)
    for split in SPLITS:
        tokens, size = meta[split]["tokens"], meta[split]["bytes"]
        print(f"{args.data_dir}/{split}.bin: {tokens:,} tokens of {size / 1e6:.1f} MB of text")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on with the downloads")
