"""
What is true of this project, in the order in which data flows through it. Run it with

    pip install -r requirements.txt pytest transformers matplotlib && pytest

GPT-2's vocabulary comes from $TIKTOKEN_CACHE_DIR or the network; without either, the tests of it
say so and are skipped. All else that would be downloaded comes from a server on this machine.
"""
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
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)
in_every_reading = pytest.mark.parametrize("residual", RESIDUALS)


def start(script, *args, cwd, **options):
    """Start a script of ours as a user does, in a process of its own."""
    parts = [str(HERE / part) if part.endswith(".py") else part for part in script.split()]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *parts, *map(str, args)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(script, *args, cwd, code=0):
    """Run a script and return what it printed: stdout, or stderr if it is to fail."""
    process = start(script, *args, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return err if code else out


def result_of(*args, cwd):
    """The last line of train.py."""
    return json.loads(finish("train.py", *args, cwd=cwd).splitlines()[-1])


@pytest.fixture
def mistakes(monkeypatch, capsys):
    """Checks that a command ends in one line that says what is wrong, and leaves nothing behind."""
    def check(main, *cases):
        before = snapshot(".")
        for args, message in cases:
            monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, args)])
            with pytest.raises(SystemExit) as caught:
                main()
            code, err = caught.value.code, capsys.readouterr().err
            line = code if isinstance(code, str) else err
            assert code not in (0, None) and message in line, (args, line)
            assert "\n" not in line.strip() and "Traceback" not in err, line
            assert snapshot(".") == before, args
    return check


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def small(**overrides):
    """A model whose weights are so far from their initial values that every term of it matters."""
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32) | overrides
    if "layout" in shape:
        shape["loop_start"], shape["loop_end"] = shape.pop("layout")
    model = GPT(GPTConfig(**shape)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def some_tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


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


def test_tokens_come_back_and_byte_tokens_are_the_bytes(gpt2):
    byte = get_tokenizer("byte")
    for text in (any_text(seed, 2000) for seed in range(20)):
        for tokenizer in (byte, gpt2):
            ids = tokenizer.encode(text, allowed_special={EOT})
            assert tokenizer.decode(ids) == text
            assert ids.count(tokenizer.eot_token) == text.count(EOT)
        plain = text.replace(EOT, "")
        assert byte.encode_ordinary(plain) == list(plain.encode())
    assert (byte.n_vocab, byte.eot_token, gpt2.eot_token) == (257, 256, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]


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


def test_few_documents_are_each_cut_at_nine_tenths(tmp_path):
    text = any_text(1, 3000).replace(EOT, "")
    (tmp_path / "a.txt").write_bytes(text.encode())
    cut = len(text) * 9 // 10
    assert prepared(tmp_path, "a.txt")[:2] == (text[:cut], text[cut:])
    (tmp_path / "a.txt").write_text(EOT.join(["a" * 100, "", "b" * 50]))
    assert prepared(tmp_path, "a.txt")[:2] == ("a" * 90 + EOT + "b" * 45, "a" * 10 + EOT + "b" * 5)


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


def test_slabs_keep_order_and_bound_memory():
    pairs = [("train", "x" * random.Random(i).randrange(50)) for i in range(500)]
    groups = list(prepare.slabs(pairs, size=100))
    assert [pair for group in groups for pair in group] == pairs
    assert max(sum(len(text) for _, text in group) for group in groups) < 150


def test_the_python_library_is_found_without_what_pip_installed():
    files = prepare.find_files("pystdlib")
    assert len(files) == len(set(files)) > 300 and all(path.suffix == ".py" for path in files)
    assert not any({"site-packages", "test"} & {*path.parts} for path in files)


def test_hops_lead_to_the_answers():
    documents, numbers = list(prepare.make_hops(200)), []
    assert documents == list(prepare.make_hops(200)) and len(set(documents)) == 200
    for text in documents:
        leads_to = dict(zip("abcdefghij", text[:10], strict=True))
        visited = "a"
        while leads_to[visited[-1]] != "a":
            visited += leads_to[visited[-1]]
        assert len(visited) == 10  # one circle: a short one would end the hops early
        questions = [text[i:i + 3] for i in range(10, 58, 3)]
        assert len(text) == 58 and len(questions) == 16
        assert [q[1] for q in questions[1:]] == [q[2] for q in questions[:-1]]
        for hops, letter, answer in questions:
            for _ in range(int(hops)):
                letter = leads_to[letter]
            assert letter == answer
            numbers.append(int(hops))
    counts = [numbers.count(n) for n in range(1, 7)]
    assert sum(counts) == len(numbers) and counts == sorted(counts, reverse=True)


class Server(http.server.BaseHTTPRequestHandler):
    """A web server with the faults of real ones; `script` says what the next answers are.

    With a `store` it is the hub, which says what a file is and has another server send it.
    """
    CUT = 3 << 16  # bytes after which a broken connection breaks
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
    monkeypatch.chdir(tmp_path)
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
            (["cut", "no ranges"], [0, cut]), (["cut"] * 6, [i * cut for i in range(7)])]):
        body = random.Random(i).randbytes(10 * cut)
        Server.files, Server.script, Server.requests = {f"f{i}": body}, list(script), []
        for _ in range(2):  # the second time it is there
            path = prepare.download(f"{served}/f{i}", hashlib.sha256(body).hexdigest())
            assert path.read_bytes() == body and Server.requests == begins
    assert not list(tmp_path.rglob("*.part"))


def test_downloads_that_cannot_be_had_say_so(served):
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
    assert snapshot(".") == {}


def test_one_of_several_processes_downloads(served, monkeypatch):
    Server.files, sha256 = {"f": b"text"}, hashlib.sha256(b"text").hexdigest()
    waits = []

    def first_process(seconds):  # what the first process does while the second waits
        waits.append(seconds)
        monkeypatch.setenv("LOCAL_RANK", "0")
        prepare.download(f"{served}/f", sha256)
        monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(prepare.time, "sleep", first_process)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert prepare.download(f"{served}/f", sha256).read_bytes() == b"text"
    assert len(waits) == len(Server.requests) == 1


def run_prepare(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
    prepare.main()
    return snapshot("data")


def test_shakespeare_comes_from_the_network(served, monkeypatch, mistakes):
    body = b"To be, or not to be.\n" * 100
    Server.files = {"input.txt": body}
    monkeypatch.setattr(prepare, "SHAKESPEARE", f"{served}/input.txt")
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    run_prepare(monkeypatch, "shakespeare")
    assert load_data("data")[0].tolist() == list(body[:1890])
    monkeypatch.setattr(prepare, "SHAKESPEARE", "http://127.0.0.1:9/input.txt")
    mistakes(prepare.main, (["shakespeare"], ": without a network use python prepare.py"))


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
def hub(served, monkeypatch):
    """Three files laid out as OpenWebText's, on a hub with a store; the text of each split."""
    store = serve()
    Server.store = f"http://localhost:{store.server_port}"  # another host and another port
    monkeypatch.setattr(prepare, "HUB", served + "/")
    monkeypatch.setattr(prepare, "SHARDS", {"openwebtext": 3, "fineweb": 103})
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


def test_openwebtext_goes_on_where_it_was_stopped(hub, monkeypatch, mistakes):
    command = ["openwebtext", "--tokenizer=byte"]
    data = run_prepare(monkeypatch, *command)
    shutil.rmtree("data")
    *_, second, third = sorted(Path("cache").rglob("*.tar"), key=lambda path: path.name[13:])
    second.rename(f"{second}.part")  # as if it had been stopped in the middle of the second file
    os.truncate(f"{second}.part", Server.CUT)
    third.unlink()
    Server.requests = []
    assert run_prepare(monkeypatch, *command) == data and Server.requests == [Server.CUT, 0]
    third.unlink()
    Server.promised = {third.name[13:]: b"another"}
    mistakes(prepare.main, (command, "has the sha256"))
    assert not list(Path("cache").rglob("*.part"))


def test_fineweb_is_taken_as_it_is(hub, gpt2, monkeypatch):
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
    with pytest.raises(SystemExit, match="holds no GPT-2 tokens: delete it"):
        run_prepare(monkeypatch, "fineweb", "--shards=3")


def test_prepare_keeps_the_last_good_data(tmp_path, monkeypatch, mistakes):
    monkeypatch.chdir(tmp_path)
    for name, body in {"good.txt": b"good " * 1000, "binary": b"text, then\0\x01\x02",
                       "tiny.txt": b"x", "latin1.txt": b"\xe9" * 100, "separator.txt": EOT.encode(),
                       }.items():
        (tmp_path / name).write_bytes(body)
    (tmp_path / "empty").mkdir()
    prepared(tmp_path, "good.txt")

    def offline(name):
        raise requests.exceptions.ConnectionError
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    mistakes(
        prepare.main,
        (["nowhere"], "neither a file nor a folder"), (["binary"], "no text in UTF-8"),
        (["latin1.txt"], "no text in UTF-8"), (["tiny.txt"], "too little text"),
        (["separator.txt"], "too little text"), (["empty"], "too little text"),
        (["--tokenizer=word"], "invalid choice"), (["--what"], "unrecognized"),
        (["openwebtext"], "GPT-2's vocabulary could not be"),
        (["good.txt", "--tokenizer=gpt2"], "on bytes: python prepare.py --tokenizer=byte"),
        (["fineweb", "--tokenizer=byte"], "leave out --tokenizer=byte"),
        (["openwebtext", "--shards=22"], "1 to 21"), (["good.txt", "--shards=1"], "1 to 21"),
        (["good.txt", "--data_dir=good.txt"], "is a file: name a folder"),
        (["fineweb", "--shards=0"], "must be a whole number of at least 1"))


def test_damaged_data_is_noticed(tmp_path, monkeypatch, mistakes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text " * 1000)
    mistakes(train.main, ([], "no data yet"), (["--data_dir=a.txt"], "no data yet"))
    prepared(tmp_path, "a.txt")
    val, meta = tmp_path / "data" / "val.bin", tmp_path / "data" / "meta.json"
    good = val.read_bytes()
    for path, bad, message in [
            (val, good[:-1], "has 1999 bytes, not 2000: run python prepare.py a.txt"),
            (val, b"", "has 0 bytes"), (meta, b"{", "meta.json is damaged: run python prepare.py"),
            (meta, b"{}", "is damaged"), (meta, b"[]", "is damaged")]:
        kept = path.read_bytes()
        path.write_bytes(bad)
        mistakes(train.main, ([], message))
        path.write_bytes(kept)
    mistakes(train.main, (["--block_size=99999999"], "use a smaller --block_size"))
    val.write_bytes(good[:-2] + b"\x01\x01")  # is met when it is evaluated
    err = finish("train.py", "--out_dir=token", cwd=tmp_path, code=1)
    assert "a token 257, beyond the vocabulary of 257" in err and len(err.splitlines()) == 1


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


@in_every_reading
@in_every_layout
def test_the_loop_is_the_paper_s_equation(residual, layout):
    idx, targets = some_tokens(2, 2, 16)
    for depth in (1, 2, 3, 6):
        model = small(n_loop=depth, layout=layout, residual=residual)
        logits, loss = model(idx, targets)
        expected = by_hand(model, idx, depth)
        losses = [F.cross_entropy(e.reshape(-1, 50), targets.reshape(-1)) for e in expected]
        torch.testing.assert_close(logits, expected[-1])
        torch.testing.assert_close(loss, losses[-1])
        torch.testing.assert_close(model.loop_losses(idx, targets), torch.stack(losses))
        last, none = model(idx)
        torch.testing.assert_close(last, logits[:, -1:])
        assert none is None
        other = small(n_loop=7, layout=layout, residual=residual)
        assert torch.equal(other(idx, targets, n_loop=depth)[0], logits)  # the call's n_loop wins


@in_every_layout
def test_one_loop_is_gpt2_bit_for_bit(layout):
    idx = some_tokens(2, 16)
    plain = small().float()
    x = plain.wte(idx) + plain.wpe.weight  # written out once more, without a scale
    for block in plain.h:
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    expected = F.linear(plain.ln_f(x), plain.wte.weight)
    for residual in ("sum", "mean", "scaled"):
        model = small(n_loop=1, residual=residual, layout=layout).float()
        assert torch.equal(model(idx, idx)[0], expected)
    outer = small(n_loop=1, residual="outer", layout=layout).float()  # adds the embedding twice
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
                  dict(n_loop=0), dict(residual="product")):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            small(**wrong)


@in_every_reading
@in_every_layout
def test_cached_generation_is_uncached_generation(residual, layout):
    model, prompt = small(n_loop=3, layout=layout, residual=residual), some_tokens(2, 5)
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


@in_every_layout
def test_flops_per_token_are_those_that_torch_counts(layout):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, idx = small(n_loop=4, layout=layout).float(), some_tokens(2, 16)
    for n_loop in (1, 4):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(idx, idx, n_loop=n_loop)[1].backward()
        assert counter.get_total_flops() / 32 == flops_per_token(model.config, n_loop)


def gradients(model, idx, **how):
    torch.manual_seed(2)  # for dropout
    model.zero_grad()
    model(idx, idx, **how)[1].backward()
    return [p.grad.clone() for p in model.parameters()]


@in_every_reading
def test_one_compiled_block_serves_all_at_any_depth(residual):
    torch._dynamo.reset()
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward
    plain, compiled = (small(n_layer=4, loop_start=1, loop_end=3, n_loop=3, residual=residual)
                       for _ in range(2))
    compile_blocks(compiled, backend=backend)
    idx = some_tokens(2, 16)
    gradients(compiled, idx)
    count = len(compiled_graphs)
    for n_loop in (3, 1, 2, 6):
        expected = gradients(plain, idx, n_loop=n_loop)
        for a, b in zip(expected, gradients(compiled, idx, n_loop=n_loop), strict=True):
            torch.testing.assert_close(a, b)
    assert len(compiled_graphs) == count > 0


@in_every_reading
def test_checkpointed_loops_have_the_same_gradients(residual):
    idx, calls = some_tokens(2, 16), []
    model = small(n_loop=4, layout=(1, 2), residual=residual, dropout=0.2).train()
    expected = gradients(model, idx)
    model.checkpoint_loops = True
    model.h[1].register_forward_pre_hook(lambda module, args: calls.append(1))
    again = gradients(model, idx)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert len(calls) == 4 + 3  # all but the last loop once more


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_for_matrices_and_muon_for_those_of_the_blocks(name):
    model, seen = GPT(GPTConfig(16, 50, 2, 2, 32)), []
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in configure_optimizers(model, name, 1e-3, 0.1):
        is_muon = isinstance(optimizer, torch.optim.Muon)
        for group in optimizer.param_groups:
            for p in group["params"]:
                seen.append(names[p])
                assert (group["weight_decay"] > 0) == (p.dim() == 2)
                of_blocks = p.dim() == 2 and names[p].startswith("h.")
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
    for start, end in LAYOUTS:
        for residual in ("sum", "mean", "scaled"):
            how = dict(loop_start=start, loop_end=end, residual=residual)
            ours = from_pretrained(path, n_loop=5, **how)
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


def test_gpt2_by_name_is_downloaded_and_checked(hugging_face, served, monkeypatch):
    """OpenAI's own layout: no prefix, no head, but masks; here in half precision."""
    from safetensors.torch import save_file
    tensors = {name.removeprefix("transformer."): p.detach().half()
               for name, p in hugging_face[0].named_parameters() if name != "lm_head.weight"}
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    masks = {f"h.{i}.attn.bias": mask.clone() for i in range(3)}
    save_file(tensors | masks, "model.safetensors", metadata={"format": "pt"})
    body = Path("model.safetensors").read_bytes()
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
    for overrides, message in [(dict(n_layer=2), "n_layer=3, not 2: .*with --init_layers"),
                               (dict(block_size=65), "block_size=64, not 65"),
                               (dict(n_embd=64), "n_embd=128, not 64"), (dict(n_head=4), "n_head"),
                               (dict(bias=False), "bias=True, not False: leave --bias out")]:
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
            assert "is no whole .safetensors file" in str(error)
            continue  # what anything damaged must come to
        sizes = sum(t.numel() * t.element_size() for t in tensors.values())
        assert i % 2 == 0 and sizes == len(good) - header


def test_checkpoints_come_back(tmp_path):
    model = small(n_loop=3, layout=(1, 2), residual="outer")
    save_checkpoint(tmp_path / "c.pt", model, step=7, nested={"a": [1.5, "b"]})
    again, state = load_checkpoint(tmp_path / "c.pt")
    assert again.config == model.config and state == {"step": 7, "nested": {"a": [1.5, "b"]}}
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.float(), q)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_bad_checkpoints_are_refused_and_their_code_not_run(tmp_path, monkeypatch, mistakes):
    monkeypatch.chdir(tmp_path)
    mistakes(sample.main, ([], "no checkpoint out/ckpt.pt: train one with python train.py"))
    path = Path("out/ckpt.pt")
    path.parent.mkdir()
    save_checkpoint(path, small())
    good = path.read_bytes()
    others = []
    for other in ({"config": Malice()}, [1, 2], {"config": {}}):
        torch.save(other, path)
        others.append(path.read_bytes())
    for bad in (pickle.dumps(Malice()), b"", good[:10], good[:1000], good[:len(good) // 2],
                good[:-1], *others):
        path.write_bytes(bad)
        mistakes(sample.main, ([], "out/ckpt.pt is no checkpoint ("))
    assert not Path("harm").exists()
    torch.save({"config": vars(small().config), "model": {}}, path)
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
    strided = get_args([*flags, "--stride=9"])  # documents of 9 tokens
    starts = torch.cat([get_batch(data, strided, 1000, step)[0][:, 0] for step in range(300)])
    assert sorted(set(starts.tolist())) == list(range(0, 1000 - 8, 9))


def test_the_drawn_depth_depends_on_seed_and_step_alone():
    args = get_args(["--n_loop=6", "--n_loop_min=3"])
    draws = [train.get_n_loop(args, step) for step in range(4000)]
    assert draws == [train.get_n_loop(args, step) for step in range(4000)]
    assert sorted(set(draws)) == [3, 4, 5, 6]
    assert all(abs(draws.count(n) - 1000) < 100 for n in (3, 4, 5, 6))
    other = get_args(["--n_loop=6", "--n_loop_min=3", "--seed=1"])
    assert draws != [train.get_n_loop(other, step) for step in range(4000)]
    assert {train.get_n_loop(get_args(["--n_loop=6"]), step) for step in range(100)} == {6}
    idx, args = some_tokens(4, 16), get_args(["--batch_size=2", "--grad_clip=0"])
    for n_loop in (1, 3):  # and it is the depth of the step
        model, expected = small(n_loop=6), small(n_loop=n_loop)
        loss, _ = train.train_step(model, [], idx, idx, args, nullcontext(), n_loop)
        expected(idx, idx)[1].backward()
        torch.testing.assert_close(loss, expected(idx, idx)[1], check_dtype=False)
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_the_schedule_warms_up_and_decays():
    args = get_args(["--max_steps=1000", "--warmup_steps=100", "--learning_rate=1"])
    rates = [get_lr(args, step) for step in range(1001)]
    assert (rates[0], rates[49], rates[99], rates[100]) == (0.01, 0.5, 1.0, 1.0)
    assert rates[550] == pytest.approx(0.55) and rates[1000] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[100:], rates[101:], strict=False))


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
    """What a run that nobody disturbed printed: {step: its line without times}, the last line."""
    out = finish("train.py", *TINY, "--out_dir=whole", cwd=tiny_data)
    return lines_of(out), json.loads(out.splitlines()[-1])


def lines_of(out):
    lines = re.sub(r" \| [\d,]+ tokens/s \| .* left", "", out).splitlines()
    return {int(re.match(r"step (\d+)", line)[1]): line for line in lines if line[:4] == "step"}


def test_a_run_learns_and_reports(tiny_data, whole_run):
    lines, result = whole_run
    assert [*lines] == list(range(0, 301, 5))
    losses = {step: float(re.search(r"val ([\d.]+)", line)[1])
              for step, line in lines.items() if "val" in line}
    assert [*losses] == [*range(0, 300, 40), 300]
    assert abs(losses[0] - math.log(257)) < 0.3  # knows nothing yet
    assert losses[300] == pytest.approx(result["val_loss"], abs=1e-4) and losses[300] < 2.5
    after_each = " ".join(f"{loss:.3f}" for loss in result["loop_losses"])
    assert lines[300].endswith(f"after each loop {after_each}")
    assert len(result["loop_losses"]) == 2 and result["loop_losses"][-1] == result["val_loss"]
    assert (result["step"], result["tokens"]) == (300, 300 * 64)
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2))
    model, state = load_checkpoint(tiny_data / "whole" / "ckpt.pt")  # it is what was reported
    _, val_data, _ = load_data(tiny_data / "data")
    losses = train.evaluate(model, val_data, get_args(TINY), torch.device("cpu"))
    assert losses == result["loop_losses"] and state["step"] == 300
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["flops"] == flops_per_token(model.config, 1.5) * 300 * 64


def assert_same_models(a, b):
    (model, state), (other, other_state) = load_checkpoint(a), load_checkpoint(b)
    assert model.config == other.config and state["step"] == other_state["step"]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_interrupted_run_continues_exactly(tiny_data, whole_run):
    resume, path, lines = ["train.py", "--resume", "--out_dir=broken"], "broken/ckpt.pt", {}
    ends = [(signal.SIGKILL, 25), (signal.SIGINT, 60), (signal.SIGKILL, 145), (signal.SIGINT, 200)]
    for i, (number, at) in enumerate(ends):
        command = resume if i else ["train.py", *TINY, "--out_dir=broken"]
        process = start(*command, cwd=tiny_data)
        for line in process.stdout:
            lines |= lines_of(line)
            if lines and max(lines) >= at:
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=60)
        if number == signal.SIGKILL:
            assert process.returncode == -9
        else:
            saved = load_checkpoint(tiny_data / path)[1]["step"]
            assert process.returncode == 1 and len(err.splitlines()) == 1, err
            command = "python train.py --resume --out_dir=broken"
            assert f"{path} is of step {saved}: go on with {command}" in err
    lines |= lines_of(finish(*resume, cwd=tiny_data))
    assert lines.items() >= {step: whole_run[0][step] for step in range(205, 301, 5)}.items()
    # a line that begins a resumed run lacks what the steps before it had
    assert all(whole_run[0][step].endswith(line.split("|")[-1]) for step, line in lines.items())
    assert_same_models(tiny_data / path, tiny_data / "whole" / "ckpt.pt")
    again = json.loads(finish(*resume, cwd=tiny_data).splitlines()[-1])
    assert again["val_loss"] == whole_run[1]["val_loss"]


def test_two_processes_train_what_one_does(tiny_data):
    few = [*TINY, "--dropout=0", "--max_steps=40", "--gradient_accumulation_steps=3"]
    alone = finish("train.py", *few, "--out_dir=alone", cwd=tiny_data)
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py"
    both = finish(launch, *few, "--out_dir=both", cwd=tiny_data)
    assert len(both.splitlines()) == len(alone.splitlines())  # only one of them prints
    assert [*lines_of(alone)] == [*lines_of(both)] == list(range(0, 41, 5))
    for line, other in zip(alone.splitlines()[2:], both.splitlines()[2:], strict=True):
        for name in ("loss", "norm", "val", '"val_loss":'):
            a, b = (re.findall(rf"{name} ([\d.]+)", text) for text in (line, other))
            assert [*map(float, a)] == pytest.approx([*map(float, b)], rel=1e-3, abs=0.011)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data):
    flags = [*TINY, "--learning_rate=1e30", "--optimizer=adamw", "--out_dir=diverged"]
    err = finish("train.py", *flags, cwd=tiny_data, code=1)
    assert "smaller --learning_rate" in err and len(err.splitlines()) == 1
    model, _ = load_checkpoint(tiny_data / "diverged" / "ckpt.pt")
    assert all(p.isfinite().all() for p in model.parameters())


def test_flags_that_cannot_work_are_refused(tiny_data, whole_run, tmp_path, monkeypatch, mistakes):
    monkeypatch.chdir(tiny_data)
    whole = ["--resume", "--out_dir=whole"]
    (tmp_path / "b.txt").write_text("other data " * 100)
    finish("prepare.py", "b.txt", cwd=tmp_path)
    mistakes(
        train.main,
        (["--n_lop=6"], "unrecognized arguments: --n_lop=6"), (["--n_loop=six"], "--n_loop"),
        (["--residual=product"], "invalid choice"), (["--loop_start=1"], "loop_start=1"),
        (["--n_embd=30", "--n_head=4"], "n_embd=30 must be a multiple of n_head=4"),
        (["--n_layer=2", "--loop_end=3"], "loop_end=3"), (["--loop_start=-1"], "loop_start"),
        (["--n_loop=0"], "must be a whole number of at least 1"), (["--n_loop_min=0"], "n_loop"),
        (["--n_loop=2", "--n_loop_min=3"], "--n_loop_min=3 must not be above --n_loop=2"),
        (["--init_layers=0,2"], "with --init_from"),
        (["--init_layers=0-2"], "invalid comma_separated_numbers value: '0-2'"),
        (["--batch_size=0"], "--batch_size"), (["--learning_rate=nan"], "--learning_rate"),
        (["--dropout=1"], "must be a number of at least 0 and below 1"),
        (["--weight_decay=-1"], "--weight_decay"), (["--preset=gpt3"], "invalid choice"),
        (["--preset=gpt2-45m", "--block_size=16"], "another text with --tokenizer=gpt2"),
        (["--out_dir=text.txt"], "is a file: name a folder"),
        (["--init_from=whole/ckpt.pt"], "is no whole .safetensors file"),
        (["--init_from=nowhere"], "no file nowhere"), (["--device=quantum"], "--device=cpu"),
        (["--device=meta"], "--device=meta does not work here: use --device=cpu"),
        (["--resume"], "no checkpoint out/ckpt.pt: train one with python train.py"),
        ([*whole, "--n_embd=32"], "--n_embd=32 cannot be resumed into"),
        ([*whole, "--optimizer=adamw"], "--optimizer=adamw cannot be resumed into"),
        ([*whole, "--learning_rate=1"], "--learning_rate=1.0 cannot be resumed into"),
        ([*whole, "--batch_size=8"], "--batch_size=8 cannot be resumed into"),
        ([*whole, "--max_steps=10"], "--max_steps"),
        ([*whole, f"--data_dir={tmp_path / 'data'}"], "not the data of the checkpoint, text.txt"))


def test_a_forker_s_error_keeps_its_traceback(tiny_data):
    (tiny_data / "fork.txt").write_text("""
import model, train
def forward(self, x):
    raise ValueError("mine")
model.MLP.forward = forward
train.main()
""")
    err = finish("fork.txt", "--out_dir=fork", cwd=tiny_data, code=1)
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
    x, y = (tokens[i:i + 64 * 77].view(77, 64) for i in (0, 1))
    with torch.no_grad():
        expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    result = result_of(*flags, "--max_steps=0", cwd=tmp_path)
    assert result["val_loss"] == pytest.approx(expected, rel=1e-2)
    layout = ["--n_loop=2", "--loop_start=1", "--loop_end=2"]
    result = result_of(*flags, *layout, "--max_steps=2", cwd=tmp_path)
    assert result["params"] == sum(p.numel() for p in theirs.parameters())
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
    assert finish("sample.py", *options, cwd=tiny_data)  # from nothing


def test_prompts_that_cannot_work_are_refused(tiny_data, whole_run, monkeypatch, mistakes):
    monkeypatch.chdir(tiny_data)
    cases = [(["--prompt=" + "x" * 17], "the prompt has 17 tokens, the model sees 16: shorten it"),
             (["--n_loop=0"], "--n_loop"), (["--top_k=0"], "--top_k"),
             (["--temperature=-1"], "--temperature"), (["--exit_kl=-1"], "--exit_kl"),
             (["--exit_kl=1", "--show_loops"], "leave out --exit_kl"), (["--what"], "unrecognized"),
             (["--plot=nowhere/a.png"], "a folder that exists"), (["--plot=a.x"], "must be a .png")]
    mistakes(sample.main, *((["--out_dir=whole", *args], message) for args, message in cases))


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
@in_every_reading
@in_every_layout
def test_a_token_that_exits_early_is_as_without_a_cache(residual, layout):
    model, prompt = small(n_loop=4, layout=layout, residual=residual), some_tokens(1, 4)
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
        assert torch.equal(idx, expected) and loops == depths[3:]
        if exit_kl == math.inf:
            assert set(loops[1:]) == {min(N, 2)}  # two predictions, to see that they agree
        if exit_kl == 0.0:
            assert torch.equal(idx, complete(model, prompt, 13, temperature=0))


def test_exiting_early_saves_the_loops_it_skips():
    model, widths, loops = small(n_loop=4), [], []
    model.h[0].register_forward_pre_hook(lambda block, args: widths.append(args[0].size(1)))
    forward = partial(sample.exit_early, model, math.inf, loops)
    complete(model, torch.zeros(1, 5, dtype=torch.long), 10, forward=forward)
    assert loops == [4] + [2] * 9 and widths == [5] * 4 + [1] * 18


@torch.no_grad()
def test_guesses_are_the_best_of_each_loop():
    model, idx = small(n_loop=3, layout=(1, 2)), some_tokens(1, 17)
    guess, probability = sample.best_guesses(model, idx, n_loop=4)
    expected = torch.stack(by_hand(model, idx[:, :-1], 4)).softmax(-1)[:, 0]
    assert torch.equal(guess, expected.argmax(-1))
    torch.testing.assert_close(probability, expected.max(-1).values.float())
    four_loops = torch.tensor([[1, 7, 5], [2, 7, 6], [1, 7, 5], [1, 7, 6]])
    assert sample.first_final(four_loops).tolist() == [0, 0, 1]


def test_the_loops_are_shown(tiny_data, whole_run, tmp_path, monkeypatch, mistakes):
    command = ["--out_dir=whole", "--prompt=7 times", "--n_loop=4", "--max_new_tokens=100"]
    picture = tmp_path / "loops.png"
    out = finish("sample.py", *command, "--show_loops", f"--plot={picture}", cwd=tiny_data)
    lines = out.splitlines()[-18:]  # a context of 16, one guess for each
    assert "loop 4" in lines[0] and lines[1].startswith("' ' ")
    assert re.fullmatch(r"equal to the final guess after each loop, of 16: (\d+ ){3}16", lines[-1])
    assert all(len(re.findall(r" +\d+%", line)) == 4 for line in lines[1:-1])
    assert picture.read_bytes().startswith(b"\x89PNG")
    process = start("sample.py", *command, "--exit_kl=0.01", cwd=tiny_data)
    _, err = process.communicate(timeout=60)
    assert re.search(r"\(100 tokens, [\d,]+ a second, [234]\.\d\d loops a token\)", err), err
    monkeypatch.chdir(tiny_data)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    mistakes(sample.main, ([*command, "--plot=no.png"], "pip install matplotlib"))


# ---- bench.py ----

def test_bench_measures_what_its_flags_describe(tmp_path):
    flags = ["--n_layer=3", "--loop_start=1", "--n_loop=4", "--n_head=2", "--n_embd=32",
             "--block_size=32", "--checkpoint_loops"]
    figures = json.loads(finish("bench.py", "measure", *flags, cwd=tmp_path).splitlines()[-1])
    config = GPTConfig(32, 257, 3, 2, 32, n_loop=4, loop_start=1)
    assert figures["params"] == sum(p.numel() for p in GPT(config).parameters())
    assert figures["flops"] == flops_per_token(config) and figures["tokens"] == 8 * 32
    assert figures["decode"] > 0 and figures["memory"] >= 0
    assert figures["start"] > figures["step"] > 0
    table = finish("bench.py", "speed", *flags, cwd=tmp_path).splitlines()
    assert len(table) == 3 and table[2].split()[-1] == "1.00x"
    for args, message, code in [(["nonsense"], "has no command nonsense", 1),
                                (["speed", "--what"], "unrecognized", 2)]:
        assert message in finish("bench.py", *args, cwd=tmp_path, code=code)


@torch.no_grad()
@in_every_reading
def test_what_bench_says_of_loops_is_so(residual):
    model = small(n_loop=3, layout=(1, 2), residual=residual)
    x, y = some_tokens(2, 1, 16)
    log_p = torch.stack(by_hand(model, x, 3))[:, 0].log_softmax(-1)
    for (loss, kl, same), now in zip(bench.per_loop(model, x, y).double(), log_p, strict=True):
        assert loss == pytest.approx(F.nll_loss(now, y[0]).item())
        expected = (log_p[-1].exp() * (log_p[-1] - now)).sum(-1).mean()
        assert kl == pytest.approx(expected.item(), abs=1e-6)
        agrees = now.argmax(-1) == log_p[-1].argmax(-1)
        assert same == pytest.approx(agrees.double().mean().item())


@torch.no_grad()
def test_bench_counts_the_answers_to_hops(capsys):
    texts = list(prepare.make_hops(9))
    x = torch.tensor([[*text.encode()] for text in texts])
    y = torch.tensor([[*text[1:].encode(), 256] for text in texts])
    model = small(n_loop=3, vocab_size=257, block_size=58, residual="sum")
    guesses = torch.stack(by_hand(model, x, 3)).argmax(-1)                      # (N, B, T)
    y[:, 11::6] = guesses[0][:, 11::6]  # as if every other answer of the first loop were right
    bench.print_answers(model, x, y)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("right answers to 144 questions") and len(rows) == 3
    for n, row in enumerate(rows):
        right, asked = [0] * 6, [0] * 6
        for b, text in enumerate(texts):
            for t in range(11, 58, 3):
                asked[int(text[t - 1]) - 1] += 1
                right[int(text[t - 1]) - 1] += int(guesses[n, b, t] == y[b, t])
        shares = [f"{r / a:.1%}" for r, a in zip(right, asked, strict=True)]
        assert row.split() == [f"{n + 1}", *shares]
        assert n > 0 or sum(right) >= 72  # half of the first loop's


def test_bench_loops_reports(tiny_data, whole_run):
    out = finish("bench.py", "loops", "--out_dir=whole", "--windows=12", cwd=tiny_data)
    rows = [line.split() for line in out.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["1", "2"] and rows[1][2:] == ["0.0000", "100.0%"]
    reported = whole_run[1]["loop_losses"]  # of the same windows
    assert [float(row[1]) for row in rows] == pytest.approx(reported, abs=1e-4)
    passes = [float(loss) for loss in out.splitlines()[4].split(":")[1].split()]
    assert len(passes) == 4 and passes[1] == float(rows[1][1])  # passes of 1 to 4 loops
    err = finish("bench.py", "loops", "--out_dir=none", cwd=tiny_data, code=1)
    assert err.startswith("no checkpoint none/ckpt.pt: train one")


def test_compare_goes_on_where_it_was_stopped(tiny_data, tmp_path):
    shared = ["--max_steps=30", f"--data_dir={tiny_data / 'data'}", "--block_size=32"]
    args = ["compare", "--what=paper", "--seeds=1", *shared]
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
    path = next((tmp_path / "results").glob("tiny-paper-max_steps=30*.json"))
    models = json.loads(path.read_text())["models"]
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
    flags = [*bench.SCALES["tiny"], "--n_layer=2", "--n_loop=3", *shared]
    assert result_of(*flags, cwd=tmp_path)["val_loss"] == models["2 x 3"]["mean"]


def test_equal_compute_is_equal_and_its_rate_falls_with_the_steps():
    models = bench.models_of("compute", "tiny", bench.SCALES["tiny"], 257)
    assert len(models) == 4 * bench.BUDGETS
    rates, budgets = {}, []
    for label, flags in models.items():
        args = get_args(flags)
        budgets.append(bench.training_flops(flags, 257))
        assert budgets[-1] == pytest.approx(float(label.split()[3]), rel=0.05)
        rates.setdefault(args.n_loop, []).append((args.max_steps, args.learning_rate))
    assert sorted(rates) == [1, 2, 4, 6] and budgets[4] / budgets[0] == pytest.approx(2.5, rel=0.05)
    for points in rates.values():
        assert all(a[0] < b[0] and a[1] >= b[1] for a, b in zip(points, points[1:], strict=False))
        assert points[0][1] > points[-1][1]


def test_compare_tunes_each_model_and_says_what_diverged(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    best = {1: 1e-3, 2: 8e-3, 3: 64e-3, 4: 1e-3, 6: 8e-3, 8: 8e-3}  # loops: learning rate

    def trained(label, flags, data_sha256, rate, seed):
        n_loop = get_args(flags).n_loop
        if (n_loop == 6 and seed == 1) or (n_loop == 8 and (seed or rate > 1e-3)):
            return None
        loss = 1 + abs(math.log2(rate / best[n_loop])) + seed / 10
        return {"val_loss": loss, "tokens": 100, "seconds": 6, "params": 1, "flops": 1,
                "loop_losses": [loss] * n_loop}
    monkeypatch.setattr(bench, "train_run", trained)
    command = ["--what=loops", "--seeds=2", f"--data_dir={tiny_data / 'data'}"]
    bench.compare([*command, "--learning_rate=8e-3", "--sweep"])
    out, path = capsys.readouterr().out, next((tmp_path / "results").glob("*8e-3.json"))
    models = json.loads(path.read_text())["models"]
    trials = {label: row["trials"] for label, row in models.items()}
    assert [*trials["1 x 1"]] == ["0.0005", "0.001", "0.002", "0.004", "0.008", "0.016"]
    assert [*trials["1 x 2"]] == ["0.004", "0.008", "0.016"] and trials["1 x 2"]["0.008"] == 1
    assert [*trials["1 x 3"]] == ["0.004", "0.008", "0.016", "0.032", "0.064", "0.128"]
    assert [loss is None for loss in trials["1 x 8"].values()] == [False] * 2 + [True] * 4
    rates = [row["learning_rate"] for row in models.values()]
    assert rates == [1e-3, 8e-3, 64e-3, 1e-3, 8e-3, 1e-3]
    assert models["1 x 1"]["mean"] == pytest.approx(1.05)
    assert models["1 x 1"]["spread"] == pytest.approx(0.05)
    assert models["1 x 6"]["mean"] == 1 and "1 diverged\n" in out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for what in ("compute", "readings"):  # one rate for all, and a picture of its own
        bench.compare([*command, f"--what={what}"])
        picture = next((tmp_path / "results").glob(f"tiny-{what}-*.png"))
        assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(bench, "train_run", lambda *args: None)
    bench.compare(command)
    out = capsys.readouterr().out
    assert "\n1 x 8  2 diverged\n" in out
    assert not any("NaN" in path.read_text() for path in (tmp_path / "results").glob("*.json"))
    bench.compare([*command, "--sweep"])  # ends, although no rate works
    for flag, message in [("--seeds=0", "at least 1"), ("--bogus", "unrecognized"),
                          ("--scale=small", "python prepare.py --tokenizer=gpt2")]:
        with pytest.raises(SystemExit) as caught:
            bench.compare([*command, flag])
        assert message in f"{caught.value.code} {capsys.readouterr().err}"


def test_compare_at_the_scale_of_gpt2_has_the_papers_models():
    models = bench.models_of("paper", "small", bench.SCALES["small"], 50257)
    assert list(models) == [
        "12 x 1", "6 x 6", "36 x 1, unshared", "12 x 1, compute of 6 x 6",
        "1 x 1", "1 x 2", "2 x 1, unshared", "1 x 1, compute of 1 x 2"]
    assert bench.PAPER.keys() <= models.keys()
    for label, preset in zip(("12 x 1", "6 x 6", "1 x 1", "1 x 2"), PRESETS, strict=True):
        assert train.get_config(get_args(models[label]), 50257) == train.get_config(
            get_args([f"--preset={preset}"]), 50257)
