#!/usr/bin/env bash
# Helpers for a deployment on Kubernetes. To be sourced:
#     source docker/scripts/trtllm-helpers.sh
# Names, arguments and defaults are those of the deployment guide for TensorRT-LLM on Dynamo. They work for deployments of
# Dynamo's operator and for what `dynserve deploy render` and the Helm chart make. Settings are taken from the environment:
# NAMESPACE, DEPLOYMENT_NAME, MODEL_ID, LOCAL_PORT, REMOTE_PORT, FRONTEND_SVC, READY_TIMEOUT.

export NAMESPACE="${NAMESPACE:-dynamo-cloud}"
export DEPLOYMENT_NAME="${DEPLOYMENT_NAME:-trtllm-disagg-qwen-full}"
export MODEL_ID="${MODEL_ID:-Qwen/Qwen2.5-0.5B-Instruct}"
export LOCAL_PORT="${LOCAL_PORT:-8000}"
export REMOTE_PORT="${REMOTE_PORT:-8000}"
export FRONTEND_SVC="${FRONTEND_SVC:-$DEPLOYMENT_NAME-frontend}"
export READY_TIMEOUT="${READY_TIMEOUT:-600}" # seconds until the pods must be ready
DYNSERVE_FORWARD_PID="${DYNSERVE_FORWARD_PID:-}" # of the port-forward that these helpers started

_dynserve_fail() {
    echo "error: $*" >&2
    return 1
}

_dynserve_need() {
    local program
    for program in "$@"; do
        command -v "$program" > /dev/null || _dynserve_fail "$program is not installed" || return 1
    done
}

_dynserve_kubectl() {
    kubectl --namespace "$NAMESPACE" "$@"
}


# _dynserve_first NAMES COMPONENT: pods are found by name, since labels differ between the operator's versions and ours
_dynserve_first() {
    grep -m 1 -E "^$DEPLOYMENT_NAME-($2)-" <<< "$1" || true
}

refresh_pod_names() {
    local names
    names=$(_dynserve_kubectl get pods --output name) || return 1
    names=${names//pod\//}
    FRONTEND_POD=$(_dynserve_first "$names" frontend)
    PREFILL_POD=$(_dynserve_first "$names" 'trtllmprefillworker|prefill')
    DECODE_POD=$(_dynserve_first "$names" 'trtllmdecodeworker|decode')
    export FRONTEND_POD PREFILL_POD DECODE_POD
}

_dynserve_lacks_configmap() {
    [ -f "$1" ] && grep -qE '^kind: *DynamoGraphDeployment' "$1" && ! grep -qE '^kind: *ConfigMap' "$1"
}

# deploy_trtllm [yaml]: makes the ConfigMap of the YAML files beside the file (again, if they have changed), applies the
# file, and waits until all pods are ready. A folder of rendered manifests works, too.
deploy_trtllm() {
    local file="${1:-deployments/trtllm/trtllm-disagg-qwen.yaml}" folder engine=() one
    _dynserve_need kubectl || return 1
    [ -e "$file" ] || _dynserve_fail "$file does not exist: deploy_trtllm FILE" || return 1
    if _dynserve_lacks_configmap "$file"; then
        folder=$(dirname "$file")
        for one in "$folder"/*config*.yaml; do [ -f "$one" ] && engine+=("--from-file=$one"); done
        if [ "${#engine[@]}" -gt 0 ]; then
            _dynserve_kubectl create configmap trtllm-config "${engine[@]}" --dry-run=client --output yaml \
                | _dynserve_kubectl apply --filename - || return 1
        fi
    fi
    _dynserve_kubectl apply --filename "$file" || return 1
    _dynserve_wait || return 1
    refresh_pod_names
    echo "namespace:  $NAMESPACE"
    echo "deployment: $DEPLOYMENT_NAME"
    echo "pods:       ${FRONTEND_POD:--} ${PREFILL_POD:--} ${DECODE_POD:--}"
    echo "service:    $FRONTEND_SVC"
    echo "model:      $MODEL_ID"
}

# Whether all Deployments run what was applied last: old pods are ready, too, until they are replaced.
_dynserve_rolled_out() {
    local format='{range .items[*]}{.metadata.name}|{.metadata.generation}|{.status.observedGeneration}|{.spec.replicas}'
    format+='|{.status.updatedReplicas}|{.status.availableReplicas}{"\n"}{end}'
    _dynserve_kubectl get deployments --output "jsonpath=$format" 2> /dev/null \
        | awk -F '|' -v prefix="$DEPLOYMENT_NAME-" \
            'index($1, prefix) == 1 && ($2 != $3 || $5 + 0 < $4 + 0 || $6 + 0 < $4 + 0) { late = 1 } END { exit late }'
}

# Waits until the deployment has pods and all of them are ready.
_dynserve_wait() {
    local deadline=$((SECONDS + READY_TIMEOUT)) lines total ready
    while :; do
        lines=$(_dynserve_kubectl get pods --no-headers 2> /dev/null \
            | grep -E "^$DEPLOYMENT_NAME-" | grep -vE "^$DEPLOYMENT_NAME-test | Completed " || true)
        total=$(grep -c . <<< "$lines" || true)
        ready=$(awk '{ split($2, n, "/"); if (n[1] == n[2] && $3 == "Running") count++ } END { print count + 0 }' <<< "$lines")
        if [ "$total" -gt 0 ] && [ "$ready" -eq "$total" ] && _dynserve_rolled_out; then
            echo "$ready of $total pods are ready"
            return 0
        fi
        if [ "$SECONDS" -ge "$deadline" ]; then
            _dynserve_fail "after $READY_TIMEOUT s $ready of $total pods are ready (READY_TIMEOUT)"
            return 1
        fi
        sleep "${POLL:-3}"
    done
}

# cleanup_deployment [yaml]: deletes what the file describes, and the ConfigMap that deploy_trtllm makes for it; ends the port-forward that was started here.
cleanup_deployment() {
    local file="${1:-deployments/trtllm/trtllm-disagg-qwen.yaml}"
    _dynserve_need kubectl || return 1
    [ -e "$file" ] || _dynserve_fail "$file does not exist: cleanup_deployment FILE" || return 1
    _dynserve_stop_forward
    _dynserve_kubectl delete --ignore-not-found --filename "$file" || return 1
    if _dynserve_lacks_configmap "$file"; then
        _dynserve_kubectl delete --ignore-not-found configmap trtllm-config || return 1
    fi
    echo "deleted $DEPLOYMENT_NAME"
}

check_status() {
    _dynserve_need kubectl || return 1
    local lines
    lines=$(_dynserve_kubectl get pods --output wide) || return 1
    head -n 1 <<< "$lines"
    grep -E "^$DEPLOYMENT_NAME-" <<< "$lines" || _dynserve_fail "$DEPLOYMENT_NAME has no pods in $NAMESPACE" || return 1
    if _dynserve_kubectl get dynamographdeployment "$DEPLOYMENT_NAME" 2> /dev/null; then :; fi
}

monitor_pods() {
    _dynserve_need kubectl || return 1
    _dynserve_kubectl get pods --watch | grep --line-buffered -E "^(NAME|$DEPLOYMENT_NAME-)"
}

_dynserve_stop_forward() {
    if [ -n "$DYNSERVE_FORWARD_PID" ]; then
        kill "$DYNSERVE_FORWARD_PID" 2> /dev/null || true
        wait "$DYNSERVE_FORWARD_PID" 2> /dev/null || true
        DYNSERVE_FORWARD_PID=""
    fi
}

# setup_port_forward: forwards LOCAL_PORT to the frontend's Service, and waits until something answers there.
setup_port_forward() {
    _dynserve_need kubectl curl || return 1
    _dynserve_stop_forward
    if _dynserve_listens; then
        _dynserve_fail "port $LOCAL_PORT is in use by another process; set LOCAL_PORT"
        return 1
    fi
    kubectl --namespace "$NAMESPACE" port-forward "svc/$FRONTEND_SVC" "$LOCAL_PORT:$REMOTE_PORT" > /dev/null &
    DYNSERVE_FORWARD_PID=$!
    local deadline=$((SECONDS + 15))
    while ! _dynserve_listens; do
        if ! kill -0 "$DYNSERVE_FORWARD_PID" 2> /dev/null || [ "$SECONDS" -ge "$deadline" ]; then
            _dynserve_stop_forward
            _dynserve_fail "cannot forward port $LOCAL_PORT to $FRONTEND_SVC"
            return 1
        fi
        sleep 0.2
    done
    echo "port $LOCAL_PORT is forwarded to $FRONTEND_SVC (process $DYNSERVE_FORWARD_PID)"
}

_dynserve_listens() {
    (exec 3<> "/dev/tcp/127.0.0.1/$LOCAL_PORT") 2> /dev/null
}

# _dynserve_ask METHOD PATH [JSON]: prints the body, as jq shows it if that is installed; an HTTP status of 400 or more, or no
# answer, is an error.
_dynserve_ask() {
    local answer code body
    answer=$(curl --silent --show-error --max-time 300 --write-out '\n%{http_code}' --request "$1" \
        "http://127.0.0.1:$LOCAL_PORT$2" ${3:+--header 'Content-Type: application/json' --data-binary "$3"}) || return 1
    code=${answer##*$'\n'}
    body=${answer%$'\n'*}
    if command -v jq > /dev/null && jq . <<< "$body" 2> /dev/null; then :; else printf '%s\n' "$body"; fi
    [ "$code" -lt 400 ] || _dynserve_fail "$1 $2: HTTP $code"
}

test_health() {
    _dynserve_need curl || return 1
    _dynserve_ask GET /health
}

# test_completion [prompt] [max_tokens]
test_completion() {
    _dynserve_need curl jq || return 1
    local body
    body=$(jq --null-input --arg model "$MODEL_ID" --arg prompt "${1:-Write a short poem about the sea at night.}" \
        --argjson tokens "${2:-100}" '{model: $model, prompt: $prompt, max_tokens: $tokens, temperature: 0.7}') || return 1
    _dynserve_ask POST /v1/completions "$body"
}

# test_chat [message] [max_tokens]
test_chat() {
    _dynserve_need curl jq || return 1
    local body
    body=$(jq --null-input --arg model "$MODEL_ID" --arg text "${1:-Hello! What can you help me with?}" \
        --argjson tokens "${2:-150}" \
        '{model: $model, messages: [{role: "user", content: $text}], max_tokens: $tokens, temperature: 0.7}') || return 1
    _dynserve_ask POST /v1/chat/completions "$body"
}

smoke_test() {
    echo "1. pods"
    check_status || return 1
    echo "2. port-forward"
    if ! _dynserve_listens; then setup_port_forward || return 1; fi
    echo "3. health"
    test_health || return 1
    echo "4. completion"
    test_completion "Hello world" 20 || return 1
    echo "smoke test passed"
}

_dynserve_logs() {
    _dynserve_need kubectl || return 1
    refresh_pod_names || return 1
    local pod="${!1}"
    [ -n "$pod" ] || _dynserve_fail "$DEPLOYMENT_NAME has no $2 pod" || return 1
    _dynserve_kubectl logs "$pod" "${@:3}"
}

check_f_logs() { _dynserve_logs FRONTEND_POD frontend --follow; }
check_prefill_logs() { _dynserve_logs PREFILL_POD prefill --follow; }
check_decode_logs() { _dynserve_logs DECODE_POD decode --follow; }

check_all_logs() {
    local name failed=0
    for name in frontend prefill decode; do
        echo "== $name"
        _dynserve_logs "${name^^}_POD" "$name" --tail=50 || failed=1
    done
    return "$failed"
}

# get_metrics: the first lines of the metrics of a frontend and a prefill worker
get_metrics() {
    _dynserve_need kubectl || return 1
    refresh_pod_names || return 1
    local pair pod port page
    for pair in "$FRONTEND_POD:8000" "$PREFILL_POD:9090"; do
        pod=${pair%:*}
        port=${pair##*:}
        [ -n "$pod" ] || _dynserve_fail "$DEPLOYMENT_NAME lacks a pod" || return 1
        echo "== $pod"
        page=$(_dynserve_kubectl exec "$pod" -- python3 -c "import urllib.request as r
print(r.urlopen('http://127.0.0.1:$port/metrics', timeout=10).read().decode())") || return 1
        grep -E '^(dynserve|dynamo|http|trtllm)_' <<< "$page" | head -n 20
    done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    echo "this file is to be sourced: source $0" >&2
    exit 2
fi
cat << EOF
deployment $DEPLOYMENT_NAME in $NAMESPACE, model $MODEL_ID, port $LOCAL_PORT
  deploy_trtllm [yaml]  cleanup_deployment [yaml]  check_status  monitor_pods  setup_port_forward
  test_health  test_completion [prompt] [tokens]  test_chat [message] [tokens]  smoke_test
  check_f_logs  check_prefill_logs  check_decode_logs  check_all_logs  get_metrics  refresh_pod_names
EOF
