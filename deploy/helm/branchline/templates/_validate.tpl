{{/* Contradictions that the schema can't see: those between two values. */}}
{{- define "branchline.validate" -}}
{{- if not (regexMatch "^[a-z]" (include "branchline.name" .)) -}}
{{- fail (printf "the release's name must begin with a letter, not %q: set fullnameOverride" .Release.Name) -}}
{{- end -}}
{{- $ports := .Values.ports -}}
{{- $names := list "gateway" "prefill" "decode" "control" -}}
{{- range $name := list "http" "metrics" -}}
{{- if index $ports $name -}}
{{- $names = append $names $name -}}
{{- end -}}
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
{{- include "branchline.validateAutoscaling" . -}}
{{- include "branchline.validateSecurity" . -}}
{{- include "branchline.validateRoutes" . -}}
{{- range $name, $part := .Values.monitoring -}}
{{- if and $part.enabled (not $ports.metrics) -}}
{{- fail (printf "monitoring.%s.enabled is true, but ports.metrics is 0" $name) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.monitoring.serviceMonitor.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.scrapers) -}}
{{- fail "monitoring.serviceMonitor.enabled is true, but networkPolicy.scrapers lets nobody scrape: name Prometheus's pods" -}}
{{- end -}}
{{- end -}}

{{- define "branchline.validateAutoscaling" -}}
{{- $bounds := false -}}
{{- range $role := list "prefill" "decode" "gateway" -}}
{{- $values := index $.Values $role -}}
{{- $replicas := include "branchline.replicas" (dict "root" $ "role" $role) | int -}}
{{- $min := $values.minReplicas | int -}}
{{- $max := $values.maxReplicas | int -}}
{{- $bounds = or $bounds $min $max -}}
{{- if and (or $min $max) (not $.Values.autoscaling.enabled) -}}
{{- fail (printf "%s.minReplicas and maxReplicas need autoscaling.enabled" $role) -}}
{{- end -}}
{{- if gt $min $replicas -}}
{{- fail (printf "%s.minReplicas is %d, but only %d pods are needed at the start" $role $min $replicas) -}}
{{- end -}}
{{- if and $max (lt $max $replicas) -}}
{{- fail (printf "%s.maxReplicas is %d, but %d pods are needed at the start" $role $max $replicas) -}}
{{- end -}}
{{- end -}}
{{- if and $.Values.autoscaling.enabled (not $bounds) -}}
{{- fail "autoscaling.enabled is true, but no role has minReplicas or maxReplicas" -}}
{{- end -}}
{{- end -}}

{{- define "branchline.validateSecurity" -}}
{{- range $part := list "outside" "inside" -}}
{{- $values := index $.Values.security $part -}}
{{- if and $values.enabled (not $values.secret) -}}
{{- fail (printf "security.%s.enabled needs security.%s.secret: the Secret with the certificate" $part $part) -}}
{{- end -}}
{{- if and $values.secret (not $values.enabled) -}}
{{- fail (printf "security.%s.secret is given, but security.%s.enabled is false: nothing would be encrypted" $part $part) -}}
{{- end -}}
{{- end -}}
{{- range $part := list "outside" "inside" -}}
{{- $values := index $.Values.security $part -}}
{{- if and $values.certManager.issuer (not $values.enabled) -}}
{{- fail (printf "security.%s.certManager.issuer is given, but security.%s.enabled is false" $part $part) -}}
{{- end -}}
{{- end -}}
{{- with .Values.security.outside -}}
{{- if and .certManager.issuer (not .certManager.dnsNames) -}}
{{- fail "security.outside.certManager.issuer needs security.outside.certManager.dnsNames: which host names?" -}}
{{- end -}}
{{- if and .certManager.issuer .clientCa -}}
{{- fail "security.outside.clientCa wants an authority of clients in the Secret, which certManager writes: make the Secret yourself" -}}
{{- end -}}
{{- end -}}
{{- with .Values.monitoring.serviceMonitor -}}
{{- if and .enabled $.Values.security.outside.enabled (not .gatewayTls) -}}
{{- fail "monitoring.serviceMonitor.enabled with security.outside needs monitoring.serviceMonitor.gatewayTls: how Prometheus knows the gateways" -}}
{{- end -}}
{{- if and .gatewayTls (not $.Values.security.outside.enabled) -}}
{{- fail "monitoring.serviceMonitor.gatewayTls is given, but security.outside.enabled is false" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.security.outside.clientCa (not .Values.security.outside.enabled) -}}
{{- fail "security.outside.clientCa is true, but security.outside.enabled is false" -}}
{{- end -}}
{{- with .Values.gcsFaultTolerance -}}
{{- if and .enabled (not .redisAddress) -}}
{{- fail "gcsFaultTolerance.enabled needs gcsFaultTolerance.redisAddress" -}}
{{- end -}}
{{- if and (not .enabled) (or .redisAddress .passwordSecret) -}}
{{- fail "a Redis is given, but gcsFaultTolerance.enabled is false" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "branchline.validateRoutes" -}}
{{- $routes := .Values.routes -}}
{{- $ingress := .Values.ingress -}}
{{- if and (not .Values.ports.http) (or $routes.http.enabled $ingress.http.enabled) -}}
{{- fail (printf "%s.http.enabled is true, but ports.http is 0" ($routes.http.enabled | ternary "routes" "ingress")) -}}
{{- end -}}
{{- range $kind := list "grpc" "http" -}}
{{- $route := index $routes $kind -}}
{{- if and $route.enabled (not $route.parentRefs) -}}
{{- fail (printf "routes.%s.enabled needs routes.%s.parentRefs: which Gateway?" $kind $kind) -}}
{{- end -}}
{{- if and (index $ingress $kind "enabled") (not (index $ingress $kind "host")) -}}
{{- fail (printf "ingress.%s.enabled needs ingress.%s.host" $kind $kind) -}}
{{- end -}}
{{- if and (or $route.enabled (index $ingress $kind "enabled")) $.Values.networkPolicy.enabled (not $.Values.networkPolicy.clients) -}}
{{- fail (printf "there is a way in for %s, but networkPolicy.clients lets nobody call: name the controller's pods" $kind) -}}
{{- end -}}
{{- end -}}
{{- if and $ingress.grpc.enabled $ingress.http.enabled (eq $ingress.grpc.host $ingress.http.host) -}}
{{- fail (printf "ingress.grpc.host and ingress.http.host are both %s: each needs its own" $ingress.grpc.host) -}}
{{- end -}}
{{- if and $routes.grpc.enabled $routes.http.enabled (eq (toJson $routes.grpc.parentRefs) (toJson $routes.http.parentRefs)) -}}
{{- if or (not $routes.grpc.hostnames) (not $routes.http.hostnames) -}}
{{- fail "routes.grpc and routes.http share their Gateways: each needs hostnames of its own" -}}
{{- end -}}
{{- range $host := $routes.grpc.hostnames -}}
{{- if has $host $routes.http.hostnames -}}
{{- fail (printf "routes.grpc and routes.http both have the host name %s on the same Gateways" $host) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
