#!/usr/bin/env bash
# What only a GPU can tell, sized for ten minutes, unattended: bash results/gpu.sh > gpu.txt 2>&1
# Needs data/ with GPT-2's tokens. NANOGPT=a folder with nanoGPT's model.py compares with it.
# TOY=1 tries the script itself, on a CPU. ONLY=speed runs the parts with "speed" in their names.
cd "$(dirname "$0")/.." || exit 1
part() {    # seconds, name, command
  [[ $2 == *"$ONLY"* ]] || return
  echo; echo "### $2"; SECONDS=0
  timeout "$1" bash -c "$3" || echo "ended with $?"
  echo "($SECONDS s)"
}
STEP="--gradient_accumulation_steps=1"; MODEL="--preset=gpt2-124m $STEP"
LOOPED="--preset=gpt2-81m-loop $STEP"; LAYERS=12; BATCHES="16 32 64"; PUZZLE="--max_steps=500"
SMALL="--preset=gpt2-45m $STEP --max_steps=400 --eval_iters=32 --log_interval=20"
if [ "$TOY" ]; then
  T="--n_embd=64 --n_head=2 --block_size=64 --batch_size=2 --max_steps=20 --warmup_steps=5"
  MODEL="$MODEL --n_layer=2 $T"; LOOPED="$LOOPED --n_layer=2 --n_loop=2 $T"; SMALL="$SMALL $T"
  LAYERS=1; PUZZLE="--max_steps=2"; BATCHES="2"; fi
FIRST="--batch_size=${BATCHES%% *}"; PADDED="--vocab_size=50304"; BEST="$MODEL $FIRST $PADDED"
RUN="train.py $SMALL --batch_size=4 --max_steps=20 --warmup_steps=5 --eval_interval=1000"
part 150 "it works: compiled equals eager, resume, one process over nccl" "nvidia-smi
  for how in --no-compile --compile; do python $RUN --out_dir=out-gpu \$how; done
  python train.py --resume --out_dir=out-gpu --max_steps=40
  torchrun --standalone --nproc_per_node=1 $RUN --out_dir=out-gpu2
  tail -n 1 out-gpu*/log.jsonl"
part 60 "the puzzle" "python prepare.py arrows; python train.py --preset=arrows $PUZZLE"
part 60 "speed: 50257 tokens" "python bench.py speed $MODEL $FIRST"
for batch in $BATCHES; do part 60 "speed: batch $batch, 50304 tokens" \
  "python bench.py speed $MODEL $PADDED --batch_size=$batch"; done
for how in "" --checkpoint_loops; do
  part 60 "speed: loops $how" "python bench.py speed $LOOPED $FIRST $how"; done
for off in flash cudnn; do part 60 "speed: without $off attention" "python -c 'import torch, bench
torch.backends.cuda.enable_${off}_sdp(False); bench.measure(\"without $off\", \"$BEST\".split())'"; done
part 90 "speed: the whole model compiled" "python -c 'import bench, train
train.compile_blocks = lambda model: model.compile(dynamic=False)
bench.measure(\"whole model\", \"$BEST --compile\".split())'"
[ "$NANOGPT" ] && part 60 "nanoGPT, the same step" 'cd "$NANOGPT" && python - <<PY
import time, torch
from model import GPT, GPTConfig
model = torch.compile(GPT(GPTConfig(vocab_size=50304, bias=False)).cuda())
optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
times, (x, y) = [], torch.randint(50257, (2, 16, 1024), device="cuda")
for _ in range(40):
    began = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16): loss = model(x, y)[1]
    loss.backward(); optimizer.step(); optimizer.zero_grad(); torch.cuda.synchronize()
    times.append(time.perf_counter() - began)
print(f"{x.numel() / sorted(times)[20]:,.0f} tokens/s")
PY'
part 60 "decoding by transformers: plain, static cache" "python - <<PY
import torch, transformers, bench
device = bench.pick_device('auto')
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=$LAYERS)).to(device).bfloat16()
idx = torch.randint(50257, (1, 512), device=device)
for cache in (None, 'static'):
    flags = dict(max_new_tokens=128, min_new_tokens=128, cache_implementation=cache)
    seconds = [bench.time_of(lambda: model.generate(idx, **flags), device) for _ in range(3)]
    print(cache, f'{128 / min(seconds):,.0f} tokens/s')
PY"
part 240 "the paper's pairs, AdamW" "python results/study.py --name=gpu-pairs --seeds=1 \
  --workers=1 '$SMALL' '$SMALL --n_loop=2' '$SMALL --n_layer=2'"
