{{/* An Ingress to one of the gateways' ports. Takes (dict "root" $ "kind" PORT-NAME "values" VALUES). */}}
{{- define "branchline.ingress" -}}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {{ include "branchline.name" .root }}-{{ .kind }}
  labels:
    {{- include "branchline.labels" .root | nindent 4 }}
  {{- with .values.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with .values.className }}
  ingressClassName: {{ . }}
  {{- end }}
  {{- if .values.tlsSecret }}
  tls:
    - hosts: [{{ .values.host | quote }}]
      secretName: {{ .values.tlsSecret }}
  {{- end }}
  rules:
    - host: {{ .values.host | quote }}
      http:
        paths:
          - path: /
            pathType: Prefix
            backend:
              service:
                name: {{ include "branchline.name" .root }}-gateway
                port:
                  name: {{ .kind }}
{{- end -}}
