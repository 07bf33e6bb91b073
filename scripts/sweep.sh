#!/usr/bin/env bash
# A sweep on this machine; lists are shell words, and what follows goes to evaluate.py (or generate.py for speed):
#   NAME=frontier KIND=divergence CACHES="quantize_kv compress_kv" SINKS="4 16" WINDOWS="32 256" \
#       scripts/sweep.sh --text my.txt --context 4096
# PLUGIN=my_cache.py makes caches of your own known.
# Call it again after an interruption or a failure: it does what is left, and exits with 1 while something fails.
set -euo pipefail
words() { read -rd '' -a "$1" <<<"$2" || true; } # over line ends, too: at the end of the text `read` returns 1
words caches "${CACHES:-quantize_kv compress_kv}"
words sinks "${SINKS:-4 16}"
words windows "${WINDOWS:-32 128}"
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$root/scripts/sweep.py" --name "${NAME:-sweep}" --kind "${KIND:-divergence}" \
    --caches "${caches[@]}" --sinks "${sinks[@]}" --windows "${windows[@]}" \
    ${PLUGIN:+--plugin "$PLUGIN"} ${INDEX:+--index "$INDEX"} ${COUNT:+--count} -- "$@"
