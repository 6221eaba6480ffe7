"""
What is true of this project, in the order in which data flows through it. Run it with

    pip install -r requirements.txt pytest transformers matplotlib && pytest

GPT-2's vocabulary is taken from $TIKTOKEN_CACHE_DIR or the network; without either, the tests of it say so and
are skipped. Nothing else is downloaded: what would be comes from a server on this machine.
"""
import copy
import csv
import gzip
import hashlib
import http.server
import io
import itertools
import json
import lzma
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import torch
from torch.nn import functional as F

import bench
import model as model_file
import prepare
import sample
import train
from model import GPT, GPTConfig, RESIDUALS, load_checkpoint, read_safetensors, save_checkpoint
from prepare import EOT, find_files, find_split, get_tokenizer, load_data, read_blocks
from train import PRESETS, TrainConfig, get_batch, get_lr

torch.set_num_threads(1)  # as below: one core is fastest for models as small as these
HERE = Path(__file__).parent
LAYOUTS = [(0, None), (0, 2), (1, 2), (1, 3)]  # loop_start, loop_end of three blocks


def start(script, *args, cwd, **options):
    """A script of ours in a process of its own, as a user starts it."""
    command = [sys.executable, *(str(HERE / part) if part.endswith(".py") else part for part in script.split()), *args]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}, **options)


def finish(script, *args, cwd, code=0):
    process = start(script, *args, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out


def mistake(main, *args, monkeypatch, capsys):
    """The one line in which a command ends that cannot work."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        prepare.run(main)
    line = caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err
    assert caught.value.code not in (0, None) and line.startswith(f"{main.__module__}.py: "), line
    assert "\n" not in line.strip() and "Traceback" not in line, line
    return line


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def small(**overrides):
    """A model with weights far enough from their initialisation that every term of it matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32), **overrides})).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def gpt2():
    try:
        return get_tokenizer("gpt2")
    except OSError as error:
        pytest.skip(f"not tested: {error}")


# ---- prepare.py: text to tokens ----

def any_text(seed, length):
    """Random Unicode with much white space, and separators."""
    rng = random.Random(seed)
    common = [*" \n\n\t'.aé1", "\r\n", "  ", "\u3000", "\u2028", "\x85", "<", "<|", "'s", "the", EOT]
    return "".join(rng.choice(common) if rng.random() < 0.8 else
                   chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(length))


def test_byte_tokens_are_the_bytes_and_come_back():
    tokenizer = get_tokenizer("byte")
    for seed in range(20):
        text = any_text(seed, 2000)
        plain = text.replace(EOT, "")
        assert tokenizer.encode_ordinary(plain) == list(plain.encode())
        ids = tokenizer.encode(text, allowed_special={EOT})
        assert ids.count(tokenizer.eot_token) == text.count(EOT) and tokenizer.decode(ids) == text
    assert tokenizer.n_vocab == 257 and tokenizer.eot_token == 256


def test_gpt2_tokens_come_back(gpt2):
    for seed in range(20):
        text = any_text(seed, 2000)
        assert gpt2.decode(gpt2.encode(text, allowed_special={EOT})) == text
    assert gpt2.encode("Hello world", allowed_special={EOT}) == [15496, 995] and gpt2.eot_token == 50256


def test_blocks_give_the_tokens_of_the_whole_text(tmp_path, gpt2):
    for seed in range(30):
        text = any_text(seed, 4000)
        (tmp_path / "text").write_text(text, newline="")
        blocks = list(read_blocks([tmp_path / "text"], size=400))
        assert "".join(blocks) == text and len(blocks) > 5
        whole = gpt2.encode(text, allowed_special={EOT})
        assert [i for block in blocks for i in gpt2.encode(block, allowed_special={EOT})] == whole


def test_blocks_are_bounded_and_never_cut_a_separator(tmp_path):
    (tmp_path / "text").write_text("x" * 5000 + EOT + "y" * 5000)  # without a space
    for size in range(5, 40):
        blocks = list(read_blocks([tmp_path / "text"], size))
        assert sum(block.count(EOT) for block in blocks) == 1 and max(map(len, blocks)) <= 2 * size + len(EOT)


def prepared(folder, source, *args):
    finish("prepare.py", str(source), *args, cwd=folder)
    train_data, val_data, meta = load_data(folder / "data")
    for split, data in (("train", train_data), ("val", val_data)):
        assert meta[split]["sha256"] == hashlib.sha256(data.tobytes()).hexdigest()
    decode = get_tokenizer(meta["tokenizer"]).decode
    return decode(train_data.tolist()), decode(val_data.tolist()), meta


def test_one_document_is_split_at_nine_tenths(tmp_path):
    text = any_text(1, 3000).replace(EOT, "")
    (tmp_path / "a.txt").write_text(text, newline="")
    (tmp_path / "b.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "c.gz").write_bytes(gzip.compress(text.encode()))
    cut = len(text) * 9 // 10
    for name in ("a.txt", "b.xz", "c.gz"):
        train_text, val_text, meta = prepared(tmp_path, name)
        assert (train_text, val_text) == (text[:cut], text[cut:])
        assert meta["train"]["bytes"] == len(text[:cut].encode()) == meta["train"]["tokens"]


def test_separated_documents_stay_whole(tmp_path):
    documents = [f"document {i}\n" * 20 for i in range(40)]
    (tmp_path / "a.txt").write_text(EOT.join(documents))
    train_text, val_text, meta = prepared(tmp_path, "a.txt")
    assert train_text.split(EOT) + val_text.split(EOT) == documents and 3 <= len(val_text.split(EOT)) <= 5
    assert meta["train"]["bytes"] == len(train_text.replace(EOT, ""))


def test_no_file_of_a_folder_is_in_both_splits(tmp_path):
    documents = [f"file {i}\n" * 20 for i in range(40)]
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i, text in enumerate(documents):
        (tmp_path / "in" / ("sub" if i % 2 else ".") / f"{i}.txt").write_text(text)
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "in" / ".hidden").write_text("hidden")
    train_text, val_text, _ = prepared(tmp_path, "in")
    assert sorted(train_text.split(EOT) + val_text.split(EOT)) == sorted(documents)
    assert 3 <= len(val_text.split(EOT)) <= 5


def test_pystdlib_is_python_and_each_file_stands_once():
    files = find_files("pystdlib")
    assert len(files) == len(set(files)) > 300 and all(path.suffix == ".py" for path in files)
    assert not any("site-packages" in path.parts for path in files)
    train_end, val_start = find_split(files)
    assert val_start == train_end + len(EOT)  # between two files


def test_gpt2_tokens_of_shakespeare_are_those_that_everyone_has(tmp_path, gpt2):
    try:
        find_files("shakespeare")
    except OSError as error:
        pytest.skip(f"not tested: {error}")
    _, _, meta = prepared(tmp_path, "shakespeare", "--tokenizer=gpt2")
    assert meta["train"]["sha256"] == "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f"
    assert meta["val"]["sha256"] == "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b"


CUT = 3 << 16  # bytes after which a broken connection breaks


class Server(http.server.BaseHTTPRequestHandler):
    """A web server with the faults of real ones; `script` holds what the next answers are. Where there is a `store`,
    this is the hub, which says what a file should be, but has another server give it."""
    files, script, requests, store, promised, tokens = {}, [], [], None, {}, set()
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        Server.tokens.add(("store" if "/store/" in self.path else "hub", self.headers.get("Authorization")))
        if Server.store and "/store/" not in self.path and Path(self.path).name in Server.files:
            body = Server.promised.get(Path(self.path).name) or Server.files[Path(self.path).name]
            self.send_response(302)
            self.send_header("Location", f"{Server.store}/store{self.path}?signed")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        how = Server.script.pop(0) if Server.script else "fine"
        begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        Server.requests.append((how, begin))
        body = Server.files.get(Path(self.path.removesuffix("?signed")).name, b"")
        if how in ("fine", "cut", "no ranges") and begin >= len(body):
            how = 416 if body else 404
        if isinstance(how, int):
            self.send_response(how)
            if how == 302:
                self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere{self.path}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if how == "no ranges":
            begin = 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        self.wfile.write(body[begin:begin + CUT] if how == "cut" or callable(how) else body[begin:])
        if callable(how):
            how()
        if how == "cut" or callable(how):
            self.close_connection = True


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of a Server; downloads go to a cache of this test's own, and nobody waits."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    Server.files, Server.script, Server.requests, Server.store, Server.promised, Server.tokens = {}, [], [], None, {}, set()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads_survive_what_networks_do(served, tmp_path):
    for i, (script, begins) in enumerate([
            (["fine"], [0]), ([429, 500, 503, "fine"], [0, 0, 0, 0]), ([302, "fine"], [0, 0]),
            (["cut", "cut", "fine"], [0, CUT, 2 * CUT]), (["cut", 500, "fine"], [0, CUT, CUT]),
            (["cut", "no ranges"], [0, CUT]), (["cut", 302, "fine"], [0, CUT, CUT])]):
        body = random.Random(i).randbytes(10 * CUT)
        Server.files, Server.script, Server.requests = {"f": body}, list(script), []
        path = prepare.download(f"{served}/f", hashlib.sha256(body).hexdigest(), "")
        assert path.read_bytes() == body and [begin for _, begin in Server.requests] == begins
        assert prepare.download(f"{served}/f", hashlib.sha256(body).hexdigest(), "") == path
        assert len(Server.requests) == len(begins)  # the second time it was there
    assert not list(tmp_path.rglob("*.part"))


def test_downloads_that_cannot_be_had_say_so(served, tmp_path):
    Server.files = {"f": b"something else"}
    sha256 = hashlib.sha256(b"something").hexdigest()
    for script, message, tries in [([404], "HTTP 404", 1), ([500] * 9, "HTTP 500", 7), ([429] * 9, "HTTP 429", 7), (["fine"], "not the file it was", 1)]:
        Server.script, Server.requests = list(script), []
        with pytest.raises((OSError, ValueError), match=message + ".*; use another"):
            prepare.download(f"{served}/f", sha256, "use another")
        assert len(Server.requests) == tries
    with pytest.raises(OSError, match="ConnectionError"):
        prepare.download("http://127.0.0.1:9/f", sha256, "")  # nobody listens there
    assert snapshot(tmp_path) == {}


def test_shakespeare_comes_from_the_network(served, tmp_path, monkeypatch, capsys):
    body = b"To be, or not to be.\n" * 100
    Server.files = {"input.txt": body}
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", f"{served}/input.txt")
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(sys, "argv", ["prepare.py", "shakespeare", f"--data_dir={tmp_path / 'data'}"])
    prepare.main()
    assert load_data(tmp_path / "data")[0].tobytes() == np.frombuffer(body, np.uint8)[:1890].astype(np.uint16).tobytes()
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", "0" * 64)
    line = mistake(prepare.main, "shakespeare", monkeypatch=monkeypatch, capsys=capsys)
    assert "without a network use: python prepare.py pystdlib" in line


def tar_of(*members):
    """A tar of (name, content); None as content makes a link."""
    with tarfile.open(fileobj=(f := io.BytesIO()), mode="w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = (tarfile.SYMTYPE, "/etc/passwd", 0) if body is None else (tarfile.REGTYPE, "", len(body))
            tar.addfile(info, io.BytesIO(body or b""))
    return f.getvalue()


def is_for_validation(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 2000 == 0


OWT = ("openwebtext", "--tokenizer=byte", "--shards=3")  # bytes are quick, and need no vocabulary


@pytest.fixture
def hub(served, tmp_path, monkeypatch):
    """Three files laid out as OpenWebText's, on a Server that sends to another; (text of each split, a function to run main)."""
    store = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=store.serve_forever, args=[0.05], daemon=True).start()
    Server.store = f"http://localhost:{store.server_port}"  # another host and another port
    monkeypatch.setattr(prepare, "HUB", served + "/")
    monkeypatch.chdir(tmp_path)
    expected = {"train": "", "val": ""}
    for i in range(3):
        archives = []
        for j in range(4):
            texts = [f"\n {any_text(10 * i + j, 500)} \n\n\n\n\n{random.Random(10 * i + j).randbytes(100_000).hex()}\n", "", f"a{EOT}b"]
            texts.append(next(text for n in itertools.count() if is_for_validation(text := f"{i} {j} é {n}")))
            for text in texts:
                text = re.sub("\n\n\n+", "\n\n", text).strip()
                expected["val" if is_for_validation(text) else "train"] += text + EOT
            members = [(f"../../{n}.txt", text.encode()) for n, text in enumerate(texts)]  # names that lead out of here
            archives.append((f"/openwebtext/{i}-{j}_data.xz", lzma.compress(tar_of(("link.txt", None), ("README", b"not this"), *members), preset=0)))
        Server.files[f"urlsf_subset{i:02}.tar"] = tar_of(("link.xz", None), ("LICENSE", b"nor this"), *archives)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
        prepare.main()
        return snapshot("data")

    yield expected, run
    store.shutdown()
    store.server_close()


def test_openwebtext_is_what_was_published_on_any_network(hub, tmp_path, monkeypatch):
    expected, run = hub
    monkeypatch.setenv("HF_TOKEN", "secret")
    data = run(*OWT)
    whole, val, meta = load_data("data")
    for split, tokens in (("train", whole), ("val", val)):
        assert get_tokenizer("byte").decode(tokens.tolist()) == expected[split]
        assert meta[split] == {"tokens": len(tokens), "bytes": len(expected[split].replace(EOT, "").encode()),
                               "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    assert Server.tokens == {("hub", "Bearer secret"), ("store", None)}
    for script in (["cut"] * 6, [429, 500, 503], ["cut", "no ranges", "cut", 500, "cut", "no ranges"]):
        Server.script = list(script)
        assert run(*OWT) == data and not Server.script
    for limit, files in [(2, 1), (len(whole) // 2, 2), (len(whole) - 1, 3), (len(whole) + 1, 3)]:  # only files that it needs
        Server.requests = []
        run(*OWT, f"--limit={limit}")
        train_data, val_data, meta = load_data("data")
        assert np.array_equal(train_data, whole[:limit]) and np.array_equal(val_data, val[:len(val_data)]) and len(Server.requests) == files
        assert meta["train"]["bytes"] == (train_data < 256).sum()
    assert {path.name for path in tmp_path.rglob("*")} == {"data", "train.bin", "val.bin", "meta.json"}  # nothing where the tars' names lead


class Killed(BaseException):
    """What nothing catches."""


def test_openwebtext_goes_on_after_any_end(hub, tmp_path, monkeypatch):
    _, run = hub
    data = run(*OWT)
    shutil.rmtree("data")
    (tmp_path / "driver.txt").write_text(f"import prepare; prepare.HUB = {prepare.HUB!r}; prepare.run(prepare.main)")
    Server.requests = []
    for end in (signal.SIGKILL, signal.SIGINT):
        Server.script = ["fine", "cut", lambda: (process.send_signal(end), process.wait())]
        process = start("driver.txt", *OWT, cwd=tmp_path)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, "go on with: python driver.txt openwebtext" in err) == ((-9, False) if end == signal.SIGKILL else (130, True)), err
    assert run(*OWT) == data and [begin for _, begin in Server.requests].count(0) == 3  # nothing was fetched twice

    real = os.replace

    def replace(src, dst):
        nonlocal left
        left -= 1
        if left == 0 and not after:
            raise Killed
        real(src, dst)
        if left == 0:
            raise Killed

    two_files = run(*OWT[:2], "--shards=2")
    monkeypatch.setattr(prepare.os, "replace", replace)
    for n, after in itertools.product(range(1, 7), (False, True)):  # at each of six renames, before it and after
        shutil.rmtree("data")
        left = n
        with pytest.raises(Killed):
            run(*OWT[:2], "--shards=2")
        assert run(*OWT[:2], "--shards=2") == two_files


def test_what_is_wrong_with_large_files_is_said_and_the_last_good_data_stay(hub, monkeypatch, capsys):
    _, run = hub
    good = run(*OWT[:2], "--shards=1")
    (first, body), again = next(iter(Server.files.items())), "; go on with: python prepare.py openwebtext --tokenizer=byte --shards=3"

    def refused(message, *args, end=""):
        line = mistake(prepare.main, *(args or OWT), monkeypatch=monkeypatch, capsys=capsys)
        assert re.search(message, line) and line.endswith(end), line
        assert all(path.read_bytes() == good[path] for path in good)

    monkeypatch.setattr(prepare, "LARGEST", 10**6)
    other, bomb = (tar_of(("a.xz", lzma.compress(tar_of(("a.txt", text))))) for text in (b"another text", bytes(10**6)))
    for bad, promised, message in [
            (other, body, f"{first} is not the file it was .sha256"), (body[:9000] + b"x" + body[9001:], body, "cannot be unpacked|is not the file"),
            (b"<html>" * 10**4, body, "cannot be unpacked|is not the file"), (bomb, bomb, "cannot be unpacked .more than 1000000 bytes"),
            (tar_of(("a.xz", b"not xz")), None, "cannot be unpacked"), (tar_of(("a.xz", lzma.compress(b"no tar"))), None, "cannot be unpacked"),
            (tar_of(("a.xz", bytes(10**6 + 1))), None, "cannot be unpacked .1000001 bytes"),
            (tar_of(("a.xz", lzma.compress(tar_of(("a.txt", b"\xff"))))), None, "cannot be unpacked .'utf-8'")]:
        Server.files[first], Server.promised = bad, {first: promised}
        refused(message, end=again)
        assert not Path(f"data/{first}.part").exists()
    Server.files[first], Server.promised, store, Server.store = body, {}, Server.store, None
    refused("cannot be checked, the server does not say its sha256", end=again)
    Server.store = store
    monkeypatch.setattr(prepare, "LARGEST", 10**9)
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for room in (100_000, 300_000, 900_000):  # a write beyond it fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            refused("File too large", end=again)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, ignored)
    Server.script = ["fine", 404]
    refused("HTTP 404", end=again)
    for other in ("--shards=2", "--shards=3 --limit=1000"):
        refused("unfinished.json is of another run, openwebtext --tokenizer=byte --shards=3: finish that, or delete it", *OWT[:2], *other.split())
    Path("data/train.bin.part").write_bytes(b"lost")
    refused("train.bin.part is shorter than")
    Path("data/unfinished.json").unlink()
    assert len(run(*OWT)) == 3


def test_fineweb_is_taken_as_it_is(hub, gpt2, monkeypatch, capsys):
    _, run = hub
    rng, shards = np.random.default_rng(0), {}
    for name, n in [("val_000000", 300_000), ("train_000001", 200_000), ("train_000002", 100_001)]:
        shards[name] = rng.choice([*range(2000), 50256], n).astype("<u2")
        Server.files[f"fineweb_{name}.bin"] = np.array([20240520, 1, n, *[0] * 253], "<i4").tobytes() + shards[name].tobytes()
    monkeypatch.setattr(prepare, "FINEWEB_VAL_SHA256", hashlib.sha256(Server.files["fineweb_val_000000.bin"]).hexdigest())
    both = np.concatenate([shards["train_000001"], shards["train_000002"]])
    for args, n in [(["--shards=1"], 200_000), (["--shards=2"], 300_001), (["--shards=2", "--limit=200_001"], 200_001), (["--limit=9"], 9)]:
        Server.script = ["cut", 500, "cut", "no ranges"]
        run("fineweb", *args)
        train_data, val_data, meta = load_data("data")
        assert np.array_equal(train_data, both[:n]) and np.array_equal(val_data, shards["val_000000"])
        assert meta["tokenizer"] == "gpt2" and meta["train"]["bytes"] == len(b"".join(gpt2.decode_tokens_bytes(train_data[train_data != 50256].tolist())))
    for name, message in [("train_000001", "is not a file of GPT-2's tokens"), ("val_000000", "is not the file it was")]:
        Server.files[f"fineweb_{name}.bin"] = Server.files[f"fineweb_{name}.bin"][:-2]  # less than its header says
        assert message in mistake(prepare.main, "fineweb", "--shards=1", monkeypatch=monkeypatch, capsys=capsys)
        Path("data/unfinished.json").unlink(missing_ok=True)


def test_prepare_keeps_the_last_good_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.txt").write_text("good " * 1000)
    (tmp_path / "binary").write_bytes(b"text, then\0\x01\x02")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1") * 100)
    (tmp_path / "cut.xz").write_bytes(lzma.compress(random.Random(0).randbytes(9000).hex().encode())[:4000])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(random.Random(0).randbytes(9000).hex().encode())[:4000])
    (tmp_path / "not.xz").write_bytes(b"not compressed")
    (tmp_path / "tiny.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    prepared(tmp_path, "good.txt")
    before = snapshot(tmp_path)

    def offline(name):
        raise requests.exceptions.ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for args, message in [(["nowhere"], "neither a file nor a folder"), (["binary"], "not text in UTF-8"), (["latin1.txt"], "not text in UTF-8"),
                          (["cut.xz"], "cannot be unpacked"), (["cut.gz"], "cannot be unpacked"), (["not.xz"], "cannot be unpacked"),
                          (["tiny.txt"], "too short"), (["empty"], "no text files"), (["--tokenizer=word"], "invalid choice"), (["--what"], "unrecognized"),
                          (["good.txt", "--tokenizer=gpt2"], "without a network use bytes: python prepare.py --tokenizer=byte"),
                          (["openwebtext"], "GPT-2's vocabulary could not be downloaded"), (["fineweb", "--tokenizer=byte"], "leave out --tokenizer=byte"),
                          (["openwebtext", "--shards=22"], "--shards from 1 to 21"), (["fineweb", "--shards=0"], "--shards from 1 to 103"),
                          (["fineweb", "--limit=1"], "a --limit from 2"), (["--limit=5"], "are for openwebtext and fineweb"), (["good.txt", "--shards=1"], "are for")]:
        assert message in mistake(prepare.main, *args, monkeypatch=monkeypatch, capsys=capsys)
        assert snapshot(tmp_path) == before, args


def test_damaged_data_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text " * 100)
    assert "no data yet" in mistake(train.main, monkeypatch=monkeypatch, capsys=capsys)
    prepared(tmp_path, "a.txt")
    good = (tmp_path / "data" / "val.bin").read_bytes()
    for bad, message in [(good[:-1], "has 199 bytes and should have 200"), (b"", "has 0 bytes"), (good[:-2] + b"\x01\x01", "a token 257, beyond its vocabulary of 257")]:
        (tmp_path / "data" / "val.bin").write_bytes(bad)
        line = mistake(train.main, monkeypatch=monkeypatch, capsys=capsys)
        assert message in line and "run python prepare.py" in line
    (tmp_path / "data" / "val.bin").write_bytes(good)
    assert "use a smaller --block_size" in mistake(train.main, "--block_size=100", monkeypatch=monkeypatch, capsys=capsys)
    (tmp_path / "data" / "meta.json").write_text("{")
    assert "meta.json is damaged" in mistake(train.main, monkeypatch=monkeypatch, capsys=capsys)
    assert not (tmp_path / "out").exists()


# ---- model.py: the loop ----

def by_hand(model, idx, n_loop):
    """The logits of all positions after each loop, written out from the paper's equation."""
    c = model.config

    def stack(x, blocks, scale):
        for block in blocks:
            x = x + scale * block.attn(block.ln_1(x))
            x = x + scale * block.mlp(block.ln_2(x))
        return x

    before, looped, after = model.h[:c.loop_start], model.h[c.loop_start:c.loop_end], model.h[c.loop_end:]
    x = stack(model.wte.weight[idx] + model.wpe.weight[:idx.size(1)], before, 1.0)
    logits = []
    for _ in range(n_loop):
        if c.residual == "sum":
            x = stack(x, looped, 1.0)
        if c.residual == "mean":
            x = x + (stack(x, looped, 1.0) - x) / n_loop
        if c.residual == "outer":
            x = x + stack(x, looped, 1.0)
        if c.residual == "scaled":
            x = stack(x, looped, 1 / n_loop)
        logits.append(model.ln_f(stack(x, after, 1.0)) @ model.wte.weight.T)
    return logits


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loop_is_the_paper_s_equation(residual, layout):
    idx, targets = torch.randint(50, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    for depth in (1, 2, 3, 6):
        model = small(n_loop=depth, loop_start=layout[0], loop_end=layout[1], residual=residual)
        logits, loss = model(idx, targets)
        expected = by_hand(model, idx, depth)
        torch.testing.assert_close(logits, expected[-1])
        expected_losses = [F.cross_entropy(e.reshape(-1, 50), targets.reshape(-1)) for e in expected]
        torch.testing.assert_close(loss, expected_losses[-1])
        torch.testing.assert_close(model.loop_losses(idx, targets), torch.stack(expected_losses))
        last, none = model(idx)
        torch.testing.assert_close(last, logits[:, -1:])
        assert none is None
        other = small(n_loop=7, loop_start=layout[0], loop_end=layout[1], residual=residual)
        assert torch.equal(other(idx, targets, n_loop=depth)[0], logits)  # n_loop of the call wins


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_loop_is_gpt2_bit_for_bit(layout):
    idx = torch.randint(50, (2, 16))
    plain = small().float()(idx)[0]
    for residual in ("sum", "mean", "scaled"):
        assert torch.equal(small(n_loop=1, loop_start=layout[0], loop_end=layout[1], residual=residual).float()(idx)[0], plain)
    assert not torch.allclose(small(residual="outer").float()(idx)[0], plain)  # adds the embedding twice


def test_looping_adds_no_parameters():
    with torch.device("meta"):
        shapes = [{name: p.shape for name, p in GPT(GPTConfig(n_layer=6, n_loop=n)).named_parameters()} for n in (1, 2, 6)]
        sizes = {name: sum(p.numel() for p in GPT(GPTConfig(**{k: v for k, v in preset.items() if k in GPTConfig.__dataclass_fields__})).parameters())
                 for name, preset in PRESETS.items()}
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808  # GPT-2, with biases
    assert shapes[0] == shapes[1] == shapes[2]
    assert [round(size / 1e6, 1) for size in sizes.values()] == [124.3, 81.9, 46.5, 46.5]  # the paper: 124M 81M 45M 45M


@pytest.mark.parametrize("residual", RESIDUALS)
def test_no_position_sees_a_later_one(residual):
    model, idx = small(n_loop=3, loop_start=1, residual=residual), torch.randint(50, (1, 16))
    logits = model(idx, idx)[0]
    for t in range(1, 16):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 50
        after = model(changed, idx)[0]
        assert torch.equal(after[:, :t], logits[:, :t]) and not torch.allclose(after[:, t:], logits[:, t:])


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_generation_is_uncached_generation(residual, layout):
    model = small(n_loop=3, loop_start=layout[0], loop_end=layout[1], residual=residual)
    prompt = torch.randint(50, (2, 5))
    for n_loop in (None, 1, 5):
        expected = prompt
        for _ in range(30):  # far beyond block_size=16
            logits = model(expected[:, -16:], n_loop=n_loop)[0][:, -1]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(model.generate(prompt, 30, temperature=0, n_loop=n_loop), expected)
    assert torch.equal(model.generate(prompt, 9, top_k=1), model.generate(prompt, 9, temperature=0))


def test_a_cached_token_costs_one_position(monkeypatch):
    model, widths = small(n_loop=3), []
    model.wte.register_forward_pre_hook(lambda module, args: widths.append(args[0].size(1)))
    model.generate(torch.zeros(1, 5, dtype=torch.long), 14)
    assert widths == [5] + [1] * 11 + [16, 16]  # the prompt, tokens one by one, then the sliding window


@pytest.mark.parametrize("residual", RESIDUALS)
def test_decoding_with_fixed_shapes_is_compiled_once_and_changes_nothing(residual):
    torch._dynamo.reset()
    model = small(n_loop=3, loop_start=1, loop_end=2, residual=residual)
    for prompt in (torch.randint(50, (2, 5)), torch.randint(50, (2, 1))):  # of one token: as after nothing
        model.decode = None
        expected = model.generate(prompt, 25, temperature=0)  # beyond block_size=16 too
        model.compile_decoding(backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(model.generate(prompt, 25, temperature=0), expected)
        assert model.bfloat16().generate(prompt, 25, temperature=0).shape == (2, prompt.size(1) + 25)
        model = small(n_loop=3, loop_start=1, loop_end=2, residual=residual)


def test_a_few_tokens_are_multiplied_as_many_are():
    for O, I in [(400, 300), (401, 300), (1000, 101)]:
        weight, bias = torch.randn(O, I, dtype=torch.double), torch.randn(O, dtype=torch.double)
        for shape in [(1, 1), (2, 1), (1, 3), (2, 2), (5, 1), (2, 7)]:
            x = torch.randn(*shape, I, dtype=torch.double)
            for b in (None, bias):
                torch.testing.assert_close(model_file.linear(x, weight, b), F.linear(x, weight, b))


def settled_by_hand(model, idx, depths, n_loop, exit_kl):
    """The rule without a cache: the next token's logits (V,) after idx (T,), and after how many loops its last position leaves.

    depths (T - 1) is how many loops the positions before it took.
    """
    c, T = model.config, len(idx)
    depths, states, held = torch.tensor([*depths, n_loop]), [], {}
    scale = 1 / n_loop if c.residual == "scaled" else 1.0

    def block(i, x, scale, n=0):
        q, k, v = (part.view(T, c.n_head, -1).transpose(0, 1) for part in model.h[i].attn.c_attn(model.h[i].ln_1(x)).split(c.n_embd, dim=-1))
        if n > 0:  # who has left shows the keys and values of its last loop
            left = (depths <= n)[None, :, None]
            k, v = torch.where(left, held[i][0], k), torch.where(left, held[i][1], v)
        held[i] = k, v
        scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + scale * model.h[i].attn.c_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1))
        return x + scale * model.h[i].mlp(model.h[i].ln_2(x))

    x = model.wte.weight[idx] + model.wpe.weight[:T]
    for i in range(c.loop_start):
        x = block(i, x, 1.0)
    for n in range(n_loop):
        y = x
        for i in range(c.loop_start, c.loop_end):
            y = block(i, y, scale, n)
        y = {"sum": y, "scaled": y, "outer": x + y, "mean": x + (y - x) / n_loop}[c.residual]
        x = torch.where((depths > n)[:, None], y, x)  # who has left stays as it was
        states.append(x)
    before = None
    for n in range(1, n_loop + 1):
        x = torch.cat((states[-1][:-1], states[n - 1][-1:]))  # those before as they left, the last as it is after loop n
        for i in range(c.loop_end, c.n_layer):
            x = block(i, x, 1.0)
        logits = model.ln_f(x[-1]) @ model.wte.weight.T
        p = logits.softmax(-1)
        if n == n_loop or (n > 1 and (p * (p / before).log()).sum() < exit_kl):
            return logits, n
        before = p


@torch.no_grad()
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_that_leaves_early_is_as_without_a_cache(residual, layout):
    model, together = small(n_loop=4, loop_start=layout[0], loop_end=layout[1], residual=residual), []
    prompt = torch.randint(50, (3, 4), generator=torch.Generator().manual_seed(2))
    predictions = torch.stack([model.readout(x, prompt)[0].log_softmax(-1) for x in model.states(prompt)])
    middle = F.kl_div(predictions[:-1], predictions[1:], reduction="none", log_target=True).sum(-1)[1].median().item()  # after loop 3
    for n_loop, exit_kl in [(None, middle), (6, middle), (2, math.inf), (1, math.inf)]:
        N, seen = n_loop or 4, []
        idx = torch.cat([prompt, *model.stream(prompt, 15, 2.0, n_loop=n_loop, exit_kl=exit_kl, loops=seen)], dim=1)
        depths = torch.cat((torch.full((3, 3), N), torch.stack(seen, dim=1)), dim=1)  # of all positions but the last
        cache = model_file.KVCache(16, "cpu")
        model(prompt, n_loop=n_loop, cache=cache)
        for T in range(5, 17):
            cache.advance(4 if T == 5 else 1)
            logits, took = model.settle(idx[:, T - 1:T], cache, exit_kl, n_loop)
            expected = [settled_by_hand(model, *row, N, exit_kl) for row in zip(idx[:, :T], depths[:, :T - 1].tolist())]
            torch.testing.assert_close(logits[:, 0], torch.stack([logits for logits, _ in expected]))
            assert took.tolist() == depths[:, T - 1].tolist() == [n for _, n in expected]
            together.append(took.unique().numel())
        assert (depths[:, :4] == N).all() and (depths[:, 16:] == N).all()  # the prompt, and the window that slides
    assert max(together) > 1  # some left while others of their batch went on
    assert torch.equal(model.generate(prompt, 20, temperature=0, exit_kl=0.0), model.generate(prompt, 20, temperature=0))
    tokens = model.generate(prompt, 6, temperature=0, exit_kl=middle)
    for row in range(3):  # greedy text, alone
        idx, depths = prompt[row], [4, 4, 4]
        for _ in range(6):
            logits, took = settled_by_hand(model, idx, depths, 4, middle if len(idx) > 4 else -math.inf)
            idx, depths = torch.cat((idx, logits.argmax(-1, keepdim=True))), [*depths, took]
        assert torch.equal(tokens[row], idx)


def test_a_token_that_leaves_early_costs_the_loops_it_took():
    model, calls, seen = small(n_loop=4), [], []
    model.h[0].register_forward_pre_hook(lambda block, args: calls.append(args[0].size(1)))
    for _ in model.stream(torch.zeros(1, 5, dtype=torch.long), 10, exit_kl=math.inf, loops=seen):
        pass
    assert torch.cat(seen).tolist() == [4] + [2] * 9 and calls == [5] * 4 + [1] * 18  # two predictions, to see that they agree


def test_sampling_follows_the_model_s_distribution():
    model = small(n_loop=2)
    prompt = torch.zeros(20_000, 1, dtype=torch.long)
    for temperature, top_k in [(1.0, None), (0.5, None), (1.0, 5)]:
        torch.manual_seed(0)
        drawn = model.generate(prompt, 1, temperature, top_k)[:, 1].bincount(minlength=50) / len(prompt)
        logits = model(prompt[:1])[0][0, -1] / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[-1]] = -math.inf
            assert (drawn > 0).sum() == top_k
        assert (drawn - logits.softmax(-1)).abs().max() < 0.015


def test_flops_per_token_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    for layout in LAYOUTS:
        model = small(n_loop=4, loop_start=layout[0], loop_end=layout[1]).float()
        idx = torch.randint(50, (2, 16))
        for n_loop in (1, 4):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(idx, idx, n_loop=n_loop)[1].backward()
            assert counter.get_total_flops() / idx.numel() == model.flops_per_token(n_loop)


def gradients(model, idx, **how):
    torch.manual_seed(2)  # for dropout
    model.zero_grad()
    model(idx, idx, **how)[1].backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("residual", RESIDUALS)
def test_one_compiled_block_serves_all_at_any_depth(residual):
    torch._dynamo.reset()
    idx = torch.randint(50, (2, 16))
    plain, compiled = (small(n_layer=4, loop_start=1, loop_end=3, n_loop=3, residual=residual) for _ in range(2))
    compiled.compile_parts(backend="eager")
    expected, _ = gradients(plain, idx), gradients(compiled, idx)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n_loop in (3, 1, 2, 6):
            for a, b in zip(gradients(plain, idx, n_loop=n_loop), gradients(compiled, idx, n_loop=n_loop), strict=True):
                torch.testing.assert_close(a, b)
    assert torch.equal(compiled.eval().generate(idx[:, :3], 20, temperature=0), plain.eval().generate(idx[:, :3], 20, temperature=0))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_checkpointed_loops_have_the_same_gradients(residual):
    idx, calls = torch.randint(50, (2, 16)), []
    model = small(n_loop=4, loop_start=1, loop_end=2, residual=residual, dropout=0.2).train()
    expected = gradients(model, idx)
    model.checkpoint_loops = True
    model.h[1].register_forward_pre_hook(lambda module, args: calls.append(1))
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(model, idx), strict=True))
    assert len(calls) == 4 + 3  # all but the last loop once more


def test_decay_is_for_matrices_and_muon_for_those_of_the_blocks():
    model = GPT(GPTConfig(16, 50, 2, 2, 32))
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in model_file.OPTIMIZERS:
        groups = [(type(o).__name__, g) for o in model.configure_optimizer(optimizer, 1e-3, 0.1, (0.9, 0.95)) for g in o.param_groups]
        assert sorted(names[p] for _, g in groups for p in g["params"]) == sorted(names.values())  # each exactly once
        for kind, group in groups:
            for p in group["params"]:
                assert (group["weight_decay"] > 0) == (p.dim() == 2)
                assert (kind == "Muon") == (optimizer == "muon" and p.dim() == 2 and names[p].startswith("h."))


# ---- model.py: weights from elsewhere ----

@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A GPT-2 of Hugging Face with random weights, and its file."""
    import transformers
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=128, n_layer=3, n_head=2)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path_factory.mktemp("hugging_face")
    theirs.save_pretrained(folder)
    return theirs, folder / "model.safetensors"


def test_gpt2_equals_hugging_face_in_every_layout(hugging_face):
    theirs, path = hugging_face
    idx = torch.randint(300, (2, 64))
    with torch.no_grad():
        expected = theirs(idx).logits
        for layout in LAYOUTS:
            for residual in ("sum", "mean", "scaled"):
                ours = GPT.from_pretrained(path, loop_start=layout[0], loop_end=layout[1], residual=residual, n_loop=5)
                assert (ours(idx, idx, n_loop=1)[0] - expected).abs().max() < 1e-4
                assert (ours(idx, idx)[0] - expected).abs().max() > 0.1
        short = GPT.from_pretrained(path, block_size=10)
        assert (short(idx[:, :10], idx[:, :10])[0] - expected[:, :10]).abs().max() < 1e-4
    assert [GPT.from_pretrained(path, **heads).config.n_head for heads in ({}, {"n_head": 4})] == [2, 4]


def test_blocks_start_from_the_pretrained_ones_that_are_named(hugging_face):
    theirs, path = hugging_face
    idx, model = torch.randint(300, (2, 64)), copy.deepcopy(theirs)
    for layers in ([0, 1, 2], [2, 0], [1], [0, 2, 2, 1]):
        model.transformer.h = torch.nn.ModuleList(copy.deepcopy(theirs.transformer.h[i]) for i in layers)
        ours = GPT.from_pretrained(path, layers, n_loop=3)
        assert ours.config.n_layer == ours.config.loop_end == len(layers)
        with torch.no_grad():
            assert (ours(idx, idx, n_loop=1)[0] - model(idx, use_cache=False).logits).abs().max() < 1e-4
    for layers in ([], [3], [-1], [0, 7]):
        with pytest.raises(ValueError, match="init_layers=.*which has 0 to 2"):
            GPT.from_pretrained(path, layers)
    with pytest.raises(ValueError, match="n_layer=3 contradicts"):
        GPT.from_pretrained(path, [0, 1], n_layer=3)


@torch.no_grad()
def test_mean_and_scaled_start_near_the_function_they_loop():
    idx, moved = torch.randint(50, (2, 16)), {}
    for residual in RESIDUALS:
        torch.manual_seed(0)
        model = GPT(GPTConfig(16, 50, 3, 2, 32, n_loop=4, residual=residual)).double()  # blocks that change little, as pretrained ones do
        moved[residual] = (model(idx, idx)[0] - model(idx, idx, n_loop=1)[0]).abs().mean()
    assert max(moved["mean"], moved["scaled"]) < 0.1 * moved["sum"]


def test_gpt2_by_name_is_downloaded_and_checked(hugging_face, served, monkeypatch, tmp_path):
    """OpenAI's own layout: no prefix, no head, but masks; the weights in half precision, to be sure of dtypes."""
    from safetensors.torch import save_file
    theirs, _ = hugging_face
    tensors = {name.removeprefix("transformer."): p.detach().half() for name, p in theirs.named_parameters() if name != "lm_head.weight"}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril() for i in range(3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    body = (tmp_path / "model.safetensors").read_bytes()
    Server.files = {"model.safetensors": body}
    monkeypatch.setattr(model_file, "GPT2_URL", served + "/{name}/{revision}/model.safetensors")
    monkeypatch.setitem(model_file.GPT2_WEIGHTS, "gpt2", ("revision", hashlib.sha256(body).hexdigest()))
    idx = torch.randint(300, (2, 64))
    with torch.no_grad():
        assert (GPT.from_pretrained("gpt2")(idx, idx)[0] - theirs(idx).logits).abs().max() < 0.2
    ours = dict(GPT.from_pretrained("gpt2").named_parameters())
    assert torch.equal(ours["h.1.attn.c_attn.weight"], tensors["h.1.attn.c_attn.weight"].float().T)
    assert len(Server.requests) == 1
    monkeypatch.setitem(model_file.GPT2_WEIGHTS, "gpt2", ("revision", "0" * 64))
    with pytest.raises(ValueError, match="not the file it was"):
        GPT.from_pretrained("gpt2")


def test_wrong_weights_are_refused(hugging_face, tmp_path):
    from safetensors.torch import save_file
    _, path = hugging_face
    for overrides, message in [(dict(n_layer=2), "n_layer=2 contradicts"), (dict(block_size=65), "more than the 64 positions"),
                               (dict(loop_end=4), "loop_end=4"), (dict(n_head=3), "multiple of n_head=3")]:
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(path, **overrides)
    good = read_safetensors(path)
    for change, message in [({"transformer.h.1.ln_1.weight": None}, "h.1.ln_1.weight"), ({"transformer.extra": torch.ones(2)}, "extra"),
                            ({"transformer.h.0.mlp.c_fc.weight": torch.ones(128, 511)}, "expected"), ({"transformer.wte.weight": None}, "not a GPT-2")]:
        save_file({name: t.clone() for name, t in (good | change).items() if t is not None}, tmp_path / "bad")
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path / "bad")


def test_damaged_safetensors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    path, rng = tmp_path / "f", random.Random(0)
    expected = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(7).bfloat16(), "d": torch.zeros(0, 3), "e": torch.tensor(2.0)}
    save_file(expected, path)
    good = path.read_bytes()
    for tensors in (read_safetensors(path), load_file(path)):
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    header = 8 + int.from_bytes(good[:8], "little")
    for i in range(400):
        bad = bytearray(good[:rng.randrange(len(good))] if i % 2 else good)
        if i % 2 == 0:
            bad[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            tensors = read_safetensors(path)
        except ValueError:
            continue  # what anything damaged must come to
        assert i % 2 == 0 and sum(t.numel() * t.element_size() for t in tensors.values()) == len(good) - header
    with pytest.raises(FileNotFoundError, match="no file"):
        read_safetensors(tmp_path / "none")


# ---- model.py: checkpoints ----

def test_checkpoints_come_back(tmp_path):
    model = small(n_loop=3, loop_start=1, loop_end=2, residual="outer")
    save_checkpoint(tmp_path / "new" / "c.pt", model, step=7, nested={"a": [1.5, "b"]})
    again, state = load_checkpoint(tmp_path / "new" / "c.pt")
    assert asdict(again.config) == asdict(model.config) and state == {"step": 7, "nested": {"a": [1.5, "b"]}}
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(p.float(), q)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.pt"]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_bad_checkpoints_are_refused_and_their_code_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("good.pt", small())
    good = Path("good.pt").read_bytes()
    Path("pickle.pt").write_bytes(pickle.dumps(Malice()))
    torch.save({"config": Malice()}, "code.pt")
    torch.save({"config": {}}, "other.pt")
    torch.save([1, 2], "list.pt")
    Path("empty.pt").write_bytes(b"")
    for length in (10, 1000, len(good) // 2, len(good) - 1):
        Path(f"cut{length}.pt").write_bytes(good[:length])
    for path in sorted(set(map(str, Path().glob("*.pt"))) - {"good.pt"}):
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(path)
        assert "train one with python train.py" in mistake(sample.main, f"--checkpoint={path}", monkeypatch=monkeypatch, capsys=capsys)
    assert not Path("harm").exists()
    assert "no checkpoint none.pt" in mistake(sample.main, "--checkpoint=none.pt", monkeypatch=monkeypatch, capsys=capsys)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, small(), step=1)
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails, as on a full disk
    for room in (0, 1000, path.stat().st_size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError, match="any older one is kept"):
                save_checkpoint(path, small(), step=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert snapshot(tmp_path) == before
    signal.signal(signal.SIGXFSZ, ignored)


# ---- train.py ----

def test_batches_depend_on_seed_and_step_alone():
    data = np.arange(1000, dtype=np.uint16)
    config = TrainConfig(block_size=8, batch_size=2, gradient_accumulation_steps=4)
    x, y = get_batch(data, config, step=3)
    assert x.shape == y.shape == (8, 8) and torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y[:, -1], x[:, -1] + 1)
    assert torch.equal(get_batch(data, config, step=3)[0], x)
    assert not torch.equal(get_batch(data, config, step=4)[0], x)
    assert not torch.equal(get_batch(data, TrainConfig(**{**asdict(config), "seed": 1}), step=3)[0], x)
    shares = [get_batch(data, config, step=3, rank=rank, world=4)[0] for rank in range(4)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), x)  # four processes see what one sees
    starts = torch.cat([get_batch(data, config, step)[0][:, 0] for step in range(2000)])
    assert starts.min() == 0 and starts.max() == 1000 - 8 - 1  # every window can come


def test_the_drawn_depth_depends_on_seed_and_step_alone():
    config = TrainConfig(n_loop=6, n_loop_min=3)
    draws = [train.get_n_loop(config, step) for step in range(4000)]
    assert draws == [train.get_n_loop(config, step) for step in range(4000)]
    assert draws != [train.get_n_loop(TrainConfig(n_loop=6, n_loop_min=3, seed=1), step) for step in range(4000)]
    assert sorted(set(draws)) == [3, 4, 5, 6] and all(abs(draws.count(n) - 1000) < 100 for n in set(draws))
    assert {train.get_n_loop(TrainConfig(n_loop=6), step) for step in range(100)} == {6}
    idx = torch.randint(50, (4, 16))
    for n_loop in (1, 3):  # and it is the depth of the step
        model, expected = small(n_loop=6), small(n_loop=n_loop)
        loss, norm = train.train_step(model, [], idx, idx, TrainConfig(batch_size=2, grad_clip=0.0), nullcontext(), n_loop)
        expected(idx, idx)[1].backward()
        torch.testing.assert_close(loss, expected(idx, idx)[1], check_dtype=False)
        torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


def test_a_drawn_depth_compiles_nothing_again():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward
    for residual in RESIDUALS:
        torch._dynamo.reset()
        model, idx = small(n_loop=6, residual=residual), torch.randint(50, (2, 16))
        model.compile_parts(backend=backend)
        model(idx, idx, n_loop=2)
        first = len(compiled)
        for n_loop in (1, 6, 4):
            model(idx, idx, n_loop=n_loop)[1].backward()
        assert len(compiled) == first > 0


def test_the_schedule_warms_up_and_decays():
    config = TrainConfig(max_steps=1000, warmup_steps=100, learning_rate=1.0, min_lr=0.2)
    rates = [get_lr(config, step) for step in range(1001)]
    assert rates[0] == 0.01 and rates[49] == 0.5 and rates[99] == rates[100] == 1.0 and rates[550] == pytest.approx(0.6)
    assert rates[1000] == pytest.approx(0.2) and all(a > b for a, b in zip(rates[100:], rates[101:]))
    assert get_lr(TrainConfig(max_steps=10, warmup_steps=0, learning_rate=1.0), 10) == pytest.approx(0.1)


def test_flags_win_over_presets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset=gpt2-81m-loop", "--n_loop", "3", "--no-compile", "--loop_end=4"])
    given = train.read_flags()
    config = TrainConfig(**{**PRESETS[given["preset"]], **given})
    assert (config.n_layer, config.n_loop, config.loop_end, config.compile, config.n_embd) == (6, 3, 4, False, 768)
    assert config.batch_size * config.gradient_accumulation_steps * config.block_size == 491_520  # nanoGPT's half a million


TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--n_loop=2", "--n_loop_min=1", "--block_size=16", "--batch_size=4", "--max_steps=300", "--warmup_steps=10",
        "--eval_interval=40", "--eval_iters=3", "--log_interval=5", "--dropout=0.1"]


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text.txt").write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(2000)))
    finish("prepare.py", "text.txt", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def whole_run(tiny_data):
    """Standard output of a run that nobody disturbed."""
    return finish("train.py", *TINY, "--out_dir=whole", cwd=tiny_data)


def log_of(folder):
    """log.csv without the seconds"""
    with open(folder / "log.csv", newline="") as f:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(f)]


def test_a_run_learns_and_reports(tiny_data, whole_run):
    result, rows = json.loads(whole_run.splitlines()[-1]), log_of(tiny_data / "whole")
    assert [int(row["step"]) for row in rows] == list(range(0, 301, 5)) and rows[-1]["tokens"] == str(300 * 64)
    evaluated = [row for row in rows if row["val_loss"]]
    assert [int(row["step"]) for row in evaluated] == [*range(0, 300, 40), 300]
    assert abs(float(evaluated[0]["val_loss"]) - math.log(257)) < 0.3  # knows nothing yet
    assert result["val_loss"] == float(evaluated[-1]["val_loss"]) < 2.5
    assert result["best_val_loss"] == min(float(row["val_loss"]) for row in evaluated)
    assert len(result["loop_losses"]) == 2 and result["loop_losses"][-1] == result["val_loss"]
    assert result["steps"] == 300 and result["tokens"] == 300 * 64
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2))  # a byte is a token here
    model, state = load_checkpoint(tiny_data / "whole" / "ckpt.pt")
    assert state["step"] == 300 and result["params"] == sum(p.numel() for p in model.parameters())
    _, val_data, _ = load_data(tiny_data / "data")
    config = TrainConfig(**state["train"])
    assert train.evaluate(model, val_data, config, torch.device("cpu")) == result["loop_losses"]  # the checkpoint is what was reported
    best, state = load_checkpoint(tiny_data / "whole" / "best.pt")
    assert train.evaluate(best, val_data, config, torch.device("cpu"))[-1] == result["best_val_loss"]


# a process that is killed when the third checkpoint is half written, beside the second
KILLED_WHILE_SAVING = """
import os, signal, train
real, seen = os.replace, []
def replace(src, dst):
    seen.append(dst)
    if str(dst).endswith("ckpt.pt") and sum(str(d).endswith("ckpt.pt") for d in seen) == 3:
        os.truncate(src, os.path.getsize(src) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real(src, dst)
os.replace = replace
train.main()
"""


def test_an_interrupted_run_continues_exactly(tiny_data, whole_run):
    out, resume = tiny_data / "broken", ["train.py", "--resume", "--out_dir=broken"]
    for i, (signal_number, at) in enumerate([(signal.SIGKILL, 25), (signal.SIGTERM, 60), (signal.SIGKILL, 145), (signal.SIGINT, 200)]):
        process = start(*(["train.py", *TINY, "--out_dir=broken"] if i == 0 else resume), cwd=tiny_data)
        for line in process.stdout:
            if line.startswith("step") and int(re.match(r"step (\d+)", line)[1]) >= at:
                process.send_signal(signal_number)
                break
        rest, err = process.communicate(timeout=60)
        if signal_number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            assert process.returncode == 128 + signal_number and "go on with: python train.py --resume" in rest, rest + err
    finish(*resume, cwd=tiny_data)
    assert log_of(out) == log_of(tiny_data / "whole")
    assert_same_checkpoint(out / "ckpt.pt", tiny_data / "whole" / "ckpt.pt")
    assert_same_checkpoint(out / "best.pt", tiny_data / "whole" / "best.pt")
    assert json.loads(finish(*resume, cwd=tiny_data).splitlines()[-1])["val_loss"] == json.loads(whole_run.splitlines()[-1])["val_loss"]


def test_a_kill_while_saving_leaves_the_checkpoint_before(tiny_data, whole_run):
    out = tiny_data / "torn"
    (tiny_data / "killed_while_saving.txt").write_text(KILLED_WHILE_SAVING)
    finish(f"{tiny_data}/killed_while_saving.txt", *TINY, "--out_dir=torn", cwd=tiny_data, code=-9)
    assert (out / "ckpt.pt.tmp").exists() and load_checkpoint(out / "ckpt.pt")[1]["step"] == 40
    finish("train.py", "--resume", "--out_dir=torn", cwd=tiny_data)
    assert log_of(out) == log_of(tiny_data / "whole")
    assert_same_checkpoint(out / "ckpt.pt", tiny_data / "whole" / "ckpt.pt")
    assert not list(out.glob("*.tmp"))


def assert_same_checkpoint(path, other):
    (a, state_a), (b, state_b) = load_checkpoint(path), load_checkpoint(other)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)) and a.config == b.config
    assert (state_a["step"], state_a["best_val_loss"]) == (state_b["step"], state_b["best_val_loss"])


def test_two_processes_train_what_one_does(tiny_data):
    few = [flag for flag in TINY if "dropout" not in flag and "max_steps" not in flag] + ["--max_steps=40", "--gradient_accumulation_steps=3"]
    alone = finish("train.py", *few, "--out_dir=alone", cwd=tiny_data)
    both = finish("-m torch.distributed.run --standalone --nproc_per_node=2 train.py", *few, "--out_dir=both", cwd=tiny_data)
    assert len(both.splitlines()) == len(alone.splitlines())  # only one of them prints
    rows, others = log_of(tiny_data / "alone"), log_of(tiny_data / "both")
    assert len(rows) == len(others) == 9
    for row, other in zip(rows, others):
        assert row["step"] == other["step"] and row["tokens"] == other["tokens"]
        for name in ("train_loss", "val_loss", "grad_norm"):
            assert bool(row[name]) == bool(other[name])
            assert not row[name] or float(row[name]) == pytest.approx(float(other[name]), rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data):
    process = start("train.py", *TINY, "--learning_rate=1e30", "--optimizer=adamw", "--out_dir=diverged", cwd=tiny_data)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and len(err.splitlines()) == 1 and "smaller --learning_rate" in err
    model, state = load_checkpoint(tiny_data / "diverged" / "ckpt.pt")
    assert all(p.isfinite().all() for p in model.parameters())


def test_flags_that_cannot_work_are_refused(tiny_data, whole_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    before = snapshot(tiny_data)
    for args, message in [
            (["--n_lop=6"], "unrecognized arguments: --n_lop=6"), (["--n_loop=six"], "invalid int value"), (["--residual=product"], "invalid choice"),
            (["--n_embd=30", "--n_head=4"], "n_embd=30 must be a multiple of n_head=4"), (["--loop_start=1"], "loop_start=1"),
            (["--n_layer=2", "--loop_end=3"], "loop_end=3"), (["--loop_start=-1"], "loop_start=-1"), (["--n_loop=0"], "n_loop=0 must be at least 1"),
            (["--n_loop=2", "--n_loop_min=3"], "--n_loop_min=3 must be from 1 to --n_loop=2"), (["--n_loop_min=0"], "--n_loop_min=0"),
            (["--init_layers=0,2"], "with --init_from"), (["--init_from=gpt2", "--init_layers=0-2"], "--init_layers=0-2"),
            (["--batch_size=0"], "--batch_size=0"), (["--learning_rate=nan"], "--learning_rate=nan"), (["--dropout=1"], "dropout=1"),
            (["--preset=gpt3"], "invalid choice"), (["--preset=gpt2-45m"], "run python prepare.py --tokenizer=gpt2"),
            (["--init_from=nowhere"], "no file nowhere"), (["--device=quantum"], "use --device=cpu"),
            (["--resume"], "no checkpoint out/ckpt.pt: train one with python train.py"),
            (["--resume", "--out_dir=whole", "--n_embd=32"], "--n_embd=32 cannot be resumed into"),
            (["--resume", "--out_dir=whole", "--optimizer=adamw"], "--optimizer=adamw cannot be resumed into"),
            (["--resume", "--out_dir=whole", "--max_steps=10"], "--max_steps=10"),
            *([] if torch.cuda.is_available() else [(["--device=cuda"], "use --device=cpu")])]:
        assert message in mistake(train.main, *args, monkeypatch=monkeypatch, capsys=capsys), args
        assert snapshot(tiny_data) == before
    (tmp_path / "b.txt").write_text("other data " * 100)
    finish("prepare.py", "b.txt", cwd=tmp_path)
    line = mistake(train.main, "--resume", "--out_dir=whole", f"--data_dir={tmp_path / 'data'}", monkeypatch=monkeypatch, capsys=capsys)
    assert "prepare that again, or start anew without --resume" in line


def test_training_starts_from_pretrained_weights(hugging_face, tmp_path):
    theirs, path = hugging_face
    tokens = np.random.default_rng(0).integers(300, size=2000).astype(np.uint16)
    (tmp_path / "data").mkdir()
    meta = {"dataset": "random", "tokenizer": "gpt2", "vocab_size": 300}
    for split in ("train", "val"):
        tokens.tofile(tmp_path / "data" / f"{split}.bin")
        meta[split] = {"tokens": 2000, "bytes": 2000, "sha256": ""}
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    out = finish("train.py", f"--init_from={path}", "--max_steps=0", "--n_loop=1", cwd=tmp_path)
    x, y = (torch.from_numpy(tokens[i:i + 64 * 31].astype(np.int64)).view(31, 64) for i in (0, 1))
    expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    assert json.loads(out.splitlines()[-1])["val_loss"] == pytest.approx(expected.item(), rel=1e-2)
    out = finish("train.py", f"--init_from={path}", "--max_steps=2", "--n_loop=2", "--loop_start=1", "--loop_end=2", cwd=tmp_path)
    assert json.loads(out.splitlines()[-1])["params"] == sum(p.numel() for p in theirs.parameters())
    finish("train.py", f"--init_from={path}", "--max_steps=0", "--init_layers=2,0", "--eval_iters=1", cwd=tmp_path)
    taken = load_checkpoint(tmp_path / "out" / "ckpt.pt")[0].h
    assert len(taken) == 2 and torch.equal(taken[0].attn.c_attn.weight, theirs.transformer.h[2].attn.c_attn.weight.T)


# ---- sample.py ----

def test_the_whole_way_from_text_to_text(tiny_data, whole_run):
    options = ["--checkpoint=whole/ckpt.pt", "--prompt=7 times ", "--max_new_tokens=40"]
    out = finish("sample.py", *options, "--num_samples=3", cwd=tiny_data)
    samples = out.split("-" * 80 + "\n")
    assert len(samples) == 3 and len(set(samples)) == 3 and all(s.startswith("7 times ") and len(s) > 40 for s in samples)
    assert re.search(r"\d+\.\n\d+", out)  # lines that begin and end as those of the data do
    assert finish("sample.py", *options, "--num_samples=3", cwd=tiny_data) == out
    assert finish("sample.py", *options, "--seed=1", cwd=tiny_data) != samples[0]
    greedy = [finish("sample.py", *options, "--temperature=0", f"--n_loop={n}", cwd=tiny_data) for n in (1, 2)]
    model, _ = load_checkpoint(tiny_data / "whole" / "ckpt.pt")
    for n_loop, text in zip((1, 2), greedy):
        ids = model.eval().generate(torch.tensor([[*b"7 times "]]), 40, temperature=0, n_loop=n_loop)[0].tolist()
        assert text == get_tokenizer("byte").decode(ids) + "\n"
    (tiny_data / "prompt.txt").write_text("7 times ")
    assert finish("sample.py", options[0], options[2], "--prompt_file=prompt.txt", cwd=tiny_data) == samples[0]
    assert finish("sample.py", options[0], options[2], cwd=tiny_data)  # from nothing


def test_prompts_that_cannot_work_are_refused(tiny_data, whole_run, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    for args, message in [(["--prompt=" + "x" * 17], "the prompt has 17 tokens and the model sees 16"), (["--prompt_file=none.txt"], "none.txt"),
                          (["--prompt_file=whole/ckpt.pt"], "not text in UTF-8"), (["--n_loop=0"], "--n_loop"), (["--top_k=0"], "--top_k"),
                          (["--temperature=-1"], "--temperature"), (["--exit_kl=-1"], "--exit_kl"), (["--exit_kl=1", "--show_loops"], "leave out --exit_kl"), (["--prompt=a", "--prompt_file=b"], "not allowed with"), (["--what"], "unrecognized")]:
        assert message in mistake(sample.main, "--checkpoint=whole/ckpt.pt", *args, monkeypatch=monkeypatch, capsys=capsys)


@torch.no_grad()
def test_guesses_are_the_best_of_each_loop():
    model, idx = small(n_loop=3, loop_start=1, loop_end=2), torch.randint(50, (1, 17))
    guess, probability = sample.guesses(model, idx, n_loop=4)
    expected = torch.stack(by_hand(model, idx[:, :-1], 4)).softmax(-1)[:, 0]
    assert torch.equal(guess, expected.argmax(-1))
    torch.testing.assert_close(probability, expected.max(-1).values.float())
    first, settled = sample.reached(torch.tensor([[1, 7, 5], [2, 7, 6], [1, 7, 5], [1, 7, 6]]))  # 4 loops, 3 tokens
    assert first.tolist() == [0, 0, 1] and settled.tolist() == [1, 1, 2, 3]


def test_the_loops_are_shown(tiny_data, whole_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    command = ["sample.py", "--checkpoint=whole/ckpt.pt", "--prompt=7 times", "--n_loop=4", "--max_new_tokens=100"]
    shown, picture = [], tmp_path / "loops.png"
    for terminal in (False, True):
        monkeypatch.setattr(sys, "argv", [*command, "--show_loops", *([f"--plot={picture}"] if terminal else [])])
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        sample.main()
        shown.append(capsys.readouterr().out)
    assert "\033" not in shown[0] and re.sub(r"\033\[[\d;]*m", "", shown[1]) == shown[0]
    lines = shown[0].splitlines()[-18:]
    assert shown[1].count("\033[1;32m") == 16 and "loop 4" in lines[0] and lines[1].startswith("' ' ")  # a context of 16, one guess for each
    assert re.fullmatch(r"settled after each loop, of 16 tokens: \d+ \d+ \d+ 16", lines[-1])
    assert all(len(re.findall(r" +\d+%", line)) == 4 for line in lines[1:-1])
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert "pip install matplotlib" in mistake(sample.main, *command[1:], "--plot=no.png", monkeypatch=monkeypatch, capsys=capsys)
    process = start(*command, "--exit_kl=0.01", cwd=tiny_data)
    _, err = process.communicate(timeout=60)
    assert re.search(r"\(100 tokens, [\d,]+ a second, [234]\.\d\d loops a token\)", err), err


# ---- bench.py ----

def test_bench_measures_what_its_flags_describe(tmp_path):
    flags = ["--n_layer=3", "--loop_start=1", "--n_loop=4", "--n_head=2", "--n_embd=32", "--block_size=32", "--checkpoint_loops"]
    figures = json.loads(finish("bench.py", "measure", *flags, cwd=tmp_path).splitlines()[-1])
    model = GPT(GPTConfig(32, 257, 3, 2, 32, n_loop=4, loop_start=1))
    assert figures["parameters"] == sum(p.numel() for p in model.parameters()) and figures["flops"] == model.flops_per_token()
    assert figures["depth"] == 1 + 2 * 4 and figures["tokens"] == TrainConfig.batch_size * 32
    assert all(figures[name] > 0 for name in ("cold", "step", "peak", "first", "decode")) and figures["memory"] >= 0
    assert figures["step"] < figures["cold"]
    table = finish("bench.py", *flags, cwd=tmp_path).splitlines()
    assert len(table) == 3 and table[2].split()[-1] == "1.00x" and " 9 " in table[2]
    for args, message in [(["nonsense"], "nonsense is none of its commands"), (["--n_loop=0"], "n_loop=0 must be at least 1"), (["--what"], "unrecognized")]:
        process = start("bench.py", *args, cwd=tmp_path)
        assert message in process.communicate()[1] and process.returncode in (1, 2)


def test_compare_goes_on_where_it_was_stopped(tiny_data, tmp_path):
    args = ["compare", "--seeds=1", "--max_steps=30", f"--data_dir={tiny_data / 'data'}"]
    process = start("bench.py", *args, cwd=tmp_path, start_new_session=True)
    for line in process.stdout:
        if "seed 0:" in line:  # the first model is finished, others are not
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert 1 <= len(finished) < 8 and not (tmp_path / "results").exists()
    out = finish("bench.py", *args, cwd=tmp_path)
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}.items()  # not run again
    models = json.loads((tmp_path / "results" / "tiny-max_steps=30.json").read_text())["models"]
    assert [row["depth"] for row in models.values()] == [4, 6, 6, 4, 1, 2, 2, 1]
    for label, row in models.items():
        assert row["mean"] == row["runs"][0]["val_loss"] and f"\n{label:<32}" in out and f"{row['mean']:.4f}" in out
    for short, longer, loop in [("4 x 1", "4 x 1, compute of 2 x 3", "2 x 3"), ("1 x 1", "1 x 1, compute of 1 x 2", "1 x 2")]:
        assert models[longer]["runs"][0]["steps"] == round(30 * models[loop]["flops"] / models[short]["flops"])
    assert f"4 x 1 minus 2 x 3: {models['4 x 1']['mean'] - models['2 x 3']['mean']:+.4f}" in out
    alone = finish("train.py", "--n_embd=64", "--n_head=2", "--n_layer=2", "--n_loop=3", "--learning_rate=8e-3", "--max_steps=30",
                   f"--data_dir={tiny_data / 'data'}", cwd=tmp_path)
    assert json.loads(alone.splitlines()[-1])["val_loss"] == models["2 x 3"]["mean"]


def test_compare_tunes_each_model_and_says_what_diverged(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    best, asked = {1: 2e-3, 2: 8e-3, 3: 64e-3, 4: 1e-3, 6: 8e-3, 8: 8e-3}, []  # loops: learning rate

    def trained(flags, folder, threads):
        asked.append((flags["n_loop"], flags["learning_rate"], flags["seed"]))
        if flags["n_loop"] == 6 and flags["seed"] == 1 or flags["n_loop"] == 8 and (flags["seed"] or flags["learning_rate"] > 1e-3):
            return None
        loss = 1 + abs(math.log2(flags["learning_rate"] / best[flags["n_loop"]])) + flags["seed"] / 10
        return {"val_loss": loss, "tokens": 100, "seconds": 6, "curve": [(0, 5.0), (100, loss)]}
    monkeypatch.setattr(bench, "train_run", trained)
    command = ["bench.py", "compare", "--what=loops", "--seeds=2", f"--data_dir={tiny_data / 'data'}"]
    monkeypatch.setattr(sys, "argv", [*command, "--sweep"])
    bench.main()
    out, rates = capsys.readouterr().out, json.loads((tmp_path / "results" / "tiny-rates.json").read_text())
    assert [*rates["1 x 1"]] == ["0.004", "0.008", "0.016", "0.002", "0.001"] and min(rates["1 x 1"].values()) == 1  # on beyond the edge, and back
    assert [*rates["1 x 2"]] == ["0.004", "0.008", "0.016"] and rates["1 x 2"]["0.008"] == 1
    assert [*rates["1 x 3"]] == ["0.004", "0.008", "0.016", "0.032", "0.064", "0.128"]
    assert [loss is None for loss in rates["1 x 8"].values()] == [True] * 4 + [False] * 2 and "0.0005" in rates["1 x 8"]
    models = json.loads((tmp_path / "results" / "tiny-loops.json").read_text())["models"]
    assert [row["learning_rate"] for row in models.values()] == [2e-3, 8e-3, 64e-3, 1e-3, 8e-3, 1e-3]
    assert (models["1 x 1"]["mean"], models["1 x 1"]["spread"]) == (pytest.approx(1.05), pytest.approx(0.05))
    assert models["1 x 6"]["mean"] == 1 and "1 diverged\n" in out and (tmp_path / "results" / "tiny-loops.png").exists()
    asked.clear()
    monkeypatch.setattr(sys, "argv", [*command])  # a later call takes the rates that were found
    bench.main()
    assert sorted(asked) == sorted((n, row["learning_rate"], seed) for seed in (0, 1) for n, row in zip(best, models.values()))
    assert "no learning rates" not in capsys.readouterr().out
    monkeypatch.setattr(bench, "train_run", lambda *args: None)
    monkeypatch.setattr(sys, "argv", [*command])
    bench.main()
    assert "\n1 x 8, 2 diverged\n" in capsys.readouterr().out and "NaN" not in (tmp_path / "results" / "tiny-loops.json").read_text()
    for flag, message in [("--n_loop=2", "--n_loop"), ("--seeds=0", "1 or more"), ("--bogus", "unrecognized"), ("--scale=small", "run python prepare.py --tokenizer=gpt2")]:
        assert message in mistake(bench.main, *command[1:], flag, monkeypatch=monkeypatch, capsys=capsys)


def test_compare_at_the_scale_of_gpt2_has_the_papers_models(tmp_path):
    (tmp_path / "data").mkdir()
    tokens = np.random.default_rng(0).integers(300, size=5000).astype(np.uint16)
    meta = {"dataset": "noise", "tokenizer": "gpt2", "vocab_size": 300}
    for split in ("train", "val"):
        tokens.tofile(tmp_path / "data" / f"{split}.bin")
        meta[split] = {"tokens": 5000, "bytes": 20000, "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    out = finish("bench.py", "compare", "--scale=small", "--seeds=1", "--max_steps=20", "--n_embd=24", "--block_size=16", "--batch_size=2",
                 "--eval_interval=10", "--eval_iters=1", cwd=tmp_path)
    rows = {line[:32].strip(): line[32:].split() for line in out[out.index("\nnoise"):].splitlines()[3:] if " x " in line and "minus" not in line}
    assert {label: (row[1], row[-1]) for label, row in rows.items() if len(row) == 10} == {
        "12 x 1": ("12", "3.12"), "6 x 6": ("36", "3.11"), "1 x 1": ("1", "3.98"), "1 x 2": ("2", "3.67")}
    assert {label: row[1] for label, row in rows.items() if len(row) == 9} == {
        "36 x 1, unshared": "36", "12 x 1, compute of 6 x 6": "12", "2 x 1, unshared": "2", "1 x 1, compute of 1 x 2": "1"}
    assert "in the paper, 12 x 1 minus 6 x 6: +0.01" in out and "in the paper, 1 x 1 minus 1 x 2: +0.31" in out


@torch.no_grad()
@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_bench_says_of_loops_is_so(residual):
    model, (x, y) = small(n_loop=3, loop_start=1, loop_end=2, residual=residual), torch.randint(50, (2, 2, 16))
    final = by_hand(model, x, 3)[-1].flatten(0, 1).log_softmax(-1)
    for n_loop in (3, 5):
        state = model.h[0](model.wte.weight[x] + model.wpe.weight)
        for row, logits, after in zip(bench.per_loop(model, x, y, n_loop, final), by_hand(model, x, n_loop), model.states(x, n_loop), strict=True):
            p = logits.flatten(0, 1).softmax(-1)
            expected = [F.nll_loss(p.log(), y.flatten()), (final.exp() * (final - p.log())).sum(-1).mean(), after.norm(dim=-1).mean(),
                        (after - state).norm(dim=-1).mean(), (p.argmax(-1) == final.argmax(-1)).double().mean()]
            torch.testing.assert_close(row.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
            state = after
    for exit_kl in (0.0, 0.05, math.inf):
        losses, loops = [], []
        for tokens, targets in zip(x, y):
            depths = []
            for t in range(16):
                logits, n = settled_by_hand(model, tokens[:t + 1], depths, 3, exit_kl if t else -math.inf)  # the first is a prompt
                depths.append(n)
                losses.append(F.cross_entropy(logits, targets[t]))
            loops += depths
        expected = torch.tensor([torch.stack(losses).mean(), sum(loops) / 32])
        torch.testing.assert_close(bench.leaving_early(model, x, y, exit_kl), expected, rtol=1e-6, atol=1e-6)
    assert loops == [3] + [2] * 15 + [3] + [2] * 15


def test_bench_loops_reports(tiny_data, whole_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    out = finish("bench.py", "loops", "--checkpoint=whole/ckpt.pt", "--windows=12", cwd=tiny_data)
    rows = [line.split() for line in out.splitlines() if line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "1", "2", "3", "4"]  # one pass of 2, then passes of up to 4 loops
    assert rows[1] == rows[3] and rows[1][3] == "0.0000" and rows[1][-1] == "100.0%"
    reported = json.loads(whole_run.splitlines()[-1])["loop_losses"]  # of the same windows
    assert [float(row[1]) for row in rows[:2]] == pytest.approx(reported, abs=1e-4)
    out = finish("bench.py", "loops", "--checkpoint=whole/ckpt.pt", "--exit", f"--plot={tmp_path / 'exit.png'}", cwd=tiny_data)
    assert len(out.splitlines()) == 3 + len(bench.THRESHOLDS) and (tmp_path / "exit.png").read_bytes().startswith(b"\x89PNG")
    for args, message in [(["loops", "--plot=a.png"], "give both"), (["loops", "--checkpoint=none"], "no checkpoint none"), (["lops"], "lops")]:
        monkeypatch.setattr(sys, "argv", ["bench.py", *args])
        with pytest.raises(SystemExit) as caught:
            prepare.run(bench.main)
        assert message in f"{caught.value.code} {capsys.readouterr().err}"
