"""What is true of study.py: nothing is mixed up in silence, the pages show what the rows say."""
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import study
import torch
import torch.nn.functional as F
import train
from matplotlib.figure import Figure
from model import GPTConfig
from test_model import run, start

HERE = Path(study.__file__).parent
FEW = "--max_steps=3 --n_embd=32 --eval_iters=16"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with data and a copy of the code, where study() adds its rows."""
    for path in [*HERE.parent.glob("*.py"), HERE / "study.py"]:
        copy = tmp_path / "clone" / path.relative_to(HERE.parent)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "HERE", tmp_path / "clone" / "results")
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs.csv")
    monkeypatch.setattr(study, "ANSWERS", tmp_path / "arrows.csv")
    return tmp_path


def prepare(folder, text="text.txt"):
    subprocess.run([sys.executable, HERE.parent / "prepare.py", text], cwd=folder, check=True)


def rows_of(*argv, code=0):
    """The rows that a study adds."""
    before = len(study.read(study.RUNS))
    with pytest.raises(SystemExit) as caught:
        study.study([*argv])
    assert (caught.value.code == 0) == (code == 0), caught.value.code
    return study.read(study.RUNS)[before:]


def test_a_study_trains_the_code_and_the_data_that_it_began_with(place, monkeypatch, capsys):
    flags, original = f"--n_loop=2 {FEW}", study.run_train_py
    expected = run(*flags.split(), "--seed=0", cwd=place)["val_loss"]
    model, before = place / "clone" / "model.py", (place / "clone" / "model.py").read_text()

    def edit(*args):    # while the study runs
        model.write_text(before.replace("return y   ", "return 2 * y"))
        return original(*args)
    monkeypatch.setattr(study, "run_train_py", edit)
    model_rows = rows_of(flags, "--seeds=1")
    assert float(model_rows[0]["val_loss"]) == expected and model.read_text() != before
    assert rows_of(flags, "--seeds=1", "--name=b")[0]["code"] != model_rows[0]["code"]
    model.write_text(before)
    assert rows_of(flags, "--seeds=1") == [] and "from an earlier run" in capsys.readouterr().out

    def prepare_anew(*args):
        record = original(*args)
        (place / "other.txt").write_text("other text " * 2000)
        prepare(place, "other.txt")
        return record
    monkeypatch.setattr(study, "run_train_py", prepare_anew)
    assert rows_of(f"--n_loop=3 {FEW}", "--seeds=1", code=1) == []
    assert "changed during this study" in capsys.readouterr().err


def test_what_decides_the_digits_makes_another_run_and_is_kept_with_it(place, monkeypatch, capsys):
    flags = [f"--n_loop=2 {FEW}", "--seeds=1"]
    first = rows_of(*flags)[0]
    assert first["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert abs(float(first["copied"])) < 1      # of three steps
    for name, value in (("cpu", "AVX2"), ("torch", "2.99.0")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
            if name == "torch":
                patch.setattr(torch, "__version__", value)
            again = rows_of(*flags)[0]
        assert again[name] == value != first[name]
        assert "from an earlier run" not in capsys.readouterr().out


def test_no_model_is_lost_beside_others(place, capsys):
    models = [f"{FEW} --n_loop {n} --n_head {h}" for n, h in ((4, 2), (2, 4), (4, 4))]
    rows = rows_of(*models, f"{FEW} --n_head=3", "--seeds=1", code=1)   # the last is impossible
    labels = [f"--n_loop={n} --n_head={h}" for n, h in ((4, 2), (2, 4), (4, 4))]
    assert [row["label"] for row in rows] == labels
    assert [row["flags"].removeprefix(f"{FEW} ") for row in rows] == labels
    out, err = capsys.readouterr()
    assert all(f"\n{label} " in out for label in labels) and "see its out.txt" in err
    labels = list(study.get_args([FEW, f"{FEW} --n_loop 2", "--seeds=1"])[2])
    assert labels == ["with no other", "--n_loop=2"]
    with pytest.raises(SystemExit, match="are the same model"):
        study.study([f"{FEW} --n_loop=1", f"--n_loop=1 {FEW}"])
    with pytest.raises(SystemExit, match="--compute_of=x names none of the models before it"):
        study.study([f"{FEW} --compute_of=x"])
    with pytest.raises(SystemExit, match="no model has seven in its label: name one of 1 loop, "):
        study.study(["text", "--only=seven"])
    for flags in (["text", "--seed=5"], ["text", "--out_dir=x"], ["x"]):
        with pytest.raises(SystemExit) as caught:
            study.study(flags)
        assert caught.value.code == 2


def test_a_bug_keeps_its_traceback(place, monkeypatch, capsys):
    monkeypatch.setattr(study, "train_run", lambda *args: 1 / 0)
    assert rows_of(f"--n_loop=2 {FEW}", code=1) == []
    assert "Traceback" in (err := capsys.readouterr().err) and "ZeroDivisionError" in err


def test_a_study_that_is_stopped_ends_its_training_and_goes_on(place):
    here = place / "clone" / "results"
    command = [here / "study.py", f"--max_steps=100000 {FEW[14:]} --eval_interval=20", "--seeds=1"]
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start(*command, cwd=place)
        while not (folders := list(place.glob("out-study/1x1*"))) or not (
                folders[0] / "ckpt.pt").exists() or not trainings(folders[0].name):
            time.sleep(0.1)
        process.send_signal(number)
        process.communicate(timeout=60)
        alive = trainings(folders[0].name)
        assert bool(alive) == (number == signal.SIGKILL)
    other = f"{FEW} --n_loop=2"     # a second model takes the only place when the first fails
    _, err = start(*command, other, "--workers=1", cwd=place).communicate(timeout=60)
    subprocess.run(["kill", *alive], check=True)
    assert "is still running" in err    # two trainings in one folder would mix their logs
    rows = study.read(here / "runs.csv")
    assert [row["seed"] for row in rows] == ["0"] and "--n_loop=2" in rows[0]["flags"]


def trainings(folder):
    """The numbers of the processes that train in a folder of this name."""
    return subprocess.run(["pgrep", "-f", f"train.py .*{folder}"], capture_output=True,
                          text=True).stdout.split()


def fake_run(code, places, name, label, flags, rate, seed):
    """A run whose best rate is known. With six loops it diverges at seed 1 and at high rates."""
    n_loop = train.get_args(flags)[0].n_loop
    best = {1: 1e-3, 2: 64e-3, 4: 8e-3, 6: 8e-3}[n_loop]
    diverged = n_loop == 6 and (seed == 1 or rate > 8e-3)
    loss = None if diverged else 1 + abs(math.log2(rate / best)) + seed / 10
    return {"study": name, "label": label, "rate": f"{rate:g}", "seed": seed, "val_loss": loss,
            "tokens": 100, "seconds": 6, "params": 1, "flops": n_loop, "flops_ratio": 1.5}, []


def test_each_model_is_tuned_and_what_diverged_is_said(place, monkeypatch, capsys):
    monkeypatch.setattr(study, "train_run", fake_run)
    rows = rows_of("text", "--only=loops?$", "--seeds=2", "--learning_rate=8e-3", "--sweep")
    rates = {label: [row["rate"] for row in rows if row["label"] == label and row["trial"]]
             for label in ("1 loop", "2 loops", "6 loops")}
    assert rates == {"1 loop": ["0.0005", "0.002", "0.004", "0.008"],
                     "2 loops": ["0.004", "0.008", "0.016", "0.032", "0.128"],
                     "6 loops": ["0.004", "0.016"]}
    assert study.cell("text", "1 loop") == "1.050±0.050"
    out = capsys.readouterr().out
    assert re.search(r"\n6 loops .* 1\.0000 0\.0000  1 diverged  takes 1\.50 times", out)
    row = {"val_loss": 0.1, "right": 0.75}
    assert study.score(row) == 0.25 and study.score({"val_loss": 0.1}) == 0.1   # a puzzle's answers


def test_compute_of_gives_equal_compute(place):
    models = study.get_models(study.EXPERIMENTS["text"], [])
    costs = [study.step_flops(models[label], whole=True)
             for label in ("6 loops", "1 loop, compute of 6", "4 loops, compute of 6")]
    assert max(costs) < 1.001 * min(costs) and costs[0] == pytest.approx(1.007e13, rel=1e-3)


def test_rows_of_two_codes_are_not_averaged(place):
    row = {name: "1" for name in study.COLUMNS} | {"study": "s", "label": "l", "trial": ""}
    for _ in range(2):  # the second time they are there
        study.append(study.RUNS, study.COLUMNS, [row, row | {"seed": "2"}])
    assert len(study.runs_of("s", "l")) == 2
    study.append(study.RUNS, study.COLUMNS, [row | {"seed": "3", "code": "2"}])
    with pytest.raises(SystemExit, match="3 rows of 2 kinds"):
        study.runs_of("s", "l")


def test_a_row_names_the_last_commit_of_the_code(place):
    def commit(text):
        git = "git -c user.name=a -c user.email=a@b"
        subprocess.run(f"git init -q && git add . && {git} commit -qm {text}", shell=True,
                       check=True, cwd=place / "clone")
        return study.copy_code()[1]
    assert re.fullmatch("hash [0-9a-f]{12}", study.copy_code()[1])
    first = commit("all")
    assert re.fullmatch("[0-9a-f]{12}", first)
    (place / "clone" / "README.md").write_text("other words")
    assert commit("words") == first
    with open(place / "clone" / "model.py", "a") as file:
        file.write("# other code\n")
    assert study.copy_code()[1].startswith("hash ") and commit("code") != first


def test_each_worker_gets_a_gpu_that_the_caller_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    places = study.get_places(3, gpus=2)
    assert [places.get()["CUDA_VISIBLE_DEVICES"] for _ in range(3)] == ["2", "5", "2"]
    assert study.get_places(1, gpus=0).get() == {"OMP_NUM_THREADS": "1"}


def test_copying_is_what_a_second_showing_gains():
    class Copier(torch.nn.Module):
        """From the second showing on, it is sure of what followed last time, else of nothing."""
        config, wte = GPTConfig(block_size=8), torch.nn.Embedding(1, 1)

        def forward(self, idx):     # the next token stood 4 places before, so 3 before this one
            return 50.0 * F.one_hot(idx.roll(3, 1), 256) * (torch.arange(8) >= 4)[:, None]
    texts = torch.stack([torch.randperm(256) for _ in range(20)]).flatten().numpy()
    assert study.copied(Copier(), texts) == pytest.approx(math.log(256))


def test_ten_runs_of_ten_are_right_in_98_percent():
    for label in ("the loop", "the loop, AVX2"):
        for loop in (12, 20):
            shares = study.answers_of(label, loop)
            assert shares.shape == (5, 10) and shares.min() > 0.98


def test_the_pages_show_what_the_rows_say():
    pages = (HERE / "README.md").read_text() + (HERE.parent / "README.md").read_text()
    pages = re.sub(r"\s+", " ", pages)
    for part in study.tables():
        for line in part.splitlines():
            assert re.sub(r"\s+", " ", line) in pages, line


def test_the_pictures_show_what_the_rows_say(tmp_path, monkeypatch):
    """The last points of two lines, from the rows by hand; and that every picture is written."""
    rows = [row for row in study.read(study.RUNS) if row["study"] == "widths" and not row["trial"]]

    def mean(label, column):
        return np.mean([float(row[column]) for row in rows if row["label"] == label])
    widths, copying = Figure().subplots(), Figure().subplots()
    study.draw_widths(widths)
    lines = {line.get_label(): line.get_xydata() for line in widths.lines}
    gain = mean("512, muon, 1 block", "val_loss") - mean("512, muon, 1 block x 2", "val_loss")
    assert lines["a second loop (Muon)"][-1].tolist() == [512, pytest.approx(gain)]
    study.draw_copying(copying)
    lines = {line.get_label(): line.get_xydata() for line in copying.lines}
    one = [float(row["copied"]) for row in rows if row["label"] == "256, muon, 1 block x 2"]
    assert lines["1 block x 2"][-1].tolist() == [4000, one[0]] and len(lines["1 block x 2"]) == 5
    monkeypatch.setattr(study, "HERE", tmp_path)
    study.pictures()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "arrows.png", "copying.png", "widths.png"]
