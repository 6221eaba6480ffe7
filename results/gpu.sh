#!/usr/bin/env bash
# What only a GPU can tell, in about ten minutes, unattended: bash results/gpu.sh > gpu.txt 2>&1
# Needs data/ with GPT-2's tokens. NANOGPT=a folder with nanoGPT's model.py compares with it.
# TOY=1 tries the script itself, on a CPU. Each part has a time limit of its own.
cd "$(dirname "$0")/.." || exit 1
part() {    # seconds, name, command
  echo; echo "### $2"; SECONDS=0
  timeout "$1" bash -c "$3" || echo "ended with $?"
  echo "($SECONDS s)"
}
MODEL="--preset=gpt2-124m"; LOOPED="--preset=gpt2-81m-loop"; SMALL="--preset=gpt2-45m"
BATCHES="16 32 64"; STEPS=400; FEW="--eval_iters=32 --log_interval=20 --eval_interval=10000"
if [ "$TOY" ]; then
  T="--n_embd=64 --n_head=2 --block_size=64 --batch_size=2 --max_steps=20 --warmup_steps=5"
  MODEL="$MODEL --n_layer=2 $T"; LOOPED="$LOOPED --n_layer=2 --n_loop=2 $T"; SMALL="$SMALL $T"
  BATCHES="2"; STEPS=2
fi
STEP="--gradient_accumulation_steps=1"
export NANOGPT

part 60 "the machine" 'nvidia-smi; python -c "import torch; print(torch.__version__)"'
RUN="train.py $SMALL $STEP $FEW --batch_size=4 --max_steps=20 --warmup_steps=5"
part 90 "it works: cold start, resume, one process over nccl" "
  python $RUN --out_dir=out-gpu &&
  python train.py --resume --out_dir=out-gpu --max_steps=40 | tail -n 2 &&
  torchrun --standalone --nproc_per_node=1 $RUN --out_dir=out-gpu2 | tail -n 2"
part 60 "compiled equals eager" "
  for how in --compile --no-compile; do python $RUN --out_dir=out-gpu3 \$how | grep val; done"
for batch in $BATCHES; do for vocab in 50257 50304; do
  part 60 "speed: batch $batch, vocabulary $vocab" \
    "python bench.py speed $MODEL $STEP --batch_size=$batch --vocab_size=$vocab"
done; done
part 60 "speed: loops" "python bench.py speed $LOOPED $STEP --batch_size=${BATCHES%% *}"
part 60 "speed: loops, recomputed" \
  "python bench.py speed $LOOPED $STEP --batch_size=${BATCHES%% *} --checkpoint_loops"
[ "$NANOGPT" ] && part 60 "nanoGPT, the same step" 'python - <<PY
import os, sys, time
import torch
sys.path.insert(0, os.environ["NANOGPT"])
from model import GPT, GPTConfig
model = torch.compile(GPT(GPTConfig(vocab_size=50304, bias=False)).cuda())
optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
x, y = torch.randint(50257, (2, 16, 1024), device="cuda")
for i in range(40):
    if i == 10:
        torch.cuda.synchronize(); began = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x, y)[1]
    loss.backward(); optimizer.step(); optimizer.zero_grad(set_to_none=True)
torch.cuda.synchronize()
print(f"{30 * x.numel() / (time.perf_counter() - began):,.0f} tokens/s")
PY'
PAIR="$SMALL $STEP $FEW --max_steps=$STEPS"
part 240 "the paper's pairs, AdamW, equal tokens" "python results/study.py --name=gpu-pairs --seeds=1 \
  --workers=1 '$PAIR' '$PAIR --n_loop=2' '$PAIR --n_layer=2'"
