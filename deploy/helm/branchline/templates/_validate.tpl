{{/* Contradictions that the schema can't see: those between two values. */}}
{{- define "branchline.validate" -}}
{{- if not (regexMatch "^[a-z]" (include "branchline.name" .)) -}}
{{- fail (printf "the release's name must begin with a letter, not %q: set fullnameOverride" .Release.Name) -}}
{{- end -}}
{{- $ports := .Values.ports -}}
{{- $names := list "gateway" "prefill" "decode" -}}
{{- range $i, $one := $names -}}
{{- range $other := slice $names (add1 $i | int) -}}
{{- if eq (index $ports $one | int) (index $ports $other | int) -}}
{{- fail (printf "ports.%s and ports.%s are both %v: each role needs a port of its own" $one $other (index $ports $one)) -}}
{{- end -}}
{{- end -}}
{{- if has (index $ports $one | int) (list 6379 8080 8265 10001 52365) -}}
{{- fail (printf "ports.%s: %v is a port of Ray's own" $one (index $ports $one)) -}}
{{- end -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
{{- $gpus := index $.Values $role "gpus" | int -}}
{{- $device := $.Values.config.model.device -}}
{{- if and (eq $gpus 0) (eq $device "cuda") -}}
{{- fail (printf "%s.gpus is 0, but config.model.device is cuda" $role) -}}
{{- end -}}
{{- if and (gt $gpus 0) (eq $device "cpu") -}}
{{- fail (printf "%s.gpus is %d, but config.model.device is cpu: the GPUs would lie idle" $role $gpus) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.huggingFace.token .Values.huggingFace.existingSecret -}}
{{- fail "huggingFace.token and huggingFace.existingSecret are both given: which is it?" -}}
{{- end -}}
{{- if and .Values.rayAuth.existingSecret (not .Values.rayAuth.enabled) -}}
{{- fail "rayAuth.existingSecret is given, but rayAuth.enabled is false" -}}
{{- end -}}
{{- if and .Values.modelCache.existingClaim (not .Values.modelCache.persistent) -}}
{{- fail "modelCache.existingClaim is given, but modelCache.persistent is false" -}}
{{- end -}}
{{- end -}}
