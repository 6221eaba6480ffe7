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
import torch
import urllib3
from torch.nn import functional as F

import bench
import prepare
import sample
import train
from model import GPT, LOOP_ORDERS, RESIDUALS, GPTConfig, flops_per_token, generate, sample_token
from model import from_pretrained, load_checkpoint, read_gpt2, read_safetensors, save_checkpoint
from prepare import EOT, get_tokenizer, load_data
from train import PRESETS, get_batch, get_lr

torch.set_num_threads(1)  # as in the runs below: one core is fastest for models this small
HERE = Path(__file__).parent
LAYOUTS = [(0, None), (0, 2), (1, 2), (1, 3)]  # loop_start, loop_end of three blocks
VARIANTS = [*({"residual": residual} for residual in RESIDUALS), {"loop_order": "block"}]
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)
in_every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "".join(v.values()))


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
    return torch.cat([idx, *generate(model, idx, count, **options)], dim=1)


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
    byte = get_tokenizer("byte")
    for text in (any_text(seed, 2000) for seed in range(20)):
        ids = byte.encode(text, allowed_special={EOT})
        assert byte.decode(ids) == text and ids.count(256) == text.count(EOT)
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
        assert meta[split] == {"tokens": len(data), "bytes": len(text.replace(EOT, "").encode()),
                               "sha256": hashlib.sha256(data.tobytes()).hexdigest()}
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


def test_the_python_library_is_found_without_what_pip_installed():
    files = prepare.find_files("pystdlib")
    assert len(files) == len(set(files)) > 300 and all(path.suffix == ".py" for path in files)
    assert not any({"site-packages", "test"} & {*path.parts} for path in files)


def follow(text, letter, steps=0):
    """The end to which the arrows of a puzzle lead from a letter, and the number of steps."""
    target = text[ord(letter) - ord("a")]
    return (letter, steps) if target == letter else follow(text, target, steps + 1)


@pytest.mark.parametrize("chains", [None, 4, 2])
def test_arrows_lead_to_the_answers(chains):
    documents, seen = list(prepare.make_arrows(300, chains)), []
    assert documents == list(prepare.make_arrows(300, chains)) and len(set(documents)) == 300
    assert documents != list(prepare.make_arrows(300, chains, seed=1))
    for text in documents:
        ends, steps = zip(*(follow(text, letter) for letter in "abcdefghijklmnopqrst"), strict=True)
        assert len(set(ends)) == (chains or 5) and max(steps) <= (9 if chains == 2 else 4)
        if chains:
            assert sorted(steps) == sorted([*range(20 // chains)] * chains)
        questions = [text[i:i + 3] for i in range(20, 68, 3)]
        assert len(text) == 68 and len(questions) == 16
        for letter, arrow, answer in questions:
            end, steps = follow(text, letter)
            assert (arrow, answer) == (">", end)
            seen.append(steps)
    assert sorted(set(seen)) == list(range(10 if chains == 2 else 5))
    assert seen.count(0) / len(seen) == pytest.approx((chains or 5) / 20, abs=0.03)
    x = torch.tensor([list(text.encode()) for text in documents])
    assert bench.steps_to_answer(x).flatten().tolist() == seen


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
    monkeypatch.setattr(urllib3.util.Retry, "sleep", lambda self, response=None: None)
    Server.files, Server.script, Server.requests = {}, [], []
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloads_survive_what_networks_do(served):
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
    for have in (cut, len(body)):  # as if it had been stopped there
        part = path.rename(f"{path}.part")
        os.truncate(part, have)
        Server.requests = []
        assert prepare.download(f"{served}/f{i}").read_bytes() == body
        assert Server.requests == [have] and not part.exists()


def test_downloads_that_cannot_be_had_say_so(served):
    Server.files = {"f": b"something else"}
    sha256 = hashlib.sha256(b"something").hexdigest()
    for script, message, tries in [([404], "HTTPError", 1), ([500] * 9, "RetryError", 7),
                                   (["fine"], "has the sha256", 1)]:
        Server.script, Server.requests = list(script), []
        with pytest.raises(SystemExit, match=message + ".*: use another"):
            prepare.download(f"{served}/f", sha256, "use another")
        assert len(Server.requests) == tries
    with pytest.raises(SystemExit, match="ConnectionError"):
        prepare.download("http://127.0.0.1:9/f", sha256)  # nobody listens there
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

def by_hand(model, idx, n_loop, depths=None):
    """The states (B, T, C) after each loop, written out from the paper's equation.

    With depths (T,), position t leaves after loop depths[t]. From then on its state stays, and it
    shows the other positions what it showed them in its last loop.
    """
    c, shown, states = model.config, {}, []
    depths = torch.tensor(depths or [n_loop] * idx.size(1))[:, None]

    def stack(x, blocks, n=0):
        for i in blocks:
            x = shown[i] = torch.where(depths > n, x, shown.get(i, x))
            x = model.h[i](x)   # its equal is the block of Hugging Face, below
        return x

    x = stack(model.wte.weight[idx] + model.wpe.weight[:idx.size(1)], range(c.loop_start))
    groups = [range(c.loop_start, c.loop_end)]
    if c.loop_order == "block":
        groups = [[i] for i in groups[0]]
    for g, group in enumerate(groups):
        for n in range(n_loop):
            gone = n if g == len(groups) - 1 else 0     # only in the last group can they leave
            y = stack(x, group, gone)
            if c.residual == "gated" and c.n_loop > 1:
                y = x + model.gates[g, min(n, c.n_loop - 1)] * (y - x)
            y = {"mean": x + (y - x) / n_loop, "outer": x + y}.get(c.residual, y)
            x = torch.where(depths > gone, y, x)
            states.append(x)
    return states[-n_loop:]     # those of the last group


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
        logits, loss = model(idx, targets, n_loop=depth)
        torch.testing.assert_close(logits, expected[-1])
        torch.testing.assert_close(loss, losses[-1])
        torch.testing.assert_close(model.loop_losses(idx, targets, depth), torch.stack(losses))
        last, none = model(idx, n_loop=depth)
        torch.testing.assert_close(last, logits[:, -1:])
        assert none is None
        guess, probability = sample.best_guesses(model, F.pad(idx[:1], (0, 1)), depth)
        p = torch.stack(expected)[:, 0].softmax(-1)
        assert torch.equal(guess, p.argmax(-1))
        torch.testing.assert_close(probability, p.max(-1).values.float())
    assert torch.equal(model(idx, targets)[0], model(idx, targets, n_loop=3)[0])


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
        sizes = [sum(p.numel() for p in GPT(train.get_config(get_args([f"--preset={name}"]), 50257)
                                            ).parameters()) for name in list(PRESETS)[:4]]
    assert [round(size / 1e6, 1) for size in sizes] == [124.3, 81.9, 46.5, 46.5]  # 124M 81M 45M 45M


@in_every_variant
@in_every_layout
def test_cached_generation_is_uncached_generation(variant, layout):
    model, prompt = small(n_loop=3, layout=layout, **variant), some_tokens(2, 5)
    for n_loop in (None, 1, 5):
        expected = prompt
        for _ in range(30):  # far beyond block_size=16
            logits = model(expected[:, -16:], n_loop=n_loop)[0][:, -1]
            expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(complete(model, prompt, 30, temperature=0, n_loop=n_loop), expected)


def test_a_cached_token_costs_one_position_in_each_loop_it_takes():
    model, widths = small(n_loop=4), []
    model.h[0].register_forward_pre_hook(lambda block, args: widths.append(args[0].size(1)))
    exit_early = partial(sample.exit_early, model, math.inf, [])
    for forward, loops in ((None, 4), (exit_early, 2)):
        widths.clear()
        complete(model, torch.zeros(1, 5, dtype=torch.long), 14, forward=forward)
        assert widths == [5] * 4 + [1] * 11 * loops + [16] * 8  # the prompt, .., the sliding window


def test_sampling_follows_the_model_s_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 50) * 2
    assert sample_token(logits, 1e-40).item() == logits.argmax()    # no overflow
    for temperature, top_k in [(1.0, None), (0.5, None), (1.0, 5), (1.0, 1)]:
        drawn = sample_token(logits.expand(20_000, 50), temperature, top_k)
        share = drawn.flatten().bincount(minlength=50) / 20_000
        expected = logits[0] / temperature
        if top_k:
            expected = expected.masked_fill(expected < expected.topk(top_k).values[-1], -math.inf)
        assert (share - expected.softmax(-1)).abs().max() < 0.015


@in_every_layout
@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
def test_flops_per_token_are_those_that_torch_counts(layout, loop_order):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, idx = small(n_loop=4, layout=layout, loop_order=loop_order).float(), some_tokens(2, 16)
    for n_loop in (1, 4):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(idx, idx, n_loop=n_loop)[1].backward()
        assert counter.get_total_flops() / 32 == flops_per_token(model.config, n_loop)


def grads(model):
    return [p.grad for p in model.parameters()]


def gradients(model, idx, **how):
    torch.manual_seed(2)  # for dropout
    model.zero_grad()
    model(idx, idx, **how)[1].backward()
    return grads(model)


@in_every_variant
def test_one_compiled_block_serves_all_at_any_depth(variant):
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter = CompileCounter()
    plain, compiled = (small(n_layer=4, loop_start=1, loop_end=3, n_loop=3, **variant)
                       for _ in range(2))
    train.compile_blocks(compiled, backend=counter)
    idx = some_tokens(2, 16)
    gradients(compiled, idx)
    count = counter.frame_count
    for n_loop in (3, 1, 2, 6):
        expected = gradients(plain, idx, n_loop=n_loop)
        torch.testing.assert_close(gradients(compiled, idx, n_loop=n_loop), expected)
    assert counter.frame_count == count > 0


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
def test_gpt2_equals_hugging_face_and_one_loop_is_gpt2_bit_for_bit(hugging_face):
    theirs, path = hugging_face
    idx = torch.randint(300, (2, 64))
    expected, gpt2 = theirs(idx).logits, from_pretrained(*read_gpt2(path))(idx, idx)[0]
    assert (gpt2 - expected).abs().max() < 1e-4
    for (start, end), variant in itertools.product(LAYOUTS, VARIANTS):
        one, five = (from_pretrained(*read_gpt2(path), n_loop=n, loop_start=start, loop_end=end,
                                     **variant) for n in (1, 5))
        # outer adds the embedding twice
        assert torch.equal(one(idx, idx)[0], gpt2) == (one.config.residual != "outer")
        # with gates, all loops leave it GPT-2 exactly, until they learn
        assert torch.equal(five(idx, idx)[0], gpt2) == (five.gates is not None)
    short = from_pretrained(*read_gpt2(path), block_size=10)
    assert (short(idx[:, :10], idx[:, :10])[0] - expected[:, :10]).abs().max() < 1e-4


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
    ours = from_pretrained(*read_gpt2(prepare.find_gpt2("gpt2")))
    expected = tensors["h.1.attn.c_attn.weight"].float().T
    assert torch.equal(ours.h[1].attn.c_attn.weight, expected)
    with pytest.raises(SystemExit, match="has the sha256 .* without a network name a model"):
        prepare.find_gpt2("gpt2-xl")


def test_a_file_that_would_load_wrong_does_not_load(hugging_face, tmp_path):
    from safetensors.torch import save_file
    good = read_safetensors(hugging_face[1])
    head = good["transformer.wte.weight"]
    for change, error, message in [
            ({"lm_head.weight": head + 0.1}, SystemExit, "lm_head.weight other than wte.weight"),
            ({"transformer.extra": torch.ones(2)}, RuntimeError, "extra"),
            ({"lm_head.weight": head.clone()}, None, None)]:
        save_file(good | change, tmp_path / "f")
        with pytest.raises(error, match=message) if error else nullcontext():
            assert from_pretrained(*read_gpt2(tmp_path / "f")).config.n_layer == 3


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


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, replace, busy = tmp_path / "c.pt", os.replace, [1, 1]
    save_checkpoint(path, small(), step=1)
    good = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, small(), step=lambda: "breaks off here")
    assert path.read_bytes() == good

    def windows(source, target):
        if busy:  # another process reads the target
            raise PermissionError(busy.pop())
        replace(source, target)
    monkeypatch.setattr(os, "replace", windows)
    save_checkpoint(path, small(), step=3)
    assert load_checkpoint(path)[1]["step"] == 3 and not busy


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
    shares = [get_batch(data, args, 3, rank, world=4) for rank in range(4)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), rows)  # four see what one sees
    starts = torch.cat([get_batch(data, args, step)[:, 0] for step in range(2000)])
    assert starts.min() == 0 and starts.max() == 1000 - 8 - 1  # every window can come
    strided = get_args([*flags, "--stride=9"])  # documents of 9 tokens
    starts = torch.cat([get_batch(data, strided, step)[:, 0] for step in range(300)])
    assert sorted(set(starts.tolist())) == list(range(0, 1000 - 8, 9))


def test_only_the_tokens_after_a_given_one_are_scored():
    rows, cpu = some_tokens(4, 17), torch.device("cpu")
    x, y = train.inputs_and_targets(rows, None, cpu)
    assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:])
    rows[:, 3], rows[2:, 9] = 7, 7
    x, y = train.inputs_and_targets(rows, 7, cpu)
    scored = (x == 7).nonzero().tolist()
    assert (y >= 0).nonzero().tolist() == scored and len(scored) >= 6
    model, args = small(n_loop=2), get_args(["--batch_size=1", "--grad_clip=0"])

    def mean_loss(n_loop):
        logits = model(rows[:, :-1], rows[:, 1:], n_loop=n_loop)[0]
        return sum(F.cross_entropy(logits[b, t], rows[b, t + 1]) for b, t in scored) / len(scored)
    expected = mean_loss(3)
    expected.backward()
    wanted = grads(model)
    model.zero_grad()
    loss, _ = train.train_step(model, [], x, y, args, nullcontext(), 3)     # in four unequal parts
    torch.testing.assert_close(loss, expected, check_dtype=False)
    torch.testing.assert_close(grads(model), wanted)
    data = rows.flatten().numpy().astype(np.uint16)
    args = get_args(["--block_size=16", "--stride=17", "--batch_size=3"])
    losses = [mean_loss(1).item(), mean_loss(2).item()]
    assert train.evaluate(model, data, args, 7, cpu) == pytest.approx(losses)


def test_the_drawn_depth_depends_on_seed_and_step_alone():
    args = get_args(["--n_loop=6", "--n_loop_min=3"])
    draws = [train.get_n_loop(args, step) for step in range(4000)]
    assert draws == [train.get_n_loop(args, step) for step in range(4000)]
    assert sorted(set(draws)) == [3, 4, 5, 6]
    assert all(abs(draws.count(n) - 1000) < 100 for n in (3, 4, 5, 6))
    other = get_args(["--n_loop=6", "--n_loop_min=3", "--seed=1"])
    assert draws != [train.get_n_loop(other, step) for step in range(4000)]
    assert {train.get_n_loop(get_args(["--n_loop=6"]), step) for step in range(100)} == {6}


def test_the_schedule_warms_up_and_decays():
    args = get_args(["--max_steps=1000", "--warmup_steps=100", "--learning_rate=1"])
    rates = [get_lr(args, step) for step in range(1001)]
    assert (rates[0], rates[49], rates[99], rates[100]) == (0.01, 0.5, 1.0, 1.0)
    assert rates[550] == pytest.approx(0.55) and rates[1000] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[100:], rates[101:], strict=False))


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
    model = GPT(GPTConfig(16, 50, 2, 2, 32, n_loop=2, residual=residual))
    names = {p: name for name, p in model.named_parameters()}
    found = [(names[p], type(each) is train.Muon, group["weight_decay"], group.get("lr_scale", 1))
             for each in train.configure_optimizers(model, get_args([f"--optimizer={optimizer}"]))
             for group in each.param_groups for p in group["params"]]
    expected = []
    for p, name in names.items():
        is_matrix = p.dim() == 2    # gates have three
        by_muon = optimizer == "muon" and is_matrix and name.startswith("h.")
        rate = 1 / times if name.endswith("c_proj.weight") else 1
        expected.append((name, by_muon, 0.1 * is_matrix, rate))
    assert sorted(found) == sorted(expected)
    gpt2_std = 0.02 / math.sqrt(2 * 2)
    assert model.h[1].mlp.c_proj.weight.std().item() == pytest.approx(gpt2_std / times, rel=0.1)


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
    (folder / "binary").write_bytes(b"text, then\0\x01\x02")    # the rest is for MISTAKES
    (folder / "short.txt").write_text("x")
    (folder / "empty").mkdir()
    (folder / "other.txt").write_text("other data " * 100)
    finish("prepare.py", "other.txt", "--data_dir=other", cwd=folder)
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
    rates = [group["lr"] for group in state["optimizers"][0]["param_groups"]]
    assert rates[1] == rates[0] / 2     # of c_proj: n_loop is 2
    losses = train.evaluate(model, val_data, get_args(TINY), None, torch.device("cpu"))
    assert losses == result["loop_losses"] and state["step"] == 300
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["flops"] == flops_per_token(model.config, 1.5) * 300 * 64
    assert result["gates"] == model.gates.mean(-1).tolist() and model.gates.std() > 0.01


def test_an_interrupted_run_continues_exactly(tiny_data, whole_run):
    resume, lines = ["train.py", "--resume", "--out_dir=broken"], {}
    ends = [(signal.SIGKILL, 45), (signal.SIGINT, 60), (signal.SIGKILL, 145), (signal.SIGINT, 200)]
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
            assert process.returncode == 1 and len(err.splitlines()) == 1, err
            assert "python train.py --resume --out_dir=broken" in err
    lines |= lines_of(finish(*resume, cwd=tiny_data))
    assert lines.items() >= {step: whole_run[0][step] for step in range(205, 301, 5)}.items()
    # a line that begins a resumed run lacks what the steps before it had
    assert all(whole_run[0][step].endswith(line.split("|")[-1]) for step, line in lines.items())
    (model, state), (other, other_state) = (
        load_checkpoint(tiny_data / name / "ckpt.pt") for name in ("broken", "whole"))
    assert model.config == other.config and state["step"] == other_state["step"] == 300
    for ours, theirs in ((model.state_dict(), other.state_dict()),
                         (state["optimizers"], other_state["optimizers"])):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_second_run_keeps_the_first(tiny_data):
    few = [*TINY, "--max_steps=20", "--out_dir=twice"]
    path, old = tiny_data / "twice" / "ckpt.pt", tiny_data / "twice" / "ckpt.old.pt"
    assert "earlier run" not in finish("train.py", *few, cwd=tiny_data)
    first = path.read_bytes()
    out = finish("train.py", *few, "--seed=1", cwd=tiny_data)
    assert "twice/ckpt.pt was there from an earlier run: it is twice/ckpt.old.pt now\n" in out
    assert old.read_bytes() == first and path.read_bytes() != first
    finish("train.py", "--resume", "--out_dir=twice", cwd=tiny_data)
    assert old.read_bytes() == first


def test_target_flops_set_the_steps(tiny_data):
    flags = [*TINY, "--n_loop=3", "--n_loop_min=3", "--out_dir=budget"]
    result = result_of(*flags, "--target_flops=1e8", cwd=tiny_data)
    step_flops = result["flops"] / result["step"]
    assert abs(result["flops"] - 1e8) <= step_flops / 2 and result["step"] > 5
    longer = result_of("--resume", "--out_dir=budget", f"--max_steps={result['step'] + 2}",
                       cwd=tiny_data)
    assert longer["step"] == result["step"] + 2


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
    process = start("train.py", *flags, cwd=tiny_data)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "smaller --learning_rate" in err and len(err.splitlines()) == 1
    assert json.loads(out.splitlines()[-1])["val_loss"] is None
    assert not (tiny_data / "diverged" / "ckpt.pt").exists()


def test_training_starts_from_pretrained_weights(hugging_face, tmp_path):
    theirs, path = hugging_face
    tokens, meta = torch.randint(300, (5000,)), {"dataset": "noise", "tokenizer": "gpt2"}
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        tokens.numpy().astype(np.uint16).tofile(tmp_path / "data" / f"{split}.bin")
        meta[split] = {"tokens": 5000, "bytes": 20000, "sha256": "of noise"}
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"vocab_size": 300}))
    flags = [f"--init_from={path}", "--eval_iters=99", "--n_loop=2", "--loop_start=1"]
    x, y = (tokens[i:i + 64 * 77].view(77, 64) for i in (0, 1))
    with torch.no_grad():
        expected = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    result = result_of(*flags, "--max_steps=0", cwd=tmp_path)
    assert result["val_loss"] == pytest.approx(expected, rel=1e-2)
    assert result["gates"] == [[1, 0]]
    result = result_of("--resume", "--max_steps=2", cwd=tmp_path)
    assert result["params"] == sum(p.numel() for p in theirs.parameters()) + 2 * 128
    assert result["gates"] != [[1, 0]]


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


def test_any_terminal_can_show_any_text(tiny_data, whole_run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    command = ["--out_dir=whole", "--temperature=9", "--max_new_tokens=200"]   # many a broken byte
    assert "?" in finish("sample.py", *command, cwd=tiny_data)
    process = start("sample.py", *command, "--num_samples=100", cwd=tiny_data)
    process.stdout.read(10)
    process.stdout.close()  # as head does
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)


def exit_by_hand(model, idx, depths, n_loop, exit_kl):
    """Without a cache: the logits (V,) after idx (1, T), and the loops of its last position.

    depths (T - 1) are those of the positions before it.
    """
    states, before = by_hand(model, idx, n_loop, [*depths, n_loop]), None
    for n, x in enumerate(states, start=1):
        x = torch.cat((states[-1][:, :-1], x[:, -1:]), dim=1)   # the last position as after loop n
        logits = logits_by_hand(model, x)[0, -1]
        p = logits.softmax(-1)
        if n == n_loop or (n > 1 and (p * (p / before).log()).sum() < exit_kl):
            return logits, n
        before = p


@torch.no_grad()
@in_every_variant
@in_every_layout
def test_a_token_that_exits_early_is_as_without_a_cache(variant, layout):
    model, prompt = small(n_loop=4, layout=layout, **variant), some_tokens(1, 4)
    p = torch.stack([model.predict(x, prompt)[0].log_softmax(-1) for x in model.states(prompt)])
    kl = F.kl_div(p[:-1], p[1:], reduction="none", log_target=True).sum(-1)
    middle = kl[1].median().item()  # of loop 3 from loop 2
    for n_loop, exit_kl in [(None, middle), (6, middle), (2, math.inf), (1, math.inf), (4, 0.0)]:
        N, taken = n_loop or 4, []
        forward = partial(sample.exit_early, model, exit_kl, taken)
        idx = complete(model, prompt, 13, temperature=0, n_loop=n_loop, forward=forward)
        expected, depths = prompt, [N] * 3
        for t in range(13):
            kl_here = exit_kl if t else -math.inf  # the prompt takes all loops
            logits, n = exit_by_hand(model, expected, depths, N, kl_here)
            depths.append(n)
            expected = torch.cat((expected, logits.argmax()[None, None]), dim=1)
        assert torch.equal(idx, expected) and taken == depths[3:]


def test_the_loops_are_shown(tiny_data, whole_run):
    command = ["--out_dir=whole", "--prompt=7 times", "--n_loop=4", "--max_new_tokens=100"]
    lines = finish("sample.py", *command, "--show_loops", cwd=tiny_data).splitlines()
    lines = lines[-18:]  # a context of 16, one guess for each
    assert "loop 4" in lines[0] and lines[1].startswith("' ' ")
    assert re.fullmatch(r"guesses equal to the last loop's, of 16, by loop: (\d+ ){3}16", lines[-1])
    assert all(len(re.findall(r" +\d+%", line)) == 4 for line in lines[1:-1])
    process = start("sample.py", *command, "--exit_kl=0.01", cwd=tiny_data)
    _, err = process.communicate(timeout=60)
    assert re.search(r"\(100 tokens, [\d,]+ per second, [234]\.\d\d loops per token\)", err), err


# ---- bench.py ----

def test_bench_measures_what_its_flags_describe(tmp_path):
    flags = ["--n_layer=3", "--loop_start=1", "--n_loop=4", "--n_head=2", "--n_embd=32",
             "--block_size=32", "--checkpoint_loops"]
    out = finish("bench.py", "speed", *flags, cwd=tmp_path)
    config = GPTConfig(32, 257, 3, 2, 32, n_loop=4, loop_start=1)
    head, row, device = out.splitlines()
    assert head.split()[:2] == ["params", "MFLOPs/token"] and device.startswith("device: ")
    params, flops, start_s, step_ms, rate, mfu, memory, decode = row.split()[2:]
    assert params == f"{sum(p.numel() for p in GPT(config).parameters()) / 1e6:.2f}M"
    assert flops == f"{flops_per_token(config) / 1e6:.1f}" and mfu == "-"
    assert float(rate.replace(",", "")) * float(step_ms) / 1e3 == pytest.approx(8 * 32, rel=0.05)
    assert float(start_s.strip("s")) * 1e3 > float(step_ms) > 0 and int(memory[:-2]) >= 0
    assert int(decode.removesuffix("/s").replace(",", "")) > 0


@torch.no_grad()
def test_bench_counts_the_right_answers():
    model = small(n_loop=3, vocab_size=257, block_size=68).float()
    model.wte.weight[list(b"abcdefghijklmnopqrst")] *= 5    # its guesses are letters
    expected = []
    for chains, numbers in ((4, range(5)), (2, range(5, 10))):
        x = torch.tensor([[*text.encode()] for text in prepare.make_arrows(1000, chains, seed=1)])
        guesses = torch.stack([logits_by_hand(model, s).argmax(-1) for s in by_hand(model, x, 4)])
        right = (guesses[:, :, :-1] == x[:, 1:])[:, x[:, :-1] == ord(">")].view(4, 1000, 16)
        steps = bench.steps_to_answer(x)    # see test_arrows_lead_to_the_answers
        expected += [right[:, steps == number].double().mean(-1) for number in numbers]
    expected = torch.stack(expected, dim=1).numpy()
    assert expected.min() > 0.01
    assert np.array(bench.right_answers(model, 4)) == pytest.approx(expected, abs=0.001)
    assert bench.loops_to_settle(model, exit_kl=math.inf) == [2] * 5
    assert bench.loops_to_settle(model, exit_kl=0) == [3] * 5


def test_the_puzzle_is_prepared_trained_and_shown(tmp_path):
    out = finish("prepare.py", "arrows", cwd=tmp_path)
    assert "data-arrows/val.bin" in out
    flags = ["--preset=arrows", "--max_steps=20", "--eval_iters=2", "--n_embd=16"]
    assert len(result_of(*flags, cwd=tmp_path)["loop_losses"]) == 6
    lines = finish("bench.py", "loops", "--out_dir=out-arrows", cwd=tmp_path).splitlines()
    assert [line.split()[2] for line in lines[2:18]] == [f"{n}" for n in range(1, 17)]
    assert len(lines[17].split()) == 13 and "--exit_kl" in lines[18]
    picture = tmp_path / "out-arrows" / "loops.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_compare_goes_on_where_it_was_stopped(tiny_data, tmp_path):
    shared = ["--max_steps=30", f"--data_dir={tiny_data / 'data'}", "--block_size=32"]
    args = ["compare", "--what=variants", "--seeds=1", *shared]
    process = start("bench.py", *args, cwd=tmp_path, start_new_session=True)
    next(line for line in process.stdout if "seed 0:" in line)  # one model is finished
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert finished and not list(tmp_path.glob("results/*"))
    out = finish("bench.py", *args, cwd=tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())  # not run again
    path = next((tmp_path / "results").glob("variants-seeds=1-max_steps=30*.json"))
    models = json.loads(path.read_text())["models"]
    assert list(models) == ["1 loop", *RESIDUALS]
    for label, row in models.items():
        assert row["mean"] == row["runs"][0]["val_loss"]
        assert f"\n{label:<26}" in out and f"{row['mean']:.4f}" in out
    flags = ["--n_loop=6", "--residual=sum", *shared]
    assert result_of(*flags, cwd=tmp_path)["val_loss"] == models["sum"]["mean"]


@pytest.mark.parametrize("fork", ["drawn-depth", "gate-starts", "short-text"])
def test_the_example_of_a_fork_fits_this_code(fork):
    subprocess.run(["git", "apply", "--check", f"results/{fork}.patch"], cwd=HERE, check=True)


def test_experiments_of_equal_compute_have_equal_compute():
    def flops(flags):
        args = get_args(flags.split())
        mean = (args.n_loop + (args.n_loop_min or args.n_loop)) / 2
        step_tokens = args.batch_size * args.gradient_accumulation_steps * args.block_size
        each = flops_per_token(train.get_config(args, 257), mean)
        return args.target_flops or each * step_tokens * args.max_steps
    default, pairs = bench.EXPERIMENTS["default"], bench.EXPERIMENTS["pairs"]
    arrows = bench.EXPERIMENTS["arrows"] | bench.EXPERIMENTS["arrows-sum"]
    for equal in ([flags for label, flags in default.items() if "6" in label], arrows.values(),
                  [pairs["2 blocks x 3"], pairs["4 blocks, compute of 2 x 3"]],
                  [pairs["1 block x 2"], pairs["1 block, compute of 1 x 2"]]):
        assert max(map(flops, equal)) < 1.01 * min(map(flops, equal)), equal


def test_compare_tunes_each_model_and_says_what_diverged(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    best = {1: 1e-3, 2: 64e-3, 4: 8e-3, 6: 8e-3}    # loops: learning rate

    def trained(label, flags, data_sha256, rate, seed):
        n_loop = get_args(flags).n_loop
        diverged = n_loop == 6 and (seed == 1 or rate > 8e-3)
        loss = None if diverged else 1 + abs(math.log2(rate / best[n_loop])) + seed / 10
        return {"val_loss": loss, "tokens": 100, "seconds": 6, "params": 1, "flops": n_loop,
                "loop_losses": [loss] * n_loop, "gates": [[1] * n_loop]}
    monkeypatch.setattr(bench, "train_run", trained)
    command = ["--what=default", "--seeds=2", f"--data_dir={tiny_data / 'data'}"]
    bench.compare([*command, "--learning_rate=8e-3", "--sweep"])
    out, path = capsys.readouterr().out, next((tmp_path / "results").glob("*8e-3.json"))
    models = json.loads(path.read_text())["models"]
    assert [*models["1 loop"]["trials"]] == ["0.0005", "0.001", "0.002", "0.004", "0.008"]
    assert [*models["2 loops"]["trials"]] == ["0.004", "0.008", "0.016", "0.032", "0.064", "0.128"]
    assert models["6 loops"]["trials"] == {"0.004": 2, "0.008": 1, "0.016": None}
    assert models["1 loop"]["mean"] == pytest.approx(1.05)
    assert models["1 loop"]["spread"] == pytest.approx(0.05)
    assert models["6 loops"]["mean"] == 1 and "1 diverged\n" in out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(bench, "train_run", lambda *args: {"val_loss": None})
    bench.compare([*command, "--sweep"])  # ends, although no rate works
    assert "\n6 loops  2 diverged\n" in capsys.readouterr().out
    assert not any("NaN" in path.read_text() for path in (tmp_path / "results").glob("*.json"))


def test_the_puzzle_is_compared_by_its_answers(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def trained(label, flags, data_sha256, rate, seed):
        n_loop = get_args(flags).n_loop
        right = 0.9 - abs(math.log2(rate / 8e-3)) / 10 - seed / 50
        table = [[right - abs(n - 8)] * 10 for n in range(1, 17)] if n_loop > 1 else [[right] * 10]
        return {"val_loss": rate, "tokens": 100, "seconds": 6, "params": 1, "flops": n_loop,
                "loop_losses": [rate] * n_loop, "gates": None, "right": table}
    monkeypatch.setattr(bench, "train_run", trained)
    bench.compare(["--what=arrows", "--sweep", "--seeds=2", f"--data_dir={tiny_data / 'data'}"])
    path, out = next((tmp_path / "results").glob("arrows-*.json")), capsys.readouterr().out
    for row in json.loads(path.read_text())["models"].values():
        wrong = {"0.004": 0.2, "0.008": 0.1, "0.016": 0.2}
        assert {rate: row["trials"][rate] for rate in wrong} == pytest.approx(wrong)
        assert [run["val_loss"] for run in row["runs"]] == [8e-3] * 2   # the rate, here
    assert re.search(r"\nsix loops, loop 8( +89\.0){10}\n", out)
    assert re.search(r"\none forward pass( +89\.0){10}\n", out)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_has_the_differences_at_equal_compute():
    def row(n_loop, tokens, mean):
        run = {"val_loss": mean, "loop_losses": [mean] * n_loop, "tokens": tokens, "params": 10}
        return {"runs": [run], "mean": mean, "spread": 0.1}
    axes = bench.Figure().subplots()
    bench.draw_differences(axes, {"a": row(1, 100, 3.0), "b": row(2, 60, 3.5),
                                  "c": row(1, 1000, 2.0), "d": row(2, 600, 1.5)})
    points = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers}
    assert points == {"n_loop = 1": [[10, 0], [100, 0]], "n_loop = 2": [[10, 0.5], [100, -0.5]]}


# ---- the messages that a user of the README can meet ----

MISTAKES = [
    (prepare, "nowhere", "neither a file nor a folder"),
    (prepare, "binary", "no text in UTF-8"),
    (prepare, "short.txt", "too little text"),
    (prepare, "empty", "too little text"),
    (prepare, "shakespeare", "without a network use python prepare.py"),
    (prepare, "openwebtext", "python prepare.py --tokenizer=byte"),
    (train, "--n_lop=6", "unrecognized arguments: --n_lop=6"),
    (train, "--n_loop=0", "invalid positive value: '0'"),
    (train, "--learning_rate=nan", "invalid not_negative value"),
    (train, "--seed=99999999999999999999", "invalid natural value"),
    (train, "--loop_start=1", "loop_start=1"),
    (train, "--n_embd=30 --n_head=4", "n_embd=30 must be a multiple of n_head=4"),
    (train, "--dropout=1", "dropout=1.0"),
    (train, "--n_loop=2 --n_loop_min=3", "--n_loop_min=3 must not be above --n_loop=2"),
    (train, "--score_after=->", "'->' is not one byte token"),
    (train, "--score_after=~", "'~' is not one byte token that data/val.bin has"),
    (train, "--data_dir=none", "no data in none: run python prepare.py --data_dir=none"),
    (train, "--preset=arrows", "no data in data-arrows: run python prepare.py arrows"),
    (train, "--block_size=99999999", "use a smaller --block_size"),
    (train, "--preset=gpt2-45m --block_size=16", "another text with --tokenizer=gpt2"),
    (train, "--init_from=nowhere", "no file nowhere"),
    (train, "--device=quantum", "--device=quantum does not work here: use --device=cpu"),
    (train, "--resume", "no checkpoint out/ckpt.pt: train one with python train.py"),
    (train, "--resume --out_dir=whole --n_embd=32", "--n_embd=32 does not fit the checkpoint"),
    (train, "--resume --out_dir=whole --learning_rate=1", "--learning_rate=1.0 does not fit"),
    (train, "--resume --out_dir=whole --target_flops=1", "300 steps: give more --max_steps"),
    (train, "--resume --out_dir=whole --data_dir=other", "not the data of the checkpoint"),
    (sample, "--out_dir=whole --prompt=xxxxxxxxxxxxxxxxx", "17 tokens, the model sees 16"),
    (sample, "--exit_kl=1 --show_loops", "leave out --exit_kl"),
    (bench, "nonsense", "has no command nonsense"),
    (bench, "loops --out_dir=whole", "train.py prints the loss after each loop"),
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
