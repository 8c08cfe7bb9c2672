{{/* The name of all objects. */}}
{{- define "dynserve.name" -}}
{{- $name := .Values.name | default .Release.Name -}}
{{- if gt (len $name) 50 -}}{{ fail (printf "name %q has more than 50 characters: names of Services would be too long" $name) }}{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Labels that select the pods of one component: (list . component). */}}
{{- define "dynserve.labels" -}}
app.kubernetes.io/name: dynserve
app.kubernetes.io/instance: {{ include "dynserve.name" (first .) }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* Metadata of an object: (list . component name). */}}
{{- define "dynserve.metadata" -}}
name: {{ index . 2 }}
labels:
  {{- include "dynserve.labels" (list (first .) (index . 1)) | nindent 2 }}
  app.kubernetes.io/managed-by: {{ (first .).Release.Service }}
  helm.sh/chart: {{ (first .).Chart.Name }}-{{ (first .).Chart.Version }}
{{- end -}}

{{/* The Secret of the planes' certificates; empty without mutual TLS. */}}
{{- define "dynserve.tlsSecret" -}}
{{- if .Values.planeTls.enabled -}}
{{- .Values.planeTls.secret | default (printf "%s-plane-tls" (include "dynserve.name" .)) -}}
{{- end -}}
{{- end -}}

{{- define "dynserve.natsUrl" -}}
{{- $scheme := ternary "tls" "nats" (ne (include "dynserve.tlsSecret" .) "") -}}
{{- .Values.nats.url | default (printf "%s://%s-nats:4222" $scheme (include "dynserve.name" .)) -}}
{{- end -}}

{{- define "dynserve.etcdUrl" -}}
{{- $scheme := ternary "https" "http" (ne (include "dynserve.tlsSecret" .) "") -}}
{{- .Values.etcd.url | default (printf "%s://%s-etcd:2379" $scheme (include "dynserve.name" .)) -}}
{{- end -}}

{{/* The claim of the model cache; empty without one. */}}
{{- define "dynserve.modelClaim" -}}
{{- if or .Values.modelCache.claim .Values.modelCache.size -}}
{{- .Values.modelCache.claim | default (printf "%s-models" (include "dynserve.name" .)) -}}
{{- end -}}
{{- end -}}

{{/* The roles that there are, as JSON. */}}
{{- define "dynserve.roles" -}}
{{- $roles := list "frontend" -}}
{{- range list "aggregated" "decode" "prefill" -}}
{{- if kindIs "map" (index $.Values .) }}{{ $roles = append $roles . }}{{ end -}}
{{- end -}}
{{- if eq (len $roles) 1 }}{{ fail "no workers: give prefill and decode, or aggregated" }}{{ end -}}
{{- if ne (has "prefill" $roles) (has "decode" $roles) }}{{ fail "prefill and decode need each other" }}{{ end -}}
{{- if and .Values.planeTls.secret (not .Values.planeTls.enabled) }}{{ fail "planeTls.secret needs planeTls.enabled: true" }}{{ end -}}
{{- if and (eq .Values.autoscaling.kind "keda") (not .Values.autoscaling.prometheus) }}{{ fail "autoscaling.kind keda needs autoscaling.prometheus" }}{{ end -}}
{{- range $role := $roles -}}
{{- $pods := index $.Values $role -}}
{{- $most := int (dig "maxReplicas" 0 $pods) -}}
{{- if and $most (lt $most (int (dig "replicas" 1 $pods))) }}{{ fail (printf "%s.maxReplicas %d is less than replicas" $role $most) }}{{ end -}}
{{- range dig "args" list $pods -}}
{{- $flag := first (splitList "=" .) -}}
{{- if has $flag (list "--http-host" "--http-port" "--system-host" "--system-port" "--tls-certificate" "--tls-key" "--workers") -}}
{{- fail (printf "%s.args: %s cannot be changed here, since probes and Services depend on it" $role $flag) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int (dig "maxReplicas" 0 .Values.frontend)) 0) (not (dig "resources" "requests" "cpu" "" .Values.frontend)) -}}
{{- fail "frontend.maxReplicas needs frontend.resources.requests.cpu: it scales by that" -}}
{{- end -}}
{{- if .Values.namespace }}{{ fail "namespace: use helm's --namespace" }}{{ end -}}
{{- toJson $roles -}}
{{- end -}}

{{/* The options of an engine as JSON, which is YAML. */}}
{{- define "dynserve.engine" -}}
{{- toPrettyJson (dig "engine" dict .) -}}
{{- end -}}

{{/* The environment that the file's own entries come after, as JSON, name to value: (list . role pods). */}}
{{- define "dynserve.ownEnv" -}}
{{- $root := first . -}}
{{- $own := list -}}
{{- if eq (index . 1) "frontend" -}}
{{- $own = append $own (list "DYN_ROUTER_MODE" (dig "routerMode" "kv" (index . 2))) -}}
{{- with int (dig "ttftSloMs" 0 (index . 2)) }}{{ $own = append $own (list "DYN_TTFT_SLO_MS" (toString .)) }}{{ end -}}
{{- if $root.Values.apiKeysSecret }}{{ $own = append $own (list "DYN_API_KEYS_FILE" "/keys/keys") }}{{ end -}}
{{- else -}}
{{- $own = append $own (list "DYN_MODEL_PATH" $root.Values.model) -}}
{{- $own = append $own (list "DYN_MODEL_NAME" ($root.Values.servedModelName | default $root.Values.model)) -}}
{{- $own = append $own (list "DYN_EXECUTOR" $root.Values.executor) -}}
{{- if include "dynserve.modelClaim" $root }}{{ $own = append $own (list "HF_HOME" "/models") }}{{ end -}}
{{- if $root.Values.hfTokenSecret }}{{ $own = append $own (list "HF_TOKEN" "") }}{{ end -}}
{{- end -}}
{{- toJson $own -}}
{{- end -}}

{{/* Entries of a container's environment: (list . role pods). */}}
{{- define "dynserve.env" -}}
{{- $root := first . -}}
{{- $role := index . 1 -}}
{{- $given := dig "env" dict (index . 2) -}}
{{- range list "NATS_URL" "NATS_SERVER" "ETCD_URL" "ETCD_ENDPOINTS" -}}
{{- if hasKey $given . }}{{ fail (printf "%s.env.%s: use nats.url and etcd.url" $role .) }}{{ end -}}
{{- end -}}
{{- $own := include "dynserve.ownEnv" . | fromJsonArray -}}
{{- $ours := list -}}
{{- range $own }}{{ $ours = append $ours (first .) }}{{ end -}}
{{- $defaults := list
  (list "DYN_NAMESPACE" (include "dynserve.name" $root)) (list "DYN_LINK_HOST" "0.0.0.0")
  (list "DYN_SYSTEM_HOST" "0.0.0.0") (list "DYN_ADVERTISE_HOST" "$(POD_IP)") -}}
{{- if eq $role "frontend" -}}
{{- $defaults = concat $defaults (list (list "DYN_HTTP_HOST" "0.0.0.0") (list "DYN_HTTP_PORT" "8000")) -}}
{{- else -}}
{{- $defaults = append $defaults (list "DYN_SYSTEM_PORT" "9090") -}}
{{- end -}}
{{- if include "dynserve.tlsSecret" $root -}}
{{- $defaults = concat $defaults (list
  (list "DYN_PLANE_TLS_CERTIFICATE" "/planes/tls.crt") (list "DYN_PLANE_TLS_KEY" "/planes/tls.key")
  (list "DYN_PLANE_TLS_CA" "/planes/ca.crt")) -}}
{{- end -}}
{{- if not $root.Values.nats.urlSecret }}{{ $defaults = append $defaults (list "NATS_URL" (include "dynserve.natsUrl" $root)) }}{{ end -}}
{{- if not $root.Values.etcd.urlSecret }}{{ $defaults = append $defaults (list "ETCD_URL" (include "dynserve.etcdUrl" $root)) }}{{ end -}}
{{- if not (hasKey $given "POD_IP") }}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}
{{- if not (hasKey $given "POD_NAME") }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- end }}
{{- range $defaults }}
{{- if not (hasKey $given (first .)) }}
- name: {{ first . }}
  value: {{ index . 1 | quote }}
{{- end }}
{{- end }}
{{- range $own }}
- name: {{ first . }}
{{- if and (eq (first .) "HF_TOKEN") (not (hasKey $given "HF_TOKEN")) }}
  valueFrom: {secretKeyRef: {name: {{ $root.Values.hfTokenSecret }}, key: HF_TOKEN, optional: true}}
{{- else }}
  value: {{ get (merge (deepCopy $given) (dict (first .) (index . 1))) (first .) | quote }}
{{- end }}
{{- end }}
{{- range list (list "NATS_URL" $root.Values.nats.urlSecret) (list "ETCD_URL" $root.Values.etcd.urlSecret) }}
{{- if index . 1 }}
- name: {{ first . }}
  valueFrom: {secretKeyRef: {name: {{ index . 1 }}, key: url}}
{{- end }}
{{- end }}
{{- range $name, $value := $given }}
{{- if not (has $name $ours) }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "dynserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end -}}
