"""
Text to tokens: data/train.bin and data/val.bin (uint16, nothing else in them) and data/meta.json.

    python prepare.py                            the source of the Python that runs it; needs no network
    python prepare.py shakespeare                tinyshakespeare, downloaded
    python prepare.py book.txt.xz                a file of yours (.txt, .gz, .xz, any text in UTF-8)
    python prepare.py notes/ --tokenizer=gpt2    all text files in a folder, in GPT-2's tokens
    python prepare.py openwebtext                13 GB to download, 9 billion of GPT-2's tokens
    python prepare.py fineweb --shards=1         100 million tokens a shard, 103 of them, and one for validation

`<|endoftext|>` separates documents: the files of a folder, and wherever it stands in a text. The last tenth of
the characters is the validation split, moved to the nearest end of a document if one is near.

OpenWebText and FineWeb become tokens while they arrive, and the same command goes on with what was interrupted.
Of OpenWebText one document in 2,000 is for validation, chosen by a hash of its text; FineWeb has a file for it.
"""
import argparse
import collections
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shlex
import sys
import sysconfig
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import requests
import tiktoken

EOT = "<|endoftext|>"
TOKENIZERS = ("byte", "gpt2")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HUB = "https://huggingface.co/"
OPENWEBTEXT = "datasets/Skylion007/openwebtext/resolve/f3808c30e817981b845ec549c43e82bb467d8144/subsets/urlsf_subset{:02}.tar"  # 0-20
FINEWEB = "datasets/kjj0/fineweb10B-gpt2/resolve/889765ea1f903759787add96995d81171b632d0c/fineweb_{}_{:06}.bin"  # val 0, train 1-103
FINEWEB_VAL_SHA256 = "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"
LARGE = {"openwebtext": (21, 43 * 10**7), "fineweb": (103, 10**8)}  # files, and about how many tokens in each
PATIENCE = (1, 2, 4, 8, 16, 32)  # seconds between attempts that bring nothing
LARGEST = 1 << 27  # bytes in one of OpenWebText's inner archives, which have about two million


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

@contextlib.contextmanager
def naming(what="", way_out=""):
    """Adds to an error what it is about and what its user can do."""
    try:
        yield
    except (EOFError, lzma.LZMAError, tarfile.TarError, UnicodeError) as error:
        raise ValueError(f"{what}cannot be unpacked ({error}){way_out}") from None
    except (OSError, ValueError) as error:
        raise (ValueError if isinstance(error, ValueError) else OSError)(f"{what}{error}{way_out}") from None


class Progress:
    """Says how far a download is: on a terminal in a line that renews itself, elsewhere in one line a minute."""

    def __init__(self, name, have, size, more):
        self.name, self.start, self.size, self.more = name, have, size, more  # more: files of this size, yet to come
        self.began = self.shown = time.monotonic()

    def show(self, have):
        now, terminal, done = time.monotonic(), sys.stderr.isatty(), have == self.size
        if done or now - self.shown > (0.5 if terminal else 60):
            self.shown, speed = now, max(1, have - self.start) / max(1e-3, now - self.began)
            left = timedelta(seconds=int(max(0, self.size * (1 + self.more) - have) / speed))
            line = f"{self.name}: {have / 1e6:.0f} of {self.size / 1e6:.0f} MB | {speed / 1e6:.1f} MB/s | {left} left"
            print(f"{line:<78}" if terminal else line, end="\r" if terminal and not done else "\n", file=sys.stderr, flush=True)


def fetch(url, part, sha256=None, more=0):
    """Completes the file `part` from url, going on after what is there; yields again and again how many bytes are.

    Without a sha256 the hub says which it should be. Raises OSError if the server does not give the file, and
    ValueError, at its end, if that was another one; then part is gone.
    """
    most, waits, answered = 0, iter(PATIENCE), False
    headers = {"Accept-Encoding": "identity"}
    if url.startswith(HUB) and (token := os.environ.get("HF_TOKEN")):  # requests keeps it from other hosts
        headers["Authorization"] = f"Bearer {token}"
    while True:
        have = part.stat().st_size if part.exists() else 0
        yield have
        response = None
        try:
            with requests.get(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}), stream=True, timeout=30) as response:
                answered, hub = True, [answer.headers.get("X-Linked-Etag") for answer in (*response.history, response)]
                sha256 = sha256 or next(filter(None, hub), "").strip('"')  # the hub says it as it sends us on to its store
                if response.status_code == 416:  # there is nothing beyond what we have
                    break
                response.raise_for_status()
                if not sha256:
                    raise OSError("cannot be checked, the server does not say its sha256")
                have = have if response.status_code == 206 else 0
                progress = Progress(Path(url).name, have, have + int(response.headers.get("Content-Length", 0)), more)
                with open(part, "ab" if have else "wb") as f:
                    for block in response.iter_content(1 << 16):
                        f.write(block)
                        f.flush()
                        have += len(block)
                        if have > most:  # a server without ranges, which begins anew, has to get further than before
                            most, waits = have, iter(PATIENCE)
                        progress.show(have)
                        yield have
            break
        except requests.RequestException as error:
            refused = response is not None and not response.ok
            reason = f"HTTP {response.status_code}" if refused else type(error).__name__
            hopeless = not answered or refused and response.status_code not in (429, 500, 502, 503, 504)
            wait = next(waits, None)
            if hopeless or wait is None:  # no network, or not there; a busy server and a lost connection may mend
                raise OSError(f"could not be downloaded ({reason})") from None
            time.sleep(wait)
    with open(part, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise ValueError(f"is not the file it was (sha256 {found[:12]}..., expected {sha256[:12]}...)")


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
    with naming(f"{url} ", f"; {otherwise}"):
        for _ in fetch(url, part, sha256):
            pass
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

def in_order(function, items):
    """map, on all cores: a few items ahead of its reader, so that any number of them fits in memory."""
    workers, waiting = os.cpu_count() or 1, collections.deque()
    with ThreadPoolExecutor(workers) as pool:  # threads will do, tiktoken and lzma work without Python's lock
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_tokens(path, texts, tokenizer):
    """Tokenize texts on all cores into path; return what meta.json says of a split."""
    def encode(text):
        return tokenizer.encode_to_numpy(text, allowed_special={EOT}).astype(np.uint16), len(text.replace(EOT, "").encode())

    tokens, size, sha256 = 0, 0, hashlib.sha256()
    with open(path, "wb") as f:
        for ids, length in in_order(encode, texts):
            f.write(ids)
            sha256.update(ids)
            tokens, size = tokens + len(ids), size + length
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


# ---- OpenWebText and FineWeb: too large to be read twice, or at once ----

class Incoming:
    """A file to read while a fetch, `growth`, is completing it."""

    def __init__(self, path, growth):
        self.there, self.growth = next(growth), growth
        path.touch()
        self.file = open(path, "rb")

    def read(self, n):
        while self.there < self.file.tell() + n:
            self.there = next(self.growth, sys.maxsize)  # that is: all
        return self.file.read(n)


def split_of(text):
    """Which split a document is in, for ever: 0.05% are for validation, and what stands there twice is never in both."""
    return "val" if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 2000 == 0 else "train"


def read_openwebtext(f, tokenizer, enough):
    """(split, tokens) of one of its files, a tar of xz-compressed tars of documents; of the split train until enough()."""
    def archives():
        with tarfile.open(fileobj=f, mode="r|") as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".xz"):
                    if member.size > LARGEST:
                        raise tarfile.ReadError(f"{member.size} bytes in an archive")
                    yield tar.extractfile(member).read()

    def encode(archive):
        unpacked, texts = lzma.open(io.BytesIO(archive)).read(LARGEST + 1), {"train": [], "val": []}
        if len(unpacked) > LARGEST:
            raise lzma.LZMAError(f"more than {LARGEST} bytes in an archive")
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(".txt"):  # as published: at most one empty line, none around
                    text = re.sub("\n\n\n+", "\n\n", unpacked[member.offset_data:member.offset_data + member.size].decode()).strip()
                    texts[split_of(text)] += [text, EOT]
        return [(split, tokenizer.encode_to_numpy("".join(text), allowed_special={EOT}).astype(np.uint16))
                for split, text in texts.items() if split == "val" or not enough()]

    for splits in in_order(encode, archives()):
        yield from splits


def read_fineweb(f, split):
    """(split, tokens) of one of its files: 256 int32, of which the third counts the tokens that follow, EOT before each document."""
    header, tokens = np.frombuffer(f.read(1024), "<i4"), 0
    while block := f.read(1 << 20):
        yield split, np.frombuffer(block, "<u2")
        tokens += len(block) // 2
    if header[:3].tolist() != [20240520, 1, tokens]:
        raise ValueError("is not a file of GPT-2's tokens")


def write_large(source, tokenizer, shards, limit, folder):
    """The data from the first `shards` files of source, cut after `limit` tokens of training if it is not None.

    A file counts when it has come to its end and was the right one: then unfinished.json takes down how long
    train.bin.part and val.bin.part are, and from there the same command goes on, whatever ended this one.
    """
    files = [(HUB + OPENWEBTEXT.format(i), None) for i in range(shards)]
    if source == "fineweb":
        files = [(HUB + FINEWEB.format("val", 0), FINEWEB_VAL_SHA256)] + [(HUB + FINEWEB.format("train", i + 1), None) for i in range(shards)]
    limits = {"train": limit or sys.maxsize, "val": sys.maxsize}
    needed = min(len(files), -(-limits["train"] // LARGE[source][1]) + (source == "fineweb"))  # about: for the time left
    lengths = np.zeros(1 << 16, np.int64)  # of each token, in bytes; a separator is not text
    lengths[:tokenizer.eot_token] = [len(token) for token in tokenizer.decode_tokens_bytes(range(tokenizer.eot_token))]
    names = {"train": folder / "train.bin", "val": folder / "val.bin", "meta": folder / "meta.json", "state": folder / "unfinished.json"}
    parts = {name: path.with_name(path.name + ".part") for name, path in names.items()}
    run = f"{source} --tokenizer={tokenizer.name} --shards={shards}" + (f" --limit={limit}" if limit else "")
    meta = {"dataset": source, "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab} | {split: {"tokens": 0, "bytes": 0} for split in limits}
    done = 0
    if names["state"].exists():
        theirs, done, meta = json.loads(names["state"].read_text())
        if theirs != run:
            raise ValueError(f"{names['state']} is of another run, {theirs}: finish that, or delete it first")

    def enough():
        return meta["train"]["tokens"] >= limits["train"]

    def replace(name, content):
        parts[name].write_text(json.dumps(content, indent=1) + "\n")
        os.replace(parts[name], names[name])

    if "sha256" not in meta["val"]:  # else all is there, and it was stopped while it renamed
        with open(parts["train"], "ab") as train, open(parts["val"], "ab") as val:
            out = {"train": train, "val": val}
            for split, f in out.items():
                if f.tell() < 2 * meta[split]["tokens"]:
                    raise ValueError(f"{f.name} is shorter than {names['state']} says: delete both to start anew")
                f.truncate(2 * meta[split]["tokens"])
            for number, (url, sha256) in enumerate(files):
                raw = folder / f"{Path(url).name}.part"
                if number >= done and not enough():
                    growth = fetch(url, raw, sha256, max(0, needed - number - 1))
                    try:
                        with naming(f"{url} "):
                            incoming = Incoming(raw, growth)
                            for split, ids in (read_openwebtext(incoming, tokenizer, enough) if source == "openwebtext" else
                                               read_fineweb(incoming, "train" if number else "val")):
                                ids = ids[:limits[split] - meta[split]["tokens"]]
                                out[split].write(ids)
                                meta[split]["tokens"] += len(ids)
                                meta[split]["bytes"] += int(lengths[ids].sum())
                            for _ in growth:  # what follows the end of a tar; and then it is checked
                                pass
                    except ValueError:
                        raw.unlink(missing_ok=True)  # not what it should be: nothing to go on from
                        raise
                    for f in out.values():
                        f.flush()
                        os.fsync(f.fileno())
                    replace("state", (run, number + 1, meta))
                raw.unlink(missing_ok=True)
        for split in out:
            with open(parts[split], "rb") as f:
                meta[split]["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
        replace("state", (run, len(files), meta))
    for split in limits:
        if parts[split].exists():
            os.replace(parts[split], names[split])
        print(f"{names[split]}: {meta[split]['tokens']:,} tokens of {meta[split]['bytes'] / 1e6:.1f} MB of text")
    replace("meta", meta)
    names["state"].unlink()


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
    parser.add_argument("source", nargs="?", default="pystdlib",
                        help="pystdlib, shakespeare, openwebtext, fineweb, a text file or a folder (default: %(default)s)")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, help="default: gpt2 for openwebtext and fineweb, else byte")
    parser.add_argument("--shards", type=int, help="of openwebtext and fineweb, how many files of training text (default: all, 21 and 103)")
    parser.add_argument("--limit", type=int, help="of openwebtext and fineweb, how many tokens of training at most, from files downloaded whole")
    parser.add_argument("--data_dir", default="data", help="where to write (default: %(default)s)")
    args = parser.parse_args()
    large, folder = LARGE.get(args.source), Path(args.data_dir)
    args.tokenizer = args.tokenizer or ("gpt2" if large else "byte")
    if large:
        args.shards = large[0] if args.shards is None else args.shards
        if not 1 <= args.shards <= large[0] or args.limit is not None and args.limit < 2:
            parser.error(f"{args.source} takes --shards from 1 to {large[0]}, and a --limit from 2")
        if (args.source, args.tokenizer) == ("fineweb", "byte"):
            parser.error("fineweb comes in GPT-2's tokens; leave out --tokenizer=byte")
        tokenizer, again = get_tokenizer(args.tokenizer), f"go on with: {shlex.join(['python', *sys.argv])}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with naming(way_out=f"; {again}"):
                return write_large(args.source, tokenizer, args.shards, args.limit, folder)
        except KeyboardInterrupt:
            print(f"\n{again}", file=sys.stderr)
            raise
    if (args.shards, args.limit) != (None, None):
        parser.error("--shards and --limit are for openwebtext and fineweb")

    tokenizer = get_tokenizer(args.tokenizer)
    files = find_files(args.source)
    train_end, val_start = find_split(files)
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
