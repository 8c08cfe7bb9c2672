#!/usr/bin/env bash
# The deployment guide's benchmark of what answers on LOCAL_PORT: a port-forward to the frontend, or processes on this machine.
#     benchmark-trtllm.sh [benchmark|smoke|health]
# With Python the figures are those of benchmarks/guide.py, which also streams; without it they are taken here by curl, in the
# same way: whole requests, one at a time, each on a connection of its own. Settings are taken from the environment: NAMESPACE,
# DEPLOYMENT_NAME, MODEL_ID, LOCAL_PORT, REPORT_DIR, PAUSE (seconds between tests), RUNS (streams of each test).
set -euo pipefail

NAMESPACE="${NAMESPACE:-dynamo-cloud}"
DEPLOYMENT_NAME="${DEPLOYMENT_NAME:-trtllm-disagg-qwen-full}"
MODEL_ID="${MODEL_ID:-Qwen/Qwen2.5-0.5B-Instruct}"
LOCAL_PORT="${LOCAL_PORT:-8000}"
PAUSE="${PAUSE:-2}"
RUNS="${RUNS:-10}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPORT_DIR="${REPORT_DIR:-benchmark-results}"
url="http://127.0.0.1:$LOCAL_PORT"
guide="$here/../../benchmarks/guide.py"

SHORT="Hello, how are you?"
MEDIUM="Explain neural networks in detail: what the forward pass, backpropagation and gradient descent do, and how they work together."
LONG="Tell the history of artificial intelligence from the first programs of the nineteen fifties over expert systems, neural \
networks and deep learning to the transformers of today, with the milestones of each decade and the people behind them. \
Then describe what all of that has changed in the economy, in science and in our daily lives."

fail() {
    echo "error: $*" >&2
    exit 1
}

need() {
    local program
    for program in "$@"; do
        command -v "$program" > /dev/null || fail "$program is not installed"
    done
}

find_python() {
    local found
    for found in "${PYTHON:-python3}" "$here/../../.venv/bin/python"; do
        if command -v "$found" > /dev/null && "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            echo "$found"
            return 0
        fi
    done
    return 1
}

health() {
    need curl jq
    local body
    body=$(curl --silent --show-error --fail --max-time 10 "$url/health") || fail "$url/health does not answer with success"
    jq . <<< "$body" 2> /dev/null || fail "$url/health does not answer with JSON"
}

# complete PROMPT MAX_TOKENS: sets `answer` and `duration` (seconds). Nothing but a completion is a success.
complete() {
    local body began ended code
    body=$(jq --null-input --arg model "$MODEL_ID" --arg prompt "$1" --argjson tokens "$2" \
        '{model: $model, prompt: $prompt, max_tokens: $tokens, temperature: 0.7}')
    began=$(date +%s.%N)
    answer=$(curl --silent --show-error --max-time 300 --write-out '\n%{http_code}' "$url/v1/completions" \
        --header 'Content-Type: application/json' --data-binary "$body") || return 1
    ended=$(date +%s.%N)
    code=${answer##*$'\n'}
    answer=${answer%$'\n'*}
    if [ "$code" != 200 ] || ! jq --exit-status '.usage.completion_tokens and .choices[0]' <<< "$answer" > /dev/null 2>&1; then
        echo "HTTP $code: ${answer:0:300}" >&2
        return 1
    fi
    duration=$(awk -v a="$began" -v b="$ended" 'BEGIN { printf "%.9f", b - a }')
}

cut_to() { # VALUE DECIMALS, truncated
    awk -v value="$1" -v places="$2" 'BEGIN { f = 10 ^ places; printf "%.*f", places, int(value * f) / f }'
}

usage_of() { jq --raw-output ".usage.$1" <<< "$answer"; }

# one_test TITLE ROW PROMPT MAX_TOKENS: appends to `summary` and `details`
one_test() {
    complete "$3" "$4" || fail "$1 failed"
    local tokens rate
    tokens=$(usage_of completion_tokens)
    rate=$(cut_to "$(awk -v t="$tokens" -v s="$duration" 'BEGIN { printf "%.9f", t / s }')" 2)
    summary+="| $2 | $tokens | $(awk -v s="$duration" 'BEGIN { printf "%.3f", s }')s | $rate tok/s |"$'\n'
    details+="
### $1

- Duration: ${duration}s
- Prompt Tokens: $(usage_of prompt_tokens)
- Completion Tokens: $tokens
- Total Tokens: $(usage_of total_tokens)
- Throughput: $rate tokens/sec
- Max Tokens Requested: $4

\`\`\`
$(jq --raw-output '.choices[0].text[:200]' <<< "$answer" | sed "s/\`\`\`/'''/g")
\`\`\`
"
    echo "$1: $tokens tokens in ${duration}s, $rate tokens/sec" >&2
    sleep "$PAUSE"
}

latency_test() {
    local sum=0 good=0 bad=0
    for _ in 1 2 3 4 5; do
        if complete "$SHORT" 50; then
            good=$((good + 1))
            sum=$(awk -v a="$sum" -v b="$duration" 'BEGIN { printf "%.9f", a + b }')
        else
            bad=$((bad + 1))
        fi
        sleep "$(awk -v p="$PAUSE" 'BEGIN { print p / 4 }')"
    done
    [ "$good" -gt 0 ] || fail "all requests of test 5 failed"
    local mean
    mean=$(cut_to "$(awk -v s="$sum" -v n="$good" 'BEGIN { printf "%.9f", s / n }')" 3)
    summary+="| Latency (avg) | - | ${mean}s | - |"$'\n'
    details+="
### Test 5: Latency Test (5 iterations)

- Iterations: 5
- Successful Requests: $good
- Failed Requests: $bad
- Average Latency: ${mean}s
- Total Duration: ${sum}s
"
    echo "Test 5: average latency ${mean}s, $bad failed" >&2
    [ "$bad" -eq 0 ] || failures=1
}

fenced() { # LANGUAGE TEXT
    local fence='```'
    printf '\n%s%s\n%s\n%s\n' "$fence" "$1" "$2" "$fence"
}

# What serves: the pods, or else the workers that the frontend knows
environment() {
    local pods
    echo
    echo "## Deployment Information"
    echo
    echo "- Deployment: $DEPLOYMENT_NAME"
    echo "- Namespace: $NAMESPACE"
    if command -v kubectl > /dev/null \
        && pods=$(kubectl --request-timeout=5s --namespace "$NAMESPACE" get pods --output wide 2> /dev/null \
            | grep -E "^(NAME|$DEPLOYMENT_NAME-)"); then
        fenced "" "$pods"
        local graph
        if graph=$(kubectl --request-timeout=5s --namespace "$NAMESPACE" get dynamographdeployment "$DEPLOYMENT_NAME" \
            --output yaml 2> /dev/null); then
            fenced yaml "$graph"
        fi
    else
        printf '\nNo pods: the workers that the frontend knows.\n'
        fenced "" "$(curl --silent --max-time 10 "$url/health" \
            | jq --raw-output '.instances[]? | "\(.id)  \(.role)  \(.state)"')"
    fi
    echo
    echo "## Notes"
    echo
    echo "- Each request is whole, at temperature 0.7, on a connection of its own; its duration is all that a client waits."
    echo "- Throughput is completion tokens by duration of one request at a time, not what the deployment can do."
    echo "- There are $PAUSE s between tests; figures differ from run to run."
}

by_curl() {
    local report=$1
    summary="" details="" failures=0
    one_test "Test 1: Short Prompt (50 tokens)" "Short (50)" "$SHORT" 50
    one_test "Test 2: Short Prompt (150 tokens)" "Short (150)" "$SHORT" 150
    one_test "Test 3: Medium Prompt (100 tokens)" "Medium (100)" "$MEDIUM" 100
    one_test "Test 4: Long Prompt (50 tokens)" "Long (50)" "$LONG" 50
    latency_test
    {
        echo "# TRT-LLM Benchmark Results"
        echo
        echo "**Date:** $(date '+%Y-%m-%d %H:%M:%S')  "
        echo "**Deployment:** $DEPLOYMENT_NAME  "
        echo "**Namespace:** $NAMESPACE  "
        echo "**Model:** $MODEL_ID"
        echo
        echo "## Results Summary"
        echo
        echo "| Test | Tokens | Duration | Throughput |"
        echo "|------|--------|----------|------------|"
        printf '%s' "$summary"
        echo
        echo "## Benchmark Results"
        printf '%s' "$details"
        environment
    } > "$report"
    sed -n '/^## Results Summary/,/^## Benchmark/p' "$report" | sed '$d'
    return "$failures"
}

benchmark() {
    need curl jq
    health > /dev/null
    mkdir -p "$REPORT_DIR"
    local interpreter report
    if [ -f "$guide" ] && interpreter=$(find_python); then
        "$interpreter" "$guide" benchmark --url "$url" --model "$MODEL_ID" --name trtllm --out "$REPORT_DIR" \
            --pause "$PAUSE" --runs "$RUNS"
        report=$(find "$REPORT_DIR" -name 'trtllm_benchmark_*.md' | sort | tail -n 1)
        environment >> "$report"
        return 0
    fi
    report="$REPORT_DIR/trtllm_benchmark_$(date +%Y%m%d_%H%M%S).md"
    local status=0
    by_curl "$report" || status=$?
    echo "report: $report"
    return "$status"
}

smoke() {
    health
    complete "Hello" 20 || fail "the completion failed"
    jq . <<< "$answer"
    echo "smoke test passed: $(usage_of completion_tokens) tokens in ${duration}s"
}

case "${1:-benchmark}" in
    benchmark) benchmark ;;
    smoke) smoke ;;
    health) health ;;
    *)
        echo "usage: $0 [benchmark|smoke|health]" >&2
        exit 1
        ;;
esac
