# stack.sh NAME MODEL GUIDE_OPTIONS -- UP_OPTIONS: starts a whole cluster, runs the guide's benchmark against it, stops it.
# Reports and logs go to $OUT. Run it in the repository root, after setup.sh:
#     OUT=results bash benchmarks/gpu/stack.sh pd22 MODEL --prompts ids -- --prefill 2 --decode 2
if [ -z "$OUT" ] || [ $# -lt 3 ]; then echo "usage: OUT=FOLDER bash $0 NAME MODEL GUIDE_OPTIONS -- UP_OPTIONS" >&2; exit 2; fi
name=$1 model=$2; shift 2; guide=(); while [ $# -gt 0 ] && [ "$1" != -- ]; do guide+=("$1"); shift; done; shift
began=$(date +%s%N)
python3 -m dynserve up --model-path "$model" --served-model-name m --http-port 8000 --start-timeout-s 120 "$@" > "$OUT/$name.log" 2>&1 & up=$!
for _ in $(seq 600); do grep -q "^ready after" "$OUT/$name.log" && break; kill -0 $up 2>/dev/null || break; sleep 0.1; done
echo "== $name: $(grep '^ready after' "$OUT/$name.log" || tail -15 "$OUT/$name.log"), $(( ($(date +%s%N) - began) / 1000000 )) ms with the shell"
python3 benchmarks/guide.py --name "$name" --pause 0.5 --out "$OUT" --runs 20 "${guide[@]}" 2> "$OUT/$name.err" | grep -v "^$" || tail -5 "$OUT/$name.err"
[ -n "$FIRST_TOKEN" ] && python3 benchmarks/gpu/first_token.py --runs 15
grep -hE "WARNING|ERROR|Traceback" "$OUT/$name.log" | sort | uniq -c | sort -rn | head -8
kill -INT $up; wait $up
