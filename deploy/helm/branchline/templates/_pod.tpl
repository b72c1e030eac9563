{{/* Parts of pods. Nothing runs as root, and nothing but the mounted directories can be written. */}}

{{- define "branchline.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "branchline.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "branchline.podMetadata" -}}
labels:
  # No versions here: another chart version alone must not replace the pods.
  {{- include "branchline.selector" . | nindent 2 }}
  {{- with .Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The environment of Ray's containers. */}}
{{- define "branchline.env" -}}
- name: HOME
  value: /home/branchline
- name: HF_HOME
  value: /models/huggingface
- name: XDG_CACHE_HOME
  value: /models/cache
{{- with include "branchline.huggingFaceSecret" . }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingFace.key }}
{{- end }}
{{- range $name, $value := .Values.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Ray's own health: of the node's raylet, and on the head of the cluster's control store. */}}
{{- define "branchline.rayHealth" -}}
httpGet:
  path: /api/healthz
  port: 52365
{{- end -}}

{{/*
The health of a role. The kubelet's gRPC probes speak no TLS: then it sees only that the port is open, which it is once
the model is loaded, and no longer when the process has gone.
*/}}
{{- define "branchline.roleHealth" -}}
{{- if include "branchline.tls" . -}}
tcpSocket:
  port: {{ .port }}
{{- else -}}
grpc:
  port: {{ .port }}
{{- end -}}
{{- end -}}

{{/* Before a gateway is stopped. Kubernetes takes it off the Service meanwhile, which needs a few seconds. */}}
{{- define "branchline.drain" -}}
preStop:
  exec:
    {{- $outside := .Values.security.outside }}
    {{- $closed := or $outside.enabled .Values.security.apiKeys.secret }}
    {{- if and $closed (or $outside.clientCa (not .Values.ports.metrics)) }}
    command: [sleep, {{ .Values.gateway.drainSeconds | quote }}]
    {{- else }}
    command:
      - python
      - -m
      - gateway.drain
      {{- if $closed }}
      - --metrics={{ ternary "https" "http" $outside.enabled }}://127.0.0.1:{{ .Values.ports.metrics }}/metrics
      {{- else }}
      - --target=127.0.0.1:{{ .Values.ports.gateway }}
      {{- end }}
      - --timeout={{ .Values.gateway.drainSeconds }}
      - --settle=10
    {{- end }}
{{- end -}}

{{/*
The pod of a Ray node. Takes (dict "root" $ "group" NAME "values" VALUES "port" PORT); a port of 0 is the head's.
A worker's health over gRPC says whether it is ready; whether it lives is the supervisor's business, which replaces its
process. So the liveness probe looks at Ray, and only a worker that doesn't come up at all restarts its pod.
*/}}
{{- define "branchline.rayPod" -}}
{{- $root := .root -}}
metadata:
  {{- include "branchline.podMetadata" $root | nindent 2 }}
spec:
  serviceAccountName: {{ include "branchline.serviceAccount" $root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- $drain := eq .group "gateway" | ternary $root.Values.gateway.drainSeconds 0 | int }}
  # Ray has half a minute behind what the preStop hook may take.
  terminationGracePeriodSeconds: {{ add 30 $drain }}
  securityContext:
    {{- include "branchline.podSecurityContext" $root | nindent 4 }}
  {{- with $root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.topologySpread }}
  topologySpreadConstraints:
    {{- range . }}
    - topologyKey: {{ .topologyKey }}
      maxSkew: {{ .maxSkew }}
      whenUnsatisfiable: {{ .whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "branchline.groupSelector" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  containers:
    - name: ray
      image: {{ include "branchline.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "branchline.containerSecurityContext" $root | nindent 8 }}
      env:
        {{- include "branchline.env" $root | nindent 8 }}
      resources:
        requests:
          cpu: {{ .values.cpus }}
          memory: {{ .values.memory }}
          {{- if .values.gpus }}
          {{ .values.gpuResource }}: {{ .values.gpus }}
          {{- end }}
        limits:
          memory: {{ .values.memory }}
          {{- if .values.gpus }}
          {{ .values.gpuResource }}: {{ .values.gpus }}
          {{- end }}
      {{- if .port }}
      ports:
        - name: grpc
          containerPort: {{ .port }}
        {{- if and (eq .group "gateway") $root.Values.ports.http }}
        - name: http
          containerPort: {{ $root.Values.ports.http }}
        {{- end }}
        {{- with $root.Values.ports.metrics }}
        - name: metrics
          containerPort: {{ . }}
        {{- end }}
      startupProbe:
        {{- include "branchline.roleHealth" . | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: {{ add 6 (divf $root.Values.config.ray.start_timeout_s 10 | ceil | int) }}
      readinessProbe:
        {{- include "branchline.roleHealth" . | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 3
      {{- else }}
      ports:
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
      startupProbe:
        {{- include "branchline.rayHealth" $root | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 60
      readinessProbe:
        {{- include "branchline.rayHealth" $root | nindent 8 }}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: 6
      {{- end }}
      {{- if $drain }}
      lifecycle:
        {{- include "branchline.drain" $root | nindent 8 }}
      {{- end }}
      livenessProbe:
        {{- include "branchline.rayHealth" $root | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 12
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: home
          mountPath: /home/branchline
        - name: models
          mountPath: /models
        {{- range $directory, $secret := include "branchline.mountedSecrets" . | fromYaml }}
        - name: {{ $directory }}
          mountPath: /etc/branchline/{{ $directory }}
          readOnly: true
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: home
      emptyDir: {}
    - name: models
      {{- if and .port $root.Values.modelCache.persistent }}
      persistentVolumeClaim:
        claimName: {{ include "branchline.modelCacheClaim" $root }}
      {{- else }}
      emptyDir:
        sizeLimit: {{ $root.Values.modelCache.size }}
      {{- end }}
    {{- if and (not .port) $root.Values.autoscaling.enabled }}
    # What an account's token usually comes with, but for the autoscaler's container alone.
    - name: kubernetes
      projected:
        defaultMode: 0440
        sources:
          - serviceAccountToken:
              path: token
              expirationSeconds: 3607
          - configMap:
              name: kube-root-ca.crt
              items: [{key: ca.crt, path: ca.crt}]
    {{- end }}
    {{- range $directory, $secret := include "branchline.mountedSecrets" . | fromYaml }}
    - name: {{ $directory }}
      secret:
        secretName: {{ $secret }}
        # Read by the pods' group, and by nobody else.
        defaultMode: 0440
    {{- end }}
{{- end -}}
