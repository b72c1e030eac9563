{{/* The name that all others begin with. KubeRay shortens the head Service's name (`…-head-svc`) above 50 characters. */}}
{{- define "branchline.name" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "branchline.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* What tells the release's pods from others. */}}
{{- define "branchline.selector" -}}
app.kubernetes.io/name: branchline
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "branchline.labels" -}}
{{ include "branchline.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Selects the pods of one group of the RayCluster. Takes (dict "root" $ "group" NAME). KubeRay sets these labels. */}}
{{- define "branchline.groupSelector" -}}
ray.io/cluster: {{ include "branchline.name" .root }}
ray.io/group: {{ .group }}
{{- end -}}

{{- define "branchline.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "branchline.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The Secret with Ray's token. KubeRay names the one that it makes like the cluster. */}}
{{- define "branchline.rayAuthSecret" -}}
{{- default (include "branchline.name" .) .Values.rayAuth.existingSecret -}}
{{- end -}}

{{- define "branchline.huggingFaceSecret" -}}
{{- if .Values.huggingFace.token -}}
{{- printf "%s-hugging-face" (include "branchline.name" .) -}}
{{- else -}}
{{- .Values.huggingFace.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "branchline.modelCacheClaim" -}}
{{- default (printf "%s-models" (include "branchline.name" .)) .Values.modelCache.existingClaim -}}
{{- end -}}

{{/* The program's configuration: `config`, and what this chart knows about each role. */}}
{{- define "branchline.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- range $role := list "prefill" "decode" "gateway" -}}
{{- $values := index $.Values $role -}}
{{- $part := get $config $role -}}
{{- $_ := set $part "replicas" $values.replicas -}}
{{- $_ := set $part "host" "0.0.0.0" -}}
{{- $_ := set $part (eq $role "gateway" | ternary "grpc_port" "port") (index $.Values.ports $role) -}}
{{- $_ := set $part "num_cpus" $values.cpus -}}
{{- $_ := set $part "resource" (printf "branchline_%s" $role) -}}
{{- with $.Values.ports.metrics -}}
{{- $_ := set $part "metrics_port" . -}}
{{- end -}}
{{- if eq $role "gateway" -}}
{{- $_ := set $part "http_port" (default -1 $.Values.ports.http) -}}
{{- else -}}
{{- $_ := set $part "num_gpus" $values.gpus -}}
{{- end -}}
{{- end -}}
{{- $_ := set $config "control" (dict "port" .Values.ports.control) -}}
{{- with include "branchline.security" . -}}
{{- $_ := set $config "security" (fromYaml .) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* A role's pods: one for each worker of each model. Takes (dict "root" $ "role" NAME). */}}
{{- define "branchline.replicas" -}}
{{- $main := index .root.Values .role "replicas" | int -}}
{{- $sum := $main -}}
{{- if ne .role "gateway" -}}
{{- range .root.Values.config.others -}}
{{- $sum = add $sum (dig $.role "replicas" $main . | int) -}}
{{- end -}}
{{- end -}}
{{- $sum -}}
{{- end -}}

{{/* The program's section `security`: files from the mounted Secrets. Empty while nothing of it is used. */}}
{{- define "branchline.security" -}}
{{- with .Values.security -}}
{{- if .outside.enabled }}
outside:
  certificate: /etc/branchline/outside/tls.crt
  key: /etc/branchline/outside/tls.key
  {{- if .outside.clientCa }}
  client_ca: /etc/branchline/outside/ca.crt
  {{- end }}
{{- end }}
{{- if .inside.enabled }}
inside:
  certificate: /etc/branchline/inside/tls.crt
  key: /etc/branchline/inside/tls.key
  ca: /etc/branchline/inside/ca.crt
  server_name: {{ .inside.serverName }}
{{- end }}
{{- if .apiKeys.secret }}
api_keys: /etc/branchline/api-keys/{{ .apiKeys.key }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* The Secrets that a group's pods mount below /etc/branchline, as YAML: directory to name. Takes (dict "root" $ "group" NAME). */}}
{{- define "branchline.mountedSecrets" -}}
{{- $security := .root.Values.security -}}
{{- if and $security.outside.enabled (eq .group "gateway") }}
outside: {{ $security.outside.secret }}
{{- end }}
{{- if and $security.inside.enabled (ne .group "headgroup") }}
inside: {{ $security.inside.secret }}
{{- end }}
{{- if and $security.apiKeys.secret (eq .group "gateway") }}
api-keys: {{ $security.apiKeys.secret }}
{{- end }}
{{- end -}}

{{/* Whether a role's gRPC port speaks TLS. Takes (dict "root" $ "group" NAME); empty for no. */}}
{{- define "branchline.tls" -}}
{{- $part := eq .group "gateway" | ternary .root.Values.security.outside .root.Values.security.inside -}}
{{- if $part.enabled }}true{{ end -}}
{{- end -}}

{{/* The tlsConfig by which Prometheus asks for metrics; empty for plain text. */}}
{{- define "branchline.gatewayScrape" -}}
{{- if .Values.security.outside.enabled -}}
{{- toYaml .Values.monitoring.serviceMonitor.gatewayTls -}}
{{- end -}}
{{- end -}}

{{/* It has the inside's certificate, as every worker has. */}}
{{- define "branchline.workerScrape" -}}
{{- with .Values.security.inside -}}
{{- if .enabled -}}
ca: {secret: {name: {{ .secret }}, key: ca.crt}}
cert: {secret: {name: {{ .secret }}, key: tls.crt}}
keySecret: {name: {{ .secret }}, key: tls.key}
serverName: {{ .serverName }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A certificate that cert-manager makes and renews. Takes (dict "root" $ "part" NAME "dnsNames" LIST "usages" LIST). */}}
{{- define "branchline.certificate" -}}
{{- $values := index .root.Values.security .part -}}
{{- if and $values.enabled $values.certManager.issuer -}}
apiVersion: cert-manager.io/v1
kind: Certificate
metadata:
  name: {{ include "branchline.name" .root }}-{{ .part }}
  labels:
    {{- include "branchline.labels" .root | nindent 4 }}
spec:
  secretName: {{ $values.secret }}
  issuerRef:
    name: {{ $values.certManager.issuer }}
    kind: {{ $values.certManager.kind }}
  dnsNames:
    {{- toYaml .dnsNames | nindent 4 }}
  usages:
    {{- toYaml .usages | nindent 4 }}
  privateKey:
    rotationPolicy: Always
{{- end -}}
{{- end -}}
