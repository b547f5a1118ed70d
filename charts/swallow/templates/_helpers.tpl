{{/* The name of everything that is the operator's own. */}}
{{- define "swallow.name" -}}
{{- if contains "swallow" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-swallow" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* Cluster-wide names: releases of one name may exist in several namespaces. */}}
{{- define "swallow.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "swallow.name" .) -}}
{{- end }}

{{- define "swallow.account" -}}
{{- .Values.serviceAccount.name | default (include "swallow.name" .) -}}
{{- end }}

{{- define "swallow.selector" -}}
app.kubernetes.io/name: swallow-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "swallow.labels" -}}
{{ include "swallow.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}
