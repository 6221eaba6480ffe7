"""
What is true of this project, in the order in which data flows through it. Run it with

    pip install -r requirements.txt pytest transformers matplotlib && pytest

GPT-2's vocabulary comes from $TIKTOKEN_CACHE_DIR or the network; without either, the tests of it
say so and are skipped. All else that would be downloaded comes from a server on this machine.
"""
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
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import torch
from torch.nn import functional as F

import bench
import prepare
import sample
import train
from model import (
    GPT,
    OPTIMIZERS,
    RESIDUALS,
    GPTConfig,
    compile_blocks,
    configure_optimizers,
    flops_per_token,
    from_pretrained,
    generate,
    load_checkpoint,
    read_safetensors,
    save_checkpoint,
)
from prepare import EOT, get_tokenizer, load_data
from train import PRESETS, get_args, get_batch, get_lr

torch.set_num_threads(1)  # as in the runs below: one core is fastest for models this small
HERE = Path(__file__).parent
LAYOUTS = [(0, None), (0, 2), (1, 2), (1, 3)]  # loop_start, loop_end of three blocks


def start(script, *args, cwd, **options):
    """Start a script of ours as a user does, in a process of its own."""
    parts = [str(HERE / part) if part.endswith(".py") else part for part in script.split()]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *parts, *map(str, args)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(script, *args, cwd, code=0):
    process = start(script, *args, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out


def mistake(main, *args, monkeypatch, capsys):
    """The one line in which a command ends that cannot work."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        main()
    capture = capsys.readouterr()
    line = caught.value.code if isinstance(caught.value.code, str) else capture.err
    assert caught.value.code not in (0, None) and line, args
    assert "\n" not in line.strip() and "Traceback" not in line, line
    return line


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def small(**overrides):
    """A model whose weights are so far from their initial values that every term of it matters."""
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32) | overrides
    model = GPT(GPTConfig(**shape)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def complete(model, idx, count, **options):
    return torch.cat([idx, *generate(model, idx, count, **options)], dim=1)


@pytest.fixture(scope="session")
def gpt2():
    try:
        return get_tokenizer("gpt2")
    except SystemExit as error:
        pytest.skip(f"not tested: {error}")


# ---- prepare.py: text to tokens ----

def any_text(seed, length):
    """Random Unicode with much white space, and separators."""
    rng = random.Random(seed)
    common = [*" \n\n\t'.aé1", "\r\n", "\u3000", "\u2028", "\x85", "<", "<|", "'s", "the", EOT]
    text = ""
    for _ in range(length):
        rare = rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])
        text += rng.choice(common) if rng.random() < 0.8 else chr(rare)
    return text


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
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.eot_token == 50256


def prepared(folder, source, *args):
    """The text of both splits, and meta.json, after checking that they agree."""
    finish("prepare.py", str(source), *args, cwd=folder)
    *splits, meta = load_data(folder / "data")
    texts = []
    tokenizer = get_tokenizer(meta["tokenizer"])
    for split, data in zip(("train", "val"), splits, strict=True):
        text = tokenizer.decode(data.tolist())
        assert meta[split] == {"tokens": len(data), "bytes": len(text.replace(EOT, "").encode()),
                               "sha256": hashlib.sha256(data.tobytes()).hexdigest()}
        texts.append(text)
    return *texts, meta


def test_one_document_is_cut_at_nine_tenths(tmp_path):
    text = any_text(1, 3000).replace(EOT, "")
    cut = len(text) * 9 // 10
    files = {"a.txt": text.encode(), "b.xz": lzma.compress(text.encode()),
             "c.gz": gzip.compress(text.encode())}
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
        assert prepared(tmp_path, name)[:2] == (text[:cut], text[cut:])


def goes_to_val(text, one_in):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % one_in == 0


def test_documents_stay_whole_and_their_hash_decides_the_split(tmp_path):
    documents = [f"document {i}\n" * 20 for i in range(300)]
    (tmp_path / "a.txt").write_text(EOT.join(documents))
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i, text in enumerate(documents):
        (tmp_path / "in" / ("sub" if i % 2 else ".") / f"{i:03}.txt").write_text(text)
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "in" / "latin1.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "in" / ".hidden").write_text("hidden")
    for source in ("a.txt", "in"):
        for split_text, is_val in zip(prepared(tmp_path, source)[:2], (False, True), strict=True):
            expected = [text for text in documents if goes_to_val(text, 10) == is_val]
            assert sorted(split_text.split(EOT)) == sorted([*expected, ""])
            assert len(expected) > 15


def test_few_documents_are_each_cut(tmp_path):
    (tmp_path / "a.txt").write_text(EOT.join(["a" * 100, "", "b" * 50]))
    assert prepared(tmp_path, "a.txt")[:2] == ("a" * 90 + EOT + "b" * 45, "a" * 10 + EOT + "b" * 5)


def test_slabs_keep_order_and_bound_memory():
    pairs = [("train", "x" * random.Random(i).randrange(50)) for i in range(500)]
    groups = list(prepare.slabs(pairs, size=100))
    assert [pair for group in groups for pair in group] == pairs
    assert max(sum(len(text) for _, text in group) for group in groups) < 150


def test_the_python_library_is_found_without_what_pip_installed():
    files = prepare.find_files("pystdlib")
    assert len(files) == len(set(files)) > 300 and all(path.suffix == ".py" for path in files)
    assert not any({"site-packages", "test"} & {*path.parts} for path in files)


class Server(http.server.BaseHTTPRequestHandler):
    """A web server with the faults of real ones; `script` says what the next answers are.

    With a `store` it is the hub, which says what a file is and has another server send it.
    """
    CUT = 3 << 16  # bytes after which a broken connection breaks
    files, promised, script, requests, tokens, store = {}, {}, [], [], set(), None
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, length=0, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self):
        from_store = "/store/" in self.path
        Server.tokens.add(("store" if from_store else "hub", self.headers.get("Authorization")))
        name = Path(self.path).name
        body = Server.files.get(name, b"")
        if Server.store and body and not from_store:
            etag = hashlib.sha256(Server.promised.get(name, body)).hexdigest()
            location = f"{Server.store}/store{self.path}"
            return self.answer(302, Location=location, X_Linked_Etag=f'"{etag}"')
        how = Server.script.pop(0) if Server.script else "fine"
        begin = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
        Server.requests.append(begin)
        if isinstance(how, int) or not body:
            return self.answer(how if isinstance(how, int) else 404)
        if begin >= len(body):
            return self.answer(416)
        begin = 0 if how == "no ranges" else begin
        self.answer(200 if how == "no ranges" else 206, len(body) - begin)
        self.wfile.write(body[begin:begin + Server.CUT] if how == "cut" else body[begin:])
        self.close_connection = how == "cut"


def serve():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    return server


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of a Server. Downloads go to this test's own cache, and nobody waits."""
    server = serve()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    Server.files, Server.promised, Server.script, Server.requests = {}, {}, [], []
    Server.tokens, Server.store = set(), None
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads_survive_what_networks_do(served, tmp_path):
    cut = Server.CUT
    for i, (script, begins) in enumerate([
            (["fine"], [0]), ([429, 500, 503, "fine"], [0, 0, 0, 0]),
            (["cut", "cut", "fine"], [0, cut, 2 * cut]), (["cut", 500, "fine"], [0, cut, cut]),
            (["cut", "no ranges"], [0, cut]), (["cut"] * 9, [i * cut for i in range(10)])]):
        body = random.Random(i).randbytes(10 * cut)
        Server.files, Server.script, Server.requests = {f"f{i}": body}, list(script), []
        for _ in range(2):  # the second time it is there
            path = prepare.download(f"{served}/f{i}", hashlib.sha256(body).hexdigest())
            assert path.read_bytes() == body and Server.requests == begins
    assert not list(tmp_path.rglob("*.part"))


def test_downloads_that_cannot_be_had_say_so(served, tmp_path):
    Server.files = {"f": b"something else"}
    sha256 = hashlib.sha256(b"something").hexdigest()
    for script, message, tries in [([404], "HTTP 404", 1), ([500] * 9, "HTTP 500", 7),
                                   ([429] * 9, "HTTP 429", 7), (["fine"], "has the sha256", 1)]:
        Server.script, Server.requests = list(script), []
        with pytest.raises(SystemExit, match=message + ".*: use another"):
            prepare.download(f"{served}/f", sha256, "use another")
        assert len(Server.requests) == tries
    with pytest.raises(SystemExit, match="expected : "):  # nobody says what it should be
        prepare.download(f"{served}/f")
    with pytest.raises(SystemExit, match="ConnectionError"):
        prepare.download("http://127.0.0.1:9/f", sha256)  # nobody listens there
    assert snapshot(tmp_path) == {}


def run_prepare(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
    prepare.main()
    return snapshot("data")


def test_shakespeare_comes_from_the_network(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    body = b"To be, or not to be.\n" * 100
    Server.files = {"input.txt": body}
    monkeypatch.setattr(prepare, "SHAKESPEARE", f"{served}/input.txt")
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    run_prepare(monkeypatch, "shakespeare")
    assert load_data("data")[0].tolist() == list(body[:1890])
    monkeypatch.setattr(prepare, "SHAKESPEARE", "http://127.0.0.1:9/input.txt")
    line = mistake(prepare.main, "shakespeare", monkeypatch=monkeypatch, capsys=capsys)
    assert line.endswith(": without a network use python prepare.py")


def tar_of(*members):
    """A tar of (name, content); content None makes a link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            if body is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(body or b"")
            tar.addfile(info, io.BytesIO(body or b""))
    return file.getvalue()


@pytest.fixture
def hub(served, tmp_path, monkeypatch):
    """Three files laid out as OpenWebText's, on a hub with a store; the text of each split."""
    store = serve()
    Server.store = f"http://localhost:{store.server_port}"  # another host and another port
    monkeypatch.setattr(prepare, "HUB", served + "/")
    monkeypatch.setattr(prepare, "SHARDS", {"openwebtext": 3, "fineweb": 103})
    monkeypatch.chdir(tmp_path)
    expected = {"train": "", "val": ""}
    for i in range(3):
        archives = []
        for j in range(4):
            noise = random.Random(10 * i + j).randbytes(80_000).hex()  # long enough to break off
            texts = [noise, ""]
            for k in range(40):
                texts.append(f"\n {any_text(k, 50)} \n\n\n\n\n{i} {j}\n".replace(EOT, ""))
            texts.append(next(text for n in itertools.count()
                              if goes_to_val(text := f"{i} {j} é {n}", 2000)))
            for text in texts:
                text = re.sub("\n\n\n+", "\n\n", text).strip()
                if text:
                    expected["val" if goes_to_val(text, 2000) else "train"] += text + EOT
            members = [(f"../../{n}.txt", text.encode()) for n, text in enumerate(texts)]
            inner = tar_of(("link.txt", None), ("README", b"not this"), *members)
            archives.append((f"/openwebtext/{i}-{j}_data.xz", lzma.compress(inner, preset=0)))
        body = tar_of(("link.xz", None), ("LICENSE", b"nor this"), *archives)
        Server.files[f"urlsf_subset{i:02}.tar"] = body
    yield expected
    store.shutdown()
    store.server_close()


def test_openwebtext_is_what_was_published(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    Server.script = ["cut", 500, "no ranges", 429, 503, "cut"]
    data = run_prepare(monkeypatch, "openwebtext", "--tokenizer=byte")
    *splits, meta = load_data("data")
    for split, tokens in zip(("train", "val"), splits, strict=True):
        assert get_tokenizer("byte").decode(tokens.tolist()) == hub[split]
        assert meta[split]["bytes"] == len(hub[split].replace(EOT, "").encode())
    assert Server.tokens == {("hub", "Bearer secret"), ("store", None)}
    Server.requests = []
    assert run_prepare(monkeypatch, "openwebtext", "--tokenizer=byte") == data
    assert not Server.requests  # all of it was in the cache
    written = {path.name for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert written == {"data", "train.bin", "val.bin", "meta.json"}  # nothing elsewhere


def test_openwebtext_goes_on_after_a_kill(hub, tmp_path, monkeypatch):
    data = run_prepare(monkeypatch, "openwebtext", "--tokenizer=byte")
    shutil.rmtree("data")
    shutil.rmtree("cache")
    driver = f"import prepare; prepare.HUB = {prepare.HUB!r}; prepare.SHARDS['openwebtext'] = 3\n"
    (tmp_path / "driver.txt").write_text(driver + "prepare.main()")
    Server.requests = []
    Server.script = ["fine", "cut", *[429] * 99]  # it waits in the middle of the second file
    process = start("driver.txt", "openwebtext", "--tokenizer=byte", cwd=tmp_path)
    while len(Server.requests) < 4:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(Path("data").glob("*.bin"))
    Server.script, Server.requests = [], []
    assert run_prepare(monkeypatch, "openwebtext", "--tokenizer=byte") == data
    assert Server.requests == [Server.CUT, 0]  # the rest of the second, and the third
    assert not list(Path("data").glob("*.tmp"))


def test_a_wrong_file_of_openwebtext_is_refused(hub, monkeypatch, capsys):
    good = run_prepare(monkeypatch, "openwebtext", "--tokenizer=byte", "--shards=1")
    shutil.rmtree("cache")
    Server.promised = {"urlsf_subset01.tar": b"another"}
    line = mistake(prepare.main, "openwebtext", "--tokenizer=byte", monkeypatch=monkeypatch,
                   capsys=capsys)
    assert "urlsf_subset01.tar has the sha256" in line and line.endswith("to go on")
    assert snapshot("data") == good and not list(Path("cache").rglob("*.part"))


def test_fineweb_is_taken_as_it_is(hub, gpt2, monkeypatch, capsys):
    rng, shards = np.random.default_rng(0), {}
    for name, n in [("val_000000", 300_000), ("train_000001", 200_000), ("train_000002", 99_999)]:
        shards[name] = rng.choice([*range(2000), 50256], n).astype("<u2")
        header = np.array([20240520, 1, n, *[0] * 253], "<i4").tobytes()
        Server.files[f"fineweb_{name}.bin"] = header + shards[name].tobytes()
    both = np.concatenate([shards["train_000001"], shards["train_000002"]])
    for count, n in [(1, 200_000), (2, 299_999)]:
        run_prepare(monkeypatch, "fineweb", f"--shards={count}")
        train_data, val_data, meta = load_data("data")
        assert np.array_equal(train_data, both[:n])
        assert np.array_equal(val_data, shards["val_000000"])
        text = gpt2.decode_tokens_bytes(train_data[train_data != 50256].tolist())
        assert meta["tokenizer"] == "gpt2" and meta["train"]["bytes"] == len(b"".join(text))
    Server.files["fineweb_train_000003.bin"] = Server.files["fineweb_train_000002.bin"][:-2]
    line = mistake(prepare.main, "fineweb", "--shards=3", monkeypatch=monkeypatch, capsys=capsys)
    assert "holds no GPT-2 tokens: delete it" in line


def test_prepare_keeps_the_last_good_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise = random.Random(0).randbytes(9000).hex().encode()
    for name, body in {"good.txt": b"good " * 1000, "binary": b"text, then\0\x01\x02",
                       "tiny.txt": b"x", "latin1.txt": b"\xe9" * 100, "separator.txt": EOT.encode(),
                       "cut.xz": lzma.compress(noise)[:4000], "cut.gz": gzip.compress(noise)[:4000],
                       "not.xz": b"not compressed"}.items():
        (tmp_path / name).write_bytes(body)
    (tmp_path / "empty").mkdir()
    prepared(tmp_path, "good.txt")
    before = snapshot(tmp_path)

    def offline(name):
        raise requests.exceptions.ConnectionError
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    for args, message in [
            (["nowhere"], "neither a file nor a folder"), (["binary"], "no text in UTF-8"),
            (["latin1.txt"], "no text in UTF-8"), (["cut.xz"], "no text in UTF-8"),
            (["cut.gz"], "no text in UTF-8"), (["not.xz"], "no text in UTF-8"),
            (["tiny.txt"], "too little text"), (["separator.txt"], "too little text"),
            (["empty"], "too little text"), (["--tokenizer=word"], "invalid choice"),
            (["--what"], "unrecognized"), (["openwebtext"], "GPT-2's vocabulary could not be"),
            (["good.txt", "--tokenizer=gpt2"], "or use bytes: python prepare.py --tokenizer=byte"),
            (["fineweb", "--tokenizer=byte"], "leave out --tokenizer=byte"),
            (["openwebtext", "--shards=22"], "21 --shards"), (["good.txt", "--shards=1"], "none"),
            (["fineweb", "--shards=0"], "must be at least 1")]:
        assert message in mistake(prepare.main, *args, monkeypatch=monkeypatch, capsys=capsys)
        assert snapshot(tmp_path) == before, args


def test_damaged_data_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused = partial(mistake, train.main, monkeypatch=monkeypatch, capsys=capsys)
    (tmp_path / "a.txt").write_text("some text " * 1000)
    assert "no data yet" in refused()
    prepared(tmp_path, "a.txt")
    val = tmp_path / "data" / "val.bin"
    good = val.read_bytes()
    for bad, message in [(good[:-1], "has 1999 bytes, not 2000"), (b"", "has 0 bytes"),
                         (good[:-2] + b"\x01\x01", "a token 257, beyond the vocabulary of 257")]:
        val.write_bytes(bad)
        line = refused("--out_dir=token")
        assert message in line and "python prepare.py" in line
    val.write_bytes(good)
    assert "use a smaller --block_size" in refused("--block_size=99999999")
    for damaged in ("{", "{}", "[]"):
        (tmp_path / "data" / "meta.json").write_text(damaged)
        assert "meta.json is damaged" in refused()
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

    before, looped = model.h[:c.loop_start], model.h[c.loop_start:c.loop_end]
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
        y = model.ln_f(stack(x, model.h[c.loop_end:], 1.0))
        logits.append(y @ model.wte.weight.T)
    return logits


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loop_is_the_paper_s_equation(residual, layout):
    idx, targets = torch.randint(50, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    how = dict(loop_start=layout[0], loop_end=layout[1], residual=residual)
    for depth in (1, 2, 3, 6):
        model = small(n_loop=depth, **how)
        logits, loss = model(idx, targets)
        expected = by_hand(model, idx, depth)
        losses = [F.cross_entropy(e.reshape(-1, 50), targets.reshape(-1)) for e in expected]
        torch.testing.assert_close(logits, expected[-1])
        torch.testing.assert_close(loss, losses[-1])
        torch.testing.assert_close(model.loop_losses(idx, targets), torch.stack(losses))
        last, none = model(idx)
        torch.testing.assert_close(last, logits[:, -1:])
        assert none is None
        other = small(n_loop=7, **how)
        assert torch.equal(other(idx, targets, n_loop=depth)[0], logits)  # the call's n_loop wins


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_loop_is_gpt2_bit_for_bit(layout):
    idx, layout = torch.randint(50, (2, 16)), dict(loop_start=layout[0], loop_end=layout[1])
    plain = small().float()
    x = plain.wte(idx) + plain.wpe.weight  # written out once more, without a scale
    for block in plain.h:
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    expected = F.linear(plain.ln_f(x), plain.wte.weight)
    for residual in ("sum", "mean", "scaled"):
        model = small(n_loop=1, residual=residual, **layout).float()
        assert torch.equal(model(idx, idx)[0], expected)
    outer = small(n_loop=1, residual="outer", **layout).float()  # adds the embedding twice
    assert not torch.allclose(outer(idx, idx)[0], expected)


def test_looping_adds_no_parameters():
    with torch.device("meta"):
        shapes = []
        for n_loop in (1, 2, 6):
            model = GPT(GPTConfig(n_layer=6, n_loop=n_loop))
            shapes.append({name: p.shape for name, p in model.named_parameters()})
        sizes = []
        for preset in PRESETS:
            config = train.get_config(get_args([f"--preset={preset}"]), 50257)
            sizes.append(sum(p.numel() for p in GPT(config).parameters()))
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808  # GPT-2
    assert shapes[0] == shapes[1] == shapes[2]
    assert [round(size / 1e6, 1) for size in sizes] == [124.3, 81.9, 46.5, 46.5]  # 124M 81M 45M 45M


def test_shapes_that_cannot_be_are_refused():
    for wrong in (dict(n_head=5), dict(loop_start=3), dict(loop_end=4), dict(loop_start=-1),
                  dict(n_loop=0), dict(residual="product"), dict(dropout=1.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            small(**wrong)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_no_position_sees_a_later_one(residual):
    model, idx = small(n_loop=3, loop_start=1, residual=residual), torch.randint(50, (1, 16))
    logits = model(idx, idx)[0]
    for t in range(1, 16):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 50
        after = model(changed, idx)[0]
        assert torch.equal(after[:, :t], logits[:, :t])
        assert not torch.allclose(after[:, t:], logits[:, t:])


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
        assert torch.equal(complete(model, prompt, 30, temperature=0, n_loop=n_loop), expected)
    greedy = complete(model, prompt, 9, temperature=0)
    assert torch.equal(complete(model, prompt, 9, top_k=1), greedy)


def test_a_cached_token_costs_one_position():
    model, widths = small(n_loop=3), []
    model.wte.register_forward_pre_hook(lambda module, args: widths.append(args[0].size(1)))
    complete(model, torch.zeros(1, 5, dtype=torch.long), 14)
    assert widths == [5] + [1] * 11 + [16, 16]  # prompt, token by token, then the sliding window


def test_sampling_follows_the_model_s_distribution():
    model = small(n_loop=2)
    prompt = torch.zeros(20_000, 1, dtype=torch.long)
    for temperature, top_k in [(1.0, None), (0.5, None), (1.0, 5)]:
        torch.manual_seed(0)
        drawn = complete(model, prompt, 1, temperature=temperature, top_k=top_k)[:, 1]
        share = drawn.bincount(minlength=50) / len(prompt)
        logits = model(prompt[:1])[0][0, -1] / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[-1]] = -math.inf
            assert (share > 0).sum() == top_k
        assert (share - logits.softmax(-1)).abs().max() < 0.015


def test_flops_per_token_are_those_that_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    for layout in LAYOUTS:
        model = small(n_loop=4, loop_start=layout[0], loop_end=layout[1]).float()
        idx = torch.randint(50, (2, 16))
        for n_loop in (1, 4):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                model(idx, idx, n_loop=n_loop)[1].backward()
            counted = counter.get_total_flops() / idx.numel()
            assert counted == flops_per_token(model.config, n_loop)


def gradients(model, idx, **how):
    torch.manual_seed(2)  # for dropout
    model.zero_grad()
    model(idx, idx, **how)[1].backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("residual", RESIDUALS)
def test_one_compiled_block_serves_all_at_any_depth(residual):
    torch._dynamo.reset()
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward
    idx = torch.randint(50, (2, 16))
    plain, compiled = (small(n_layer=4, loop_start=1, loop_end=3, n_loop=3, residual=residual)
                       for _ in range(2))
    compile_blocks(compiled, backend=backend)
    gradients(compiled, idx)
    count = len(compiled_graphs)
    for n_loop in (3, 1, 2, 6):
        expected = gradients(plain, idx, n_loop=n_loop)
        for a, b in zip(expected, gradients(compiled, idx, n_loop=n_loop), strict=True):
            torch.testing.assert_close(a, b)
    assert len(compiled_graphs) == count > 0


@pytest.mark.parametrize("residual", RESIDUALS)
def test_checkpointed_loops_have_the_same_gradients(residual):
    idx, calls = torch.randint(50, (2, 16)), []
    how = dict(n_loop=4, loop_start=1, loop_end=2, residual=residual, dropout=0.2)
    model = small(**how).train()
    expected = gradients(model, idx)
    model.checkpoint_loops = True
    model.h[1].register_forward_pre_hook(lambda module, args: calls.append(1))
    again = gradients(model, idx)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert len(calls) == 4 + 3  # all but the last loop once more


def test_decay_is_for_matrices_and_muon_for_those_of_the_blocks():
    model = GPT(GPTConfig(16, 50, 2, 2, 32))
    names = {p: name for name, p in model.named_parameters()}
    for name in OPTIMIZERS:
        seen = []
        for optimizer in configure_optimizers(model, name, 1e-3, 0.1, (0.9, 0.95)):
            is_muon = isinstance(optimizer, torch.optim.Muon)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    seen.append(names[p])
                    of_blocks = p.dim() == 2 and names[p].startswith("h.")
                    assert (group["weight_decay"] > 0) == (p.dim() == 2)
                    assert is_muon == (name == "muon" and of_blocks)
        assert sorted(seen) == sorted(names.values())  # each exactly once


# ---- model.py: weights from elsewhere, and checkpoints ----

@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A GPT-2 of Hugging Face with random weights, and its file."""
    import transformers
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=64, n_embd=128, n_layer=3,
                                     n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path_factory.mktemp("hugging_face")
    theirs.save_pretrained(folder)
    return theirs, folder / "model.safetensors"


@torch.no_grad()
def test_gpt2_equals_hugging_face_in_every_layout(hugging_face):
    theirs, path = hugging_face
    idx = torch.randint(300, (2, 64))
    expected = theirs(idx).logits
    for layout in LAYOUTS:
        for residual in ("sum", "mean", "scaled"):
            ours = from_pretrained(path, loop_start=layout[0], loop_end=layout[1],
                                   residual=residual, n_loop=5)
            assert (ours(idx, idx, n_loop=1)[0] - expected).abs().max() < 1e-4
            assert (ours(idx, idx)[0] - expected).abs().max() > 0.1
    short = from_pretrained(path, block_size=10)
    assert (short(idx[:, :10], idx[:, :10])[0] - expected[:, :10]).abs().max() < 1e-4


@torch.no_grad()
def test_blocks_start_from_the_pretrained_ones_that_are_named(hugging_face):
    theirs, path = hugging_face
    idx, blocks = torch.randint(300, (2, 64)), theirs.transformer.h
    for layers in ([0, 1, 2], [2, 0], [1], [0, 2, 2, 1]):
        ours = from_pretrained(path, layers, n_loop=3)
        x = theirs.transformer.wte(idx) + theirs.transformer.wpe.weight
        for i in layers:
            x = blocks[i](x)
            x = x[0] if isinstance(x, tuple) else x
        expected = theirs.lm_head(theirs.transformer.ln_f(x))
        assert ours.config.n_layer == ours.config.loop_end == len(layers)
        assert (ours(idx, idx, n_loop=1)[0] - expected).abs().max() < 1e-4
    for layers in ([3], [-1], [0, 7]):
        with pytest.raises(SystemExit, match="has the blocks 0 to 2, not all of"):
            from_pretrained(path, layers)


def test_gpt2_by_name_is_downloaded_and_checked(hugging_face, served, monkeypatch, tmp_path):
    """OpenAI's own layout: no prefix, no head, but masks; here in half precision."""
    from safetensors.torch import save_file
    tensors = {name.removeprefix("transformer."): p.detach().half()
               for name, p in hugging_face[0].named_parameters() if name != "lm_head.weight"}
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    masks = {f"h.{i}.attn.bias": mask.clone() for i in range(3)}
    save_file(tensors | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    body = (tmp_path / "model.safetensors").read_bytes()
    Server.files = {"model.safetensors": body}
    monkeypatch.setattr(prepare, "HUB", f"{served}/")
    files = {"gpt2": ("revision", hashlib.sha256(body).hexdigest()), "gpt2-xl": ("other", "0" * 64)}
    monkeypatch.setattr(prepare, "GPT2_FILES", files)
    for _ in range(2):
        ours = dict(from_pretrained(prepare.find_gpt2("gpt2")).named_parameters())
        expected = tensors["h.1.attn.c_attn.weight"].float().T
        assert torch.equal(ours["h.1.attn.c_attn.weight"], expected)
    assert len(Server.requests) == 1
    with pytest.raises(SystemExit, match="has the sha256 .* without a network name a model"):
        prepare.find_gpt2("gpt2-xl")
    with pytest.raises(SystemExit, match="no file nowhere: name a model.safetensors or gpt2"):
        prepare.find_gpt2("nowhere")


def test_wrong_weights_are_refused(hugging_face, tmp_path):
    from safetensors.torch import save_file
    path = hugging_face[1]
    for overrides, message in [
            (dict(n_layer=2), "no GPT-2 of 2 blocks"), (dict(block_size=65), "wpe"),
            (dict(n_embd=64), "where the model has"), (dict(bias=False), "bias")]:
        with pytest.raises(SystemExit, match=message):
            from_pretrained(path, **overrides)
    good, prefix = read_safetensors(path), "transformer."
    for change, message in [({prefix + "h.1.ln_1.weight": None}, "h.1.ln_1.weight"),
                            ({prefix + "extra": torch.ones(2)}, "extra"),
                            ({prefix + "h.0.mlp.c_fc.weight": torch.ones(128, 511)}, "c_fc"),
                            ({prefix + "wte.weight": None}, "is not a GPT-2")]:
        changed = {name: t.clone() for name, t in (good | change).items() if t is not None}
        save_file(changed, tmp_path / "bad")
        with pytest.raises(SystemExit, match=message):
            from_pretrained(tmp_path / "bad")


def test_damaged_safetensors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    path, rng = tmp_path / "f", random.Random(0)
    expected = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(7).bfloat16(),
                "d": torch.zeros(0, 3), "e": torch.tensor(2.0)}
    save_file(expected, path)
    good = path.read_bytes()
    for tensors in (read_safetensors(path), load_file(path)):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    header = 8 + int.from_bytes(good[:8], "little")
    for i in range(400):
        bad = bytearray(good[:rng.randrange(len(good))] if i % 2 else good)
        if i % 2 == 0:
            bad[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(bad)
        try:
            tensors = read_safetensors(path)
        except SystemExit as error:
            assert "download it again" in str(error)
            continue  # what anything damaged must come to
        sizes = sum(t.numel() * t.element_size() for t in tensors.values())
        assert i % 2 == 0 and sizes == len(good) - header


def test_checkpoints_come_back(tmp_path):
    model = small(n_loop=3, loop_start=1, loop_end=2, residual="outer")
    save_checkpoint(tmp_path / "c.pt", model, step=7, nested={"a": [1.5, "b"]})
    again, state = load_checkpoint(tmp_path / "c.pt")
    assert again.config == model.config and state == {"step": 7, "nested": {"a": [1.5, "b"]}}
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.float(), q)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_bad_checkpoints_are_refused_and_their_code_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused = partial(mistake, sample.main, monkeypatch=monkeypatch, capsys=capsys)
    assert refused() == "no checkpoint out/ckpt.pt: train one with python train.py"
    path = Path("out/ckpt.pt")
    path.parent.mkdir()
    save_checkpoint(path, small())
    good = path.read_bytes()
    torch.save({"config": Malice()}, "code.pt")
    for bad in (pickle.dumps(Malice()), Path("code.pt").read_bytes(), b"", good[:10], good[:1000],
                good[:len(good) // 2], good[:-1]):
        path.write_bytes(bad)
        assert "cannot be read" in refused()
    for other in ([1, 2], {"config": {}}):
        torch.save(other, path)
        assert "is no checkpoint of this program" in refused()
    assert not Path("harm").exists()
    model = small()
    torch.save({"config": vars(model.config), "model": {}}, path)
    with pytest.raises(RuntimeError, match="Missing key"):  # a fork's mistake keeps its traceback
        load_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, small(), step=1)
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a write beyond the limit then fails, as on a full disk
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for room in (0, 1000, path.stat().st_size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(SystemExit, match="what was there before is kept"):
                save_checkpoint(path, small(), step=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert snapshot(tmp_path) == before
    signal.signal(signal.SIGXFSZ, ignored)


# ---- train.py ----

def test_batches_depend_on_seed_and_step_alone():
    data = np.arange(1000, dtype=np.uint16)
    flags = ["--block_size=8", "--batch_size=2", "--gradient_accumulation_steps=4"]
    args = get_args(flags)
    x, y = get_batch(data, args, 1000, step=3)
    assert x.shape == y.shape == (8, 8)
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y[:, -1], x[:, -1] + 1)
    assert torch.equal(get_batch(data, args, 1000, step=3)[0], x)
    assert not torch.equal(get_batch(data, args, 1000, step=4)[0], x)
    assert not torch.equal(get_batch(data, get_args([*flags, "--seed=1"]), 1000, step=3)[0], x)
    shares = [get_batch(data, args, 1000, 3, rank, world=4)[0] for rank in range(4)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), x)  # four see what one sees
    starts = torch.cat([get_batch(data, args, 1000, step)[0][:, 0] for step in range(2000)])
    assert starts.min() == 0 and starts.max() == 1000 - 8 - 1  # every window can come


def test_the_drawn_depth_depends_on_seed_and_step_alone():
    args = get_args(["--n_loop=6", "--n_loop_min=3"])
    draws = [train.get_n_loop(args, step) for step in range(4000)]
    assert draws == [train.get_n_loop(args, step) for step in range(4000)]
    assert sorted(set(draws)) == [3, 4, 5, 6]
    assert all(abs(draws.count(n) - 1000) < 100 for n in (3, 4, 5, 6))
    other = get_args(["--n_loop=6", "--n_loop_min=3", "--seed=1"])
    assert draws != [train.get_n_loop(other, step) for step in range(4000)]
    assert {train.get_n_loop(get_args(["--n_loop=6"]), step) for step in range(100)} == {6}
    idx, args = torch.randint(50, (4, 16)), get_args(["--batch_size=2", "--grad_clip=0"])
    for n_loop in (1, 3):  # and it is the depth of the step
        model, expected = small(n_loop=6), small(n_loop=n_loop)
        loss, _ = train.train_step(model, [], idx, idx, args, nullcontext(), n_loop)
        expected(idx, idx)[1].backward()
        torch.testing.assert_close(loss, expected(idx, idx)[1], check_dtype=False)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_the_schedule_warms_up_and_decays():
    flags = ["--max_steps=1000", "--warmup_steps=100", "--learning_rate=1", "--min_lr=0.2"]
    rates = [get_lr(get_args(flags), step) for step in range(1001)]
    assert (rates[0], rates[49], rates[99], rates[100]) == (0.01, 0.5, 1.0, 1.0)
    assert rates[550] == pytest.approx(0.6) and rates[1000] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[100:], rates[101:], strict=False))
    args = get_args(["--max_steps=10", "--warmup_steps=0", "--learning_rate=1"])
    assert get_lr(args, 10) == pytest.approx(0.1)


def test_flags_win_over_presets():
    args = get_args(["--preset=gpt2-81m-loop", "--n_loop", "3", "--no-compile", "--loop_end=4"])
    assert (args.n_layer, args.n_loop, args.loop_end, args.compile) == (6, 3, 4, False)
    step = args.batch_size * args.gradient_accumulation_steps * args.block_size
    assert (args.n_embd, step) == (768, 491_520)  # nanoGPT's half a million


TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--n_loop=2", "--n_loop_min=1",
        "--block_size=16", "--batch_size=4", "--max_steps=300", "--warmup_steps=10",
        "--eval_interval=40", "--eval_iters=3", "--log_interval=5", "--dropout=0.1"]


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    lines = "".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(2000))
    (folder / "text.txt").write_text(lines)
    finish("prepare.py", "text.txt", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def whole_run(tiny_data):
    """The last line of a run that nobody disturbed."""
    return json.loads(finish("train.py", *TINY, "--out_dir=whole", cwd=tiny_data).splitlines()[-1])


def log_of(folder):
    """log.csv without the seconds."""
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_run_learns_and_reports(tiny_data, whole_run):
    rows = log_of(tiny_data / "whole")
    assert [int(row["step"]) for row in rows] == list(range(0, 301, 5))
    assert rows[-1]["tokens"] == str(300 * 64)
    evaluated = [row for row in rows if row["val_loss"]]
    assert [int(row["step"]) for row in evaluated] == [*range(0, 300, 40), 300]
    assert abs(float(evaluated[0]["val_loss"]) - math.log(257)) < 0.3  # knows nothing yet
    losses = [float(row["val_loss"]) for row in evaluated]
    assert whole_run["val_loss"] == losses[-1] < 2.5 and whole_run["best_val_loss"] == min(losses)
    assert len(whole_run["loop_losses"]) == 2
    assert whole_run["loop_losses"][-1] == whole_run["val_loss"]
    assert (whole_run["step"], whole_run["tokens"]) == (300, 300 * 64)
    assert whole_run["bits_per_byte"] == pytest.approx(whole_run["val_loss"] / math.log(2))
    _, val_data, _ = load_data(tiny_data / "data")
    for name, best in (("ckpt.pt", "val_loss"), ("best.pt", "best_val_loss")):
        model, state = load_checkpoint(tiny_data / "whole" / name)  # it is what was reported
        args = get_args(defaults=state["args"], argv=[])
        losses = train.evaluate(model, val_data, args, torch.device("cpu"))
        assert losses[-1] == whole_run[best]
    assert whole_run["params"] == sum(p.numel() for p in model.parameters())
    assert whole_run["flops"] == flops_per_token(model.config, 1.5) * 300 * 64


def assert_same_runs(a, b):
    assert log_of(a) == log_of(b)
    for name in ("ckpt.pt", "best.pt"):
        (model, state), (other, other_state) = load_checkpoint(a / name), load_checkpoint(b / name)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        assert model.config == other.config and state["last_eval"] == other_state["last_eval"]


def test_an_interrupted_run_continues_exactly(tiny_data, whole_run):
    resume = ["train.py", "--resume", "--out_dir=broken"]
    ends = [(signal.SIGKILL, 25), (signal.SIGINT, 60), (signal.SIGKILL, 145), (signal.SIGINT, 200)]
    for i, (number, at) in enumerate(ends):
        command = resume if i else ["train.py", *TINY, "--out_dir=broken"]
        process = start(*command, cwd=tiny_data)
        for line in process.stdout:
            if line.startswith("step") and int(re.match(r"step (\d+)", line)[1]) >= at:
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            saved = load_checkpoint(tiny_data / "broken" / "ckpt.pt")[1]["step"]
            assert process.returncode == 1 and len(err.splitlines()) == 1, err
            command = "python train.py --resume --out_dir=broken"
            assert f"ckpt.pt is of step {saved}: go on with {command}" in err
    finish(*resume, cwd=tiny_data)
    assert_same_runs(tiny_data / "broken", tiny_data / "whole")
    again = json.loads(finish(*resume, cwd=tiny_data).splitlines()[-1])
    assert again["val_loss"] == whole_run["val_loss"]


# a process that is killed when the third checkpoint is half written, beside the second
KILLED_WHILE_SAVING = """
import os, signal, train
real, seen = os.replace, []
def replace(src, dst):
    seen.append(str(dst))
    if seen[-1].endswith("ckpt.pt") and sum(path.endswith("ckpt.pt") for path in seen) == 3:
        os.truncate(src, os.path.getsize(src) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real(src, dst)
os.replace = replace
train.main()
"""


def test_a_kill_while_saving_leaves_the_checkpoint_before(tiny_data, whole_run):
    out = tiny_data / "torn"
    (tiny_data / "killer.txt").write_text(KILLED_WHILE_SAVING)
    finish("killer.txt", *TINY, "--out_dir=torn", cwd=tiny_data, code=-9)
    assert (out / "ckpt.pt.tmp").exists() and load_checkpoint(out / "ckpt.pt")[1]["step"] == 40
    finish("train.py", "--resume", "--out_dir=torn", cwd=tiny_data)
    assert_same_runs(out, tiny_data / "whole")
    assert not list(out.glob("*.tmp"))


def test_two_processes_train_what_one_does(tiny_data):
    few = [*TINY, "--dropout=0", "--max_steps=40", "--gradient_accumulation_steps=3"]
    alone = finish("train.py", *few, "--out_dir=alone", cwd=tiny_data)
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py"
    both = finish(launch, *few, "--out_dir=both", cwd=tiny_data)
    assert len(both.splitlines()) == len(alone.splitlines())  # only one of them prints
    rows, others = log_of(tiny_data / "alone"), log_of(tiny_data / "both")
    assert len(rows) == len(others) == 9
    for row, other in zip(rows, others, strict=True):
        assert row["step"] == other["step"] and row["tokens"] == other["tokens"]
        for name in ("train_loss", "val_loss", "grad_norm"):
            assert bool(row[name]) == bool(other[name])
            if row[name]:
                assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data):
    flags = [*TINY, "--learning_rate=1e30", "--optimizer=adamw", "--out_dir=diverged"]
    process = start("train.py", *flags, cwd=tiny_data)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and len(err.splitlines()) == 1
    assert "smaller --learning_rate" in err
    model, _ = load_checkpoint(tiny_data / "diverged" / "ckpt.pt")
    assert all(p.isfinite().all() for p in model.parameters())


def test_flags_that_cannot_work_are_refused(tiny_data, whole_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    before = snapshot(tiny_data)
    whole = ["--resume", "--out_dir=whole"]
    for args, message in [
            (["--n_lop=6"], "unrecognized arguments: --n_lop=6"), (["--n_loop=six"], "--n_loop"),
            (["--residual=product"], "invalid choice"), (["--loop_start=1"], "loop_start=1"),
            (["--n_embd=30", "--n_head=4"], "n_embd=30 must be a multiple of n_head=4"),
            (["--n_layer=2", "--loop_end=3"], "loop_end=3"), (["--loop_start=-1"], "loop_start"),
            (["--n_loop=0"], "must be at least 1"), (["--n_loop_min=0"], "--n_loop_min"),
            (["--n_loop=2", "--n_loop_min=3"], "--n_loop_min=3 must not be above --n_loop=2"),
            (["--init_layers=0,2"], "with --init_from"), (["--init_layers=0-2"], "--init_layers"),
            (["--batch_size=0"], "--batch_size"), (["--learning_rate=nan"], "--learning_rate"),
            (["--min_lr=nan"], "--min_lr"), (["--min_lr=-1"], "--min_lr"),
            (["--dropout=1"], "dropout=1"), (["--preset=gpt3"], "invalid choice"),
            (["--preset=gpt2-45m", "--block_size=16"], "run python prepare.py --tokenizer=gpt2"),
            (["--init_from=nowhere"], "no file nowhere"), (["--device=quantum"], "--device=cpu"),
            (["--device=meta"], "--device=meta does not work here: use --device=cpu"),
            (["--resume"], "no checkpoint out/ckpt.pt: train one with python train.py"),
            ([*whole, "--n_embd=32"], "--n_embd=32 cannot be resumed into"),
            ([*whole, "--optimizer=adamw"], "--optimizer=adamw cannot be resumed into"),
            ([*whole, "--weight_decay=0.2"], "--weight_decay=0.2 cannot be resumed into"),
            ([*whole, "--batch_size=8"], "--batch_size=8 cannot be resumed into"),
            ([*whole, "--max_steps=10"], "--max_steps")]:
        assert message in mistake(train.main, *args, monkeypatch=monkeypatch, capsys=capsys), args
        assert snapshot(tiny_data) == before
    (tmp_path / "b.txt").write_text("other data " * 100)
    finish("prepare.py", "b.txt", cwd=tmp_path)
    line = mistake(train.main, *whole, f"--data_dir={tmp_path / 'data'}", monkeypatch=monkeypatch,
                   capsys=capsys)
    assert "write that again" in line and "start anew without --resume" in line


def test_a_forker_s_error_keeps_its_traceback(tiny_data, tmp_path):
    (tiny_data / "fork.txt").write_text("""
import model, train
def forward(self, x):
    raise ValueError("mine")
model.MLP.forward = forward
train.main()
""")
    process = start("fork.txt", "--out_dir=fork", cwd=tiny_data)
    _, err = process.communicate(timeout=60)
    assert "Traceback" in err and err.endswith("ValueError: mine\n")


def write_noise(folder):
    """Random data in a vocabulary of 300."""
    tokens = np.random.default_rng(0).integers(300, size=5000).astype(np.uint16)
    (folder / "data").mkdir()
    meta = {"dataset": "noise", "tokenizer": "gpt2", "vocab_size": 300}
    for split in ("train", "val"):
        tokens.tofile(folder / "data" / f"{split}.bin")
        meta[split] = {"tokens": 5000, "bytes": 20000, "sha256": "of noise"}
    (folder / "data" / "meta.json").write_text(json.dumps(meta))
    return tokens


def test_training_starts_from_pretrained_weights(hugging_face, tmp_path):
    theirs, path = hugging_face
    tokens = torch.from_numpy(write_noise(tmp_path).astype(np.int64))
    flags = [f"--init_from={path}", "--eval_iters=99"]
    out = finish("train.py", *flags, "--max_steps=0", cwd=tmp_path)
    x, y = (tokens[i:i + 64 * 77].view(77, 64) for i in (0, 1))
    with torch.no_grad():
        expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert json.loads(out.splitlines()[-1])["val_loss"] == pytest.approx(expected, rel=1e-2)
    layout = ["--n_loop=2", "--loop_start=1", "--loop_end=2"]
    out = finish("train.py", *flags, *layout, "--max_steps=2", cwd=tmp_path)
    params = sum(p.numel() for p in theirs.parameters())
    assert json.loads(out.splitlines()[-1])["params"] == params
    finish("train.py", *flags, "--max_steps=0", "--init_layers=2,0", cwd=tmp_path)
    taken = load_checkpoint(tmp_path / "out" / "ckpt.pt")[0].h
    theirs_2 = theirs.transformer.h[2].attn.c_attn.weight.T
    assert len(taken) == 2 and torch.equal(taken[0].attn.c_attn.weight, theirs_2)
    finish("train.py", "--resume", "--max_steps=1", cwd=tmp_path)


# ---- sample.py ----

def test_the_whole_way_from_text_to_text(tiny_data, whole_run):
    options = ["--out_dir=whole", "--max_new_tokens=40"]
    prompt = "--prompt=7 times "
    out = finish("sample.py", *options, prompt, "--num_samples=3", cwd=tiny_data)
    samples = out.split("-" * 80 + "\n")
    assert len(set(samples)) == 3
    assert all(text.startswith("7 times ") and len(text) > 40 for text in samples)
    assert re.search(r"\d+\.\n\d+", out)  # lines begin and end as those of the data do
    assert finish("sample.py", *options, prompt, "--num_samples=3", cwd=tiny_data) == out
    assert finish("sample.py", *options, prompt, "--seed=1", cwd=tiny_data) != samples[0]
    model, _ = load_checkpoint(tiny_data / "whole" / "ckpt.pt")
    for n_loop in (1, 2):
        text = finish("sample.py", *options, prompt, "--temperature=0", f"--n_loop={n_loop}",
                      cwd=tiny_data)
        idx = torch.tensor([[*b"7 times "]])
        ids = complete(model.eval(), idx, 40, temperature=0, n_loop=n_loop)[0].tolist()
        assert text == get_tokenizer("byte").decode(ids) + "\n"
    (tiny_data / "prompt.txt").write_text("7 times ")
    assert finish("sample.py", *options, "--prompt_file=prompt.txt", cwd=tiny_data) == samples[0]
    assert finish("sample.py", *options, cwd=tiny_data)  # from nothing


def test_prompts_that_cannot_work_are_refused(tiny_data, whole_run, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    for args, message in [
            (["--prompt=" + "x" * 17], "the prompt has 17 tokens, the model sees 16: shorten it"),
            (["--prompt_file=none.txt"], "none.txt"), (["--n_loop=0"], "--n_loop"),
            (["--prompt_file=whole/ckpt.pt"], "cannot be read"), (["--top_k=0"], "--top_k"),
            (["--temperature=-1"], "--temperature"), (["--exit_kl=-1"], "--exit_kl"),
            (["--exit_kl=1", "--show_loops"], "leave out --exit_kl"), (["--what"], "unrecognized"),
            (["--prompt=a", "--prompt_file=b"], "not both")]:
        args = ["--out_dir=whole", *args]
        assert message in mistake(sample.main, *args, monkeypatch=monkeypatch, capsys=capsys)


@torch.no_grad()
def exit_by_hand(model, idx, depths, n_loop, exit_kl):
    """Without a cache: the logits (V,) after idx (T,), and the loops that its last place takes.

    depths (T - 1) are the loops that the places before it took.
    """
    c, T = model.config, len(idx)
    depths, states, kept = torch.tensor([*depths, n_loop]), [], {}
    scale = 1 / n_loop if c.residual == "scaled" else 1.0

    def block(i, x, scale, n=0):
        qkv = model.h[i].attn.c_attn(model.h[i].ln_1(x)).split(c.n_embd, dim=-1)
        q, k, v = (part.view(T, c.n_head, -1).transpose(0, 1) for part in qkv)
        if n > 0:  # who has left shows the keys and values of its last loop
            left = (depths <= n)[None, :, None]
            k, v = torch.where(left, kept[i][0], k), torch.where(left, kept[i][1], v)
        kept[i] = k, v
        scores = q @ k.mT / math.sqrt(q.size(-1))
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1)
        x = x + scale * model.h[i].attn.c_proj(y)
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
        x = torch.cat((states[-1][:-1], states[n - 1][-1:]))  # the last place as after loop n
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
def test_a_token_that_exits_early_is_as_without_a_cache(residual, layout):
    model = small(n_loop=4, loop_start=layout[0], loop_end=layout[1], residual=residual)
    prompt = torch.randint(50, (1, 4), generator=torch.Generator().manual_seed(2))
    p = torch.stack([model.readout(x, prompt)[0].log_softmax(-1) for x in model.states(prompt)])
    kl = F.kl_div(p[:-1], p[1:], reduction="none", log_target=True).sum(-1)
    middle = kl[1].median().item()  # of loop 3 from loop 2
    for n_loop, exit_kl in [(None, middle), (6, middle), (2, math.inf), (1, math.inf), (4, 0.0)]:
        N, loops = n_loop or 4, []
        forward = partial(sample.exit_early, model, exit_kl, loops)
        idx = complete(model, prompt, 13, temperature=0, n_loop=n_loop, forward=forward)
        expected, depths = prompt, [N] * 3
        for t in range(13):
            kl_here = exit_kl if t else -math.inf  # the prompt takes all loops
            logits, n = exit_by_hand(model, expected[0], depths, N, kl_here)
            depths.append(n)
            expected = torch.cat((expected, logits.argmax()[None, None]), dim=1)
        assert torch.equal(idx, expected) and loops == depths[4:]
        if exit_kl == math.inf:
            assert set(loops) == {min(N, 2)}  # two predictions, to see that they agree
        if exit_kl == 0.0:
            assert torch.equal(idx, complete(model, prompt, 13, temperature=0))


def test_exiting_early_saves_the_loops_it_skips():
    model, widths, loops = small(n_loop=4), [], []
    model.h[0].register_forward_pre_hook(lambda block, args: widths.append(args[0].size(1)))
    forward = partial(sample.exit_early, model, math.inf, loops)
    complete(model, torch.zeros(1, 5, dtype=torch.long), 10, forward=forward)
    assert loops == [2] * 9 and widths == [5] * 4 + [1] * 18


@torch.no_grad()
def test_guesses_are_the_best_of_each_loop():
    model, idx = small(n_loop=3, loop_start=1, loop_end=2), torch.randint(50, (1, 17))
    guess, probability = sample.best_guesses(model, idx, n_loop=4)
    expected = torch.stack(by_hand(model, idx[:, :-1], 4)).softmax(-1)[:, 0]
    assert torch.equal(guess, expected.argmax(-1))
    torch.testing.assert_close(probability, expected.max(-1).values.float())
    four_loops = torch.tensor([[1, 7, 5], [2, 7, 6], [1, 7, 5], [1, 7, 6]])
    assert sample.first_final(four_loops).tolist() == [0, 0, 1]


def test_the_loops_are_shown(tiny_data, whole_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    command = ["--out_dir=whole", "--prompt=7 times", "--n_loop=4", "--max_new_tokens=100"]
    shown, picture = [], tmp_path / "loops.png"
    for terminal in (False, True):
        plot = [f"--plot={picture}"] if terminal else []
        monkeypatch.setattr(sys, "argv", ["sample.py", *command, "--show_loops", *plot])
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)  # noqa: B023  called at once
        sample.main()
        shown.append(capsys.readouterr().out)
    assert "\033" not in shown[0] and re.sub(r"\033\[[\d;]*m", "", shown[1]) == shown[0]
    lines = shown[0].splitlines()[-18:]  # a context of 16, one guess for each
    assert shown[1].count("\033[1;32m") == 16
    assert "loop 4" in lines[0] and lines[1].startswith("' ' ")
    assert re.fullmatch(r"equal to the final guess after each loop, of 16: (\d+ ){3}16", lines[-1])
    assert all(len(re.findall(r" +\d+%", line)) == 4 for line in lines[1:-1])
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    line = mistake(sample.main, *command, "--plot=no.png", monkeypatch=monkeypatch, capsys=capsys)
    assert "pip install matplotlib" in line
    process = start("sample.py", *command, "--exit_kl=0.01", cwd=tiny_data)
    _, err = process.communicate(timeout=60)
    assert re.search(r"\(100 tokens, [\d,]+ a second, [234]\.\d\d loops a token\)", err), err


# ---- bench.py ----

def test_bench_measures_what_its_flags_describe(tmp_path):
    flags = ["--n_layer=3", "--loop_start=1", "--n_loop=4", "--n_head=2", "--n_embd=32",
             "--block_size=32", "--checkpoint_loops"]
    figures = json.loads(finish("bench.py", "measure", *flags, cwd=tmp_path).splitlines()[-1])
    config = GPTConfig(32, 257, 3, 2, 32, n_loop=4, loop_start=1)
    assert figures["params"] == sum(p.numel() for p in GPT(config).parameters())
    assert figures["flops"] == flops_per_token(config) and figures["tokens"] == 4 * 32
    assert all(figures[name] > 0 for name in ("step", "peak", "decode"))
    assert figures["memory"] >= 0 and figures["cold"] > figures["step"]
    table = finish("bench.py", "speed", *flags, cwd=tmp_path).splitlines()
    assert len(table) == 3 and table[2].split()[-1] == "1.00x"
    for args, message in [(["nonsense"], "has no command nonsense"), (["--what"], "unrecognized")]:
        process = start("bench.py", *args, cwd=tmp_path)
        assert message in process.communicate()[1] and process.returncode in (1, 2)


def test_compare_goes_on_where_it_was_stopped(tiny_data, tmp_path):
    shared = ["--max_steps=30", f"--data_dir={tiny_data / 'data'}"]
    args = ["compare", "--seeds=1", *shared]
    process = start("bench.py", *args, cwd=tmp_path, start_new_session=True)
    for line in process.stdout:
        if "seed 0:" in line:  # the first model is finished, others are not
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert 1 <= len(finished) < 8 and not list(tmp_path.glob("results/*"))
    out = finish("bench.py", *args, cwd=tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert finished.items() <= times.items()  # not run again
    written = json.loads((tmp_path / "results" / "tiny-paper-max_steps=30.json").read_text())
    models = written["models"]
    assert list(models) == [
        "4 x 1", "2 x 3", "6 x 1, unshared", "4 x 1, compute of 2 x 3",
        "1 x 1", "1 x 2", "2 x 1, unshared", "1 x 1, compute of 1 x 2"]
    for label, row in models.items():
        assert row["mean"] == row["runs"][0]["val_loss"]
        assert f"\n{label:<26}" in out and f"{row['mean']:.4f}" in out
    flops = {label: row["runs"][0]["flops"] for label, row in models.items()}
    for longer in ("4 x 1, compute of 2 x 3", "1 x 1, compute of 1 x 2"):
        loop = longer.split(" of ")[1]
        assert flops[longer] == pytest.approx(flops[loop], rel=0.03)
    scale = ["--n_embd=64", "--n_head=2", "--n_layer=2", "--n_loop=3", "--learning_rate=8e-3"]
    alone = finish("train.py", *scale, *shared, cwd=tmp_path)
    assert json.loads(alone.splitlines()[-1])["val_loss"] == models["2 x 3"]["mean"]


def test_compare_tunes_each_model_and_says_what_diverged(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    best = {1: 2e-3, 2: 8e-3, 3: 64e-3, 4: 1e-3, 6: 8e-3, 8: 8e-3}  # loops: learning rate
    asked = []

    def trained(flags, data_sha256, rate, seed):
        n_loop = get_args(flags).n_loop
        asked.append((n_loop, rate, seed))
        if (n_loop == 6 and seed == 1) or (n_loop == 8 and (seed or rate > 1e-3)):
            return None
        loss = 1 + abs(math.log2(rate / best[n_loop])) + seed / 10
        return {"val_loss": loss, "tokens": 100, "seconds": 6, "params": 1, "flops": 1}
    monkeypatch.setattr(bench, "train_run", trained)
    command = ["--what=loops", "--seeds=2", f"--data_dir={tiny_data / 'data'}"]
    bench.compare([*command, "--sweep"])
    out, path = capsys.readouterr().out, tmp_path / "results" / "tiny-loops.json"
    models = json.loads(path.read_text())["models"]
    trials = {label: row["trials"] for label, row in models.items()}
    assert [*trials["1 x 1"]] == ["0.004", "0.008", "0.016", "0.002", "0.001"]  # beyond the edge
    assert [*trials["1 x 2"]] == ["0.004", "0.008", "0.016"] and trials["1 x 2"]["0.008"] == 1
    assert [*trials["1 x 3"]] == ["0.004", "0.008", "0.016", "0.032", "0.064", "0.128"]
    assert [loss is None for loss in trials["1 x 8"].values()] == [True] * 4 + [False] * 2
    rates = [row["learning_rate"] for row in models.values()]
    assert rates == [2e-3, 8e-3, 64e-3, 1e-3, 8e-3, 1e-3]
    assert models["1 x 1"]["mean"] == pytest.approx(1.05)
    assert models["1 x 1"]["spread"] == pytest.approx(0.05)
    assert models["1 x 6"]["mean"] == 1 and "1 diverged\n" in out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    asked.clear()
    bench.compare(command)  # a later call takes the rates that were found
    expected = [(n, rate, seed) for seed in (0, 1) for n, rate in zip(best, rates, strict=True)]
    assert sorted(asked) == sorted(expected)
    monkeypatch.setattr(bench, "train_run", lambda *args: None)
    bench.compare(command)
    assert "\n1 x 8  2 diverged\n" in capsys.readouterr().out and "NaN" not in path.read_text()
    for flag, message in [("--seeds=0", "at least 1"), ("--bogus", "unrecognized"),
                          ("--scale=small", "python prepare.py --tokenizer=gpt2")]:
        monkeypatch.setattr(sys, "argv", ["bench.py", "compare", *command, flag])
        with pytest.raises(SystemExit) as caught:
            bench.main()
        assert message in f"{caught.value.code} {capsys.readouterr().err}"


def test_compare_at_the_scale_of_gpt2_has_the_papers_models(tmp_path):
    write_noise(tmp_path)
    toy = ["--n_embd=24", "--block_size=16", "--batch_size=2", "--max_steps=20", "--eval_iters=1"]
    out = finish("bench.py", "compare", "--scale=small", "--seeds=1", *toy, cwd=tmp_path)
    rows = out[out.index("\nnoise"):].splitlines()[3:11]
    assert [row[:26].strip() for row in rows] == [
        "12 x 1", "6 x 6", "36 x 1, unshared", "12 x 1, compute of 6 x 6",
        "1 x 1", "1 x 2", "2 x 1, unshared", "1 x 1, compute of 1 x 2"]
    paper = {row[:26].strip(): row.split()[-1] for row in rows if len(row[26:].split()) == 8}
    assert paper == {"12 x 1": "3.12", "6 x 6": "3.11", "1 x 1": "3.98", "1 x 2": "3.67"}


@torch.no_grad()
@pytest.mark.parametrize("residual", RESIDUALS)
def test_what_bench_says_of_loops_is_so(residual):
    model = small(n_loop=3, loop_start=1, loop_end=2, residual=residual)
    x, y = torch.randint(50, (2, 1, 16))
    final = by_hand(model, x, 3)[-1][0].log_softmax(-1)
    for n_loop in (3, 5):
        state = model.h[0](model.wte.weight[x] + model.wpe.weight, torch.ones(()))
        rows = bench.per_loop(model, x, y, n_loop, final)
        for row, logits, after in zip(rows, by_hand(model, x, n_loop), model.states(x, n_loop),
                                      strict=True):
            p = logits[0].softmax(-1)
            kl = (final.exp() * (final - p.log())).sum(-1).mean()
            same = (p.argmax(-1) == final.argmax(-1)).double().mean()
            expected = [F.nll_loss(p.log(), y[0]), kl, after.norm(dim=-1).mean(),
                        (after - state).norm(dim=-1).mean(), same]
            torch.testing.assert_close(row.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)
            state = after


def test_bench_loops_reports(tiny_data, whole_run):
    out = finish("bench.py", "loops", "--out_dir=whole", "--windows=12", cwd=tiny_data)
    rows = [line.split() for line in out.splitlines() if line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "1", "2", "3", "4"]  # a pass of 2, then 1 to 4
    assert rows[1] == rows[3] and rows[1][3] == "0.0000" and rows[1][-1] == "100.0%"
    reported = whole_run["loop_losses"]  # of the same windows
    assert [float(row[1]) for row in rows[:2]] == pytest.approx(reported, abs=1e-4)
    process = start("bench.py", "loops", "--out_dir=none", cwd=tiny_data)
    assert process.communicate()[1].startswith("no checkpoint none/ckpt.pt: train one")
