"""
What is true of this project, in the order in which data flows through it. Run it with

    pip install -r requirements.txt pytest transformers matplotlib && pytest

All that would be downloaded comes from a server on this machine.
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
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import chdir, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import bench
import prepare
import sample
import train
from model import GPT, NOT_GPT2, RESIDUALS, Block, GPTConfig, KVCache, change_layout
from model import flops_per_token, generate, load_checkpoint, load_pretrained, next_logits
from model import pick_dtype, read_safetensors, sample_token, save_checkpoint
from prepare import EOT, PUZZLES, get_tokenizer, load_data
from train import PRESETS, get_batch, get_lr

torch.set_num_threads(1)  # as in the runs below: one core is fastest for models this small
HERE = Path(__file__).parent
LAYOUTS = [(0, None), (0, 2), (1, 2), (1, 3)]  # loop_start, loop_end of three blocks
LOOPS = [*({"residual": residual} for residual in RESIDUALS), {"loop_order": "block"}]
VARIANTS = [*LOOPS]     # add the fields of your fork here, such as {"rope": True}
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)
in_every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def start(script, *args, cwd):
    """Start a script of ours as a user does, in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)   # also if pytest ignores Ctrl-C
    return subprocess.Popen([sys.executable, HERE / script, *args], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed)


def call(script, *flags, cwd):
    """Run a script of ours in this process. Return what it printed on stdout."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with chdir(cwd), redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
        script.main()
    return out.buffer.getvalue().decode()


def records(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def run(*flags, cwd):
    """Train in this process. Return the last record of the log, which is the result."""
    call(train, *flags, cwd=cwd)
    named = [flag.split("=")[1] for flag in flags if flag.startswith("--out_dir=")]
    return records(cwd / (named or ["out"])[0])[-1]


def get_args(flags):
    return train.get_args(flags)[0]


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
    """idx (B, T) with the tokens that generate adds to it, and the loops that each took."""
    tokens, loops = zip(*generate(model, idx, count, **options), strict=True)
    return torch.cat([idx, *tokens], dim=1), list(loops)


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


def test_byte_tokens_are_the_bytes():
    byte, text = get_tokenizer("byte"), any_text(0, 20_000)
    ids = byte.encode(text, allowed_special={EOT})
    assert byte.decode(ids) == text and ids.count(256) == text.count(EOT) > 0
    plain = text.replace(EOT, "")
    assert byte.encode_ordinary(plain) == list(plain.encode())
    assert (byte.n_vocab, byte.eot_token) == (257, 256)


def prepared(folder, source):
    """The text of both splits, after checking that meta.json agrees with them."""
    tokenizer, texts = get_tokenizer("byte"), []
    prepare.write_data(folder / "data", str(source), tokenizer, shards=3)
    *splits, meta = load_data(folder / "data")
    for split, data in zip(("train", "val"), splits, strict=True):
        text = tokenizer.decode(data.tolist())
        sha256 = hashlib.sha256(data.tobytes()).hexdigest()
        assert meta[split] == {"tokens": len(data), "sha256": sha256}
        texts.append(text)
    return texts


def test_few_documents_are_each_cut_at_nine_tenths(tmp_path):
    text = any_text(1, 3000).replace(EOT, "")
    (tmp_path / "a.txt").write_bytes(text.encode())
    cut = len(text) * 9 // 10
    assert prepared(tmp_path, tmp_path / "a.txt") == [text[:cut], text[cut:]]
    (tmp_path / "a.txt").write_text(EOT.join(["a" * 100, "", "b" * 50]))
    expected = ["a" * 90 + EOT + "b" * 45, "a" * 10 + EOT + "b" * 5]
    assert prepared(tmp_path, tmp_path / "a.txt") == expected


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
        texts = prepared(tmp_path, tmp_path / source)
        for split_text, is_val in zip(texts, (False, True), strict=True):
            expected = [text for text in documents if goes_to_val(text, 10) == is_val]
            assert sorted(split_text.split(EOT)) == sorted([*expected, ""])
            assert len(expected) > 15


def test_a_failure_leaves_the_old_data_and_a_success_its_readers(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    prepared(tmp_path, tmp_path / "a.txt")
    before, reader = snapshot(tmp_path / "data"), load_data(tmp_path / "data")[0]
    text = bytes(reader.astype(np.uint8))
    (tmp_path / "b.txt").write_bytes(b"x" * 1000 + b"\xff")
    (tmp_path / "c.txt").write_text("c")
    for name in ("b.txt", "c.txt"):
        with pytest.raises(SystemExit):
            prepared(tmp_path, tmp_path / name)
        assert snapshot(tmp_path / "data") == before
    (tmp_path / "c.txt").write_text("other text " * 9)
    prepared(tmp_path, tmp_path / "c.txt")
    assert bytes(reader.astype(np.uint8)) == text and snapshot(tmp_path / "data") != before
    assert sorted(os.listdir(tmp_path / "data")) == ["meta.json", "train.bin", "val.bin"]


def test_the_python_library_is_found_without_what_pip_installed():
    files = prepare.find_files("pystdlib")
    assert len(files) == len(set(files)) > 300 and all(path.suffix == ".py" for path in files)
    assert not any({"site-packages", "test"} & {*path.parts} for path in files)


def follow(text, letter, steps=0):
    """The end to which the arrows of a puzzle lead from a letter, and the number of steps."""
    target = text[ord(letter) - ord("a")]
    return (letter, steps) if target == letter else follow(text, target, steps + 1)


@pytest.mark.parametrize("lengths", [prepare.TRAINING_CHAINS, prepare.TEST_CHAINS])
def test_arrows_lead_forward_to_the_answers(lengths):
    seen = []
    for text in prepare.make_arrows(300, lengths):
        arrows = [(a, b) for a, b in zip(prepare.LETTERS, text, strict=False) if a != b]
        assert all(a < b for a, b in arrows)
        assert len({b for _, b in arrows}) == len(arrows)   # one arrow at most leads to a letter
        steps = [follow(text, letter)[1] for letter in prepare.LETTERS]
        if lengths is prepare.TEST_CHAINS:    # two equal chains: a guess of an end is right in 50%
            assert sorted(steps) == sorted([*range(10)] * 2)
        questions = [text[i:i + 3] for i in range(20, 68, 3)]
        assert len({question[0] for question in questions}) == 16
        assert all(arrow == ">" and follow(text, letter)[0] == answer
                   for letter, arrow, answer in questions)
        seen += [follow(text, question[0])[1] for question in questions]
    if lengths is prepare.TEST_CHAINS:
        assert bench.questions(300, seed=0)[2].flatten().tolist() == seen
    else:
        assert sorted(set(seen)) == list(range(5)) and min(map(seen.count, range(5))) > 240


def test_a_puzzle_is_what_its_scoring_says(tmp_path, monkeypatch):
    for name, puzzle in PUZZLES.items():
        monkeypatch.setitem(puzzle, "count", 1000)
        prepare.write_data(tmp_path / name, name, get_tokenizer("byte"), None)
        data, _, meta = load_data(tmp_path / name)
        scoring, length = meta["puzzle"], puzzle["scoring"]["document_length"]
        assert scoring == puzzle["scoring"] and (data[length - 1::length] == 256).all()
        rows = torch.from_numpy(data[:length * 100].astype(np.int64)).view(100, length)
        x, y = train.inputs_and_targets(rows, torch.device("cpu"), scoring)
        for text, read, answers in zip(rows[:, :-1], x, y, strict=True):
            text, read = bytes(text.tolist()).decode(), bytes(read.tolist()).decode()
            said = bytes(token for token in answers.tolist() if token >= 0).decode()
            if name == "arrows":
                assert said == text[22::3] and read == re.sub(">[a-t]", ">>", text)
            else:   # to go on from a digit, a model must have seen digits
                a, b, c = map(int, re.split("[+=]", text))
                assert a + b == c == int(said) and read == text
        monkeypatch.setitem(puzzle, "scoring", scoring | {"document_length": length - 1})
        with pytest.raises(AssertionError, match=name):
            prepare.write_data(tmp_path / name, name, get_tokenizer("byte"), None)
    monkeypatch.setitem(PUZZLES["addition"]["scoring"], "hide_answers", True)
    with pytest.raises(AssertionError, match="addition"):
        next(prepare.make_puzzles("addition"))


class Server(http.server.BaseHTTPRequestHandler):
    """A web server with the faults of real ones; `script` says what the next answers are.

    As the hub does, it first redirects to another address, from which the file comes.
    """
    CUT = 3 << 16  # bytes after which a broken connection breaks
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, length=0, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self):
        body = Server.files.get(Path(self.path).name, b"")
        if "/store/" not in self.path:
            return self.answer(302, Location=f"/store{self.path}")
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


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address of a Server. Downloads go to this test's own cache, and nobody waits."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    Server.files, Server.script, Server.requests = {}, [], []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads_survive_what_networks_do(served):
    cut = Server.CUT
    for i, (script, begins) in enumerate([
            (["fine"], [0]), ([429, 500, 503, "fine"], [0, 0, 0, 0]),
            (["cut", "cut", "fine"], [0, cut, 2 * cut]), (["cut", 500, "fine"], [0, cut, cut]),
            (["cut", "no ranges"], [0, cut]), (["cut"] * 5, [i * cut for i in range(6)])]):
        body = random.Random(i).randbytes(10 * cut)
        Server.files, Server.script, Server.requests = {f"f{i}": body}, list(script), []
        for _ in range(2):  # the second time it is there
            path = prepare.download(f"{served}/f{i}", hashlib.sha256(body).hexdigest())
            assert path.read_bytes() == body and Server.requests == begins
    for have in (cut, len(body)):  # as if it had been stopped there
        part = path.rename(f"{path}.part")
        os.truncate(part, have)
        Server.requests = []
        assert prepare.download(f"{served}/f{i}").read_bytes() == body
        assert Server.requests == [have] and not part.exists()


def test_downloads_that_cannot_be_had_say_so(served, monkeypatch):
    Server.files = {"f": b"something else", "00.tar": b"<html>log in</html>"}
    sha256 = hashlib.sha256(b"something").hexdigest()
    for script, message, tries in [([404], "404 Client Error: Not Found", 1),
                                   ([500] * 9, "500 Server Error", 6),
                                   (["fine"], "has another sha256", 1)]:
        Server.script, Server.requests = list(script), []
        with pytest.raises(SystemExit, match=message + ".*(: use another|: it is deleted)"):
            prepare.download(f"{served}/f", sha256, "use another")
        assert len(Server.requests) == tries
    with pytest.raises(SystemExit, match="Connection refused"):
        prepare.download("http://127.0.0.1:9/f", sha256)  # nobody listens there
    Server.script = []
    monkeypatch.setattr(prepare, "OPENWEBTEXT", served + "/{:02}.tar")
    with pytest.raises(SystemExit, match="something that is no tar: it is deleted"):
        list(prepare.read_openwebtext(1))
    assert snapshot(".") == {}


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


def test_openwebtext_is_what_was_published(served, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "OPENWEBTEXT", served + "/subsets/urlsf_subset{:02}.tar")
    expected = {False: "", True: ""}    # train and val
    for i in range(3):
        archives = []
        for j in range(4):
            texts = [f"\n {any_text(k, 50)} \n\n\n\n\n{i} {j}\n" for k in range(40)]
            texts += ["", next(text for n in itertools.count()
                               if goes_to_val(text := f"{i} {j} é {n}", 2000))]
            texts = [text.replace(EOT, "") for text in texts]
            for text in texts:
                text = re.sub("\n\n\n+", "\n\n", text).strip()
                if text:
                    expected[goes_to_val(text, 2000)] += text + EOT
            members = [(f"../../{n}.txt", text.encode()) for n, text in enumerate(texts)]
            inner = tar_of(("link.txt", None), ("README", b"not this"), *members)
            archives.append((f"/openwebtext/{i}-{j}_data.xz", lzma.compress(inner, preset=0)))
        body = tar_of(("link.xz", None), ("LICENSE", b"nor this"), *archives)
        Server.files[f"urlsf_subset{i:02}.tar"] = body
    assert prepared(tmp_path, "openwebtext") == [*expected.values()]
    Server.files = {}
    assert prepared(tmp_path, "openwebtext") == [*expected.values()]    # from the cache
    written = {path.name for path in tmp_path.rglob("*") if "cache" not in path.parts}
    assert written == {"data", "train.bin", "val.bin", "meta.json"}  # nothing elsewhere


# ---- model.py: the loop ----

def by_hand(model, idx, N):
    """The states (B, T, C) after loop 1 .. N, written out from the paper's equation."""
    c, x = model.config, model.embed(idx)
    for block in model.h[:c.loop_start]:
        x = block(x)    # its equal is the block of Hugging Face, below
    looped = list(range(c.loop_start, c.loop_end))
    for g, group in enumerate([looped] if c.loop_order == "stack" else [[i] for i in looped]):
        states = []
        for n in range(N):
            y = x
            for i in group:
                y = model.h[i](y)
            a = 1 if model.gates is None else model.gates[g, min(n, c.n_loop - 1)]
            x = {"gated": x + a * (y - x), "sum": y, "mean": x + (y - x) / N,
                 "outer": x + y}[c.residual]
            states.append(x)
    return states


def logits_by_hand(model, x):
    for block in model.h[model.config.loop_end:]:
        x = block(x)
    return model.ln_f(x) @ model.wte.weight.T


@in_every_variant
@in_every_layout
def test_the_loop_is_the_paper_s_equation(variant, layout):
    idx, targets = some_tokens(2, 2, 16)
    model = small(n_loop=3, layout=layout, **variant)
    for depth in (1, 2, 3, 6):
        expected = [logits_by_hand(model, x) for x in by_hand(model, idx, depth)]
        losses = [F.cross_entropy(e.reshape(-1, 50), targets.reshape(-1)) for e in expected]
        torch.testing.assert_close(model(idx, n_loop=depth), expected[-1])
        torch.testing.assert_close(model(idx, targets, n_loop=depth), losses[-1])
        torch.testing.assert_close(model.loop_losses(idx, targets, depth), torch.stack(losses))
        last, loops = next_logits(model, idx, depth)
        torch.testing.assert_close(last, expected[-1][:, -1:])
        assert loops == depth
    assert torch.equal(model(idx), model(idx, n_loop=3))


@in_every_variant
def test_a_variant_is_not_the_default(variant):
    default, other = small(n_loop=3), small(n_loop=3, **variant)
    weights = other.state_dict()
    weights |= {name: p for name, p in default.state_dict().items()
                if name in weights and weights[name].shape == p.shape}
    other.load_state_dict(weights)      # the same in all that both have
    idx = some_tokens(1, 16)
    assert torch.equal(other(idx), default(idx)) == (other.config == default.config)


def test_a_variant_without_an_equation_is_an_error(monkeypatch):
    monkeypatch.setattr("model.RESIDUALS", (*RESIDUALS, "nonsense"))
    model = small(n_loop=2, residual="nonsense")
    for loop in (model, lambda idx: by_hand(model, idx, 2)):
        with pytest.raises((AssertionError, KeyError), match="nonsense"):
            loop(some_tokens(1, 16))
    monkeypatch.setattr("train.OPTIMIZERS", (*train.OPTIMIZERS, "nonsense"))
    with pytest.raises(AssertionError, match="nonsense"):
        train.configure_optimizers(small(), get_args(["--optimizer=nonsense"]))


def test_looping_adds_gates_and_nothing_else():
    def shapes(**how):
        return {name: p.shape for name, p in GPT(GPTConfig(n_layer=6, **how)).named_parameters()}
    with torch.device("meta"):
        plain = shapes()
        assert shapes(n_loop=6) == plain | {"gates": (1, 6, 768)}
        block_by_block = dict(n_loop=2, loop_order="block", loop_start=1, loop_end=4)
        assert shapes(**block_by_block) == plain | {"gates": (3, 2, 768)}
        assert shapes(n_loop=6, residual="sum") == plain
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124_439_808  # GPT-2
        sizes = [sum(p.numel() for p in GPT(train.get_config(get_args([f"--preset={name}"]), 257)
                                            ).parameters()) for name in list(PRESETS)[:4]]
    assert [round(size / 1e6, 1) for size in sizes] == [124.3, 81.9, 46.5, 46.5]  # 124M 81M 45M 45M


@in_every_variant
@in_every_layout
def test_cached_generation_is_uncached_generation(variant, layout):
    model, prompt = small(n_loop=3, layout=layout, **variant), some_tokens(2, 5)
    for n_loop in (None, 1, 5):
        expected = prompt
        for _ in range(30):  # far beyond block_size=16
            logits = model(expected[:, -16:], n_loop=n_loop)[:, -1]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
        idx, loops = complete(model, prompt, 30, temperature=0, n_loop=n_loop)
        assert torch.equal(idx, expected) and loops == [n_loop or 3] * 30


def test_a_cached_token_costs_one_position_in_each_loop_it_takes():
    model, widths = small(n_loop=4), []
    model.h[0].register_forward_pre_hook(lambda block, args: widths.append(args[0].size(1)))
    for exit_kl, taken in ((None, 4), (math.inf, 2)):
        widths.clear()
        _, loops = complete(model, torch.zeros(1, 5, dtype=torch.long), 14, exit_kl=exit_kl)
        # the prompt but its last token, new tokens, the sliding window
        assert widths == [4] * 4 + [1] * 12 * taken + [16] * 8
        assert loops == [taken] * 12 + [4] * 2
    _, loops = complete(model, torch.zeros(1, 1, dtype=torch.long), 20, exit_kl=math.inf)
    assert loops == [2] * 16 + [4] * 4


def test_decoding_in_bfloat16_stays_near_float32(monkeypatch):
    """A bfloat16 is off by 2**-9 at most, and four blocks round their state 8 times."""
    torch.manual_seed(0)
    model, drawn, onednn = GPT(GPTConfig(16, 50, 4, 4, 256)).eval(), [], []
    model.ln_f.register_forward_pre_hook(
        lambda norm, args: onednn.append(torch.backends.mkldnn.enabled))
    monkeypatch.setattr("model.sample_token",
                        lambda logits, *_: drawn.append(logits) or some_tokens(1, 1))
    for dtype in (torch.float32, torch.bfloat16):
        complete(model.to(dtype), some_tokens(1, 5), 14)
    for expected, logits in zip(drawn[:14], drawn[14:], strict=True):
        assert 0 < (logits - expected).norm() / expected.norm() < 8 * 2 ** -9
    # only a single token in bfloat16 is computed without oneDNN
    assert onednn == [True] * 15 + [True] + [False] * 12 + [True] * 2
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    complete(model, some_tokens(1, 5), 14)
    assert not torch.backends.mkldnn.enabled    # as the caller had it


@torch.no_grad()
@in_every_variant
@in_every_layout
def test_early_exit(variant, layout):
    model, idx = small(n_loop=4, layout=layout, **variant), some_tokens(1, 12)
    full = complete(model, idx[:, :4], 12, temperature=0)
    assert [*map(str, complete(model, idx[:, :4], 12, temperature=0, exit_kl=0.0))] == [
        *map(str, full)]    # 0 is no exit
    *_, last = states = by_hand(model, idx, 4)
    log_p = []
    for x in states:    # blocks after the loop see the other positions as all loops left them
        x = torch.cat((last[:, :-1], x[:, -1:]), dim=1)
        log_p.append(logits_by_hand(model, x)[0, -1].log_softmax(-1))
    kl = [(q.exp() * (q - p)).sum().item() for p, q in itertools.pairwise(log_p)]
    for exit_kl in (math.inf, 0.9 * kl[1], 0.9 * kl[2], 0):
        cache = KVCache(16)
        next_logits(model, idx[:, :-1], 4, cache)
        cache.length = 11
        logits, loops = next_logits(model, idx[:, -1:], 4, cache, exit_kl)
        # it stops at the first loop that changes the prediction less; its logits are that loop's
        assert loops == next((n for n, d in enumerate(kl, start=2) if d < exit_kl), 4)
        torch.testing.assert_close(logits[0, -1].log_softmax(-1), log_p[loops - 1])
        for i in range(*model.groups[-1]):  # what it skipped shows the state of the last loop taken
            entries = [cache.entries[n, i][..., 11, :] for n in range(1, 5)]
            assert all(torch.equal(entry, entries[loops - 1]) for entry in entries[loops:])
            assert not torch.equal(entries[0], entries[loops - 1])


def test_sampling_follows_the_model_s_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 2
    assert sample_token(logits, 1e-40).item() == logits.argmax()    # no overflow
    tied = sample_token(torch.ones(1, 50).expand(1000, 50), 1.0, top_k=3)
    assert len(set(tied.flatten().tolist())) == 3   # k of them, even where all are equal
    for temperature, top_k in [(1.0, None), (0.5, None), (1.0, 5), (1.0, 1)]:
        drawn = sample_token(logits.expand(20_000, 50), temperature, top_k)
        share = drawn.flatten().bincount(minlength=50) / 20_000
        expected = logits[0] / temperature
        if top_k:
            expected = expected.masked_fill(expected < expected.topk(top_k).values[-1], -math.inf)
        assert (share - expected.softmax(-1)).abs().max() < 0.015


@in_every_variant
@in_every_layout
def test_flops_per_token_are_those_that_torch_counts(layout, variant):
    model, idx = small(n_loop=4, layout=layout, **variant).float(), some_tokens(2, 16)
    for n_loop in (1, 4):
        assert train.flops_ratio(model, idx, idx, get_args(["--batch_size=2"]), n_loop) == 1


def grads(model):
    return [p.grad for p in model.parameters()]


def gradients(model, idx, **how):
    torch.manual_seed(2)  # for dropout
    model.zero_grad()
    model(idx, idx, **how).backward()
    return grads(model)


@in_every_variant
def test_one_compiled_block_serves_all_at_any_depth(variant):
    """Nothing is compiled twice, and no tensor (B, T, V) goes back from the loss to the head."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs, inputs = [], []

    def forward(graph, example):
        graphs.append(graph)
        return make_boxed_func(graph)

    def backward(graph, example):
        inputs.extend(tuple(node.meta["val"].shape) for node in graph.graph.nodes
                      if node.op == "placeholder" and "tangents" in node.name)
        return make_boxed_func(graph)
    torch._dynamo.reset()
    plain, compiled = (small(n_layer=4, loop_start=1, loop_end=3, n_loop=3, **variant)
                       for _ in range(2))
    train.compile_blocks(compiled, backend=aot_autograd(fw_compiler=forward, bw_compiler=backward))
    idx = some_tokens(2, 16)
    gradients(compiled, idx)
    count = len(graphs)
    for n_loop in (3, 1, 2, 6):
        expected = gradients(plain, idx, n_loop=n_loop)
        torch.testing.assert_close(gradients(compiled, idx, n_loop=n_loop), expected)
    assert len(graphs) == count > 0
    assert sorted(set(inputs)) == [(), (2, 16, 32)]     # the loss, and a state


@in_every_variant
def test_checkpointed_loops_have_the_same_gradients(variant):
    idx, calls = some_tokens(2, 16), []
    model = small(n_loop=4, layout=(1, 2), dropout=0.2, **variant).train()
    expected = gradients(model, idx)
    model.checkpoint_loops = True
    model.h[1].register_forward_pre_hook(lambda module, args: calls.append(1))
    again = gradients(model, idx)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert len(calls) == 4 + 3  # all but the last loop once more


# ---- model.py: weights from elsewhere, and checkpoints ----

@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A GPT-2 of Hugging Face with random weights, and its file."""
    import transformers
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=64, n_embd=128, n_layer=3, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    folder = tmp_path_factory.mktemp("hugging_face")
    theirs.save_pretrained(folder)
    return theirs, folder / "model.safetensors"


@torch.no_grad()
def test_gpt2_equals_hugging_face_and_one_loop_is_gpt2_bit_for_bit(hugging_face):
    theirs, path = hugging_face
    idx = torch.randint(50257, (2, 64))
    expected, (gpt2, _) = theirs(idx).logits, load_pretrained(path)
    logits = gpt2(idx)
    assert (logits - expected).abs().max() < 1e-4
    for (start, end), variant in itertools.product(LAYOUTS, LOOPS):
        one, five = (change_layout(gpt2, replace(gpt2.config, n_loop=n, loop_start=start,
                                                 loop_end=end, **variant)) for n in (1, 5))
        assert torch.equal(one(idx), logits) == (one.config.residual not in NOT_GPT2)
        # with gates, all loops leave it GPT-2 exactly, until they learn
        assert torch.equal(five(idx), logits) == (five.gates is not None)
    short = change_layout(gpt2, replace(gpt2.config, block_size=10))
    assert (short(idx[:, :10]) - expected[:, :10]).abs().max() < 1e-4


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
    monkeypatch.setattr(prepare, "GPT2", served + "/{}/{}/model.safetensors")
    files = {"gpt2": ("revision", hashlib.sha256(body).hexdigest()), "gpt2-xl": ("other", "0" * 64)}
    monkeypatch.setattr(prepare, "GPT2_FILES", files)
    ours, _ = load_pretrained(prepare.find_weights("gpt2"))
    expected = tensors["h.1.attn.c_attn.weight"].float().T
    assert torch.equal(ours.h[1].attn.c_attn.weight, expected)
    with pytest.raises(SystemExit, match="has another sha256 .*: it is deleted, run"):
        prepare.find_weights("gpt2-xl")


def test_a_file_that_would_load_wrong_does_not_load(hugging_face, tmp_path):
    from safetensors.torch import save_file
    good = read_safetensors(hugging_face[1])
    name = "transformer.{}.weight".format
    head, fc = good[name("wte")], good[name("h.1.mlp.c_fc")]
    for change in ({"lm_head.weight": head + 0.1}, {"transformer.extra": torch.ones(2)},
                   {name("wte"): head[:1000].clone()}, {name("wte"): F.pad(head, (0, 0, 0, 47))},
                   {name("wte"): head[:, :100].clone()}, {name("h.1.mlp.c_fc"): F.pad(fc, (0, 8))},
                   {"position_ids": torch.arange(3)}):
        save_file(good | change, tmp_path / "f.safetensors")
        with pytest.raises(SystemExit, match="f.safetensors is not a GPT-2.*: name a ckpt.pt"):
            load_pretrained(tmp_path / "f.safetensors")
    (tmp_path / "text.txt").write_text("Once upon a time")
    with pytest.raises(SystemExit, match="text.txt is not a GPT-2"):
        load_pretrained(tmp_path / "text.txt")
    save_file(good | {"lm_head.weight": head.clone()}, tmp_path / "f")
    assert load_pretrained(tmp_path / "f")[0].config.n_layer == 3


def test_safetensors_are_read_as_their_library_does(tmp_path):
    from safetensors.torch import save_file
    path = tmp_path / "f"
    expected = {"a": torch.randn(3, 4), "c": torch.randn(7).bfloat16(), "d": torch.zeros(0, 3),
                "e": torch.tensor(2.0), "m": torch.ones(3, dtype=torch.uint8)}
    save_file(expected, path)
    torch.testing.assert_close(read_safetensors(path), expected, rtol=0, atol=0)


def test_checkpoints_come_back(tmp_path):
    for variant in VARIANTS:
        model = small(n_loop=3, layout=(1, 3), **variant)
        save_checkpoint(tmp_path / "c.pt", model, step=7, nested={"a": [1.5, "b"]})
        again, state = load_checkpoint(tmp_path / "c.pt")
        assert again.config == model.config and state == {"step": 7, "nested": {"a": [1.5, "b"]}}
        expected = model.float().state_dict()
        torch.testing.assert_close(again.state_dict(), expected, rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)
    torch.save({"config": Malice()}, tmp_path / "c.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "c.pt")
    assert not (tmp_path / "harm").exists()


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, small(), step=1)
    good = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, small(), step=lambda: "breaks off here")
    assert path.read_bytes() == good


def test_a_checkpoint_of_other_code_says_so(tmp_path):
    for weights in (small().state_dict(), torch.ones(2)):     # of something else
        torch.save(weights, tmp_path / "c.pt")
        with pytest.raises(SystemExit, match="is not a checkpoint: name a ckpt.pt"):
            load_checkpoint(tmp_path / "c.pt")
    args = vars(get_args([]))
    without = {name: value for name, value in args.items() if name != "min_lr"}
    for changed, name in ((args | {"mine": 1}, "mine"), (without, "min_lr")):
        save_checkpoint(tmp_path / "ckpt.pt", small(), args=changed)
        with pytest.raises(SystemExit, match=f"of other code, .* in the flags {name}: use that"):
            get_args(["--resume", f"--out_dir={tmp_path}"])


# ---- train.py ----

def test_batches_depend_on_seed_and_step_alone():
    data = np.arange(1000, dtype=np.uint16)
    flags = ["--block_size=8", "--batch_size=2", "--gradient_accumulation_steps=4"]
    args = get_args(flags)
    rows = get_batch(data, args, step=3)
    assert rows.shape == (8, 9) and (rows.diff() == 1).all()
    assert torch.equal(get_batch(data, args, step=3), rows)
    assert not torch.equal(get_batch(data, args, step=4), rows)
    assert not torch.equal(get_batch(data, get_args([*flags, "--seed=1"]), step=3), rows)
    shares = [get_batch(data, args, 3, rank=rank, world=4) for rank in range(4)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), rows)  # four see what one sees
    starts = torch.cat([get_batch(data, args, step)[:, 0] for step in range(2000)])
    assert starts.min() == 0 and starts.max() == 1000 - 8 - 1  # every window can come
    starts = torch.cat([get_batch(data, args, step, stride=9)[:, 0] for step in range(300)])
    assert sorted(set(starts.tolist())) == list(range(0, 1000 - 8, 9))  # documents of 9 tokens


@pytest.mark.parametrize(("count", "hide"), [(1, False), (3, False), (1, True)])
def test_only_the_tokens_of_answers_are_scored(count, hide):
    rows, cpu = some_tokens(4, 18), torch.device("cpu")
    x, y = train.inputs_and_targets(rows, cpu)
    assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:])
    rows[rows == 7] = 8
    rows[:, 3], rows[:2, 9], rows[2:, 15] = 7, 7, 7     # two for each, one of them near the end
    scoring = {"answer_after": chr(7), "answer_length": count, "hide_answers": hide}
    x, y = train.inputs_and_targets(rows, cpu, scoring)
    found = (rows[:, :-1] == 7).nonzero().tolist()
    scored = {(b, t + i) for b, t in found for i in range(count) if t + i < 17}
    assert {tuple(place) for place in (y >= 0).nonzero().tolist()} == scored
    assert torch.equal(y[y >= 0], rows[:, 1:][y >= 0])
    hidden = {(b, t - 1) for b, t in (x != rows[:, :-1]).nonzero().tolist()}
    assert hidden == ({(b, t) for b, t in scored if t < 16} if hide else set())
    model, args = small(n_loop=2, block_size=17), get_args(["--batch_size=1", "--grad_clip=0"])

    def mean_loss(b):
        logits, places = model(x[[b]], n_loop=3)[0], [t for c, t in scored if c == b]
        return sum(F.cross_entropy(logits[t], rows[b, t + 1]) for t in places) / len(places)
    expected = sum(mean_loss(b) for b in range(4)) / 4
    expected.backward()
    wanted = grads(model)
    model.zero_grad()
    loss, _ = train.train_step(model, [], x, y, args, nullcontext(), 3)     # in four parts
    torch.testing.assert_close(loss, expected, check_dtype=False)
    torch.testing.assert_close(grads(model), wanted)


def test_an_answer_is_right_if_all_its_tokens_are():
    class Adds:     # and says 0 for the last digit
        config, eval, train = GPTConfig(n_loop=1), lambda self: None, lambda self: None

        def loop_losses(self, x, y):
            return torch.zeros(1)

        def __call__(self, x):
            said = torch.roll(x, -1, dims=1)
            said[:, 10] = ord("0")
            return F.one_hot(said, 257)
    sums = [text + EOT for text in prepare.make_additions(200)]
    data = np.array(get_tokenizer("byte").encode("".join(sums), allowed_special={EOT}), np.uint16)
    args = get_args(["--block_size=12", "--eval_iters=216", "--batch_size=10"])
    found = train.evaluate(Adds(), data, args, torch.device("cpu"), PUZZLES["addition"]["scoring"])
    starts = np.linspace(0, len(data) - 13, 216).astype(int) // 13
    assert 0 < found["right"] == pytest.approx(np.mean([sums[i][11] == "0" for i in starts]))


@torch.no_grad()
def test_no_answer_of_the_puzzle_moves_a_later_question():
    rows = torch.tensor([[*text.encode()] for text in prepare.make_arrows(1)])
    changed = rows.clone()
    changed[:, 22::3] = ord("z")
    model = small(n_loop=3, vocab_size=257, block_size=68)
    logits = [model(train.inputs_and_targets(r, torch.device("cpu"),
                                             bench.SCORING | {"hide_answers": hide})[0])
              for r in (rows, changed) for hide in (True, False)]
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[1], logits[3])


def test_an_evaluation_does_not_depend_on_the_batch_size():
    data, cpu = some_tokens(16 * 23 + 1).numpy().astype(np.uint16), torch.device("cpu")
    model, widths = small(n_loop=2), set()
    model.h[0].register_forward_pre_hook(lambda block, args: widths.add(args[0].size(0)))
    flags = ["--block_size=16", "--eval_iters=21"]
    starts = np.linspace(0, 16 * 22, 21).astype(int)
    rows = torch.stack([torch.from_numpy(data[i:i + 17].astype(np.int64)) for i in starts])
    expected = model.loop_losses(rows[:, :-1], rows[:, 1:]).tolist()
    for size in (1, 4, 6, 64):
        widths.clear()
        args = get_args([*flags, f"--batch_size={size}"])
        found = train.evaluate(model, data, args, cpu)["loop_losses"]
        assert found == pytest.approx(expected, rel=1e-12)
        assert widths == {size}     # an odd batch would compile anew


def test_the_drawn_depth_depends_on_seed_and_step_alone():
    args = get_args(["--n_loop=6", "--n_loop_min=3"])
    draws = [train.get_n_loop(args, step) for step in range(4000)]
    assert draws == [train.get_n_loop(args, step) for step in range(4000)]
    assert sorted(set(draws)) == [3, 4, 5, 6]
    assert all(abs(draws.count(n) - 1000) < 100 for n in (3, 4, 5, 6))
    other = get_args(["--n_loop=6", "--n_loop_min=3", "--seed=1"])
    assert draws != [train.get_n_loop(other, step) for step in range(4000)]
    assert {train.get_n_loop(get_args(["--n_loop=6"]), step) for step in range(100)} == {6}
    assert train.mean_n_loop(args) == pytest.approx(np.mean(draws), abs=0.1)    # what is charged


def test_the_schedule_warms_up_and_decays():
    args = get_args(["--max_steps=1000", "--warmup_steps=100", "--learning_rate=1"])
    rates = [get_lr(args, step) for step in range(1001)]
    assert (rates[0], rates[49], rates[99], rates[100]) == (0.01, 0.5, 1.0, 1.0)
    assert rates[550] == pytest.approx(0.55) and rates[1000] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[100:], rates[101:], strict=False))
    args.max_steps = 2000   # a resumed run: the added steps keep the rate of the end
    assert get_lr(args, 550) == rates[550] and get_lr(args, 1500) == rates[1000]
    args.min_lr = 0
    assert get_lr(args, 550) == pytest.approx(0.5) and get_lr(args, 1000) == 0


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_muon_is_torch_s_within_the_rounding_of_bfloat16(shape):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    how = dict(lr=0.1, weight_decay=0.2)
    optimizers = [train.Muon([ours], **how),
                  torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **how)]
    for _ in range(5):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        update = ours.detach() - before * (1 - 0.1 * 0.2)
        assert update.square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=0.3)   # AdamW's size
    assert (ours - theirs).norm() < 0.02 * 5 * update.norm()


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
@pytest.mark.parametrize(("residual", "times"), [("gated", 2), ("sum", 2), ("mean", 1)])
def test_every_parameter_has_one_optimizer_its_decay_and_its_rate(optimizer, residual, times):
    model = GPT(GPTConfig(16, 50, 4, 2, 32, n_loop=2, loop_start=1, loop_end=3, residual=residual))
    names = {p: name for name, p in model.named_parameters()}
    found = [(names[p], type(each) is train.Muon, group["weight_decay"], group["lr_scale"])
             for each in train.configure_optimizers(model, get_args([f"--optimizer={optimizer}"]))
             for group in each.param_groups for p in group["params"]]
    expected = []
    for name in names.values():
        layer = name.split(".")[-2] if "." in name else name
        is_matrix = layer in ("wte", "wpe", "c_attn", "c_proj", "c_fc") and "bias" not in name
        by_muon = optimizer == "muon" and is_matrix and name.startswith("h.")
        looped = name.endswith("c_proj.weight") and name[2] in "12"
        expected.append((name, by_muon, 0.1 * is_matrix, 1 / times if looped else 1))
    assert sorted(found) == sorted(expected)
    for i, expected in enumerate((1, times, times, 1)):
        std = model.h[i].mlp.c_proj.weight.std().item()
        assert std == pytest.approx(0.02 / math.sqrt(2 * 4) / expected, rel=0.1)


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
@in_every_variant
def test_a_step_moves_every_parameter(variant, optimizer):
    idx, moved = torch.arange(32).view(2, 16) % 50, []
    for rate in (1e-3, 2e-3, 0):
        model = small(n_loop=3, **variant).train()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients(model, idx)   # each row of each parameter has one
        assert all((g.view(-1, g.size(-1)) != 0).any(-1).all() for g in grads(model))
        args = get_args([f"--optimizer={optimizer}", f"--learning_rate={rate}", "--batch_size=2"])
        model.zero_grad()
        train.train_step(model, train.configure_optimizers(model, args), idx, idx, args,
                         nullcontext())
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, distance in moved[0].items():
        assert distance.any() and not moved[2][name].any()
        torch.testing.assert_close(moved[1][name], 2 * distance)


def test_bfloat16_stays_near_float32_and_sums_the_gradient_of_loops_in_float32():
    """A bfloat16 has 8 bits, so it is off by 2**-9 at most. 24 sums of such must not be rounded."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 257, 1, 4, 128, n_loop=24))
    idx, weight = torch.randint(257, (8, 64)), model.h[0].mlp.c_fc.weight
    ours, _ = train.use_machine(model, get_args(["--dtype=bfloat16"]), torch.device("cpu"))
    losses, gradients = [], []
    for precision in (nullcontext(), ours, torch.autocast("cpu", torch.bfloat16)):
        model.zero_grad()
        with precision:
            losses.append(model(idx, idx))
        losses[-1].backward()
        gradients.append(weight.grad.clone())
    expected, error, error_of_default = (
        (g - gradients[0]).norm() / gradients[0].norm() for g in gradients)
    assert expected == 0 < error < 2 * 2 ** -9 and error < 0.75 * error_of_default
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2 ** -9)


def test_bfloat16_is_chosen_where_processor_and_torch_compute_in_it(monkeypatch):
    for uses, has, expected in [("AVX512", {"avx512_bf16": True}, torch.bfloat16),
                                ("AVX2", {"avx512_bf16": True}, torch.float32),
                                ("AVX512", {}, torch.float32),
                                ("DEFAULT", {"bf16": True}, torch.bfloat16)]:   # ARM
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda uses=uses: uses)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert pick_dtype("auto", torch.device("cpu"), 256) == expected
        assert pick_dtype("auto", torch.device("cpu"), 128) == torch.float32


def test_flags_win_over_presets():
    args = get_args(["--preset=gpt2-81m-loop", "--n_loop", "3", "--no-compile", "--loop_end=4"])
    assert (args.n_layer, args.n_loop, args.loop_end, args.compile) == (6, 3, 4, False)
    assert (args.n_embd, train.get_cost(args, 257)[0]) == (768, 491_520)  # nanoGPT's half a million


TINY = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--n_loop=2", "--n_loop_min=1",
        "--block_size=16", "--batch_size=4", "--max_steps=300", "--warmup_steps=10",
        "--eval_interval=40", "--eval_iters=12", "--log_interval=5", "--dropout=0.1"]


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    lines = "".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(2000))
    (folder / "text.txt").write_text(lines)
    call(prepare, "text.txt", cwd=folder)
    (folder / "binary").write_bytes(b"text, then\0\x01\x02")    # the rest is for MISTAKES
    (folder / "short.txt").write_text("x")
    (folder / "empty").mkdir()
    (folder / "same.txt").write_text(EOT.join(["the same text"] * 150))
    (folder / "other.txt").write_text("other data " * 100)
    call(prepare, "other.txt", "--data_dir=other", cwd=folder)
    shutil.copytree(folder / "other", folder / "torn")
    os.truncate(folder / "torn" / "train.bin", 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUZZLES["addition"], "count", 1000)
        call(prepare, "addition", "--data_dir=sums", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def whole_run(tiny_data):
    """What a run that nobody disturbed printed: {step: its line without times}."""
    return lines_of(call(train, *TINY, "--out_dir=whole", cwd=tiny_data))


def lines_of(out):
    lines = re.sub(r" \| [\d,]+ tokens/s \| .* left", "", out).splitlines()
    return {int(re.match(r"step (\d+)", line)[1]): line for line in lines if line[:4] == "step"}


def test_a_run_learns_and_reports(tiny_data, whole_run):
    log = records(tiny_data / "whole")
    result = log[-1]
    assert [*whole_run] == [record["step"] for record in log] == list(range(0, 301, 5))
    for record in log:  # the same as on the terminal
        line = whole_run[record["step"]]
        for name, key in (("loss", "loss"), ("norm", "norm"), ("val", "val_loss")):
            assert (f" {name} " in line) == (key in record)
            if key in record:
                shown = float(re.search(rf" {name} ([\d.]+)", line)[1])
                assert shown == pytest.approx(record[key], abs=0.00501)
    losses = {record["step"]: record["val_loss"] for record in log if "val_loss" in record}
    assert [*losses] == [*range(0, 300, 40), 300]
    assert abs(losses[0] - math.log(257)) < 0.3  # knows nothing yet
    assert losses[300] == result["loop_losses"][-1] < 2.5 and len(result["loop_losses"]) == 2
    after_each = " ".join(f"{loss:.3f}" for loss in result["loop_losses"])
    assert whole_run[300].endswith(f"after each loop {after_each}")
    model, state = load_checkpoint(tiny_data / "whole" / "ckpt.pt")  # it is what was reported
    _, val_data, _ = load_data(tiny_data / "data")
    rates = {group["lr"] for group in state["optimizers"][0]["param_groups"]}
    assert max(rates) == 2 * min(rates) == pytest.approx(8e-4, rel=1e-3)    # c_proj: half
    found = train.evaluate(model, val_data, get_args(TINY), torch.device("cpu"))
    assert found["loop_losses"] == result["loop_losses"] and state["step"] == 300
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["tokens"] == 300 * 64
    flops = flops_per_token(model.config, 1.5) * 300 * 64
    assert result["flops"] == pytest.approx(flops, rel=0.03) and result["flops_ratio"] == 1
    assert result["gates"] == model.gates.mean(-1).tolist() and model.gates.std() > 0.01


def test_an_interrupted_run_continues_exactly(tiny_data, whole_run):
    resume, lines = ["--resume", "--out_dir=broken"], {}
    for number, at, flags in ((signal.SIGKILL, 45, [*TINY, "--out_dir=broken"]),
                              (signal.SIGINT, 85, resume)):
        process = start("train.py", *flags, cwd=tiny_data)
        for line in process.stdout:
            lines |= lines_of(line)
            if lines and max(lines) >= at:
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=60)
        if number == signal.SIGINT:
            assert process.returncode == 1 and len(err.splitlines()) == 1, err
            assert "python train.py --resume --out_dir=broken" in err
    with open(tiny_data / "broken" / "log.jsonl", "a") as log:
        log.write('{"torn')     # by a full disk
    lines |= lines_of(call(train, *resume, cwd=tiny_data))
    assert lines.items() >= {step: whole_run[step] for step in range(125, 301, 5)}.items()
    # a line that begins a resumed run lacks what the steps before it had
    assert all(whole_run[step].endswith(line.split("|")[-1]) for step, line in lines.items())
    log = (tiny_data / "broken" / "log.jsonl").read_text().splitlines()
    steps = {json.loads(line)["step"] for line in log if line != '{"torn'}
    assert sorted(steps) == list(range(0, 301, 5)) and '{"torn' in log
    (model, state), (other, other_state) = (
        load_checkpoint(tiny_data / name / "ckpt.pt") for name in ("broken", "whole"))
    assert model.config == other.config and state["step"] == other_state["step"] == 300
    for ours, theirs in ((model.state_dict(), other.state_dict()),
                         (state["optimizers"], other_state["optimizers"])):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_second_run_keeps_the_first(tiny_data):
    few, folder = [*TINY, "--max_steps=20", "--out_dir=twice"], tiny_data / "twice"
    assert "earlier run" not in call(train, *few, cwd=tiny_data)
    first = snapshot(folder)
    out = call(train, *few, "--seed=1", cwd=tiny_data)
    assert "twice/ckpt.pt is of an earlier run: it is old-ckpt.pt now\n" in out
    call(train, "--resume", "--out_dir=twice", cwd=tiny_data)
    assert {path.name for path in snapshot(folder)} == {
        "ckpt.pt", "log.jsonl", "old-ckpt.pt", "old-log.jsonl"}
    for path, text in first.items():
        assert (folder / f"old-{path.name}").read_bytes() == text != path.read_bytes()


def test_a_plain_python_is_one_process_and_any_folder_s_name_can_be_shown(tiny_data, monkeypatch):
    for name, value in dict(RANK="", WORLD_SIZE="2", LOCAL_RANK="1", PYTHONIOENCODING="cp1252"
                            ).items():
        monkeypatch.setenv(name, value)
    process = start("prepare.py", "text.txt", "--data_dir=Ω", cwd=tiny_data)
    assert "?/val.bin" in process.communicate(timeout=60)[0]
    result = run(*TINY, "--max_steps=2", "--data_dir=Ω", "--out_dir=plainΩ", cwd=tiny_data)
    assert result["step"] == 2 and (tiny_data / "plainΩ" / "ckpt.pt").exists()


def test_two_processes_train_what_one_does(tiny_data):
    few = [*TINY, "--dropout=0", "--max_steps=40", "--gradient_accumulation_steps=3"]
    alone = call(train, *few, "--out_dir=alone", cwd=tiny_data)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    both = subprocess.run([*launch, HERE / "train.py", *few, "--out_dir=both"], cwd=tiny_data,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, check=True,
                          capture_output=True, timeout=300).stdout
    assert len(both.splitlines()) == len(alone.splitlines())  # only one of them prints
    ours, theirs = records(tiny_data / "alone"), records(tiny_data / "both")
    for record, other in zip(ours, theirs, strict=True):
        assert record.keys() == other.keys() and record["step"] == other["step"]
        for name in {"loss", "norm", "val_loss"} & record.keys():
            assert record[name] == pytest.approx(other[name], rel=1e-3)


def test_a_fork_cannot_train_something_else_in_silence(tiny_data, hugging_face, monkeypatch):
    class Fork(Block):
        def __init__(self, config):
            super().__init__(config)
            self.scales = torch.nn.Parameter(torch.ones(2, config.n_embd))

        def forward(self, x, cache=None):
            return self.scales[0] * super().forward(x, cache)
    few, embed = [*TINY, "--max_steps=2", "--out_dir=fork"], GPT.embed
    monkeypatch.setattr("model.Block", Fork)
    # its parameters start as it made them, are AdamW's, and do not decay
    model = load_pretrained(hugging_face[1])[0]
    assert all((block.scales == 1).all() for block in model.h)
    *_, adamw = train.configure_optimizers(model, get_args([]))
    found = [group["weight_decay"] for group in adamw.param_groups for p in group["params"]
             if any(p is block.scales for block in model.h)]
    assert found == [0.0] * 3
    out = call(train, *few, cwd=tiny_data)
    assert re.search("so AdamW's and without weight decay: .*h.0.scales, h.1.scales\n", out)
    assert "times the FLOPs" not in out
    # a loss at every loop costs more than is stated
    monkeypatch.setattr(GPT, "forward", lambda self, *args: self.loop_losses(*args).mean())
    assert re.search(r"takes 1\.\d\d times the FLOPs", call(train, *few, cwd=tiny_data))
    # a parameter that nothing reaches
    monkeypatch.setattr(GPT, "embed", lambda self, *args: embed(self, *args).detach())
    with pytest.raises(AssertionError, match="the loss does not depend on wpe.weight"):
        run(*few, cwd=tiny_data)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_data):
    flags = [*TINY, "--learning_rate=1e30", "--optimizer=adamw", "--out_dir=diverged"]
    with pytest.raises(SystemExit, match="is not finite .* with a smaller --learning_rate"):
        run(*flags, cwd=tiny_data)
    assert records(tiny_data / "diverged")[-1]["val_loss"] is None
    assert not (tiny_data / "diverged" / "ckpt.pt").exists()


def test_training_starts_from_pretrained_weights(hugging_face, tmp_path):
    theirs, path = hugging_face
    tokens, meta = torch.randint(50257, (5000,)), {"dataset": "noise", "tokenizer": "gpt2"}
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        tokens.numpy().astype(np.uint16).tofile(tmp_path / "data" / f"{split}.bin")
        meta[split] = {"tokens": 5000, "sha256": "of noise"}
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"vocab_size": 50257}))
    flags = [f"--init_from={path}", "--eval_iters=99", "--n_loop=2", "--loop_start=1"]
    x, y = (tokens[i:i + 64 * 77].view(77, 64) for i in (0, 1))
    with torch.no_grad():
        expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    result = run(*flags, "--max_steps=0", cwd=tmp_path)
    assert result["val_loss"] == pytest.approx(expected, rel=1e-2)
    assert result["gates"] == [[1, 0]]
    result = run("--resume", "--max_steps=2", cwd=tmp_path)
    assert result["gates"] != [[1, 0]]
    again = run(f"--init_from={tmp_path}/out/ckpt.pt", "--max_steps=0", "--out_dir=b", flags[1],
                cwd=tmp_path)     # a new training, which starts where the other ended
    assert again["val_loss"] == result["val_loss"] and again["gates"] == result["gates"]
    args = get_args(["--preset=gpt2-81m-loop", flags[0]])       # their layers, our loops
    assert (args.n_layer, args.n_loop) == (theirs.config.n_layer, 6)
    assert (args.optimizer, args.learning_rate) == ("adamw", 3e-5)
    save_checkpoint(tmp_path / "outer.pt", small(residual="outer"))     # no GPT-2, even in one loop
    assert get_args([f"--init_from={tmp_path / 'outer.pt'}"]).residual == "outer"


# ---- sample.py ----

def test_the_whole_way_from_text_to_text(tiny_data, whole_run):
    options = ["--out_dir=whole", "--max_new_tokens=40", "--prompt=7 times "]
    out = call(sample, *options, "--num_samples=3", cwd=tiny_data)
    samples = out.split("-" * 80 + "\n")
    assert len(set(samples)) == 3
    assert all(text.startswith("7 times ") and len(text) > 40 for text in samples)
    assert re.search(r"\d+\.\n\d+", out)  # lines begin and end as those of the data do
    assert call(sample, *options, "--num_samples=3", cwd=tiny_data) == out
    assert call(sample, *options, "--seed=1", cwd=tiny_data) != samples[0]
    model, _ = load_checkpoint(tiny_data / "whole" / "ckpt.pt")
    for n_loop in (1, 2):
        text = call(sample, *options, "--temperature=0", f"--n_loop={n_loop}", cwd=tiny_data)
        idx = torch.tensor([[*b"7 times "]])
        ids = complete(model.eval(), idx, 40, temperature=0, n_loop=n_loop)[0][0].tolist()
        assert text == get_tokenizer("byte").decode(ids) + "\n"
    assert call(sample, "--out_dir=whole", "--max_new_tokens=9", cwd=tiny_data)   # from nothing


def test_any_terminal_can_show_any_text(tiny_data, whole_run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    process = start("sample.py", "--out_dir=whole", "--temperature=9", "--num_samples=100",
                    "--max_new_tokens=200", cwd=tiny_data)     # many a broken byte
    assert "?" in process.stdout.read(500)
    process.stdout.close()  # as head does
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)


def test_the_loops_are_shown(tiny_data, whole_run, capfd):
    command = ["--out_dir=whole", "--prompt=7 times", "--n_loop=4", "--max_new_tokens=100"]
    out = call(sample, *command, "--temperature=0", "--show_loops", cwd=tiny_data)
    text, table = re.fullmatch(r"7 times(.{10})\n\n +loop 1 +loop 2 +loop 3 +loop 4\n(.*)", out,
                               re.DOTALL).groups()  # the context of 16 tokens has 7 of the prompt
    for row, char in zip(table.splitlines(), text, strict=True):
        cells = re.findall(r"('.'|'\\n'|\".\") +\d+%", row)
        assert row.startswith(f"{char!r} ") and len(cells) == 4
        assert cells[-1] == repr(char)  # at temperature 0, what the last loop says is drawn
    call(sample, *command, "--exit_kl=0.01", cwd=tiny_data)
    err = capfd.readouterr().err
    assert re.search(r"\(100 tokens, [\d,]+ per second, [234]\.\d\d loops per token\)", err), err


# ---- bench.py ----

def test_bench_measures_what_its_flags_describe(tmp_path):
    for block_size, n_loop in ((32, 4), (3, 1)):
        flags = [f"--block_size={block_size}", f"--n_loop={n_loop}", "--n_layer=3", "--n_head=2",
                 "--loop_start=1", "--n_embd=32", "--checkpoint_loops"]
        device, limit, head, row = call(bench, "speed", *flags, cwd=tmp_path).splitlines()
        config = GPTConfig(block_size, 257, 3, 2, 32, n_loop=n_loop, loop_start=1)
        assert device.startswith(f"cpu ({torch.backends.cpu.get_cpu_capability()}), ")
        assert limit.startswith("MFU: ") and head.split()[:2] == ["params", "MFLOPs/token"]
        dtype, params, flops, step_ms, rate, mfu, decode, unit = row.split()
        assert dtype == "torch.float32"     # auto, for a model of this width
        assert params == f"{sum(p.numel() for p in GPT(config).parameters()) / 1e6:.2f}M"
        assert flops == f"{flops_per_token(config) / 1e6:.1f}" and 0 <= int(mfu.strip("%")) < 100
        tokens = float(rate.replace(",", "")) * float(step_ms) / 1e3
        assert tokens == pytest.approx(8 * block_size, rel=0.05)
        assert int(decode.replace(",", "")) > 0 and unit == "tokens/s"


@torch.no_grad()
def test_bench_counts_the_right_answers():
    model = small(n_loop=3, vocab_size=257, block_size=68).float()
    model.wte.weight[list(b"opqrst")] *= 5  # its guesses are letters, and often ends
    texts = list(prepare.make_arrows(1000, prepare.TEST_CHAINS, bench.TEST))
    x = torch.tensor([[*re.sub(">.", ">>", text).encode()] for text in texts])
    guesses = torch.stack([logits_by_hand(model, s).argmax(-1) for s in by_hand(model, x, 4)])
    share = np.zeros((2, 4, 10))    # right ones, all
    for text, said in zip(texts, guesses.transpose(0, 1), strict=True):
        for i in range(20, 68, 3):
            end, steps = follow(text, text[i])
            share[0, :, steps] += (said[:, i + 1] == ord(end)).numpy()
            share[1, :, steps] += 1
    expected = share[0] / share[1]
    assert expected.min() > 0.01
    assert np.array(bench.right_answers(model, 4)) == pytest.approx(expected, abs=0.001)
    assert bench.loops_to_settle(model, exit_kl=math.inf) == [2] * 10
    assert bench.loops_to_settle(model, exit_kl=0) == [12] * 10
    for text in texts[:2]:
        shown, way, said = bench.walk(model, text, n_loop=4)
        assert shown == text[:20] and follow(text, way[0]) == (way[-1], 9) and len(way) == 10
        assert all(text[ord(a) - 97] == b for a, b in itertools.pairwise(way))
        states = by_hand(model, torch.tensor([[*f"{shown}{way[0]}>".encode()]]), 4)
        assert said == [chr(logits_by_hand(model, state)[0, -1].argmax()) for state in states]


def test_the_puzzle_is_prepared_trained_and_shown(tmp_path, monkeypatch):
    monkeypatch.setitem(PUZZLES["arrows"], "count", 1000)
    assert "data-arrows/val.bin" in call(prepare, "arrows", cwd=tmp_path)
    flags = ["--preset=arrows", "--max_steps=20", "--eval_iters=32", "--n_embd=16"]
    call(train, *flags, cwd=tmp_path)
    log = records(tmp_path / "out-arrows")
    assert [record["step"] for record in log] == list(range(21))    # twenty lines at least
    assert len(log[-1]["loop_losses"]) == PRESETS["arrows"]["n_loop"] and log[-1]["right"] < 0.5
    # in the other folder there is none, so it takes the one that comes with the code
    for cwd, folder, whose in ((tmp_path, tmp_path / "out-arrows", "in out-arrows\n"),
                               (tmp_path / "data-arrows", tmp_path / "data-arrows", "that comes")):
        out = call(bench, "loops", cwd=cwd)
        assert out.startswith(f"the model {whose}") and "loops that --exit_kl=0.01 takes" in out
        assert (folder / "loops.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / "walk.gif").read_bytes().startswith(b"GIF89a")
        right = {int(n): [float(share) for share in shares.split()]
                 for n, shares in re.findall(r"^after loop (\d+) +(.*)$", out, re.MULTILINE)}
        assert [*right] == list(range(1, 21)) and {len(shares) for shares in right.values()} == {10}
    assert min(right[12] + right[20]) > 98
    loops = [float(number) for number in out.split("of 12:\n")[1].split("\n")[0].split()]
    assert loops[0] == 2 and loops == sorted(loops) and 11.5 < loops[9] < 12
    prompt = "--prompt=bfdehgjiklmpnosqrtst"
    for letter, end in (("a", "t"), ("c", "s"), ("t", "t")):
        out = call(sample, f"--out_dir={bench.SHIPPED}", "--n_loop=12", "--exit_kl=0.01",
                   "--temperature=0", "--max_new_tokens=1", f"{prompt}{letter}>", cwd=tmp_path)
        assert out == f"{prompt[9:]}{letter}>{end}\n"


@torch.no_grad()
def test_a_walk_is_drawn_with_its_slips():
    from matplotlib.figure import Figure
    from matplotlib.patches import Arc
    axes, points_to = Figure().subplots(), prepare.read_map("bfdehgjiklmpnosqrtst")
    bench.draw_walk(axes, points_to, [*"abf"], [*"abl"])    # l is a slip, so no arrow leads there
    arcs = [patch for patch in axes.patches if isinstance(patch, Arc)]
    blue = [patch for patch in arcs if patch.get_linewidth() == 4]
    assert len(arcs) == 20 and [(arc.center[0], arc.width) for arc in blue] == [(0.5, 1)]
    assert "after loop 3 the model says l" in [text.get_text() for text in axes.texts]


# ---- the messages that a user of the README can meet ----

MISTAKES = [
    (prepare, "nowhere", "neither a file nor a folder nor one of pystdlib"),
    (prepare, "binary", "zero byte at 10"),
    (prepare, "short.txt", "too little text for train.bin"),
    (prepare, "empty", "too little text"),
    (prepare, "same.txt", "too little text for val.bin"),
    (prepare, "--data_dir=text.txt/x", "text.txt/x cannot be made (Not a directory)"),
    (prepare, "text.txt --shards=3", "--shards is for openwebtext"),
    (prepare, "shakespeare", "without a network use python prepare.py"),
    (prepare, "openwebtext", "python prepare.py --tokenizer=byte"),
    (prepare, "arrows --tokenizer=gpt2", "a puzzle of bytes: leave out --tokenizer"),
    (train, "--n_lop=6", "unrecognized arguments: --n_lop=6"),
    (train, "--n_loop=0", "invalid positive value: '0'"),
    (train, "--learning_rate=nan", "invalid not_negative value"),
    (train, "--seed=99999999999999999999", "invalid whole value"),
    (train, "--loop_start=1", "loop_start=1"),
    (train, "--out_dir=text.txt", "text.txt cannot be made (File exists): name another folder"),
    (train, "--n_embd=30 --n_head=4", "n_embd=30 must be a multiple of n_head=4"),
    (train, "--dropout=1", "dropout=1.0"),
    (train, "--n_loop=2 --n_loop_min=3", "--n_loop_min=3 must not be above --n_loop=2"),
    (train, "--data_dir=none", "no data in none: run python prepare.py --data_dir=none"),
    (train, "--data_dir=torn", "python prepare.py other.txt --tokenizer=byte --data_dir=torn"),
    (train, "--preset=arrows", "no data in data-arrows: run python prepare.py arrows"),
    (train, "--data_dir=data-addition/", "python prepare.py addition --data_dir=data-addition/"),
    (train, "--data_dir=sums", "cuts the documents of sums in two: use --block_size=12"),
    (train, "--block_size=99999999", "use a smaller --block_size"),
    (train, "--preset=gpt2-45m --block_size=16", "data has 257 byte tokens, the model 50257"),
    (train, "--init_from=nowhere", "no file nowhere"),
    (train, "--init_from=text.txt", "text.txt is not a GPT-2"),
    (train, "--init_from=whole/ckpt.pt --n_loop=3", "--n_loop=3 does not fit"),
    (train, "--init_from=whole/ckpt.pt --block_size=17", "--block_size=17 is above 16"),
    (train, "--device=quantum", "--device=quantum does not work here: use --device=cpu"),
    (train, "--resume", "no checkpoint out/ckpt.pt: train one with python train.py --out_dir=out"),
    (train, "--resume --out_dir=whole --n_embd=32", "--n_embd=32 does not fit"),
    (train, "--resume --out_dir=whole --learning_rate=1", "--learning_rate=1.0 does not fit"),
    (train, "--resume --out_dir=whole --max_steps=1", "300 steps: give more --max_steps"),
    (train, "--resume --out_dir=whole --data_dir=other", "not the data of the checkpoint"),
    (sample, "--out_dir=whole --prompt=xxxxxxxxxxxxxxxxx", "17 tokens, the model sees 16"),
    (sample, "--exit_kl=1 --show_loops", "leave out --exit_kl"),
    (bench, "nonsense", "has no command nonsense"),
    (bench, "loops --out_dir=whole", "was not trained by --preset=arrows"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[1])
def test_a_mistake_ends_in_one_line(mistake, tiny_data, whole_run, tmp_path, monkeypatch, capsys):
    script, flags, message = mistake
    monkeypatch.chdir(tiny_data)
    monkeypatch.setattr(prepare.tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))     # no vocabulary, and
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy"):                 # no network
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    before = snapshot(tiny_data)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
    with pytest.raises(SystemExit) as caught:
        script.main()
    code, err = caught.value.code, capsys.readouterr().err
    lines = (code if isinstance(code, str) else err).strip().splitlines()
    assert code not in (0, None) and len(lines) == 1 and message in lines[0], lines
    after = snapshot(tiny_data)
    assert {path: after[path] for path in before} == before
