#!/usr/bin/env bash
# Train a published system at a size of its paper. None of these was ever run: no such machine was there.
#
#     DATA=PREFIX TOKENIZER=DIR examples/paper_size.sh PRESET [SIZE] [options]
#
#     scmoe            small, medium, xl, llama2   GPT2-, GPT3- and LLaMA2-MoE of arXiv:2404.05019, table 8
#     scmoe-2          xl                          table 4
#     dgmoe            small, medium               table 7, of 8 experts
#     moepp            0.6b, 1b, 2b, 7b            arXiv:2410.07348, table 2
#     longcat-flash    560b                        arXiv:2509.01322 and its config.json
#     nvidia-shortcut  llama2                      ScMoE's: NVIDIA's own models are hybrids, no GPTs
#
# DATA is what tools/preprocess_data.py wrote with TOKENIZER, a folder. Further options win. On several
# nodes the same command runs on each, with NODE_RANK and MASTER_ADDR. Of sizes under training, ScMoE's
# paper gives capacity and loss coefficient only, LongCat-Flash's Adam's epsilon: learning rates, batches
# and lengths are GPT-3's or customary; layouts are ours; biases are left out, which experts lack here.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '4,11s/^#\( \{4\}\)\{0,1\}//p' "$0" >&2
    exit 2
}
PRESET=${1-}
case $PRESET in
    scmoe | dgmoe) SIZE=small ;;
    scmoe-2) SIZE=xl ;;
    moepp) SIZE=0.6b ;;
    longcat-flash) SIZE=560b ;;
    nvidia-shortcut) SIZE=llama2 ;;
    *) usage ;;
esac
shift
if [[ ${1---} != --* ]]; then
    SIZE=$1
    shift
fi
: "${DATA:?prefix of the .bin and .idx of tools/preprocess_data.py}"
: "${TOKENIZER:?folder of the Hugging Face tokenizer that made them}"

NODES=1 SEQUENCE=2048
GPT2=(--position-embedding-type learned_absolute --num-experts 8 --expert-model-parallel-size 8
    --moe-expert-capacity-factor 2.0 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
    --micro-batch-size 8 --global-batch-size 512)
LLAMA=(--position-embedding-type rope --normalization RMSNorm --swiglu)
MOEPP=("${LLAMA[@]}" --moe-layer-freq 1 --untie-embeddings-and-output-weights
    --expert-model-parallel-size 8 --micro-batch-size 8 --global-batch-size 2048
    --lr 5e-4 --min-lr 5e-5 --lr-warmup-iters 2000
    --train-iters 24000) # 100 billion tokens
SMALL_MOEPP=(--num-layers 12 --hidden-size 768 --ffn-hidden-size 2048 --num-attention-heads 12)
case $PRESET/$SIZE in
    scmoe/small | dgmoe/small)
        SEQUENCE=1024
        MODEL=("${GPT2[@]}" --num-layers 12 --hidden-size 768 --num-attention-heads 12
            --moe-layer-freq '([0,1]*6)' --lr 6e-4 --min-lr 6e-5)
        ;;
    scmoe/medium | dgmoe/medium)
        MODEL=("${GPT2[@]}" --num-layers 24 --hidden-size 1024 --num-attention-heads 16
            --moe-layer-freq '([0,1]*12)' --lr 3e-4 --min-lr 3e-5)
        [ "$PRESET" = dgmoe ] || MODEL+=(--num-experts 16)
        ;;
    scmoe/xl | scmoe-2/xl)
        MODEL=("${GPT2[@]}" --num-layers 24 --hidden-size 2048 --num-attention-heads 32
            --moe-layer-freq '([0,1]*12)' --micro-batch-size 4 --lr 2e-4 --min-lr 2e-5)
        ;;
    scmoe/llama2 | nvidia-shortcut/llama2) # a MoE in every layer, which has Pos-1 alone
        MODEL=("${GPT2[@]}" "${LLAMA[@]}" --num-layers 24 --hidden-size 2048 --num-attention-heads 16
            --ffn-hidden-size 5376 --group-query-attention --num-query-groups 4
            --moe-layer-freq 1 --scmoe-shortcut-position pos1 --moe-router-topk 1
            --untie-embeddings-and-output-weights --micro-batch-size 4 --lr 3e-4 --min-lr 3e-5)
        ;;
    moepp/0.6b) NODES=4 MODEL=("${MOEPP[@]}" "${SMALL_MOEPP[@]}" --num-experts 8) ;;
    moepp/1b) NODES=4 MODEL=("${MOEPP[@]}" "${SMALL_MOEPP[@]}" --num-experts 16) ;;
    moepp/2b)
        NODES=4
        MODEL=("${MOEPP[@]}" "${SMALL_MOEPP[@]}" --num-experts 32 --scmoe-num-constant-experts 6)
        ;;
    moepp/7b)
        NODES=4
        MODEL=("${MOEPP[@]}" --num-layers 24 --hidden-size 1536 --ffn-hidden-size 4096
            --num-attention-heads 16 --num-experts 16)
        ;;
    longcat-flash/560b) # 28 layers of theirs are 56 of Megatron's
        NODES=28 SEQUENCE=8192
        MODEL=("${LLAMA[@]}" --num-layers 56 --hidden-size 6144 --ffn-hidden-size 12288
            --num-attention-heads 64 --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128
            --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm --rope-type rope
            --moe-layer-freq '([0,1]*28)' --num-experts 512 --moe-ffn-hidden-size 2048
            --moe-router-topk 12 --scmoe-routed-topk 8 --moe-router-topk-scaling-factor 6.0
            --moe-router-bias-update-rate 1e-3 --moe-aux-loss-coeff 1e-4
            --untie-embeddings-and-output-weights --expert-model-parallel-size 32
            --pipeline-model-parallel-size 7 --num-layers-per-virtual-pipeline-stage 2
            --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
            --micro-batch-size 1 --global-batch-size 2688 --lr 2e-4 --min-lr 2e-5 --adam-eps 1e-16)
        ;;
    *) usage ;;
esac

TRAINING_ARGS=(
    --seq-length "$SEQUENCE"
    --max-position-embeddings "$SEQUENCE"
    --disable-bias-linear
    --hidden-dropout 0
    --attention-dropout 0
    --moe-token-dispatcher-type alltoall
    --lr-decay-style cosine
    --lr-warmup-iters 2000
    --train-iters 100000
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0
    --bf16
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
DATA_ARGS=(
    --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model "$TOKENIZER"
    --data-path "$DATA"
    --split "98,1,1"
)
LOGGING_ARGS=(
    --log-interval 10
    --log-throughput
    --eval-interval 1000
    --eval-iters 10
    --save "${SAVE:-runs/$PRESET-$SIZE}"
    --save-interval 1000
)
torchrun --nnodes "$NODES" --nproc-per-node 8 --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
    pretrain_gpt_scmoe.py --scmoe-preset "$PRESET" "${TRAINING_ARGS[@]}" "${MODEL[@]}" \
    "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}" "$@"
