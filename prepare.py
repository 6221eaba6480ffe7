"""
Text to tokens: writes data/train.bin and data/val.bin (bare uint16 tokens) and data/meta.json.

    python prepare.py                            the source of Python's library; needs no network
    python prepare.py arrows                     a puzzle whose answers take steps, to data-arrows/
    python prepare.py shakespeare                tinyshakespeare, downloaded
    python prepare.py notes/ --tokenizer=gpt2    a text file or all of a folder, as GPT-2's tokens
    python prepare.py openwebtext --shards=1     the paper's data, the first of its 21 files

Every source is a stream of documents, and every document goes the same way:

    documents -> train or val -> tokens, on all cores -> train.bin, val.bin

A file is one document, or several with <|endoftext|> between them. A source may be larger than
memory, a file not. What data/ held is replaced at the end, when all has been written. Downloads are
kept in ~/.cache/loop-gpt2: after an interruption the same command completes them.
"""
import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
import sysconfig
import tarfile
import tempfile
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
    if name == "byte":  # a token is a byte: the pattern only cuts the text into short pieces
        return tiktoken.Encoding("byte", pat_str=r"[\s\S]{1,64}", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a damaged download
        sys.exit(f"GPT-2's vocabulary could not be downloaded ({error}): "
                 "connect once; bytes need no download: python prepare.py --tokenizer=byte")


def split_documents(documents, one_in):
    """Yield (split, text).

    One document in `one_in` is for validation. The hash of its text decides, so no document is in
    both splits, and the order of files does not matter. An EOT follows each document. Fewer than
    100 documents are too few for that: each is cut at 90%, and EOTs stand between the parts.
    """
    documents = (text for text in documents if text.strip())
    first = list(itertools.islice(documents, 100))
    if len(first) < 100:
        yield "train", EOT.join(text[:len(text) * 9 // 10] for text in first)
        yield "val", EOT.join(text[len(text) * 9 // 10:] for text in first)
        return
    for text in itertools.chain(first, documents):
        number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
        yield "val" if number % one_in == 0 else "train", text + EOT


def token_stream(source, tokenizer, shards):
    """Yield (split, ids) for all of a source, ids (n,) in uint16."""
    if source == "openwebtext":
        documents = read_openwebtext(shards or 21)
        one_in = 2000   # 0.05% for validation, as in nanoGPT
    else:
        documents = make_puzzles(source) if source in PUZZLES else read_files(source)
        one_in = 10
    encode = partial(tokenizer.encode_to_numpy, allowed_special={EOT})
    pairs = split_documents(documents, one_in)
    with ThreadPool() as pool:  # threads suffice, because tiktoken releases Python's lock
        while batch := list(itertools.islice(pairs, 200)):
            encoded = pool.map(encode, [text for _, text in batch])
            for (split, _), ids in zip(batch, encoded, strict=True):
                yield split, ids.astype(np.uint16)


def write_data(folder, source, tokenizer, shards):
    """Write a source's tokens to folder, and return what meta.json says of them.

    They are written beside and renamed, meta.json last. So a failure leaves the old files, and a
    training that reads them goes on. Exits if a split has too little text.
    """
    meta = {"dataset": source, "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab}
    if source in PUZZLES:
        meta["puzzle"] = PUZZLES[source]["scoring"]
    make_folder(folder, "--data_dir")
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as beside:
        paths = {split: Path(beside, f"{split}.bin") for split in SPLITS}
        with open(paths["train"], "wb") as train, open(paths["val"], "wb") as val:
            for split, ids in token_stream(source, tokenizer, shards):
                (train if split == "train" else val).write(ids.tobytes())
        for split, path in paths.items():
            tokens = path.stat().st_size // 2   # of two bytes each
            if tokens < 2:
                sys.exit(f"{source} has too little text for {path.name}: name a longer source")
            meta[split] = {"tokens": tokens, "sha256": sha256_of(path)}
        Path(beside, "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for name in ("train.bin", "val.bin", "meta.json"):
            os.replace(Path(beside, name), folder / name)
    return meta


def make_folder(folder, flag):
    """Make a folder and those above it. Exits if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{flag}={folder} cannot be made ({error.strerror}): name another folder")


def load_data(data_dir):
    """Return (train, val, meta): read-only uint16 arrays that stay on disk, and meta.json."""
    folder = Path(data_dir)
    if not (folder / "meta.json").is_file():
        name = folder.name.removeprefix("data-")
        source = f" {name}" if name in PUZZLES else ""
        sys.exit(f"no data in {data_dir}: run python prepare.py{source} --data_dir={data_dir}")
    meta = json.loads((folder / "meta.json").read_text())
    arrays = [np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r") for split in SPLITS]
    if [len(array) for array in arrays] != [meta[split]["tokens"] for split in SPLITS]:
        sys.exit(f"{data_dir} is not what its meta.json says: run python prepare.py "
                 f"{meta['dataset']} --tokenizer={meta['tokenizer']} --data_dir={data_dir}")
    return *arrays, meta


# ---- where documents come from ----

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
        sys.exit(f"{source} is neither a file nor a folder nor one of pystdlib, shakespeare, "
                 f"openwebtext, {', '.join(PUZZLES)}: name one of these")
    files = []
    for path in sorted(folder.rglob(pattern)):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and not skipped & set(parts):
            files.append(path)
    return files


def read_files(source):
    """Yield the documents of a file, or of a folder without the files that are not text."""
    files, left_out = find_files(source), []
    for path in files:
        try:
            text = path.read_bytes().decode()
            if "\0" in text:
                raise ValueError(f"zero byte at {text.index(chr(0))}")
        except (OSError, ValueError) as error:
            left_out.append(f"{path} ({error})")
        else:
            yield from text.split(EOT)
    if left_out and len(files) == 1:
        sys.exit(f"cannot read {left_out[0]}: name a file of UTF-8 text")
    if left_out:
        print(f"left out {len(left_out)} of {len(files)} files that are not UTF-8 text or cannot "
              f"be read, the first: {left_out[0]}", file=sys.stderr)


def read_openwebtext(shards):
    """Yield the documents of its tars, which hold .xz files that are tars of .txt files."""
    for i in range(shards):
        path = download(OPENWEBTEXT.format(i))
        print(f"reading {path.name}, {i + 1} of {shards}", file=sys.stderr)
        if not tarfile.is_tarfile(path):    # a login page, say
            path.unlink()
            sys.exit(f"{OPENWEBTEXT.format(i)} gave something that is no tar: it is deleted, run "
                     "the same command again")
        with tarfile.open(path, "r:") as subset:
            for member in subset:
                if not member.isfile() or not member.name.endswith(".xz"):
                    continue
                with tarfile.open(fileobj=subset.extractfile(member), mode="r:xz") as archive:
                    for document in archive:
                        if document.isfile() and document.name.endswith(".txt"):
                            text = archive.extractfile(document).read().decode()
                            yield re.sub("\n\n\n+", "\n\n", text).strip()   # as published


# ---- puzzles ----

LETTERS = "abcdefghijklmnopqrst"
TRAINING_CHAINS = range(1, 6)   # lengths in letters: questions take 0 to 4 steps
TEST_CHAINS = [10]              # two of ten: 0 to 9 steps; guessing one of the ends is half right


def chain_map(rng, lengths):
    """{letter: the letter it points to}: the letters are dealt into chains of drawn lengths.

    A chain is in the alphabet's order. Its last letter, the end, points to itself.
    """
    letters, points_to = rng.sample(LETTERS, len(LETTERS)), {}
    while letters:
        length = rng.choice(lengths)
        chain = sorted(letters[:length])
        letters = letters[length:]
        points_to |= dict(zip(chain, [*chain[1:], chain[-1]], strict=True))
    return points_to


def read_map(text):
    """{letter: the letter it points to} of a puzzle's text, which begins with the map."""
    return dict(zip(LETTERS, text[:len(LETTERS)], strict=True))


def follow(points_to, letter):
    """The letters on the way from letter to its end, both with it: [letter, .., end]."""
    way = [letter]
    while points_to[way[-1]] != way[-1]:
        way.append(points_to[way[-1]])
    return way


def make_arrows(count, lengths=TRAINING_CHAINS, seed=0):
    """Yield puzzles: a map, a letter for each of LETTERS, then 16 questions about it.

    The first letter of the map says where `a` points, the second where `b` points, and so on. An
    arrow points forward in the alphabet, or back to its own letter, which is an end. The question
    c>i: follow the arrows from c, they end at i. How many steps that takes, the text does not say.
    No letter is asked twice.
    """
    rng = random.Random(seed)
    for _ in range(count):
        points_to = chain_map(rng, lengths)
        questions = [f"{letter}>{follow(points_to, letter)[-1]}"
                     for letter in rng.sample(LETTERS, 16)]
        yield "".join(points_to[letter] for letter in LETTERS) + "".join(questions)


def make_additions(count, seed=0):
    """Yield sums like 123+456=0579, each once."""
    for number in random.Random(seed).sample(range(10 ** 6), count):
        a, b = divmod(number, 1000)
        yield f"{a:03}+{b:03}={a + b:04}"


# A puzzle's tokens go to data-{name}. Its scoring, which meta.json keeps, says in bytes how long a
# document is with its EOT, after which character an answer stands, and how long that is. Only
# answers are predicted. Hidden answers are not shown to the model, so that none can be copied from
# an earlier one. A hidden answer is of one byte: to write a second, the model would have to read
# the first, which it never did in training.
PUZZLES = {
    "arrows": {"make": make_arrows, "count": 100_000, "scoring": {
        # a map, 16 questions of three bytes, the EOT
        "document_length": len(LETTERS) + 49, "answer_after": ">", "answer_length": 1,
        "hide_answers": True}},
    "addition": {"make": make_additions, "count": 100_000, "scoring": {
        "document_length": 13, "answer_after": "=", "answer_length": 4, "hide_answers": False}},
}


def make_puzzles(name):
    """Yield the documents of a puzzle, which must be as long as its scoring says."""
    puzzle = PUZZLES[name]
    scoring = puzzle["scoring"]
    assert scoring["answer_length"] == 1 or not scoring["hide_answers"], f"{name}: see PUZZLES"
    for text in puzzle["make"](puzzle["count"]):
        assert len(text.encode()) + 1 == scoring["document_length"], f"{name}: {text}"
        yield text


# ---- downloads ----

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt")
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
OPENWEBTEXT = ("https://huggingface.co/datasets/Skylion007/openwebtext/resolve/"
               "f3808c30e817981b845ec549c43e82bb467d8144/subsets/urlsf_subset{:02}.tar")  # 0 to 20
GPT2 = "https://huggingface.co/openai-community/{}/resolve/{}/model.safetensors"
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


def find_weights(name_or_path):
    """Return the path of a model's file: OpenAI's by name, downloaded, or the path itself."""
    if name_or_path not in GPT2_FILES:
        if not Path(name_or_path).is_file():
            sys.exit(f"no file {name_or_path}: name a model.safetensors, a ckpt.pt or one of "
                     f"{', '.join(GPT2_FILES)}")
        return Path(name_or_path)
    revision, sha256 = GPT2_FILES[name_or_path]
    hint = "without a network name a model.safetensors that you have"
    return download(GPT2.format(name_or_path, revision), sha256, hint)


def download(url, sha256=None, hint="run the same command again to go on"):
    """Return the path of the file at url, downloaded once into the cache and checked by its sha256.

    A broken connection is resumed, now or by the next call. Exits with one line, which ends in
    hint, if the file cannot be downloaded or has another sha256.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "loop-gpt2")
    path = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(url).name}"
    part = path.with_name(path.name + ".part")
    waits = "TORCHELASTIC_RUN_ID" in os.environ and os.environ["LOCAL_RANK"] != "0"
    while waits and not path.exists():
        time.sleep(1)  # under torchrun, only the first process downloads
    if path.exists():
        return path
    print(f"downloading {url} to {path}", file=sys.stderr)
    make_folder(cache, "XDG_CACHE_HOME")
    for wait in (1, 2, 4, 8, 16, None):     # seconds before the next try
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        try:    # always from url: it redirects to an address of the file that may expire
            with requests.get(url, headers=headers, stream=True, timeout=30) as response:
                if response.status_code == 416 and have:
                    break   # nothing is missing
                response.raise_for_status()
                # 206: the rest follows. 200: all of it follows once more
                with open(part, "ab" if response.status_code == 206 else "wb") as file:
                    for block in response.iter_content(1 << 16):
                        file.write(block)
            break
        except OSError as error:    # no network, a full disk, a busy server, a broken connection
            status = getattr(getattr(error, "response", None), "status_code", None)
            broke_off = part.exists() and part.stat().st_size > have
            if wait is None or not (broke_off or status in (429, 500, 502, 503, 504)):
                sys.exit(f"{url} could not be downloaded ({error}): {hint}")
            print(f"{error}: going on in {wait} s", file=sys.stderr)
            time.sleep(wait)
    if sha256 is not None and sha256_of(part) != sha256:
        part.unlink()
        sys.exit(f"{url} has another sha256 than {sha256}: it is deleted, run the command again")
    os.replace(part, path)
    return path


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the command line ----

def make_parser(description, prog=None):
    """argparse, which shows defaults in its help and reports an error in one line."""
    sys.stdout.reconfigure(errors="replace")    # for a terminal that is not UTF-8
    return argparse.ArgumentParser(
        prog, usage=argparse.SUPPRESS, description=description, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def main():
    parser = make_parser("Write a text as tokens for train.py.")
    add = parser.add_argument
    add("source", nargs="?", default="pystdlib",
        help=f"pystdlib, {', '.join(PUZZLES)}, shakespeare, openwebtext, a text file or a folder")
    add("--tokenizer", choices=TOKENIZERS, help="None: gpt2 for openwebtext, byte for the others")
    add("--shards", type=int, choices=range(1, 22), metavar="1..21",
        help="how many files of openwebtext; None: all 21")
    add("--data_dir", help="the folder to write; None: data, or data-NAME for a puzzle")
    args = parser.parse_args()
    data_dir = args.data_dir or (f"data-{args.source}" if args.source in PUZZLES else "data")
    tokenizer = args.tokenizer or ("gpt2" if args.source == "openwebtext" else "byte")
    if args.shards and args.source != "openwebtext":
        parser.error("--shards is for openwebtext: leave it out")
    if args.source in PUZZLES and tokenizer != "byte":
        parser.error(f"{args.source} is a puzzle of bytes: leave out --tokenizer")
    meta = write_data(Path(data_dir), args.source, get_tokenizer(tokenizer), args.shards)
    for split in SPLITS:
        print(f"{data_dir}/{split}.bin: {meta[split]['tokens']:,} {tokenizer} tokens")


if __name__ == "__main__":
    main()
