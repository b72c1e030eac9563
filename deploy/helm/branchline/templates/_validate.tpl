{{/* Contradictions that the schema can't see: those between two values. */}}
{{- define "branchline.validate" -}}
{{- if not (regexMatch "^[a-z]" (include "branchline.name" .)) -}}
{{- fail (printf "the release's name must begin with a letter, not %q: set fullnameOverride" .Release.Name) -}}
{{- end -}}
{{- $ports := .Values.ports -}}
{{- $names := list "gateway" "prefill" "decode" -}}
{{- if $ports.http -}}
{{- $names = append $names "http" -}}
{{- end -}}
{{- range $i, $one := $names -}}
{{- range $other := slice $names (add1 $i | int) -}}
{{- if eq (index $ports $one | int) (index $ports $other | int) -}}
{{- fail (printf "ports.%s and ports.%s are both %v: each needs its own" $one $other (index $ports $one)) -}}
{{- end -}}
{{- end -}}
{{- $port := index $ports $one | int -}}
{{- /* From 10002 to 19999 Ray's own processes take what is free. */ -}}
{{- if or (has $port (list 6379 8080 8265 10001 52365)) (and (ge $port 10002) (le $port 19999)) -}}
{{- fail (printf "ports.%s: %d is a port of Ray's own" $one $port) -}}
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
