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
{{- if eq $role "gateway" -}}
{{- $_ := set $part "http_port" (default -1 $.Values.ports.http) -}}
{{- else -}}
{{- $_ := set $part "num_gpus" $values.gpus -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}
